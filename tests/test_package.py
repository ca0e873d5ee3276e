"""The package as it is installed: the wheel's files, the command, and packages that only some features need."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from beauty_bafe import __main__ as command
from beauty_bafe.extras import EXTRAS, explain

from .conftest import ROOT


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel holds, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("beauty_bafe", "conf"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "--wheel-dir", folder, folder / "source"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_holds_every_file(installed: Path) -> None:
    def listed(root: Path, *patterns: str) -> set[str]:
        return {str(file.relative_to(root)) for pattern in patterns for file in root.rglob(pattern)}

    package = installed / "beauty_bafe"
    assert listed(package / "conf", "*") == listed(ROOT / "conf", "*")
    wanted = ("*.py", "*.j2", "*.html", "py.typed")
    assert listed(package, *wanted) == listed(ROOT / "beauty_bafe", *wanted)
    assert "beauty-bafe = beauty_bafe.__main__:main" in next(installed.glob("*.dist-info/entry_points.txt")).read_text()


@pytest.mark.parametrize("name", ["train", "retrieve"])
def test_the_installed_command_finds_its_settings(name: str, installed: Path, tmp_path: Path) -> None:
    """In another folder than the checkout, with the same overrides and answers as the script."""
    python = [sys.executable, "-c", f"import sys, runpy; sys.path.insert(0, {str(installed)!r}); sys.argv[0] = 'beauty-bafe'; "]
    python[-1] += "runpy.run_module('beauty_bafe', run_name='__main__', alter_sys=True)"
    done = subprocess.run([*python, name, "--cfg", "job"], cwd=tmp_path, capture_output=True, text=True, check=False)
    script = [sys.executable, str(ROOT / f"{name}.py"), "--cfg", "job"]
    assert done.stdout == subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    wrong = subprocess.run([*python, name, "max_skiped=1"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Did you mean 'max_skipped'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["retreive"], "'retreive' is not a command; type beauty-bafe train or retrieve or .*; did you mean retrieve"),
        (["k=3"], "'k=3' is not a command"),
    ],
)
def test_unknown_commands(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["beauty-bafe", *words])
    with pytest.raises(SystemExit, match=message):
        command.main()


def test_help_and_dispatch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[object] = []
    monkeypatch.setattr(runpy, "run_module", lambda name, **_: ran.append((name, sys.argv)))
    for argv in (["beauty-bafe"], ["beauty-bafe", "--help"]):
        monkeypatch.setattr(sys, "argv", argv)
        command.main()
        assert "train     train an extractor" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["beauty-bafe", "train", "seed=2"])
    command.main()
    assert ran == [("beauty_bafe.commands.train", ["beauty-bafe", "seed=2"])]


def test_a_missing_extra_is_named_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    missing = ModuleNotFoundError("No module named 'skimage'", name="skimage.feature")
    assert explain(missing) == "this needs the package skimage; type pip install 'beauty_bafe[classical]'"
    assert "pip install 'beauty_bafe[wandb]'" in explain(ModuleNotFoundError("Requirement 'wandb>=0.12.10' not met"))
    assert explain(ImportError("libGL.so.1 is missing")) == "libGL.so.1 is missing"
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("[tool")[0]
    assert all(f"{extra} = [" in extras for extra in EXTRAS.values())
