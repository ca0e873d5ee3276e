"""The joint objective: what it trains, and its checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from beauty_bafe.models.extractor import BackgroundAgnosticExtractor
from beauty_bafe.models.joint import JointModule
from beauty_bafe.models.module import SaliencyModule, load_extractor
from beauty_bafe.models.objectives import distillation_loss
from beauty_bafe.models.resuming import check_resumable

SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "warmup": 0,
    "decoder": {"_target_": "beauty_bafe.models.decoder.TopDownDecoder", "width": 8},
    "backbone_lr": 1e-3,
    "contrast": 0.5,
    "temperature": 0.1,
    "p": 3.0,
    "distill": 0.0,
    "average": 0.0,
    "settle": 0.0,
    "freeze": 0,
}


class Pairs(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A bright square on white, and the same on noise."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)
        pictures, masks = torch.stack([torch.full_like(noise, 255), noise]), torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
        pictures[:, :, 16:48, 16:48] = torch.tensor([40 * index, 200, 90], dtype=torch.uint8)[:, None, None]
        masks[:, :, 16:48, 16:48] = 255
        return {"pictures": pictures, "masks": masks, "row": torch.tensor(index)}


def fit(module: JointModule, folder: Path, epochs: int, *callbacks: pl.Callback, ckpt_path: Path | None = None) -> pl.Trainer:
    loader = torch.utils.data.DataLoader(Pairs(), batch_size=2)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_it_learns_masks_and_descriptors_and_its_checkpoint_rebuilds_the_network(tiny: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = JointModule(tiny, **SETTINGS)
    before = {key: value.clone() for key, value in module.extractor.state_dict().items()}
    losses = [fit(JointModule(tiny, **SETTINGS), tmp_path, 1).callback_metrics["train/loss"].item()]
    trainer = fit(module, tmp_path, 8)
    losses.append(trainer.callback_metrics["train/loss"].item())
    assert losses[1] < losses[0]
    assert set(trainer.callback_metrics) >= {"train/mask", "train/contrast", "val/loss", "val/iou", "val/mAP@7"}
    changed = {key for key, value in module.extractor.state_dict().items() if not torch.equal(before[key], value)}
    assert any(key.startswith("decoder.") for key in changed)
    assert "backbone.net.conv_stem.weight" in changed, "the whole network learns"
    assert not any(key.startswith("backbone") and "running" in key for key in changed), "batch statistics stay"

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    extractor = load_extractor(tmp_path / "a.ckpt")
    pictures = Pairs()[1]["pictures"]
    with torch.inference_mode():
        one, other = extractor(pictures), module.extractor.eval()(pictures)
    torch.testing.assert_close(one.last, other.last)  # its batch norms were folded while it learned: other roundings
    torch.testing.assert_close(one.saliency(64), other.saliency(64))


@pytest.mark.parametrize("distill", [0.0, 3.0])
def test_the_loss_is_of_masks_and_pairs(distill: float, tiny: dict[str, Any]) -> None:
    """Against slow twins of InfoNCE, a pair at a time, and of distillation, a street view at a time."""
    torch.manual_seed(0)
    module = JointModule(tiny, **SETTINGS | {"distill": distill})
    module.eval()
    before = BackgroundAgnosticExtractor(**dict(module.hparams["model"])).eval()
    assert all(
        torch.equal(value, before.backbone.state_dict()[key]) for key, value in module.extractor.backbone.state_dict().items()
    )
    with torch.no_grad():
        for parameter in module.extractor.backbone.parameters():
            parameter.mul_(1.1)  # as if it had learned
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    items = [Pairs()[index] for index in range(4)]
    pictures = torch.cat([item["pictures"] for item in items])
    label = torch.cat([item["masks"] for item in items]).float() / 255
    extraction = module.extractor(pictures)
    vectors = module.describe(extraction).detach()
    clean, street = vectors[0::2], vectors[1::2]
    terms = []
    for one, other in ((street, clean), (clean, street)):
        for row in range(4):
            likeness = [math.exp(float(one[row] @ other[column]) / SETTINGS["temperature"]) for column in range(4)]
            terms.append(-math.log(likeness[row] / sum(likeness)))
    with torch.no_grad():
        kept = [
            distillation_loss(extraction.last[row : row + 1], before(pictures[row : row + 1]).last).item()
            for row in (1, 3, 5, 7)
        ]
    assert sum(kept) > 0.01
    expected = module.validation_loss(extraction, label).item() + SETTINGS["contrast"] * sum(terms) / len(terms)
    expected += distill * sum(kept) / len(kept)
    assert module.training_loss(extraction, label).item() == pytest.approx(expected, rel=1e-4)
    assert sum(terms) > 0.1


def test_weight_decay_leaves_a_trained_network_alone(tiny: dict[str, Any], tmp_path: Path) -> None:
    """At a step size of 0.01 a decay of 10 would take a tenth of every weight at every step."""
    torch.manual_seed(0)
    module = JointModule(tiny, **SETTINGS)
    before = {name: value.norm().item() for name, value in module.extractor.backbone.named_parameters()}
    fit(module, tmp_path, 4)
    after = {name: value.norm().item() for name, value in module.extractor.backbone.named_parameters()}
    assert module.extractor.decoder is not None
    shrunk = [after[name] / before[name] for name in before if before[name] > 1]
    assert min(shrunk) > 0.98


def test_a_checkpoint_is_loaded_by_the_class_that_wrote_it(tiny: dict[str, Any], tmp_path: Path) -> None:
    joint = JointModule(tiny, **SETTINGS)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(joint)
    trainer.save_checkpoint(tmp_path / "joint.ckpt")
    again = JointModule.load_from_checkpoint(tmp_path / "joint.ckpt", weights_only=True)
    assert again.hparams == joint.hparams
    torch.testing.assert_close(again.state_dict(), joint.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"is of JointModule, not of SaliencyModule; type JointModule\.load_from_checkpoint"):
        SaliencyModule.load_from_checkpoint(tmp_path / "joint.ckpt", weights_only=True, strict=False)


def test_a_short_run_comes_to_full_steps_as_well(tiny: dict[str, Any], tmp_path: Path) -> None:
    trainer = fit(JointModule(tiny, **SETTINGS | {"warmup": 1000}), tmp_path, 8)  # two steps each
    factor = trainer.lr_scheduler_configs[0].scheduler.lr_lambdas[0]  # type: ignore[attr-defined]
    assert 0 < factor(0) < factor(1) < factor(2) > factor(8) > factor(16) == 0
    assert factor(2) > 0.9


def test_the_descriptor_does_not_move_the_mask(tiny: dict[str, Any]) -> None:
    module = JointModule(tiny, **SETTINGS)
    module.describe(module.extractor(Pairs()[0]["pictures"])).sum().backward()
    assert module.extractor.decoder is not None
    assert all(p.grad is None for p in module.extractor.decoder.parameters())


def test_a_step_size_of_0_freezes_the_backbone(tiny: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = JointModule(tiny, **SETTINGS | {"backbone_lr": 0, "contrast": 0})
    before = {key: value.clone() for key, value in module.extractor.state_dict().items()}
    trainer = fit(module, tmp_path, 4)
    changed = {key for key, value in module.extractor.state_dict().items() if not torch.equal(before[key], value)}
    assert changed
    assert all(key.startswith("decoder.") for key in changed)
    assert all(p.grad is None and not p.requires_grad for p in module.extractor.backbone.parameters())
    (group,) = trainer.optimizers[0].param_groups
    assert len(group["params"]) == len(trainer.optimizers[0].state) == len(list(module.extractor.decoder.parameters()))
    assert not module.extractor(Pairs()[0]["pictures"]).last.requires_grad

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    check_resumable(module, {}, tmp_path / "a.ckpt")
    extractor = load_extractor(tmp_path / "a.ckpt")
    assert extractor.frozen
    pictures = Pairs()[1]["pictures"]
    with torch.inference_mode():
        one, other = extractor(pictures), module.extractor.eval()(pictures)
    assert torch.equal(one.last, other.last)
    assert torch.equal(one.saliency(64), other.saliency(64))


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_the_last_epochs_learn_to_read_the_averaged_network(share: float, tiny: dict[str, Any], tmp_path: Path) -> None:
    """Against a slow twin: the same training stopped before, averaged tensor by tensor."""
    torch.manual_seed(0)
    settings = SETTINGS | {"average": share, "settle": 0.5}
    module = JointModule(tiny, **settings)
    before = {key: value.clone() for key, value in module.extractor.state_dict().items()}
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen[trainer.current_epoch] = {k: v.clone() for k, v in module.extractor.state_dict().items()}

    trainer = fit(module, tmp_path, 4, Watch())
    assert module.averaged
    for key, start in before.items():
        if key.startswith("backbone."):
            assert torch.equal(seen[2][key], seen[3][key]), "it stands still"
            if start.is_floating_point():
                torch.testing.assert_close(seen[3][key], (1 - share) * seen[1][key] + share * start)
    assert not torch.equal(seen[1]["backbone.net.conv_stem.weight"], before["backbone.net.conv_stem.weight"])
    assert any(not torch.equal(seen[2][key], seen[3][key]) for key in before if key.startswith("decoder."))

    # Gone on with from a checkpoint of the averaged network, it is not averaged again.
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = JointModule(tiny, **settings)
    fit(again, tmp_path, 5, ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(again.extractor.backbone.net.conv_stem.weight, seen[3]["backbone.net.conv_stem.weight"])
    torch.testing.assert_close(load_extractor(tmp_path / "a.ckpt").state_dict(), module.extractor.state_dict())


def test_distillation_holds_the_feature_map_near_the_pretrained_one(tiny: dict[str, Any], tmp_path: Path) -> None:
    pictures, distances = Pairs()[1]["pictures"][1:], {}
    for weight in (0.0, 20.0):
        torch.manual_seed(0)
        module = JointModule(tiny, **SETTINGS | {"distill": weight})
        with torch.no_grad():
            known = module.extractor.eval()(pictures).last
            trainer = fit(module, tmp_path, 6)
            distances[weight] = distillation_loss(module.extractor.eval()(pictures).last, known).item()
        assert ("train/distill" in trainer.callback_metrics) == (weight > 0)
        assert not any("_pretrained" in key for key in module.state_dict()), "the teacher is not saved"
    assert distances[20.0] < 0.7 * distances[0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"average": 1.5, "settle": 0.2}, "objective.average=1.5: type a share from 0 to 1"),
        ({"settle": -1}, "objective.settle=-1: type a share from 0 to 1"),
        ({"freeze": 5}, "objective.freeze=5: type a number of taps, 0 to 4"),
        ({"freeze": -1}, "objective.freeze=-1: type a number of taps, 0 to 4"),
        ({"average": 0.5}, "objective.average=0.5 with objective.settle=0: .* type objective.settle=0.2"),
    ],
)
def test_shares_out_of_range_are_answered(settings: dict[str, float], message: str, tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        JointModule(tiny, **SETTINGS | settings)


@pytest.mark.parametrize(
    ("epochs", "settle", "first"),
    [(1, 1.0, None), (2, 1.0, 1), (4, 0.05, 3), (4, 0.5, 2), (5, 0.3, 3)],
    ids=["an only epoch is for learning", "so is a first one", "one settles at least", "half", "rounded"],
)
def test_from_which_epoch_the_backbone_is_averaged(
    epochs: int, settle: float, first: int | None, tiny: dict[str, Any], tmp_path: Path
) -> None:
    module = JointModule(tiny, **SETTINGS | {"average": 0.5, "settle": settle})
    averaged = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            averaged.append(bool(module.averaged))
            learning = any(p.requires_grad for p in module.extractor.backbone.parameters())
            assert learning != averaged[-1], "no gradients are made that nobody uses"

    fit(module, tmp_path, epochs, Watch())
    assert averaged == [first is not None and epoch >= first for epoch in range(epochs)]


@pytest.mark.parametrize("settings", [{"average": 0.5, "settle": 0.5}, {"distill": 1.0}])
def test_random_weights_are_not_worth_keeping(settings: dict[str, float], tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model.pretrained=false starts from random weights; type model.pretrained=true"):
        JointModule(tiny | {"weights": None}, **SETTINGS | settings)
    JointModule(tiny | {"weights": None}, **SETTINGS | {"backbone_lr": 0, "contrast": 0} | settings)


def test_a_frozen_backbone_has_nothing_to_contrast(tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"objective.contrast=0.5 has nothing to train; type objective.contrast=0"):
        JointModule(tiny, **SETTINGS | {"backbone_lr": 0.0})


def test_what_is_frozen_stays_as_pretrained(tiny: dict[str, Any], tmp_path: Path) -> None:
    module = JointModule(tiny, **SETTINGS | {"freeze": 2})
    before = {name: value.clone() for name, value in module.extractor.backbone.named_parameters()}
    trainer = fit(module, tmp_path, 2)
    stays = {name for name, value in module.extractor.backbone.named_parameters() if torch.equal(before[name], value)}
    assert stays == {name for name in before if name.startswith(("net.conv_stem", "net.bn1", "net.blocks.0.", "net.blocks.1."))}
    learning = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
    assert learning == sum(value.requires_grad for value in module.extractor.parameters())
