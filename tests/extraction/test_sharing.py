"""One pass shared out among several workers: the vectors of one, resumed from what dead ones left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from beauty_bafe.data.catalog import Skipped, from_folder
from beauty_bafe.extraction import local
from beauty_bafe.extraction.features import Features
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import load_members
from beauty_bafe.extraction.sharing import Shard, Worker
from beauty_bafe.extraction.store import Store, write_shard
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import gem, spoc

POOLINGS = {"attention": Pooling(spoc, saliency=True), "gem": Pooling(gem, saliency=False)}


@pytest.fixture
def folder(tmp_path: Path, write_picture: Callable[..., Path]) -> Path:
    for number in range(11):
        write_picture(f"pictures/日本 '{number}'.jpg", (40 + 9 * number, 50), seed=number)
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    return tmp_path / "pictures"


@pytest.fixture
def describe(folder: Path, tmp_path: Path, tiny_checkpoint: Path) -> Callable[..., list[Features]]:
    def describe(store: str, devices: Sequence[str] | None, poolings: Sequence[str] = ("attention", "gem")) -> list[Features]:
        extraction = FeatureExtraction(
            tmp_path / store, device="cpu", precision="32-true", shard=3, num_workers=0, max_skipped=0.5, devices=devices
        )
        members = load_members(str(tiny_checkpoint), {name: POOLINGS[name] for name in poolings})
        return extraction(members, from_folder(folder), "source", "pictures", Skipped(), masks=True)

    return describe


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.suffix in (".safetensors", ".json")
    }


def equal(ours: Sequence[Features], expected: Sequence[Features]) -> bool:
    return all(
        one.ids == other.ids
        and np.array_equal(one.vectors, other.vectors)
        and np.array_equal(one.masks if one.masks is not None else 0, other.masks if other.masks is not None else 0)
        for one, other in zip(ours, expected, strict=True)
    )


def test_two_devices_write_what_one_does(describe: Callable[..., list[Features]], tmp_path: Path) -> None:
    expected = describe("one", None)
    assert len(expected[0].ids) == 11
    assert equal(describe("two", ["cpu", "cpu"]), expected)
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert {name: data for name, data in one.items() if name.endswith("safetensors")} == {
        name: data for name, data in two.items() if name.endswith("safetensors")
    }


def test_every_device_takes_a_share(describe: Callable[..., list[Features]], monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[object] = []
    call = local.on_devices

    def spy(devices: Sequence[str]) -> Callable[[Worker, Sequence[Shard]], Iterable[tuple[int, int]]]:
        assert devices == ["cpu", "cpu"]
        return lambda worker, shards: call(devices)(worker._replace(), [used.append(shard) or shard for shard in shards])

    monkeypatch.setattr(local, "on_devices", spy)
    describe("two", ["cpu", "cpu"])
    assert len(used) == 4, "12 pictures in shards of 3"


@pytest.mark.parametrize("done", [0, 1, 3])
def test_what_dead_workers_wrote_stays(
    describe: Callable[..., list[Features]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, done: int
) -> None:
    """The run ends after `done` shards, not in their order; of another half the stores were written, unknown to it."""

    def dying(_devices: Sequence[str]) -> Callable[[Worker, Sequence[Shard]], Iterator[tuple[int, int]]]:
        def run(worker: Worker, shards: Sequence[Shard]) -> Iterator[tuple[int, int]]:
            describer = worker.start("cpu", 1)
            for shard in list(reversed(shards))[:done]:
                yield shard.number, describer(shard)
            first = shards[0]
            describer(first._replace(files={1: first.files[1]}))
            raise KeyboardInterrupt

        return run

    with monkeypatch.context() as patch:
        patch.setattr(local, "on_devices", dying)
        with pytest.raises(KeyboardInterrupt):
            describe("killed", ["cpu", "cpu"])
    left = {name: data for name, data in content(tmp_path / "killed").items() if name.endswith("safetensors")}
    assert len(left) == 2 * done + 1
    again = describe("killed", ["cpu", "cpu"])
    assert equal(again, describe("one", None))
    now = content(tmp_path / "killed")
    assert all(now[name] == data for name, data in left.items()), "what is there is not described again"
    assert equal(describe("killed", None), again), "and a run on one device finds nothing to do"
    assert content(tmp_path / "killed") == now


def test_a_later_pooling_is_added_by_several_devices(describe: Callable[..., list[Features]]) -> None:
    describe("features", None, ["gem"])
    assert equal(describe("features", ["cpu", "cpu"]), describe("one", None))


def test_a_shard_of_another_run_is_not_overwritten(tmp_path: Path) -> None:
    store = Store(tmp_path, {"checkpoint": "x"})
    store.begin([("a", "1"), ("b", "1")], {})
    arrays = {"vectors": np.ones((1, 2), np.float32)}
    file = store.file(next(store.free_shards()))
    write_shard(file, [("a", "1")], arrays, {})
    before = file.stat().st_mtime_ns
    write_shard(file, [("a", "1")], arrays, {})
    assert file.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"another run has written '.*000000.safetensors' since this one started"):
        write_shard(file, [("b", "1")], arrays, {})
    store.register(0)
    assert store.read([("a", "1")])["vectors"].tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("devices", "message"),
    [("both", "extraction.devices=both: type all, a list"), ([], "names no device"), (["tpu"], "device=tpu: type auto")],
)
def test_devices_that_are_none(tmp_path: Path, devices: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureExtraction(tmp_path, devices=devices)


def test_all_devices_of_a_machine_without_gpus_are_its_processor(tmp_path: Path) -> None:
    assert FeatureExtraction(tmp_path, device="cpu", devices="all").devices == ["cpu"]
