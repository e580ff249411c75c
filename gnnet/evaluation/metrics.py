"""Medians and recalls of localization errors, before and after refinement, and how two methods differ on each query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from gnnet.geometry.pose import Pose, pose_errors

Thresholds = tuple[tuple[float, float], ...]

# (metres, degrees): those of the long-term localization benchmark outdoors, the usual ones indoors (finer and
# finer), and the errors within which a pose counts as converged.
OUTDOOR: Thresholds = ((0.25, 2.0), (0.5, 5.0), (5.0, 10.0))
INDOOR: Thresholds = ((0.05, 5.0), (0.02, 2.0), (0.01, 1.0))
THRESHOLDS = {"indoor": INDOOR, "outdoor": OUTDOOR}
CONVERGED: tuple[float, float] = (0.05, 0.5)
INSIDE = 12.59  # squared Mahalanobis length of 95 % of errors with six degrees of freedom
_DRAWS = 2000  # of the bootstrap
_LEAST_ERROR = 1e-9  # metres; smaller position errors count as this, so that a ratio is finite


class ErrorSummary(NamedTuple):
    """Errors of many poses.

    `median_position` (metres) and `median_rotation` (degrees) are infinite where half the poses or more
    failed; `recall` is the share within each threshold, and `converged` the share within `CONVERGED`.
    """

    median_position: float
    median_rotation: float
    recall: tuple[float, ...]
    converged: float


class ConditionSummary(NamedTuple):
    """Errors on one condition: of the initial poses (`initial`) and after localization (`final`).

    `poses` is their number, which includes those without a final pose.
    """

    condition: str
    poses: int
    initial: ErrorSummary
    final: ErrorSummary


class LocalizationSummary(NamedTuple):
    """Summaries of the conditions with at least one query, in the metric's order, and of all queries together."""

    thresholds: Thresholds
    conditions: tuple[ConditionSummary, ...]
    overall: ConditionSummary


class LocalizationMetrics(Metric):
    """Median errors and recalls of each condition, gathered over processes; every query counts exactly once.

    Failures are infinite errors (NaN is taken as infinite), so they stay in the denominator. A padding
    sampler repeats samples: of those with the same index the first counts.

    Args:
        conditions: names of all conditions, in the same order in every process.
        thresholds: (metres, degrees) of each recall.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    samples: list[Tensor]  # torchmetrics makes one tensor of them when it gathers

    _COLUMNS = 6  # index, condition, initial position and rotation, final position and rotation

    def __init__(self, *, conditions: Sequence[str], thresholds: Thresholds = OUTDOOR, **kwargs):
        super().__init__(**kwargs)
        self.conditions = tuple(conditions)
        self.thresholds = tuple((float(metres), float(degrees)) for metres, degrees in thresholds)
        # Flat and of the default type, as what torchmetrics gathers from a process without queries.
        self.add_state("samples", default=[], dist_reduce_fx="cat")

    def update(
        self,
        *,
        initial_position: Tensor,
        initial_rotation: Tensor,
        position: Tensor,
        rotation: Tensor,
        condition: Sequence[str] | Tensor,
        index: Tensor,
    ) -> None:
        """Add queries.

        Args:
            initial_position, initial_rotation: (B,) errors of the initial pose: camera centre in metres, and degrees.
            position, rotation: (B,) errors after localization, likewise; infinite or NaN if it failed.
            condition: B names, or (B,) positions in `conditions`.
            index: (B,) position in the dataset, below 2²⁴ (float32 holds it exactly).

        Raises:
            ValueError: if a condition is not one of `conditions`.
        """
        dtype = torch.get_default_dtype()
        columns = [index, self._condition_ids(condition), initial_position, initial_rotation, position, rotation]
        samples = torch.stack([c.detach().to(device=self.device, dtype=dtype) for c in columns], -1)
        self.samples.append(samples.flatten())

    def compute(self) -> LocalizationSummary:
        """Summary of all queries of all processes."""
        samples = first_of_each_index(self.samples, self._COLUMNS)
        conditions = [
            self._summarize(name, of_condition)
            for number, name in enumerate(self.conditions)
            if len(of_condition := samples[samples[:, 1] == number])
        ]
        return LocalizationSummary(self.thresholds, tuple(conditions), self._summarize("all", samples))

    def position_errors(self) -> tuple[Tensor, Tensor]:
        """Position errors of the initial poses, and after localization, (N,) each in metres, by rising index."""
        samples = first_of_each_index(self.samples, self._COLUMNS)
        return samples[:, 2], samples[:, 4]

    def _summarize(self, condition: str, samples: Tensor) -> ConditionSummary:
        return ConditionSummary(
            condition=condition,
            poses=len(samples),
            initial=summarize_errors(samples[:, 2], samples[:, 3], thresholds=self.thresholds),
            final=summarize_errors(samples[:, 4], samples[:, 5], thresholds=self.thresholds),
        )

    def _condition_ids(self, condition: Sequence[str] | Tensor) -> Tensor:
        if isinstance(condition, Tensor):
            return condition
        unknown = sorted(set(condition) - set(self.conditions))
        if unknown:
            raise ValueError(
                f"condition {', '.join(unknown)} is not among those given to LocalizationMetrics: "
                f"{', '.join(self.conditions)}; pass the scene's `conditions`"
            )
        return torch.tensor([self.conditions.index(name) for name in condition])


def errors_of(pose: Pose | None, truth: Pose) -> tuple[float, float]:
    """Position (metres) and rotation error (degrees) of a pose; both infinite without one, or if one is not finite."""
    if pose is None:
        return math.inf, math.inf
    position, rotation = (error.item() for error in pose_errors(pose, truth))
    return (position, rotation) if math.isfinite(position + rotation) else (math.inf, math.inf)


def first_of_each_index(parts: Sequence[Tensor] | Tensor, columns: int) -> Tensor:
    """Rows (N, columns), float64, by rising index, of which the first of each index is kept.

    Args:
        parts: flat rows, the index first, as torchmetrics has gathered them or not.
    """
    rows = torch.cat(list(parts)) if isinstance(parts, Sequence) and parts else parts
    rows = torch.as_tensor(rows, dtype=torch.float64).cpu().view(-1, columns)
    return rows[np.unique(rows[:, 0], return_index=True)[1]]


def summarize_errors(position: Tensor, rotation: Tensor, *, thresholds: Thresholds) -> ErrorSummary:
    """Medians and recalls of position errors (N,) in metres and rotation errors (N,) in degrees.

    NaN counts as infinite. A pose failed if one of its errors is infinite; then both count as infinite.
    Without any pose all figures are NaN.
    """
    failed = ~(position.isfinite() & rotation.isfinite())
    position = position.masked_fill(failed, torch.inf)
    rotation = rotation.masked_fill(failed, torch.inf)

    def share(metres: float, degrees: float) -> float:
        return ((position <= metres) & (rotation <= degrees)).double().mean().item()

    return ErrorSummary(
        median_position=median(position),
        median_rotation=median(rotation),
        recall=tuple(share(metres, degrees) for metres, degrees in thresholds),
        converged=share(*CONVERGED),
    )


def median(values: Tensor) -> float:
    """Median of values (N,), the mean of the middle two for even N; they may be infinite, but not NaN."""
    # torch.median takes the lower of the middle two, and torch.quantile makes NaN of infinities.
    ordered = values.double().sort().values
    if not len(ordered):
        return torch.nan
    return ((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2).item()


class PairedDifference(NamedTuple):
    """How the position errors of a second method differ from those of a first, on the same queries.

    `ratio` is the geometric mean of second / first over the `both` queries that both localized, and `low` and `high`
    the bounds of its 95 % interval; `better` is the share of these on which the second is better. `first_only` and
    `second_only` queries were localized by one method alone: no ratio counts them. Without a query that both
    localized the figures are NaN; an interval needs two.
    """

    ratio: float
    low: float
    high: float
    better: float
    both: int
    first_only: int
    second_only: int

    def describe(self, first: str, second: str) -> str:
        """The difference in a sentence, with the names of the methods."""
        if self.both:
            text = f"{second} / {first}, paired: position errors × {self.ratio:.2f}"
            if self.both > 1:
                text += f" (95 %: {self.low:.2f} to {self.high:.2f})"
            text += f", {second} better in {100 * self.better:.0f} % of {self.both}"
        else:
            text = f"{second} / {first}, paired: no query was localized by both"
        alone = (first, self.first_only), (second, self.second_only)
        return "; ".join([text, *(f"{count} localized by {name} only" for name, count in alone if count)])


def paired_difference(first: Tensor, second: Tensor, *, seed: int = 0) -> PairedDifference:
    """Compare position errors (N,) in metres of two methods on the same N queries.

    The interval is a bootstrap's over queries: that of the mean of the logarithms of the ratios.

    Args:
        first, second: errors; infinite or NaN where a method has no pose.
        seed: of the bootstrap's draws.
    """
    localized = first.isfinite(), second.isfinite()
    both = localized[0] & localized[1]
    a, b = (errors[both].double().clamp(min=_LEAST_ERROR) for errors in (first, second))
    logs = (b / a).log()
    low = high = ratio = better = torch.nan
    if len(logs):
        ratio, better = logs.mean().exp().item(), (b < a).double().mean().item()
    if len(logs) > 1:
        generator = torch.Generator().manual_seed(seed)
        means = torch.stack(
            [logs[torch.randint(len(logs), (len(logs),), generator=generator)].mean() for _ in range(_DRAWS)]
        )
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().tolist()
    alone = ((mine & ~other).sum().item() for mine, other in (localized, localized[::-1]))
    return PairedDifference(ratio, low, high, better, int(both.sum()), *map(int, alone))


def squared_mahalanobis(estimate: Pose, truth: Pose, covariance: Tensor) -> Tensor:
    """δᵀ Σ⁻¹ δ of poses (...), with the covariance Σ (..., 6, 6) of δ in truth = exp(δ) estimate, to first order in δ.

    Its mean is 6 if the covariance is right, and 95 % are below `INSIDE`.
    """
    error = truth.to(torch.float64) @ estimate.to(torch.float64).inverse()
    skew = (error.rotation - error.rotation.mT) / 2
    delta = torch.cat([error.translation, torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1)], -1)
    scale = covariance.diagonal(dim1=-2, dim2=-1).rsqrt()  # metres and radians on one footing
    delta, covariance = delta * scale, covariance * scale[..., None] * scale[..., None, :]
    return (delta * torch.linalg.solve(covariance, delta[..., None]).squeeze(-1)).sum(-1)
