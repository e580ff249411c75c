"""What a dataset holds, measured on its scene: images, pairs, correspondences, and how well these agree with the poses.

Correspondences are compared with something that they were not made from: 3D points are projected into both
images, listed correspondences are compared with the epipolar lines of the poses, and where depth or a fixed
camera gave them, the images themselves are matched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gnnet.data.agreement import LARGEST_ERROR, ImageErrors, errors_in_images
from gnnet.data.images import read_view
from gnnet.data.queries import localization_samples
from gnnet.evaluation.inspect.pairs import PairMeasure, PairReader, describe, measure_pair
from gnnet.progress import track
from gnnet.sampling import evenly
from gnnet.scenes.formats.images import image_size
from gnnet.scenes.scene import Scene, SceneImage

_PIXELS_PER_IMAGE = 20_000  # looked at for mean and standard deviation


@dataclass(frozen=True)
class ImageGroup:
    """Images of one condition and size: how many there are, and how many of them have what.

    Args:
        size: width and height in pixels, (0, 0) where it could not be read.
        focal: smallest and largest focal length in pixels; None without cameras.
        cameras: number of different intrinsics.
    """

    condition: str
    size: tuple[int, int]
    focal: tuple[float, float] | None
    cameras: int
    images: int
    references: int
    posed: int
    with_depth: int
    with_points: int


@dataclass(frozen=True)
class Distribution:
    """Minimum, quartiles, maximum of some numbers, and how many (K,) lie between round `edges` (K + 1,)."""

    minimum: float
    quartiles: tuple[float, float, float]
    maximum: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class PairGroup:
    """Pairs of two conditions, and medians over the `measured` ones of them; nan where unknown.

    Args:
        correspondences, spread, overlap: of a pair, see `PairMeasure`.
        error_px: of all errors of correspondences in pixels; nan where they are measured on images.
    """

    conditions: tuple[str, str]
    pairs: int
    measured: int
    correspondences: float
    spread: float
    overlap: float
    error_px: float


@dataclass(frozen=True)
class Agreement:
    """Errors of the correspondences of some pairs in pixels, and the share of at most 3; `how` they were measured."""

    how: str
    pairs: int
    median_px: float
    within_3_px: float


@dataclass(frozen=True)
class Colours:
    """Mean and standard deviation of red, green and blue in [0, 1] over some images, and how many these are."""

    images: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Answer:
    """Whether something can be done with the dataset, and why."""

    yes: bool
    reason: str


@dataclass(frozen=True)
class Inspection:
    """All that is known of a dataset; distributions are None where no pair could be measured."""

    scene: str
    places: int
    points: int
    images: tuple[ImageGroup, ...]
    pairs: tuple[PairGroup, ...]
    correspondences: Distribution | None
    spread: Distribution | None
    overlap: Distribution | None
    agreement: tuple[Agreement, ...]
    colours: Colours | None
    pairs_read: int
    images_read: int
    problems: tuple[str, ...]
    localization: Answer
    split: Answer
    training: Answer


def inspect_scene(
    scene: Scene, *, pairs: int | None = 200, images: int | None = 200, progress: bool = True
) -> Inspection:
    """Measure a scene.

    Args:
        scene: as a reader gives it.
        pairs: number of pairs to read at most, evenly spread over the list; None reads all.
        images: number of images to decode at most, likewise.
        progress: show progress bars.
    """
    sizes, problems = _sizes(scene.images.values())
    reader = PairReader(scene, sizes)
    measures: dict[int, PairMeasure] = {}
    errors: dict[str, list[np.ndarray]] = {}
    broken: list[str] = []
    chosen = evenly(len(scene.pairs), pairs, np.random.default_rng(0)).tolist()
    for index in track(chosen, "Reading correspondences", show=progress):
        pair = scene.pairs[index]
        try:
            measures[index], outside = measure_pair(reader, pair)
        except Exception as error:  # whatever it is, it would end training
            broken.append(f"{describe(pair)}: {error}")
            continue
        problems += outside
        how = measures[index].how
        if how is not None:
            errors.setdefault(how, []).append(measures[index].errors)
    matched = errors_in_images(scene, progress=progress)
    errors |= matched.errors
    agreement = tuple(
        Agreement(how, len(found), _median(pooled := np.concatenate(found)), float(np.mean(pooled <= 3)))
        for how, found in errors.items()
    )
    colours, unreadable, decoded = _colours(scene, images, progress)
    counts = [m.correspondences for m in measures.values()]
    return Inspection(
        scene=scene.name,
        places=len(scene.places),
        points=len(scene.points),
        images=_group_images(scene, sizes),
        pairs=_group_pairs(scene, measures),
        correspondences=distribution(counts),
        spread=distribution([m.spread for m in measures.values()]),
        overlap=distribution([m.overlap for m in measures.values()]),
        agreement=agreement,
        colours=colours,
        pairs_read=len(chosen),
        images_read=decoded,
        problems=tuple(dict.fromkeys([*scene.problems, *problems, *broken, *unreadable])),
        localization=_can_localize(scene),
        split=_can_split(scene),
        training=_can_train(
            scene, counts, len(broken), len(unreadable), decoded, _contradiction(agreement, matched, sizes)
        ),
    )


def distribution(values: Sequence[float]) -> Distribution | None:
    """The distribution of some numbers, with at most ten bins of a round width; None where there are none."""
    if len(values) == 0:
        return None
    low, *quartiles, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
    width = _round_up((high - low) / 8 or max(abs(high), 1.0))
    first = np.floor(low / width)
    edges = (first + np.arange(max(1, int(np.ceil(high / width) - first)) + 1)) * width
    counts = np.histogram(values, edges)[0]
    return Distribution(low, tuple(quartiles), high, tuple(np.round(edges, 9).tolist()), tuple(counts.tolist()))


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, … (and of their tenths, hundredths, …)."""
    power = 10.0 ** np.floor(np.log10(value))
    return next(float(step * power) for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))


def _group_images(scene: Scene, sizes: dict[str, tuple[int, int]]) -> tuple[ImageGroup, ...]:
    """Counts of images by condition and size, the references first."""
    groups: dict[tuple[str, tuple[int, int]], list[SceneImage]] = {}
    for image in scene.images.values():
        groups.setdefault((image.condition, sizes.get(image.name, (0, 0))), []).append(image)
    result = []
    for (condition, size), members in sorted(groups.items()):
        cameras = sorted({tuple(image.camera.parameters.tolist()) for image in members if image.camera is not None})
        result.append(
            ImageGroup(
                condition=condition,
                size=size,
                focal=(cameras[0][0], cameras[-1][0]) if cameras else None,
                cameras=len(cameras),
                images=len(members),
                references=sum(image.is_reference for image in members),
                posed=sum(image.cam_from_world is not None for image in members),
                with_depth=sum(image.depth is not None for image in members),
                with_points=sum(image.point_ids is not None and len(image.point_ids) > 0 for image in members),
            )
        )
    return tuple(sorted(result, key=lambda group: group.references == 0))


def condition_pairs(scene: Scene) -> dict[tuple[str, str], list[int]]:
    """Indices of the pairs of each two conditions (a ↔ b and b ↔ a are one), the most frequent first."""
    condition = {image.name: image.condition for image in scene.images.values()}
    groups: dict[tuple[str, str], list[int]] = {}
    for index, pair in enumerate(scene.pairs):
        first, second = sorted((condition[pair.image_a], condition[pair.image_b]))
        groups.setdefault((first, second), []).append(index)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _group_pairs(scene: Scene, measures: dict[int, PairMeasure]) -> tuple[PairGroup, ...]:
    groups = []
    for conditions, indices in condition_pairs(scene).items():
        members = [measures[index] for index in indices if index in measures]
        groups.append(
            PairGroup(
                conditions=conditions,
                pairs=len(indices),
                measured=len(members),
                correspondences=_median([m.correspondences for m in members]),
                spread=_median([m.spread for m in members]),
                overlap=_median([m.overlap for m in members]),
                error_px=_median([error for m in members for error in m.errors]),
            )
        )
    return tuple(groups)


def _median(values: Sequence[float] | np.ndarray) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def _sizes(images: Iterable[SceneImage]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Width and height of each image, its camera's or else the file's; and what is wrong with those not read."""
    sizes, problems = {}, []
    for image in images:
        try:
            size = image_size(image.path) if image.camera is None else image.camera.size.round().int().tolist()
            sizes[image.name] = tuple(size)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return sizes, problems


def _colours(scene: Scene, limit: int | None, progress: bool) -> tuple[Colours | None, list[str], int]:
    """Mean and standard deviation over decoded images, problems with these, and how many were tried."""
    names = list(scene.images)
    chosen = [names[i] for i in evenly(len(names), limit, np.random.default_rng(0))]
    total, squares, pixels, count, problems = np.zeros(3), np.zeros(3), 0, 0, []
    for name in track(chosen, "Decoding images", show=progress):
        try:
            content = read_view(scene.images[name]).pixels
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        # Every so many pixels, as means over blocks would have a smaller standard deviation.
        step = max(1, int((content[0].numel() / _PIXELS_PER_IMAGE) ** 0.5))
        values = content[:, ::step, ::step].double().flatten(1).numpy() / 255
        total, squares = total + values.sum(1), squares + (values**2).sum(1)
        pixels, count = pixels + values.shape[1], count + 1
    if count == 0:
        return None, problems, len(chosen)
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
    return Colours(count, tuple(mean.tolist()), tuple(std.tolist())), problems, len(chosen)


def _can_localize(scene: Scene) -> Answer:
    try:
        samples = localization_samples(scene)
    except ValueError as error:
        return Answer(False, str(error))
    by_condition = Counter(scene.images[sample.query].condition for sample in samples)
    listed = ", ".join(f"{condition} {count}" for condition, count in by_condition.most_common())
    return Answer(True, f"{len(samples)} queries have a pose and a reference image ({listed})")


def _can_split(scene: Scene) -> Answer:
    if len(scene.places) < 2:
        return Answer(False, "it is one place; give another dataset for validation (dataset.validation_root)")
    with_pairs = {pair.place for pair in scene.pairs}
    return Answer(True, f"it has {len(scene.places)} places, {len(with_pairs)} of them with pairs")


def _can_train(
    scene: Scene, counts: Sequence[int], broken: int, unreadable: int, decoded: int, contradiction: str | None
) -> Answer:
    """Whether there is enough to train on, by the numbers of correspondences of the pairs read, and what failed."""
    if not scene.pairs:
        return Answer(False, "it holds no pair of images")
    if broken >= len(counts):
        return Answer(False, f"{broken} of the {broken + len(counts)} pairs read cannot be used")
    if 2 * unreadable >= decoded:
        return Answer(False, f"{unreadable} of the {decoded} images decoded cannot be used")
    if contradiction is not None:
        return Answer(False, contradiction)
    reason = f"a pair has {_median(counts):,.0f} correspondences (median of the {len(counts):,} pairs read)"
    if broken or unreadable or scene.problems:
        reason += "; what is broken, listed above, is left out with dataset.on_bad=skip"
    return Answer(True, reason)


def _contradiction(
    agreement: Sequence[Agreement], matched: ImageErrors, sizes: dict[str, tuple[int, int]]
) -> str | None:
    """What SIFT's matches contradict, or else the first kind of errors that is so large that poses and correspondences
    cannot both be right, in words."""
    side = _median([max(size) for size in sizes.values()])
    told = matched.contradiction(side)
    if told is not None:
        return told
    for errors in agreement:
        if not errors.median_px <= LARGEST_ERROR * side:
            return (
                f"correspondences and poses contradict each other: {errors.how}, median {errors.median_px:.0f} pixels "
                f"in images of {side:.0f}"
            )
    return None
