"""Where refinement starts from in validation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gnnet.data.batches import LocalizationBatch
from gnnet.geometry.pose import Pose, perturb


@dataclass(frozen=True)
class StartPoses:
    """Where refinement starts from: the reference's pose, or the true pose moved at random.

    Args:
        kind: `perturbation` of the truth, or `reference`.
        position: metres, the largest offset of the camera centre.
        rotation: degrees, the largest angle.
        count: starts a query.
        seed: of the perturbations; each follows from (seed, sample, number of the start).
        exact: offsets are exactly `position` and `rotation`, not uniform up to them.
    """

    kind: str = "perturbation"
    position: float = 0.3
    rotation: float = 3.0
    count: int = 1
    seed: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("perturbation", "reference"):
            raise ValueError(f"start poses are of kind 'perturbation' or 'reference', not {self.kind!r}")

    def draw(self, batch: LocalizationBatch, number: int) -> Pose:
        """Start `number` of each query, `cam_from_world` (B,)."""
        if self.kind == "reference":
            return batch.reference.cam_from_world
        truth = batch.query.cam_from_world
        starts = []
        for sample, index in enumerate(batch.index.tolist()):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) * 1009 + number)
            share = torch.ones(2) if self.exact else torch.rand(2, generator=generator)
            position, rotation = (share * torch.tensor([self.position, self.rotation])).tolist()
            starts.append(perturb(truth[sample], position, rotation, generator))
        return Pose.stack(starts)
