from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from beauty_bafe.cli import check_overrides, require_retrieval_inputs

from .conftest import ROOT


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script, *rest = words
    return subprocess.run([sys.executable, str(ROOT / script), *rest], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", ["train", "retrieve"])
@pytest.mark.parametrize("question", ["--help", "--cfg job"])
def test_questions_are_answered_without_loading_torch(script: str, question: str, tmp_path: Path) -> None:
    """Quick because nothing heavy is imported; a clock would tell of the machine instead."""
    code = (
        f"import sys, runpy; sys.path.insert(0, r'{ROOT}')\n"
        f"sys.argv = ['{script}.py', *'{question}'.split()]\n"
        "try:\n"
        f"    runpy.run_path(r'{ROOT / script}.py', run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    assert not exit.code, exit.code\n"
        "heavy = {'torch', 'timm', 'faiss', 'wandb', 'albumentations', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "output_dir" in done.stdout


@pytest.mark.parametrize(
    ("script", "override", "expected"),
    [
        ("train", "trainer.max_epoch=3", "trainer has .*max_epochs.* Did you mean 'max_epochs'"),
        ("train", "sed=1", "the top level has .*seed.* Did you mean 'seed'"),
        ("train", "model.size.x=1", "model.size has no keys below it"),
        ("retrieve", "pooling.saliensy=true", "Did you mean 'saliency'"),
        (
            "retrieve",
            "query.view.closer=1.5",
            "with query=auto the checkpoints choose query; .*query=closer query.view.closer=1.5",
        ),
        ("retrieve", "pooling.function.p=4", "type pooling=attention_gem pooling.function.p=4 .or pooling=gem, grmac"),
        (
            "retrieve",
            "rerank.sift_verified.depth=9",
            "type rerank=sift_verified rerank.sift_verified.depth=9 .or rerank=keypoints_and_labels",
        ),
        ("retrieve", "retrieval.query=both", "retrieval is a setting of train.py; here type query=both"),
        ("train", "pooling=gem", "a setting of retrieve.py and has no effect here; type retrieval.pooling=gem"),
        ("train", "data.titles=x", "'data.titles' is not a setting: data has root"),
    ],
)
def test_unknown_keys_are_answered_with_the_allowed_ones(script: str, override: str, expected: str) -> None:
    with pytest.raises(SystemExit, match=expected):
        check_overrides(ROOT / "conf", script, [override])


@pytest.mark.parametrize(
    "words",
    [
        ["data=perfect500k", "data.titles=x"],  # a key of the group's chosen file
        ["+trainer.fast_dev_run=true", "seed=2"],
        ["-m", "model=resnet50,resnet101", "seed=1,2"],
        ["hydra.verbose=true", "--cfg", "job"],
        ["~ckpt_path"],
    ],
)
def test_known_keys_pass(words: list[str]) -> None:
    check_overrides(ROOT / "conf", "train", words)


@pytest.mark.parametrize(
    "words",
    [
        ["query=closer", "query.view.closer=1.5"],
        ["-m", "pooling=gem,mac", "pooling.saliency=true"],  # a sweep's poolings have it, auto has not
        ["-m", "sweep=poolings", "pooling.saliency=true"],
        ["experiment=best", "rerank.sift_verified.depth=9"],
    ],
)
def test_settings_of_chosen_files_pass(words: list[str]) -> None:
    check_overrides(ROOT / "conf", "retrieve", words)


def test_unknown_names_are_answered_with_the_options(tmp_path: Path) -> None:
    done = run("retrieve.py", "pooling=attentoin", cwd=tmp_path)
    assert done.returncode != 0
    assert "attention_gem" in done.stderr
    assert "Traceback" not in done.stderr


def test_retrieve_without_checkpoints_lists_the_runs_it_sees(tmp_path: Path) -> None:
    done = run("retrieve.py", "gallery=G", "queries=Q", cwd=tmp_path)
    assert done.returncode != 0
    assert "retrieve.py needs checkpoints='[RUN/checkpoints/best.ckpt]'" in done.stderr
    assert "there are no checkpoints below" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "runs/mine/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/mine/checkpoints/best.ckpt").touch()
    done = run("retrieve.py", cwd=tmp_path)
    assert "runs/mine/checkpoints/best.ckpt" in done.stderr
    assert "gallery=DIR_OR_CSV" in done.stderr


def test_inputs_that_are_all_there_pass(configure) -> None:
    require_retrieval_inputs(configure("retrieve", "checkpoints=[a.ckpt]", "gallery=G", "queries=Q"))


def test_an_expected_error_is_one_line(tmp_path: Path) -> None:
    done = run("train.py", "data=folder", f"data.root={tmp_path / 'nothing'}", f"output_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode != 0
    assert "does not exist; name a folder of pictures or a csv" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["train.py", "output_dir=s3://bucket/run"],
        ["retrieve.py", "index_dir='gs://bucket/shop'", "gallery=G", "queries=Q"],
    ],
)
def test_results_are_not_written_to_a_folder_that_is_named_like_a_url(words: list[str], tmp_path: Path) -> None:
    done = run(*words, cwd=tmp_path)
    assert done.returncode != 0
    assert "://bucket/" in done.stderr
    assert "is a URL, but results are written to folders of this machine; type a folder, and copy it" in done.stderr
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="is a URL"):
        check_overrides(ROOT / "conf", "shards", ["pictures=P", "output_dir=s3://bucket/shards"])
