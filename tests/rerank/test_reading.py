"""Words on labels: how alike, what they tell, and what is read on a picture."""

from __future__ import annotations

import copy
import pickle
import queue
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from beauty_bafe.data.catalog import Catalog
from beauty_bafe.extraction.features import Features, unit
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.ranking import Ranking
from beauty_bafe.rerank.candidates import Candidates, SearchContext

pytest.importorskip("rapidocr", reason="the extra `text`")

from beauty_bafe.rerank import reading
from beauty_bafe.rerank.reading import LabelReading, Reader, compare_words, word_similarity


def test_words_are_alike_by_their_letters() -> None:
    def slow(first: str, second: str) -> float:
        """Twice the longest common subsequence, as a share of all letters."""
        table = np.zeros((len(first) + 1, len(second) + 1), int)
        for row, letter in enumerate(first, start=1):
            for column, other in enumerate(second, start=1):
                same = table[row - 1, column - 1] + 1
                table[row, column] = same if letter == other else max(table[row - 1, column], table[row, column - 1])
        return 100 * 2 * table[-1, -1] / (len(first) + len(second))

    words = ["fett", "fetl", "mild", "1,5%", "3%", "15%"]  # too short to be parts
    expected = [[max(0.0, (slow(first, second) - 70) / 30) for second in words] for first in words]
    np.testing.assert_allclose(word_similarity(words, words), expected, atol=1e-5)
    assert word_similarity(["mellan"], ["mellanmjölk"])[0, 0] == pytest.approx((95 - 70) / 30), "recognisers join words"
    assert word_similarity(["mellanmjölk"], ["mellan"])[0, 0] < 0.1, "what is not there is not found"
    assert word_similarity(["1%"], ["11%"])[0, 0] < 0.4, "a short word is no part of another"


def test_what_siblings_have_in_common_says_nothing() -> None:
    siblings = [("arla", "mellan", "mjölk"), ("arla", "standard", "mjölk"), ("arla", "latt", "mjölk"), ()]
    told = compare_words(("arla", "mjölk", "standard"), siblings)
    assert told.argmax() == 1
    assert told[1] == pytest.approx(1, abs=0.02)
    assert told[0] < 0.5
    assert told[3] == 0
    assert not compare_words(("arla", "mjölk"), siblings[:3]).any(), "nothing that tells them apart"
    assert compare_words(("standart",), siblings).argmax() == 1, "a letter may be wrong"
    for nothing in ((), ("bread",)):
        assert not compare_words(nothing, siblings).any()
    assert compare_words(("arla",), []).shape == (0,)


def test_information_against_a_slow_twin() -> None:
    rng = np.random.default_rng(0)
    lexicon = ["".join(rng.choice(list("abcdefgh"), 6)) for _ in range(12)]
    answers = [tuple(sorted(set(rng.choice(lexicon, 4)))) for _ in range(5)]
    query = tuple(sorted(set(rng.choice(lexicon, 5))))

    def likest(word: str, others: tuple[str, ...]) -> float:
        return max((float(word_similarity([word], [other])[0, 0]) for other in others), default=0.0)

    total, shares = 0.0, np.zeros(5)
    for word in {word for answer in answers for word in answer}:
        there = [likest(word, answer) for answer in answers]
        information = np.log(6 / (1 + sum(there))) * likest(word, query)
        total += information
        shares += information * np.array(there)
    np.testing.assert_allclose(compare_words(query, answers), shares / total, rtol=1e-5)


def label(*lines: str) -> np.ndarray:
    """A product with large print on a white canvas, uint8 (640, 640, 3)."""
    canvas = np.full((640, 640, 3), 255, np.uint8)
    cv2.rectangle(canvas, (120, 60), (520, 580), (90, 150, 60), -1)
    for row, line in enumerate(lines):
        cv2.putText(canvas, line, (140, 180 + 120 * row), cv2.FONT_HERSHEY_SIMPLEX, 2.0, (255, 255, 255), 5, cv2.LINE_AA)
    return canvas


def test_labels_decide_between_siblings(tmp_path: Path) -> None:
    reader = Reader(640, 1.2, 0.6)
    names = {"plain": ("YOGHURT", "PLAIN"), "vanilla": ("YOGHURT", "VANILLA"), "berry": ("YOGHURT", "BERRY"), "blank": ()}
    paths = {name: tmp_path / f"{name}.png" for name in (*names, "query")}
    for name, lines in {**names, "query": ("YOGHURT", "VANILLA")}.items():
        cv2.imwrite(str(paths[name]), label(*lines))
    gallery = Catalog(tuple(names), tuple(paths[name] for name in names))
    vectors = unit(np.random.default_rng(3).random((4, 8))).astype(np.float32)
    index = ExactIndex(device="cpu").fit(vectors, gallery.ids)
    queries = Features(vectors[:1], ("query",), np.full((1, 56, 56), 255, np.uint8))
    context = SearchContext(gallery, Catalog(("query",), (paths["query"],)), tmp_path / "features")
    found = Candidates(index.search(queries.vectors, queries.ids, 4), queries, index, context)
    assert found.ranking.answers(0)[0] == "plain"
    for _ in range(2):  # the second time what the gallery says is read from disk
        ranked = LabelReading(4, {"text": 1.0}, reader).__call__(found).ranking
        assert ranked.answers(0)[0] == "vanilla"
        assert ranked.evidence is not None
        assert ranked.evidence.single.shape[2] == 1, "words say nothing about probabilities"
    copied = pickle.loads(pickle.dumps(copy.deepcopy(LabelReading(4, {"text": 1.0}, reader))))
    assert copied(found).ranking.as_answers() == ranked.as_answers(), "engines that have read travel with no step"
    words_of_label = reader.extract(label("YOGHURT", "VANILLA"), None)
    assert words_of_label == ("vanilla", "yoghurt")
    for words in (words_of_label, ()):
        assert reader.unpack(reader.pack(words)) == words
    with pytest.raises(ValueError, match=r"weights: words is not a kind of evidence here; type some of text"):
        LabelReading(4, {"words": 1.0}, reader)


def test_labels_are_read_only_if_they_can_change_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.array([[0.9, 0.851, 0.3], [0.9, 0.84, 0.83], [0.9, 0.9, 0.9], [0.9, 0.8, 0.7]], np.float32)
    positions = np.array([[0, 1, 2], [0, 1, 2], [2, 1, 0], [0, 1, 2]])
    ids = tuple("abcd")
    vectors = unit(np.random.default_rng(0).random((4, 8))).astype(np.float32)
    masks = np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    index = ExactIndex(device="cpu").fit(vectors[:3], tuple("xyz"))
    found = Candidates(Ranking(ids, index.ids, positions, scores), Features(vectors, ids, masks), index, rescored=True)
    asked = []

    def read(candidates: Candidates, depth: int, *_: object) -> np.ndarray:
        masks = candidates.queries.masks
        asked.append((candidates.ranking.query_ids, candidates.queries.ids, None if masks is None else masks[:, 0, 0].tolist()))
        return np.tile([[0.0], [1.0], [0.5]], (len(candidates.ranking.query_ids), 1, 1))

    monkeypatch.setattr(reading, "score_candidates", read)
    step = LabelReading(3, {"text": 0.05}, Reader(640, 1.2, 0.6))
    ranked = step(found).ranking
    assert asked == [(("a", "c"), ("a", "c"), [0, 2])], "a lead of 0.06 is more than all words weigh"
    assert [ranked.answers(row) for row in range(4)] == [["y", "x", "z"], ["x", "y", "z"], ["y", "x", "z"], ["x", "y", "z"]]
    assert step(found.take(np.array([1, 3]))).ranking.as_answers() == {"b": ["x", "y", "z"], "d": ["x", "y", "z"]}
    assert len(asked) == 1
    assert step(replace(found, ranking=found.ranking.first(1))).ranking.answers(2) == ["z"], "nothing to choose from"
    assert len(asked) == 1
    unmasked = replace(found, queries=replace(found.queries, masks=None))
    against = LabelReading(3, {"text": -0.05}, step.reader)(unmasked).ranking
    assert asked[1:] == [(("a", "c"), ("a", "c"), None)]
    assert against.answers(2) == ["z", "x", "y"], "a negative weight counts against what the query shares"


def test_any_confidence_can_be_asked_for() -> None:
    """Print that can hardly be read: RapidOCR by itself would never say what it is less than half sure of."""
    canvas = np.full((640, 640, 3), 255, np.uint8)
    for row, word in enumerate(("YOGHURT", "VANILLA", "QXZJKW", "BERRIES")):
        cv2.putText(canvas, word, (100, 120 + 140 * row), cv2.FONT_HERSHEY_SIMPLEX, 1.4, (60, 60, 60), 3)
    blurred = cv2.GaussianBlur(canvas, (0, 0), 6)
    noisy = np.clip(blurred + np.random.default_rng(0).normal(0, 40, blurred.shape), 0, 255).astype(np.uint8)
    doubtful, sure = (set(Reader(640, None, confidence).extract(noisy, None)) for confidence in (0.0, 0.5))
    assert sure < doubtful


def test_all_readers_share_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second core of a process can crash it; and what is set for reading must not change how pictures are described."""
    from openvino import Core

    from beauty_bafe.models.runtime import open_core

    before = open_core().get_property("CPU", "INFERENCE_NUM_THREADS")
    monkeypatch.setattr(reading, "_IDLE_ENGINES", queue.SimpleQueue())
    monkeypatch.setattr(Core, "__init__", lambda *_: pytest.fail("a second core"))
    assert Reader(320, None, 0.6).extract(label("YOGHURT"), None) == ("yoghurt",)
    assert open_core().get_property("CPU", "INFERENCE_NUM_THREADS") == before
