"""What a dataset holds, measured on its scene: images, pairs, correspondences, and how well these agree with the poses.

Correspondences are held against something that they were not made from: 3D points are projected into both
images, listed ones are compared with the epipolar lines of the poses, and where depth made them, or a camera
that stands still, the images themselves are matched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.progress import track

from gnnet.data.images import read_image
from gnnet.data.queries import localization_samples
from gnnet.evaluation.inspect.pairs import (
    PairMeasure,
    PairReader,
    describe,
    image_errors,
    image_pairs,
    measure_pair,
    sample_evenly,
)
from gnnet.scenes.formats.images import image_size
from gnnet.scenes.scene import Scene, SceneImage

LARGEST_ERROR = 0.02  # of an image's longer side: correspondences and poses that differ by more contradict each other
_IMAGE_PAIRS = 30  # that are matched by SIFT
_GAPS = {0: "0–2", 3: "3–5", 6: "6–10", 11: "11–20", 21: "21 or more"}  # images, by the least of each
_PIXELS_PER_IMAGE = 20_000  # looked at for mean and standard deviation


@dataclass(frozen=True)
class ImageGroup:
    """Images of one condition and resolution, and how many of them have what.

    `size` is width and height in pixels, (0, 0) where it could not be read; `focal` is the smallest and largest
    focal length in pixels, None without cameras; `cameras` counts distinct intrinsics.
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
    """Pairs of two conditions; the medians, nan where unknown, are over the `measured` ones.

    Args:
        correspondences: a pair.
        spread, overlap: as in `PairMeasure`.
        error_px: median of the errors that `Agreement` sums up; nan where they are measured on images.
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
    """Errors of correspondences in pixels by one way to measure them (`how`), over so many pairs.

    `within_3_px` is the share of them that are no larger.
    """

    how: str
    pairs: int
    median_px: float
    within_3_px: float


@dataclass(frozen=True)
class Colours:
    """Mean and standard deviation of red, green and blue in [0, 1], over so many images."""

    images: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


@dataclass(frozen=True)
class Answer:
    """Whether something can be done with the dataset, and why."""

    yes: bool
    reason: str


@dataclass(frozen=True)
class Inspection:
    """All that is known of a dataset; distributions are None, and shares nan, where no pair could be measured."""

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
        pairs: read at most so many pairs, evenly spread over the list; None reads all.
        images: decode at most so many images, likewise.
        progress: show progress bars.
    """
    sizes, problems = _sizes(scene.images.values())
    reader = PairReader(scene, sizes)
    measures: dict[int, PairMeasure] = {}
    errors: dict[str, list[np.ndarray]] = {}
    broken: list[str] = []
    chosen = sample_evenly(len(scene.pairs), pairs)
    for index in track(chosen, "Reading correspondences", disable=not progress, transient=True):
        pair = scene.pairs[index]
        try:
            measures[index], outside = measure_pair(reader, pair)
        except Exception as error:  # whatever it is, it would end training
            broken.append(f"{describe(pair)}: {error}")
            continue
        problems += outside
        if measures[index].how is not None:
            errors.setdefault(measures[index].how, []).append(measures[index].errors)
    errors |= _errors_in_images(scene, progress)
    agreement = tuple(summarize_errors(how, found) for how, found in errors.items())
    colours, unreadable, decoded = _colours(scene, sizes, images, progress)
    return Inspection(
        scene=scene.name,
        places=len(scene.places),
        points=len(scene.points),
        images=group_images(scene, sizes),
        pairs=_group_pairs(scene, measures),
        correspondences=distribution([m.count for m in measures.values()]),
        spread=distribution([m.spread for m in measures.values()]),
        overlap=distribution([m.overlap for m in measures.values()]),
        agreement=agreement,
        colours=colours,
        pairs_read=len(chosen),
        images_read=decoded,
        problems=tuple(dict.fromkeys([*scene.problems, *problems, *broken, *unreadable])),
        localization=_can_localize(scene),
        split=_can_split(scene),
        training=_can_train(scene, list(measures.values()), len(broken), len(unreadable), decoded, agreement, sizes),
    )


def distribution(values: Sequence[float]) -> Distribution | None:
    """Of some numbers, with at most ten bins of a round width; None of nothing."""
    if len(values) == 0:
        return None
    values = np.asarray(values, dtype=np.float64)
    low, high = values.min(), values.max()
    width = _round_up((high - low) / 8 or max(abs(high), 1.0))
    first = np.floor(low / width)
    edges = (first + np.arange(max(1, int(np.ceil(high / width) - first)) + 1)) * width
    counts = np.histogram(values, edges)[0]
    return Distribution(
        minimum=float(low),
        quartiles=tuple(np.quantile(values, [0.25, 0.5, 0.75]).tolist()),
        maximum=float(high),
        edges=tuple(np.round(edges, 9).tolist()),
        counts=tuple(counts.tolist()),
    )


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, … (and of their tenths, hundredths, …)."""
    power = 10.0 ** np.floor(np.log10(value))
    return next(float(step * power) for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))


def group_images(scene: Scene, sizes: dict[str, tuple[int, int]]) -> tuple[ImageGroup, ...]:
    """Counts of images by condition and size, the references first."""
    groups: dict[tuple[str, tuple[int, int]], list[SceneImage]] = {}
    for image in scene.images.values():
        groups.setdefault((image.condition, sizes.get(image.name, (0, 0))), []).append(image)
    result = []
    for (condition, size), members in sorted(groups.items()):
        cameras = {tuple(image.camera.parameters.tolist()) for image in members if image.camera is not None}
        result.append(
            ImageGroup(
                condition=condition,
                size=size,
                focal=(min(c[0] for c in cameras), max(c[0] for c in cameras)) if cameras else None,
                cameras=len(cameras),
                images=len(members),
                references=sum(image.is_reference for image in members),
                posed=sum(image.cam_from_world is not None for image in members),
                with_depth=sum(image.depth is not None for image in members),
                with_points=sum(image.point_ids is not None and len(image.point_ids) > 0 for image in members),
            )
        )
    return tuple(sorted(result, key=lambda group: group.references == 0))


def _errors_in_images(scene: Scene, progress: bool) -> dict[str, list[np.ndarray]]:
    """Errors against SIFT's matches, by kind and, in a sequence, by how many images apart the pair is."""
    pairs = image_pairs(scene, _IMAGE_PAIRS)
    rank: dict[str, int] = {}
    seen: Counter = Counter()
    for name in sorted(scene.images) if pairs else ():
        folder = name.rpartition("/")[0]
        rank[name] = seen[folder]
        seen[folder] += 1
    errors: dict[str, list[np.ndarray]] = {}
    for pair in track(pairs, "Matching images", disable=not progress, transient=True):
        try:
            found = image_errors(scene, pair)
        except (OSError, ValueError):  # among the problems with pairs and images
            continue
        how = "SIFT matches to the same pixel (still camera)"
        if not pair.static:
            folders = {name.rpartition("/")[0] for name in (pair.image_a, pair.image_b)}
            apart = abs(rank[pair.image_a] - rank[pair.image_b])
            gap = _GAPS[max(least for least in _GAPS if least <= apart)]
            distance = f"{gap} images apart" if len(folders) == 1 else "in two sequences"
            how = f"SIFT matches to depth and poses, {distance}"
        if len(found):
            errors.setdefault(how, []).append(found)
    return dict(sorted(errors.items(), key=lambda item: (len(item[0]), item[0])))


def summarize_errors(how: str, errors: Sequence[np.ndarray]) -> Agreement:
    """Of the errors (K,) of each pair."""
    pooled = np.concatenate(errors)
    return Agreement(how, len(errors), float(np.median(pooled)), float(np.mean(pooled <= 3)))


def condition_pairs(scene: Scene) -> dict[tuple[str, str], list[int]]:
    """Indices of the pairs of each two conditions (a ↔ b and b ↔ a are one), the most frequent first."""
    condition = {image.name: image.condition for image in scene.images.values()}
    groups: dict[tuple[str, str], list[int]] = {}
    for index, pair in enumerate(scene.pairs):
        groups.setdefault(tuple(sorted((condition[pair.image_a], condition[pair.image_b]))), []).append(index)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _group_pairs(scene: Scene, measures: dict[int, PairMeasure]) -> tuple[PairGroup, ...]:
    groups = []
    for conditions, indices in condition_pairs(scene).items():
        members = [measures[index] for index in indices if index in measures]
        errors = [m.errors for m in members if len(m.errors)]
        groups.append(
            PairGroup(
                conditions=conditions,
                pairs=len(indices),
                measured=len(members),
                correspondences=_median([m.count for m in members]),
                spread=_median([m.spread for m in members]),
                overlap=_median([m.overlap for m in members]),
                error_px=_median(np.concatenate(errors)) if errors else float("nan"),
            )
        )
    return tuple(groups)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def _sizes(images: Iterable[SceneImage]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Width and height of each image: its camera's, else the file's; and which could not be read."""
    sizes, problems = {}, []
    for image in images:
        try:
            size = image_size(image.path) if image.camera is None else image.camera.size.round().int().tolist()
            sizes[image.name] = tuple(size)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return sizes, problems


def _colours(
    scene: Scene, sizes: dict[str, tuple[int, int]], limit: int | None, progress: bool
) -> tuple[Colours | None, list[str], int]:
    """Mean and deviation over decoded images, problems with these, and how many were tried."""
    names = list(scene.images)
    chosen = [names[i] for i in sample_evenly(len(names), limit)]
    total, squares, pixels, count, problems = np.zeros(3), np.zeros(3), 0, 0, []
    for name in track(chosen, "Decoding images", disable=not progress, transient=True):
        image = scene.images[name]
        try:
            content = read_image(image.path)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        height, width = content.shape[-2:]
        if sizes.get(name, (width, height)) != (width, height):
            expected = "×".join(str(n) for n in sizes[name])
            problems.append(f"image {image.path} is {width}×{height} pixels, its camera says {expected}")
            continue
        # Every so many pixels, as means over blocks would have a smaller deviation.
        step = max(1, int((height * width / _PIXELS_PER_IMAGE) ** 0.5))
        values = content[:, ::step, ::step].double().flatten(1).numpy() / 255
        total, squares = total + values.sum(1), squares + (values**2).sum(1)
        pixels, count = pixels + values.shape[1], count + 1
    if count == 0:
        return None, problems, len(chosen)
    mean = total / pixels
    deviation = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
    return Colours(count, tuple(mean.tolist()), tuple(deviation.tolist())), problems, len(chosen)


def _can_localize(scene: Scene) -> Answer:
    try:
        samples = localization_samples(scene)
    except ValueError as error:
        return Answer(False, str(error))
    by_condition = Counter(scene.images[sample.query].condition for sample in samples)
    listed = ", ".join(f"{condition} {count}" for condition, count in by_condition.most_common())
    return Answer(True, f"{len(samples)} queries have a pose and a reference image ({listed})")


def _can_split(scene: Scene) -> Answer:
    with_pairs = {pair.place for pair in scene.pairs}
    if len(scene.places) < 2:
        return Answer(False, "it is one place; give another dataset for validation (dataset.validation_root)")
    return Answer(True, f"it has {len(scene.places)} places, {len(with_pairs)} of them with pairs")


def _can_train(
    scene: Scene,
    measures: list[PairMeasure],
    broken: int,
    unreadable: int,
    decoded: int,
    agreement: tuple[Agreement, ...],
    sizes: dict[str, tuple[int, int]],
) -> Answer:
    if not scene.pairs:
        return Answer(False, "it holds no pair of images")
    if broken >= len(measures):
        return Answer(False, f"{broken} of the {broken + len(measures)} pairs read cannot be used")
    if 2 * unreadable >= decoded:
        return Answer(False, f"{unreadable} of the {decoded} images decoded cannot be used")
    side = float(np.median([max(size) for size in sizes.values()]))
    for errors in agreement:
        if not errors.median_px <= LARGEST_ERROR * side:
            return Answer(
                False,
                f"correspondences and poses contradict each other: {errors.how}, median {errors.median_px:.0f} pixels "
                f"in images of {side:.0f}",
            )
    median = _median([m.count for m in measures])
    reason = f"a pair has {median:,.0f} correspondences (median of the {len(measures):,} pairs read)"
    if broken or unreadable or scene.problems:
        reason += "; what is broken, listed above, is left out with dataset.on_bad=skip"
    return Answer(True, reason)
