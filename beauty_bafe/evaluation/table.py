"""Retrieval runs side by side: python -m beauty_bafe.evaluation.table RUN RUN ..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def read_run(folder: str | Path) -> dict[str, Any]:
    """What a retrieval run's folder says of it. Raises ValueError where it holds no metrics."""
    file = Path(folder) / "metrics.json"
    if not file.is_file():
        raise ValueError(f"'{folder}' has no metrics.json; name folders that retrieve.py wrote with truth=...")
    return json.loads(file.read_text())


def show(folders: list[str]) -> None:
    """Print a row a run: mAP@k (AP divided by min(R, k)) with its 95 % interval, recall@1, mask IoU where masks were given."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("run", "mAP@k", "95 % interval", "recall@1", "mask IoU"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for folder in folders:
        metrics = read_run(folder)
        name = next(key for key in metrics if key.endswith("_by_min"))
        low, high = metrics[f"{name}_interval"]
        iou = f"{metrics['mask_iou']:.3f}" if "mask_iou" in metrics else "–"
        table.add_row(Path(folder).name, f"{metrics[name]:.3f}", f"{low:.3f} – {high:.3f}", f"{metrics['recall@1']:.3f}", iou)
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {__doc__}")
    try:
        show(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
