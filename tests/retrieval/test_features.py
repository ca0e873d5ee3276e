from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from beauty_bafe.data.catalog import Skipped, from_folder
from beauty_bafe.data.pictures import letterbox, read_picture
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.module import load_extractor
from beauty_bafe.models.pooling import spoc
from beauty_bafe.retrieval.features import MASK_SIZE, Features, extract, pick_device

ATTENTION = Pooling(spoc, saliency=True)


@pytest.fixture
def folder(tmp_path: Path, write_picture: Callable[..., Path]) -> Path:
    for number in range(7):
        write_picture(f"p{number}.jpg", (40 + 9 * number, 50), seed=number)
    (tmp_path / "p3.jpg").write_bytes(b"no picture")
    return tmp_path


def test_row_i_is_picture_i(folder: Path, tiny_checkpoint: Path) -> None:
    """Against one picture at a time; an unreadable one has no row and shifts none."""
    extractor, skipped, catalog = load_extractor(tiny_checkpoint), Skipped(), from_folder(folder)
    (features,) = extract([extractor], catalog, ATTENTION, skipped, "pictures", 2, 0, "cpu", "32-true", keep_masks=True)
    assert features.ids == ("p0", "p1", "p2", "p4", "p5", "p6")
    assert [row[0] for row in skipped.rows] == ["p3"]
    assert features.masks is not None
    for row, name in enumerate(features.ids):
        picture = torch.from_numpy(letterbox(read_picture(folder / f"{name}.jpg").rgb, 64)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            extraction = extractor(picture)
        expected = torch.nn.functional.normalize(ATTENTION(extraction))[0].numpy()
        np.testing.assert_allclose(features.vectors[row], expected, atol=1e-5)
        mask = extraction.saliency(MASK_SIZE)[0, 0].numpy() * 255
        assert np.abs(features.masks[row] - mask).max() < 1


def test_workers_and_batches_change_nothing(folder: Path, tiny_checkpoint: Path) -> None:
    extractor, catalog = load_extractor(tiny_checkpoint), from_folder(folder)
    results = [
        extract([extractor], catalog, ATTENTION, Skipped(), "pictures", batch, workers, "cpu", "32-true")[0].vectors
        for batch, workers in ((64, 0), (1, 0), (3, 2))
    ]
    for other in results[1:]:
        np.testing.assert_allclose(results[0], other, atol=1e-5)


def test_bf16_agrees_with_float32(folder: Path, tiny_checkpoint: Path) -> None:
    extractor, catalog = load_extractor(tiny_checkpoint), from_folder(folder)
    full, half = (
        extract([extractor], catalog, ATTENTION, Skipped(), "pictures", 8, 0, "cpu", precision)[0].vectors
        for precision in ("32-true", "bf16-mixed")
    )
    assert (full * half).sum(axis=1).min() > 0.999
    assert not np.array_equal(full, half)


def test_several_checkpoints_share_one_pass(folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = load_extractor(tiny_checkpoint), load_extractor(tiny_checkpoint)
    second.size = 96
    reads: list[object] = []
    monkeypatch.setattr("beauty_bafe.retrieval.features.read_picture", lambda *a: reads.append(a) or read_picture(*a))
    one, two = extract([first, second], from_folder(folder), ATTENTION, Skipped(), "pictures", 4, 0, "cpu", "32-true")
    assert len(reads) == 7
    assert one.ids == two.ids
    assert not np.allclose(one.vectors, two.vectors, atol=1e-3)
    (alone,) = extract([second], from_folder(folder), ATTENTION, Skipped(), "pictures", 4, 0, "cpu", "32-true")
    np.testing.assert_allclose(two.vectors, alone.vectors, atol=1e-6)


def test_without_saliency_the_mask_is_everything(folder: Path, tiny_checkpoint: Path) -> None:
    plain = Pooling(spoc, saliency=False)
    (features,) = extract(
        [load_extractor(tiny_checkpoint)], from_folder(folder), plain, Skipped(), "pictures", 4, 0, keep_masks=True
    )
    assert features.masks.min() == 255


def test_a_folder_of_broken_files_stops(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 1 queries can be read; the first: .*a.jpg: .*cannot identify"):
        extract([load_extractor(tiny_checkpoint)], from_folder(tmp_path), ATTENTION, Skipped(), "queries", 4, 0)


def test_features_prove_themselves() -> None:
    with pytest.raises(ValueError, match="2 vectors for 1 ids"):
        Features(np.zeros((2, 3), np.float32), ("a",))
    with pytest.raises(ValueError, match="'b' is not finite"):
        Features(np.array([[0.0], [np.nan]], np.float32), ("a", "b"))


@pytest.mark.parametrize(("device", "message"), [("cuda", "sees no GPU here"), ("tpu", "type auto, cpu or cuda")])
def test_a_device_that_is_not_there_is_refused(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        pick_device(device)
