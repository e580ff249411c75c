"""Localization of an image on a compiled map, as evaluation, robots and notebooks call it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gnnet.data.images import limit_size
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.arguments import one_camera, one_pose, rgb_image
from gnnet.localization.hypotheses import choose_hypothesis
from gnnet.localization.initial_pose import PoseFromMatches, PoseSource, Proposal, View, rig_of
from gnnet.localization.map import Map, References, made_with
from gnnet.localization.query import Query
from gnnet.localization.refiner import Refiner
from gnnet.localization.result import Localization, Status
from gnnet.localization.retrieval import DescriptorRetrieval, InitialPoseRetrieval, Retrieval, rows_of
from gnnet.localization.rig import Rig, RigImage, RigLocalization, through_rig
from gnnet.localization.stopwatch import Stopwatch
from gnnet.models.checkpoint import read_checkpoint
from gnnet.models.enlarged import enlarged
from gnnet.models.pyramid import FeatureNetwork
from gnnet.scenes.names import match_names


@dataclass(frozen=True)
class Localizer:
    """Localizes queries on a map: references are retrieved, a pose is found, and refined.

    Args:
        retrieval: finds the references that a query is compared with, see `gnnet.localization.retrieval`.
        pose: finds the pose before refinement, see `gnnet.localization.initial_pose`.
        refiner: refines it; None leaves it as it is. It needs descriptors of feature maps, not local features.
        references: limit on the references that a query is compared with.
        best_references: limit on the references of a cluster of covisible ones whose matches PnP uses: those with the
            most. Refinement uses what all references of the cluster observe.
        reference_camera: project into the query with the nearest reference's camera (an ablation).
        distortion: False leaves out the distortion of the query's lens (an ablation).
        estimate_focal: take each query for a pinhole of unknown focal length, whatever its camera says, and estimate
            that from the matches.
        ready: the network, the map to localize on, and for a `pose` that needs it the map of local features; `on`
            gives them.

    Raises:
        ValueError: if settings contradict each other.
    """

    retrieval: Retrieval = field(default_factory=DescriptorRetrieval)
    pose: PoseSource = field(default_factory=PoseFromMatches)
    refiner: Refiner | None = field(default_factory=Refiner)
    references: int = 10
    best_references: int = 4
    reference_camera: bool = False
    distortion: bool = True
    estimate_focal: bool = False
    ready: tuple[FeatureNetwork, Map, Map | None] | None = None

    def __post_init__(self) -> None:
        if self.refiner is not None and self.pose.local_features is not None:
            raise ValueError(
                f"poses from {self.pose.local_features.name} cannot be refined, as the map then holds no descriptors "
                "of feature maps: localizer.refiner=null"
            )
        if self.references < 1 or self.best_references < 1:
            raise ValueError(f"{self.references} references, best {self.best_references}; expected 1 or more")

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        map: str | Path,
        *,
        companion: str | Path | None = None,
        enlarge: int = 1,
        device: torch.device | str = "cpu",
        allow: str | Sequence[str] = (),
        **settings: Any,
    ) -> Localizer:
        """A localizer with the network of a checkpoint and a map that was compiled with it.

        Args:
            path: a checkpoint that `train.py` wrote, a file of weights, or a name of weights in the package.
            map: the map's file.
            companion: file of the map of local features, for a `pose` that needs one (`HybridPose`).
            enlarge: as the map was compiled with; above 1 the network becomes an `Enlarged` one of this factor.
            device: where to run.
            allow: packages of your own whose classes the checkpoint may name.
            **settings: of the localizer, where other than those of `conf/localizer/sparse_to_dense.yaml`.

        Raises:
            FileNotFoundError, ValueError: if one is missing or broken, or the map is of another network.
        """
        network = enlarged(read_checkpoint(path).network(allow=allow), enlarge).eval().to(device)
        return cls(**settings).on(network, Map.open(map), None if companion is None else Map.open(companion))

    @property
    def title(self) -> str:
        """What it does, in a few words."""
        refined = "" if self.refiner is None else ", refined"
        return f"pose: {self.pose.name}{refined}, retrieval: {self.retrieval.name}"

    @property
    def network(self) -> FeatureNetwork:
        """From images to feature pyramids, in evaluation mode, on the device that localizes."""
        return self._on[0]

    @property
    def map(self) -> Map:
        """The map to localize on, compiled with the network."""
        return self._on[1]

    @property
    def _on(self) -> tuple[FeatureNetwork, Map, Map | None]:
        if self.ready is None:
            raise ValueError("this localizer has settings only: give it a network and a map by localizer.on(…)")
        return self.ready

    def on(self, network: FeatureNetwork, map: Map, companion: Map | None = None) -> Localizer:
        """The same settings with a network, in evaluation mode on its device, and a map.

        Args:
            network: describes the query.
            map: compiled with the network.
            companion: the same references described by local features, for a `pose` that needs it.

        Raises:
            ValueError: if a map is missing, was compiled with another network, retrieval network or local features,
                or the two are of different references.
        """
        if (companion is None) != (self.pose.companion is None):
            found = "none was given" if companion is None else f"{companion.path} was given and is not used"
            raise ValueError(f"poses by {self.pose.name} and a second map, of local features: {found}")
        for part, local in ((map, self.pose.local_features), (companion, self.pose.companion)):
            if part is None:
                continue
            needed = made_with(network, None if local is None else local.identity, self.retrieval.network)
            for key, expected in needed.items():
                if (found := part.about[key]) != expected:
                    kind = next((parameter.dtype for parameter in network.parameters()), torch.float32)
                    rounded = f" (its weights are {kind})" if key == "network" and kind != torch.float32 else ""
                    raise ValueError(
                        f"map {part.path} was compiled with the {key} {found}, not with {expected}{rounded}; "
                        "compile one with these (name another file)"
                    )
        if companion is not None and companion.about["scene"] != map.about["scene"]:
            raise ValueError(f"maps {map.path} and {companion.path} are of different references; compile both anew")
        return replace(self, ready=(network, map, companion))

    @torch.no_grad()
    def localize(
        self,
        image: Tensor,
        camera: Camera | None,
        *,
        name: str = "query",
        condition: str = "",
        place: str | None = None,
        references: Sequence[str] | None = None,
        initial: Pose | None = None,
        truth: Pose | None = None,
        itself: str | None = None,
        full_size: tuple[int, int] | None = None,
        focal: float | None = None,
    ) -> Localization:
        """Find the pose of an image in the map's world.

        Args:
            image: (3, H, W) RGB, uint8 or floating from 0 to 1, on any device.
            camera: its intrinsics, unbatched; its distortion is used. None: a pinhole, whose focal length is estimated
                from the matches.
            name: for the record; it does not tell which image of the map this is.
            condition, place: the query's, if known.
            references: names of the references to use, the nearest first; None retrieves them.
            initial: `cam_from_world` known beforehand, for `GivenPose` and `InitialPoseRetrieval` alone.
            truth: the true `cam_from_world`, for `OracleRetrieval`.
            itself: name of the reference that is this very image, if it is the map's own: it is localized without its
                observations, and the points that it saw are triangulated without it, see `Map.observations`.
            full_size: width and height in pixels of the photograph, if the image was shrunk from it while it was read;
                camera and `focal` are the photograph's.
            focal: focal length in pixels that is likely where the camera is not known, as EXIF's; see
                `gnnet.scenes.formats.images.exif_focal_length`.

        Raises:
            ValueError: if it has no network and map; if image, camera or pose are of another form; or if an initial
                pose is given that would not be used.
        """
        watch = Stopwatch(self._device)
        result, view = self._compare(
            watch, image, camera, name=name, condition=condition, place=place, references=references, initial=initial,
            truth=truth, itself=itself, full_size=full_size, focal=focal,
        )  # fmt: skip
        if view is not None:
            result, _ = self._localize(result, [view], watch)
        return replace(_said(result, view), seconds=watch.seconds)

    @torch.no_grad()
    def localize_rig(
        self,
        images: Sequence[RigImage],
        *,
        condition: str = "",
        place: str | None = None,
        initial: Pose | None = None,
        truth: Pose | None = None,
    ) -> RigLocalization:
        """Find the pose of several cameras that are fixed to each other, from an image of each of one instant.

        The images are matched each on its own. The pose is what all their matches agree on (generalised PnP), refined
        on the features of all images together.

        Args:
            images: one at least. One that its camera does not fit is left out.
            condition, place: the query's, if known.
            initial, truth: `rig_from_world`; else as for `localize`.

        Raises:
            ValueError: as `localize`; if there is no image, or if focal lengths are to be estimated.
        """
        if not images or self.estimate_focal:
            raise ValueError(f"{len(images)} images of a rig, estimate_focal={self.estimate_focal}; expected 1, False")
        watch, poses = Stopwatch(self._device), [one_pose(image.cam_from_rig, "rig's camera") for image in images]
        found = [
            self._compare(
                watch, image.image, one_camera(image.camera), name=image.name, condition=condition, place=place,
                references=image.references, initial=None if initial is None else pose @ one_pose(initial, "initial"),
                truth=None if truth is None else pose @ one_pose(truth, "true"), itself=image.itself, cam_from_rig=pose,
                full_size=image.full_size,
            )
            for image, pose in zip(images, poses, strict=True)
        ]  # fmt: skip
        views = [view for _, view in found if view is not None]
        if not views:
            return RigLocalization(None, None, tuple(one for one, _ in found))
        rig, proposal = self._localize(Localization("rig", Status.NO_REFERENCE, "", condition), views, watch)
        share = {stage: seconds / len(images) for stage, seconds in watch.seconds.items()}
        results = []
        for (own, view), pose in zip(found, poses, strict=True):
            if view is not None:
                own = replace(own, status=rig.status, reason=rig.reason)
            elif own.status == Status.NO_REFERENCE and rig.cam_from_world is not None:
                own = replace(own, status=rig.status, reason=f"{own.reason}; its pose is the other images'")
            if own.status == Status.LOCALIZED:
                own = through_rig(own, rig, pose)
            if view is not None and proposal.matched is not None:
                index = next(i for i, other in enumerate(views) if other is view)
                matches, inliers = proposal.matched.count(index, rig.cam_from_world, proposal.max_error)
                own = replace(own, matches=matches, inliers=inliers)
            results.append(replace(_said(own, view), seconds=share))
        return RigLocalization(rig.cam_from_world, rig.covariance, tuple(results))

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters(), torch.empty(0)).device

    def _compare(
        self, watch: Stopwatch, image: Tensor, camera: Camera | None, *, name: str, condition: str, place: str | None,
        references: Sequence[str] | None, initial: Pose | None, truth: Pose | None, itself: str | None,
        cam_from_rig: Pose | None = None, full_size: tuple[int, int] | None = None, focal: float | None = None,
    ) -> tuple[Localization, View | None]:  # fmt: skip
        """The features of an image and the references to compare it with; None, if it has none or is not usable."""
        network, map, companion = self._on
        if initial is not None and not (self.pose.takes_initial or isinstance(self.retrieval, InitialPoseRetrieval)):
            raise ValueError(
                "an initial pose is given, but this localizer uses none; take pose=GivenPose(), which refines it, or "
                "retrieval=InitialPoseRetrieval(), which matches the references near it"
            )
        image, known = rgb_image(image), camera is not None and not self.estimate_focal
        size = (image.shape[-1], image.shape[-2]) if full_size is None else full_size
        camera = one_camera(camera) if camera is not None and known else _guessed_camera(size, focal)
        initial = None if initial is None else one_pose(initial, "initial")
        truth = None if truth is None else one_pose(truth, "true")
        width, height = camera.size.round().int().tolist()
        if (width, height) != size:
            reason = f"the image is {size[0]}×{size[1]} pixels, its camera says {width}×{height}"
            return Localization(name, Status.NO_CAMERA, reason, condition), None
        if self.pose.takes_initial and initial is None:
            return Localization(name, Status.NO_POSE, "no initial pose", condition), None
        image, _ = limit_size(image, map.largest_side)
        pyramid = network(image[None].to(self._device)).each(Tensor.float)  # as the map's descriptors are
        watch.lap("features")
        full_camera = camera.to(torch.float64)
        factors = torch.tensor([image.shape[-1] / size[0], image.shape[-2] / size[1]], dtype=torch.float64)
        query = Query(
            name, image, pyramid, full_camera.scale(factors), full_camera, place, initial, truth, itself,
            focal_known=known, focal_likely=focal is not None, cam_from_rig=cam_from_rig,
        )  # fmt: skip
        unknown: list[str] = []
        if references is None:
            rows = self.retrieval.find(query, map, self.references)
            reason = f"retrieval by {self.retrieval.name} found no reference"
        else:
            rows = rows_of(references, query, map, self.references)
            matched = set(match_names(references, map.names).given.values())
            unknown = [name for name in references if name not in matched]
            reason = f"the map has none of the references named{f' ({unknown[0]}, …)' if unknown else ''}"
        excluded = None if itself is None else map.rows.get(itself)
        beside = None if companion is None else References(companion, rows, excluded=excluded)
        chosen = References(map, rows, beside, excluded)
        watch.lap("retrieval")
        result = Localization(name, Status.NO_REFERENCE, reason, condition, references=chosen.names)
        if not len(rows):
            return result, None
        return result, View(replace(query, camera=self._camera_to_use(query, chosen)), chosen, tuple(unknown))

    def _localize(
        self, result: Localization, views: Sequence[View], watch: Stopwatch
    ) -> tuple[Localization, Proposal]:  # fmt: skip
        """The pose of a query, or of a rig, before refinement and refined, and what it was found from."""
        proposal = self.pose.propose(views, self.best_references, watch)
        count = 0 if proposal.matched is None else int(proposal.matched.matches.kept.sum())
        result = replace(result, status=proposal.status, reason=proposal.reason, matches=count)
        if not proposal.hypotheses:
            return result, proposal
        rig = rig_of(views)
        if not views[0].query.focal_known:  # of a rig all are
            if proposal.camera is None:
                reason = f"the focal length is not known, and poses that are {self.pose.name} estimate none"
                return replace(result, status=Status.NO_CAMERA, reason=reason), proposal
            rig, query = Rig.of(proposal.camera), views[0].query
            full = proposal.camera.scale(query.full_camera.size / query.camera.size)
            focal = float(full.parameters[0])
            result = replace(result, camera=full, reason=f"{result.reason}, focal length {focal:.1f} px estimated")
        best = proposal.hypotheses[0]
        pose = best.cam_from_world
        result = replace(result, cam_from_world=pose, initial=pose, inliers=best.count)
        if self.refiner is None:
            return result, proposal
        # One with half the inliers of the best does not overtake it by refinement.
        tried = [h for h in proposal.hypotheses if 2 * h.count >= best.count][: self.refiner.hypotheses]
        refinement = self.refiner.refine_hypotheses(
            tried, [view.references.observations for view in views], [view.query.pyramid for view in views], rig,
            matched=proposal.matched, exact=proposal.exact,
        )  # fmt: skip
        watch.lap("refinement")
        return choose_hypothesis(result, tried, refinement, proposal.matched, proposal.max_error), proposal

    def _camera_to_use(self, query: Query, references: References) -> Camera:
        """The query's camera, or what an ablation puts in its place."""
        camera = query.camera
        if self.reference_camera:
            own = references.map.cameras[int(references.rows[0])]
            camera = own.scale(camera.size / own.size)
        if not self.distortion:
            camera = camera.without_distortion()
        return camera


def _said(result: Localization, view: View | None) -> Localization:
    """The same with the references that were named and the map has not."""
    if view is None or not view.unknown:
        return result
    listed = ", ".join(view.unknown[:3]) + (", …" if len(view.unknown) > 3 else "")
    return replace(result, reason=f"{result.reason}; the map has no reference {listed}")


def _guessed_camera(size: tuple[int, int], focal: float | None) -> Camera:
    """A pinhole camera of an image's width and height; without a focal length, with COLMAP's guess of it."""
    width, height = size
    parameters = [1.2 * max(size) if focal is None else focal, width / 2, height / 2]
    return Camera.from_colmap("SIMPLE_PINHOLE", width, height, parameters, dtype=torch.float64)
