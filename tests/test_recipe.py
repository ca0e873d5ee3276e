"""The way to retrieve that a checkpoint carries: what train.py writes is what retrieve.py uses, unless told otherwise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from beauty_bafe.extraction.members import load_members
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import spoc
from beauty_bafe.recipe import check_recipe, resolve_auto

from .conftest import ROOT, VIEWS
from .test_train import TINY_MODEL

sys.path.insert(0, str(ROOT))
from retrieve import retrieve
from train import train

CONF = ROOT / "conf"
BEST = {"pooling": "attention_gem", "query": "both", "rerank": "query_expansion"}


@pytest.fixture
def write(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny checkpoint that carries anything."""

    def write(name: str, **retrieval: Any) -> Path:
        content = torch.load(tiny_checkpoint, weights_only=True)
        torch.save(content | ({"retrieval": retrieval.get("raw", retrieval)} if retrieval else {}), tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def resolved(configure: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    def resolved(checkpoints: list[Path], *overrides: str) -> DictConfig:
        names = ",".join(map(str, checkpoints))
        cfg = configure("retrieve", f"checkpoints=[{names}]", "gallery=G", "queries=Q", *overrides)
        resolve_auto(cfg, CONF)
        return cfg

    return resolved


def same(cfg: DictConfig, configure: Callable[..., DictConfig], **names: str) -> None:
    """The groups of `cfg` are these files."""
    asked = configure("retrieve", *(f"{group}={name}" for group, name in names.items()))
    for group in names:
        assert cfg[group] == asked[group], group


@pytest.mark.parametrize("objective", ["joint", "saliency"])
def test_what_was_trained_is_what_answers(
    objective: str, toy: Path, tmp_path: Path, configure: Callable[..., DictConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data=folder", f"data.root={toy / 'gallery'}", "data.num_workers=0", "trainer.max_epochs=1", *TINY_MODEL]
    names = [f"retrieval.{group}={name}" for group, name in BEST.items()]
    train(configure("train", f"objective={objective}", *words, *names, f"output_dir={tmp_path / 'run'}"))
    for file in ("best.ckpt", "last.ckpt"):
        assert torch.load(tmp_path / "run" / "checkpoints" / file, weights_only=True)["retrieval"] == BEST | {"enlarge": 1.5}
    # Another way to retrieve is no other training: the run goes on, and carries the new one.
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    again = ["trainer.max_epochs=2", *names[:2], "retrieval.rerank=none", f"ckpt_path={last}"]
    train(configure("train", f"objective={objective}", *words, *again, f"output_dir={tmp_path / 'run'}"))
    assert torch.load(last, weights_only=True)["retrieval"] == BEST | {"enlarge": 1.5, "rerank": "none"}

    places = {"checkpoints": f"[{last}]", "gallery": toy / "gallery", "queries": toy / "queries", "features": tmp_path / "f"}
    given = [f"{key}={value}" for key, value in places.items()] + ["num_workers=0", "report=false"]
    capsys.readouterr()
    retrieve(configure("retrieve", *given, f"output_dir={tmp_path / 'auto'}"))
    assert "as the checkpoint was trained for: pooling=attention_gem query=both rerank=none\n" in capsys.readouterr().out
    retrieve(configure("retrieve", *given, "pooling=attention_gem", "query=both", f"output_dir={tmp_path / 'typed'}"))
    answers = [(tmp_path / name / "submission.csv").read_text() for name in ("auto", "typed")]
    assert answers[0] == answers[1]
    used = OmegaConf.load(tmp_path / "auto" / "config.yaml")
    same(used, configure, pooling="attention_gem", query="both", rerank="none")


def test_what_is_typed_wins_group_by_group(write, resolved, configure, capsys: pytest.CaptureFixture[str]) -> None:
    file = write("a.ckpt", **BEST)
    same(resolved([file], "query=whole"), configure, **BEST | {"query": "whole"})
    assert "trained for: pooling=attention_gem rerank=query_expansion\n" in capsys.readouterr().out
    same(resolved([file], "pooling=gem", "pooling.saliency=true"), configure, query="both", rerank="query_expansion")
    same(resolved([file], "experiment=best"), configure, **BEST | {"query": "closer", "rerank": "keypoints_and_labels"})
    capsys.readouterr()
    resolved([file], "pooling=mac", "query=whole", "rerank=[query_expansion,superglobal]")
    assert capsys.readouterr().out == "", "nothing was left to the checkpoint"


@pytest.mark.parametrize("name", ["sift_verified", "superglobal"])
def test_a_file_that_is_made_of_others(name: str, write, resolved, configure) -> None:
    assert not GlobalHydra.instance().is_initialized()
    same(resolved([write("a.ckpt", **BEST | {"rerank": name})]), configure, **BEST | {"rerank": name})
    assert not GlobalHydra.instance().is_initialized()


def test_older_checkpoints_answer_as_they_did(tiny_checkpoint: Path, write, resolved, configure) -> None:
    older = {"pooling": "attention", "query": "whole", "rerank": "none"}
    same(resolved([tiny_checkpoint]), configure, **older)
    same(resolved([tiny_checkpoint, write("b.ckpt", **older)]), configure, **older)
    with pytest.raises(ValueError, match=r"best\.ckpt: pooling=attention query=whole(.|\n)*b\.ckpt: pooling=gem query=both"):
        resolved([tiny_checkpoint, write("b.ckpt", pooling="gem", query="both", rerank="none")])


def test_untrained_networks_take_rmac(configure, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = configure("retrieve", "model=resnet50", "gallery=G", "queries=Q")
    resolve_auto(cfg, CONF)
    same(cfg, configure, pooling="rmac", query="whole", rerank="none")
    assert "for networks without trained masks: pooling=rmac query=whole rerank=none\n" in capsys.readouterr().out


def test_checkpoints_that_disagree_are_named(write, resolved, configure) -> None:
    files = [write("a.ckpt", **BEST), write("b.ckpt", **BEST | {"pooling": "gem"})]
    with pytest.raises(
        ValueError, match=r"a\.ckpt: pooling=attention_gem\n.*b\.ckpt: pooling=gem\ntype .* pooling=attention_gem$"
    ):
        resolved(files)
    same(resolved(files, "pooling=mac"), configure, **BEST | {"pooling": "mac"})


@pytest.mark.parametrize(
    ("retrieval", "message"),
    [
        (BEST | {"query": "next_years"}, "asks for query=next_years, but conf/query has both, closer, .*; type query=NAME"),
        (BEST | {"query": {"view": {"_target_": "os.system"}}}, "asks for query={'view'.* conf/query has both"),
        (BEST | {"query": "../pooling/gem"}, r"asks for query=\.\./pooling/gem, but"),
        (BEST | {"query": "whole,+x=1"}, "asks for query=whole,.x=1, but"),
        (BEST | {"query": "auto"}, "asks for query=auto, but"),
        ({"pooling": "attention_gem", "rerank": "none"}, "asks for query=None, but"),
        ({"raw": "os.system"}, "asks for pooling=os.system, but"),
    ],
)
def test_anything_but_a_known_name_is_refused(retrieval: dict[str, Any], message: str, write, resolved) -> None:
    file = write("a.ckpt", **retrieval)
    with pytest.raises(ValueError, match=rf"checkpoint '.*a\.ckpt' {message}"):
        resolved([file])
    typed = ["query=whole", *(["pooling=gem", "rerank=none"] if "raw" in retrieval else [])]
    resolved([file], *typed)  # the way out that the message names


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "retrieval.pooling=attentoin",
            "retrieval asks for pooling=attentoin, but conf/pooling has amac, .*retrieval.pooling=NAME",
        ),
        ("retrieval.rerank=auto", "asks for rerank=auto"),
        ("retrieval.query=null", "asks for query=None"),
        ("~retrieval.query", "asks for query=None"),
        ("+retrieval.index=flat", "retrieval.index=flat: retrieval has pooling, query, rerank, enlarge; leave index out"),
    ],
)
def test_training_refuses_unknown_names(override: str, message: str, tmp_path: Path, configure) -> None:
    with pytest.raises(ValueError, match=message):
        train(configure("train", override, f"output_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [None, *sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))])
def test_every_experiment_names_what_is_there(name: str | None, configure) -> None:
    fill = ["data=folder", "data.root=G"]
    cfg = configure("train", *fill, *([f"experiment={name}"] if name else []))
    check_recipe(cfg.retrieval, CONF)
    masks_alone = name in ("bafe_paper", "whitened_query_2020")
    assert cfg.objective._target_.endswith("SaliencyModule" if masks_alone else "JointModule")
    assert cfg.trainer.max_epochs == (30 if masks_alone else 16)


def test_settings_of_a_group_left_at_auto_are_answered(tiny_checkpoint: Path, resolved) -> None:
    with pytest.raises(ValueError, match=r"query\.view is given, but query is auto; type query=NAME"):
        resolved([tiny_checkpoint], "+query.view.closer=1.5")
    with pytest.raises(ValueError, match=r"poolings\.x=auto: only pooling itself"):
        resolved([tiny_checkpoint], "+pooling@poolings.x=auto")


def test_in_a_sweep_each_job_takes_the_rest_from_the_checkpoint(toy: Path, tmp_path: Path, write) -> None:
    file = write("a.ckpt", **BEST)
    given = [f"checkpoints=[{file}]", f"gallery={toy / 'gallery'}", f"queries={toy / 'queries'}", f"features={tmp_path / 'f'}"]
    place = ["num_workers=0", "report=false", VIEWS, f"output_dir={tmp_path / 'sweep'}"]
    command = [sys.executable, str(ROOT / "retrieve.py"), "-m", "query=auto,whole", *given, *place]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("as the checkpoint was trained for: pooling=attention_gem") == 2
    used = [OmegaConf.load(tmp_path / "sweep" / str(job) / "config.yaml") for job in (0, 1)]
    assert [cfg.query.view is None for cfg in used] == [False, True]
    assert [list(cfg.rerank) for cfg in used] == [["query_expansion"]] * 2


def test_pictures_are_described_at_the_size_that_a_checkpoint_asks_for(write, tiny_checkpoint: Path) -> None:
    poolings = {"pooling": Pooling(spoc, saliency=True)}
    files = [str(tiny_checkpoint), str(write("a.ckpt", **BEST, enlarge=1.5)), str(write("b.ckpt", **BEST, enlarge=0.5))]
    assert [member.extractor.size for member in load_members(files, poolings)] == [64, 96, 32]
    assert [member.extractor.size for member in load_members(files, poolings, size=48)] == [48, 48, 48]
    with pytest.raises(ValueError, match="size=0: type a number of pixels, or null"):
        load_members(files, poolings, size=0)
    for wrong in (0, 99, True, "1; rm", [2], None):
        with pytest.raises(ValueError, match=r"c\.ckpt' has enlarge=.*takes 0\.25 to 4\.0, and size=PIXELS overrides it"):
            load_members([str(write("c.ckpt", **BEST, enlarge=wrong))], poolings)
