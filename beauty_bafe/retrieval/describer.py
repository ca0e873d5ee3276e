"""Describe the pictures of a catalogue, or pictures in memory in the way the gallery's were described."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..data.catalog import Skipped
from ..data.images import Images, Pictures
from ..extraction.features import Features
from ..extraction.local import PREPROCESSING, versions
from ..extraction.members import Member, describe_members
from ..extraction.memory import MemoryExtraction
from ..manifest import digest
from ..models.views import View
from .ensemble import Concatenation, Fusion


class Extraction(Protocol):
    """See FeatureExtraction (stores descriptors on disk) and MemoryExtraction. `root`: where files may be kept."""

    root: Path
    scales: tuple[float, ...]
    flip: bool

    def folder(self, name: str) -> AbstractContextManager[Path]: ...

    def __call__(
        self,
        members: Sequence[Member],
        pictures: Pictures,
        source: str,
        what: str,
        skipped: Skipped,
        masks: bool = False,
        view: View | None = None,
    ) -> list[Features]: ...


@dataclass(frozen=True)
class EnsembleDescriber:
    """A PictureDescriber for index `number` of a gallery. `memory` is called when a picture is to be described."""

    members: Sequence[Member]
    memory: Callable[[], MemoryExtraction]
    ensemble: Concatenation | Fusion
    number: int

    @property
    def about(self) -> str:
        made = self.memory().settings
        seen = [list(made.scales), made.flip, made.precision, made.runtime, str(made.dtype), PREPROCESSING]
        pads = [member.extractor.pad for member in self.members]
        return digest(json.dumps([describe_members(self.members), pads, *seen, versions(made.runtime)]))

    @property
    def size(self) -> int:
        return max(member.extractor.size for member in self.members)

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        features = self.memory()(self.members, Images.numbered(pictures), "", "small copies", Skipped())
        return [part.vectors for part in features]

    def combine(self, members: Sequence[np.ndarray]) -> np.ndarray:
        names = tuple(map(str, range(len(members[0]))))
        return self.ensemble.transform([Features(vectors, names) for vectors in members])[self.number].vectors
