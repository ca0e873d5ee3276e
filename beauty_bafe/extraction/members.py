"""The members of an ensemble: a network with a pooling each."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..manifest import digest
from ..models.descriptor import Pooling
from ..models.exported import checkpoint_bytes
from ..models.extractor import BackgroundAgnosticExtractor
from ..models.module import load_extractor, read_checkpoint
from ..recipe import check_enlarge

log = logging.getLogger("beauty_bafe")


@dataclass(frozen=True)
class Member:
    """One descriptor of an ensemble. `name`: for messages. `source`: a hash of the weights.

    `trained`: whether the network was trained to predict masks.
    """

    name: str
    source: str
    extractor: BackgroundAgnosticExtractor
    pooling: Pooling
    trained: bool = True


def load_members(
    checkpoints: str | Sequence[str],
    poolings: Mapping[str, Pooling],
    models: Mapping[str, Mapping[str, Any]] | None = None,
    pairs: Mapping[Any, Sequence[str]] | None = None,
    size: int | None = None,
) -> list[Member]:
    """Every network with every pooling: trained networks from `checkpoints`, networks with published weights from `models`.

    `models`: arguments of BackgroundAgnosticExtractor, by name. `pairs`: names of the poolings of a network, by the name of
    a model or the number of a checkpoint from 0; networks not listed take all. A pooling of the picture is used only once.
    `size`: side in pixels of the trained networks' input, None for the size stored in each checkpoint.
    Raises ValueError for a file that is not a checkpoint, unknown names, or saliency without trained masks.
    """
    models = models or {}
    pairs = {str(name): names for name, names in (pairs or {}).items()}
    files = [checkpoints] if isinstance(checkpoints, str) else list(checkpoints)
    networks = {
        str(number): (file, _load_at(file, size), digest(*checkpoint_bytes(file).values())) for number, file in enumerate(files)
    }
    for name, model in models.items():
        extractor = BackgroundAgnosticExtractor(**model).eval()
        weights = (tensor.numpy().tobytes() for tensor in extractor.backbone.state_dict().values())
        networks[name] = model["name"], extractor, digest(json.dumps(dict(model), sort_keys=True), *weights)
    unknown = [name for name in pairs if name not in networks] or [
        name for names in pairs.values() for name in names if name not in poolings
    ]
    if unknown:
        raise ValueError(
            f"pairs names '{unknown[0]}'; the networks are {', '.join(networks)}, the poolings {', '.join(poolings)}"
        )
    members: list[Member] = []
    for key, (name, extractor, source) in networks.items():
        for pooling in [poolings[chosen] for chosen in pairs.get(key, poolings)]:
            if pooling.map == "picture" and any(member.pooling is pooling for member in members):
                continue
            if pooling.saliency and key in models:
                raise ValueError(
                    f"pooling '{pooling}' needs masks, but {name} was not trained to predict any; "
                    "type checkpoints='[RUN/checkpoints/best.ckpt]' instead, or a pooling without masks, such as pooling=gem"
                )
            members.append(Member(f"{name}: {pooling}", source, extractor, pooling, key not in models))
    return members


def _load_at(file: str, size: int | None) -> BackgroundAgnosticExtractor:
    """A checkpoint's network at `size`, or at the size set by its recipe."""
    extractor = load_extractor(file)
    recipe = read_checkpoint(file).get("retrieval")
    times = check_enlarge(recipe.get("enlarge", 1), f"checkpoint '{file}'") if isinstance(recipe, Mapping) else 1
    own = extractor.size
    if size is not None and size < 1:
        raise ValueError(f"size={size}: type a number of pixels, or null for the size set by the checkpoint")
    patch = extractor.backbone.patch or 1
    patch = patch if own % patch == 0 else 1
    extractor.size = size or max(1, round(own * times / patch)) * patch
    if extractor.size != own:
        log.info(f"'{file}': pictures are described at {extractor.size} px (trained at {own} px)")
    try:
        if extractor.size != own:
            extractor(torch.zeros(1, 3, extractor.size, extractor.size, dtype=torch.uint8))
    except (AssertionError, RuntimeError) as error:  # timm's transformers assert their size
        raise ValueError(
            f"'{file}' does not accept pictures of {extractor.size} px ({error}); type size={own}, the size of training"
        ) from error
    return extractor


def describe_members(members: Sequence[Member]) -> list[Mapping[str, Any]]:
    """Checkpoint, size and pooling of each member, plain values: queries must be described by the same ones."""
    return [{"checkpoint": member.source, "size": member.extractor.size, "pooling": str(member.pooling)} for member in members]
