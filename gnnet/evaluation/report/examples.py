"""Pictures of single queries: matches, features, and the pose before and after refinement."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from gnnet.data.batches import LocalizationBatch
from gnnet.data.matching_pairs import MatchingDataset
from gnnet.evaluation.report import pictures
from gnnet.evaluation.starts import InitialPoses, refined_errors
from gnnet.geometry.pose import Pose, pose_errors
from gnnet.localization.matching import Matcher
from gnnet.localization.refiner import Refiner


@torch.no_grad()
def draw_examples(
    network: nn.Module,
    samples: Iterable[LocalizationBatch],
    folder: Path,
    *,
    refiner: Refiner,
    starts: InitialPoses,
) -> None:
    """Draw each sample's matches, features and refinement, and all of them in `overview.png`.

    Args:
        network: on the device of the samples.
        samples: batches of one query each, best one a condition.
        folder: where the pictures are written.
        refiner: settings of refinement.
        starts: the initial pose of each query.
    """
    network.eval()
    rows = [_draw_example(network, batch, folder, refiner, starts) for batch in samples]
    pictures.overview(rows, path=folder / "overview.png")


@torch.no_grad()
def draw_matches(network: nn.Module, pairs: MatchingDataset, folder: Path) -> None:
    """Draw the matches of keypoints in one pair of each condition, coloured by their errors.

    Args:
        network: on the device where it is to run.
        pairs: pairs of images of fixed cameras.
        folder: where the pictures are written.
    """
    network.eval()
    device = next(network.parameters()).device
    for condition, index in pairs.one_of_each_condition().items():
        pair = pairs[0, index]
        a, b = (network(image[None].to(device)) for image in (pair.image_a, pair.image_b))
        found = Matcher().match(a, pair.keypoints_a[None].to(device), b).keypoints[0].cpu()
        pictures.matches(
            pair.image_a, pair.image_b, pair.keypoints_a, found, errors=(found - pair.keypoints_b).norm(dim=-1),
            path=folder / f"matches_{condition}.png",
        )  # fmt: skip
        pictures.feature_maps(pair.image_a, a.cpu(), path=folder / f"features_{condition}_a.png")
        pictures.feature_maps(pair.image_b, b.cpu(), path=folder / f"features_{condition}_b.png")


def _draw_example(
    network: nn.Module, batch: LocalizationBatch, folder: Path, refiner: Refiner, starts: InitialPoses
) -> pictures.OverviewRow:
    query, reference = network(batch.query.image), network(batch.reference.image)
    initial = starts.draw(batch, 0)
    refinement = refiner.refine(query, reference, batch, initial)

    def project(pose: Pose) -> tuple[Tensor, Tensor]:
        xy, valid = batch.query.camera.project(pose.transform(batch.points))
        return xy[0], valid[0]

    truth, in_query = project(batch.query.cam_from_world)
    shown = batch.valid[0] & in_query

    def seen_from(pose: Pose) -> Tensor:
        xy, valid = project(pose)
        return torch.where(valid[:, None], xy, torch.nan)[shown].cpu()

    name, image = batch.condition[0], batch.query.image[0].cpu()
    before = "{:.2f} m, {:.1f}°".format(*(e.item() for e in pose_errors(initial, batch.query.cam_from_world)))
    after = "{:.3f} m, {:.2f}°".format(*(e.item() for e in refined_errors(refinement, batch.query.cam_from_world)))
    row = pictures.OverviewRow(
        condition=name, image=image, features=query.maps[-1][0].float().cpu(), stride=query.strides[-1],
        xy_truth=truth[shown].cpu(), xy_before=seen_from(initial), xy_after=seen_from(refinement.cam_from_world),
        before=before, after=after,
    )  # fmt: skip
    pictures.before_after(
        image, xy_truth=row.xy_truth, xy_before=row.xy_before, xy_after=row.xy_after, before=before, after=after,
        path=folder / f"before_after_{name}.png",
    )  # fmt: skip
    pictures.feature_maps(image, query.cpu(), path=folder / f"features_{name}.png")

    matched = Matcher().match(reference, batch.keypoints, query).keypoints[0]
    pictures.matches(
        batch.reference.image[0].cpu(),
        image,
        batch.keypoints[0][shown].cpu(),
        matched[shown].cpu(),
        errors=(matched - truth).norm(dim=-1)[shown].cpu(),
        path=folder / f"matches_{name}.png",
    )
    return row
