"""train.py as its users run it: stopped and resumed, in sweeps, in several processes, with nothing to train on."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from beauty_bafe.models.module import load_extractor

from .conftest import ROOT, TINY

sys.path.insert(0, str(ROOT))
from train import train

TINY_MODEL = [
    f"model.{key}={value if not isinstance(value, list) else '[' + ','.join(value) + ']'}" for key, value in TINY.items()
]


def test_a_pooling_that_cuts_a_transformer_maps_off_is_refused(configure: Callable[..., DictConfig], tmp_path: Path) -> None:
    words = ["model=dinov3_small", "model.pretrained=false", "+model.options={depth:12,embed_dim:64,num_heads:2}"]
    words += ["objective=frozen", "data.root=none", f"output_dir={tmp_path}"]
    with pytest.raises(
        ValueError, match=r"of the pretrained transformer vit_small_patch16_dinov3.*; type retrieval.pooling=attention$"
    ):
        train(configure("train", *words))


def command(toy: Path, output: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "train.py"),
        "data=folder",
        f"data.root={toy / 'gallery'}",
        "data.batch_size=4",
        "data.num_workers=1",
        "data.cache=null",
        "trainer.max_epochs=3",
        "callbacks.progress.seconds=0",
        f"output_dir={output}",
        *TINY_MODEL,
        *overrides,
    ]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def stop_in_second_epoch(words: list[str], folder: Path, with_signal: signal.Signals) -> str:
    """Stop a run in mid-epoch; on a busy machine it can be over before the signal arrives, then it starts again."""
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            # A shell's background jobs are born deaf to SIGINT, and so would be what they start.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if "epoch 2/3 batch 3/" in line:
                process.send_signal(with_signal)
        if process.wait() != 0 and "epoch 2/3 done" not in output:
            return output
    raise AssertionError(f"it was to be stopped in mid-epoch: {output}")


@pytest.mark.parametrize(("objective", "with_signal"), [("saliency", signal.SIGINT), ("joint", signal.SIGKILL)])
def test_a_stopped_run_resumes_to_the_same_result(
    toy: Path, tmp_path: Path, objective: str, with_signal: signal.Signals
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    cache = tmp_path / "cache" if objective == "joint" else "null"
    words = (f"objective={objective}", f"data.cache={cache}", "data.batch_size=2")  # short steps: the signal finds many to hit
    run(command(toy, whole, *words))
    output = stop_in_second_epoch(command(toy, folder, *words), folder, with_signal)
    last = folder / "checkpoints" / "last.ckpt"
    assert (f"to continue, add ckpt_path={last}" in output) == (with_signal == signal.SIGINT)
    run(command(toy, folder, *words, f"ckpt_path={last}"))
    for name in ("last.ckpt", "best.ckpt"):
        states = [torch.load(path / "checkpoints" / name, weights_only=True)["state_dict"] for path in (whole, folder)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name
    epochs = [json.loads((path / "metrics.json").read_text())["epochs"] for path in (whole, folder)]
    assert [row["val/mAP@7"] for row in epochs[0]] == [row["val/mAP@7"] for row in epochs[1]]


def test_a_run_does_not_go_on_with_other_pictures(toy: Path, tmp_path: Path, configure: Callable[..., DictConfig]) -> None:
    """Elsewhere, the same pictures are the same; one more or another in the place of one are not."""
    settings = ["data=folder", "data.num_workers=0", "data.batch_size=16", "trainer.precision=32-true", *TINY_MODEL]
    settings += [f"output_dir={tmp_path / 'run'}", f"data.backgrounds={toy / 'queries'}"]
    train(configure("train", *settings, f"data.root={toy / 'gallery'}", "trainer.max_epochs=1"))
    again = [*settings, "trainer.max_epochs=2", f"ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"]
    copied = Path(shutil.copytree(toy / "gallery", tmp_path / "copied"))
    first, second = sorted(copied.iterdir())[:2]
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=r"started with 48 pictures \(\w+\) in data.root, now there are 48 pictures \(\w+\)"):
        train(configure("train", *again, f"data.root={copied}"))
    second.unlink()
    with pytest.raises(ValueError, match=r"started with 48 pictures .* in data.root, now there are 47 .*; type data.root="):
        train(configure("train", *again, f"data.root={copied}"))
    shutil.copy(toy / "gallery" / second.name, second)
    with pytest.raises(ValueError, match=r"started with 24 pictures .* in data.backgrounds, now there are drawn scenes"):
        train(configure("train", *again, f"data.root={copied}", "data.backgrounds=null"))
    with pytest.raises(ValueError, match=r"trained with seed=2019, now it is 1; type seed=2019"):
        train(configure("train", *again, f"data.root={copied}", "seed=1"))
    assert train(configure("train", *again, f"data.root={copied}"))["epoch"] == 1


def test_a_multirun_leaves_a_summary(toy: Path, tmp_path: Path) -> None:
    done = run([*command(toy, tmp_path / "sweep", "trainer.max_epochs=1"), "seed=1,2", "-m"])
    rows = list(csv.DictReader((tmp_path / "sweep" / "summary.csv").open()))
    assert [row["seed"] for row in rows] == ["1", "2"]
    assert rows[0]["val/loss"] != rows[1]["val/loss"]
    assert "summary.csv" in done.stdout
    assert (tmp_path / "sweep" / "1" / "checkpoints" / "best.ckpt").is_file()


DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


JOINT = ("objective=joint", "objective.distill=0.5", "objective.settle=0.5", "objective.warmup=0", "objective.decoder.width=8")


@pytest.mark.parametrize("objective", [("objective=saliency",), JOINT], ids=["saliency", "joint"])
def test_two_processes_give_the_weights_of_one(toy: Path, tmp_path: Path, objective: tuple[str, ...]) -> None:
    """With the joint objective's negatives, batch statistics, averaging, and decoder that goes on alone; and what is logged."""
    given = (*objective, "trainer.max_epochs=2", "trainer.precision=32-true")
    run(command(toy, tmp_path / "two", "data.batch_size=2", *given, *DDP))
    run(command(toy, tmp_path / "one", "data.batch_size=4", *given))
    two, one = (torch.load(tmp_path / name / "checkpoints" / "best.ckpt", weights_only=True) for name in ("two", "one"))
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(
            two["state_dict"][key], value, atol=1e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert two["global_step"] == one["global_step"] > 10
    logged = [json.loads((tmp_path / name / "metrics.json").read_text())["epochs"] for name in ("two", "one")]
    assert len(logged[0]) == 2
    for ours, expected in zip(*logged, strict=True):
        for key in ours.keys() - {"images_per_second", "seconds"}:
            assert ours[key] == pytest.approx(expected[key], abs=1e-3), key


def test_no_epochs_leave_the_untrained_network(toy: Path, tmp_path: Path, configure: Callable[..., DictConfig]) -> None:
    overrides = ["data=folder", f"data.root={toy / 'gallery'}", "data.num_workers=0", "trainer.max_epochs=0", *TINY_MODEL]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").write_text("of an older run")
    train(configure("train", *overrides, f"output_dir={tmp_path}"))
    load_extractor(tmp_path / "checkpoints" / "best.ckpt")
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"epochs": []}


def test_too_few_photos_leave_their_reasons(toy: Path, tmp_path: Path, configure: Callable[..., DictConfig]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "good.jpg").symlink_to(next((toy / "gallery").iterdir()))
    (tmp_path / "photos" / "broken.jpg").touch()
    with pytest.raises(ValueError, match=r"1 of 2 catalogue photos are usable, see skipped\.csv"):
        train(configure("train", "data=folder", f"data.root={tmp_path / 'photos'}", f"output_dir={tmp_path}", *TINY_MODEL))
    assert "broken" in (tmp_path / "skipped.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=folder"], "data.root is not given; type data.root=GALLERY, a folder"),
        (["data=perfect500k", "data.root=PICTURES"], "data.titles is not given; type data.titles=TITLES.csv"),
    ],
)
def test_settings_that_are_left_out_are_named(
    words: list[str], message: str, tmp_path: Path, configure: Callable[..., DictConfig]
) -> None:
    with pytest.raises(ValueError, match=message):
        train(configure("train", *words, f"output_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()
