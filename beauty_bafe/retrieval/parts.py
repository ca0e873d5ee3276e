"""The parts of a retrieval, built from the settings of conf/retrieve.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from .. import cli
from ..data.rehearsal import Rehearsal
from ..models.views import View
from .ensemble import Concatenation, Fusion
from .features import FeatureExtraction, Member, load_members
from .index import Index
from .rerank import Reranker


@dataclass(frozen=True)
class Parts:
    """`steps`: the re-ranking, in order. `view`: how queries are described. `about`: the settings that steps learn under."""

    members: list[Member]
    extraction: FeatureExtraction
    ensemble: Concatenation | Fusion
    view: View | None
    index: Index
    steps: list[Reranker]
    rehearsal: Rehearsal
    about: str


def build_parts(cfg: DictConfig) -> Parts:
    """Load the networks of `cfg`, none of its groups left at auto, and build what it names. Raises ValueError."""
    steps = [instantiate(step) for step in cfg.rerank.values()]
    poolings = {"pooling": instantiate(cfg.pooling)} | {name: instantiate(part) for name, part in cfg.poolings.items()}
    members = load_members(cfg.checkpoints, poolings, cli.untrained_models(cfg), cfg.pairs, cfg.size)
    view, extraction = instantiate(cfg.query.view), instantiate(cfg.extraction)
    about = OmegaConf.to_yaml(OmegaConf.create({key: cfg[key] for key in ("rerank", "rehearsal", "query")}), resolve=True)
    ensemble, index, rehearsal = instantiate(cfg.ensemble), instantiate(cfg.index), instantiate(cfg.rehearsal)
    return Parts(members, extraction, ensemble, view, index, steps, rehearsal, about)
