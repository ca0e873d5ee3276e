"""The retrieval recipe in a checkpoint: names of files in conf/pooling, conf/query and conf/rerank, and a size.

Only names, which must be those of existing files, so that a checkpoint cannot choose which code to run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from .config import compose

log = logging.getLogger("beauty_bafe")

GROUPS = ("pooling", "query", "rerank")
MIN_SCALE, MAX_SCALE = 0.25, 4.0  # times the training size
OLDER = {"pooling": "attention", "query": "whole", "rerank": "none"}  # for checkpoints of versions without recipes
UNTRAINED = {**OLDER, "pooling": "rmac"}  # for networks without trained masks: best on real photographs


def check_recipe(recipe: Mapping[str, Any], conf: Path) -> None:
    """Raise ValueError if train.py's setting `retrieval` lacks a group or a valid size, or names a file that does not exist."""
    check_enlarge(recipe.get("enlarge"), "retrieval")
    for group in dict.fromkeys((*recipe, *GROUPS)):
        if group == "enlarge":
            continue
        if group not in GROUPS:
            raise ValueError(
                f"retrieval.{group}={recipe[group]}: retrieval has {', '.join(GROUPS)}, enlarge; leave {group} out"
            )
        _check_name(group, recipe.get(group), conf, "retrieval", f"retrieval.{group}")


def check_enlarge(value: object, where: str) -> float:
    """The size of description as a multiple of the training size. Raises ValueError if it is not in MIN_SCALE..MAX_SCALE."""
    if not isinstance(value, bool) and isinstance(value, int | float) and MIN_SCALE <= value <= MAX_SCALE:
        return float(value)
    raise ValueError(
        f"{where} has enlarge={str(value)[:80]}; it takes {MIN_SCALE} to {MAX_SCALE}, and size=PIXELS overrides it"
    )


def resolve_auto(cfg: DictConfig, conf: Path) -> None:
    """Replace groups of `cfg` that are auto by the files that its checkpoints name, and print their names.

    Raises ValueError if the checkpoints name different files, or one that is not in `conf`.
    """
    left = [group for group in GROUPS if group in cfg and "auto" in cfg[group]]
    for group in left:
        settings = [f"{group}.{key}" for key in cfg[group] if key != "auto"]
        if settings:
            raise ValueError(f"{settings[0]} is given, but {group} is auto; type {group}=NAME as well")
    for name, pooling in cfg.get("poolings", {}).items():
        if "auto" in pooling:
            raise ValueError(f"poolings.{name}=auto: only pooling itself can be auto; type +pooling@poolings.{name}=NAME")
    if not left:
        return
    if cfg.checkpoints:
        files = [cfg.checkpoints] if isinstance(cfg.checkpoints, str) else list(cfg.checkpoints)
        names, why = _agreed({str(file): _read_recipe(file, left, conf) for file in files}, left)
    else:
        names, why = UNTRAINED, "for networks without trained masks"
    words = [f"{group}={names[group]}" for group in left]
    chosen = compose("retrieve", words, conf)
    for group in left:
        cfg[group] = chosen[group]
    log.info(f"{why}: {' '.join(words)}")


def _read_recipe(file: str, groups: list[str], conf: Path) -> Mapping[str, str] | None:
    """The recipe of a checkpoint; None if it is of a version without recipes."""
    from .models.module import read_checkpoint

    recipe = read_checkpoint(file).get("retrieval")
    if recipe is None:
        return None
    for group in groups:
        name = recipe.get(group) if isinstance(recipe, Mapping) else recipe
        _check_name(group, name, conf, f"checkpoint '{file}'", group)
    return recipe


def _agreed(recipes: Mapping[str, Mapping[str, str] | None], groups: list[str]) -> tuple[Mapping[str, str], str]:
    """The recipe that all checkpoints agree on, and the beginning of the message about it."""
    wanted = {file: {group: (recipe or OLDER)[group] for group in groups} for file, recipe in recipes.items()}
    first = next(iter(wanted.values()))
    differ = [group for group in groups if any(names[group] != first[group] for names in wanted.values())]
    if differ:
        lines = [f"\n  {file}: {' '.join(f'{group}={names[group]}' for group in differ)}" for file, names in wanted.items()]
        raise ValueError(
            f"the checkpoints have different retrieval recipes:{''.join(lines)}\n"
            f"type the one for all of them, such as {' '.join(f'{group}={first[group]}' for group in differ)}"
        )
    carried = any(recipe is not None for recipe in recipes.values())
    noun, verb = ("checkpoint", "was") if len(recipes) == 1 else ("checkpoints", "were")
    return first, f"as the {noun} {verb} trained for" if carried else f"for {noun} without a recipe"


def _check_name(group: str, name: object, conf: Path, where: str, key: str) -> None:
    allowed = sorted(file.stem for file in (conf / group).glob("*.yaml") if file.stem != "auto")
    if name not in allowed:
        raise ValueError(
            f"{where} asks for {group}={str(name)[:80]}, but conf/{group} has {', '.join(allowed)}; "
            f"type {key}=NAME, one of these"
        )
