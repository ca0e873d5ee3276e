from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from beauty_bafe.process import HeldSetting


def test_a_setting_is_held_until_the_last_thread_leaves() -> None:
    state = {"threads": 8}
    held = HeldSetting(lambda: state["threads"], lambda value: state.update(threads=value), 1)
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
