from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from beauty_bafe.data import catalog
from beauty_bafe.data.catalog import Skipped, from_folder
from beauty_bafe.data.pictures import letterbox, read_picture
from beauty_bafe.extraction import describing
from beauty_bafe.extraction.features import Features, mean_masks
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import Member, load_members
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.inference import MASK_SIZE, Engine
from beauty_bafe.models.module import load_extractor
from beauty_bafe.models.pooling import mac
from beauty_bafe.models.views import View

from .conftest import ATTENTION, GEM


def test_row_i_is_picture_i(folder: Path, describe: Callable[..., list[Features]], tiny_checkpoint: Path) -> None:
    """Against one picture at a time; an unreadable one has no row and shifts none."""
    skipped = Skipped()
    attention, plain = describe(folder, ATTENTION, GEM, skipped=skipped, masks=True, shard=3)
    assert attention.ids == plain.ids == ("p0", "p1", "p2", "p4", "p5", "p6")
    assert [row[0] for row in skipped.rows] == ["p3"]
    assert attention.masks is not None
    extractor = load_extractor(tiny_checkpoint)
    for row, name in enumerate(attention.ids):
        picture = torch.from_numpy(letterbox(read_picture(folder / f"{name}.jpg").rgb, 64)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            extraction = extractor(picture)
        for features, pooling in ((attention, ATTENTION), (plain, GEM)):
            expected = torch.nn.functional.normalize(pooling(extraction))[0].numpy()
            np.testing.assert_allclose(features.vectors[row], expected, atol=1e-5)
        mask = extraction.saliency(MASK_SIZE)[0, 0].numpy() * 255
        assert np.abs(attention.masks[row] - mask).max() < 1
    assert plain.masks is None, "it looks at everything"


@pytest.mark.parametrize("pooling", [ATTENTION, GEM, Pooling(mac, saliency=True, map=2)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_descriptor_does_not_depend_on_its_batch(
    folder: Path, describe: Callable[..., list[Features]], pooling: Pooling, precision: str
) -> None:
    """Alone, in one batch, in other batches, by threads or processes."""
    (together,) = describe(folder, pooling, precision=precision)
    for number, options in enumerate(({"batch_size": 1}, {"batch_size": 3, "shard": 2}, {"num_workers": 2, "shard": 5})):
        (other,) = describe(folder, pooling, store=f"other{number}", precision=precision, **options)
        np.testing.assert_allclose(other.vectors, together.vectors, atol=1e-5 if precision == "32-true" else 2e-2)
    catalog = from_folder(folder)
    for row, name in enumerate(together.ids):
        (alone,) = describe(catalog.subset([catalog.ids.index(name)]), pooling, store=f"alone{name}", precision=precision)
        np.testing.assert_allclose(alone.vectors[0], together.vectors[row], atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_opencv_keeps_its_threads(folder: Path, describe: Callable[..., list[Features]], workers: int) -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        describe(folder, ATTENTION, num_workers=workers)
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_what_is_on_disk_is_not_described_again(
    folder: Path, describe: Callable[..., list[Features]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed catalogue: only new and changed pictures are read, gone ones leave, order follows the catalogue."""
    before = describe(folder, ATTENTION, GEM)
    reads: list[str] = []
    monkeypatch.setattr(catalog, "read_picture", lambda path, size: reads.append(path.stem) or read_picture(path, size))
    assert np.array_equal(describe(folder, ATTENTION)[0].vectors, before[0].vectors)
    assert reads == ["p3"], "what could not be read is tried again"
    reads.clear()
    (folder / "p0.jpg").unlink()
    shutil.copy(folder / "p5.jpg", folder / "a_new.jpg")
    shutil.copy(folder / "p6.jpg", folder / "p2.jpg")
    os.utime(folder / "p2.jpg", (1, 1))
    after = describe(folder, ATTENTION, GEM)
    assert sorted(reads) == ["a_new", "p2", "p3"]
    assert after[0].ids == ("a_new", "p1", "p2", "p4", "p5", "p6")
    np.testing.assert_allclose(after[0].vectors[[0, 2]], after[0].vectors[[4, 5]], atol=1e-6)
    np.testing.assert_allclose(after[1].vectors[1], before[1].vectors[1], atol=1e-6)


def test_a_new_pooling_is_added_beside_the_old(folder: Path, describe: Callable[..., list[Features]], tmp_path: Path) -> None:
    (alone,) = describe(folder, GEM, store="elsewhere")
    describe(folder, ATTENTION)
    attention = {file: file.stat().st_mtime_ns for file in (tmp_path / "features").rglob("*.safetensors")}
    both = describe(folder, ATTENTION, GEM)
    np.testing.assert_allclose(both[1].vectors, alone.vectors, atol=1e-6)
    assert all(file.stat().st_mtime_ns == time for file, time in attention.items()), "not written twice"


def test_what_changes_a_descriptor_has_a_store_of_its_own(
    folder: Path, describe: Callable[..., list[Features]], tiny_checkpoint: Path
) -> None:
    """All in one folder of features, against a folder each."""
    choices: list[dict[str, object]] = [
        {},
        {"scales": (0.5, 1.0)},
        {"flip": True},
        {"precision": "bf16-mixed"},
        {"dtype": "float16"},
        {"view": View(change=lambda pictures, *_: pictures.flip(2))},
        {"members": load_members(str(tiny_checkpoint), {"gem": GEM}, size=96)},
    ]
    found = []
    for number, options in enumerate(choices):
        (shared,), (alone,) = describe(folder, GEM, **options), describe(folder, GEM, store=f"alone{number}", **options)
        assert np.array_equal(shared.vectors, alone.vectors), options
        found.append(shared.vectors)
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(found, 2))


def test_a_compiled_run_is_found_again(
    folder: Path, describe: Callable[..., list[Features]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "compile", lambda _: 0.0)  # it takes ten seconds, and here only its name counts
    (first,) = describe(folder, runtime="compiled")
    (again,) = describe(folder, runtime="compiled")
    (torch_s,) = describe(folder, runtime="torch")
    for other in (again, torch_s):
        assert np.array_equal(other.vectors, first.vectors)
    assert len(list((tmp_path / "features").rglob("manifest.json"))) == 1
    describe(folder, runtime="openvino")
    assert len(list((tmp_path / "features").rglob("manifest.json"))) == 2


def test_devices_of_two_kinds_share_a_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beauty_bafe.extraction.local.pick_devices", lambda devices, _: list(devices))
    for devices, runtime in {("cpu", "cuda:0"): "auto", ("cuda:0",): "auto", ("cpu", "cpu"): "openvino"}.items():
        assert FeatureExtraction(tmp_path, devices=devices).runtime == runtime


def test_several_checkpoints_share_one_pass(
    folder: Path, describe: Callable[..., list[Features]], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = load_extractor(tiny_checkpoint), load_extractor(tiny_checkpoint)
    second.size = 96
    members = [Member("one", "1", first, ATTENTION), Member("two", "2", second, ATTENTION)]
    reads: list[object] = []
    monkeypatch.setattr(catalog, "read_picture", lambda *a: reads.append(a) or read_picture(*a))
    one, two = describe(folder, members=members)
    assert len(reads) == 7
    assert one.ids == two.ids
    assert not np.allclose(one.vectors, two.vectors, atol=1e-3)
    (alone,) = describe(folder, members=members[1:], store="alone")
    np.testing.assert_allclose(two.vectors, alone.vectors, atol=1e-6)


def test_half_precision_on_disk(folder: Path, describe: Callable[..., list[Features]], tmp_path: Path) -> None:
    (full,) = describe(folder)
    (half,) = describe(folder, store="half", dtype="float16")
    assert half.vectors.dtype == np.float32
    np.testing.assert_allclose(half.vectors, full.vectors, atol=1e-3)
    with pytest.raises(ValueError, match=r"extraction.dtype=int8: type float32 or float16"):
        describe(folder, dtype="int8")


def test_work_that_will_not_fit_says_so_at_once(
    folder: Path, describe: Callable[..., list[Features]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describing, "PLAN_ABOVE", 3)
    describe(folder, store="fits")
    monkeypatch.setattr(describing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(ValueError, match=r"7 pictures need 0.0 GB on disk, .* has 0.0 GB left; type features=DIR"):
        describe(folder, store="disk")
    monkeypatch.undo()
    monkeypatch.setattr(describing, "PLAN_ABOVE", 3)
    monkeypatch.setattr(describing.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10}))
    with pytest.raises(ValueError, match=r"needs about 0.0 GB of memory, 0.0 GB are free; use fewer checkpoints"):
        describe(folder, store="memory")


def test_an_ensemble_returns_the_mean_mask() -> None:
    masks = [np.full((1, 2, 2), value, np.uint8) for value in (0, 255)]
    members = [Features(np.eye(1, 3, dtype=np.float32), ("a",), mask) for mask in masks]
    without = Features(np.eye(1, 3, dtype=np.float32), ("a",))
    for shown in (members, [without, *members]):
        assert mean_masks(shown).masks.tolist() == [[[128, 128], [128, 128]]]  # type: ignore[union-attr]
    assert mean_masks([without, without]).masks is None


def test_features_prove_themselves() -> None:
    with pytest.raises(ValueError, match="2 vectors for 1 ids"):
        Features(np.zeros((2, 3), np.float32), ("a",))
    with pytest.raises(ValueError, match="'b' is not finite"):
        Features(np.array([[0.0], [np.nan]], np.float32), ("a", "b"))
    lengths = np.array([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]], np.float32)
    with pytest.raises(ValueError, match="'c' has length 5, not 1; pass `unit\(vectors\)`, or any_length=True"):
        Features(lengths, tuple("abc"))
    Features(lengths, tuple("abc"), any_length=True)
    Features(lengths[:2], tuple("ab"))
    rounded = np.random.default_rng(0).normal(size=(50, 700))
    rounded /= np.linalg.norm(rounded, axis=1, keepdims=True)
    Features(rounded.astype(np.float16).astype(np.float32), tuple(map(str, range(50))))
