"""Folders of images, with a subfolder for each class: ``images/red/1.png``."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from npeff.tasks.errors import TaskError

IMAGE, LABEL = "image", "label"
"""Columns of the table of a folder of images: the path of each image in the folder, and the name of its class."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


def image_table(folder: Path, split: str | None = None) -> pa.Table | None:
    """Return the table of a folder of images, ordered by path; None if the folder has no images.

    Args:
        folder: The folder. Its subfolders are classes. If it has no subfolders with images, the images in it are
            examples without labels.
        split: Subfolder that contains the classes.

    Raises:
        TaskError: There are images both in the folder and in subfolders.
    """
    top = folder if split is None else folder / split
    if not top.is_dir():
        return None
    own, classes = _images(top), {each: _images(each) for each in sorted(top.iterdir()) if _is_class(each)}
    images = [image for each in classes.values() for image in each]
    if own and images:
        problem = f"{top} has images of its own, such as {own[0].name}, and subfolders with images"
        raise TaskError(problem, "put every image into the subfolder of its class")
    if not own and not images:
        return None
    paths = [str(path.relative_to(folder)) for path in own or images]
    columns = {IMAGE: pa.array(paths, pa.string())}
    if images:
        columns[LABEL] = pa.array([path.parent.name for path in images], pa.string())
    return pa.table(columns)


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
