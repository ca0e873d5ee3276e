"""The parts of a retrieval, built from the settings of conf/retrieve.yaml."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from .. import cli
from ..data.rehearsal import Rehearsal
from ..extraction.local import FeatureExtraction
from ..extraction.members import Member, load_members
from ..extras import explain
from ..index.base import Index
from ..models.views import View
from ..rerank.candidates import Reranker
from ..rerank.evidence import EvidenceReranker
from ..rerank.small_copies import SmallCopies
from .ensemble import Concatenation, Fusion

log = logging.getLogger("beauty_bafe")


@dataclass(frozen=True)
class Parts:
    """`steps`: re-rankers, in order. `view`: how queries are described. `about`: the settings that learning depends on."""

    members: list[Member]
    extraction: FeatureExtraction
    ensemble: Concatenation | Fusion
    view: View | None
    index: Index
    steps: list[Reranker]
    rehearsal: Rehearsal
    about: str


def build_parts(cfg: DictConfig) -> Parts:
    """Load the networks and build the parts that `cfg` names; none of its groups may be auto. Raises ValueError for settings
    that do not fit.
    """
    steps = build_steps(cfg.rerank)
    poolings = {"pooling": instantiate(cfg.pooling)} | {name: instantiate(part) for name, part in cfg.poolings.items()}
    members = load_members(cfg.checkpoints, poolings, cli.untrained_models(cfg), cfg.pairs, cfg.size)
    view, extraction = instantiate(cfg.query.view), instantiate(cfg.extraction)
    settings = {key: cfg[key] for key in ("ensemble", "rerank", "rehearsal", "query")} | {
        "steps": list(steps),
        "view": str(view),
    }
    # What probabilities are computed from; and a network may be trained again to the same file.
    evidence = {name: step for name, step in steps.items() if isinstance(step, EvidenceReranker)}
    settings |= {f"{name} evidence": [*step.absolute, *step.pairwise] for name, step in evidence.items()}
    sources = {name: getattr(step, "source", None) for name, step in steps.items()}
    settings |= {name: source for name, source in sources.items() if source is not None}
    about = OmegaConf.to_yaml(OmegaConf.create(settings), resolve=True)
    ensemble, index, rehearsal = instantiate(cfg.ensemble), instantiate(cfg.index), instantiate(cfg.rehearsal)
    return Parts(members, extraction, ensemble, view, index, list(steps.values()), rehearsal, about)


def build_steps(rerank: DictConfig) -> dict[str, Reranker]:
    """The re-rankers of conf/rerank by name, in order; one that is `optional` is left out if its package is missing.

    Raises ValueError if small_copies is not the first.
    """
    steps = {}
    for name, settings in rerank.items():
        kept = {key: value for key, value in settings.items() if key != "optional"}
        try:
            steps[str(name)] = instantiate(kept)
        except InstantiationException as error:
            if not (settings.get("optional") and isinstance(error.__cause__, ImportError)):
                raise
            log.warning(f"{name!s} is left out: {explain(error.__cause__)}")
    if any(isinstance(step, SmallCopies) for step in list(steps.values())[1:]):
        raise ValueError(f"rerank={','.join(steps)}: small_copies must be the first step; type its name first")
    return steps
