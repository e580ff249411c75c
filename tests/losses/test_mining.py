import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gnnet.losses.mining import (
    _draw_among_largest,
    draw_candidates,
    exclusion_penalty,
    hardest_count,
    mine_hardest,
)
from gnnet.losses.term import LevelPair

from .conftest import make_pair


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mine(pair, *, candidates="all", generator=None, **settings):
    return mine_hardest(pair, *draw_candidates(pair, candidates, generator), **settings)


def distances_and_candidates(pair, exclusion):
    """Feature distance (B, N, cells) to every cell, and which cells are far enough away."""
    height, width = pair.map_b.shape[-2:]
    distance = torch.cdist(pair.descriptors_a, pair.map_b.flatten(2).mT)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    centre = torch.stack([x, y], -1).flatten(0, 1).to(pair.xy_b)
    return distance, torch.cdist(pair.xy_b, centre[None]) > exclusion * max(height, width)


def test_schedule():
    assert [hardest_count(step) for step in (0, 10_000, 50_000, 10**6)] == [300, 165, 15, 5]


def test_penalty_is_zero_beyond_the_radius_only():
    x, y = torch.arange(6)[None] + 0.5, torch.arange(4)[:, None] + 0.5
    penalty = exclusion_penalty(torch.tensor([[1.5, 2.5]]), x=x, y=y, radius=2.0, near=-7.0)[0]
    for row in range(4):
        for column in range(6):
            near = (column - 1) ** 2 + (row - 2) ** 2 <= 4
            assert penalty[row, column].item() == (-7.0 if near else 0.0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("hardest", [1, 5, 60, 1000])
def test_draws_are_uniform_among_the_hardest_candidates(normalize, hardest):
    pair = make_pair(points=4, batch=2, normalize=normalize)
    distance, far = distances_and_candidates(pair, 0.3)
    ranks = torch.where(far, distance, torch.inf).argsort(-1).argsort(-1)
    seen = torch.zeros(ranks.shape)
    rounds = 150
    source = generator()
    for _ in range(rounds):
        cells, found = mine(pair, hardest=hardest, exclusion=0.3, generator=source)
        assert found.all()
        assert far.gather(-1, cells[..., None]).all()
        seen.scatter_add_(-1, ranks.gather(-1, cells[..., None]), torch.ones(*cells.shape, 1))
    allowed = far.sum(-1).clamp(max=hardest)
    assert (seen.nonzero()[:, 2] < allowed[seen.nonzero()[:, 0], seen.nonzero()[:, 1]]).all()
    # Mean rank of a uniform draw, within five standard errors.
    mean = (seen * torch.arange(seen.shape[-1])).sum(-1) / rounds
    std = allowed / (12 * rounds) ** 0.5
    assert ((mean - (allowed - 1) / 2).abs() <= 5 * std + 1e-6).all()


@pytest.mark.parametrize("total", [12, 100, 1021, 4096])
@pytest.mark.parametrize("count", [1, 7, 30, 5000])
def test_two_stage_selection_draws_among_the_same_values_as_a_sort(total, count):
    values = torch.randn(1, 40, total, generator=generator())
    values[0, :, ::3] = -torch.inf
    values[0, 5] = -torch.inf  # no candidate at all
    values[0, 6, 1:] = -torch.inf
    values[0, 6, 1] = 0.0  # a single one
    seen = [set() for _ in range(40)]
    for draw in torch.linspace(0, 1 - 1e-7, 61):
        index, found = _draw_among_largest(values.clone(), count, draw.expand(1, 40))
        assert found[0].tolist() == [row != 5 for row in range(40)]
        for row in range(40):
            seen[row].add(index[0, row].item())
    for row in [0, 1, 6, 39]:
        finite = int((values[0, row] > -torch.inf).sum())
        hardest = set(values[0, row].argsort(descending=True)[: min(count, finite)].tolist())
        assert seen[row] <= hardest
        assert len(seen[row]) == min(len(hardest), 61)


def test_points_without_a_candidate_are_reported():
    pair = make_pair()
    _, found = mine(pair, hardest=5, exclusion=2.0, generator=generator())
    assert not found.any()


@pytest.mark.parametrize("candidates", ["all", 50])
def test_chunks_do_not_change_the_draws(candidates):
    pair = make_pair(points=9)
    settings = {"hardest": 6, "exclusion": 0.2, "candidates": candidates}
    whole = mine(pair, **settings, generator=generator())
    for chunk_elements in (1, 400, 2000):
        chunked = mine(pair, **settings, generator=generator(), chunk_elements=chunk_elements)
        assert torch.equal(chunked[0], whole[0]) and torch.equal(chunked[1], whole[1])


def test_one_seed_gives_one_result_and_another_seed_another():
    pair = make_pair(points=30)
    draws = [mine(pair, hardest=40, generator=generator(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_subset_is_as_hard_as_all_cells():
    pair = make_pair(points=60, height=30, width=30)
    distance, far = distances_and_candidates(pair, 0.2)
    ranks = torch.where(far, distance, torch.inf).argsort(-1).argsort(-1)
    source, drawn = generator(), []
    for _ in range(10):
        cells, found = mine(pair, hardest=120, candidates=300, generator=source)
        assert found.all() and far.gather(-1, cells[..., None]).all()
        drawn.append(ranks.gather(-1, cells[..., None]))
    mean = torch.stack(drawn).double().mean().item()
    assert mean == pytest.approx(60, rel=0.15)


def test_mining_carries_no_gradient():
    pair = make_pair(requires_grad=True)
    cells, found = mine(pair, hardest=5)
    assert not cells.requires_grad and not found.requires_grad


@pytest.mark.parametrize(("device", "products"), [("cpu", 4), ("meta", 1)])
def test_a_device_with_more_memory_takes_all_at_once(device, products):
    pair = LevelPair(*(x.to(device) for x in make_pair(points=256, batch=1, height=256, width=256)))
    with CountProducts() as count:
        mine(pair, hardest=5)
    assert count.products == products


@pytest.mark.parametrize("candidates", ["all", 8])
def test_numbers_drawn_on_the_host_do_not_make_it_wait(candidates, no_host_numbers):
    pair, source = LevelPair(*(x.to("meta") for x in make_pair())), generator()
    with no_host_numbers:
        mine(pair, hardest=5, candidates=candidates, generator=source)


class CountProducts(TorchDispatchMode):
    """Counts batches of matrix products."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func is torch.ops.aten.baddbmm_.default
        return func(*args, **(kwargs or {}))
