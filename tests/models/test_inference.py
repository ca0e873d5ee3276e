from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from beauty_bafe.models import inference
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.extractor import BackgroundAgnosticExtractor
from beauty_bafe.models.half_precision import HalfPrecision, to_bfloat16
from beauty_bafe.models.inference import MASK_SIZE, Describer, Engine
from beauty_bafe.models.pooling import gem, spoc

POOLINGS = [Pooling(spoc, saliency=True), Pooling(gem, saliency=False)]


@pytest.fixture
def extractor(tiny: dict[str, Any]) -> BackgroundAgnosticExtractor:
    torch.manual_seed(0)
    return BackgroundAgnosticExtractor(**tiny).eval()


def pictures(count: int, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)


def test_any_number_of_pictures_in_batches_of_one_shape(extractor: BackgroundAgnosticExtractor) -> None:
    engine = Engine(Describer(extractor, POOLINGS, masks=True), "cpu", "32-true", 4, "torch")
    shapes = []
    engine.describer.extractor.backbone.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    outputs = engine(pictures(10))
    assert [tuple(output.shape) for output in outputs] == [(10, 256), (10, 256), (10, MASK_SIZE, MASK_SIZE)]
    assert set(shapes) == {torch.Size([4, 3, 64, 64])}
    torch.testing.assert_close(outputs[0].norm(dim=1), torch.ones(10))
    for row in range(10):
        alone = engine(pictures(10)[row : row + 1])
        torch.testing.assert_close(alone[0][0], outputs[0][row], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_halving_leaves_sensitive_layers_alone(name: str) -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    whole = copy.deepcopy(network)
    to_bfloat16(network)
    halved = [module.layer for module in network.modules() if isinstance(module, HalfPrecision)]
    assert halved
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and (module.groups > 1 or module.in_channels == 3):
            assert module.weight.dtype == torch.float32
    assert all(getattr(layer, "groups", 1) == 1 for layer in halved)
    inputs = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        one, two = (n.forward_features(inputs).flatten(1) for n in (whole, network))
    assert two.dtype == torch.float32
    assert nn.functional.cosine_similarity(one, two).min() > 0.998
    assert not torch.equal(one, two)


def test_compiled_agrees_with_eager(extractor: BackgroundAgnosticExtractor) -> None:
    other = copy.deepcopy(extractor)
    eager = Engine(Describer(extractor, POOLINGS, masks=True), "cpu", "32-true", 4, "torch")
    compiled = Engine(Describer(other, POOLINGS, masks=True), "cpu", "32-true", 4, "compiled")
    if not inference._has_compiler("cpu"):
        with pytest.raises(RuntimeError, match=r"type extraction.runtime=torch"):
            compiled.compile()
        pytest.skip("no compiler")
    assert eager.compile() == 0
    assert compiled.compile() > 0
    assert compiled.compile() == 0, "once"
    for one, two in zip(eager(pictures(6)), compiled(pictures(6)), strict=True):
        torch.testing.assert_close(one.float(), two.float(), atol=1e-4 if one.dtype == torch.float32 else 1, rtol=0)


def test_without_a_compiler_the_error_says_what_to_type(
    extractor: BackgroundAgnosticExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as settings

    monkeypatch.setattr(settings.cpp, "cxx", ("/nonexistent/g++",))
    assert not inference._has_compiler("cpu")
    engine = Engine(Describer(extractor, POOLINGS, masks=False), "cpu", "32-true", 4, "compiled")
    with pytest.raises(RuntimeError, match=r"torch.compile failed here \(.*compiler.*; type extraction.runtime=torch"):
        engine.compile()


def test_small_galleries_stay_eager(extractor: BackgroundAgnosticExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_has_compiler", lambda _: True)
    few, many, told = (
        Engine(Describer(extractor, POOLINGS, masks=False), "cpu", "32-true", 4, c) for c in ("auto", "auto", "torch")
    )
    assert few.plan(100) == 0
    assert many.plan(100_000_000) > inference.COMPILE_ABOVE
    told.plan(100_000_000)
    assert [few.runtime, many.runtime, told.runtime] == ["torch", "compiled", "torch"]
    monkeypatch.setattr(inference, "_has_compiler", lambda _: False)
    without = Engine(Describer(extractor, POOLINGS, masks=False), "cpu", "32-true", 4, "auto")
    without.plan(100_000_000)
    assert without.runtime == "torch"


def test_short_memory_halves_the_batch(extractor: BackgroundAgnosticExtractor, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(Describer(extractor, POOLINGS, masks=False), "cpu", "32-true", 8, "torch")
    expected = engine(pictures(8))[0]
    run = engine._run

    def small(batch: torch.Tensor) -> list[torch.Tensor]:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(batch)

    engine._run = small
    torch.testing.assert_close(engine(pictures(8))[0], expected, atol=1e-6, rtol=0)
    assert engine.batch == 2
    assert "out of memory: continuing with batches of 2 pictures" in capsys.readouterr().out
    engine._run = lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        engine(pictures(1))


def test_a_batch_that_another_thread_halves_loses_no_picture(extractor: BackgroundAgnosticExtractor) -> None:
    engine = Engine(Describer(extractor, POOLINGS, masks=False), "cpu", "32-true", 4, "torch")
    expected = engine(pictures(8))[0]
    run = engine._run

    def halve_meanwhile(batch: torch.Tensor) -> list[torch.Tensor]:
        engine.batch = 2
        return run(batch)

    engine._run = halve_meanwhile
    torch.testing.assert_close(engine(pictures(8))[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("map", "saliency", "calls"), [("last", True, 1), ("last", False, 0), (2, True, 3), (4, False, 1), (1, True, 4)]
)
def test_masks_that_no_pooling_needs_are_not_made(
    extractor: BackgroundAgnosticExtractor, map: str | int, saliency: bool, calls: int
) -> None:
    pooling = Pooling(spoc, saliency, map)
    engine = Engine(Describer(extractor, [pooling], masks=False), "cpu", "32-true", 2, "torch")
    made: list[object] = []
    for encoder in engine.describer.extractor.encoders:
        encoder.register_forward_hook(lambda *_: made.append(1))
    (vectors,) = engine(pictures(2))
    assert len(made) == calls
    with torch.inference_mode():
        whole = nn.functional.normalize(pooling(extractor(pictures(2))))
    torch.testing.assert_close(vectors, whole, atol=1e-6, rtol=0)


def test_other_errors_are_not_taken_for_short_memory(extractor: BackgroundAgnosticExtractor) -> None:
    engine = Engine(Describer(extractor, POOLINGS, masks=False), "cpu", "32-true", 8, "torch")
    with pytest.raises(ValueError, match="pictures must be uint8"):
        engine(pictures(8).float())


def test_a_copied_extractor_reads_its_own_taps(extractor: BackgroundAgnosticExtractor) -> None:
    other = copy.deepcopy(extractor)
    with torch.inference_mode():
        torch.testing.assert_close(other(pictures(2)).last, extractor(pictures(2)).last)
