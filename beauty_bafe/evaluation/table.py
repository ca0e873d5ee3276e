"""Compare retrieval runs in a table, printed and written as csv, markdown and html, and plot accuracy against time.

python -m beauty_bafe.evaluation.table RUN RUN ... [--against RUN] [--output TABLE]
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .metrics import DIVISIONS, interval

COLUMNS = {
    "run": "run",
    "min": "mAP@{k}",
    "interval": "95 % interval",
    "hits": "/ hits",
    "matches": "/ matches",
    "recall": "recall@1",
    "difference": "to {against}",
    "iou": "mask IoU",
    "dimensions": "dim",
    "ms": "ms/query",
    "size": "index MB",
}
SUFFIXES = (".csv", ".md", ".html", ".png")
NOTE = (
    "mAP with AP divided by min(matches, k); / hits and / matches: by the matches found, by all matches. "
    "ms/query: search and re-ranking. *: the 95 % interval of the paired difference excludes 0."
)


def read_run(folder: str | Path) -> dict[str, Any]:
    """The metrics of a retrieval run, and as "ap" the AP (by min) of each query id.

    Raises ValueError if the folder holds no metrics.
    """
    files = Path(folder) / "metrics.json", Path(folder) / "per_query.csv"
    if not all(file.is_file() for file in files):
        raise ValueError(f"'{folder}' has no {files[0].name} and {files[1].name}; name runs of retrieve.py with truth=...")
    with files[1].open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    column = next(name for name in rows[0] if name.endswith("_by_min"))
    return json.loads(files[0].read_text()) | {"ap": {row["query"]: float(row[column]) for row in rows}}


def difference(run: dict[str, Any], against: dict[str, Any]) -> tuple[float, float, float]:
    """Mean difference in AP over the queries, and its 95 % interval by a paired bootstrap (2,000 samples, seed 0).

    Raises ValueError if the runs have different queries.
    """
    if run["ap"].keys() != against["ap"].keys():
        raise ValueError("runs with different queries cannot be compared; leave out --against, or use one truth file")
    change = np.array([value - against["ap"][query] for query, value in run["ap"].items()])
    return float(change.mean()), *interval(change)


def make_table(folders: Sequence[str], against: str | None) -> list[dict[str, str]]:
    """One row per run with the columns of COLUMNS, as text, after a row of headings. A sweep's folder counts as its jobs."""
    named = _named_runs(folders)
    folders, names = list(named), list(named.values())
    chosen = None if against is None else read_run(against)
    rows = []
    k = ""
    for folder, name in zip(folders, names, strict=True):
        run = read_run(folder)
        key = next(key for key in run if key.endswith("_by_min"))
        k = key.removeprefix("mAP@").removesuffix("_by_min")
        low, high = run[f"{key}_interval"]
        values = {division: f"{run[f'mAP@{k}_by_{division}']:.3f}" for division in DIVISIONS}
        row = values | {"run": name, "interval": f"{low:.3f} – {high:.3f}", "recall": f"{run['recall@1']:.3f}"}
        if chosen is not None:
            mean, low, high = difference(run, chosen)
            row["difference"] = "" if Path(folder) == Path(str(against)) else f"{mean:+.3f}{'' if low <= 0 <= high else ' *'}"
        row["iou"] = f"{run['mask_iou']:.3f}" if "mask_iou" in run else ""
        if "index_bytes" in run:  # older runs lack it
            row |= {"dimensions": str(run["dimensions"]), "ms": f"{run['ms_per_query']:.2f}"}
            row["size"] = f"{run['index_bytes'] / 1e6:.1f}"
        rows.append(row)
    label = names[folders.index(against)] if against in folders else Path(str(against)).name
    columns = [column for column in COLUMNS if any(row.get(column) for row in rows)]
    heading = {column: COLUMNS[column].format(k=k, against=label) for column in columns}
    return [heading, *({column: row.get(column, "") for column in columns} for row in rows)]


def _named_runs(folders: Sequence[str]) -> dict[str, str]:
    """Folder of each run -> a short name: for jobs of a sweep with the overrides in which they differ."""
    named: dict[str, str] = {}
    for folder, name in zip(folders, _short_names(folders), strict=True):
        jobs = sorted(Path(folder).glob("*/.hydra/overrides.yaml"), key=lambda file: (len(file.parts[-3]), file.parts[-3]))
        overrides = [yaml.safe_load(file.read_text()) for file in jobs]
        common = set.intersection(*map(set, overrides)) if len(overrides) > 1 else set()
        for file, own in zip(jobs, overrides, strict=True):
            named[str(file.parents[1])] = " ".join([name, *(word for word in own if word not in common)])
        if not jobs:
            named[folder] = name
    return named


def _short_names(folders: Sequence[str]) -> list[str]:
    """The folders' names, with as many parents as needed to make them unique."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def as_markdown(rows: Sequence[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(row.values()) + " |" for row in rows]
    return "\n".join([lines[0], "| --- " + "| ---: " * (len(rows[0]) - 1) + "|", *lines[1:], "", NOTE, ""])


def as_html(rows: Sequence[dict[str, str]]) -> str:
    """A self-contained page."""
    from jinja2 import Environment, FileSystemLoader

    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("table.html.j2")
    return page.render(rows=[list(row.values()) for row in rows], note=NOTE)


def draw_plot(rows: Sequence[dict[str, str]], file: Path) -> None:
    """Plot mAP with its interval against the milliseconds of search and re-ranking per query."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows[1:]:
        time, accuracy = max(float(row["ms"]), 0.1), float(row["min"])
        low, high = (abs(accuracy - float(end)) for end in row["interval"].split(" – "))
        (line, *_) = axes.errorbar(time, accuracy, [[low], [high]], fmt="o", capsize=3)
        axes.annotate(row["run"], (time, accuracy), (7, 4), textcoords="offset points", fontsize=9, color=line.get_color())
    axes.set(xscale="log", xlabel="ms per query: search and re-ranking", ylabel=f"{rows[0]['min']}, 95 % interval")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.3)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)


def write_table(rows: Sequence[dict[str, str]], stem: Path) -> list[Path]:
    """Write `stem`.csv, .md and .html, and `stem`.png if all runs have times; returns the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if stem.suffix in SUFFIXES:
        stem = stem.with_suffix("")
    table, markdown, page, plot = (stem.with_name(stem.name + suffix) for suffix in SUFFIXES)
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(row.values() for row in rows)
    markdown.write_text(as_markdown(rows), encoding="utf-8")
    page.write_text(as_html(rows), encoding="utf-8")
    if not all(row.get("ms") for row in rows):
        return [table, markdown, page]
    draw_plot(rows, plot)
    return [table, markdown, page, plot]


def show(rows: Sequence[dict[str, str]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column, heading in rows[0].items():
        table.add_column(heading, justify="left" if column == "run" else "right")
    for row in rows[1:]:
        table.add_row(*row.values())
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)  # a log has no fixed width


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m beauty_bafe.evaluation.table", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="folders that retrieve.py wrote with truth=...")
    parser.add_argument("--against", help="the run that the others are compared with, which must have the same queries")
    parser.add_argument("--output", type=Path, help="where to write: OUTPUT.csv, OUTPUT.md, OUTPUT.html, OUTPUT.png")
    given = parser.parse_args(arguments)
    try:
        rows = make_table(given.runs, given.against)
    except ValueError as error:
        sys.exit(f"error: {error}")
    show(rows)
    if given.output is not None:
        print(", ".join(map(str, write_table(rows, given.output))))


if __name__ == "__main__":
    main()
