"""Localizes the queries of a dataset or a list on a compiled map: records, table, result files, report."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

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
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, pose_errors
from gnnet.localization.compile import compile_map
from gnnet.localization.local_features import LocalFeatures
from gnnet.localization.localizer import Localizer
from gnnet.localization.map import Map
from gnnet.localization.refinement import RefinementStatus
from gnnet.localization.result import Localization, Status
from gnnet.localization.retrieval import InitialPoseRetrieval
from gnnet.models.pyramid import FeatureNetwork
from gnnet.models.weights import fingerprint
from gnnet.progress import track
from gnnet.sampling import evenly
from gnnet.scenes.formats.poses import write_pose_file
from gnnet.scenes.problems import OnBad
from gnnet.scenes.scene import Scene, SceneImage


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
    file = map.file
    if file is None:
        kind = "maps" if local is None else local.identity
        retrieval = "gem" if retrieval_network is None else type(retrieval_network).__name__.lower()
        settled = f"{kind}-{retrieval}-{map.points}-{map.largest_side or 'full'}"
        made_of = f"{scene.name}-{fingerprint(network)[:8]}-{settled}"
        file = map.folder / (re.sub(r"[^\w.-]+", "-", made_of) + ".gnmap")
    return compile_map(
        file, scene, network, points=map.points if local is None else local.count,
        largest_side=map.largest_side, local_features=local, retrieval_network=retrieval_network, device=device,
        on_bad=map.on_bad,
    )  # fmt: skip


def queries_of_scene(scene: Scene) -> list[SceneImage]:
    """The images that are no references; if all are, each of them, to be localized without its own observations."""
    images = list(scene.images.values())
    chosen = [i for i in images if not i.is_reference]
    if not chosen:
        chosen = [i for i in images if i.cam_from_world is not None and observes(i)]
    return sorted(chosen, key=lambda image: image.name)


def queries_of_list(cameras: Mapping[str, Camera], images: Path, scene: Scene | None = None) -> list[SceneImage]:
    """Queries of a list with intrinsics; pose and condition are known if the scene has an image of that name."""
    queries = []
    for name, camera in sorted(cameras.items()):
        known = scene.images.get(name) if scene is not None else None
        condition, truth = ("", None) if known is None else (known.condition, known.cam_from_world)
        queries.append(SceneImage(name, images / name, condition, camera=camera, cam_from_world=truth))
    return queries


def localize_queries(
    localizer: Localizer, queries: Iterable[SceneImage], *, initial: Mapping[str, Pose] | None = None
) -> Iterator[Localization]:
    """Localize queries one by one; for one that cannot be localized the record says why, and the rest goes on.

    Args:
        localizer: with network and map.
        queries: any number.
        initial: initial poses by query name, for a localizer that takes them.

    Raises:
        ValueError: if initial poses are given to a localizer that does not use them.
    """
    if initial is not None and not (
        localizer.pose.takes_initial or isinstance(localizer.retrieval, InitialPoseRetrieval)
    ):
        raise ValueError(
            "poses are given (poses=FILE), but the localizer uses none; take localizer=refine, which refines them, or "
            "localizer/retrieval=initial, which matches the references near them"
        )
    for query in queries:
        result = Localization(query.name, Status.UNREADABLE, "", query.condition)
        if query.camera is None:
            yield replace(result, status=Status.NO_CAMERA, reason="the dataset knows no camera of this image")
            continue
        if initial is not None and query.name not in initial:
            yield replace(result, status=Status.NO_POSE, reason="the file of poses has none of this name")
            continue
        try:
            image = read_image(query.path, query.camera)
        except (OSError, ValueError) as error:
            yield replace(result, reason=str(error))
            continue
        yield localizer.localize(
            image, query.camera, name=query.name, condition=query.condition, place=query.place or None,
            initial=None if initial is None else initial[query.name], truth=query.cam_from_world,
        )  # fmt: skip


class LocalizedQueries(NamedTuple):
    """Records of all queries, the table of those whose pose is known, and whether any was localized."""

    localizations: list[Localization]
    report: Table
    any_localized: bool


class QueryList(NamedTuple):
    """Queries that a file lists: their cameras by name, and the folder that the names are below."""

    cameras: Mapping[str, Camera]
    images: Path


def localize_validations(
    data: DataModule,
    network: FeatureNetwork,
    settings: Localizer,
    output: Path,
    *,
    maps: MapSettings,
    device: torch.device | str,
    thresholds: Thresholds,
    listed: QueryList | None = None,
    max_queries: int | None = None,
    initial: Mapping[str, Pose] | None = None,
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
        listed: queries to localize in place of the validation sets' own.
        max_queries: limit on the queries of a set, spread evenly over it; None localizes all.
        initial: initial poses by query name.
        submit_as: dataset whose result format `submission.txt` has; None takes the set's own.
        colmap_model: also write a COLMAP model with the queries registered.
        about: settings to stand in the tables.
        command: command line to stand in the report.

    Raises:
        FileNotFoundError, ValueError: if no set has references, one map file is named for several sets, a map does
            not fit, or `submit_as` is not known.
    """
    localizable = [v for v in data.validations if isinstance(v, LocalizationDataset)]
    if not localizable:
        raise ValueError("the dataset has no references to make a map of; matching sets have no poses")
    if maps.file is not None and len(localizable) > 1:
        names = ", ".join(v.name for v in localizable)
        raise ValueError(f"map={maps.file} is one file, and there are {len(localizable)} maps ({names}); leave map out")
    for validation in localizable:
        format_of(submit_as or validation.scene.dataset)  # a name that is not known is said before the map is compiled
    done = []
    for validation in localizable:
        scene, folder = validation.scene, output / validation.name
        of_set = replace(maps, largest_side=validation.largest_side, on_bad=validation.on_bad)
        localizer = prepare_localizer(settings, network, scene, of_set, device=device)
        queries = queries_of_scene(scene) if listed is None else queries_of_list(*listed, scene)
        queries = [queries[i] for i in evenly(len(queries), max_queries, np.random.default_rng(0))]
        title = (
            f"Localization on {validation.name or scene.name}: {len(queries)} queries, "
            f"{len(localizer.map.names)} references; {settings.title}"
        )
        result = localize_dataset(
            localizer, queries, folder, scene=scene, dataset=submit_as or scene.dataset, title=title,
            thresholds=thresholds, initial=initial, settings={**(about or {}), "map": str(localizer.map.path)},
            colmap_model=colmap_model, command=command,
        )  # fmt: skip
        print_table(result.report)
        print(f"Poses, records, submission.txt, report.html and figures are in {folder}", flush=True)
        done.append(result)
    return done


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
) -> LocalizedQueries:
    """Localize queries and write the results into `output`.

    Written are `poses.txt` (hloc's format, the scene's names), `submission.txt` (as the dataset's benchmark wants
    it), `localizations.jsonl` (a record for each query, written as it is made), `localization.json` (the table),
    `report.html` with pictures, and, if asked for, `colmap/`.
    """
    output.mkdir(parents=True, exist_ok=True)
    found: list[Localization] = []
    with (output / "localizations.jsonl").open("w") as file:
        results = localize_queries(localizer, queries, initial=initial)
        for result, query in zip(track(results, description="Localizing", total=len(queries)), queries, strict=True):
            found.append(result)
            file.write(json.dumps(to_record(result, query.cam_from_world)) + "\n")
            file.flush()
    report = make_localization_report(
        localizer, found, queries, title=title, thresholds=thresholds, settings=dict(settings or {})
    )
    localized = {r.name: r.cam_from_world for r in found if r.cam_from_world is not None}
    write_pose_file(output / "poses.txt", localized)
    write_submission(output / "submission.txt", found, dataset=dataset)
    write_table(report, output / "localization.json")
    if colmap_model:
        cameras = {q.name: q.camera for q in queries if q.camera is not None}
        write_colmap_model(output / "colmap", scene, found, cameras=cameras)
    write_html_report(
        output, report=report, localizations=found, queries={q.name: q for q in queries}, map=localizer.map,
        scene=scene, settings=report.settings, command=command,
    )  # fmt: skip
    return LocalizedQueries(found, report, bool(localized))


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
