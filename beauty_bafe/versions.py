"""A folder whose content is replaced atomically: numbered versions, and the file `current` that names the valid one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .manifest import replace_file

Result = TypeVar("Result")


class Versions:
    """The versions in `folder`. Readers need no lock; a writer must hold `manifest.locked`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def current(self) -> Path | None:
        """The folder of the valid version; None if nothing has been written yet."""
        file = self.folder / "current"
        return self.folder / file.read_text(encoding="utf-8") if file.is_file() else None

    def read(self, read: Callable[[Path], Result]) -> Result:
        """Return `read(folder)` for the valid version. Raises ValueError if there is none."""
        while True:
            version = self.current()
            if version is None:
                raise ValueError(f"'{self.folder}' holds nothing yet")
            try:
                return read(version)
            except Exception:
                if self.current() == version:  # otherwise a writer has removed it meanwhile
                    raise

    def write(self, write: Callable[[Path], object]) -> None:
        """Let `write` fill a new version, make it the valid one and remove the others."""
        last = self.current()
        new = self.folder / f"{int(last.name) + 1 if last is not None else 1:06d}"
        shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
        new.mkdir(parents=True)
        write(new)
        replace_file(self.folder / "current", lambda part: part.write_text(new.name, encoding="utf-8"))
        for other in self.folder.iterdir():
            if other.name.isdigit() and other != new:
                shutil.rmtree(other, ignore_errors=True)  # Windows keeps mapped files; the next writer tries again
