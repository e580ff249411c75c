"""Localizes the queries of a dataset or a list on a compiled map; writes records, table, result files and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gnnet.data.datamodule import DataModule
from gnnet.data.images import ImageView, read_pixels
from gnnet.data.queries import LocalizationDataset
from gnnet.evaluation.colmap_export import write_colmap_model
from gnnet.evaluation.given import Given, on_rigs, queries_of_list, queries_of_scene, same_images
from gnnet.evaluation.journal import JOURNAL, Journal, from_line, plain, to_line
from gnnet.evaluation.maps import MapSettings, maps_are_made_of, prepare_localizer
from gnnet.evaluation.metrics import Thresholds
from gnnet.evaluation.records import make_localization_report, to_record
from gnnet.evaluation.report.page import write_html_report
from gnnet.evaluation.submission import format_of, write_submission
from gnnet.evaluation.tables import Setting, Table, print_table, write_table
from gnnet.files import results_folder, write_at_once
from gnnet.geometry.pose import Pose
from gnnet.localization.compile import references_of
from gnnet.localization.localizer import Localizer
from gnnet.localization.result import Localization, Status
from gnnet.localization.retrieval import DescriptorRetrieval, InitialPoseRetrieval, PairsRetrieval
from gnnet.localization.rig import RigImage
from gnnet.models.pyramid import FeatureNetwork
from gnnet.processes import Devices, share_out
from gnnet.progress import track
from gnnet.sampling import evenly
from gnnet.scenes.formats.images import exif_focal_length
from gnnet.scenes.formats.poses import can_stand_in_file, write_pose_file
from gnnet.scenes.formats.rigs import OnRig
from gnnet.scenes.names import by_known_name
from gnnet.scenes.scene import Scene, SceneImage

_NO_CAMERA = "the dataset knows no camera of this image"


def localize_queries(
    localizer: Localizer,
    queries: Iterable[SceneImage],
    *,
    initial: Mapping[str, Pose] | None = None,
    itself: Mapping[str, str] | None = None,
    unusable: Mapping[str, str] | None = None,
    rigs: Mapping[str, OnRig] | None = None,
) -> Iterator[Localization]:
    """Localize queries one by one, those of a rig together; of one that cannot be localized the record says why.

    Args:
        localizer: with network and map.
        queries: any number.
        initial: initial poses by query name, for a localizer that takes them.
        itself: by query name, the map's image that the query is; None: a query that is a reference is that one.
        unusable: by query name, why it has no camera.
        rigs: by query name, the rig that it is of, if any. Initial and true pose of a rig are those of its first image
            that has them.

    Raises:
        ValueError: if initial poses are given to a localizer that does not use them.
    """
    _check_use(initial is not None, localizer)

    def own(query: SceneImage) -> str | None:
        return (query.name if query.is_reference else None) if itself is None else itself.get(query.name)

    for at_once in together(queries, rigs or {}):
        images: dict[str, ImageView] = {}
        done: dict[str, Localization] = {}
        for query in at_once:
            image = _read(localizer, query, initial, unusable or {})
            if isinstance(image, Localization):
                done[query.name] = image
            else:
                images[query.name] = image

        usable = [query for query in at_once if query.name in images]
        if usable and usable[0].name in (rigs or {}):
            on_rig = {query.name: (rigs or {})[query.name].cam_from_rig for query in usable}
            truth = [on_rig[q.name].inverse() @ q.cam_from_world for q in usable if q.cam_from_world is not None]
            first = usable[0]
            rig = localizer.localize_rig(
                [
                    RigImage(
                        images[q.name].pixels, q.camera, on_rig[q.name], q.name, itself=own(q),
                        full_size=images[q.name].file_size,
                    )
                    for q in usable if q.camera is not None
                ],
                condition=first.condition, place=first.place or None, truth=truth[0] if truth else None,
                initial=None if initial is None else on_rig[first.name].inverse() @ initial[first.name],
            )  # fmt: skip
            done |= {result.name: result for result in rig.images}
        elif usable:
            (query,) = usable
            done[query.name] = localizer.localize(
                images[query.name].pixels, query.camera, full_size=images[query.name].file_size,
                name=query.name, condition=query.condition, place=query.place or None,
                initial=None if initial is None else initial[query.name],
                truth=query.cam_from_world, itself=own(query),
                focal=exif_focal_length(query.path) if localizer.estimate_focal else None,
            )  # fmt: skip
        yield from (done[query.name] for query in at_once)


def together(queries: Iterable[SceneImage], rigs: Mapping[str, OnRig]) -> list[list[SceneImage]]:
    """Queries that are localized together: those of a rig at one instant, and each other one alone."""
    groups: dict[tuple[bool, str], list[SceneImage]] = {}
    for i, query in enumerate(queries):
        rig = rigs.get(query.name)
        groups.setdefault((rig is None, str(i) if rig is None else rig.instant), []).append(query)
    return list(groups.values())


def _read(
    localizer: Localizer, query: SceneImage, initial: Mapping[str, Pose] | None, unusable: Mapping[str, str]
) -> ImageView | Localization:
    """The image of a query, or why it cannot be localized."""
    result = Localization(query.name, Status.UNREADABLE, "", query.condition)
    pairs = localizer.retrieval if isinstance(localizer.retrieval, PairsRetrieval) else None
    if query.name in unusable or (query.camera is None and not localizer.estimate_focal):
        return replace(result, status=Status.NO_CAMERA, reason=unusable.get(query.name, _NO_CAMERA))
    if initial is not None and query.name not in initial:
        return replace(result, status=Status.NO_POSE, reason="the file of poses has none of this name")
    if pairs is not None and not pairs.pairs.get(query.name):
        what = "no reference of the map" if query.name in pairs.pairs else "no line"
        return replace(result, status=Status.NO_REFERENCE, reason=f"{pairs.file} has {what} for this query")
    try:
        return read_pixels(query.path, query.camera, localizer.map.largest_side)
    except (OSError, ValueError) as error:
        return replace(result, reason=str(error))


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
    device: Devices,
    thresholds: Thresholds,
    resume: bool = False,
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
        device: where the network runs; several share references and queries, a process each.
        thresholds: of recall.
        resume: go on with the queries that an interrupted run into `output` has not done.
        given: files of queries and poses.
        max_queries: limit on the queries of a set, or on the instants of a rig, spread evenly; None localizes all, 0
            makes the maps and nothing else.
        submit_as: dataset whose result format `submission.txt` has; None takes the set's own.
        colmap_model: also write a COLMAP model with the queries registered.
        about: settings to stand in the tables.
        command: command line to stand in the report.

    Raises:
        FileNotFoundError, ValueError: if no set has references, one map file is named for several sets, a map does
            not fit, `submit_as` is not known, nothing that is given fits the queries, or there is no run to go on with,
            or one with other settings. What can be known beforehand is said before a map is compiled.
    """
    sets = _localizable(data, maps, output, resume=resume)
    given = given or Given()
    _check_use(given.initial is not None, settings)
    prepared = []
    for validation in sets:
        format_of(submit_as or validation.scene.dataset)
        results_folder(output / validation.name)
        localizer, asked = _match(settings, validation.scene, given, max_queries)
        of_set = replace(maps, largest_side=validation.largest_side, on_bad=validation.on_bad)
        follows_from = _follows_from(localizer, asked, maps_are_made_of(localizer, network, validation.scene, of_set))
        journal = Journal(output / validation.name / JOURNAL, follows_from, resume=resume)
        prepared.append((validation, localizer, asked, of_set, journal))
    done = []
    for validation, localizer, asked, of_set, journal in prepared:
        scene, folder = validation.scene, output / validation.name
        localizer = prepare_localizer(localizer, network, scene, of_set, device=device)
        if max_queries == 0:
            print(f"The map of {validation.name or scene.name} is {localizer.map.path}", flush=True)
            continue
        title = (
            f"Localization on {validation.name or scene.name}: {len(asked.queries)} queries, "
            f"{len(localizer.map.names)} references; {settings.title}"
        )
        result = localize_dataset(
            localizer, output=folder, scene=scene, dataset=submit_as or scene.dataset, title=title,
            thresholds=thresholds, settings={**(about or {}), "map": str(localizer.map.path)},
            colmap_model=colmap_model, command=command, device=device, journal=journal, **asked._asdict(),
        )  # fmt: skip
        print_table(result.report)
        print(f"Poses, records, submission.txt, report.html and figures are in {folder}", flush=True)
        done.append(result)
    return done


def _localizable(data: DataModule, maps: MapSettings, output: Path, *, resume: bool) -> list[LocalizationDataset]:
    """The validation sets that have references, if the settings fit their number and, to resume, a run is there."""
    sets = [v for v in data.validations if isinstance(v, LocalizationDataset)]
    if not sets:
        raise ValueError("the dataset has no references to make a map of; matching sets have no poses")
    if maps.file is not None and len(sets) > 1:
        names = ", ".join(v.name for v in sets)
        raise ValueError(f"map={maps.file} is one file, and there are {len(sets)} maps ({names}); leave map out")
    if resume and not any((output / v.name / JOURNAL).is_file() for v in sets):
        raise FileNotFoundError(
            f"{output.absolute()} holds no {JOURNAL} (resume=); expected the folder of an interrupted run of "
            "evaluate.py that localizes on a map"
        )
    return sets


class _Asked(NamedTuple):
    """What is to be localized: queries with true poses, and by name initial poses, what is unusable, and rigs."""

    queries: list[SceneImage]
    initial: dict[str, Pose] | None
    unusable: dict[str, str]
    rigs: dict[str, OnRig]


def _match(settings: Localizer, scene: Scene, given: Given, max_queries: int | None) -> tuple[Localizer, _Asked]:
    """The localizer with pairs by the scene's names, and the queries; those of a rig at one instant stand together."""
    listed = given.listed
    queries, unusable = (queries_of_scene(scene), {}) if listed is None else queries_of_list(listed, scene)
    names, initial = [query.name for query in queries], None
    if isinstance(settings.retrieval, (PairsRetrieval, DescriptorRetrieval)):
        references = [reference.name for reference in references_of(scene)]
        settings = replace(settings, retrieval=settings.retrieval.of(names, references))
    if given.initial is not None:
        initial = by_known_name(given.initial.poses, names, source=given.initial.source, what="queries")
    if given.truth is not None:
        true = by_known_name(given.truth.poses, names, source=given.truth.source, what="queries")
        queries = [replace(query, cam_from_world=true.get(query.name)) for query in queries]
    rigs = on_rigs(queries, given.rig, scene)
    groups = together(queries, rigs)
    chosen = evenly(len(groups), max_queries, np.random.default_rng(0))
    return settings, _Asked([query for i in chosen for query in groups[i]], initial, unusable, rigs)


def _follows_from(localizer: Localizer, asked: _Asked, maps: Iterable[Mapping[str, Any]]) -> dict[str, object]:
    """What the localizations follow from, for the journal."""
    told = [(q.name, q.path, q.condition, q.place, q.camera, q.cam_from_world) for q in asked.queries]
    found = plain(localizer, "localizer")
    found |= plain({**asked._asdict(), "queries": told}, "queries and what is given of them")
    return found | {f"map's {key}": value for made_of in maps for key, value in made_of.items()}


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
    rigs: Mapping[str, OnRig] | None = None,
    device: Devices = "cpu",
    journal: Journal | None = None,
) -> LocalizedQueries:
    """Localize queries and write the results into `output`.

    The networks run on a device, or on several, which share the queries, a process each: the results are the same.
    What the journal has is not done again; each query is written into it as soon as it is done.

    Written are `localizations.jsonl` (a record for each query), `poses.txt` (hloc's format, the scene's names),
    `localization.json` (the table), `report.html` with pictures, and then, as far as the names allow, `submission.txt`
    (as the dataset's benchmark wants it) and, if asked for, `colmap/`. What could not be written is a note of the
    table.
    """
    output.mkdir(parents=True, exist_ok=True)
    groups = together(queries, rigs or {})
    queries = [query for group in groups for query in group]
    same = same_images([query.path for query in queries], scene)
    itself = {query.name: same[query.path] for query in queries if query.path in same}
    done = {} if journal is None else dict(journal.done)
    waiting = [group for group in groups if any(query.name not in done for query in group)]
    given = {"initial": initial, "itself": itself, "unusable": unusable, "rigs": rigs}
    shared = share_out(partial(_localizing, localizer, given), waiting, device)
    for _, lines in track(shared, description="Localizing", total=len(waiting)):
        if journal is not None:
            journal.add(lines)
        done |= {result.name: result for result in map(from_line, lines)}
    found = [done[query.name] for query in queries]
    records = [to_record(result, query.cam_from_world) for result, query in zip(found, queries, strict=True)]
    write_at_once(output / "localizations.jsonl", "".join(json.dumps(r) + "\n" for r in records).encode())
    report = make_localization_report(
        localizer, found, queries, title=title, thresholds=thresholds, settings=dict(settings or {})
    )
    localized = {r.name: r.cam_from_world for r in found if r.cam_from_world is not None}
    written = {name: pose for name, pose in localized.items() if can_stand_in_file(name)}
    write_pose_file(output / "poses.txt", written)
    write_table(report, output / "localization.json")
    write_html_report(
        output, report=report, localizations=found, queries={q.name: q for q in queries}, map=localizer.map,
        scene=scene, command=command,
    )  # fmt: skip
    notes = [_left_out("poses.txt", [name for name in localized if name not in written])]
    try:
        unknown = write_submission(output / "submission.txt", found, dataset=dataset)
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


def _localizing(
    localizer: Localizer, given: dict[str, Any], device: torch.device
) -> Callable[[Sequence[SceneImage]], list[str]]:
    """What localizes queries that belong together, and gives a line of the journal for each."""
    localizer.network.to(device)
    if localizer.retrieval.network is not None:
        localizer.retrieval.network.to(device)
    return lambda queries: [to_line(result) for result in localize_queries(localizer, queries, **given)]


def _left_out(file: str, names: Sequence[str]) -> str:
    """A note on names that could not be written into a file; empty for none."""
    return f"{file} leaves out names that cannot stand there: {len(names)}, the first {names[0]!r}" if names else ""
