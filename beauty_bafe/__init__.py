"""Background-agnostic product retrieval, learned only from catalogue photos.

>>> from beauty_bafe import Retriever                                            # doctest: +SKIP
>>> shop = Retriever.build("RUN/checkpoints/best.ckpt", gallery="GALLERY")       # doctest: +SKIP
>>> hits = shop.search(["photo.jpg"], k=7)                                       # doctest: +SKIP

Messages go to the logger "beauty_bafe" at level INFO; show them with `logging.basicConfig(level="INFO")`.

If other programs share the cores, set the environment variable GOMP_SPINCOUNT=1000 before torch is imported, as the commands
do: otherwise OpenMP threads spin while they wait, on cores that the other programs need.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .retriever import Hit as Hit
    from .retriever import Retriever as Retriever

__version__ = "0.1.0"
__all__ = ["Hit", "Retriever"]
logging.getLogger("beauty_bafe").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    # Imported at first use, as importing torch takes seconds.
    if name in __all__:
        from . import retriever

        return getattr(retriever, name)
    raise AttributeError(f"module 'beauty_bafe' has no attribute '{name}'; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
