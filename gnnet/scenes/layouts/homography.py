"""Any folder of photographs, each paired with itself: training warps and lights it twice, for pretraining."""

from __future__ import annotations

from pathlib import Path

from gnnet.scenes.formats.images import IMAGE_SUFFIXES
from gnnet.scenes.problems import OnBad
from gnnet.scenes.scene import Pair, Scene, SceneImage

READER_VERSION = 1  # raise it when the same files make another scene, so that their index is made anew


def load_homography(root: str | Path, *, on_bad: OnBad = "raise", progress: bool = True) -> Scene:
    """Pair every image below a folder, at any depth, with itself.

    A folder is a place; where all images are in one folder, each image is a place.

    Args:
        root: the folder.
        on_bad, progress: taken as by the other readers, but without effect, as nothing is read but names.

    Raises:
        FileNotFoundError: if the folder holds no image.
    """
    root = Path(root)
    found = sorted(
        p for p in root.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in p.relative_to(root).parts)
        and p.is_file()
    )  # fmt: skip
    if not found:
        raise FileNotFoundError(
            f"{root.absolute()} holds no image (dataset.root); expected\n"
            f"  <dataset.root>/**/*{{{','.join(IMAGE_SUFFIXES)}}}   any photographs"
        )
    names = [p.relative_to(root).as_posix() for p in found]
    single = len({p.parent for p in found}) == 1
    images = {
        name: SceneImage(name, path, "photo", name if single else path.parent.relative_to(root).as_posix())
        for name, path in zip(names, found, strict=True)
    }
    pairs = [Pair(name, name, image.place, static=True) for name, image in images.items()]
    return Scene("homography", images, pairs, dataset="homography")
