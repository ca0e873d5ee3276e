"""Training of a PairNetwork, without labels: street views of the gallery's photos beside the photos most similar to them."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from ..manifest import digest
from ..models.precision import fastest_precision, pick_device
from .altered import alter
from .candidates import Candidates
from .dense import Canvas, CanvasExtractor, Pair, pair_up, stack_pairs
from .keypoints import Detector
from .local_features import score_candidates
from .matching import Matcher, fit_geometries
from .pair_network import SIDE, PairNetwork

log = logging.getLogger("beauty_bafe")

HARD = 6  # other photos kept for each view, the most similar ones
NEGATIVES = 3  # of these in each step
ALTERED = 0.5  # share of views that are also compared with an altered copy of their product's photo
RIGHT_WEIGHT = 2.0  # of the right pairs in the loss, as they are fewer
JITTER = 1.5  # pixels by which corners move (standard deviation), in half of the pairs
BATCH = 16  # views
WARMUP = 50  # steps; a tenth of all steps if these are fewer than ten times as many
RATES = {"block": 3e-4, "head": 1e-3}  # highest step sizes of AdamW, of the pretrained block and of everything else
DECAY = 0.02


class View(NamedTuple):
    """A street view: paired with its product's photo, and with others."""

    right: Pair
    others: list[Pair]


def collect_views(candidates: Candidates, detector: Detector, matcher: Matcher, depth: int) -> list[View]:
    """Pair each street view with its product's photo and with the others that are most similar to it.

    `candidates`: queries whose ids are those of the gallery pictures that they show; the first `depth` are used. Views whose
    product is not among them, or which have no other candidate, are left out.
    """
    ranking = candidates.ranking
    names = np.array(ranking.gallery_ids)[ranking.positions[:, :depth]]
    hit = names == np.array(ranking.query_ids)[:, None]
    paired: list[list[Pair]] = []
    photos: dict[str, np.ndarray] = {}  # each once, as they are shared by many views
    lock = threading.Lock()

    def pair(query: Canvas, others: Sequence[Canvas]) -> np.ndarray:
        keys = [digest(other.pixels.tobytes()) for other in others]
        geometries = fit_geometries(query.keypoints, [other.keypoints for other in others], matcher, detector.size)
        pairs = pair_up(query, others, geometries, detector.size)
        with lock:
            paired.append(
                [one._replace(candidate=photos.setdefault(key, one.candidate)) for key, one in zip(keys, pairs, strict=True)]
            )
            return np.full((len(others), 1), len(paired) - 1.0)

    numbers = score_candidates(candidates, names.shape[1], CanvasExtractor(detector), pair)[:, 0, 0].astype(int)
    views = []
    for number, right in zip(numbers, hit, strict=True):
        if not right.any():
            continue
        own = paired[number][int(right.argmax())]
        # Without copies of the product's own photo under other ids.
        others = [one for one in paired[number] if one.candidate is not own.candidate]
        if others:
            views.append(View(own, others[:HARD]))
    return views


def draw_pairs(view: View, views: Sequence[View], rng: np.random.Generator) -> tuple[list[Pair], list[bool]]:
    """Pairs of one step, and which of them are right: the right one, often an altered copy of it, and some of the others."""
    pairs, right = [view.right], [True]
    if rng.random() < ALTERED:
        stranger = views[int(rng.integers(len(views)))].right.candidate
        if (copy := alter(view.right.candidate, stranger, rng)) is not None:
            pairs.append(view.right._replace(candidate=copy))
    chosen = rng.permutation(len(view.others))[:NEGATIVES]
    pairs += [view.others[row] for row in chosen]
    moved = [one._replace(matrix=_jitter(rng) @ one.matrix) if rng.random() < 0.5 else one for one in pairs]
    return moved, right + [False] * (len(pairs) - 1)


def _jitter(rng: np.random.Generator) -> np.ndarray:
    corners = np.array([[0, 0], [SIDE, 0], [SIDE, SIDE], [0, SIDE]], np.float32)
    return cv2.getPerspectiveTransform(corners, corners + rng.normal(0, JITTER, (4, 2)).astype(np.float32))


def train_pair_network(
    views: Sequence[View],
    epochs: int,
    seed: int,
    device: str = "auto",
    state: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> PairNetwork:
    """Train on the views, each at most once an epoch, by binary cross-entropy; returns the network on the CPU, for inference.

    `device`: see `pick_device`. `save` is called after each epoch with what a later call takes as `state` to continue from
    there, with the same result.
    Raises ValueError for fewer than two views.
    """
    if len(views) < 2:
        raise ValueError(
            f"for {len(views)} street views, the answers include the right photo and another one, and 2 or more are needed: "
            "type candidates=NUMBER for more answers, or a larger gallery"
        )
    torch.manual_seed(seed)
    where = torch.device(pick_device(device))
    network = PairNetwork(pretrained=state is None).to(where)
    block = {id(part) for part in network.block.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"block": list(network.block.parameters()), "head": []}
    groups["head"] = [part for part in network.parameters() if part.requires_grad and id(part) not in block]
    optimizer = torch.optim.AdamW([{"params": groups[name], "lr": rate} for name, rate in RATES.items()], weight_decay=DECAY)
    batch = min(BATCH, len(views))
    steps = epochs * (len(views) // batch)
    warmup = min(WARMUP, max(1, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    )
    first = 0
    if state is not None:
        first = state["epoch"]
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    half = fastest_precision(where.type) == "bf16-mixed"
    with Progress(disable=not log.isEnabledFor(logging.INFO)) as progress:
        task = progress.add_task("training on pairs", total=steps, completed=first * (len(views) // batch))
        for epoch in range(first, epochs):
            rng = np.random.default_rng((seed, epoch))
            network.train()
            order, losses = rng.permutation(len(views)), []
            for start in range(0, len(views) - batch + 1, batch):
                drawn = [draw_pairs(views[row], views, rng) for row in order[start : start + batch]]
                inputs = [part.to(where) for part in stack_pairs([one for pairs, _ in drawn for one in pairs])]
                right = torch.tensor([one for _, marks in drawn for one in marks], dtype=torch.float32, device=where)
                with torch.autocast(where.type, torch.bfloat16, enabled=half):
                    logits = network(*inputs)
                loss = _loss(logits.float(), right)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                progress.update(task, advance=1, description=f"training on pairs, loss {np.mean(losses[-50:]):.3f}")
            if save is not None:
                held: dict[str, Any] = {"network": network, "optimizer": optimizer, "schedule": schedule}
                save({"epoch": epoch + 1} | {name: part.state_dict() for name, part in held.items()})
    return network.cpu().eval()


def _loss(logits: Tensor, right: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, right, weight=1 + (RIGHT_WEIGHT - 1) * right)
