"""`python -m gnnet.scenes DATASET ROOT`: what a dataset holds, and whether it can be trained on."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gnnet.evaluation.inspect.contact_sheet import draw_dataset
from gnnet.evaluation.inspect.inspection import inspect_scene
from gnnet.evaluation.inspect.tables import print_inspection, write_inspection
from gnnet.scenes.index import open_scene
from gnnet.scenes.layouts.registry import DATASETS, reader_of
from gnnet.scenes.scene import Scene

_GIVEN = ("root", "on_bad", "progress")  # arguments of readers that --set does not reach

_EXAMPLES = """\
examples:
  python -m gnnet.scenes robotcar /data/RobotCar-Seasons --set "cameras=[rear]" --figures out/
  python -m gnnet.scenes cmu /data/Extended-CMU-Seasons --set "slices=[2,3]" --all
  python -m gnnet.scenes colmap /data/reconstruction --set places=8 --json out/inspection.json

Exit status: 0 if the dataset can be trained on, 1 if not, 2 for wrong usage."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on arguments (those of the process by default); returns the exit status.

    Raises:
        SystemExit: with status 2 for wrong usage, 0 for --help.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    settings = _settings(arguments.set, parser)
    reader = _reader(arguments.dataset, settings, parser)
    progress = not arguments.quiet
    try:
        scene = open_scene(partial(reader, **settings), arguments.root, on_bad="skip", progress=progress)
    except (OSError, ValueError) as error:
        print(f"{error}\n\ncan be trained on: no, because it cannot be read")
        return 1
    except (TypeError, AttributeError) as error:
        if not settings:
            raise
        parser.error(f"--set: {arguments.dataset} cannot take {settings}: {error}")
    pairs, images = (None, None) if arguments.all else (arguments.pairs, arguments.images)
    inspection = inspect_scene(scene, pairs=pairs, images=images, progress=progress)
    if arguments.figures is not None:
        for path in draw_dataset(scene, inspection, arguments.figures, progress=progress):
            print(f"figure: {path}")
    if arguments.json is not None:
        given = {"dataset": arguments.dataset, "root": str(arguments.root), "settings": settings}
        write_inspection(inspection, arguments.json, **given)
    print_inspection(inspection)
    return 0 if inspection.training.yes else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gnnet.scenes",
        description="Tell what a dataset holds, how good its correspondences are, and whether it can be trained on.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", choices=DATASETS, metavar="DATASET", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("root", type=Path, metavar="ROOT", help="the dataset's folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="argument of the dataset's reader, as in YAML; may be repeated (a key it does not know lists all)",
    )  # fmt: skip
    parser.add_argument("--pairs", type=_positive, default=200, metavar="N", help="pairs to read (default 200)")
    parser.add_argument("--images", type=_positive, default=200, metavar="N", help="images to decode (default 200)")
    parser.add_argument("--all", action="store_true", help="read every pair and every image")
    parser.add_argument("--figures", type=Path, metavar="OUT", help="folder to write pictures of the dataset to")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same numbers, and all problems, as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} given; expected 1 or more")
    return number


def _settings(texts: Sequence[str], parser: argparse.ArgumentParser) -> dict:
    settings: dict = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            parser.error(f"--set {text}: expected KEY=VALUE, such as places=8 or cameras=[rear]")
        try:
            given = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
        except (YAMLError, OmegaConfBaseException) as error:
            parser.error(f"--set {text}: {value!r} is no YAML value ({str(error).splitlines()[0]})")
        assert isinstance(given, dict)
        settings |= given
    return settings


def _reader(dataset: str, settings: dict, parser: argparse.ArgumentParser) -> Callable[..., Scene]:
    reader = reader_of(dataset)
    known = {name: p for name, p in inspect.signature(reader).parameters.items() if name not in _GIVEN}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        listed = ", ".join(f"{name}={parameter.default}" for name, parameter in known.items())
        parser.error(f"--set: {dataset} has no argument {', '.join(unknown)}; it has {listed or 'none'}")
    return reader
