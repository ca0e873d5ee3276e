"""Reading labels: words on the query's product against those on the catalogue photos."""

from __future__ import annotations

import queue
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from .candidates import Candidates
from .evidence import EvidenceReranker
from .keypoints import look_closer
from .looking import look_at_answers

LEAST_LETTERS = 3  # of a word without a digit; shorter ones are read into any texture
ALIKE = 70.0  # per cent of their letters that words must share to count as partly the same
LONG = 5  # letters of a word that may be a part of another, as recognisers join words
PART = 5.0  # per cent that being a part costs
ENOUGH = 0.5  # information that must have been read on a query, nats; less says nothing

Words = tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """Words of at least `sure` confidence, 0 to 1, read by PP-OCR (Cui et al., 2025) as RapidOCR carries it.

    `size`: pixels of the canvas that is read; `closer`: see `look_closer`.
    """

    size: int
    closer: float | None
    sure: float

    def __post_init__(self) -> None:
        import rapidocr  # noqa: F401  # raises where it is missing, before anything is computed

    def key(self) -> dict[str, Any]:
        known = {"size": self.size, "closer": self.closer, "sure": self.sure}
        return known | {"rapidocr": version("rapidocr"), "letters": LEAST_LETTERS}

    def look(self, rgb: np.ndarray, mask: np.ndarray | None) -> Words:
        canvas, _ = look_closer(rgb, mask, self.size, self.closer)
        try:
            engine = _IDLE.get_nowait()
        except queue.Empty:
            engine = _load()
        found = engine(np.ascontiguousarray(canvas[..., ::-1]))
        _IDLE.put(engine)
        if found.txts is None:
            return ()
        read = (text for text, score in zip(found.txts, found.scores, strict=True) if score >= self.sure)
        return tuple(sorted({word for text in read for word in split_words(text)}))

    def pack(self, look: Words) -> dict[str, np.ndarray]:
        return {"text": np.frombuffer("\n".join(look).encode(), np.uint8)}

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> Words:
        return tuple(arrays["text"].tobytes().decode().split("\n")) if len(arrays["text"]) else ()


# RapidOCR keeps what it is reading in its attributes, so that each thread needs one of its own.
_IDLE: queue.SimpleQueue[Any] = queue.SimpleQueue()


def _load() -> Any:
    from rapidocr import RapidOCR

    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    # `Reader.sure` decides; RapidOCR itself would leave out all below 0.5.
    return RapidOCR(params={**threads, "Global.log_level": "error", "Global.use_cls": False, "Global.text_score": 0.0})


@dataclass(frozen=True)
class LabelReading(EvidenceReranker):
    """Words that a query shares with some of its answers and not with others: see `compare_words`.

    Some answer shares most of them even where the product is not in the gallery: they tell siblings apart, no more.
    """

    reader: Reader
    kinds = ("text",)
    absolute = False

    def evidence(self, found: Candidates) -> np.ndarray:
        return look_at_answers(found, self.depth, self.reader, lambda query, answers: compare_words(query, answers)[:, None])


def split_words(text: str) -> list[str]:
    """Words in lower case, numbers with decimals and per cent sign; what has under three letters and no digit is left out.

    >>> split_words("Mellanmjölk 1,5% FETT, 1 l à la carte")
    ['mellanmjölk', '1,5%', 'fett', '1', 'carte']
    """
    words = re.findall(r"[^\W_]+(?:[.,]\d+)?%?", text.lower())
    return [word for word in words if len(word) >= LEAST_LETTERS or any(letter.isdigit() for letter in word)]


def compare_words(query: Words, answers: Sequence[Words]) -> np.ndarray:
    """Of the information in the query's words, the share that stands on each answer: float (k,), 0 to 1.

    A word informs by log((k + 1) / (1 + answers that have it)): what all siblings of a brand have in common says nothing. Words
    need not be the same, see `_alike`. Without words that tell answers apart it is 0 for all of them.
    """
    words = tuple(sorted({word for answer in answers for word in answer}))
    if not words or not query:
        return np.zeros(len(answers))
    alike, place = _alike(words, words), {word: row for row, word in enumerate(words)}
    there = [alike[:, [place[word] for word in answer]].max(axis=1) if answer else np.zeros(len(words)) for answer in answers]
    stands = np.stack(there, axis=1)
    information = np.log((len(answers) + 1) / (1 + stands.sum(axis=1))) * _alike(words, query).max(axis=1)
    total = information.sum()
    return information @ stands / total if total > ENOUGH else np.zeros(len(answers))


def _alike(words: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """How far words are the same, 0 to 1, float (W, O): by shared letters (Indel ratio), or as a part of a longer one."""
    from rapidfuzz import fuzz, process

    whole = process.cdist(words, others, scorer=fuzz.ratio, dtype=np.float32)
    part = process.cdist(words, others, scorer=fuzz.partial_ratio, dtype=np.float32) - PART
    lengths, other_lengths = (np.array([len(word) for word in group]) for group in (words, others))
    fits = (lengths[:, None] >= LONG) & (other_lengths >= lengths[:, None])
    shared = np.where(fits, np.maximum(whole, part), whole)
    return np.clip((shared - ALIKE) / (100 - ALIKE), 0, 1)
