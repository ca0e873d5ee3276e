"""Catalogues: product ids and the locations of their pictures."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .pictures import SUFFIXES, Picture, read_picture
from .places import Place, is_url, list_files, locate, size_of, stamp
from .shards import INDEX, read_shards

ID_COLUMNS = ("id", "image id", "image_id", "product")
PATH_COLUMNS = ("path", "file", "filename")


@dataclass(frozen=True)
class Catalog:
    """Picture i has the id `ids[i]` and the location `paths[i]`. Raises ValueError if ids are not unique."""

    ids: tuple[str, ...]
    paths: tuple[Place, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.paths):
            raise ValueError(f"{len(self.ids)} ids but {len(self.paths)} paths")
        seen: dict[str, Place] = {}
        for name, path in zip(self.ids, self.paths, strict=True):
            if name in seen:
                raise ValueError(
                    f"two pictures have the id '{name}': {seen[name]} and {path}; rename one "
                    "(an id is the file's name without its last suffix)"
                )
            seen[name] = path

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Identifies the pictures independently of their location: their number, and a digest of their ids and file sizes."""
        listed = "\n".join(f"{name} {size_of(path)}" for name, path in zip(self.ids, self.paths, strict=True))
        return f"{len(self)} pictures ({hashlib.sha256(listed.encode()).hexdigest()[:16]})"

    @property
    def files(self) -> Catalog:
        """This catalogue, as all of its pictures are files."""
        return self

    def read(self, row: int, longest: int | None = None) -> Picture:
        """Decode picture `row`, see `read_picture`. Raises UnreadablePicture."""
        return read_picture(self.paths[row], longest)

    def subset(self, indices: Iterable[int]) -> Catalog:
        chosen = list(indices)
        return Catalog(tuple(self.ids[i] for i in chosen), tuple(self.paths[i] for i in chosen))


def open_catalog(source: str | Path) -> Catalog:
    """Open a folder of pictures (searched recursively) or shards, a csv of ids and paths, or the fsspec URL of one of these.

    Raises ValueError or OSError, saying what was found instead.
    """
    if is_url(source):
        url = source.rstrip("/")
        if url.lower().endswith(".csv"):
            return from_csv(url)
        return from_url(url) if stamp(locate(INDEX, url)) == "missing" else from_shards(url)
    path = Path(source).expanduser()  # shells do not expand key=~/folder
    if path.is_dir():
        return from_shards(path) if (path / INDEX).is_file() else from_folder(path)
    if path.is_file() and path.suffix.lower() == ".csv":
        return from_csv(path)
    found = "is neither a folder nor a .csv file" if path.exists() else "does not exist"
    raise ValueError(f"'{source}' {found}; name a folder of pictures or a csv with the columns id,path")


def from_url(url: str) -> Catalog:
    """Like `from_folder`, for a bucket or a folder in it; the listing also gives sizes and stamps."""
    found = [
        place
        for parts, place in list_files(url)
        if Path(place.name).suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in parts)
    ]
    if not found:
        raise ValueError(f"no pictures under '{url}'; supported suffixes: {', '.join(sorted(SUFFIXES))}")
    return Catalog(tuple(Path(place.name).stem for place in found), tuple(found))


def from_folder(root: str | Path) -> Catalog:
    """Every picture under `root`, sorted by path; the id is the file's stem (`a.b.jpg` is `a.b`)."""
    paths = _pictures_below(Path(root))
    if not paths:
        raise ValueError(f"no pictures under '{root}'; supported suffixes: {', '.join(sorted(SUFFIXES))}")
    return Catalog(tuple(path.stem for path in paths), tuple(paths))


def from_csv(file: str | Path) -> Catalog:
    """Rows of id and path or URL under a header such as `id,path`; paths are relative to the csv's folder."""
    folder = file.rpartition("/")[0] if is_url(file) else Path(file).parent
    header, rows = _read_rows(file)
    id_column, path_column = _column(file, header, ID_COLUMNS), _column(file, header, PATH_COLUMNS)
    ids = tuple(row[id_column].strip() for row in rows)
    return Catalog(ids, tuple(locate(row[path_column].strip(), folder) for row in rows))


def from_shards(folder: str | Path) -> Catalog:
    """The pictures that `make_shards` wrote, in the order of its catalogue. Raises like `read_shards`."""
    ids, places = read_shards(folder if is_url(folder) else Path(folder).expanduser())
    return Catalog(tuple(ids), tuple(places))


def from_perfect500k(root: str | Path, titles: str | Path) -> Catalog:
    """The challenge's layout: a csv of (image id, title), pictures in one flat folder (2019/20) or in subfolders (2018).

    Ids without a file stay in the catalogue, so that reading them reports them as missing.
    """
    header, rows = _read_rows(titles)
    names = [header[0].strip()] if header and header[0].strip().lower() not in ID_COLUMNS else []
    names += [row[0].strip() for row in rows]
    where = {path.stem: path for path in _pictures_below(Path(root))}
    # Perfect-500K names some rows with the suffix, some without.
    ids = [name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name for name in names]
    if not any(name in where for name in ids):
        raise ValueError(f"none of the {len(ids)} ids of '{titles}' is a picture under '{root}'; such as '{ids[0]}'")
    return Catalog(tuple(ids), tuple(where.get(name, Path(root) / f"{name}.jpg") for name in ids))


class Skipped:
    """Skipped pictures as (id, path, reason); `unreadable`: those that cannot be read."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []
        self.unreadable: list[tuple[str, str, str]] = []

    def add(self, catalog: Catalog, index: int, reason: str, unreadable: bool = True) -> None:
        self.rows.append((catalog.ids[index], str(catalog.paths[index]), reason))
        self.unreadable += self.rows[-1:] if unreadable else []

    def write(self, file: Path) -> None:
        """Write `id,path,reason`; if nothing was skipped, an earlier run's file is removed."""
        if not self.rows:
            file.unlink(missing_ok=True)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("id", "path", "reason"), *self.rows])

    def check(self, total: int, max_share: float, what: str, setting: str) -> None:
        """Raise ValueError if all of `total` pictures, or more than the share `max_share` (0..1), are unreadable."""
        if total and len(self.unreadable) == total:
            _, path, reason = self.unreadable[0]
            raise ValueError(f"none of the {total} {what} can be read; the first: {path}: {reason}")
        if len(self.unreadable) > max_share * total:
            _, path, reason = self.unreadable[0]
            raise ValueError(
                f"{len(self.unreadable)} of {total} {what} cannot be read, more than {setting}={max_share} allows; "
                f"the first: {path}: {reason}; see skipped.csv, fix the files or raise {setting}"
            )


def _pictures_below(root: Path) -> list[Path]:
    def stop(error: OSError) -> None:
        raise type(error)(error.errno, f"cannot read the folder '{error.filename}': {error.strerror}; check its permissions")

    if not root.is_dir():
        raise ValueError(f"'{root}' is not a folder; name a folder of pictures")
    found: list[Path] = []
    for folder, below, names in os.walk(root, onerror=stop, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [
            Path(folder, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def _read_rows(file: str | Path) -> tuple[list[str], list[list[str]]]:
    text = locate(str(file), "").read_bytes().decode("utf-8-sig")
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(cell.strip() for cell in row)]
    if len(rows) < 2:
        raise ValueError(f"'{file}' has no rows below its header")
    return rows[0], rows[1:]


def _column(file: str | Path, header: Sequence[str], names: Sequence[str]) -> int:
    cells = [cell.strip().lower() for cell in header]
    for name in names:
        if name in cells:
            return cells.index(name)
    raise ValueError(f"'{file}' has the columns {','.join(header)}; one of them must be called {' or '.join(names)}")
