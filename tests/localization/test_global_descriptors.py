import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gnnet.localization.global_descriptors import Whitening, fit_whitening, gem, nearest_references
from gnnet.models.pyramid import FeaturePyramid


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pyramid(*maps):
    return FeaturePyramid(maps, tuple(2 ** (len(maps) - i) for i in range(len(maps))))


# --- global descriptors


@pytest.mark.parametrize("power", [1.0, 3.0, 5.0])
def test_gem_by_loops(power):
    maps = F.normalize(random(2, 4, 3, 5), dim=1)
    expected = []
    for features in maps.double().numpy():
        values = []
        for sign in (1, -1):
            for channel in features:
                parts = [max(sign * v, 0.0) ** power for v in channel.ravel()]
                values.append(math.sqrt((sum(parts) / len(parts)) ** (1 / power)))
        expected.append(np.array(values) / np.linalg.norm(values))
    found = gem(pyramid(maps, random(2, 7, 6, 10)), power=power)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.from_numpy(np.stack(expected)), rtol=1e-5, atol=1e-6)


def test_gem_tells_signs_apart_and_forgets_scale():
    maps = F.normalize(random(1, 4, 3, 5), dim=1)
    found = gem(pyramid(maps))
    torch.testing.assert_close(gem(pyramid(-maps)), found.roll(4, dims=1))
    torch.testing.assert_close(gem(pyramid(maps * 100)), found)
    torch.testing.assert_close(gem(pyramid(maps / 100)), found)


def test_gem_of_maps_without_a_sign():
    """After a ReLU: the negative parts are empty."""
    found = gem(pyramid(random(1, 4, 3, 5).abs()))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(1))
    assert (found[:, 4:] < 1e-4).all()
    assert gem(pyramid(torch.zeros(1, 4, 3, 5))).isfinite().all()


def test_gem_has_gradients():
    maps = random(1, 4, 3, 5).abs()
    maps[:, 2] = 0
    maps.requires_grad_()
    gem(pyramid(maps)).sum().backward()
    assert maps.grad.isfinite().all()
    assert maps.grad.any()


@pytest.mark.parametrize("power", [0, -1, float("nan")])
def test_gem_power(power):
    with pytest.raises(ValueError, match="power="):
        gem(pyramid(torch.ones(1, 1, 1, 1)), power=power)


# --- whitening


def correlated(count, width, seed=0):
    """Descriptors of length 1 with much variance in few directions, and a mean."""
    spectrum = torch.logspace(0, -2, width)
    mixing = torch.linalg.qr(random(width, width, seed=seed + 1))[0]
    return F.normalize((random(count, width, seed=seed) * spectrum) @ mixing + 0.3, dim=1)


# More descriptors than dimensions, and fewer.
@pytest.mark.parametrize(("count", "width", "dimensions"), [(300, 6, 4), (300, 6, 6), (12, 40, 5), (12, 40, 11)])
@pytest.mark.parametrize("regularisation", [0.0, 0.05])
def test_whitening_is_that_of_the_covariance(count, width, dimensions, regularisation):
    descriptors = correlated(count, width)
    whitening = fit_whitening(descriptors, dimensions, regularisation=regularisation)
    x = descriptors.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(x.T))
    values, vectors = values[::-1][:dimensions], vectors[:, ::-1][:, :dimensions]
    projection = vectors / np.sqrt(values + regularisation * values[0])
    others = correlated(9, width, seed=5)
    expected = (others.double().numpy() - x.mean(0)) @ projection
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = whitening.apply(others).double().numpy()
    assert found.shape == (9, dimensions)
    # Each direction may point either way.
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=2e-4)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=2e-4)
    if regularisation == 0:
        np.testing.assert_allclose(np.cov((x @ whitening.projection.double().numpy()).T), np.eye(dimensions), atol=1e-3)


def test_dimensions_are_limited():
    assert fit_whitening(correlated(5, 20), 64).projection.shape == (20, 4)
    assert fit_whitening(correlated(50, 20), 64).projection.shape == (20, 20)
    assert fit_whitening(correlated(50, 20), 7).projection.shape == (20, 7)


def test_what_hardly_varies_is_not_blown_up():
    noise = torch.cat([random(50, 2), 1e-4 * random(50, 6, seed=1)], 1)
    length = fit_whitening(noise, 8, regularisation=0.05).projection.norm(dim=0)
    assert length.max() / length.min() < math.sqrt(1.05 / 0.05) * 1.001
    assert fit_whitening(noise, 8, regularisation=0).projection.norm(dim=0).max() > 1000 * length.max()


def test_apply_keeps_leading_axes_and_takes_half_floats():
    whitening = fit_whitening(correlated(30, 8), 4)
    one = correlated(6, 8, seed=3)
    found = whitening.apply(one.view(2, 3, 8))
    torch.testing.assert_close(found.view(6, 4), whitening.apply(one))
    torch.testing.assert_close(whitening.apply(one[0]), found[0, 0])
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 3))
    assert whitening.apply(one.half()).dtype == torch.float32


@pytest.mark.parametrize("count", [1, 2])
def test_few_descriptors_stay_as_they_are(count):
    references, others = correlated(count, 8), 3 * random(20, 8, seed=2)
    whitening = fit_whitening(references, 8)
    torch.testing.assert_close(whitening.apply(others), F.normalize(others, dim=1))
    # With fewer dimensions, the inner products with the references stay, up to the query's length.
    small = fit_whitening(references, 3)
    assert small.projection.shape == (8, 3)
    torch.testing.assert_close(small.apply(references) @ small.apply(references).T, references @ references.T)
    similarity, expected = small.apply(others) @ small.apply(references).T, others @ references.T
    torch.testing.assert_close(F.normalize(similarity, dim=1), F.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [2, 7])
def test_descriptors_all_the_same(count):
    references = correlated(1, 8).expand(count, 8)
    whitening = fit_whitening(references, 4)
    assert whitening.projection.isfinite().all()
    found = whitening.apply(references)
    torch.testing.assert_close(found @ found.T, torch.ones(count, count))


def test_repeated_descriptors():
    """Fewer directions vary than there are dimensions."""
    references = correlated(3, 12).repeat(4, 1)
    whitening = fit_whitening(references, 8)
    assert whitening.projection.shape == (12, 8)
    found = whitening.apply(references)
    similarity = found @ found.T
    same = torch.arange(12)[:, None] % 3 == torch.arange(12) % 3
    torch.testing.assert_close(similarity[same], torch.ones(int(same.sum())))
    assert (similarity[~same] < 0.5).all()
    assert (whitening.projection[:, 2:] == 0).all()


@pytest.mark.parametrize(("count", "largest"), [(1, 10), (2, 10), (20, 20)])
def test_no_square_of_the_width(count, largest, largest_tensor):
    width = 3000
    with largest_tensor:
        whitening = fit_whitening(correlated_wide(count, width), 10)
    assert whitening.projection.shape == (width, 10)
    assert largest_tensor.elements <= largest * width


def correlated_wide(count, width):
    return F.normalize(random(count, width) + 0.3, dim=1)


def test_whitening_of_other_input():
    for shape in [(0, 4), (3, 0), (4,)]:
        with pytest.raises(ValueError, match="expected \\(N, D\\)"):
            fit_whitening(torch.zeros(shape), 2)
    with pytest.raises(ValueError, match="dimensions=0"):
        fit_whitening(torch.zeros(3, 4), 0)
    with pytest.raises(ValueError, match="regularisation=-1"):
        fit_whitening(torch.zeros(3, 4), 2, regularisation=-1)
    broken = random(5, 4)
    broken[1, 2], broken[1, 3], broken[4, 0] = float("nan"), float("inf"), float("inf")
    with pytest.raises(ValueError, match="2 of 5 global descriptors are not finite"):
        fit_whitening(broken, 2)


def test_whitening_is_plain_values():
    whitening = fit_whitening(correlated(30, 8).half(), 4)
    assert isinstance(whitening, Whitening)
    assert whitening.mean.dtype == whitening.projection.dtype == torch.float32
    assert whitening.mean.shape == (8,)


# --- nearest references


def nearest_by_sorting(query, references, count, *, allowed=None):
    similarity = references.astype(np.float64) @ query.double().numpy()
    order = [row for row in np.argsort(-similarity, kind="stable") if allowed is None or allowed[row]][:count]
    return torch.tensor(order, dtype=torch.int64), torch.from_numpy(similarity[order]).float()


# Of one reference at a time, to all at once.
CHUNKS = [1, 4, 60, 100, 1 << 24]


@pytest.mark.parametrize("values_at_once", CHUNKS)
@pytest.mark.parametrize("count", [1, 4, 50])
@pytest.mark.parametrize("restricted", [False, True])
def test_nearest_with_ties(values_at_once, count, restricted):
    """Descriptors of small integers, so that many similarities are alike, and exact."""
    generator = torch.Generator().manual_seed(0)
    queries, references = (torch.randint(-2, 3, (n, 3), generator=generator).float() for n in (11, 37))
    for group, query in enumerate(queries):  # of the groups 5 and above there is no reference
        allowed = (torch.arange(37) % 5 == group) if restricted else None
        found = nearest_references(query, references.numpy(), count, values_at_once=values_at_once, allowed=allowed)
        expected = nearest_by_sorting(query, references.numpy(), count, allowed=allowed)
        assert found[0].dtype == torch.int64
        assert found[1].dtype == torch.float32
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert len(found[0]) == (
            0 if restricted and group >= 5 else min(count, 37 if allowed is None else allowed.sum())
        )


def test_chunks_change_nothing():
    """With real numbers too, where float32 sums depend on the shape of a product."""
    queries, references = (F.normalize(random(n, 96, seed=n), dim=1) for n in (13, 101))
    references[50:] = references[:51].clone()
    for query in queries:
        expected = nearest_references(query, references.numpy(), 20)
        assert torch.equal(expected[0], nearest_by_sorting(query, references.numpy(), 20)[0])
        for values_at_once in (1, 1000, 3000):
            found = nearest_references(query, references.numpy(), 20, values_at_once=values_at_once)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_mapped_references(tmp_path, kind):
    queries, references = F.normalize(random(5, 8), dim=1), F.normalize(random(40, 8, seed=1), dim=1)
    references.numpy().astype(kind).tofile(tmp_path / "references")
    mapped = np.memmap(tmp_path / "references", kind, "r", shape=(40, 8))
    for query in queries:
        found = nearest_references(query, mapped, 6, values_at_once=200)
        expected = nearest_by_sorting(query, np.array(mapped), 6)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])


class Recording(np.ndarray):
    """Says what was read of it."""

    read = None

    def __getitem__(self, index):
        if self.read is not None:
            self.read.append((index.start, len(self.view(np.ndarray)[index])))
        return self.view(np.ndarray)[index]


def test_memory_is_bounded_and_references_are_read_once(largest_tensor):
    references = random(500, 16, seed=1).numpy().view(Recording)
    references.read = []
    query = random(1, 16)[0]
    with largest_tensor:
        nearest_references(query, references, 3, values_at_once=1600)
    assert references.read == [(start, 100) for start in range(0, 500, 100)]
    assert largest_tensor.elements <= 1600  # no tensor of references as a whole


def test_order_of_all_kinds_of_numbers():
    values = [3.0, -1e-40, 0.0, -0.0, 1e-40, -2.5, 2.5, float("nan"), float("inf"), -float("inf"), 1e30, -1e30]
    rows, similarity = nearest_references(torch.ones(1), np.array(values, np.float32)[:, None], len(values))
    # Not finite is not found.
    assert rows.tolist() == [10, 0, 6, 4, 2, 3, 1, 5, 11]
    assert torch.equal(similarity, torch.tensor([1e30, 3.0, 2.5, 1e-40, 0.0, 0.0, -1e-40, -2.5, -1e30]))


def test_products_that_vanish_are_alike():
    """-1e-60 is -0 in float32, which as bits is not 0."""
    references = np.array([[-1e-30], [0.0], [1e-30]], np.float32)
    rows, similarity = nearest_references(torch.tensor([1e-30]), references, 3)
    assert rows.tolist() == [0, 1, 2]
    assert (similarity == 0).all()


def test_nothing_to_search():
    rows, similarity = nearest_references(torch.zeros(4), np.zeros((0, 4)), 2)
    assert rows.shape == similarity.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"references": np.zeros((5, 3))}, r"query \(4,\), references \(5, 3\)"),
        ({"query": torch.zeros(1, 4)}, r"expected \(D,\)"),
        ({"count": 0}, "count=0"),
        ({"allowed": torch.ones(4, dtype=torch.bool)}, r"allowed .* expected \(5,\)"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    given = {"query": torch.zeros(4), "references": np.zeros((5, 4)), "count": 3} | change
    with pytest.raises(ValueError, match=message):
        nearest_references(**given)
