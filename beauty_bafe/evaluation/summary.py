"""A table of the jobs of a sweep."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf


class SweepSummary(Callback):
    """Updates RUN/summary.csv after each job of a multirun, also of one that is stopped later, and prints it at the end."""

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        if config.hydra.mode.name == "MULTIRUN":
            write_summary(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        folder = Path(config.hydra.sweep.dir)
        rows = write_summary(folder)
        # The csv has all columns; the table shows those that differ between jobs.
        columns = [c for c in rows[0] if len(rows) == 1 or len({row[c] for row in rows}) > 1] if rows else []
        table = Table()
        for column in columns:
            table.add_column(escape(column), overflow="fold")
        for row in rows:
            table.add_row(*(f"{row[c]:.4f}" if isinstance(row[c], float) else escape(str(row[c])) for c in columns))
        console = Console()
        (console if console.is_terminal else Console(width=200)).print(table)  # a log has no fixed width
        print(folder / "summary.csv")


def write_summary(folder: Path) -> list[dict[str, Any]]:
    """Write one row per job: number, overrides, and the scalars of its metrics.json ("failed" if it has none)."""
    rows: list[dict[str, Any]] = []
    jobs = [path for path in folder.iterdir() if path.name.isdigit() and (path / ".hydra").is_dir()]
    for job in sorted(jobs, key=lambda path: int(path.name)):
        row: dict[str, Any] = {"job": job.name}
        for override in OmegaConf.load(job / ".hydra" / "overrides.yaml"):
            key, _, value = str(override).partition("=")
            if key != "output_dir":
                row[key] = value
        file = job / "metrics.json"
        metrics = json.loads(file.read_text()) if file.is_file() else {"status": "failed"}
        rows.append(row | {k: v for k, v in metrics.items() if isinstance(v, int | float | str)})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    rows = [{column: row.get(column, "") for column in columns} for row in rows]
    with (folder / "summary.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    return rows
