"""The transformers of conf/model: their maps, sizes and positions, in every way that they are run. Weights are random."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from timm.models import get_pretrained_cfg

from beauty_bafe.models.backbones import Backbone
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.extractor import BackgroundAgnosticExtractor
from beauty_bafe.models.half_precision import HalfPrecision
from beauty_bafe.models.inference import MASK_SIZE, Describer, Engine
from beauty_bafe.models.module import load_extractor
from beauty_bafe.models.pooling import spoc

CONF = Path(__file__).parents[2] / "conf"
WIDTHS = {"dinov3_small": 384, "dinov3_base": 768, "siglip2_base": 768, "pe_core_base": 768}
LICENCES = {"dinov3_small": "dinov3-license", "siglip2_base": "apache-2.0", "pe_core_base": "apache-2.0"}
KINDS = ["dinov3_small", "siglip2_base", "pe_core_base"]  # dinov3_base is dinov3_small, wider
SHALLOW = {"depth": 4}
NARROW = {"depth": 4, "embed_dim": 64, "num_heads": 2}
POOLINGS = [Pooling(spoc, saliency=True)]
DECODER = {"_target_": "beauty_bafe.models.decoder.TopDownDecoder", "width": 8}


@pytest.fixture
def model(configure: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Arguments of an extractor as conf/model has them, but of four blocks, every one tapped, and without weights."""

    def model(name: str, options: dict[str, Any], **others: Any) -> dict[str, Any]:
        given: Any = OmegaConf.to_container(configure("train", f"model={name}").model, resolve=True)
        given |= {"taps": [f"blocks.{block}" for block in range(4)], "pretrained": False, "hidden": 8} | others
        return given | {"options": given["options"] | options}

    return model


def build(model: dict[str, Any]) -> Backbone:
    torch.manual_seed(0)
    return Backbone(**{key: model[key] for key in ("name", "taps", "last", "size", "pretrained", "weights", "options")}).eval()


@pytest.mark.parametrize("name", WIDTHS)
def test_the_file_fits_the_pretrained_network(name: str, configure: Callable[..., Any]) -> None:
    cfg = configure("train", f"model={name}").model
    assert cfg.name in timm.list_models(pretrained=True)
    pretrained = get_pretrained_cfg(cfg.name)
    assert cfg.size == pretrained.input_size[1]
    assert (cfg.mean, cfg.std, cfg.weights, cfg.last) == (None, None, None, "norm")
    assert list(cfg.taps) == ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]
    if name in LICENCES:
        assert pretrained.license == LICENCES[name], "the comment in conf/model says otherwise"
        text = (CONF / "model" / f"{name}.yaml").read_text().lower()
        assert f"licence: {LICENCES[name].replace('-license', '')}" in text


@torch.inference_mode()
@pytest.mark.parametrize("name", WIDTHS)
def test_maps_and_their_cells(name: str, model: Callable[..., dict[str, Any]]) -> None:
    """At the usual size and at an oblong one; a changed patch changes its own cell of the first map the most."""
    backbone = build(model(name, SHALLOW))
    pretrained = get_pretrained_cfg(model(name, {})["name"])
    assert (backbone.mean, backbone.std) == (pretrained.mean, pretrained.std)
    assert (backbone.channels, backbone.last_channels) == ([WIDTHS[name]] * 4, WIDTHS[name])
    assert (backbone.strides, backbone.patch) == ([16] * 4, 16)
    kept = {key.split(".")[0] for key, _ in backbone.net.named_parameters()}
    assert not kept & {"attn_pool", "head", "fc_norm"}
    for rows, columns in ((14, 14), (10, 21)):
        picture = torch.randn(1, 3, 16 * rows, 16 * columns, generator=torch.Generator().manual_seed(1))
        maps = backbone(picture)
        assert [tuple(tap.shape[1:]) for tap in [*maps.taps, maps.last]] == [(WIDTHS[name], rows, columns)] * 5
        prefix = backbone.net.num_prefix_tokens
        assert prefix == {"dinov3": 5, "siglip2": 0, "pe": 1}[name.split("_")[0]], "class and registers"
        tokens = backbone.net.forward_features(picture)[:, prefix:]
        assert torch.equal(maps.last[0, :, 2, 7], tokens[0, 2 * columns + 7])
        cells = [(0, 0), (2, columns - 3), (rows - 1, columns - 1)]
        others = picture.repeat(len(cells), 1, 1, 1)
        for other, (row, column) in zip(others, cells, strict=True):
            other[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 3
        changes = (backbone(others).taps[0] - maps.taps[0]).norm(dim=1).flatten(1)
        most = changes.topk(2)
        assert [divmod(cell, columns) for cell in most.indices[:, 0].tolist()] == cells
        assert (most.values[:, 1] < 0.5 * most.values[:, 0]).all()


@torch.inference_mode()
@pytest.mark.parametrize("name", ["siglip2_base", "pe_core_base", "dinov2_small"])
def test_positions_of_a_weight_file_are_interpolated(name: str, model: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    given = model(name, NARROW)
    network = timm.create_model(given["name"], pretrained=False, **NARROW)
    rows, columns = network.patch_embed.grid_size
    prefix = network.num_prefix_tokens
    network.pos_embed[0, prefix:, 0] = torch.linspace(0, 1, rows).repeat_interleave(columns)
    network.pos_embed[0, prefix:, 1] = torch.linspace(0, 1, columns).repeat(rows)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    patch = network.patch_embed.patch_size[0]
    backbone = build(given | {"weights": str(tmp_path / "weights.pth"), "size": patch * 20})
    assert torch.equal(backbone.net.pos_embed, network.pos_embed)
    for parameter in backbone.net.patch_embed.proj.parameters():
        torch.nn.init.zeros_(parameter)  # leaves the positions alone
    seen = []
    backbone.net.pos_drop.register_forward_hook(lambda *call: seen.append(call[-1]))
    backbone(torch.zeros(1, 3, patch * 20, patch * 24))
    down, across = seen[0][0, prefix:, :2].unflatten(0, (20, 24)).unbind(-1)
    torch.testing.assert_close(down, down[:, :1].expand(-1, 24))
    torch.testing.assert_close(across, across[:1].expand(20, -1))
    for line in (down[:, 0], across[0]):
        assert line.diff().min() > 0
        assert line[0] == pytest.approx(0, abs=0.06)
        assert line[-1] == pytest.approx(1, abs=0.06)


def pictures(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@torch.inference_mode()
@pytest.mark.parametrize("name", KINDS)
def test_scales_that_patches_fill(name: str, model: Callable[..., dict[str, Any]]) -> None:
    extractor = BackgroundAgnosticExtractor(**model(name, NARROW, size=256)).eval()
    describer = Describer(extractor, POOLINGS, masks=True, scales=[0.75, 1.0])
    assert describer.sides == [192, 256]
    vectors, masks = describer(pictures(256))
    assert (vectors.shape, masks.shape) == ((3, 64), (3, MASK_SIZE, MASK_SIZE))
    assert not torch.allclose(vectors, Describer(extractor, POOLINGS, masks=False)(pictures(256))[0], atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_other_sizes_are_answered_with_what_to_type(name: str, model: Callable[..., dict[str, Any]]) -> None:
    extractor = BackgroundAgnosticExtractor(**model(name, NARROW, size=224)).eval()
    message = r"scales=\[0.75, 1.0\]: 168 px is not a multiple of the patches of 16 px; type extraction.scales=(\[.*?\])"
    with pytest.raises(ValueError, match=message) as caught:
        Describer(extractor, POOLINGS, masks=False, scales=[0.75, 1.0])
    (typed,) = re.findall(message, str(caught.value))
    described = Describer(extractor, POOLINGS, masks=False, scales=list(map(float, typed.strip("[]").split(","))))
    assert described.sides == [160, 224]
    with pytest.raises(ValueError, match=r"model.size=230: .* type model.size=224 or model.size=240"):
        build(model(name, NARROW, size=230))


def test_a_network_of_one_size_is_told_about_the_option() -> None:
    with pytest.raises(ValueError, match=r"model.size=96: .*\+model.options.dynamic_img_size=true"):
        Backbone("vit_tiny_patch16_224", ["blocks.0"], "norm", 96, pretrained=False, options={"depth": 1})
    Backbone("vit_tiny_patch16_224", ["blocks.0"], "norm", 96, False, options={"depth": 1, "dynamic_img_size": True})


@pytest.mark.parametrize("name", KINDS)
def test_half_precision(name: str, model: Callable[..., dict[str, Any]]) -> None:
    torch.manual_seed(0)
    extractor = BackgroundAgnosticExtractor(**model(name, NARROW, size=224, decoder=DECODER)).eval()
    describer = Describer(extractor, POOLINGS, masks=True, scales=[1.0, 1.5])
    whole, half = (Engine(describer, "cpu", precision, 2, "torch") for precision in ("32-true", "bf16-mixed"))
    halved = {key for key, module in half.describer.named_modules() if isinstance(module, HalfPrecision)}
    assert any(key.endswith("blocks.3.mlp.fc2") for key in halved)
    assert any(key.endswith("blocks.3.attn.qkv") for key in halved)
    (vectors, masks), (others, other_masks) = (engine(pictures(336)) for engine in (whole, half))
    assert not torch.equal(vectors, others)
    assert F.cosine_similarity(vectors, others).min() > 0.999
    assert (masks.float() - other_masks.float()).abs().max() < 8


class Pairs(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Photos and street views of noise, with a square to find."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        seen = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        masks = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
        masks[..., 16:48, 16:48] = 255
        return {"pictures": seen, "masks": masks, "row": torch.tensor(index)}


@pytest.mark.parametrize("objective", ["joint", "frozen"])
@pytest.mark.parametrize("name", KINDS)
def test_training_steps(
    name: str, objective: str, model: Callable[..., dict[str, Any]], configure: Callable[..., Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    cfg = configure("train", f"objective={objective}", "objective.average=0", "objective.freeze=0").objective  # random weights
    module = instantiate(cfg, model=model(name, NARROW, size=64), _recursive_=False, _convert_="all")
    before = {key: value.clone() for key, value in module.extractor.named_parameters()}
    loader = torch.utils.data.DataLoader(Pairs(), batch_size=2)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["train/loss"].isfinite()
    still = {key for key, value in module.extractor.named_parameters() if torch.equal(before[key], value)}
    of_backbone = {key for key in before if key.startswith("backbone.")}
    assert still == (of_backbone if objective == "frozen" else set())

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    extractor = load_extractor(tmp_path / "a.ckpt")
    with torch.inference_mode():
        torch.testing.assert_close(extractor(pictures(64)).last, module.extractor.eval()(pictures(64)).last)
