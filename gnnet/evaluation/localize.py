"""Localizes the queries of a dataset or a list on a compiled map: records, table, result files, report."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gnnet.data.datamodule import DataModule
from gnnet.data.images import read_image
from gnnet.data.observed_points import observes
from gnnet.data.queries import LocalizationDataset
from gnnet.evaluation.colmap_export import write_colmap_model
from gnnet.evaluation.metrics import INSIDE, Thresholds, paired_difference, squared_mahalanobis, summarize_errors
from gnnet.evaluation.report.page import write_html_report
from gnnet.evaluation.submission import format_of, write_submission
from gnnet.evaluation.tables import Setting, Table, localization_table, print_table, write_table
from gnnet.files import below
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, pose_errors
from gnnet.localization.compile import compile_map, references_of, what_it_is_made_of
from gnnet.localization.local_features import LocalFeatures
from gnnet.localization.localizer import Localizer
from gnnet.localization.map import Map
from gnnet.localization.refinement import RefinementStatus
from gnnet.localization.result import Localization, Status
from gnnet.localization.retrieval import InitialPoseRetrieval, PairsRetrieval
from gnnet.models.pyramid import FeatureNetwork
from gnnet.progress import track
from gnnet.sampling import evenly
from gnnet.scenes.formats.poses import (
    can_stand_in_file,
    read_pose_file,
    read_query_list,
    read_query_names,
    write_pose_file,
)
from gnnet.scenes.names import by_known_name
from gnnet.scenes.problems import OnBad
from gnnet.scenes.scene import Scene, SceneImage

_NO_CAMERA = "the dataset knows no camera of this image"


@dataclass(frozen=True)
class MapSettings:
    """Settings of the map's compilation, see `compile_map`.

    Args:
        folder: folder of maps, which are named by what they are made of.
        file: a map's file to use instead; if it was made of something else, it is refused.
        points: limit on the observations of each reference.
        largest_side: images are shrunk to it, in pixels; None keeps them.
        on_bad: `skip` leaves references out that cannot be read.
    """

    folder: Path
    file: Path | None = None
    points: int = 1024
    largest_side: int | None = None
    on_bad: OnBad = "raise"


def prepare_localizer(
    settings: Localizer, network: FeatureNetwork, scene: Scene, map: MapSettings, *, device: torch.device | str
) -> Localizer:
    """The localizer with its network and the scene's map (or two), compiled first or, if it is there, opened.

    Raises:
        FileNotFoundError, ValueError: from scene or map, see `compile_map`.
        ConnectionError: if weights of local features cannot be fetched.
    """
    network = network.eval()
    companion = settings.pose.companion
    own = _compiled(settings, network, scene, map, settings.pose.local_features, device)
    second = None
    if companion is not None:  # beside the first: its file has a name of its own
        file = map.file and map.file.with_suffix(f".{companion.name}{map.file.suffix}")
        beside = replace(map, file=file)
        second = _compiled(settings, network, scene, beside, companion, device)
    return settings.on(network, own, second)


def _compiled(
    settings: Localizer, network: FeatureNetwork, scene: Scene, map: MapSettings, local: LocalFeatures | None,
    device: torch.device | str,
) -> Map:  # fmt: skip
    """The map of a scene whose points are described by local features, or by the network where `local` is None."""
    retrieval_network = settings.retrieval.network
    if local is not None:
        local.load()
    if retrieval_network is not None:
        retrieval_network.eval().to(device)
    choices: dict[str, Any] = {
        "points": map.points if local is None else local.count, "largest_side": map.largest_side,
        "local_features": local, "retrieval_network": retrieval_network,
    }  # fmt: skip
    file = map.file
    if file is None:  # scenes of one name have different contents
        made_of = json.dumps(what_it_is_made_of(scene, network, **choices), sort_keys=True)
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        readable = re.sub(r"[^\w.-]+", "-", f"{scene.name}-{'maps' if local is None else local.identity}")[:80]
        file = map.folder / f"{readable}-{digest}.gnmap"
    return compile_map(file, scene, network, device=device, on_bad=map.on_bad, **choices)


def queries_of_scene(scene: Scene) -> list[SceneImage]:
    """The images that are no references; if all are, each of them, to be localized without its own observations."""
    images = list(scene.images.values())
    chosen = [i for i in images if not i.is_reference]
    if not chosen:
        chosen = [i for i in images if i.cam_from_world is not None and observes(i)]
    return sorted(chosen, key=lambda image: image.name)


class QueryList(NamedTuple):
    """Queries that a file lists: by name their cameras, or what is wrong, and the folder that the names are below.

    A camera is None where its focal length is to be estimated.
    """

    cameras: Mapping[str, Camera | ValueError | None]
    images: Path


class PoseFile(NamedTuple):
    """`cam_from_world` by the names of a file, and the file and its setting for messages."""

    poses: Mapping[str, Pose]
    source: str


class Given(NamedTuple):
    """What is given beside a dataset; None where it is not.

    Args:
        listed: queries to localize in place of the dataset's own.
        initial: initial poses of the queries.
        truth: true poses of the queries, in place of those that the dataset knows.
    """

    listed: QueryList | None = None
    initial: PoseFile | None = None
    truth: PoseFile | None = None


def read_given(
    *, queries: str | None, images: str | None, poses: str | None, truth: str | None, camera: str | None = None
) -> Given:
    """Read the files that settings of these names give; with `camera` unknown, of a list the names alone.

    Raises:
        FileNotFoundError, ValueError: if one is missing or broken, or `queries` and `images` are not given together, or
            `camera` is not known.
    """
    if (queries is None) != (images is None):
        raise ValueError("queries=FILE needs images=DIR, the folder that its names are below; and images needs queries")
    if camera not in (None, "unknown"):
        raise ValueError(f"camera={camera}; expected unknown, which estimates each query's focal length, or null")
    listed = None
    if queries is not None and images is not None:
        listed = QueryList(read_query_list(queries) if camera is None else read_query_names(queries), Path(images))
    initial, true = (
        None if file is None else PoseFile(read_pose_file(file, on_bad="skip"), f"{file} ({key}=)")
        for key, file in (("poses", poses), ("truth", truth))
    )
    return Given(listed, initial, true)


def queries_of_list(listed: QueryList, scene: Scene) -> tuple[list[SceneImage], dict[str, str]]:
    """Queries of a list, and, by name, why some of them cannot be used; these have no camera.

    Condition, place and pose are known of a query whose file is a file of the scene.

    Raises:
        FileNotFoundError: if none of the images exists.
    """
    queries, unusable = [], {}
    for name, camera in sorted(listed.cameras.items()):
        try:
            if isinstance(camera, ValueError):
                raise camera
            queries.append(SceneImage(name, below(listed.images, name, "the list of queries"), camera=camera))
        except ValueError as error:
            queries.append(SceneImage(name, listed.images))
            unusable[name] = str(error)
    usable = [query for query in queries if query.name not in unusable]
    if not any(query.path.exists() for query in usable):
        raise FileNotFoundError(
            f"none of the {len(queries)} queries is in {listed.images.absolute()} (images=), the first: "
            f"{(usable or queries)[0].name}; expected the folder that the names in the list are below"
        )
    same = same_images((query.path for query in usable), scene)
    for i, query in enumerate(queries):
        if query.path in same:
            ours = scene.images[same[query.path]]
            queries[i] = replace(
                query, condition=ours.condition, place=ours.place, cam_from_world=ours.cam_from_world
            )
    return queries, unusable


def same_images(paths: Iterable[Path], scene: Scene) -> dict[Path, str]:
    """Names of the scene's images whose file is one of `paths`: the same file on disk, whatever it is called."""

    def file(path: Path) -> tuple[int, int] | None:
        try:
            status = path.stat()
        except (OSError, ValueError):
            return None
        return status.st_dev, status.st_ino

    ours = {file(image.path): image.name for image in scene.images.values()}
    ours.pop(None, None)
    return {path: ours[key] for path in paths if (key := file(path)) in ours}


def localize_queries(
    localizer: Localizer,
    queries: Iterable[SceneImage],
    *,
    initial: Mapping[str, Pose] | None = None,
    itself: Mapping[str, str] | None = None,
    unusable: Mapping[str, str] | None = None,
) -> Iterator[Localization]:
    """Localize queries one by one; for one that cannot be localized the record says why, and the rest goes on.

    Args:
        localizer: with network and map.
        queries: any number.
        initial: initial poses by query name, for a localizer that takes them.
        itself: by query name, the map's image that the query is; None: a query that is a reference is that one.
        unusable: by query name, why it has no camera.

    Raises:
        ValueError: if initial poses are given to a localizer that does not use them.
    """
    _check_use(initial is not None, localizer)
    pairs = localizer.retrieval if isinstance(localizer.retrieval, PairsRetrieval) else None
    for query in queries:
        result = Localization(query.name, Status.UNREADABLE, "", query.condition)
        if query.name in (unusable or {}) or (query.camera is None and not localizer.estimate_focal):
            yield replace(result, status=Status.NO_CAMERA, reason=(unusable or {}).get(query.name, _NO_CAMERA))
            continue
        if initial is not None and query.name not in initial:
            yield replace(result, status=Status.NO_POSE, reason="the file of poses has none of this name")
            continue
        if pairs is not None and not pairs.pairs.get(query.name):
            what = "no reference of the map" if query.name in pairs.pairs else "no line"
            yield replace(result, status=Status.NO_REFERENCE, reason=f"{pairs.file} has {what} for this query")
            continue
        try:
            image = read_image(query.path, query.camera)
        except (OSError, ValueError) as error:
            yield replace(result, reason=str(error))
            continue
        yield localizer.localize(
            image, query.camera, name=query.name, condition=query.condition, place=query.place or None,
            initial=None if initial is None else initial[query.name], truth=query.cam_from_world,
            itself=(query.name if query.is_reference else None) if itself is None else itself.get(query.name),
        )  # fmt: skip


def _check_use(has_initial: bool, localizer: Localizer) -> None:
    if has_initial and not (localizer.pose.takes_initial or isinstance(localizer.retrieval, InitialPoseRetrieval)):
        raise ValueError(
            "poses are given (poses=FILE), but the localizer uses none; take localizer=refine, which refines them, or "
            "localizer/retrieval=initial, which matches the references near them"
        )


class LocalizedQueries(NamedTuple):
    """Records of all queries, the table of those whose pose is known, and whether any was localized."""

    localizations: list[Localization]
    report: Table
    any_localized: bool


def localize_validations(
    data: DataModule,
    network: FeatureNetwork,
    settings: Localizer,
    output: Path,
    *,
    maps: MapSettings,
    device: torch.device | str,
    thresholds: Thresholds,
    given: Given | None = None,
    max_queries: int | None = None,
    submit_as: str | None = None,
    colmap_model: bool = False,
    about: Mapping[str, Setting] | None = None,
    command: str = "",
) -> list[LocalizedQueries]:
    """Localize the queries of each validation set on its own map; print the tables, write the result files.

    Args:
        data: set up.
        network: its maps describe the references and the queries.
        settings: a localizer without network and map.
        output: folder to write into, one below it for each validation set that has a name.
        maps: where maps are kept, and their settings.
        device: where the network runs.
        thresholds: of recall.
        given: files of queries and poses.
        max_queries: limit on the queries of a set, spread evenly over it; None localizes all.
        submit_as: dataset whose result format `submission.txt` has; None takes the set's own.
        colmap_model: also write a COLMAP model with the queries registered.
        about: settings to stand in the tables.
        command: command line to stand in the report.

    Raises:
        FileNotFoundError, ValueError: if no set has references, one map file is named for several sets, a map does
            not fit, `submit_as` is not known, or nothing that is given fits the queries. What can be known beforehand
            is said before a map is compiled.
    """
    localizable = [v for v in data.validations if isinstance(v, LocalizationDataset)]
    if not localizable:
        raise ValueError("the dataset has no references to make a map of; matching sets have no poses")
    if maps.file is not None and len(localizable) > 1:
        names = ", ".join(v.name for v in localizable)
        raise ValueError(f"map={maps.file} is one file, and there are {len(localizable)} maps ({names}); leave map out")
    given = given or Given()
    _check_use(given.initial is not None, settings)
    prepared = []
    for validation in localizable:
        format_of(submit_as or validation.scene.dataset)
        (output / validation.name).mkdir(parents=True, exist_ok=True)
        prepared.append(_match(settings, validation.scene, given, max_queries))
    done = []
    for validation, (matched, queries, initial, unusable) in zip(localizable, prepared, strict=True):
        scene, folder = validation.scene, output / validation.name
        of_set = replace(maps, largest_side=validation.largest_side, on_bad=validation.on_bad)
        localizer = prepare_localizer(matched, network, scene, of_set, device=device)
        title = (
            f"Localization on {validation.name or scene.name}: {len(queries)} queries, "
            f"{len(localizer.map.names)} references; {settings.title}"
        )
        result = localize_dataset(
            localizer, queries, folder, scene=scene, dataset=submit_as or scene.dataset, title=title,
            thresholds=thresholds, initial=initial, settings={**(about or {}), "map": str(localizer.map.path)},
            colmap_model=colmap_model, command=command, unusable=unusable,
        )  # fmt: skip
        print_table(result.report)
        print(f"Poses, records, submission.txt, report.html and figures are in {folder}", flush=True)
        done.append(result)
    return done


def _match(
    settings: Localizer, scene: Scene, given: Given, max_queries: int | None
) -> tuple[Localizer, list[SceneImage], dict[str, Pose] | None, dict[str, str]]:
    """The localizer with pairs, queries with true poses, initial poses, and why queries cannot be used, by name."""
    listed = given.listed
    queries, unusable = (queries_of_scene(scene), {}) if listed is None else queries_of_list(listed, scene)
    names, initial = [query.name for query in queries], None
    if isinstance(settings.retrieval, PairsRetrieval):
        references = [reference.name for reference in references_of(scene)]
        settings = replace(settings, retrieval=settings.retrieval.of(names, references))
    if given.initial is not None:
        initial = by_known_name(given.initial.poses, names, source=given.initial.source, what="queries")
    if given.truth is not None:
        true = by_known_name(given.truth.poses, names, source=given.truth.source, what="queries")
        queries = [replace(query, cam_from_world=true.get(query.name)) for query in queries]
    chosen = evenly(len(queries), max_queries, np.random.default_rng(0))
    return settings, [queries[i] for i in chosen], initial, unusable


def localize_dataset(
    localizer: Localizer,
    queries: Sequence[SceneImage],
    output: Path,
    *,
    scene: Scene,
    dataset: str,
    title: str,
    thresholds: Thresholds,
    initial: Mapping[str, Pose] | None = None,
    settings: Mapping | None = None,
    colmap_model: bool = False,
    command: str = "",
    unusable: Mapping[str, str] | None = None,
) -> LocalizedQueries:
    """Localize queries and write the results into `output`.

    Written are `localizations.jsonl` (a record for each query, as it is made), `poses.txt` (hloc's format, the scene's
    names), `localization.json` (the table), `report.html` with pictures, and then, as far as the names allow,
    `submission.txt` (as the dataset's benchmark wants it) and, if asked for, `colmap/`. What could not be written is a
    note of the table.
    """
    output.mkdir(parents=True, exist_ok=True)
    found: list[Localization] = []
    same = same_images([query.path for query in queries], scene)
    itself = {query.name: same[query.path] for query in queries if query.path in same}
    with (output / "localizations.jsonl").open("w") as file:
        results = localize_queries(localizer, queries, initial=initial, itself=itself, unusable=unusable)
        for result, query in zip(track(results, description="Localizing", total=len(queries)), queries, strict=True):
            found.append(result)
            file.write(json.dumps(to_record(result, query.cam_from_world)) + "\n")
            file.flush()
    report = make_localization_report(
        localizer, found, queries, title=title, thresholds=thresholds, settings=dict(settings or {})
    )
    localized = {r.name: r.cam_from_world for r in found if r.cam_from_world is not None}
    written = {name: pose for name, pose in localized.items() if can_stand_in_file(name)}
    write_pose_file(output / "poses.txt", written)
    write_table(report, output / "localization.json")
    write_html_report(
        output, report=report, localizations=found, queries={q.name: q for q in queries}, map=localizer.map,
        scene=scene, settings=report.settings, command=command,
    )  # fmt: skip
    notes = [_left_out("poses.txt", [name for name in localized if name not in written])]
    try:
        unknown = write_submission(output / "submission.txt", found, dataset=dataset).unknown
        notes.append(_left_out("submission.txt", unknown))
    except ValueError as error:
        notes.append(f"submission.txt is not written: {error}")
    if colmap_model:
        try:
            cameras = {q.name: q.camera for q in queries if q.camera is not None}
            cameras |= {r.name: r.camera for r in found if r.camera is not None}
            write_colmap_model(output / "colmap", scene, found, cameras=cameras)
        except ValueError as error:
            notes.append(f"the COLMAP model is not written: {error}")
    if any(notes):
        report = replace(report, notes=(*report.notes, *filter(None, notes)))
        write_table(report, output / "localization.json")
    return LocalizedQueries(found, report, bool(localized))


def _left_out(file: str, names: Sequence[str]) -> str:
    """A note on names that could not be written into a file; empty for none."""
    return f"{file} leaves out names that cannot stand there: {len(names)}, the first {names[0]!r}" if names else ""


def to_record(result: Localization, truth: Pose | None = None) -> dict:
    """A localization as plain values for JSON: poses as quaternion (w, x, y, z) and translation; errors if known."""

    def pose(value: Pose | None) -> dict | None:
        if value is None:
            return None
        return {"quaternion": value.quaternion().tolist(), "translation": value.translation.tolist()}

    def number(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    record = {
        "name": result.name,
        "condition": result.condition,
        "status": str(result.status),
        "reason": result.reason,
        "cam_from_world": pose(result.cam_from_world),
        "initial": pose(result.initial),
        "refined": result.refined,
        "references": list(result.references),
        "matches": result.matches,
        "inliers": result.inliers,
        "initial_cost": number(result.initial_cost),
        "final_cost": number(result.final_cost),
        "focal_length": None if result.camera is None else float(result.camera.parameters[0]),
        "covariance": None,
        "seconds": {stage: round(seconds, 6) for stage, seconds in result.seconds.items()},
    }
    if result.covariance is not None and result.covariance.isfinite().all():
        record["covariance"] = result.covariance.tolist()
    if truth is not None:
        for key, value in (("error", result.cam_from_world), ("initial_error", result.initial)):
            position, rotation = _errors(value, truth)
            record[key] = {"position_m": number(position), "rotation_deg": number(rotation)}
    return record


def _errors(pose: Pose | None, truth: Pose) -> tuple[float, float]:
    if pose is None:
        return math.inf, math.inf
    position, rotation = pose_errors(pose, truth)
    return position.item(), rotation.item()


def make_localization_report(
    localizer: Localizer,
    localizations: Sequence[Localization],
    queries: Sequence[SceneImage],
    *,
    title: str,
    thresholds: Thresholds,
    settings: Mapping,
) -> Table:
    """The table: for each condition the nearest reference, the pose before refinement, and the pose after it.

    Queries without a known pose are left out; those that failed count with infinite errors.
    """
    pairs = zip(localizations, queries, strict=True)
    known = [(r, q.condition, q.cam_from_world) for r, q in pairs if q.cam_from_world is not None]
    methods = {"nearest": [_errors(_nearest(localizer, r), truth) for r, _, truth in known]}
    methods[localizer.pose.name] = [_errors(r.initial, truth) for r, _, truth in known]
    if localizer.refiner is not None:
        methods["refined"] = [_errors(r.cam_from_world, truth) for r, _, truth in known]
    present = sorted({condition for _, condition, _ in known})
    rows = []
    for condition in ("all", *(present if len(present) > 1 else ())) if known else ():
        chosen = [i for i, (_, own, _) in enumerate(known) if condition in ("all", own)]
        for method, errors in methods.items():
            position, rotation = torch.tensor([errors[i] for i in chosen], dtype=torch.float64).unbind(-1)
            summary = summarize_errors(position, rotation, thresholds=thresholds)
            rows.append((method, condition, len(chosen), summary))
    notes = list(_notes(localizer, localizations))
    if "refined" in methods and known:
        before, after = (torch.tensor(methods[m], dtype=torch.float64)[:, 0] for m in (localizer.pose.name, "refined"))
        notes.insert(0, paired_difference(before, after).describe(localizer.pose.name, "refined"))
    lengths = [
        squared_mahalanobis(r.cam_from_world, query.cam_from_world, r.covariance).item()
        for r, query in zip(localizations, queries, strict=True)
        if r.cam_from_world is not None and query.cam_from_world is not None and r.covariance is not None
        and r.covariance.isfinite().all()
    ]  # fmt: skip
    if lengths:
        inside = 100 * sum(length <= INSIDE for length in lengths) / len(lengths)
        notes.append(f"covariance: {inside:.0f} % of {len(lengths)} true poses lie inside its 95 % ellipsoid")
    return localization_table(title, thresholds, rows, settings=dict(settings), notes=tuple(notes))


def _nearest(localizer: Localizer, result: Localization) -> Pose | None:
    if not result.references:
        return None
    return localizer.map.poses[localizer.map.rows[result.references[0]]]


def _ending(result: Localization) -> str:
    """Why a pose is not a refined one; empty if it is."""
    if result.refined:
        return ""
    match result.ended:
        case None:
            return "not refined"
        case RefinementStatus.ITERATION_LIMIT:
            return "ended at the iteration limit"
        case RefinementStatus.CONVERGED_STEP | RefinementStatus.CONVERGED_GRADIENT:
            return "lost against the pose before"
        case _:
            return "failed"


def _notes(localizer: Localizer, localizations: Sequence[Localization]) -> Iterator[str]:
    localized = [r for r in localizations if r.status == Status.LOCALIZED]
    yield f"{len(localized)} of {len(localizations)} queries localized"
    failed = Counter(str(r.status) for r in localizations if r.status != Status.LOCALIZED)
    if failed:
        yield "not localized: " + ", ".join(f"{count} {status}" for status, count in failed.most_common())
    if localizer.refiner is not None and localized:
        ended = Counter(_ending(r) for r in localized)
        kept = ended.pop("", 0)
        others = "".join(f"; {count} {why}" for why, count in ended.most_common())
        stands = ": there the pose before it stands" if others else ""
        yield f"refinement kept for {kept} of {len(localized)}{others}{stands}"
    stages = {stage for r in localized for stage in r.seconds}
    if stages:
        means = {s: sum(r.seconds.get(s, 0) for r in localized) / len(localized) for s in sorted(stages)}
        yield "seconds a query: " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in means.items())
