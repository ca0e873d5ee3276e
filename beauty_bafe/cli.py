"""Shared by the commands: quick checks of the command line, and readable errors instead of Hydra's."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from .config import compose
from .extras import explain

# Groups of the other command, which a recipe in conf/experiment may set.
ELSEWHERE = {
    "train": ("pooling", "ensemble", "extraction", "index", "rerank", "query"),
    "retrieve": ("objective", "data", "augmentation", "trainer"),
    "serve": (),
    "verifier": ("objective", "data", "augmentation", "trainer"),
}


def check_overrides(conf: Path, config_name: str, arguments: Sequence[str]) -> None:
    """Exit with a list of the allowed keys if an override has an unknown one, which Hydra's own message does not give."""
    if fault := find_fault(conf, config_name, arguments):
        sys.exit(f"error: {fault}")


def find_fault(conf: Path, config_name: str, arguments: Sequence[str]) -> str | None:
    """What is wrong with these overrides; None if nothing is, or if Hydra's own message is good enough."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    words = [word for word in arguments if "=" in word and not word.startswith("-")]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
        groups = [o for o in overrides if (conf / o.key_or_group.split("@")[0]).is_dir()]
        chosen = [str(o.input_line) for o in groups if not o.is_sweep_override()]
        settings: Any = OmegaConf.to_container(compose(config_name, chosen, conf, with_hydra=True))
    except (HydraException, ValueError):
        return None  # not about keys: Hydra's own message lists the options
    swept = {o.key_or_group for o in groups if o.is_sweep_override()}
    swept |= set(settings.pop("hydra")["sweeper"].get("params") or {})  # conf/sweep, or an experiment's
    other = "retrieve" if config_name == "train" else "train"
    for override in overrides:
        key = override.key_or_group
        group, _, rest = key.partition(".")
        word = str(override.input_line)
        value = word.partition("=")[2]
        if key in ("output_dir", "index_dir") and "://" in value:
            return f"{key}={value} is a URL, but results are written to folders of this machine; type a folder, and copy it"
        if override in groups and key in ELSEWHERE.get(config_name, ()):
            hint = (
                f"; type retrieval.{key}={value} to store it in the checkpoint"
                if key in settings.get("retrieval", {}) and "[" not in value
                else ""
            )
            return f"{key} is a setting of {other}.py and has no effect here{hint}"
        if config_name in ("retrieve", "verifier") and key == "retrieval.enlarge":
            return "retrieval is a setting of train.py; here type size=PIXELS"
        if config_name in ("retrieve", "verifier") and group == "retrieval":
            return f"retrieval is a setting of train.py; here type {rest or 'pooling'}={value if rest else 'NAME'}"
        if (
            override in groups
            or override.is_add()
            or override.is_force_add()
            or override.is_delete()
            or key.startswith("hydra")
        ):
            continue
        if rest and isinstance(settings.get(group), dict) and "auto" in settings[group]:
            if not swept & {group, "experiment"}:
                return _setting_left_at_auto(conf, config_name, group, rest, word)
            continue
        parent: Any = settings
        parts = key.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(parent, dict) or part not in parent:
                allowed = [str(k) for k in parent if k != "_target_"] if isinstance(parent, dict) else []
                where = ".".join(parts[:depth]) or "the top level"
                near = difflib.get_close_matches(part, allowed, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                return f"'{key}' is not a setting: {where} has {', '.join(allowed) or 'no keys below it'}.{hint}"
            parent = parent[part]
    return None


def _setting_left_at_auto(conf: Path, config_name: str, group: str, setting: str, word: str) -> str:
    """The message about a setting of a group that is left at auto: which files of the group have this setting."""
    names = sorted(file.stem for file in (conf / group).glob("*.yaml") if file.stem != "auto")
    files = {name: compose(config_name, [f"{group}={name}"], conf)[group] for name in names}
    having = [name for name in names if OmegaConf.select(files[name], setting, default=files) is not files]
    if not having:
        keys = dict.fromkeys(key for file in files.values() for key in _keys(OmegaConf.to_container(file)))
        near = difflib.get_close_matches(setting, keys, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return f"'{group}.{setting}' is not a setting of any file in conf/{group} ({', '.join(names)}).{hint}"
    # First the file that the setting itself names, then the default of train.py.
    preferred = {*setting.split("."), OmegaConf.load(conf / "train.yaml").retrieval[group]}
    having.sort(key=lambda name: name not in preferred)
    others = f" (or {group}={', '.join(having[1:])})" if having[1:] else ""
    return f"with {group}=auto the checkpoints choose {group}; to set it, type {group}={having[0]} {word}{others}"


def _keys(settings: Any, prefix: str = "") -> list[str]:
    if not isinstance(settings, dict):
        return []
    return [found for key, value in settings.items() for found in (prefix + str(key), *_keys(value, f"{prefix}{key}."))]


class _Terminal(logging.Handler):
    """Print messages without time and level. Uses print, as progress bars redirect sys.stdout to show text above themselves."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


@contextmanager
def messages_on_terminal() -> Iterator[None]:
    """Inside `with`, print the package's log messages; a program that imports the package decides for itself."""
    logger, handler = logging.getLogger("beauty_bafe"), _Terminal()
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.disabled = False  # Hydra's job_logging=disabled disables all loggers
    logger.propagate = False  # Hydra's handler of the root logger would print every line again, with time and level
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def run(function: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Call `function` inside a Hydra job: the job's folder becomes output_dir, messages are printed, and expected errors end
    the program with one line.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import InstantiationException
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    with open_dict(cfg):
        cfg.output_dir = hydra.runtime.output_dir
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it logs every instruction set that it tries
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would look for updates over the network
    try:
        with messages_on_terminal():
            return function(cfg)
    except (ValueError, OSError, RuntimeError, ImportError, InstantiationException) as error:
        # A sweep continues with its other jobs and reports at the end; a developer wants the traceback.
        if hydra.mode == RunMode.MULTIRUN or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        text = explain(cause) if isinstance(cause, ImportError) else cause
        sys.exit(f"error: {text}\n(HYDRA_FULL_ERROR=1 shows where)")


def require_retrieval_inputs(cfg: DictConfig) -> None:
    """Raise ValueError with the missing arguments of retrieve.py, and the checkpoints that exist below this folder."""
    missing = ["gallery"] if cfg.gallery is None and cfg.index_dir is None else []
    missing += ["queries"] if OmegaConf.is_missing(cfg, "queries") else []
    networks = cfg.checkpoints or untrained_models(cfg)
    if networks and not missing:
        return
    needs = (
        [] if networks else ["checkpoints='[RUN/checkpoints/best.ckpt]' (what train.py wrote; or model=NAME, without masks)"]
    )
    needs += [f"{key}=DIR_OR_CSV (a folder of pictures, or a csv with the columns id,path)" for key in missing]
    text = "retrieve.py needs " + ", ".join(needs)
    if not networks:
        runs = sorted(Path().glob("*/**/checkpoints/best.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)
        listed = "".join(f"\n  {file}" for file in runs[:10])
        text += (
            f"; checkpoints below this folder, newest first:{listed}"
            if runs
            else "; there are no checkpoints below this folder: python train.py makes one"
        )
    raise ValueError(text)


def untrained_models(cfg: DictConfig) -> dict[str, Any]:
    """The networks with published weights: `models`, and `model` if there are no checkpoints."""
    models = dict(cfg.models)
    if cfg.get("model") is not None and not cfg.checkpoints:
        models["model"] = cfg.model
    size = {} if cfg.size is None else {"size": cfg.size}
    return {name: OmegaConf.to_container(OmegaConf.merge(model, size), resolve=True) for name, model in models.items()}
