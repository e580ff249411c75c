"""Feature-metric localization, as training, evaluation, robots and notebooks call it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gnnet.data.batches import LocalizationBatch
from gnnet.data.images import limit_size
from gnnet.geometry.camera import Camera
from gnnet.geometry.interpolation import Gradient
from gnnet.geometry.pose import Pose
from gnnet.localization.hypotheses import Hypothesis, choose_hypothesis, pose_hypotheses
from gnnet.localization.local_features import LocalFeatures
from gnnet.localization.map import Map, Observations
from gnnet.localization.matching import KeypointMatches, Matcher
from gnnet.localization.pnp import PoseSolver
from gnnet.localization.refinement import Refinement, refine_pose, sample_descriptors
from gnnet.localization.result import Localization, Status
from gnnet.localization.retrieval import gem, nearest_by_pose, nearest_references
from gnnet.localization.robust import Robust
from gnnet.localization.stopwatch import Stopwatch
from gnnet.models.checkpoint import network_of_checkpoint
from gnnet.models.pyramid import FeaturePyramid
from gnnet.models.weights import fingerprint

Mode = Literal["nearest", "sparse", "sparse_to_dense", "refine"]
RetrievalKind = Literal["network", "netvlad", "pairs", "oracle"]


@dataclass(frozen=True)
class Localizer:
    """Localizes queries: retrieval, matching, PnP in RANSAC, feature-metric refinement.

    The settings alone are what training validates with (`refine`); with a network and a map it localizes
    an image without knowing where it was taken (`localize`).

    Args:
        robust: cost of a residual.
        gradient: how gradients of the feature maps are taken.
        iterations: limit on each level.
        min_points: fewer valid points fail a query.
        mode: `sparse_to_dense`, references' descriptors searched in the query's maps; `sparse`, local
            features matched with the query's; `nearest`, the pose of the nearest reference; `refine`,
            poses that the caller gives.
        levels: of the pyramid that refinement uses, by position, 0 the coarsest; None uses all.
        refine_poses: refine what matching gives. Needs descriptors of maps, so not with `sparse`.
        references: so many are used for a query.
        retrieval: how they are found: by the `network`'s own global descriptor, by `netvlad`, as a `pairs`
            file lists them, or by the `oracle` of the true pose.
        netvlad: checkpoint, for retrieval `netvlad`.
        pairs: hloc's pairs file, for retrieval `pairs`.
        same_camera: retrieve only references whose camera has the query's focal lengths and centre (to 1 %);
            None: if the map's scene says so, and some are (a phone's picture is searched in all of a car's).
        same_place: retrieve only references of the query's place, where that is known; None as above.
        best_references: of a cluster of covisible ones, so many are used: those with the most matches (without
            matches, the nearest).
        hypotheses: clusters of covisible references that are refined, at most; the best final cost wins.
        points: observations that a refinement uses, at most.
        reference_camera: project into the query with the nearest reference's camera (an ablation).
        distortion: of the query's lens; False leaves it out (an ablation).
        matcher, solver: settings of the matching, and of the pose from matches.
        ratio: of Lowe's test, in mode `sparse`.
        local_features: of mode `sparse`.
        network: image to feature pyramid, in evaluation mode on its device.
        map: compiled with the same network.
        retrieval_network: image to global descriptor, if the map was compiled with one.

    Raises:
        ValueError: if settings contradict each other.
    """

    robust: Robust
    gradient: Gradient = "central"
    iterations: int = 20
    min_points: int = 12
    mode: Mode = "sparse_to_dense"
    levels: Sequence[int] | None = None
    refine_poses: bool = True
    references: int = 10
    retrieval: RetrievalKind = "network"
    netvlad: str | Path | None = None
    pairs: str | Path | None = None
    same_camera: bool | None = None
    same_place: bool | None = None
    best_references: int = 4
    hypotheses: int = 3
    points: int = 2048
    reference_camera: bool = False
    distortion: bool = True
    matcher: Matcher = field(default_factory=Matcher)
    solver: PoseSolver = field(default_factory=PoseSolver)
    ratio: float = 0.8
    local_features: LocalFeatures | None = None
    network: nn.Module | None = None
    map: Map | None = None
    retrieval_network: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.mode == "sparse" and (self.refine_poses or self.local_features is None):
            raise ValueError("localizer.mode=sparse needs local_features and refine_poses=false: see localizer=sparse")
        if self.mode not in get_args(Mode) or self.retrieval not in get_args(RetrievalKind):
            raise ValueError(
                f"localizer.mode={self.mode}, localizer.retrieval={self.retrieval}; expected one of "
                f"{', '.join(get_args(Mode))}, and of {', '.join(get_args(RetrievalKind))}"
            )
        if self.retrieval in ("netvlad", "pairs") and getattr(self, self.retrieval) is None:
            raise ValueError(f"localizer.retrieval={self.retrieval} needs a file: localizer.{self.retrieval}=FILE")
        if self.references < 1 or self.hypotheses < 1:
            raise ValueError(f"{self.references} references and {self.hypotheses} hypotheses; expected 1 or more")

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        map: str | Path,
        *,
        device: torch.device | str = "cpu",
        allow: str | Sequence[str] = (),
        **settings,
    ) -> Localizer:
        """A localizer with the network of a checkpoint and a map that was compiled with it.

        Args:
            path: of a checkpoint that `train.py` wrote.
            map: of the map's file.
            device: where to run.
            allow: packages of your own whose classes the checkpoint may name.
            **settings: others than those of `conf/localizer/sparse_to_dense.yaml`.

        Raises:
            FileNotFoundError, ValueError: if one is missing or broken, or the map is of another network.
        """
        network = network_of_checkpoint(path, allow=allow).eval().to(device)
        defaults = {"robust": Robust(kind="cauchy", scale=0.3), "matcher": Matcher(ratio=0.9)}
        return cls(**{**defaults, **settings}).on(network, Map.open(map))

    def on(self, network: nn.Module, map: Map, retrieval_network: nn.Module | None = None) -> Localizer:
        """The same settings with a network and a map.

        Raises:
            ValueError: if the map was compiled with another network, or for another mode.
        """
        wanted = None if self.local_features is None or self.mode != "sparse" else self.local_features.name
        retrieval = "gem" if retrieval_network is None else fingerprint(retrieval_network)
        for key, expected in (("network", fingerprint(network)), ("local features", wanted), ("retrieval", retrieval)):
            found = map.about[key]
            if found != expected:
                raise ValueError(
                    f"map {map.path} was compiled with the {key} {found}, not with {expected}; "
                    "compile one with these (name another file)"
                )
        return replace(self, network=network, map=map, retrieval_network=retrieval_network)

    def features(self, network: nn.Module, batch: LocalizationBatch) -> tuple[FeaturePyramid, FeaturePyramid]:
        """Pyramids of the query and the reference images."""
        return network(batch.query.image), network(batch.reference.image)

    def refine(
        self, query: FeaturePyramid, reference: FeaturePyramid, batch: LocalizationBatch, initial: Pose
    ) -> Refinement:
        """Refine `initial` (cam_from_world of the queries, batch shape (B,)) on the reference's points."""
        in_reference = batch.reference.cam_from_world.transform(batch.points)
        keypoints, visible = batch.reference.camera.project(in_reference)
        descriptors, descriptor_valid = sample_descriptors(reference, keypoints)
        return self._refine(
            query, descriptors, descriptor_valid, batch.points, batch.valid & visible, batch.query.camera, initial
        )

    def _refine(
        self,
        pyramid: FeaturePyramid,
        descriptors: tuple[Tensor, ...],
        descriptor_valid: tuple[Tensor, ...],
        points: Tensor,
        valid: Tensor,
        camera: Camera,
        initial: Pose,
    ) -> Refinement:
        if self.levels is not None:
            levels = list(self.levels)
            pyramid = pyramid.select(levels)
            descriptors, descriptor_valid = (tuple(x[i] for i in levels) for x in (descriptors, descriptor_valid))
        return refine_pose(
            pyramid=pyramid,
            descriptors=descriptors,
            descriptor_valid=descriptor_valid,
            points=points,
            valid=valid,
            camera=camera,
            initial=initial,
            robust=self.robust,
            gradient=self.gradient,
            iterations=self.iterations,
            min_points=self.min_points,
        )

    @torch.no_grad()
    def localize(
        self,
        image: Tensor,
        camera: Camera,
        *,
        name: str = "query",
        condition: str = "",
        place: str | None = None,
        references: Sequence[str] | None = None,
        start: Pose | None = None,
    ) -> Localization:
        """Find the pose of an image in the map's world.

        Args:
            image: (3, H, W) uint8 RGB.
            camera: of it, unbatched; its distortion is used.
            name: a reference of this name is never used: a map's own image is localized without its observations.
            condition, place: of the query, if known.
            references: names of the references to use, the nearest first (a pairs file's); None retrieves them.
            start: pose to refine, instead of what matching finds; the references nearest to it are used.

        Raises:
            ValueError: if network or map are missing, or references where the retrieval does not find them.
        """
        if self.network is None or self.map is None:
            raise ValueError("this localizer has settings only: give it a network and a map by localizer.on(…)")
        if references is None and self.mode != "refine" and self.retrieval in ("pairs", "oracle"):
            raise ValueError(f"retrieval={self.retrieval} does not search: name the references of {name}")
        width, height = camera.size.round().int().tolist()
        if (width, height) != (image.shape[-1], image.shape[-2]):
            reason = f"the image is {image.shape[-1]}×{image.shape[-2]} pixels, its camera says {width}×{height}"
            return Localization(name, Status.NO_CAMERA, reason, condition)
        device = next(self.network.parameters(), torch.empty(0)).device
        watch = Stopwatch(device)
        image, factors = limit_size(image, self.map.largest_side)
        asked = camera.to(torch.float64)
        camera = asked.scale(torch.from_numpy(factors))
        pyramid = self.network(image[None].to(device))
        watch.lap("features")
        rows = self._retrieve(image, pyramid, asked, name, place, references, start)
        watch.lap("retrieval")
        used = tuple(self.map.names[row] for row in rows.tolist())
        result = Localization(name, Status.NO_REFERENCE, "no reference to match with", condition, references=used)
        if not len(rows):
            return replace(result, seconds=watch.seconds)
        camera = self._camera_to_use(camera, rows)
        reads = self.mode != "nearest" or self.refine_poses
        observations = self.map.observations(rows) if reads else None
        result, hypotheses, matches = self._hypotheses(result, rows, observations, image, pyramid, camera, start, watch)
        if hypotheses and self.refine_poses:
            tried = [h for h in hypotheses if h.cam_from_world is not None][: self.hypotheses]
            refinement = self._refine_hypotheses(tried, observations, pyramid, camera)
            watch.lap("refinement")
            result = choose_hypothesis(result, tried, refinement, matches, observations, camera, self.solver)
        return replace(result, seconds=watch.seconds)

    def _camera_to_use(self, camera: Camera, rows: Tensor) -> Camera:
        """The query's, or what an ablation puts in its place."""
        if self.reference_camera:
            own = self.map.cameras[int(rows[0])]
            camera = own.scale(camera.size / own.size)
        if not self.distortion:
            camera = Camera(camera.size, torch.cat([camera.parameters[:4], torch.zeros(4, dtype=torch.float64)]))
        return camera

    def _hypotheses(
        self, result: Localization, rows: Tensor, observations: Observations | None, image: Tensor,
        pyramid: FeaturePyramid, camera: Camera, start: Pose | None, watch: Stopwatch,
    ) -> tuple[Localization, list[Hypothesis], KeypointMatches | None]:  # fmt: skip
        """Poses to begin with, the best first, in `result` too; none where there is no pose."""
        matches = None
        if self.mode == "refine" and start is None:
            return replace(result, status=Status.NO_POSE, reason="no start pose"), [], None
        if self.mode in ("nearest", "refine"):
            pose, reason = (
                (start.to(torch.float64), "the pose given")
                if self.mode == "refine"
                else (self.map.poses[int(rows[0])], "the nearest reference's pose")
            )
            nothing = torch.zeros(0, dtype=torch.bool)
            hypotheses = [Hypothesis(pose, rows[: self.best_references], nothing, 0, reason)]
        else:
            matches = self._match(observations, image, pyramid, camera)
            watch.lap("matching")
            result = replace(result, matches=int(matches.kept.sum()))
            if result.matches == 0:
                return replace(result, status=Status.NO_MATCHES, reason="nothing matches"), [], None
            hypotheses = pose_hypotheses(
                matches.keypoints, matches.kept, observations, self.map.shared(rows), rows, camera, self.solver,
                best=self.best_references,
            )  # fmt: skip
            watch.lap("pose")
        best = hypotheses[0]
        if best.cam_from_world is None:
            return replace(result, status=Status.NO_POSE, reason=best.reason), [], None
        result = replace(
            result, status=Status.LOCALIZED, reason=best.reason, cam_from_world=best.cam_from_world,
            start=best.cam_from_world, inliers=best.count,
        )  # fmt: skip
        return result, hypotheses, matches

    def _retrieve(
        self, image: Tensor, pyramid: FeaturePyramid, camera: Camera, name: str, place: str | None,
        references: Sequence[str] | None, start: Pose | None,
    ) -> Tensor:  # fmt: skip
        """Rows (K,) of the map's references for a query, the nearest first."""
        itself = self.map.rows.get(name, -1)
        if references is not None:
            rows = [self.map.rows[r] for r in dict.fromkeys(references) if r in self.map.rows and r != name]
            return torch.tensor(rows[: self.references], dtype=torch.int64)
        if start is not None:
            rows = nearest_by_pose(start, self.map.poses, self.references + 1)
            return rows[rows != itself][: self.references]
        allowed = torch.ones(len(self.map.names), dtype=torch.bool)
        within = self.map.retrieve_within
        if ("place" in within if self.same_place is None else self.same_place) and place in self.map.places:
            allowed &= torch.tensor([other == place for other in self.map.places])
        if self.same_camera or (self.same_camera is None and "camera" in within):
            own, others = camera.parameters[:4], self.map.cameras.parameters[:, :4]
            alike = allowed & ((others - own).abs() <= 0.01 * own.abs()).all(-1)
            allowed = alike if self.same_camera or alike.any() else allowed
        if self.retrieval_network is None:
            described = gem(pyramid)
        else:
            described = self.retrieval_network(image[None].to(pyramid.maps[0].device))
        rows, _ = nearest_references(
            self.map.whitening.apply(described.float().cpu()),
            self.map.global_descriptors,
            self.references,
            query_group=torch.zeros(1, dtype=torch.int64),
            reference_group=torch.where(allowed, 0, 1),
            not_itself=torch.tensor([itself]),
        )
        return rows[0][rows[0] >= 0]

    def _match(
        self, observations: Observations, image: Tensor, pyramid: FeaturePyramid, camera: Camera
    ) -> KeypointMatches:
        device = pyramid.maps[0].device
        if self.mode == "sparse":
            return self.local_features.match(
                observations, image, reference_sizes=self.map.image_sizes, ratio=self.ratio
            )
        found = self.matcher.match_observations(_descriptors_on(observations, device), pyramid)
        keypoints = found.keypoints[0].cpu().double()
        return found._replace(keypoints=keypoints, kept=found.kept[0].cpu() & camera.contains(keypoints))

    def _refine_hypotheses(
        self, hypotheses: list[Hypothesis], observations: Observations, pyramid: FeaturePyramid, camera: Camera
    ) -> Refinement:
        """All hypotheses in one batch, each on observations of its own references: inliers first, then others."""
        device, count = pyramid.maps[0].device, self.points
        index = torch.zeros(len(hypotheses), count, dtype=torch.int64)
        valid = torch.zeros(len(hypotheses), count, dtype=torch.bool)
        for i, hypothesis in enumerate(hypotheses):
            chosen = hypothesis.observations(observations, count)
            index[i, : len(chosen)], valid[i, : len(chosen)] = chosen, True
        widest = max(1, int(valid.sum(1).max()))
        index, valid = index[:, :widest], valid[:, :widest]
        # A world with its origin near by, in which float32 is exact enough.
        origin = hypotheses[0].cam_from_world.center()
        poses = Pose.stack([h.cam_from_world for h in hypotheses])
        moved = Pose(poses.rotation, poses.translation + poses.rotation @ origin)
        points = (observations.points[index] - origin).float()
        refined = self._refine(
            pyramid,
            tuple(d[index].to(device) for d in observations.descriptors),
            tuple(observations.valid[:, level][index].to(device) for level in range(len(observations.descriptors))),
            points.to(device),
            valid.to(device),
            Camera.stack([camera] * len(hypotheses)).to(device=device, dtype=torch.float32),
            moved.to(device=device, dtype=torch.float32),
        )
        back = refined.cam_from_world.to(device="cpu", dtype=torch.float64)
        # float32's rotation is none to the digits of float64, which far from the origin are metres.
        back = Pose.from_quaternion(back.quaternion(), back.translation)
        return replace(refined, cam_from_world=Pose(back.rotation, back.translation - back.rotation @ origin))


def _descriptors_on(observations: Observations, device: torch.device) -> Observations:
    return observations._replace(descriptors=tuple(d.to(device) for d in observations.descriptors))
