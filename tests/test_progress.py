from __future__ import annotations

import logging

import pytest

from beauty_bafe.progress import show_progress


@pytest.mark.parametrize(
    ("count", "level", "shown"), [(9, logging.INFO, True), (8, logging.INFO, False), (9, logging.WARNING, False)]
)
def test_a_bar_is_shown_for_many_items_if_the_program_wants_messages(
    count: int, level: int, shown: bool, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(level, "beauty_bafe")
    for items in (range(count), iter(range(count))):
        assert list(show_progress(items, "counting", count, 8)) == list(range(count))
        printed = capsys.readouterr().out
        assert ("counting" in printed) == ("100%" in printed) == shown
