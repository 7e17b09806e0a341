"""Folders of images by class."""

from __future__ import annotations

from pathlib import Path

import pytest
from npeff.tasks.errors import TaskError
from npeff.tasks.tables import TableOptions


def images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def read(folder: Path, **options: str) -> list[tuple[str, ...]]:
    table = TableOptions(data=str(folder), **options).read(["image"])
    return [tuple(row.values()) for row in table.to_pylist()]


def test_subfolders_are_classes_and_paths_are_ids(tmp_path: Path) -> None:
    folder = images(tmp_path, "red/2.png", "red/1.JPG", "blue/1.png", "blue/notes.md", ".hidden/1.png")
    assert read(folder) == [
        ("blue/1.png", "blue/1.png", "blue"),
        ("red/1.JPG", "red/1.JPG", "red"),
        ("red/2.png", "red/2.png", "red"),
    ]


def test_a_split_is_a_folder_of_classes(tmp_path: Path) -> None:
    folder = images(tmp_path, "train/red/1.png", "test/red/1.png", "test/blue/2.png")
    assert read(folder, split="test") == [
        ("test/blue/2.png", "test/blue/2.png", "blue"),
        ("test/red/1.png", "test/red/1.png", "red"),
    ]


def test_images_without_subfolders_have_no_labels(tmp_path: Path) -> None:
    assert read(images(tmp_path, "1.png", "2.png")) == [("1.png", "1.png"), ("2.png", "2.png")]


def test_images_beside_the_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"images of its own, such as 3\.png, and subfolders with images"):
        read(images(tmp_path, "red/1.png", "3.png"))


def test_a_folder_of_neither_tables_nor_images(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"has no file ending in \.parquet, .*, and no images"):
        read(images(tmp_path, "red/1.txt"))
