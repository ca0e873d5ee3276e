"""Exact search in torch: a fast first pass in low precision finds candidates, and a bound proves that none is missed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.precision import fastest_precision, pick_device
from ..process import HeldSetting
from .memory_index import MemoryIndex

QUERIES = 1024  # per batch
CELLS = {"cpu": 1 << 23, "cuda": 1 << 28}  # scores of a block; on a CPU they fit its caches
GROUP = 32  # scores of which first only the maximum is compared
PAIRS = 1 << 19  # float64 numbers per block of re-scoring
UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 0.0}  # rounding of the first pass's own output, relative


def search_device(device: str) -> str:
    """`pick_device`, but the CPU instead of Apple's GPUs, which have no float64."""
    picked = pick_device(device)
    return "cpu" if picked == "mps" else picked


class ExactIndex(MemoryIndex):
    """Exact nearest neighbours, faster than by comparing every query with every row in full precision.

    The first pass computes all scores block by block from rounded copies (`first_pass`: bfloat16, float32, or auto for
    bfloat16 if the device is fast at it). Rows whose rounded score plus the largest possible error reaches the k-th best
    exact score so far are scored again in float64; no other row can be among the k best. Scores are these float64 values
    rounded to float32, ties in the gallery's order, whatever the device or batch.

    Memory per row and dimension: 4 bytes for the vectors (after loading they are mapped from disk), 2 more for bfloat16.
    """

    def __init__(self, metric: str = "ip", device: str = "auto", first_pass: str = "auto") -> None:
        super().__init__(metric)
        self.device = search_device(device)
        if first_pass not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"index.first_pass={first_pass}: type auto, bfloat16 or float32")
        half = fastest_precision(self.device).startswith("bf16") if first_pass == "auto" else first_pass == "bfloat16"
        # L1 is no matrix product, so bfloat16 would only round it.
        self.rounded = torch.bfloat16 if half and metric != "l1" else torch.float32

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._coarse.nbytes

    def describe(self) -> dict[str, Any]:
        return {"index": "exact", "metric": self.metric}

    def __str__(self) -> str:
        return f"exact {self.metric} on {self.device}, first pass in {str(self.rounded).removeprefix('torch.')}"

    def _build(self) -> None:
        self._rows = self._placed()
        self._coarse = torch.empty(self._rows.shape, dtype=self.rounded, device=self.device)
        self._norms = torch.empty(len(self._rows), device=self.device)
        self._errors = torch.empty(len(self._rows), device=self.device)
        self._round(0)

    def _placed(self) -> Tensor:
        """The vectors for re-scoring: on the GPU if they fit there beside everything else, otherwise in main memory."""
        rows = torch.from_numpy(self.vectors)
        roomy = self.device != "cpu" and torch.cuda.mem_get_info(self.device)[0] > 3 * rows.nbytes
        return rows.to(self.device) if roomy else rows

    def _round(self, start: int) -> None:
        """Compute rounded copies, lengths and rounding errors of the rows from `start` on."""
        for first in range(start, len(self._rows), 1 << 14):
            part = slice(first, min(first + (1 << 14), len(self._rows)))
            rows = self._rows[part].to(self.device)
            self._coarse[part] = rows.to(self.rounded)
            self._norms[part] = rows.norm(dim=1)
            self._errors[part] = (rows - self._coarse[part].float()).norm(dim=1)

    def _grown(self, before: int) -> None:
        old = self._coarse, self._norms, self._errors
        self._rows = self._placed()
        self._coarse, self._norms, self._errors = (
            torch.empty(len(self._rows), *part.shape[1:], dtype=part.dtype, device=self.device) for part in old
        )
        for new, part in zip((self._coarse, self._norms, self._errors), old, strict=True):
            new[:before] = part
        self._round(before)

    def _shrunk(self, keep: np.ndarray) -> None:
        kept = torch.from_numpy(keep).to(self.device)
        self._rows = self._placed()
        self._coarse, self._norms, self._errors = self._coarse[kept], self._norms[kept], self._errors[kept]

    @torch.inference_mode()
    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = []
        with _PLAIN_ARITHMETIC:
            for start in range(0, len(queries), QUERIES):
                batch = torch.from_numpy(queries[start : start + QUERIES]).to(self._rows.device)
                found.append(self._search_together(batch, k))
        if not found:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        scores, positions = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
        return scores, positions

    def _search_together(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Queries float32 (B, D) -> scores float32 (B, k) and positions int64 (B, k), on the device of the queries."""
        bound = _Bound(queries.to(self.device), self._coarse, self._norms, self._errors, self.metric)
        best = queries.new_full((len(queries), k), -torch.inf)
        positions = torch.full((len(queries), k), len(self._rows), device=queries.device)
        rows = max(CELLS[torch.device(self.device).type] // len(queries), 4 * k, GROUP)
        for start in range(0, len(self._rows), rows):
            part = slice(start, min(start + rows, len(self._rows)))
            scores = bound.scores(part)
            if start == 0:
                # The k best rounded scores give a first threshold; their rows are found again below.
                likely = scores.topk(min(k, scores.shape[1])).indices.to(queries.device)
                who = torch.arange(len(queries), device=queries.device).repeat_interleave(likely.shape[1])
                exact = self._score(queries, who, likely.flatten()).view(len(queries), -1)
                kth = exact.amin(1) if likely.shape[1] == k else best[:, -1]
            else:
                kth = best[:, -1]
            who, row = (found.to(queries.device) for found in _at_least(scores, bound.floor(kth.to(self.device))))
            best, positions = _merge(best, positions, who, row + start, self._score(queries, who, row + start))
        return best, positions

    def _score(self, queries: Tensor, who: Tensor, row: Tensor) -> Tensor:
        """Scores of pairs of a query and a row, int64 (P,) each: float32 (P,), summed in float64."""
        scores = queries.new_empty(len(who))
        step = max(1, PAIRS // queries.shape[1])
        for start in range(0, len(who), step):
            pairs = slice(start, start + step)
            left, right = queries[who[pairs]].double(), self._rows[row[pairs]].double()
            if self.metric == "ip":
                scores[pairs] = (left * right).sum(1).float()
            else:
                difference = left - right
                parts = difference.square() if self.metric == "l2" else difference.abs()
                scores[pairs] = -parts.sum(1).float()
        return scores


class _Bound:
    """Rounded scores for a batch of queries, and the rounded score below which the exact one must be too low."""

    def __init__(self, queries: Tensor, coarse: Tensor, norms: Tensor, errors: Tensor, metric: str) -> None:
        self.queries, self.coarse, self.metric = queries.to(coarse.dtype), coarse, metric
        self.row_squares, self.squares = norms.square(), queries.square().sum(1)
        length, largest = queries.norm(dim=1).double(), norms.max().double()
        width = queries.shape[1]
        # |<q, g> - <q', g'>| <= |q - q'| |g| + |q'| |g - g'| (Cauchy-Schwarz); lengths of rounded vectors are at most
        # 1 + 2^-8 times the exact ones. Summing D products in float32 adds D 2^-24 of the sum of their sizes, which
        # |q'| |g'| bounds; doubled for any order of summation and for the lengths' own rounding.
        moved = (queries - self.queries.float()).norm(dim=1).double()
        self.error = 1.001 * (moved * largest + 1.01 * length * errors.max().double())
        self.error += (2 * width + 16) * 2.0**-24 * length * largest + 1e-30
        self.unit, self.reach, self.width = UNIT[coarse.dtype], length * largest, width
        self.sum = length + largest

    def scores(self, part: slice) -> Tensor:
        """Scores of the first pass, bfloat16 or float32 (B, R)."""
        if self.metric == "l1":
            return -torch.cdist(self.queries, self.coarse[part], p=1)
        products = self.queries @ self.coarse[part].T
        if self.metric == "ip":
            return products
        return 2 * products.float() - self.row_squares[part] - self.squares[:, None]

    def floor(self, kth: Tensor) -> Tensor:
        """k-th best exact scores, (B,) -> the least rounded score of a row that can still equal or beat them."""
        kth = kth.double()
        if self.metric == "l1":  # sums of D terms of one sign: the error is relative
            floor = kth - (self.width + 8) * 2.0**-22 * kth.abs()
        elif self.metric == "l2":
            floor = kth - 2 * (self.error + 1.02 * self.unit * self.reach) - 2.0**-20 * self.sum.square()
        else:
            floor = kth - self.error - 2.0**-22 * kth.abs()
            floor = floor - 1.02 * self.unit * floor.abs()
        floor = torch.where(kth == -torch.inf, kth, floor)
        return torch.nextafter(floor.float(), torch.full_like(floor, -torch.inf).float())


def _at_least(scores: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of query and row, int64 (P,) each, whose scores (B, R) reach floor (B,), ordered by query, then by row.

    Maxima over groups of strided columns are compared first, as few groups reach the floor.
    """
    width = scores.shape[1] // GROUP
    groups = scores[:, : width * GROUP].unflatten(1, (GROUP, width)) if width else scores.new_empty(len(scores), GROUP, 0)
    who, column = (groups.amax(1) >= floor[:, None]).nonzero(as_tuple=True)
    hit, member = (groups[who, :, column] >= floor[who, None]).nonzero(as_tuple=True)
    rest_who, rest = (scores[:, width * GROUP :] >= floor[:, None]).nonzero(as_tuple=True)
    grouped = who[hit] * scores.shape[1] + member * width + column[hit]
    keys = torch.cat([grouped, rest_who * scores.shape[1] + rest + width * GROUP]).sort().values
    return keys // scores.shape[1], keys % scores.shape[1]


def _merge(best: Tensor, positions: Tensor, who: Tensor, row: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Merge new pairs, ordered by query and row, into the k best so far (B, k); new rows come after all earlier ones."""
    touched, group, count = who.unique_consecutive(return_inverse=True, return_counts=True)
    if not len(touched):
        return best, positions
    k = best.shape[1]
    place = k + torch.arange(len(who), device=who.device) - (count.cumsum(0) - count)[group]
    wide = best.new_full((len(touched), k + int(count.max())), -torch.inf)
    wide_positions = positions.new_zeros(wide.shape)
    wide[:, :k], wide_positions[:, :k] = best[touched], positions[touched]
    wide[group, place], wide_positions[group, place] = scores, row
    # Earlier rows come first, so a stable sort leaves ties in the gallery's order.
    order = wide.sort(dim=1, descending=True, stable=True)
    best[touched] = order.values[:, :k]
    positions[touched] = wide_positions.gather(1, order.indices[:, :k])
    return best, positions


Arithmetic = tuple[bool, str, str]


def _read_arithmetic() -> Arithmetic:
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return cuda.allow_bf16_reduced_precision_reduction, cuda.fp32_precision, cpu.fp32_precision


def _write_arithmetic(values: Arithmetic) -> None:
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    # Not torch.set_float32_matmul_precision, which fails in a process that has used these newer settings.
    cuda.allow_bf16_reduced_precision_reduction, cuda.fp32_precision, cpu.fp32_precision = values


# bfloat16 products summed in float32, and float32 products not rounded, whatever the process has set: the bound needs it.
_PLAIN_ARITHMETIC = HeldSetting(_read_arithmetic, _write_arithmetic, (False, "ieee", "ieee"))
