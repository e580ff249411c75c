import pytest
import torch

from gnnet.losses.cross_entropy import CrossEntropy, correspondence_cross_entropy

from .conftest import at, every_point, make_pair, mean_of


def literal_loss(pair, window, *, other_points, temperature, exclusion):
    height, width = pair.map_b.shape[-2:]
    losses = {}
    for b, n in every_point(pair):
        f_a, u_b = at(pair.map_a[b], *pair.xy_a[b, n]), pair.xy_b[b, n]
        logits = [f_a @ at(pair.map_b[b], *u_b) / temperature]
        if window is None:
            cells = [(x, y) for y in range(height) for x in range(width)]
        else:
            cells = [(x, y) for x, y in window[b, n].tolist() if 0 <= x < width and 0 <= y < height]
        for x, y in cells:
            if (x + 0.5 - u_b[0]) ** 2 + (y + 0.5 - u_b[1]) ** 2 > exclusion**2:
                logits.append(f_a @ pair.map_b[b, :, y, x] / temperature)
        if window is not None and other_points:
            for m in range(pair.valid.shape[1]):
                if pair.valid[b, m] and (pair.xy_b[b, m] - u_b).norm() > exclusion:
                    logits.append(f_a @ at(pair.map_b[b], *pair.xy_b[b, m]) / temperature)
        losses[b, n] = -torch.stack(logits).log_softmax(0)[0]
    return mean_of(losses, pair)


@pytest.mark.parametrize("candidates", ["every cell", "window", "window and other points"])
def test_value_and_gradient_are_those_of_the_formula(candidates):
    results = []
    for literal in (True, False):
        pair = make_pair(requires_grad=True)
        window = torch.randint(-2, 17, (*pair.valid.shape, 10, 2), generator=torch.Generator().manual_seed(2))
        settings = {
            "window": None if candidates == "every cell" else window,
            "other_points": candidates == "window and other points",
            "temperature": 0.1,
            "exclusion": 2.0,
        }
        loss = literal_loss(pair, **settings) if literal else correspondence_cross_entropy(pair, **settings)[0]
        results.append((loss, *torch.autograd.grad(loss, [pair.map_a, pair.map_b])))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_identical_maps_and_points_are_recognised():
    pair = make_pair(channels=16, requires_grad=True)
    same = pair._replace(map_b=pair.map_a, xy_b=pair.xy_a, descriptors_b=pair.descriptors_a)
    loss, parts = correspondence_cross_entropy(same, temperature=0.02)
    other_loss, other_parts = correspondence_cross_entropy(pair, temperature=0.02)
    assert parts["accuracy"].item() > 0.9 > 0.5 > other_parts["accuracy"].item()
    assert loss < 0.3 * other_loss


@pytest.mark.parametrize("window", [None, torch.zeros(2, 7, 3, 2, dtype=torch.long)])
def test_a_point_without_candidates_costs_nothing_and_has_a_finite_gradient(window):
    pair = make_pair(requires_grad=True)
    loss, _ = correspondence_cross_entropy(pair, window=window, exclusion=100.0)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(pair.map_b.grad, torch.zeros_like(pair.map_b))


def test_coarse_maps_use_every_cell_and_fine_maps_a_window(monkeypatch):
    windows = []
    monkeypatch.setattr(
        "gnnet.losses.cross_entropy.correspondence_cross_entropy", lambda pair, *, window, **_: windows.append(window)
    )
    pair = make_pair(points=50)
    source = torch.Generator().manual_seed(0)
    for term in (CrossEntropy(dense_cells=180), CrossEntropy(dense_cells=179, window=3, window_candidates=9)):
        term(pair, *term.draw(pair, source), step=0)
    assert windows[0] is None
    offset = windows[1] - pair.xy_b.floor().long()[:, :, None]
    assert offset.shape == (2, 50, 9, 2)
    assert offset.unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="temperature is 0"):
        CrossEntropy(temperature=0)
    with pytest.raises(ValueError, match="window is 1"):
        CrossEntropy(window=1)
