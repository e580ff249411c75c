import pytest
import torch

from gnnet.losses.contrastive import Contrastive, double_margin_contrastive_loss
from gnnet.losses.mining import mine_hardest
from gnnet.losses.term import LevelPair

from .conftest import at, every_point, make_pair, mean_of


def test_value_and_gradient_are_those_of_the_formulas():
    results = []
    for literal in (True, False):
        pair = make_pair(requires_grad=True)
        negatives = torch.randint(0, 12 * 15, pair.valid.shape, generator=torch.Generator().manual_seed(1))
        has_negative = torch.ones_like(pair.valid)
        has_negative[1, 1] = False
        if literal:
            attraction, repulsion = {}, {}
            for b, n in every_point(pair):
                f_a = at(pair.map_a[b], *pair.xy_a[b, n])
                distance = (f_a - at(pair.map_b[b], *pair.xy_b[b, n])).square().sum().sqrt()
                row, column = divmod(negatives[b, n].item(), 15)
                negative_distance = (f_a - pair.map_b[b, :, row, column]).square().sum().sqrt()
                attraction[b, n] = torch.clamp(distance - 0.2, min=0) ** 2
                repulsion[b, n] = torch.clamp(1.2 - negative_distance, min=0) ** 2
            loss = mean_of(attraction, pair) + mean_of(repulsion, pair, has_negative)
        else:
            loss, parts = double_margin_contrastive_loss(
                pair, negatives=negatives, has_negative=has_negative, positive_margin=0.2, negative_margin=1.2
            )
            torch.testing.assert_close(parts["positive"] + parts["negative"], loss.detach())
        results.append((loss, *torch.autograd.grad(loss, [pair.map_a, pair.map_b])))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_margins_stop_the_loss():
    pair = make_pair()
    zeros = torch.zeros_like(pair.valid, dtype=torch.long)
    loss, _ = double_margin_contrastive_loss(
        pair, negatives=zeros, has_negative=pair.valid, positive_margin=2.0, negative_margin=0.0
    )
    assert loss.item() == 0


def test_gradient_is_finite_where_features_coincide():
    features = torch.ones(1, 4, 8, 8, dtype=torch.float64).div(2).requires_grad_()
    xy = torch.tensor([[[4.2, 4.4]]], dtype=torch.float64)
    ones = torch.ones(1, 1, dtype=torch.float64)
    pair = LevelPair.from_maps(features, features, xy_a=xy, xy_b=xy, weight=ones, valid=ones.bool())
    loss, parts = double_margin_contrastive_loss(
        pair, negatives=torch.zeros(1, 1, dtype=torch.long), has_negative=pair.valid
    )
    loss.backward()
    assert parts["negative"].item() == 1
    assert features.grad.isfinite().all()


def test_term_mines_with_the_curriculum_of_its_step(monkeypatch):
    seen = []

    def spy(pair, *drawn, **settings):
        seen.append(settings)
        return mine_hardest(pair, *drawn, **settings)

    monkeypatch.setattr("gnnet.losses.contrastive.mine_hardest", spy)
    pair, term = make_pair(), Contrastive(exclusion=0.3, hardest_start=100, hardest_min=7)
    for step in (0, 10_000, 10**6):
        term(pair, *term.draw(pair), step=step)
    assert [s["hardest"] for s in seen] == [100, 55, 7]
    assert seen[0]["exclusion"] == 0.3
    assert len(term.draw(pair)) == 1  # no subset of the cells
    _, subset = Contrastive(candidates=9).draw(pair)
    assert len(subset.unique()) == 9


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="candidates is 'some'"):
        Contrastive(candidates="some")
    with pytest.raises(ValueError, match="hardest_min is 9 and hardest_start 3"):
        Contrastive(hardest_min=9, hardest_start=3)
