"""Networks run by OpenVINO: the maps of PyTorch, from any thread, and errors that say what to type."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from beauty_bafe.models import pooling, runtime
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.extractor import BackgroundAgnosticExtractor, Extraction
from beauty_bafe.models.inference import Describer, Engine
from beauty_bafe.models.pooling import gem
from beauty_bafe.models.runtime import OpenVinoExtractor, OpenVinoModule, pick_precision, pick_runtime
from beauty_bafe.models.views import View, cut_out, whiten

TOPDOWN = {"_target_": "beauty_bafe.models.decoder.TopDownDecoder", "width": 8}


def pictures(count: int, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)


def check(extractor: BackgroundAgnosticExtractor, seen: torch.Tensor) -> None:
    with torch.inference_mode():
        expected, found = extractor.extract(seen), OpenVinoExtractor(extractor, "32-true")(seen)
    assert found.pictures is seen
    pairs = [*zip(found.masks, expected.masks, strict=True), *zip(found.taps, expected.taps, strict=True)]
    assert (found.logits is None) == (expected.logits is None)
    pairs += [(found.last, expected.last), *zip(found.logits or [], expected.logits or [], strict=True)]
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize("decoder", [None, TOPDOWN])
def test_maps_are_those_of_pytorch(tiny: dict[str, Any], decoder: dict[str, Any] | None) -> None:
    torch.manual_seed(0)
    extractor = BackgroundAgnosticExtractor(**tiny, decoder=decoder).eval()
    for count in (1, 4):
        check(extractor, pictures(count))
    check(extractor, pictures(2).float())  # as views make them
    check(extractor, pictures(2, 96))  # another scale
    extractor.shallowest = len(extractor.backbone.channels)
    check(extractor, pictures(2))


def test_a_transformer_runs() -> None:
    torch.manual_seed(0)
    options = {"img_size": 64, "depth": 2, "embed_dim": 16, "num_heads": 2}
    extractor = BackgroundAgnosticExtractor(
        "vit_tiny_patch16_224", ["blocks.0", "blocks.1"], "norm", 64, pretrained=False, options=options
    )
    check(extractor.eval(), pictures(2))


FUNCTIONS = [pooling.spoc, pooling.mac, pooling.gem, pooling.rmac, pooling.ramac, pooling.grmac, pooling.amac, pooling.crow]
VIEWS = [
    None,
    View(closer=1.3, edges=0.05, least=0.01),
    View(closer=1.3, whole=0.5, edges=0.05, detail=2.0),
    View(closer=1.3, edges=0.05, change=partial(cut_out, fill=0.8), detail=1.5),
    View(change=partial(whiten, threshold=0.5)),
]


@pytest.mark.parametrize("decoder", [None, TOPDOWN])
@pytest.mark.parametrize("view", VIEWS)
def test_descriptors_are_those_of_pytorch(tiny: dict[str, Any], decoder: dict[str, Any] | None, view: View | None) -> None:
    torch.manual_seed(0)
    every = [Pooling(function, saliency) for function in (*FUNCTIONS, pooling.scda) for saliency in (False, True)]
    poolings = every if view is None and decoder is None else [Pooling(pooling.gem, saliency=True)]
    scales = (0.5, 1.0) if view is None else (1.0,)
    extractor = BackgroundAgnosticExtractor(**tiny, decoder=decoder).eval()
    describer = Describer(extractor, poolings, masks=True, scales=scales, flip=decoder is not None, view=view).eval()
    seen = pictures(3, describer.canvas)
    engine = Engine(describer, "cpu", "32-true", 3, "openvino")
    assert isinstance(engine._run, OpenVinoModule)
    *found, masks = engine(seen)
    with torch.inference_mode():
        *expected, wanted = describer(seen)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert (masks.int() - wanted.int()).abs().max() <= 1


def brightest(maps: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Decides in Python, which a trace would do only once."""
    return torch.stack([one.mean(dim=(1, 2)) if one.std() < LIMIT else one.amax(dim=(1, 2)) for one in maps])


LIMIT = 0.0


def test_functions_from_elsewhere_stay_in_pytorch(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    describer = Describer(BackgroundAgnosticExtractor(**tiny).eval(), [Pooling(brightest, saliency=False)], masks=False).eval()
    seen = torch.cat([torch.zeros(1, 3, 64, 64, dtype=torch.uint8), pictures(1)])
    spread = [float(describer.extractor.extract(one[None]).last.std()) for one in seen]
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", sum(spread) / 2)
    engine = Engine(describer, "cpu", "32-true", 1, "openvino")
    with torch.inference_mode():
        torch.testing.assert_close(engine(seen)[0], describer(seen)[0], atol=1e-5, rtol=0)


def test_threads_get_their_own_maps(tiny: dict[str, Any]) -> None:
    torch.manual_seed(0)
    extractor = BackgroundAgnosticExtractor(**tiny).eval()
    engine = Engine(Describer(extractor, [Pooling(gem, saliency=True)], masks=True), "cpu", "32-true", 2, "openvino")
    batches = [pictures(count) for count in range(1, 9)]
    expected = [engine(batch) for batch in batches]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            for found, wanted in zip(threads.map(engine, batches), expected, strict=True):
                assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_bfloat16_is_close(tiny: dict[str, Any]) -> None:
    torch.manual_seed(0)
    extractor = BackgroundAgnosticExtractor(**tiny).eval()
    describer = Describer(extractor, [Pooling(gem, saliency=False)], masks=False)
    whole, half = (Engine(describer, "cpu", kind, 2, "openvino")(pictures(4))[0] for kind in ("32-true", "bf16-mixed"))
    assert F.cosine_similarity(whole, half).min() > 0.99


def test_auto_is_openvino_in_float32_on_cpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [pick_runtime("auto", device) for device in ("cpu", "cuda:0", "mps")] == ["openvino", "auto", "auto"]
    assert [pick_runtime(name, "cpu") for name in ("torch", "compiled", "openvino")] == ["torch", "compiled", "openvino"]
    assert pick_precision("auto", "cpu", "openvino") == "32-true"
    assert pick_precision("bf16-mixed", "cpu", "openvino") == "bf16-mixed"
    with pytest.raises(ValueError, match=r"extraction.runtime=onnx: type auto, torch, compiled, openvino"):
        pick_runtime("onnx", "cpu")
    with pytest.raises(ValueError, match=r"runs on a CPU, not on cuda:0; type device=cpu or runtime=auto"):
        pick_runtime("openvino", "cuda:0")
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda _: None)
    assert pick_runtime("auto", "cpu") == "auto"
    with pytest.raises(ValueError, match=r"needs the package openvino; type pip install openvino"):
        pick_runtime("openvino", "cpu")


def test_a_network_that_cannot_be_converted(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = BackgroundAgnosticExtractor(**tiny).eval()
    extract = extractor.extract

    def unusual(seen: torch.Tensor) -> Extraction:
        return extract(torch.special.bessel_j0(seen.float()))

    monkeypatch.setattr(extractor, "extract", unusual)
    with pytest.raises(RuntimeError, match=r"OpenVINO cannot run this network \(.*\); type extraction.runtime=torch"):
        OpenVinoExtractor(extractor, "32-true")(pictures(1))


FORKS = """
import os, sys, torch
from beauty_bafe.models.extractor import BackgroundAgnosticExtractor
from beauty_bafe.models.runtime import OpenVinoExtractor

extractor = BackgroundAgnosticExtractor("test_efficientnet", ["blocks.1"], "bn2", 64, pretrained=False).eval()
extract = OpenVinoExtractor(extractor, "32-true")
extract(torch.zeros(1, 3, 64, 64))
child = os.fork()
if child == 0:
    try:
        extract(torch.zeros(1, 3, 64, 64))
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(0)
    os._exit(1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_is_told_and_nothing_is_reported_elsewhere(tmp_path: Path) -> None:
    """Before it reports to its makers, OpenVINO leaves a file about that in the home folder."""
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FORKS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "start it with spawn instead, or type extraction.runtime=torch" in done.stdout
    assert not (tmp_path / "intel").exists()


def test_threads_that_start_together_share_one_core(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[Any] = []
    core = runtime._core()

    def slowly() -> Any:
        created.append(core)
        time.sleep(0.1)
        return core  # not another one, whose end would do what this guards against

    monkeypatch.setattr(runtime, "_core", functools.cache(slowly))
    extractor = BackgroundAgnosticExtractor(**tiny).eval()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda seen: OpenVinoExtractor(extractor, "32-true")(seen), [pictures(1)] * 4))
    assert len(created) == 1
