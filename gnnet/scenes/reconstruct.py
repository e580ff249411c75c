"""`python -m gnnet.scenes.reconstruct IMAGES OUT`: a COLMAP model of a folder of photographs, to localize on."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from gnnet.files import new_folder
from gnnet.scenes.formats.images import image_files, open_image, stored_size

if TYPE_CHECKING:
    from pycolmap import Database

Cameras = Literal["auto", "single", "each"]

_FOCAL_LENGTH, _EXIF = 0x920A, 0x8769  # tags
_NEIGHBOURS, _SIMILAR = 10, 20  # images that one is matched with where not all pairs are matched
_ADVICE = "take more photographs, each of which shows two thirds of what the one before it shows, all sharp"


class Reconstructed(NamedTuple):
    """What `reconstruct` made: the images that have a pose, those that have none, 3D points, and their mean error."""

    registered: tuple[str, ...]
    left_out: tuple[str, ...]
    points: int
    error_pixels: float

    def __str__(self) -> str:
        others = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        count = len(self.registered)
        return (
            f"{count} of {count + len(self.left_out)} images, {self.points} points, mean reprojection error "
            f"{self.error_pixels:.2f} px{others}"
        )


def reconstruct(
    images: str | Path,
    output: str | Path,
    *,
    cameras: Cameras = "auto",
    exhaustive: int = 80,
    largest_side: int = 1600,
    progress: bool = True,
) -> Reconstructed:
    """Write a COLMAP model of photographs: SIFT, matches, incremental mapping. The largest model is kept.

    Args:
        images: folder of the photographs.
        output: folder to write `sparse` into, beside a link `images` to the photographs.
        cameras: `single`: all images share their intrinsics; `each`: none do; `auto`: they do if all have one size and
            one focal length in their EXIF data.
        exhaustive: up to so many images, all pairs are matched; of more, each image with its neighbours by name and
            with those whose SIFT descriptors are most alike.
        largest_side: SIFT sees the images shrunk to it, in pixels.
        progress: print a line for each stage.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
        FileExistsError: if the output has a model already.
        ValueError: if fewer than three images can be placed.
    """
    from gnnet.colmap import pycolmap  # slow to import

    images, output = Path(images).absolute(), Path(output).absolute()
    names = [path.name for path in image_files(images)] if images.is_dir() else []
    if len(names) < 3:
        raise FileNotFoundError(f"{images} holds {len(names)} image files; expected a folder of three or more")
    if (output / "sparse").exists():
        raise FileExistsError(f"{output / 'sparse'} exists; take it away, or name another folder")
    link = output / "images"
    if link.resolve() != images.resolve() and (link.exists() or link.is_symlink()):
        raise FileExistsError(f"{link} exists and is not {images}; name another folder")
    output.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        if progress:
            print(text, flush=True)

    single = cameras == "single" or (cameras == "auto" and _one_camera(images, names))
    with TemporaryDirectory(dir=output, prefix=".reconstruct-") as folder:
        database = Path(folder, "database.db")
        say(f"{len(names)} images, {'one camera' if single else 'a camera each'}: SIFT …")
        extraction = pycolmap.FeatureExtractionOptions()
        extraction.max_image_size = largest_side
        mode = pycolmap.CameraMode.SINGLE if single else pycolmap.CameraMode.PER_IMAGE
        pycolmap.extract_features(database, images, names, camera_mode=mode, extraction_options=extraction)
        if len(names) <= exhaustive:
            say(f"matching all {len(names) * (len(names) - 1) // 2} pairs …")
            pycolmap.match_exhaustive(database)
        else:
            pairs = Path(folder, "pairs.txt")
            with pycolmap.Database.open(database) as opened:
                listed = _likely_pairs(opened)
            pairs.write_text("".join(f"{a} {b}\n" for a, b in listed))
            say(f"matching {len(listed)} pairs …")
            pycolmap.match_image_pairs(database, pairing_options=pycolmap.ImportedPairingOptions(match_list_path=pairs))
        with pycolmap.Database.open(database) as opened:
            matched = len(opened.read_two_view_geometry_num_inliers()[1])
        if matched == 0:
            raise ValueError(f"no two of the {len(names)} images in {images} match: they have no overlap; {_ADVICE}")
        say(f"{matched} pairs match: poses and points …")
        options = pycolmap.IncrementalPipelineOptions(min_model_size=max(3, min(10, len(names) // 2)), random_seed=0)
        # Of a walk straight ahead, COLMAP's defaults (0.95, 16°) find no two images to begin with, or bad ones.
        options.mapper.init_max_forward_motion, options.mapper.init_min_tri_angle = 1.0, 4.0
        models = pycolmap.incremental_mapping(database, images, Path(folder, "models"), options)
        best = max(models.values(), key=lambda model: model.num_reg_images(), default=None)
        registered = {i.name for i in best.images.values() if i.has_pose} if best is not None else set()
        if best is None or len(registered) < 3:
            raise ValueError(
                f"{len(registered)} of the {len(names)} images in {images} could be placed, and {matched} pairs match; "
                f"{_ADVICE}{'' if single else ', or say that one camera took them (--cameras single)'}"
            )
        with new_folder(output / "sparse") as sparse:
            sparse.mkdir()
            best.write(sparse)
    if link.resolve() != images.resolve():
        os.symlink(images, link, target_is_directory=True)
    left_out = tuple(name for name in names if name not in registered)
    error = best.compute_mean_reprojection_error()
    return Reconstructed(tuple(sorted(registered)), left_out, best.num_points3D(), error)


def _one_camera(images: Path, names: Sequence[str]) -> bool:
    """Whether all images have one size and, in their EXIF data, one focal length or none."""
    kinds = set()
    for name in names:
        try:
            with open_image(images / name) as image:
                kinds.add((stored_size(image), image.getexif().get_ifd(_EXIF).get(_FOCAL_LENGTH)))
        except (OSError, ValueError):  # COLMAP leaves it out
            continue
    return len(kinds) == 1


def _likely_pairs(database: Database) -> list[tuple[str, str]]:
    """Pairs of image names: neighbours by name, and images whose VLAD of SIFT descriptors is most alike."""
    images = sorted(database.read_all_images(), key=lambda image: image.name)
    described = [np.asarray(database.read_descriptors(image.image_id).data, np.float32) for image in images]
    random = np.random.default_rng(0)
    pool = np.concatenate([d[random.permutation(len(d))[:200]] for d in described])
    centers = pool[random.permutation(len(pool))[:64]]
    similar = np.stack([_vlad(d, centers) for d in described])
    similar = similar @ similar.T
    np.fill_diagonal(similar, -np.inf)
    best = np.argsort(-similar, axis=1, kind="stable")[:, :_SIMILAR]
    count = len(images)
    chosen = {(a, b) for a in range(count) for b in range(a + 1, min(a + 1 + _NEIGHBOURS, count))}
    chosen |= {(min(a, int(b)), max(a, int(b))) for a in range(count) for b in best[a]}
    return [(images[a].name, images[b].name) for a, b in sorted(chosen)]


def _vlad(descriptors: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """One unit vector for an image: by centre, the sum of what its descriptors (N, 128) differ from it."""
    nearest = (descriptors @ centers.T - 0.5 * (centers**2).sum(1)).argmax(1)
    total = np.zeros_like(centers)
    np.add.at(total, nearest, descriptors - centers[nearest])
    total /= np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-6)
    return total.ravel() / max(float(np.linalg.norm(total)), 1e-6)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on arguments (those of the process by default); returns the exit status."""
    from gnnet.colmap import pycolmap  # slow to import

    parser = argparse.ArgumentParser(
        prog="python -m gnnet.scenes.reconstruct", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("images", metavar="IMAGES", help="folder of the photographs")
    parser.add_argument("output", metavar="OUT", help="folder to write sparse/ into, beside a link to the photographs")
    parser.add_argument("--cameras", choices=("auto", "single", "each"), default="auto", help="who shares intrinsics")
    parser.add_argument("--exhaustive", type=int, default=80, metavar="N", help="match all pairs of up to N images")
    parser.add_argument("--largest-side", type=int, default=1600, metavar="PX", help="SIFT sees images shrunk to it")
    given = parser.parse_args(argv)
    pycolmap.logging.minloglevel = pycolmap.logging.ERROR.value
    try:
        made = reconstruct(
            given.images, given.output,
            cameras=given.cameras, exhaustive=given.exhaustive, largest_side=given.largest_side,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{made}\nwritten to {given.output}: localize on it with dataset=colmap dataset.root={given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
