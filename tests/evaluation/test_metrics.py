import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gnnet.evaluation.metrics import (
    INDOOR,
    INSIDE,
    OUTDOOR,
    LocalizationMetrics,
    median,
    paired_difference,
    squared_mahalanobis,
    summarize_errors,
)
from gnnet.geometry.pose import Pose, so3_exp

CONDITIONS = ("day", "night", "rain")


def queries(count=7):
    """Columns of `update` for `count` queries, one of them a failure."""
    generator = torch.Generator().manual_seed(count)
    final = torch.rand(count, 2, generator=generator) * torch.tensor([0.6, 6.0])
    final[min(2, count - 1)] = torch.inf
    return {
        "initial_position": torch.rand(count, generator=generator) * 4,
        "initial_rotation": torch.rand(count, generator=generator) * 8,
        "position": final[:, 0],
        "rotation": final[:, 1],
        "condition": torch.arange(count) % 2,
        "index": torch.arange(count),
    }


def take(columns, rows):
    return {name: values[rows] for name, values in columns.items()}


def summary_of(columns, **kwargs):
    metric = LocalizationMetrics(conditions=CONDITIONS, **kwargs)
    metric.update(**columns)
    return metric.compute()


def test_summary_against_numpy():
    columns = queries(9)
    summary = summary_of(columns)
    position, rotation = columns["position"].double().numpy(), columns["rotation"].double().numpy()
    for line, rows in (
        (summary.overall, np.arange(9)),
        (summary.conditions[0], np.arange(0, 9, 2)),
        (summary.conditions[1], np.arange(1, 9, 2)),
    ):
        assert line.poses == len(rows)
        assert line.final.median_position == pytest.approx(np.median(position[rows]))
        assert line.final.median_rotation == pytest.approx(np.median(rotation[rows]))
        assert line.initial.median_position == pytest.approx(np.median(columns["initial_position"].numpy()[rows]))
        for recall, (metres, degrees) in zip(line.final.recall, OUTDOOR, strict=True):
            assert recall == pytest.approx(np.mean((position[rows] <= metres) & (rotation[rows] <= degrees)))
    assert [line.condition for line in summary.conditions] == ["day", "night"]  # no query in the rain
    assert summary.overall.condition == "all"


def test_failures_stay_in_the_denominator_and_nan_is_a_failure():
    good = torch.tensor([0.01, torch.inf, torch.nan, 0.02])
    summary = summarize_errors(good, torch.full((4,), 0.1), thresholds=INDOOR)
    assert summary.recall == (0.5, 0.5, 0.25)
    assert summary.converged == 0.5
    assert summary.median_position == math.inf
    # A NaN in the position alone must not leave a finite rotation in the median.
    assert summary.median_rotation == math.inf


def test_a_repeated_sample_counts_once():
    columns = queries()
    assert summary_of(take(columns, [0, 1, 2, 3, 4, 5, 6, 0, 3])) == summary_of(columns)
    metric = LocalizationMetrics(conditions=CONDITIONS)
    metric.update(**take(columns, [6, 5, 4, 3, 2, 1, 0, 3]))
    before, after = metric.position_errors()
    assert before.tolist() == columns["initial_position"].tolist() and after.tolist() == columns["position"].tolist()


def test_updates_in_parts_in_any_order_and_reset():
    columns = queries()
    metric = LocalizationMetrics(conditions=CONDITIONS)
    for rows in ([5, 6], [0], [4, 1, 2, 3]):
        metric.update(**take(columns, rows))
    assert metric.compute() == summary_of(columns)
    metric.reset()
    metric.update(**take(columns, [0, 1]))
    assert metric.compute().overall.poses == 2


def test_conditions_by_name():
    columns = queries()
    named = {**columns, "condition": [CONDITIONS[i] for i in columns["condition"]]}
    assert summary_of(named) == summary_of(columns)
    with pytest.raises(ValueError, match=r"condition fog is not among .*day, night, rain"):
        summary_of({**take(columns, [0]), "condition": ["fog"]})


def test_thresholds_are_a_setting():
    columns = queries()
    assert len(summary_of(columns, thresholds=((1.0, 10.0),)).overall.final.recall) == 1


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_queries_give_nan():
    summary = LocalizationMetrics(conditions=CONDITIONS).compute()
    assert summary.overall.poses == 0
    assert math.isnan(summary.overall.final.median_position)
    assert summary.conditions == ()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 1.0, 2.0], 2.0),
        ([4.0, 1.0, 3.0, 2.0], 2.5),
        ([1.0, math.inf], math.inf),
        ([math.inf, math.inf], math.inf),
        ([math.inf, 1.0, 2.0], 2.0),
    ],
)
def test_median(values, expected):
    assert median(torch.tensor(values)) == expected


def _process(rank, rendezvous, counts, results):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        for count in counts:
            columns = queries(count)
            metric = LocalizationMetrics(conditions=CONDITIONS)
            # One by one, as a distributed sampler deals them; both processes draw the last of several.
            for row in [*range(rank, count, 2), *([count - 1] if count > 1 else [])]:
                metric.update(**take(columns, [row]))
            torch.save(metric.compute(), f"{results}.{count}.{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    counts = (7, 1)  # with one query a process has none
    arguments = str(tmp_path / "rendezvous"), counts, str(tmp_path / "summary")
    mp.start_processes(_process, arguments, nprocs=2, start_method="forkserver")
    for count in counts:
        expected = summary_of(queries(count))
        assert expected.overall.poses == count
        for rank in range(2):
            assert torch.load(tmp_path / f"summary.{count}.{rank}", weights_only=False) == expected


def test_a_constant_ratio_has_an_interval_of_no_width():
    first = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.01
    found = paired_difference(first, 0.8 * first)
    assert found[:4] == pytest.approx((0.8, 0.8, 0.8, 1.0)) and found[4:] == (20, 0, 0)
    assert paired_difference(first, first)[:4] == pytest.approx((1.0, 1.0, 1.0, 0.0))  # equal is not better
    assert paired_difference(torch.zeros(3), torch.zeros(3)).ratio == 1.0


def test_the_mean_of_ratios_is_geometric_and_both_ways_agree():
    first, second = torch.tensor([1.0, 1.0, 2.0, 4.0]), torch.tensor([2.0, 0.5, 1.0, 1.0])
    found, back = paired_difference(first, second), paired_difference(second, first)
    assert found.ratio == pytest.approx((2 * 0.5 * 0.5 * 0.25) ** 0.25) and found.better == 0.75
    assert back.ratio == pytest.approx(1 / found.ratio) and back.better == 0.25
    assert found.low < found.ratio < found.high
    assert found == paired_difference(first, second)


@pytest.mark.slow
def test_the_interval_covers_the_true_ratio_as_often_as_it_says():
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        first = torch.rand(40, generator=generator, dtype=torch.float64) + 0.1
        noise = 0.5 * torch.randn(40, generator=generator, dtype=torch.float64)
        found = paired_difference(first, first * (0.7 * noise.exp()))
        covered += found.low <= 0.7 <= found.high
    assert 52 <= covered <= 60 and found.high / found.low < 1.6


def test_what_one_method_alone_localized_is_counted_and_named():
    first = torch.tensor([0.1, torch.inf, 0.3, torch.inf, 0.1, 0.2])
    second = torch.tensor([0.2, 0.1, torch.nan, torch.inf, 0.2, 0.4])
    found = paired_difference(first, second)
    assert found.ratio == pytest.approx(2) and found[4:] == (3, 1, 1)
    assert found.describe("PnP", "refined") == (
        "refined / PnP, paired: position errors × 2.00 (95 %: 2.00 to 2.00), refined better in 0 % of 3; "
        "1 localized by PnP only; 1 localized by refined only"
    )
    none = paired_difference(first[:2], second[2:4])
    assert math.isnan(none.ratio) and none.both == 0
    assert none.describe("a", "b") == "b / a, paired: no query was localized by both; 1 localized by a only"
    one = paired_difference(first[:1], second[:1])
    assert one.ratio == pytest.approx(2) and math.isnan(one.low) and "95 %" not in one.describe("a", "b")


def test_errors_drawn_from_a_covariance_lie_inside_its_ellipsoid_as_often_as_they_should():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-3] * 3 + [1e-5] * 3, dtype=torch.float64)
    root = sizes[:, None] * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    delta = torch.randn(4000, 6, generator=generator, dtype=torch.float64) @ root.T
    far = torch.tensor([1e4, -2e4, 50.0], dtype=torch.float64)
    turned = so3_exp(torch.tensor([0.3, -1.0, 0.2], dtype=torch.float64))
    estimate = Pose(turned.expand(4000, 3, 3), far.expand(4000, 3))
    found = squared_mahalanobis(estimate, estimate.retract(delta), (root @ root.T).expand(4000, 6, 6))
    assert found.mean().item() == pytest.approx(6, rel=0.05)
    assert (found <= INSIDE).double().mean().item() == pytest.approx(0.95, abs=0.01)
