"""The folder conf, in a checkout or an installed package, and composing its settings in Python."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

_INSTALLED = Path(__file__).parent / "conf"  # of an installed package
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "conf"
_composing = threading.Lock()  # Hydra composes through a global object


def compose(name: str, words: Sequence[str], conf: Path = CONF, with_hydra: bool = False) -> DictConfig:
    """Compose conf/NAME.yaml with overrides as on the command line, also inside a running Hydra application.

    `with_hydra`: include Hydra's own settings. Raises ValueError with Hydra's message if it cannot be composed.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    with _composing:
        running = GlobalHydra.instance()
        application, running.hydra = running.hydra, None
        try:
            with hydra.initialize_config_dir(str(conf.resolve()), version_base="1.3"):
                return hydra.compose(name, list(words), return_hydra_config=with_hydra)
        except HydraException as error:
            raise ValueError(str(error)) from error
        finally:
            GlobalHydra.instance().hydra = application


def check_targets(settings: Any, where: str) -> None:
    """Raise ValueError if plain settings have a `_target_` that no file of conf has."""
    known = {found for file in CONF.rglob("*.yaml") for found in re.findall(r"_target_: *([\w.]+)", file.read_text("utf-8"))}
    unknown = sorted(_targets(settings) - known)
    if unknown:
        raise ValueError(f"{where} names the code '{unknown[0]}', which no file in conf names; it was not made by this project")


def _targets(settings: Any) -> set[str]:
    if isinstance(settings, dict):
        own = {str(settings["_target_"])} if "_target_" in settings else set()
        return own.union(*(_targets(value) for value in settings.values()))
    return set().union(*(_targets(value) for value in settings)) if isinstance(settings, list) else set()
