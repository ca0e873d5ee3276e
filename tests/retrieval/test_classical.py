"""Colour, texture, gradients and visual words of whole pictures, with and without a mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from beauty_bafe.data.catalog import Skipped, from_folder
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import Member, load_members
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import spoc
from beauty_bafe.rerank.keypoints import Sift, root_sift
from beauty_bafe.retrieval.classical import Vlad, hog, lab_histogram, lbp, load_or_fit
from beauty_bafe.retrieval.ensemble import Concatenation
from beauty_bafe.retrieval.gallery import Gallery

WIDTHS = {lab_histogram: 512, lbp: 30, hog: 6 * 6 * 4 * 9}


@pytest.fixture
def pictures(toy: Path) -> torch.Tensor:
    paths = sorted((toy / "queries").iterdir())[:4]
    pictures = [cv2.resize(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), (112, 112)) for path in paths]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def left_half(pictures: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(len(pictures), 1, *pictures.shape[2:])
    mask[..., : pictures.shape[3] // 2] = 1
    return mask


@pytest.mark.parametrize("function", WIDTHS)
def test_masks_hide_what_lies_outside(function: Callable[..., torch.Tensor], pictures: torch.Tensor) -> None:
    mask = left_half(pictures)
    changed = pictures.clone()
    changed[..., 56 + 8 :] = 255 - changed[..., 56 + 8 :]
    assert function(pictures).shape == (4, WIDTHS[function])
    assert not torch.equal(function(pictures), function(changed))
    torch.testing.assert_close(function(pictures, mask), function(changed, mask), atol=1e-6, rtol=0)
    alone = torch.cat([function(pictures[i : i + 1], mask[i : i + 1]) for i in range(4)])
    assert torch.equal(function(pictures, mask), alone)


def test_lab_histogram_counts_every_pixel_once(pictures: torch.Tensor) -> None:
    """Against one pixel at a time."""
    rgb = pictures[0].permute(1, 2, 0).numpy()
    lab = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2LAB)
    counts = np.zeros((8, 8, 8))
    for row in lab:
        for lightness, a, b in row:
            counts[lightness // 32, a // 32, b // 32] += 1
    np.testing.assert_allclose(lab_histogram(pictures[:1])[0], np.sqrt(counts / counts.sum()).ravel(), atol=1e-6)


def test_lbp_does_not_turn_with_the_picture(pictures: torch.Tensor) -> None:
    upright, turned = lbp(pictures, radii=[1]), lbp(pictures.rot90(1, (2, 3)), radii=[1])
    torch.testing.assert_close(upright, turned, atol=0.01, rtol=0)


def test_vlad_against_a_slow_twin(pictures: torch.Tensor, toy: Path) -> None:
    vlad = Vlad(words=4, keypoints=60)
    with pytest.raises(ValueError, match="VLAD has no vocabulary yet"):
        vlad(pictures)
    vlad.fit(from_folder(toy / "gallery"))
    assert vlad.vocabulary is not None
    mask = left_half(pictures)
    for row in range(4):
        rgb = np.ascontiguousarray(pictures[row].permute(1, 2, 0).numpy())
        points, sift = Sift(112, 60)(rgb)
        for weight in (None, mask):
            words = np.zeros((4, 128))
            for (x, _), descriptor in zip(points, root_sift(sift), strict=True):
                nearest = int(np.linalg.norm(vlad.vocabulary - descriptor, axis=1).argmin())
                words[nearest] += (1 if weight is None else float(int(x) < 56)) * (descriptor - vlad.vocabulary[nearest])
            words = words / np.maximum(np.linalg.norm(words, axis=1, keepdims=True), 1e-12)
            got = vlad(pictures[row : row + 1], None if weight is None else weight[row : row + 1])
            np.testing.assert_allclose(got[0], words.ravel(), atol=1e-5)
    blank = vlad(torch.full((1, 3, 112, 112), 255, dtype=torch.uint8))
    assert torch.equal(blank, torch.zeros(1, 512))


def test_a_vocabulary_needs_descriptors(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "white.png"), np.full((60, 60), 255, np.uint8))
    with pytest.raises(ValueError, match="0 SIFT descriptors in 1 gallery pictures are too few for 4 words"):
        Vlad(words=4, keypoints=60).fit(from_folder(tmp_path))


def test_members_of_the_picture_are_made_once_and_answer_a_year_later(tmp_path: Path, toy: Path, tiny_checkpoint: Path) -> None:
    """Two networks and three poolings: the classical ones are one member each; the vocabulary is kept with the index."""

    def shop() -> Gallery:
        poolings = {
            "deep": Pooling(spoc, saliency=True),
            "vlad": Pooling(Vlad(words=4, keypoints=60), saliency=True, map="picture"),
            "colour": Pooling(lab_histogram, saliency=False, map="picture"),
        }
        members = load_members([str(tiny_checkpoint)] * 2, poolings)
        assert [member.pooling for member in members] == [*poolings.values(), poolings["deep"]]
        extraction = FeatureExtraction(tmp_path / "features", num_workers=0, device="cpu", precision="32-true")
        return Gallery(members, extraction, Concatenation(zscore=False, weights=None))

    index = str(tmp_path / "index")
    queries = from_folder(toy / "queries")
    today = shop().open(str(toy / "gallery"), index, ExactIndex(device="cpu"), Skipped())
    first = today.answer(queries, today.describe(queries, str(toy / "queries"), "queries", Skipped()), 3)
    for file in (tmp_path / "features").glob("vocabulary-*.npy"):
        file.unlink()
    later = shop().open(None, index, ExactIndex(device="cpu"), Skipped())
    second = later.answer(queries, later.describe(queries, str(toy / "queries"), "queries", Skipped()), 3)
    assert second.as_answers() == first.as_answers()


def test_a_vocabulary_is_learned_once(tmp_path: Path, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from beauty_bafe.models.extractor import BackgroundAgnosticExtractor

    names = []
    for _ in range(2):
        pooling = Pooling(Vlad(words=4, keypoints=60), saliency=False, map="picture")
        member = Member("m", "s", BackgroundAgnosticExtractor.__new__(BackgroundAgnosticExtractor), pooling)
        load_or_fit([member], from_folder(toy / "gallery"), str(toy / "gallery"), None, tmp_path)
        names.append(str(pooling))
    assert names[0] == names[1]
    assert "vocabulary=none" not in names[0]
    assert capsys.readouterr().out.count("VLAD: learning 4 words") == 1
