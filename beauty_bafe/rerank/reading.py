"""Re-ranking by text recognition: compares the words on labels of the query and of the catalogue photos."""

from __future__ import annotations

import queue
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..index.ranking import Evidence
from ..models.runtime import open_core
from .candidates import Candidates
from .evidence import EvidenceReranker
from .keypoints import crop_to_product
from .local_features import score_candidates

MIN_LETTERS = 3  # of a word without a digit; shorter ones are often recognised in mere texture
MIN_SIMILARITY = 70.0  # per cent, of words that count as a partial match
MIN_PART_LETTERS = 5  # of a word that may match a part of another, as recognisers join words
PART_PENALTY = 5.0  # per cent, for a match with a part of a word
MIN_INFORMATION = 0.5  # nats, of the words recognised on a query; with less, the evidence is 0

Words = tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """Recognises words by PP-OCR (Cui et al., 2025) in RapidOCR and OpenVINO. `sure`: their minimum confidence, 0 to 1.

    `size`: side in pixels of the canvas; `closer`: see `crop_to_product`.
    """

    size: int
    closer: float | None
    sure: float

    def __post_init__(self) -> None:
        import rapidocr  # noqa: F401  # raises ImportError if it is missing, before anything is computed

    def key(self) -> dict[str, Any]:
        known = {"size": self.size, "closer": self.closer, "sure": self.sure}
        return known | {"rapidocr": version("rapidocr"), "openvino": version("openvino"), "letters": MIN_LETTERS}

    def extract(self, rgb: np.ndarray, mask: np.ndarray | None) -> Words:
        canvas, _ = crop_to_product(rgb, mask, self.size, self.closer)
        try:
            engine = _IDLE_ENGINES.get_nowait()
        except queue.Empty:
            engine = _load()
        result = engine(np.ascontiguousarray(canvas[..., ::-1]))
        _IDLE_ENGINES.put(engine)
        if result.txts is None:
            return ()
        read = (text for text, score in zip(result.txts, result.scores, strict=True) if score >= self.sure)
        return tuple(sorted({word for text in read for word in split_words(text)}))

    def pack(self, features: Words) -> dict[str, np.ndarray]:
        return {"text": np.frombuffer("\n".join(features).encode(), np.uint8)}

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> Words:
        return tuple(arrays["text"].tobytes().decode().split("\n")) if len(arrays["text"]) else ()


# RapidOCR keeps state in its attributes, so each thread needs an engine of its own.
_IDLE_ENGINES: queue.SimpleQueue[Any] = queue.SimpleQueue()


def _load() -> Any:
    open_core()  # first, as it keeps OpenVINO's telemetry off
    import rapidocr.inference_engine.openvino.main as backend
    from rapidocr import EngineType, RapidOCR

    backend.Core = _SharedCore
    engines = {f"{part}.engine_type": EngineType.OPENVINO for part in ("Det", "Rec")}
    # `Reader.sure` is the threshold; RapidOCR's own would drop everything below 0.5.
    return RapidOCR(params={**engines, "Global.log_level": "error", "Global.use_cls": False, "Global.text_score": 0.0})


class _SharedCore:
    """What RapidOCR uses of OpenVINO's Core, with settings that it does not offer, and only one core for the process."""

    SETTINGS: ClassVar = {
        "INFERENCE_PRECISION_HINT": "f32",  # the same words on all processors
        "INFERENCE_NUM_THREADS": 1,  # queries are read in parallel
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }

    def set_property(self, device: str, settings: dict[str, Any]) -> None:
        """Other models of this process keep their settings."""

    def read_model(self, path: Path) -> Any:
        return open_core().read_model(path)

    def compile_model(self, model: Any, device_name: str) -> Any:
        return open_core().compile_model(model, device_name, self.SETTINGS)


@dataclass(frozen=True)
class LabelReading(EvidenceReranker):
    """Evidence from the words that a query shares with some of its candidates and not with others: see `compare_words`.

    Not absolute: some candidate shares most words even if the product is not in the gallery, so they only distinguish
    variants of a product. Labels are only read if they could change the first answer, as reading takes longest; otherwise all
    answers keep their order. The scores include the words, and so do probabilities after a fusion of rankings, which has only
    scores.
    """

    reader: Reader
    kinds = ("text",)
    absolute = ()
    most = 1.0

    def evidence(self, candidates: Candidates) -> Evidence:
        return Evidence.of(
            score_candidates(candidates, self.depth, self.reader, lambda query, others: compare_words(query, others)[:, None])
        )


def split_words(text: str) -> list[str]:
    """Split into lower-case words and numbers (with decimals and %); drop words of under three letters without a digit.

    >>> split_words("Mellanmjölk 1,5% FETT, 1 l à la carte")
    ['mellanmjölk', '1,5%', 'fett', '1', 'carte']
    """
    words = re.findall(r"[^\W_]+(?:[.,]\d+)?%?", text.lower())
    return [word for word in words if len(word) >= MIN_LETTERS or any(letter.isdigit() for letter in word)]


def compare_words(query: Words, candidates: Sequence[Words]) -> np.ndarray:
    """The share of the information in the query's words that each of k candidates has, float (k,), 0 to 1.

    The information of a word is log((k + 1) / (1 + candidates with it)), so words that all candidates share count little.
    Words may match partially, see `word_similarity`. All shares are 0 if no words distinguish the candidates.
    """
    words = tuple(sorted({word for candidate in candidates for word in candidate}))
    if not words or not query:
        return np.zeros(len(candidates))
    similarity, column = word_similarity(words, words), {word: row for row, word in enumerate(words)}
    columns = [[column[word] for word in candidate] for candidate in candidates]
    present = np.stack([similarity[:, own].max(axis=1) if own else np.zeros(len(words)) for own in columns], axis=1)
    information = np.log((len(candidates) + 1) / (1 + present.sum(axis=1))) * word_similarity(words, query).max(axis=1)
    total = information.sum()
    return information @ present / total if total > MIN_INFORMATION else np.zeros(len(candidates))


def word_similarity(words: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Similarity of words, float (W, O), 0 to 1: the Indel ratio of the whole words, or of one to a part of a longer other."""
    from rapidfuzz import fuzz, process

    whole = process.cdist(words, others, scorer=fuzz.ratio, dtype=np.float32)
    part = process.cdist(words, others, scorer=fuzz.partial_ratio, dtype=np.float32) - PART_PENALTY
    lengths, other_lengths = (np.array([len(word) for word in group]) for group in (words, others))
    fits = (lengths[:, None] >= MIN_PART_LETTERS) & (other_lengths >= lengths[:, None])
    shared = np.where(fits, np.maximum(whole, part), whole)
    return np.clip((shared - MIN_SIMILARITY) / (100 - MIN_SIMILARITY), 0, 1)
