"""What the package reports is shown by its commands, and by an importing program only where that asks for it."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest

from beauty_bafe import cli
from beauty_bafe.index.faiss_index import FaissIndex


@pytest.fixture(autouse=True)
def _messages() -> None:
    """Not shown, unlike in other tests."""


def report() -> str:
    """Do something that is worth a message; returns it."""
    index = FaissIndex("HNSW8", device="cpu").fit(np.eye(9, dtype=np.float32), list("abcdefghi"))
    index.remove(["a"])
    return "index: rows cannot be removed from an HNSW graph, so it is built again"


def test_a_program_that_imports_the_package_sees_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    report()
    assert capfd.readouterr() == ("", "")


def test_a_program_can_ask_for_messages(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "beauty_bafe"):
        text = report()
    assert caplog.messages == [text]


def test_commands_show_each_message_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Also beside a handler of the root logger, as Hydra sets one up; afterwards all is as it was."""
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stdout)
    root.addHandler(handler)
    try:
        with cli.messages_on_terminal():
            text = report()
        report()
    finally:
        root.removeHandler(handler)
    assert capsys.readouterr().out == f"{text}\n"
