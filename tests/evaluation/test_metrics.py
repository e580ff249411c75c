import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gnnet.evaluation.metrics import (
    INDOOR,
    OUTDOOR,
    LocalizationMetrics,
    median,
    summarize_errors,
)

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
        assert line.failures == int(np.isinf(position[rows]).sum())
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
def test_two_processes_equal_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    counts = (7, 1)  # with one query a process has none
    mp.spawn(_process, args=(str(tmp_path / "rendezvous"), counts, str(tmp_path / "summary")), nprocs=2)
    for count in counts:
        expected = summary_of(queries(count))
        assert expected.overall.poses == count
        for rank in range(2):
            assert torch.load(tmp_path / f"summary.{count}.{rank}", weights_only=False) == expected
