"""Matching against known correspondences, its figures over processes, and localization from several references."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from gnnet.data.batches import Matches, MatchingPair
from gnnet.data.images import read_image
from gnnet.data.sift import detect_sift, strongest_spread
from gnnet.evaluation.matching import (
    MatchingMetrics,
    match_pair,
    match_pair_with_sift,
)
from gnnet.evaluation.networks import compare_matching
from gnnet.evaluation.runs import join_tables
from gnnet.evaluation.tables import print_table, read_table, write_table
from gnnet.localization.matching import Matcher
from gnnet.models.grey import GreyValues
from gnnet.models.pyramid import FeaturePyramid
from gnnet.scenes.layouts.robotcar import load_robotcar

CONDITIONS = ("day-day", "day-night")


class GreyPatches(nn.Module):
    """Pyramid of grey patches (B, size², H_l, W_l), each freed of its mean and its contrast, as ZNCC compares them."""

    def __init__(self, *, strides: Sequence[int] = (8, 2), size: int = 7):
        super().__init__()
        self.grey, self.size = GreyValues(strides=strides), size
        self.strides, self.channels = self.grey.strides, (size * size,) * len(strides)

    def forward(self, images: Tensor) -> FeaturePyramid:
        maps = []
        for grey in self.grey(images).maps:
            padded = F.pad(grey, (self.size // 2,) * 4, mode="replicate")
            patches = F.unfold(padded, self.size)  # [B, size², H·W]
            patches = patches - patches.mean(1, keepdim=True)
            # A flat patch stays near zero, not noise blown up.
            patches = patches / patches.norm(dim=1, keepdim=True).clamp(min=0.02 * self.size)
            maps.append(patches.unflatten(-1, grey.shape[-2:]).contiguous(memory_format=torch.channels_last))
        return FeaturePyramid(tuple(maps), self.strides)


@pytest.fixture(scope="module")
def image(toy_root):
    scene = load_robotcar(toy_root, progress=False)
    return read_image(next(i.path for i in scene.images.values() if i.is_reference))


@pytest.fixture(scope="module")
def shifted(image):
    """The image against itself, moved by (8, -16) pixels; all keypoints' surroundings are in both."""
    keypoints = strongest_spread(detect_sift(image, upright=True), 1000)
    moved = keypoints + torch.tensor([8.0, -16.0])
    inside = ((keypoints > 24) & (keypoints < 72) & (moved > 24) & (moved < 72)).all(1)
    b = torch.roll(image, (-16, 8), (1, 2))
    return MatchingPair(image, b, keypoints[inside], moved[inside], "day-day", "shifted", 0)


@pytest.mark.parametrize("subpixel", [False, True])
def test_a_shifted_image_is_matched_exactly(shifted, subpixel):
    """Shifts are multiples of the strides, so features shift with the image."""
    assert len(shifted.keypoints_a) >= 15
    matches = match_pair(GreyPatches(strides=(8, 2)), shifted, Matcher(subpixel=subpixel))
    assert (errors(matches, shifted) < (0.1 if subpixel else 1.6)).float().mean() > 0.9
    assert matches.kept.float().mean() > 0.9
    single = match_pair(GreyValues(strides=(8, 2)), shifted, Matcher(subpixel=subpixel))
    assert (errors(single, shifted) > 3).float().mean() > 0.5  # one channel tells little apart


def test_sift_matches_a_shifted_image(shifted):
    for upright in (False, True):
        matches = match_pair_with_sift(shifted, upright=upright)
        assert matches.kept.float().mean() > 0.7
        assert (errors(matches, shifted)[matches.kept] < 0.2).float().mean() > 0.95
    nowhere = shifted._replace(keypoints_a=shifted.keypoints_a + 0.8)
    error = errors(match_pair_with_sift(nowhere), nowhere)
    assert error.isinf().float().mean() > 0.8  # no detection there: not matched, and counted


def test_sift_of_nothing(shifted):
    black = torch.zeros_like(shifted.image_b)
    matches = match_pair_with_sift(shifted._replace(image_b=black))
    assert errors(matches, shifted).isinf().all() and not matches.kept.any()
    none = shifted._replace(keypoints_a=torch.zeros(0, 2), keypoints_b=torch.zeros(0, 2))
    assert len(match_pair_with_sift(none).keypoints) == 0
    assert len(match_pair(GreyPatches(strides=(8, 2)), none).keypoints) == 0


def test_images_of_two_sizes(shifted):
    smaller = shifted._replace(image_b=shifted.image_b[:, :, :90])
    matches = match_pair(GreyPatches(strides=(8, 2)), smaller)
    assert (errors(matches, smaller) < 0.1).float().mean() > 0.8


def errors(matches, pair):
    return (matches.keypoints - pair.keypoints_b).norm(dim=-1)


def error_and_kept(index, count=50):
    generator = torch.Generator().manual_seed(index)
    error = torch.rand(count, generator=generator) * 12
    error[:3] = torch.tensor([torch.inf, torch.nan, 1.0])
    return error, torch.rand(count, generator=generator) < 0.4


def matches_of(index, count=50):
    """Matches with these errors against a truth of zeros."""
    error, kept = error_and_kept(index, count)
    return Matches(torch.stack([torch.zeros(count), error], -1), torch.zeros(count), kept)


def updated(metric, indices):
    for index in indices:
        metric.update(
            matches_of(index, 50 + index), torch.zeros(50 + index, 2), condition=CONDITIONS[index % 2], index=index
        )
    return metric


def test_figures_against_plain_sums():
    everything, day, night = updated(MatchingMetrics(conditions=("fog", *CONDITIONS)), range(5)).compute()
    for summary, indices in ((everything, range(5)), (day, (0, 2, 4)), (night, (1, 3))):
        error, kept = (torch.cat(x) for x in zip(*(error_and_kept(i, 50 + i) for i in indices), strict=True))
        assert summary.pairs == len(indices)
        assert summary.keypoints == pytest.approx(len(error) / len(indices))
        assert summary.kept == pytest.approx(kept.sum().item() / len(indices))
        for share, of_kept, pixels in zip(summary.within, summary.kept_within, (1, 3, 5, 10), strict=True):
            assert share == pytest.approx((error <= pixels).double().mean().item())
            assert of_kept == pytest.approx((error[kept] <= pixels).double().mean().item())
    assert [s.condition for s in (everything, day, night)] == ["all", *CONDITIONS]


def test_repeated_pairs_count_once_and_order_does_not_matter():
    whole = updated(MatchingMetrics(conditions=CONDITIONS), range(5)).compute()
    assert updated(MatchingMetrics(conditions=CONDITIONS), (4, 1, 0, 3, 1, 2, 4)).compute() == whole
    with pytest.raises(ValueError, match=r"condition fog is not among .* day-day, day-night"):
        MatchingMetrics(conditions=CONDITIONS).update(matches_of(0), torch.zeros(50, 2), condition="fog", index=0)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_pairs_give_nan():
    (summary,) = MatchingMetrics(conditions=CONDITIONS).compute()
    assert summary.pairs == 0 and math.isnan(summary.kept) and math.isnan(summary.within[0])


def _process(rank, rendezvous, counts, results):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        for count in counts:
            # Both processes draw the last, as a padding sampler deals it.
            indices = [*range(rank, count, 2), *([count - 1] if count > 1 else [])]
            torch.save(updated(MatchingMetrics(conditions=CONDITIONS), indices).compute(), f"{results}.{count}.{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    counts = (5, 1)  # with one pair a process has none
    arguments = str(tmp_path / "rendezvous"), counts, str(tmp_path / "summary")
    mp.start_processes(_process, arguments, nprocs=2, start_method="forkserver")
    for count in counts:
        expected = updated(MatchingMetrics(conditions=CONDITIONS), range(count)).compute()
        for rank in range(2):
            assert torch.load(tmp_path / f"summary.{count}.{rank}", weights_only=False) == expected


def test_the_report_is_read_back_and_printed(shifted, tmp_path):
    dark = shifted._replace(image_b=torch.zeros_like(shifted.image_b), condition="day-night")
    network = nn.Sequential(GreyPatches(strides=(8, 2))).train()
    report = compare_matching(
        {"patches": network},
        [shifted, dark],
        conditions=CONDITIONS,
        title="two pairs",
        device="cpu",
        settings={"seed": 0},
    )
    assert network.training
    assert [row.method for row in report.rows[:3]] == ["patches", "SIFT", "SIFT, upright"]
    by_condition = {row.condition: row for row in report.rows if row.method == "SIFT"}
    assert by_condition["day-day"]["kept_1px"] > 0.9
    assert by_condition["day-night"]["kept"] == 0 and math.isnan(by_condition["day-night"]["kept_1px"])
    write_table(report, tmp_path / "matching.json")
    assert [p.name for p in tmp_path.iterdir()] == ["matching.json"]
    # NaN is not equal to itself
    assert repr(read_table(tmp_path / "matching.json")) == repr(report)
    console = Console(width=80, record=True)
    print_table(replace(report, notes=("a note",)), console)
    text = console.export_text()
    assert "day-night" in text and "SIFT, upright" in text and "a note" in text and "%" in text
    assert "all: % of the" in text and "10 px" not in text
    assert max(map(len, text.splitlines())) <= 80
    joined = join_tables({"harbour": report, "square": report})
    conditions = [row.condition for row in joined.rows if row.method == "SIFT"]
    assert conditions[:2] == ["harbour/all", "harbour/day-day"] and conditions[3] == "square/all"
    assert join_tables({"": report}) is report and join_tables({}) is None


def test_broken_files_are_said(tmp_path):
    path = tmp_path / "matching.json"
    with pytest.raises(FileNotFoundError, match=r"matching\.json does not exist"):
        read_table(path)
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "format is None"),
        ('{"format": ["gnnet matching 1"]}', "format is \\['gnnet"),
        ('{"format": "gnnet matching 1"}', "has no key 'methods'"),
        ('{"format": "gnnet matching 1", "title": "", "thresholds_px": [1], "methods": 3}', "run the evaluation"),
        ('{"format": "gnnet table 1", "columns": [{"name": "x", "unit": "ells", "limits": []}]}', "'ells' is not"),
        ('{"format": "gnnet table 1", "columns": 3}', "run the evaluation"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_table(path)
