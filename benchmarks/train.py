"""Images per second of training, ours beside a plain eager float32 loop over the files doing the same work, in one run.

python benchmarks/train.py --photos GALLERY --backgrounds PHOTOS --objectives saliency joint --plot train.png
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.utils.data import DataLoader

from beauty_bafe.models.precision import fastest_precision, pick_device
from beauty_bafe.process import SPINS, keep_memory

CONF = (Path(__file__).parents[1] / "conf").resolve()
WARM_UP = 3  # batches


def rate(batches: Iterable[dict[str, torch.Tensor]], count: int) -> float:
    """Images per second of drawing `count` batches after a few that warm up."""
    times, seen = [], 0
    for number, batch in enumerate(batches):
        times.append(time.perf_counter())
        seen += batch["pictures"].shape[:2].numel() if number > WARM_UP else 0
        if len(times) == WARM_UP + count + 1:
            break
    return seen / (times[-1] - times[WARM_UP])


class Clock(pl.Callback):
    """Images per second of the steps after the first few."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.seen = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen += batch["pictures"].shape[:2].numel() if len(self.times) > WARM_UP else 0
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        self.times.append(time.perf_counter())

    @property
    def rate(self) -> float:
        return self.seen / (self.times[-1] - self.times[WARM_UP])


def ours(module: pl.LightningModule, batches: Iterable[Any], count: int) -> float:
    """As train.py does it."""
    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=WARM_UP + count + 1,
        precision=fastest_precision(pick_device("auto")),
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, batches)
    return clock.rate


def plain(module: Any, batches: Iterable[dict[str, torch.Tensor]], count: int) -> float:
    """What one would write first: eager, float32, PyTorch's own memory layout."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module.to(device).train()
    module.extractor.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def steps() -> Iterable[dict[str, torch.Tensor]]:
        for number, batch in enumerate(batches):
            loss = module.training_step({key: value.to(device) for key, value in batch.items()}, number)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            yield batch

    return rate(steps(), count)


def measure(arguments: argparse.Namespace, objective: str, way: str) -> dict[str, float]:
    """Images per second of loader, step and both; in a process of its own, as one keeps memory that the other gives back."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(CONF), version_base="1.3"):
        words = [
            f"objective={objective}",
            f"model={arguments.model}",
            "data=folder",
            f"data.root={arguments.photos}",
            f"data.backgrounds={arguments.backgrounds or 'null'}",
            f"data.cache={folder if way == 'ours' else 'null'}",
            f"data.batch_size={arguments.batch_size}",
        ]
        cfg = compose("train", words)
        if "average" in cfg.objective:
            cfg.objective.average = 0  # it needs pretrained weights, and nothing is averaged while the backbone learns
        if way == "ours":
            keep_memory()
        pl.seed_everything(cfg.seed, verbose=False)
        model = {**cfg.model, "pretrained": False, "weights": None}  # speed needs no weights
        data = instantiate(cfg.data, augmentation=instantiate(cfg.augmentation), size=cfg.model.size, seed=cfg.seed)
        data.setup()
        loader = data.train_dataloader()
        same = DataLoader([next(iter(loader))] * (WARM_UP + arguments.count + 1), batch_size=None)
        runs: dict[str, float] = {"loader": rate(loader, arguments.count)}
        for name, batches in {"step": same, "both": loader}.items():
            module = instantiate(cfg.objective, model=model, _recursive_=False, _convert_="all")
            runs[name] = ours(module, batches, arguments.count) if way == "ours" else plain(module, batches, arguments.count)
    return runs


def draw(objectives: dict[str, dict[str, list[dict[str, float]]]], title: str, file: str) -> None:
    """Bars of the medians, with a dot for each turn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(objectives), figsize=(1 + 5 * len(objectives), 4), layout="constrained", squeeze=False
    )
    for axes, (objective, rows) in zip(panels[0], objectives.items(), strict=True):
        for number, (way, results) in enumerate(rows.items()):
            places = [place + 0.4 * number - 0.2 for place in range(len(results[0]))]
            turns = [[result[part] for result in results] for part in results[0]]
            bars = axes.bar(places, [statistics.median(rates) for rates in turns], 0.36, label=way, alpha=0.6)
            axes.bar_label(bars, fmt="%.0f", label_type="center")
            for place, rates in zip(places, turns, strict=True):
                axes.plot([place] * len(rates), rates, ".", color="black")
        axes.set_xticks(range(len(results[0])), list(results[0]))
        axes.set(title=f"objective={objective}", ylabel="images per second")
        axes.margins(y=0.1)
        axes.legend(loc="upper right")
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="a folder of catalogue photos, or a csv of id,path")
    parser.add_argument("--backgrounds", help="a folder of photographs; without it scenes are drawn")
    parser.add_argument("--objectives", nargs="+", default=["saliency", "joint"], help="names in conf/objective")
    parser.add_argument("--model", default="efficientnet_lite0", help="a name in conf/model; random weights")
    parser.add_argument("--batch-size", type=int, default=32, help="photos; each brings its augmented version")
    parser.add_argument("--count", type=int, default=12, help="batches that are timed")
    parser.add_argument("--rounds", type=int, default=2, help="turns that plain and ours take; the median counts")
    parser.add_argument("--plot", help="a PNG: the medians and every turn")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments, *arguments.child.split())))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    precision = fastest_precision(pick_device("auto"))
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}; images per second")
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for objective in arguments.objectives:
        rows = found[objective] = {"plain": [], "ours": []}
        for turn in range(arguments.rounds):  # in turns, as the machine may be shared
            for way, results in rows.items():
                words = [sys.executable, *sys.argv, "--child", f"{objective} {way}"]
                # Set before torch is imported, as train.py does.
                spins = {"GOMP_SPINCOUNT": str(SPINS)} if way == "ours" else {}
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=spins | dict(os.environ))
                results.append(json.loads(done.stdout.splitlines()[-1]))
                rates = ", ".join(f"{part} {value:.1f}" for part, value in results[-1].items())
                print(f"turn {turn + 1} of {arguments.rounds}, {way}: {rates}", file=sys.stderr, flush=True)
        print(f"{arguments.model}, objective={objective}")
        middle = {way: {key: statistics.median(r[key] for r in results) for key in results[0]} for way, results in rows.items()}
        for part, ours_rate in middle["ours"].items():
            plain_rate = middle["plain"][part]
            print(
                f"  {part:7s} plain {plain_rate:7.1f}   ours {ours_rate:7.1f}   {ours_rate / plain_rate:5.2f} times", flush=True
            )
    if arguments.plot:
        draw(found, f"{arguments.model}, {device}, {torch.get_num_threads()} threads, {arguments.rounds} turns", arguments.plot)


if __name__ == "__main__":
    main()
