from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from beauty_bafe.data.catalog import Catalog, Skipped, from_folder, from_perfect500k, open_catalog


def test_folder_is_searched_through_and_ids_are_stems(tmp_path: Path, write_picture: Callable[..., Path]) -> None:
    for name in ("b/a.b.jpg", "c.PNG", ".hidden/x.jpg", "b/d/e.webp"):
        write_picture(name)
    (tmp_path / "notes.txt").write_text("no picture")
    catalog = open_catalog(tmp_path)
    assert catalog.ids == ("a.b", "e", "c")
    assert [path.name for path in catalog.paths] == ["a.b.jpg", "e.webp", "c.PNG"]


def test_two_files_with_one_id_are_refused_and_both_named(tmp_path: Path, write_picture: Callable[..., Path]) -> None:
    first, second = write_picture("x/p1.jpg"), write_picture("y/p1.png")
    with pytest.raises(ValueError, match="'p1'") as error:
        from_folder(tmp_path)
    assert str(first) in str(error.value)
    assert str(second) in str(error.value)


def test_folder_without_pictures_lists_the_supported_suffixes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no pictures under .*\.jpg"):
        from_folder(tmp_path)


def test_unreadable_folder_stops(tmp_path: Path, write_picture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture("open/a.jpg")
    locked = write_picture("locked/b.jpg").parent
    scandir = os.scandir

    def refuse(path: os.PathLike[str]) -> object:  # root may read anything, so the refusal is played
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"cannot read the folder .*locked.*permissions"):
        from_folder(tmp_path)


@pytest.mark.parametrize(("name", "found"), [("nothing", "does not exist"), ("a.txt", "neither a folder nor a .csv")])
def test_open_catalog_says_what_it_takes(tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=f"{found}.*id,path"):
        open_catalog(tmp_path / name)


def test_csv_paths_start_at_the_csv(tmp_path: Path, write_picture: Callable[..., Path]) -> None:
    picture = write_picture("pictures/1.jpg")
    file = tmp_path / "list.csv"
    file.write_text(
        "path,title,id\r\npictures/1.jpg,a cream,sku-1\r\n\r\npictures/2.jpg,a balm,sku-2\r\n", encoding="utf-8-sig"
    )
    catalog = open_catalog(file)
    assert catalog.ids == ("sku-1", "sku-2")
    assert catalog.paths[0] == picture


def test_csv_without_the_columns_names_them(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("name,url\na,b\n")
    with pytest.raises(ValueError, match=r"columns name,url; one of them must be called id"):
        open_catalog(file)
    file.write_text("id,path\n")
    with pytest.raises(ValueError, match="no rows below its header"):
        open_catalog(file)


@pytest.mark.parametrize("layout", ["", "group1/"])
def test_perfect500k_flat_and_in_groups(tmp_path: Path, write_picture: Callable[..., Path], layout: str) -> None:
    write_picture(f"pictures/{layout}n0292431.jpg")
    write_picture(f"pictures/{layout}n0000001.jpg")
    titles = tmp_path / "titles.csv"
    titles.write_text('n0292431,"Lipstick, red"\nn0000007,Gone\n')
    catalog = from_perfect500k(tmp_path / "pictures", titles)
    assert catalog.ids == ("n0292431", "n0000007")
    assert catalog.paths[0].is_file()
    assert not catalog.paths[1].exists()
    titles.write_text("Image ID,Title\nn0000001.jpg,Balm\n")
    assert from_perfect500k(tmp_path / "pictures", titles).ids == ("n0000001",)


def test_perfect500k_of_another_folder_is_refused(tmp_path: Path, write_picture: Callable[..., Path]) -> None:
    write_picture("pictures/a.jpg")
    (tmp_path / "titles.csv").write_text("n1,x\nn2,y\n")
    with pytest.raises(ValueError, match="none of the 2 ids"):
        from_perfect500k(tmp_path / "pictures", tmp_path / "titles.csv")


def test_skipped_is_written_and_stops_above_the_share(tmp_path: Path) -> None:
    catalog = Catalog(("a", "b", "c"), (Path("a.jpg"), Path("b.jpg"), Path("c.jpg")))
    skipped, file = Skipped(), tmp_path / "skipped.csv"
    skipped.add(catalog, 1, "cut short, sadly")
    skipped.add(catalog, 2, "mask not trusted", unreadable=False)
    skipped.write(file)
    assert file.read_text().splitlines() == ["id,path,reason", 'b,b.jpg,"cut short, sadly"', "c,c.jpg,mask not trusted"]
    skipped.check(total=10, max_share=0.1, what="pictures", setting="max_skipped")
    with pytest.raises(ValueError, match=r"1 of 9 pictures cannot be read.*max_skipped=0.1.*b.jpg: cut short.*skipped.csv"):
        skipped.check(total=9, max_share=0.1, what="pictures", setting="max_skipped")
    Skipped().write(file)
    assert not file.exists()
