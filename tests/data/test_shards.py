"""Pictures in shards: what training draws from them, and what becomes of them when something breaks."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from beauty_bafe.commands.shards import shards
from beauty_bafe.data.catalog import Catalog, from_folder, from_shards, open_catalog
from beauty_bafe.data.datamodule import SaliencyDataModule
from beauty_bafe.data.pictures import read_picture
from beauty_bafe.data.places import BrokenShard, ShardMember, locate, stamp
from beauty_bafe.data.shards import make_shards
from beauty_bafe.retriever import Retriever

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shop(toy: Path, tmp_path: Path) -> Path:
    """Photos, one that is no picture, and one without a product, in folders, under names that are hard to keep."""
    names = ["ä 'b'.jpg", "a.b.c.JPG", "deep/__x__.jpg", "deep/" + 120 * "n" + ".jpg", "日本.jpg", 'q"uote,.jpg']
    files = sorted((toy / "gallery").iterdir())
    for name, file in zip([*names, *(f"p{number}.jpg" for number in range(8))], files, strict=False):
        (tmp_path / "shop" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shop" / name).write_bytes(file.read_bytes())
    (tmp_path / "shop" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "shop" / "scene.jpg").write_bytes(next((toy / "queries").iterdir()).read_bytes())
    return tmp_path / "shop"


def pack(pictures: Path, folder: Path, each: int = 5) -> Catalog:
    catalog = open_catalog(pictures)
    make_shards(catalog.ids, catalog.paths, folder, each)
    return open_catalog(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "lock"}


def times(folder: Path) -> list[int]:
    """When each tar and each list was written: two of each shard."""
    return [file.stat().st_mtime_ns for file in sorted(folder.glob("photos-*"))]


def test_shards_hold_the_files(shop: Path, tmp_path: Path) -> None:
    loose, packed = from_folder(shop), pack(shop, tmp_path / "shards")
    assert packed.ids == loose.ids
    assert [place.read_bytes() for place in packed.paths] == [path.read_bytes() for path in loose.paths]
    assert packed.fingerprint() == loose.fingerprint()
    assert sorted(content(tmp_path / "shards")) == [
        *(f"photos-{number:06d}.{kind}" for number in range(4) for kind in ("json", "tar")),
        "shards.json",
    ]


def test_any_reader_of_webdataset_finds_pictures_and_ids(shop: Path, tmp_path: Path) -> None:
    """Its rule: members that follow each other are one sample where their names are the same up to the first dot."""
    packed, found = pack(shop, tmp_path / "shards"), []
    for file in sorted((tmp_path / "shards").glob("*.tar")):
        with tarfile.open(file) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        names = list(members)
        for picture, about in zip(names[::2], names[1::2], strict=True):
            assert picture.partition(".")[0] == about.partition(".")[0] == f"{len(found):09d}"
            assert (picture.partition(".")[2], about.partition(".")[2]) == ("jpg", "json")
            found.append((json.loads(members[about])["id"], members[picture]))
    assert found == [(name, place.read_bytes()) for name, place in zip(packed.ids, packed.paths, strict=True)]


@pytest.fixture
def module(configure: Callable[..., DictConfig]) -> Callable[..., SaliencyDataModule]:
    def build(kind: str, root: Path, *overrides: str) -> SaliencyDataModule:
        words = [f"data={kind}", f"data.root={root}", "data.batch_size=4", "data.num_workers=0", *overrides]
        cfg = configure("train", *words)
        data = instantiate(cfg.data, augmentation=instantiate(cfg.augmentation), size=64, seed=cfg.seed)
        data.setup()
        return data

    return build


def drawn(data: SaliencyDataModule) -> list[dict[str, torch.Tensor]]:
    batches = []
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.batch_sampler.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        batches += list(loader)
    return batches + [batch for loader in data.val_dataloader() for batch in loader]


@pytest.mark.parametrize("overrides", [(), ("data.num_workers=2",), ("data.cache=CACHE",)])
def test_training_draws_the_samples_of_the_files(shop: Path, tmp_path: Path, module, overrides: tuple[str, ...]) -> None:
    pack(shop, tmp_path / "shards")
    words = [word.replace("CACHE", str(tmp_path / "cache")) for word in overrides]
    loose, packed = module("folder", shop), module("shards", tmp_path / "shards", *words)
    backgrounds = module("shards", tmp_path / "shards", *words, f"data.backgrounds={tmp_path / 'shards'}")
    assert [row[::2] for row in packed.skipped.rows] == [row[::2] for row in loose.skipped.rows], "ids and reasons"
    assert {row[0] for row in packed.skipped.unreadable} == {"broken"}
    for other, expected in ((packed, loose), (backgrounds, module("folder", shop, f"data.backgrounds={shop}"))):
        for ours, theirs in zip(drawn(other), drawn(expected), strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ("pictures", "masks", "row") if name in theirs)
    packed.load_state_dict(loose.state_dict())  # a run that began on the files goes on


def test_the_cache_inspects_no_photo_twice(shop: Path, tmp_path: Path, module, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(shop, tmp_path / "shards")
    cache = f"data.cache={tmp_path / 'cache'}"
    first = module("shards", tmp_path / "shards", cache)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("beauty_bafe.data.datamodule.inspect_photo", lambda path, **_: pytest.fail(f"{path} again"))
    again = module("shards", Path("shards"), cache)
    assert torch.equal(again.train_set[(0, 3)]["pictures"], first.train_set[(0, 3)]["pictures"])


def read(place: ShardMember) -> int:
    return int(read_picture(place).rgb.sum())


def test_processes_that_share_a_catalogue_share_no_position(shop: Path, tmp_path: Path) -> None:
    loose = from_folder(shop)
    rows = [row for row, name in enumerate(loose.ids) if name != "broken"]
    packed = pack(shop, tmp_path / "shards", each=100).subset(rows)
    expected = [read(place) for place in packed.paths]
    with ProcessPoolExecutor(2, get_context("fork")) as processes:
        assert list(processes.map(read, packed.paths * 20)) == expected * 20


def test_the_same_command_makes_what_is_lacking(
    shop: Path, tmp_path: Path, configure: Callable[..., DictConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    (shop / "list.csv").write_text(
        "id,path\n" + "".join(f"{number},p{number}.jpg\n" for number in range(8)) + "gone,gone.jpg\n", encoding="utf-8"
    )
    folder = tmp_path / "shards"
    words = [f"pictures={shop / 'list.csv'}", f"output_dir={folder}", "shard=3", "max_skipped=0.2"]
    assert shards(configure("shards", *words)) == 8
    assert list(csv.reader((folder / "skipped.csv").open()))[1] == ["gone", str(shop / "gone.jpg"), "no such file"]
    assert f"8 of 9 pictures are in {folder}; python train.py data=shards data.root={folder}" in capsys.readouterr().out
    assert open_catalog(folder).ids == tuple("01234567")
    whole = content(folder)

    (folder / "photos-000000.tar").unlink()
    (folder / "photos-000001.tar").write_bytes(whole["photos-000001.tar"][:-1])
    assert shards(configure("shards", *words)) == 8
    assert content(folder) == whole
    before = times(folder)
    (shop / "gone.jpg").write_bytes((shop / "p0.jpg").read_bytes())
    os.utime(shop / "p4.jpg", (1, 1))
    assert shards(configure("shards", *words)) == 9
    now = times(folder)
    assert [number for number in range(3) if now[2 * number] == before[2 * number]] == [0], "whose pictures are the same"
    assert not (folder / "skipped.csv").exists()
    assert open_catalog(folder).ids == (*"01234567", "gone")
    assert shards(configure("shards", *words)) == 9
    assert times(folder) == now, "nothing is made twice"

    assert shards(configure("shards", *words, "shard=5")) == 9
    assert len(list(folder.glob("*.tar"))) == 2, "those of smaller shards are gone"
    (shop / "gone.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"1 of 9 pictures cannot be read, more than max_skipped=0.1 allows.*gone.jpg: no such"
    ):
        shards(configure("shards", *words, "max_skipped=0.1"))


def test_killed_in_the_middle_and_the_same_command_again(
    shop: Path, tmp_path: Path, configure: Callable[..., DictConfig]
) -> None:
    """A pipe stands for a photo: whoever reads it waits."""
    pack(shop, tmp_path / "expected", each=2)
    pipe, aside, folder = shop / "p6.jpg", tmp_path / "aside.jpg", tmp_path / "shards"
    waiting = f"photos-{from_folder(shop).paths.index(pipe) // 2:06d}"
    pipe.rename(aside)
    os.mkfifo(pipe)
    words = [sys.executable, "-m", "beauty_bafe", "shards", f"pictures={shop}", f"output_dir={folder}", "shard=2"]
    run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not any(folder.glob(f"{waiting}.tar.*.part")) or not any(folder.glob("*.json")):
            assert run.poll() is None, "it ended before it was killed"
            time.sleep(0.05)
    finally:
        run.kill()
        run.wait()
    with pytest.raises(ValueError, match=r"contains no shards, or is incomplete; type beauty-bafe shards pictures=GALLERY"):
        from_shards(folder)
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("photos-*.json")}
    assert folder / f"{waiting}.json" not in kept
    pipe.unlink()
    aside.rename(pipe)
    assert shards(configure("shards", *words[4:])) == len(from_folder(shop))
    assert content(folder) == content(tmp_path / "expected"), "and nothing half written is left"
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_stopped_while_shards_are_replaced(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old and new shards are beside each other then, each of them whole."""
    pack(shop, tmp_path / "shards")
    for name in ("p0", "p7"):
        os.utime(shop / f"{name}.jpg", (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(
            "beauty_bafe.data.shards.zlib.crc32", Mock(side_effect=chain(5 * [0], repeat(OSError(28, "No space left"))))
        )
        with pytest.raises(OSError, match=r"could not write .*photos-\d+.tar': No space left; is the disk full"):
            pack(shop, tmp_path / "shards")
    with pytest.raises(ValueError, match="contains no shards, or is incomplete"):
        from_shards(tmp_path / "shards")
    assert pack(shop, tmp_path / "shards").ids == from_folder(shop).ids


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tar: tar.unlink(), r"photos-000001.tar' is missing; .*delete it and type beauty-bafe shards .* output_dir="),
        (lambda tar: tar.with_suffix(".json").unlink(), r"photos-000001.json' is missing"),
        (lambda tar: tar.write_bytes(tar.read_bytes()[:-512]), r"photos-000001.tar' has \d+ bytes instead of \d+; copy it"),
    ],
)
def test_a_shard_that_is_missing_or_cut_short(
    shop: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    pack(shop, tmp_path / "shards")
    spoil(tmp_path / "shards" / "photos-000001.tar")
    with pytest.raises(BrokenShard, match=message):
        open_catalog(tmp_path / "shards")


def test_other_bytes_are_no_picture_that_cannot_be_read(shop: Path, tmp_path: Path, module) -> None:
    """Training would else go on without it, or with another one."""
    pack(shop, tmp_path / "shards")
    tar = tmp_path / "shards" / "photos-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:900] + bytes([whole[900] ^ 1]) + whole[901:])
    with pytest.raises(
        BrokenShard, match=r"photos-000001.tar' contains other bytes in the place of 000000005.jpg; copy it again"
    ):
        module("shards", tmp_path / "shards")
    catalog = open_catalog(tmp_path / "shards")
    tar.unlink()
    with pytest.raises(BrokenShard, match="is missing"):
        catalog.read(5)


def test_shards_are_a_gallery(shop: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an index names its pictures, in a csv."""
    pack(shop, tmp_path / "shards")
    words = ["device=cpu", "precision=32-true", "max_skipped=0.5", "rehearsal.views=0"]
    loose, packed = (Retriever.build(tiny_checkpoint, place, words) for place in (shop, tmp_path / "shards"))
    photo = shop / "p3.jpg"
    assert [hit.score for hit in packed.search([photo])[0]] == [hit.score for hit in loose.search([photo])[0]]
    monkeypatch.chdir(tmp_path)
    packed = Retriever.build(tiny_checkpoint, "shards", words)
    packed.save(tmp_path / "kept")
    monkeypatch.chdir(shop)
    kept = Retriever.load(tmp_path / "kept")
    assert read_picture(kept.path("日本")).rgb.tobytes() == read_picture(shop / "日本.jpg").rgb.tobytes()


def test_a_place_is_found_again_by_its_name(tmp_path: Path) -> None:
    place = ShardMember(str(tmp_path / "a#1+2=3" / "photos-000001.tar"), "000000007.jpg", 512, 40, 7)
    assert locate(str(place), Path("elsewhere")) == place
    assert locate("photos-000001.tar/000000007.jpg#512+40=00000007", tmp_path / "a#1+2=3") == place
    assert (place.name, place.size, stamp(place)) == ("000000007.jpg", 40, "40-00000007")


def test_settings_that_make_no_sense(tmp_path: Path, configure: Callable[..., DictConfig]) -> None:
    with pytest.raises(ValueError, match=r"shards needs pictures=GALLERY, a folder of photos or a csv"):
        shards(configure("shards", f"output_dir={tmp_path}"))
    with pytest.raises(ValueError, match=r"shard=0: type the number of pictures per file, 1 or more"):
        shards(configure("shards", f"output_dir={tmp_path}", "pictures=P", "shard=0"))


def test_perfect500k_is_packed_by_its_list(shop: Path, tmp_path: Path, configure: Callable[..., DictConfig]) -> None:
    (tmp_path / "titles.csv").write_text("p5,Balm\np2,Cream\n", encoding="utf-8")
    words = [f"pictures={shop}", f"titles={tmp_path / 'titles.csv'}", f"output_dir={tmp_path / 'shards'}"]
    assert shards(configure("shards", *words)) == 2
    assert open_catalog(tmp_path / "shards").ids == ("p5", "p2")
