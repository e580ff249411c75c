"""Start poses, the localizer on the toy town, and coarse-to-fine matching."""

from __future__ import annotations

import pytest
import torch

from gnnet.data.queries import LocalizationDataset, collate_localization
from gnnet.evaluation.protocol import localize_batch
from gnnet.geometry.pose import pose_errors
from gnnet.localization.localizer import Localizer, StartPoses
from gnnet.localization.matching import match_coarse_to_fine
from gnnet.localization.refinement import sample_descriptors
from gnnet.localization.robust import Robust
from gnnet.models.grey import GreyValues
from gnnet.models.pyramid import FeaturePyramid
from gnnet.scenes.robotcar import load_robotcar


@pytest.fixture(scope="module")
def batch(toy_root):
    dataset = LocalizationDataset(
        load_robotcar(toy_root, progress=False), points=300, largest_side=None, max_queries=4, seed=0
    )
    return collate_localization([dataset[0, index] for index in range(4)])


def test_starts_are_seeded_bounded_and_the_same_alone_or_in_a_batch(batch):
    starts = StartPoses(position=0.3, rotation=3.0, count=2)
    truth = batch.query.cam_from_world
    for number in range(2):
        position, rotation = pose_errors(starts.draw(batch, number), truth)
        assert (position <= 0.3001).all() and (rotation <= 3.001).all() and (position > 0).all()
    first = starts.draw(batch, 0)
    assert not torch.equal(first.translation, starts.draw(batch, 1).translation)
    one = batch._replace(
        query=batch.query._replace(cam_from_world=truth[2:3]), index=batch.index[2:3]
    )
    torch.testing.assert_close(starts.draw(one, 0).translation, first.translation[2:3])
    exact = StartPoses(position=0.5, rotation=4.0, exact=True).draw(batch, 0)
    position, rotation = pose_errors(exact, truth)
    torch.testing.assert_close(position, torch.full_like(position, 0.5), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation, torch.full_like(rotation, 4.0), atol=1e-3, rtol=0)
    reference = StartPoses(kind="reference").draw(batch, 0)
    assert torch.equal(reference.translation, batch.reference.cam_from_world.translation)
    with pytest.raises(ValueError, match="reference"):
        StartPoses(kind="truth")


def test_grey_values_refine_a_view_of_the_same_image(batch):
    """The query is the reference image itself, moved: any features bring it back."""
    same = batch._replace(query=batch.reference)
    localizer = Localizer(robust=Robust("squared"), iterations=50)
    starts = StartPoses(position=0.03, rotation=0.3, exact=True)
    localized = localize_batch(GreyValues(strides=(4, 2, 1)), localizer, same, starts)
    assert (localized.position < 0.005).all() and (localized.rotation < 0.05).all()
    assert (localized.initial_position > 0.029).all()
    assert localized.condition == batch.condition


def test_failures_are_infinite_and_keep_their_place(batch):
    nothing = batch._replace(valid=batch.valid & (torch.arange(4) != 1)[:, None])
    localizer = Localizer(robust=Robust("squared"), iterations=5)
    localized = localize_batch(GreyValues(strides=(4, 2)), localizer, nothing, StartPoses(count=2))
    assert localized.position.isinf().tolist() == [False, True, False, False] * 2
    assert localized.rotation.isinf().tolist() == localized.position.isinf().tolist()
    assert len(set(localized.index.tolist())) == 8


@pytest.mark.parametrize("values_at_once", [1, 1 << 20])
def test_matching_finds_the_cells_that_descriptors_came_from(values_at_once):
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (torch.randn(2, 16, s, s, generator=generator) for s in (8, 32))
    pyramid = FeaturePyramid((coarse, fine), (8, 2))
    cells = torch.randint(0, 32, (2, 40, 2), generator=generator)
    xy = (cells + 0.5) * 2.0
    fine_descriptors = sample_descriptors(FeaturePyramid((fine,), (2,)), xy)[0][0]
    rows = coarse.permute(0, 2, 3, 1)
    batch_index = torch.arange(2)[:, None]
    coarse_descriptors = rows[batch_index, cells[..., 1] // 4, cells[..., 0] // 4]
    found = match_coarse_to_fine((coarse_descriptors, fine_descriptors), pyramid, values_at_once=values_at_once)
    torch.testing.assert_close(found, xy)
