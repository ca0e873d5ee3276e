"""Every file of every group composes and instantiates; every command of the README and of conf/ composes."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from beauty_bafe.models.decoder import make_decoder
from beauty_bafe.models.extractor import BackgroundAgnosticExtractor
from beauty_bafe.retrieval.parts import build_steps

from .conftest import ROOT, TINY

CONF = ROOT / "conf"
FILES = sorted(CONF.glob("*/*.yaml"))
TRAIN_GROUPS = {"model", "objective", "decoder", "data", "augmentation", "trainer", "callbacks", "logger"}
RETRIEVE_GROUPS = {"pooling", "ensemble", "extraction", "index", "rerank", "query"}
# Commands that compose.
KNOWN = r"(?:python (?:train|retrieve)\.py|(?:beauty-bafe|python -m beauty_bafe) (?:cache|export|cutout|shards|serve|verifier))"
# What stands for the user's own things in commands.
FILLED = ["data.root=GALLERY", "gallery=GALLERY", "queries=QUERIES", "checkpoints=[a.ckpt]"]


def launch_line(file: Path) -> str:
    """The first line, or the second where Hydra wants its package directive first."""
    lines = file.read_text().splitlines()
    return lines[1] if lines[0].startswith("# @package") else lines[0]


def scripts_for(file: Path) -> list[str]:
    group = file.parent.name
    first = launch_line(file)
    return (
        ["train"]
        if group in TRAIN_GROUPS
        else ["retrieve"]
        if group in RETRIEVE_GROUPS
        else re.findall(r"python (\w+)\.py", first)
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_file_composes_and_instantiates(file: Path, configure, tmp_path: Path) -> None:
    group = file.parent.name
    if group == "experiment":  # composes for both scripts, whichever it is for; test_experiments.py runs them
        configure("train", f"experiment={file.stem}", f"output_dir={tmp_path}", "data.root=GALLERY")
        configure("retrieve", f"experiment={file.stem}", f"output_dir={tmp_path}", "queries=Q")
        return
    (script,) = scripts_for(file)
    fill = [f"output_dir={tmp_path}", *(["gallery=G", "queries=Q"] if script == "retrieve" else [])]
    if group == "data":
        fill += ["data.root=GALLERY"] + (["data.titles=T.csv"] if file.stem == "perfect500k" else [])
    where = "decoder@objective.decoder" if group == "decoder" else group
    cfg = configure(script, f"{where}={file.stem}", *fill)
    OmegaConf.to_yaml(cfg, resolve=True)
    if file.stem == "auto":  # stands for another file of its group, see test_recipe.py
        assert cfg[group] == {"auto": True}
    elif group == "model":
        model = OmegaConf.to_container(cfg.model, resolve=True)
        extractor = BackgroundAgnosticExtractor(**model | {"pretrained": False, "weights": None})
        assert len(extractor.backbone.channels) == 4
        assert extractor.backbone.strides == sorted(extractor.backbone.strides)
    elif group == "decoder":
        make_decoder(cfg.objective.decoder, [3, 5])
    elif group == "objective":
        instantiate(cfg.objective, model=TINY, _recursive_=False, _convert_="all")
    elif group in ("callbacks", "rerank"):
        if "rerank.learned" in file.read_text():
            pytest.importorskip("kornia", reason="the extra `matching`")
            for package in set(re.findall(r"package:(\w+)/\S+[.]pth?\b", file.read_text())):
                if find_spec(package) is None:
                    pytest.skip(f"{package} is not installed")
        if group == "rerank":
            assert list(build_steps(cfg.rerank)) == list(cfg.rerank)
        else:
            for part in cfg[group].values():
                instantiate(part)
    elif group == "trainer" and file.stem != "default":
        assert cfg.trainer._target_ == "pytorch_lightning.Trainer"  # gpu and ddp need their hardware
    elif group == "data":
        options = {key: value for key, value in cfg.data.items() if key != "_target_"}
        target = OmegaConf.create({"_target_": "hydra.utils.get_method", "path": cfg.data._target_})
        accepted = instantiate(target)
        assert callable(accepted)
        assert set(options) >= {"root", "backgrounds", "batch_size"}
    elif group == "sweep":
        with initialize_config_dir(str(CONF), version_base="1.3"):
            assert compose(script, [f"sweep={file.stem}", *fill], return_hydra_config=True).hydra.sweeper.params
    elif group == "query":
        instantiate(cfg.query.view)
    elif group != "trainer":
        if file.stem == "milvus":
            pytest.importorskip("pymilvus", reason="the extra `milvus`")
        instantiate(cfg[group])
    elif group == "trainer":
        instantiate(cfg.trainer, precision="32-true", logger=False)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_file_starts_with_its_launch_command(file: Path) -> None:
    assert re.match(r"# (make demo, or: )?python (train|retrieve)\.py ", launch_line(file))


def commands() -> list[str]:
    found = []
    for source in [ROOT / "README.md", *sorted((ROOT / "benchmarks").glob("*.md")), *FILES, *sorted(CONF.glob("*.yaml"))]:
        text = source.read_text().replace("\\\n", " ")
        found += re.findall(rf"^(?:# )?(?:make demo, or: )?({KNOWN}.*?)(?:\s{{2,}}.*)?$", text, re.MULTILINE)
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_every_command_composes(command: str, configure) -> None:
    words = shlex.split(command, comments=True)
    assert words[0] in ("python", "beauty-bafe")
    if words[1:2] == ["-m"]:  # python -m beauty_bafe COMMAND
        words = ["beauty-bafe", *words[3:]]
    script, overrides = Path(words[1]).stem, [word for word in words[2:] if word != "-m"]
    if "-m" in words:  # a sweep: its first job
        overrides = [re.sub(r"=([^\[,]+),.*", r"=\1", word) for word in overrides]
    given = {word.split("=")[0] for word in overrides}
    fill = [word for word in FILLED if word.split("=")[0] not in given and words[0] == "python"]
    fill = [word for word in fill if word.startswith("data.") == (script == "train")]
    overrides = [word for word in overrides if not word.startswith("-")]
    OmegaConf.to_yaml(configure(script, *overrides, *fill), resolve=True)


def test_the_readme_has_commands_and_is_short() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    assert sum(command in readme for command in commands()) >= 8
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / target).exists(), f"the README points at {target}"
