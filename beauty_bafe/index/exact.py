"""Exact search in torch: a fast first pass in low precision finds candidates, and a bound proves that none is missed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.precision import fastest_precision, pick_device
from ..process import TemporarySetting
from .axes import learn_axes
from .first_pass import FirstPass, Rounded, cuts
from .leading import WIDEST, Leading
from .memory_index import MemoryIndex

QUERIES = 1024  # per batch
LARGE = 20_000  # rows from which learning axes for int8 codes is worth its time
PAIRS = 1 << 19  # float64 numbers per block of re-scoring
INLINE = 256  # pairs up to which starting threads takes longer than re-scoring


def search_device(device: str) -> str:
    """`pick_device`, but the CPU instead of Apple's GPUs, which have no float64."""
    picked = pick_device(device)
    return "cpu" if picked == "mps" else picked


class ExactIndex(MemoryIndex):
    """Exact nearest neighbours, faster than by comparing every query with every row in full precision.

    The first pass estimates all scores. Rows whose estimate plus the largest possible error reaches the k-th best exact score
    so far are scored again in float64; no other row can be among the k best. Scores are these float64 values rounded to
    float32, ties in the gallery's order, whatever the device or batch.

    `first_pass`: bfloat16 or float32 computes all scores from rounded copies (Rounded). int8 multiplies codes of all
    dimensions, or of the leading ones first if descriptors are far from uniform, as those of trained networks are (Leading);
    it needs a CPU and metric ip or l2. auto: int8 for a large gallery if the processor multiplies int8 fast, or if a sample
    shows that the leading dimensions rule out nearly all rows; otherwise bfloat16 if the device is fast at it. `str(index)`
    says which was chosen. Raises ValueError for other values.

    Memory per row and dimension: 4 bytes for the vectors (after loading they are mapped from disk), and 1 more for int8, 2
    for bfloat16, 4 for float32.
    """

    def __init__(self, metric: str = "ip", device: str = "auto", first_pass: str = "auto") -> None:
        super().__init__(metric)
        self.device = search_device(device)
        if first_pass not in ("auto", "bfloat16", "float32", "int8"):
            raise ValueError(f"index.first_pass={first_pass}: type auto, bfloat16, float32 or int8")
        self.first_pass = first_pass
        self._quantizable = self.device == "cpu" and metric != "l1"
        if first_pass == "int8" and not self._quantizable:
            raise ValueError(
                "index.first_pass=int8 needs index.device=cpu and index.metric=ip or l2; type index.first_pass=auto"
            )
        half = fastest_precision(self.device).startswith("bf16") if first_pass == "auto" else first_pass == "bfloat16"
        # L1 is not computed by a matrix product, so bfloat16 would round it without being faster.
        self.rounded = torch.bfloat16 if half and metric != "l1" else torch.float32

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._first.nbytes

    def describe(self) -> dict[str, Any]:
        return {"index": "exact", "metric": self.metric}

    def __str__(self) -> str:
        return f"exact {self.metric} on {self.device}, first pass in {self._first}"

    def _build(self) -> None:
        self._rows = self._placed()
        self._first = self._choose()

    def _choose(self) -> FirstPass:
        large = self.first_pass == "auto" and len(self.vectors) >= LARGE and self.dimensions <= WIDEST
        if self._quantizable and (large or self.first_pass == "int8"):
            from .vectors import has_vnni

            axes = learn_axes(self._rows)
            if self.first_pass == "int8" or axes.blocks > 1 or has_vnni():
                return Leading(self._rows, self.metric, axes)
        return Rounded(self._rows, self.metric, self.device, self.rounded)

    def _save(self, folder: Path) -> None:
        super()._save(folder)
        for stale in Leading.files(folder):
            stale.unlink()
        if isinstance(self._first, Leading):
            self._first.save(folder)

    def _load(self, folder: Path) -> int:
        self._map(folder)
        saved = None
        if self._quantizable and self.first_pass in ("auto", "int8"):
            saved = Leading.load(folder, self.vectors, self.metric)
        if saved is None:
            self._build()
        else:
            self._rows, self._first = self._placed(), saved
        return len(self.vectors)

    def _placed(self) -> Tensor:
        """The vectors for re-scoring: on the GPU if three times their size is free there, otherwise in main memory."""
        rows = torch.from_numpy(self.vectors)
        roomy = self.device != "cpu" and torch.cuda.mem_get_info(self.device)[0] > 3 * rows.nbytes
        return rows.to(self.device) if roomy else rows

    def _grown(self, before: int) -> None:
        self._rows = self._placed()
        self._first = self._first.grown(self._rows, before)

    def _shrunk(self, keep: np.ndarray) -> None:
        self._rows = self._placed()
        self._first = self._first.shrunk(keep)

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
        best = queries.new_full((len(queries), k), -torch.inf)
        positions = torch.full((len(queries), k), len(self._rows), device=queries.device)
        for number, estimates in enumerate(self._first.compare(queries, k)):
            kth = best[:, -1]
            if number == 0:
                # Likely rows give a first threshold; they are found again below.
                likely = estimates.likely(k)
                if likely.shape[1] >= k:
                    who = torch.arange(len(queries), device=queries.device).repeat_interleave(likely.shape[1])
                    kth = self._score(queries, who, likely.flatten()).view(len(queries), -1).topk(k).values[:, -1]
            who, row = estimates.reaching(kth)
            best, positions = _merge(best, positions, who, row, self._score(queries, who, row))
        return best, positions

    def _score(self, queries: Tensor, who: Tensor, row: Tensor) -> Tensor:
        """Scores of pairs of a query and a row, int64 (P,) each: float32 (P,), summed in float64."""
        if self._rows.device.type == "cpu" and self.metric != "l1":
            return self._score_compiled(queries, who, row)
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

    def _score_compiled(self, queries: Tensor, who: Tensor, row: Tensor) -> Tensor:
        from .kernels import pair_scores

        pairs, scores = torch.stack([who, row]).numpy(), np.empty(len(who), np.float32)
        batch, rows = queries.numpy(), self._rows.numpy()

        def work(cut: slice) -> None:
            pair_scores(batch, rows, np.ascontiguousarray(pairs[:, cut]), self.metric == "l2", scores[cut])

        if len(scores) < INLINE:
            work(slice(0, len(scores)))
        else:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(work, cuts(len(scores))))
        return torch.from_numpy(scores)


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


# The bound requires bfloat16 products summed in float32, and unrounded float32 products, whatever the process has set.
_PLAIN_ARITHMETIC = TemporarySetting(_read_arithmetic, _write_arithmetic, (False, "ieee", "ieee"))
