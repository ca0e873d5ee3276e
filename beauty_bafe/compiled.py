"""How loops are compiled (Numba). The import takes a second, so functions that need compiled loops import them themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

# Sums may be reordered and fused, which every bound of the exact search allows for. NaN and infinities keep their meaning: a
# comparison with them must not rule out a row. Loops run over slices, as an index that could be negative keeps them from
# being vectorised. Numba's cache does not notice a change of these flags: change the files with the loops as well.
FAST = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop that releases the GIL; callers split the work among threads."""
    try:
        return njit(nogil=True, fastmath=FAST, cache=True)(function)
    except RuntimeError:  # no folder that Numba could write to: compiled again in every process
        return njit(nogil=True, fastmath=FAST)(function)
