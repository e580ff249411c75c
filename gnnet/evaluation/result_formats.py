"""How each benchmark's result file names the queries, and what stands in its lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath

import torch

from gnnet.files import parse_numbers, read_lines, write_at_once
from gnnet.geometry.pose import Pose
from gnnet.scenes.formats.poses import PoseLine, read_pose_lines, write_pose_file
from gnnet.scenes.index import open_scene
from gnnet.scenes.layouts.cmu_slice import parse_name
from gnnet.scenes.layouts.registry import DATASETS, reader_of
from gnnet.scenes.layouts.robotcar_models import CAMERAS
from gnnet.scenes.problems import BadInput
from gnnet.scenes.scene import Scene, SceneImage

_QUERY_LIST = "*quer*intrinsics*.txt"  # hloc's names for them


class ResultFormat:
    """How a benchmark's result file names the queries of a dataset; here, as the scene does.

    Args:
        dataset: one of `FORMATS`.
    """

    line = "qw qx qy qz tx ty tz"  # what follows a name
    queries: re.Pattern[str] | None = None  # names of queries that tell this benchmark from any other

    def __init__(self, dataset: str) -> None:
        self.dataset = dataset

    def submitted_name(self, name: str) -> str | None:
        """The name of a scene's image in the result file; None if the benchmark does not score it.

        Raises:
            ValueError: if it is no image's name of the dataset.
        """
        return name

    def name_error(self, name: str, source: str) -> str | None:
        """What is wrong with a name in the result file; `source` says where it stands."""
        return None

    def is_query(self, image: SceneImage) -> bool:
        """Whether an image that is no reference is a query."""
        return True

    def map_of(self, name: str) -> str:
        """Which map an image belongs to; the images of one map share a world."""
        return ""

    def write(self, path: str | Path, poses: Mapping[str, Pose]) -> None:
        """Write `cam_from_world` by the names of the file."""
        write_pose_file(path, poses)

    def read(self, path: str | Path, bad: BadInput) -> list[PoseLine]:
        """Read a result file line by line, as `read_pose_lines` does."""
        return read_pose_lines(path, bad)

    def open(self, root: Path, progress: bool) -> Scene:
        """The dataset at a folder, with its queries; nothing is written."""
        return open_scene(reader_of(self.dataset), root, on_bad="skip", progress=progress)


class RobotCarFormat(ResultFormat):
    """RobotCar Seasons: `rear/<timestamp>.jpg`, without the condition; left and right images are not scored."""

    def submitted_name(self, name: str) -> str | None:
        parts = PurePosixPath(name).parts
        if len(parts) != 3 or parts[1] not in CAMERAS:
            raise ValueError(f"query {name!r} is no image of {self.dataset}; expected <condition>/rear/<timestamp>.jpg")
        return f"rear/{parts[2]}" if parts[1] == "rear" else None

    def name_error(self, name: str, source: str) -> str | None:
        if re.fullmatch(r"rear/\d+\.jpg", name, re.ASCII) is not None:
            return None
        return f"{source} names {name!r}; expected rear/<timestamp>.jpg, without the condition, and no left or right"

    def open(self, root: Path, progress: bool) -> Scene:
        # The toy town is read as what it is on disk: its own reader may render another town over it.
        reader = partial(reader_of("robotcar"), test_queries=True)
        return open_scene(reader, root, on_bad="skip", progress=progress)


class CmuFormat(ResultFormat):
    """Extended CMU Seasons: the file's name without folders; each slice has a map of its own."""

    def submitted_name(self, name: str) -> str | None:
        return PurePosixPath(name).name

    def name_error(self, name: str, source: str) -> str | None:
        try:
            parse_name(name, source)
        except ValueError as error:
            return f"{error}, without folders"
        return None

    def is_query(self, image: SceneImage) -> bool:
        return "/database/" not in image.name  # of such an image without a pose, no file tells the pose

    def map_of(self, name: str) -> str:
        return PurePosixPath(name).parts[0]


class SevenScenesFormat(ResultFormat):
    """7-Scenes, which has no server: as hloc and the pseudo ground truth's evaluation name its frames."""

    def submitted_name(self, name: str) -> str | None:
        return re.sub(r"\.jpe?g$", ".png", name)

    def name_error(self, name: str, source: str) -> str | None:
        if re.fullmatch(r"([^/\s]+/)?seq-\d+/frame-\d+\.color\.png", name, re.ASCII) is not None:
            return None
        return f"{source} names {name!r}; expected seq-<number>/frame-<number>.color.png"


class FileNameFormat(ResultFormat):
    """Aachen Day-Night and InLoc at visuallocalization.net: the file's name without folders.

    Args:
        dataset: one of `FORMATS`.
        folder: of the queries, below `query/`.
    """

    def __init__(self, dataset: str, folder: str) -> None:
        super().__init__(dataset)
        self.queries = re.compile(rf"(.*/)?query/({folder})/.+")

    def submitted_name(self, name: str) -> str | None:
        return PurePosixPath(name).name

    def name_error(self, name: str, source: str) -> str | None:
        return f"{source} names {name!r}; expected the file's name without folders" if "/" in name else None

    def open(self, root: Path, progress: bool) -> Scene:
        """The queries that lists name or that lie in `query/`; the references, if `root` is a COLMAP folder too."""
        lists = [root] if root.is_file() else [*root.glob(_QUERY_LIST), *root.glob(f"*/{_QUERY_LIST}")]
        names = [line.words[0] for file in sorted(lists) for line in read_lines(file, "hloc's query list")]
        names = names or [str(p.relative_to(root)) for p in sorted((root / "query").rglob("*.*")) if p.is_file()]
        if not names:
            raise FileNotFoundError(f"{root} holds no query; expected lists {_QUERY_LIST}, or images below query/")
        images = {name: SceneImage(name, root / name, "") for name in names}
        with suppress(OSError, ValueError):  # no COLMAP folder
            images = {**open_scene(reader_of("colmap"), root, on_bad="skip", progress=progress).images, **images}
        return Scene(self.dataset, images, ())


class Eth3dFormat(ResultFormat):
    """ETH3D's SLAM benchmark: a trajectory, `timestamp tx ty tz qx qy qz qw` with world_from_cam, in time's order."""

    line = "tx ty tz qx qy qz qw"
    queries = re.compile(r"(.*/)?rgb/\d+\.\d+\.png", re.ASCII)

    def submitted_name(self, name: str) -> str | None:
        return PurePosixPath(name).stem

    def name_error(self, name: str, source: str) -> str | None:
        if re.fullmatch(r"\d+(\.\d+)?", name, re.ASCII) is not None:
            return None
        return f"{source} names {name!r}; expected the timestamp of rgb/<timestamp>.png"

    def write(self, path: str | Path, poses: Mapping[str, Pose]) -> None:
        lines = []
        for name in sorted(poses, key=float):
            pose = poses[name].inverse()
            numbers = [*pose.translation.tolist(), *pose.quaternion()[[1, 2, 3, 0]].tolist()]
            lines.append(f"{name} {' '.join(map(repr, numbers))}\n")
        write_at_once(path, "".join(lines).encode())

    def read(self, path: str | Path, bad: BadInput) -> list[PoseLine]:
        expected, found = f"timestamp {self.line} a line, in time's order", list[PoseLine]()
        for number, words, source in read_lines(Path(path), expected):
            with bad.skipping():
                values = parse_numbers(words, 8, source, expected)
                if found and values[0] <= float(found[-1].name):
                    raise ValueError(f"{source} is not later than the line before it; expected {expected}")
                if not values[4:].any():
                    raise ValueError(f"{source} has the quaternion 0 0 0 0, which is no rotation; expected {expected}")
                q, t = torch.from_numpy(values[[7, 4, 5, 6]]), torch.from_numpy(values[1:4])
                pose, length = Pose.from_quaternion(q, t).inverse(), float(q.norm())
                found.append(PoseLine(number, words[0], length * pose.quaternion().numpy(), pose.translation.numpy()))
        return found

    def open(self, root: Path, progress: bool) -> Scene:
        lines = read_lines(root / "rgb.txt", "ETH3D's list of images, timestamp and name a line")
        names = [f"rgb/{line.words[0]}.png" for line in lines]
        return Scene(self.dataset, {name: SceneImage(name, root / name, "") for name in names}, ())


_OF_DATASET = {"robotcar": RobotCarFormat, "toy": RobotCarFormat, "cmu": CmuFormat, "sevenscenes": SevenScenesFormat}
_BENCHMARKS = {
    "aachen": FileNameFormat("aachen", "day|night"),
    "inloc": FileNameFormat("inloc", "iphone7"),
    "eth3d": Eth3dFormat("eth3d"),
}
FORMATS = (*DATASETS, *_BENCHMARKS)


def format_of(dataset: str, names: Iterable[str] = ()) -> ResultFormat:
    """The form of a result file.

    Args:
        dataset: one of `FORMATS`; empty for hloc's.
        names: of a COLMAP folder's queries, which tell the benchmark that it is of.

    Raises:
        ValueError: an unknown dataset.
    """
    if dataset and dataset not in FORMATS:
        raise ValueError(f"dataset {dataset!r} is not known; expected one of {', '.join(FORMATS)}")
    names = list(names) if dataset == "colmap" else []
    for form in _BENCHMARKS.values():
        if form.dataset == dataset or (names and form.queries and all(map(form.queries.fullmatch, names))):
            return form
    return _OF_DATASET.get(dataset, ResultFormat)(dataset)
