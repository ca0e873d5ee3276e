from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest

from beauty_bafe import process
from beauty_bafe.process import TemporarySetting, keep_memory, share_heap

from .conftest import ROOT


def test_a_setting_is_held_until_the_last_thread_leaves() -> None:
    state = {"threads": 8}
    held = TemporarySetting(lambda: state["threads"], lambda value: state.update(threads=value), 1)
    together = Barrier(2)

    def work(number: int) -> int:
        with held:
            together.wait()  # both are inside
            if number == 0:
                return state["threads"]  # leaves first
            together.wait()
            return state["threads"]

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.submit(work, 0), threads.submit(work, 1)
        assert first.result() == 1
        assert state["threads"] == 1, "the other one is still inside"
        together.wait()
        assert second.result() == 1
    assert state["threads"] == 8


OURS = {"GOMP_SPINCOUNT": "1000"}


@pytest.mark.parametrize(
    ("start", "given", "expected"),
    [
        ("train.py", {}, OURS),
        ("retrieve.py", {}, OURS),
        ("-m beauty_bafe serve", {}, OURS),
        ("-m beauty_bafe.commands.cutout", {}, OURS),
        ("retrieve.py", {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ("-m beauty_bafe serve", {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_commands_release_cores(start: str, given: dict[str, str], expected: dict[str, str], tmp_path: Path) -> None:
    """What the variables are when torch is imported: a stand-in for it tells, and ends the command."""
    tell = "{name: value for name, value in os.environ.items() if name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')}"
    (tmp_path / "torch.py").write_text(f"import os\nprint({tell}, flush=True)\nos._exit(0)\n", encoding="utf-8")
    others = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = others | given | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    words = [str(ROOT / start)] if start.endswith(".py") else start.split()
    words += {
        "train.py": ["data=toy"],
        "retrieve.py": ["model=resnet50", "gallery=G", "queries=Q"],
        "-m beauty_bafe serve": ["index_dir=SHOP"],
        "-m beauty_bafe.commands.cutout": ["pictures=P", "checkpoints=[a.ckpt]"],
    }[start]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.stdout.splitlines()[-1:] == [str(expected)], done.stderr[-2000:]


def test_freed_memory_is_kept_by_trainings_and_shared_by_threads_of_services(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers as in malloc.h: M_TRIM_THRESHOLD -1, M_MMAP_THRESHOLD -3, M_MMAP_MAX -4, M_ARENA_MAX -8."""
    told: dict[int, int] = {}
    libc = SimpleNamespace(mallopt=told.__setitem__)
    monkeypatch.setattr(process, "ctypes", SimpleNamespace(CDLL=lambda _: libc))
    monkeypatch.setattr(sys, "platform", "linux")
    keep_memory()
    assert told == {-4: 0, -1: 2**31 - 1}
    told.clear()
    share_heap()
    assert told == {-8: 1, -3: 32 << 20, -1: 2**31 - 1}
    del libc.mallopt  # as in musl
    share_heap()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
@pytest.mark.parametrize("name", ["keep_memory", "share_heap"])
def test_settings_of_memory_do_no_harm(name: str) -> None:
    """In a process of their own, as they cannot be taken back."""
    code = f"from beauty_bafe.process import {name}; {name}(); import torch; assert torch.ones(1 << 24).sum() == 1 << 24"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
