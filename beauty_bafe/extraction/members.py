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
    """One descriptor of an ensemble: a network and a pooling. `name` tells which; `source` hashes the weights.

    `trained`: whether the network has learned to make masks.
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
    """Each network with each pooling: trained ones from `checkpoints`, others with their published weights from `models`.

    `models`: plain arguments of BackgroundAgnosticExtractor by name. `pairs`: the poolings, by name, of a network (a model's
    name, a checkpoint's number from 0); one that is not named takes all. A pooling of the picture itself is made once.
    `size`: pixels of the square that trained networks look at, None for what each checkpoint asks for.
    Raises ValueError for a file that is not a checkpoint, unknown names, or saliency asked of a network that learned none.
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
                    f"pooling '{pooling}' needs masks, and {name} was never trained to make any; "
                    "type checkpoints='[RUN/checkpoints/best.ckpt]' instead, or a pooling without masks, such as pooling=gem"
                )
            members.append(Member(f"{name}: {pooling}", source, extractor, pooling, key not in models))
    return members


def _load_at(file: str, size: int | None) -> BackgroundAgnosticExtractor:
    """A checkpoint's network at `size`, or at the size that the checkpoint was made to be described at."""
    extractor = load_extractor(file)
    recipe = read_checkpoint(file).get("retrieval")
    times = check_enlarge(recipe.get("enlarge", 1), f"checkpoint '{file}'") if isinstance(recipe, Mapping) else 1
    own = extractor.size
    if size is not None and size < 1:
        raise ValueError(f"size={size}: type pixels, or null for what the checkpoint asks for")
    patch = extractor.backbone.patch or 1
    patch = patch if own % patch == 0 else 1
    extractor.size = size or max(1, round(own * times / patch)) * patch
    if extractor.size != own:
        log.info(f"'{file}' describes at {extractor.size} px, trained at {own} px")
    try:
        if extractor.size != own:
            extractor(torch.zeros(1, 3, extractor.size, extractor.size, dtype=torch.uint8))
    except (AssertionError, RuntimeError) as error:  # timm's transformers assert their size
        raise ValueError(
            f"'{file}' cannot look at {extractor.size} px ({error}); type size={own}, as it was trained"
        ) from error
    return extractor


def describe_members(members: Sequence[Member]) -> list[Mapping[str, Any]]:
    """What an index made from these members must share with its queries: checkpoint, size and pooling, plain values."""
    return [{"checkpoint": member.source, "size": member.extractor.size, "pooling": str(member.pooling)} for member in members]
