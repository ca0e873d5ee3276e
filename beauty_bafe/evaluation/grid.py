"""The table of the hybrid paper with our results beside its own: network and distance by pooling, without -> with SIFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from .summary import write_summary

POOLINGS = {"mac": "MAC", "rmac": "R-MAC", "ramac": "RA-MAC", "spoc": "SPoC"}
DISTANCES = {"l1": "L1", "l2": "L2", "ip": "cos"}
# mAP@7 by all matches, without and with SIFT; Perfect-500K, 100 queries (Tang, Huang, Fuh, table of results).
PAPER: dict[tuple[str, str], Sequence[tuple[float, float]]] = {
    ("VGG", "L1"): [(0.2260, 0.2517), (0.1917, 0.2317), (0.2040, 0.2600), (0.1745, 0.2387)],
    ("VGG", "L2"): [(0.2229, 0.2737), (0.1882, 0.2478), (0.2187, 0.2875), (0.1783, 0.2208)],
    ("VGG", "cos"): [(0.2229, 0.2701), (0.1882, 0.2415), (0.2187, 0.2878), (0.1783, 0.2162)],
    ("ResNet", "L1"): [(0.2834, 0.3762), (0.2624, 0.3433), (0.2938, 0.3700), (0.2517, 0.2942)],
    ("ResNet", "L2"): [(0.2822, 0.3545), (0.2774, 0.3392), (0.2961, 0.3631), (0.2327, 0.2573)],
    ("ResNet", "cos"): [(0.2822, 0.3603), (0.2774, 0.3392), (0.2961, 0.3685), (0.2327, 0.2637)],
    ("ResNeXt", "L1"): [(0.3059, 0.3675), (0.2709, 0.3515), (0.2827, 0.3423), (0.2552, 0.3128)],
    ("ResNeXt", "L2"): [(0.3046, 0.3658), (0.2648, 0.3550), (0.2750, 0.3517), (0.2210, 0.2945)],
    ("ResNeXt", "cos"): [(0.3046, 0.3725), (0.2648, 0.3600), (0.2750, 0.3517), (0.2210, 0.2942)],
    ("SENet", "L1"): [(0.2786, 0.3488), (0.2853, 0.3301), (0.2809, 0.3623), (0.2629, 0.3304)],
    ("SENet", "L2"): [(0.2923, 0.3728), (0.2964, 0.3401), (0.3329, 0.3653), (0.2674, 0.3010)],
    ("SENet", "cos"): [(0.2923, 0.3787), (0.2964, 0.3406), (0.3329, 0.3703), (0.2674, 0.3001)],
}
FAMILIES = {"vgg": "VGG", "seresn": "SENet", "resnext": "ResNeXt", "resnet": "ResNet"}  # by the beginning of a model's name


class HybridGrid(Callback):
    """Prints and writes SWEEP/grid.md at the end of `experiment=hybrid_grid`."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        text = as_grid(write_summary(folder))
        (folder / "grid.md").write_text(text, encoding="utf-8")
        print(text)
        print(folder / "grid.md")


def as_grid(rows: Sequence[Mapping[str, Any]]) -> str:
    """The paper's table in markdown, from the summary of a sweep (model, pooling, index.metric, rerank, mAP@k_by_matches).

    Our value comes first, then in brackets that of the paper, if it has the network; "–": a job without a result.
    """
    ours: dict[tuple[str, str, str, str], float] = {}
    for row in rows:
        value = next((row[key] for key in row if key.endswith("_by_matches")), "")
        if isinstance(value, float):
            ours[row["model"], row["index.metric"], row["pooling"], row["rerank"]] = value
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = ["| network | distance | " + " | ".join(POOLINGS.values()) + " |", "| --- " * (2 + len(POOLINGS)) + "|"]
    for model in models:
        family = next((FAMILIES[start] for start in FAMILIES if model.startswith(start)), "")
        for metric, distance in DISTANCES.items():
            cells = []
            for number, pooling in enumerate(POOLINGS):
                pair = [ours.get((model, metric, pooling, rerank)) for rerank in ("none", "sift")]
                cell = " → ".join("–" if value is None else f"{value:.3f}" for value in pair)
                published = PAPER.get((family, distance))
                cells.append(cell + (" ({:.3f} → {:.3f})".format(*published[number]) if published else ""))
            lines.append(f"| {model} | {distance} | " + " | ".join(cells) + " |")
    note = "mAP@k by all matches, without → with SIFT; in brackets the paper's, on Perfect-500K with 100 queries."
    return "\n".join([*lines, "", note, ""])
