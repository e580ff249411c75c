"""Initial poses, refinement and the localizer on the toy town and its compiled map, and coarse-to-fine matching."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from gnnet.data.batches import collate
from gnnet.data.images import read_image
from gnnet.data.queries import LocalizationDataset, nearest_by_pose
from gnnet.evaluation.starts import PerturbedPoses, ReferencePoses, localize_batch
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, perturb, pose_errors
from gnnet.localization.compile import compile_map
from gnnet.localization.initial_pose import GivenPose, HybridPose, NearestPose, PoseFromMatches
from gnnet.localization.local_features import LocalFeatures
from gnnet.localization.localizer import Localizer
from gnnet.localization.matching import Matcher, search_coarse_to_fine
from gnnet.localization.pnp import PoseSolver
from gnnet.localization.refinement import refine_pose, sample_descriptors
from gnnet.localization.refiner import Refiner
from gnnet.localization.result import Status
from gnnet.localization.retrieval import (
    DescriptorRetrieval,
    InitialPoseRetrieval,
    OracleRetrieval,
    PairsRetrieval,
    PositionPrior,
)
from gnnet.localization.robust import Robust
from gnnet.models.grey import GreyValues
from gnnet.models.pyramid import FeaturePyramid
from gnnet.models.unet import UNet
from gnnet.scenes.formats.poses import write_pose_file
from gnnet.scenes.formats.positions import read_positions
from gnnet.scenes.layouts.robotcar import load_robotcar


@pytest.fixture(scope="module")
def batch(toy_root):
    dataset = LocalizationDataset(
        load_robotcar(toy_root, progress=False), points=300, largest_side=None, max_queries=4, seed=0
    )
    return collate([dataset[0, index] for index in range(4)])


def test_initial_poses_are_seeded_bounded_and_the_same_alone_or_in_a_batch(batch):
    starts = PerturbedPoses(position=0.3, rotation=3.0, count=2)
    truth = batch.query.cam_from_world
    for number in range(2):
        position, rotation = pose_errors(starts.draw(batch, number), truth)
        assert (position <= 0.3001).all() and (rotation <= 3.001).all() and (position > 0).all()
    first = starts.draw(batch, 0)
    assert not torch.equal(first.translation, starts.draw(batch, 1).translation)
    one = batch._replace(query=batch.query._replace(cam_from_world=truth[2:3]), index=batch.index[2:3])
    torch.testing.assert_close(starts.draw(one, 0).translation, first.translation[2:3])
    exact = PerturbedPoses(position=0.5, rotation=4.0, exact=True).draw(batch, 0)
    position, rotation = pose_errors(exact, truth)
    torch.testing.assert_close(position, torch.full_like(position, 0.5), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation, torch.full_like(rotation, 4.0), atol=1e-3, rtol=0)
    reference = ReferencePoses().draw(batch, 0)
    assert torch.equal(reference.translation, batch.reference.cam_from_world.translation)
    assert starts.farthest() == replace(starts, exact=True) and ReferencePoses().farthest() == ReferencePoses()
    assert "0.3 m and 3°" in starts.describe() and "reference" in ReferencePoses().describe()


def test_grey_values_refine_a_view_of_the_same_image(batch):
    """The query is the reference image itself, moved: any features bring it back."""
    same = batch._replace(query=batch.reference)
    refiner = Refiner(robust=Robust("squared"), iterations=50)
    starts = PerturbedPoses(position=0.03, rotation=0.3, exact=True)
    localized = localize_batch(GreyValues(strides=(4, 2, 1)), refiner, same, starts)
    assert (localized.position < 0.005).all() and (localized.rotation < 0.05).all()
    assert (localized.initial_position > 0.029).all()
    assert localized.condition == batch.condition


def test_validation_describes_points_at_the_keypoints_of_the_batch(batch):
    """Moved by a pixel, they move the pose at which the query looks the same; projections do not come into it."""
    same = batch._replace(query=batch.reference)
    refiner, starts = Refiner(iterations=50), PerturbedPoses(position=0.0, rotation=0.0, exact=True)
    at, beside = (
        localize_batch(
            GreyValues(strides=(4, 2, 1)), refiner, same._replace(keypoints=batch.keypoints + offset), starts
        )
        for offset in (0.0, torch.tensor([1.0, 0.0]))
    )
    assert at.rotation.max() < 0.05 and at.position.max() < 0.005
    assert (beside.rotation > 0.3).all() or (beside.position > 0.03).all()


def test_failures_are_infinite_and_keep_their_place(batch):
    nothing = batch._replace(valid=batch.valid & (torch.arange(4) != 1)[:, None])
    refiner = Refiner(robust=Robust("squared"), iterations=5)
    localized = localize_batch(GreyValues(strides=(4, 2)), refiner, nothing, PerturbedPoses(count=2))
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
    found = search_coarse_to_fine((coarse_descriptors, fine_descriptors), pyramid, values_at_once=values_at_once)
    torch.testing.assert_close(found.keypoints, xy)


# --- on a compiled map; the features are those of a random network, so only views from nearby match

SETTINGS = {"widths": [16, 32, 32], "channels": 16, "strides": [4, 2]}


def untrained(**settings) -> UNet:
    torch.manual_seed(0)
    return UNet(**SETTINGS, **settings).eval()


@pytest.fixture(scope="module")
def scene(toy_root):
    return load_robotcar(toy_root, progress=False)


@pytest.fixture(scope="module")
def town(scene, tmp_path_factory):
    path = tmp_path_factory.mktemp("maps") / "town.gnmap"
    return compile_map(path, scene, untrained(), points=500, progress=False)


@pytest.fixture(scope="module")
def middle(scene):
    """The middle reference of each place, which has another 1 m before it and 1 m behind it."""
    return [i for i in scene.images.values() if i.is_reference and i.name.endswith("250000.jpg")]


def localizer(**settings) -> Localizer:
    return Localizer(**{"pose": PoseFromMatches(Matcher()), "references": 4, **settings})


def localize(localizer: Localizer, image, **settings):
    given = {"name": image.name, "itself": image.name, "condition": image.condition, "place": image.place, **settings}
    pixels, camera = given.pop("pixels", None), given.pop("camera", image.camera)
    return localizer.localize(read_image(image.path) if pixels is None else pixels, camera, **given)


def errors(result, image) -> tuple[float, float]:
    position, rotation = pose_errors(result.cam_from_world, image.cam_from_world)
    return position.item(), rotation.item()


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("refine", [False, True])
def test_sparse_to_dense_finds_a_reference_by_the_others(town, middle, dense, refine):
    found = localizer(pose=PoseFromMatches(Matcher(dense=dense)), refiner=Refiner() if refine else None).on(
        untrained(), town
    )
    for image in middle:
        result = localize(found, image)
        assert result.status == Status.LOCALIZED and result.name == image.name and result.condition == image.condition
        assert image.name not in result.references and len(result.references) == 4
        position, rotation = errors(result, image)
        assert 1e-4 < position < 0.4 and rotation < 1  # not by its own observations, and not that of a neighbour
        assert 12 <= result.inliers <= result.matches and result.cam_from_world.dtype == torch.float64
        assert (result.final_cost is None) == (not refine) and (refine or not result.refined)
        stages = ["features", "retrieval", "matching", "pose", *(["refinement"] if refine else [])]
        assert list(result.seconds) == stages and all(s >= 0 for s in result.seconds.values())
        if result.refined:
            assert result.final_cost <= result.initial_cost and result.covariance.shape == (6, 6)


@pytest.mark.slow
def test_confidence_that_is_the_same_everywhere_changes_nothing_and_another_does(scene, town, middle, tmp_path):
    plain = localize(localizer().on(untrained(), town), middle[1])
    network = untrained(confidence=True)
    found = localizer().on(network, compile_map(tmp_path / "new.gnmap", scene, network, points=500, progress=False))
    result = localize(found, middle[1])  # a new head gives 0.5 everywhere
    assert plain.refined and result.inliers == plain.inliers
    torch.testing.assert_close(result.cam_from_world.matrix(), plain.cam_from_world.matrix(), atol=1e-4, rtol=0)
    torch.testing.assert_close(result.covariance, plain.covariance, rtol=0.02, atol=1e-9)
    for head in network.confidence_heads:
        torch.nn.init.normal_(head.weight, std=3)
    found = localizer().on(network, compile_map(tmp_path / "other.gnmap", scene, network, points=500, progress=False))
    other = localize(found, middle[1])
    assert other.status == Status.LOCALIZED and not torch.allclose(other.covariance, plain.covariance, rtol=0.02)


@pytest.fixture(scope="module")
def sift_town(scene, tmp_path_factory):
    path = tmp_path_factory.mktemp("maps") / "sift.gnmap"
    return compile_map(path, scene, untrained(), points=500, local_features=LocalFeatures(), progress=False)


@pytest.mark.slow
def test_a_hybrid_takes_local_features_where_enough_agree_and_else_the_maps(town, sift_town, middle):
    pose = HybridPose(dense=PoseFromMatches(Matcher()), enough=20)
    hybrid = Localizer(references=4, pose=pose).on(untrained(), town, sift_town)
    sparse = localizer(pose=PoseFromMatches(LocalFeatures()), refiner=None).on(untrained(), sift_town)
    dense = localizer().on(untrained(), town)
    image = middle[0]
    by_sift = localize(sparse, image)
    result = localize(hybrid, image)
    assert by_sift.inliers >= 20 and "sift" in result.reason and result.refined
    assert torch.equal(result.initial.matrix(), by_sift.initial.matrix()) and result.matches == by_sift.matches
    assert errors(result, image)[0] < 0.2
    never = replace(hybrid, pose=replace(hybrid.pose, enough=10**6))
    by_maps = localize(dense, image).cam_from_world.matrix()
    torch.testing.assert_close(localize(never, image).cam_from_world.matrix(), by_maps)
    nothing = replace(hybrid.pose.dense, matcher=Matcher(ratio=0.01))  # keeps no match
    back = localize(replace(hybrid, pose=replace(never.pose, dense=nothing)), image)
    torch.testing.assert_close(back.cam_from_world.matrix(), result.cam_from_world.matrix())


def test_a_hybrid_tries_all_levels_where_the_finest_alone_does_not_converge(town, sift_town, middle, monkeypatch):
    levels = []

    def counted(*, pyramid, **settings):
        levels.append(len(pyramid.maps))
        return refine_pose(pyramid=pyramid, **settings)

    monkeypatch.setattr("gnnet.localization.refiner.refine_pose", counted)
    for iterations, expected in ((50, [1]), (1, [1, 2])):
        levels.clear()
        found = Localizer(references=4, pose=HybridPose(enough=20), refiner=Refiner(iterations=iterations))
        localize(found.on(untrained(), town, sift_town), middle[0])
        assert levels == expected


@pytest.mark.slow
def test_references_are_matched_by_turns_until_a_pose_is_certain(town, middle):
    def found(**settings):
        matched, matcher = [], Matcher()
        counting = replace(matcher)
        match_query = matcher.match_query

        def counted(observations, *rest):
            matched.append(len(observations.reference.unique()))
            return match_query(observations, *rest)

        object.__setattr__(counting, "match_query", counted)
        pose = PoseFromMatches(counting, **settings)
        return localize(localizer(pose=pose).on(untrained(), town), middle[0]), matched

    at_once, matched = found(turn=None)
    assert matched == [4] and at_once.inliers > 20
    by_turns, matched = found(turn=2, certain=10**6)
    assert matched == [2, 2] and by_turns.matches == at_once.matches
    torch.testing.assert_close(by_turns.cam_from_world.matrix(), at_once.cam_from_world.matrix())
    early, matched = found(turn=2, certain=12)
    assert matched == [2] and early.inliers >= 12 and early.matches < at_once.matches
    with pytest.raises(ValueError, match="turn 0"):
        PoseFromMatches(turn=0)


def test_matches_of_local_features_take_part_in_the_refinement(town, sift_town, middle, monkeypatch):
    """With all the weight, they keep the pose where they put it; with hardly any, the features move it."""
    monkeypatch.setattr(
        "gnnet.localization.localizer.choose_hypothesis",  # whatever it chooses
        lambda result, tried, refinement, *rest: replace(result, cam_from_world=refinement.cam_from_world[0]),
    )
    image, moved = middle[0], []
    for weight in (1e-6, 1e4):
        hybrid = Localizer(references=4, pose=HybridPose(enough=20), refiner=Refiner(match_weight=weight))
        result = localize(hybrid.on(untrained(), town, sift_town), image)
        position, _ = pose_errors(result.cam_from_world, result.initial)
        moved.append(position.item())
    assert moved[0] > 2 * moved[1] > 0
    finest, all_levels = (
        localize(replace(hybrid, refiner=Refiner(levels=levels)).on(untrained(), town, sift_town), image)
        for levels in ([-1], None)
    )
    assert torch.equal(finest.cam_from_world.matrix(), all_levels.cam_from_world.matrix())


def test_maps_that_do_not_go_together_are_refused(town, sift_town, scene, tmp_path):
    with pytest.raises(ValueError, match="second map, of local features: none was given"):
        Localizer(pose=HybridPose()).on(untrained(), town)
    with pytest.raises(ValueError, match="is not used"):
        Localizer().on(untrained(), town, sift_town)
    with pytest.raises(ValueError, match="local features"):
        Localizer(pose=HybridPose()).on(untrained(), sift_town, town)
    night = compile_map(
        tmp_path / "other.gnmap", scene.with_places(scene.places[:1]), untrained(), points=50,
        local_features=LocalFeatures(), progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="different references"):
        Localizer(pose=HybridPose()).on(untrained(), town, night)
    with pytest.raises(ValueError, match="hybrid pose takes LocalFeatures"):
        HybridPose(local=PoseFromMatches(Matcher()))


def test_another_image_of_the_same_name_may_use_a_reference(town, middle):
    found = localizer(references=1).on(untrained(), town)
    for image in middle:
        result = localize(found, image, itself=None)
        assert result.references == (image.name,)
        assert errors(result, image)[0] < 0.01 and errors(result, image)[1] < 0.05


def test_the_same_query_is_localized_the_same_again_and_leaves_no_gradient(town, middle):
    found = localizer().on(untrained(), town)
    first, again = localize(found, middle[0]), localize(found, middle[0])
    assert torch.equal(first.cam_from_world.matrix(), again.cam_from_world.matrix())
    assert not first.cam_from_world.translation.requires_grad and not first.covariance.requires_grad
    assert replace(first, seconds={}, cam_from_world=None, initial=None, covariance=None) == replace(
        again, seconds={}, cam_from_world=None, initial=None, covariance=None
    )


def test_nearest_takes_the_pose_of_the_first_reference(town, middle):
    for refine in (False, True):
        refiner = Refiner() if refine else None
        found = localizer(pose=NearestPose(), refiner=refiner, references=1).on(untrained(), town)
        result = localize(found, middle[0])
        assert result.status == Status.LOCALIZED and len(result.references) == 1
        row = town.rows[result.references[0]]
        assert torch.equal(result.initial.matrix(), town.poses[row].matrix())
        assert refine or torch.equal(result.cam_from_world.matrix(), result.initial.matrix())
        assert (result.initial_cost is not None) == refine and result.matches == 0


@pytest.mark.slow
def test_sift_localizes_queries_of_another_day(scene, tmp_path):
    features, network = LocalFeatures("sift", count=1000), untrained()
    town = compile_map(tmp_path / "sift", scene, network, points=1000, local_features=features, progress=False)
    settings = localizer(pose=PoseFromMatches(features), refiner=None)
    found = settings.on(network, town)
    sunny = [i for i in scene.images.values() if i.condition == "sun"]
    results = [(localize(found, image), image) for image in sunny]
    localized = [(result, image) for result, image in results if result.status == Status.LOCALIZED]
    assert len(localized) >= 4  # of six, 96 pixels wide
    for result, image in localized:
        assert not result.refined and 12 <= result.inliers <= result.matches
        assert errors(result, image)[0] < 0.3 and errors(result, image)[1] < 1
    blank = localize(found, sunny[0], pixels=torch.full((3, 96, 96), 90, dtype=torch.uint8))
    assert blank.status == Status.NO_MATCHES and blank.cam_from_world is None and len(blank.references) == 4
    with pytest.raises(ValueError, match=r"compiled with the local features sift, not with None"):
        localizer().on(network, town)


def test_a_pose_that_is_given_is_refined_at_the_references_near_it(town, middle, scene):
    found = localizer(pose=GivenPose(), retrieval=InitialPoseRetrieval(), references=2).on(untrained(), town)
    image = middle[1]
    initial = perturb(image.cam_from_world, 0.05, 0.2, torch.Generator().manual_seed(0))
    result = localize(found, image, itself=None, initial=initial)
    nearest = nearest_by_pose(initial, town.poses, 2, per_radian=town.depth)
    assert result.references == tuple(town.names[row] for row in nearest.tolist())
    assert result.references[0] == image.name
    assert result.refined and errors(result, image)[0] < 0.01 and torch.equal(result.initial.matrix(), initial.matrix())
    own = localize(found, image, initial=initial.to(torch.float32))
    assert image.name not in own.references and own.initial.dtype == torch.float64
    missing = localize(found, image)
    assert missing.status == Status.NO_POSE and missing.reason == "no initial pose" and missing.cam_from_world is None


def test_references_near_an_initial_pose_are_matched(town, middle):
    image = middle[1]
    initial = perturb(image.cam_from_world, 0.05, 0.2, torch.Generator().manual_seed(0))
    found = localizer(retrieval=InitialPoseRetrieval(), references=3).on(untrained(), town)
    result = localize(found, image, initial=initial)
    nearest = [
        row
        for row in nearest_by_pose(initial, town.poses, 4, per_radian=town.depth).tolist()
        if town.names[row] != image.name
    ]
    assert result.references == tuple(town.names[row] for row in nearest[:3])
    assert result.matches > 0 and not torch.equal(result.initial.matrix(), initial.matrix())
    without = localize(found, image)
    assert without.status == Status.NO_REFERENCE and "initial pose" in without.reason


def test_references_near_the_true_pose_for_the_oracle_alone(town, middle):
    image = middle[0]
    found = localizer(retrieval=OracleRetrieval(), pose=NearestPose(), refiner=None, references=2).on(untrained(), town)
    result = localize(found, image, truth=image.cam_from_world)
    rows = [
        row
        for row in nearest_by_pose(image.cam_from_world, town.poses, 3, per_radian=town.depth).tolist()
        if town.names[row] != image.name
    ]
    assert result.references == tuple(town.names[row] for row in rows[:2])
    unknown = localize(found, image)
    assert unknown.status == Status.NO_REFERENCE and "oracle" in unknown.reason


@pytest.mark.parametrize("poses", [False, True])
def test_references_near_a_known_position(town, middle, tmp_path, poses):
    """Each place has three references, 1.25 m apart; those beyond the radius are not searched."""
    image, centers = middle[0], town.poses.center()
    own = image.cam_from_world.center()
    file = tmp_path / "gps.txt"
    if poses:
        write_pose_file(file, {image.name: image.cam_from_world})
    else:
        file.write_text(f"# GPS\n{image.name} {' '.join(map(str, own.tolist()))}\n")
    found = localizer(retrieval=DescriptorRetrieval(prior=PositionPrior(file, 5.0)), references=9).on(untrained(), town)
    near = {name for name, d in zip(town.names, (centers - own).norm(dim=-1), strict=True) if d <= 5.0}
    result = localize(found, image)
    assert set(result.references) == near - {image.name} and len(near) < len(town.names)
    assert len(localize(found, middle[1]).references) > 2  # the file has no position of it
    assert "within 5 of a position" in found.title
    empty = localizer(retrieval=DescriptorRetrieval(prior=PositionPrior(file, 1e-3))).on(untrained(), town)
    assert localize(empty, image).status == Status.NO_REFERENCE


def test_broken_positions_are_said(tmp_path, caplog):
    file = tmp_path / "gps.txt"
    for text, message in (
        ("a.jpg 1 2", r"line 1 has 3 words .* expected name x y z"),
        ("a.jpg 1 2 3\na.jpg 1 2 3", "line 2 names a.jpg again"),
        ("a.jpg 1 2 1e99", "line 1 has the position"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_positions(file)
    with pytest.raises(ValueError, match="radius"):
        PositionPrior(file, 0.0)
    with pytest.raises(ValueError, match="line 1 has the position"):
        PositionPrior(file, 1.0)


@pytest.mark.cases
def test_positions_are_of_queries_and_one_bad_line_does_not_end_the_rest(tmp_path, caplog):
    file = tmp_path / "gps.txt"
    file.write_text("name x y z\nIMG 1.jpg 1 2 3\ndb/b.jpg 4 5 6\nc.jpg nan nan nan\n")
    prior = PositionPrior(file, 1.0)
    assert "gps.txt: 2 lines are left out" in caplog.text
    positions = DescriptorRetrieval(prior=prior).of(["q/IMG 1.jpg", "db/b.jpg"], []).prior.positions
    assert {name: p.tolist() for name, p in positions.items()} == {"db/b.jpg": [4, 5, 6], "q/IMG 1.jpg": [1, 2, 3]}
    with pytest.raises(ValueError, match=r"gps\.txt has names as IMG 1\.jpg, .* the queries are called x\.jpg: none"):
        DescriptorRetrieval(prior=prior).of(["x.jpg"], [])
    file.write_text("name qw qx qy qz tx ty tz\na b.jpg 1 0 0 0 1 2 3\nc.jpg 1 0 0 0 1 2 3\n")
    assert PositionPrior(file, 1.0).positions["a b.jpg"].tolist() == [-1, -2, -3]


def test_references_of_a_pairs_file(town, middle, tmp_path):
    image, other = middle[:2]
    names = [other.name, "missing", image.name, town.names[2], other.name, town.names[0], town.names[8]]
    (tmp_path / "pairs.txt").write_text("".join(f"{image.name} {name}\n" for name in names))
    found = localizer(retrieval=PairsRetrieval(tmp_path / "pairs.txt"), references=3).on(untrained(), town)
    assert localize(found, image).references == (other.name, town.names[2], town.names[0])
    unlisted = localize(found, image, name="unlisted")
    assert unlisted.status == Status.NO_REFERENCE and "pairs file" in unlisted.reason
    with pytest.raises(FileNotFoundError, match="none"):
        PairsRetrieval(tmp_path / "none")


def test_references_given_are_used_in_their_order_and_not_twice(town, middle):
    found = localizer(references=3).on(untrained(), town)
    image, other = middle[:2]
    names = [other.name, "no such image", image.name, town.names[2], other.name, town.names[0], town.names[8]]
    result = localize(found, image, references=names)
    assert result.references == (other.name, town.names[2], town.names[0])


@pytest.mark.parametrize("refine", [False, True])
def test_an_unknown_focal_length_is_estimated(town, middle, refine):
    """Features of a random network match from nearby alone, so the image itself is among the references."""
    found = localizer(references=1, refiner=Refiner() if refine else None).on(untrained(), town)
    for image in middle:
        result = localize(found, image, camera=None, itself=None)
        assert result.status == Status.LOCALIZED
        assert result.camera.parameters[0] == pytest.approx(image.camera.parameters[0].item(), rel=0.01)
        again = localize(replace(found, estimate_focal=True), image, camera=image.camera.scale(1.0), itself=None)
        assert torch.equal(again.cam_from_world.matrix(), result.cam_from_world.matrix())
        assert errors(result, image)[0] < 0.1 and errors(result, image)[1] < 0.1
        assert localize(found, image, itself=None).camera is None
    nearest = localizer(pose=NearestPose()).on(untrained(), town)
    result = localize(nearest, middle[0], camera=None)
    assert result.status == Status.NO_CAMERA and "focal length is not known" in result.reason


def test_failures_are_records(town, middle):
    network, image = untrained(), middle[0]
    for references in ([], ["no such image"], [image.name]):
        result = localize(localizer().on(network, town), image, references=references)
        assert result.status == Status.NO_REFERENCE and result.references == () and result.cam_from_world is None
        assert result.initial is None and not result.refined and result.reason and "features" in result.seconds
    strict = localizer(pose=PoseFromMatches(Matcher(), PoseSolver(min_inliers=100000))).on(network, town)
    result = localize(strict, image)
    assert result.status == Status.NO_POSE and "100000 needed" in result.reason and result.matches > 0
    nothing = localizer(pose=PoseFromMatches(Matcher(ratio=0.01))).on(network, town)
    assert localize(nothing, image).status == Status.NO_MATCHES


@pytest.mark.slow
def test_only_references_of_the_place_or_the_camera(scene, town, middle, tmp_path):
    network = untrained()
    of_place = localizer(retrieval=DescriptorRetrieval(same_place=True), references=9).on(network, town)
    for image in middle:
        result = localize(of_place, image)
        names = {i.name for i in scene.images.values() if i.place == image.place and i.is_reference}
        assert set(result.references) == names - {image.name}
    unknown = localize(of_place, middle[0], place=None)
    assert len(unknown.references) == 8
    wide = Camera.from_colmap("PINHOLE", 96, 96, (66.0, 66.0, 48.0, 48.0), dtype=torch.float64)
    images = {
        name: replace(i, camera=wide) if i.is_reference and i.place == middle[1].place else i
        for name, i in scene.images.items()
    }
    two = compile_map(tmp_path / "two", replace(scene, images=images, pairs=()), network, points=50, progress=False)
    found = localizer(retrieval=DescriptorRetrieval(same_camera=True), references=9).on(network, two)
    of_second = {name for name, i in images.items() if i.is_reference and i.place == middle[1].place}
    nearly = Camera(wide.size, wide.parameters * 1.005)
    assert set(localize(found, middle[0], camera=nearly, itself=None).references) == of_second
    assert set(localize(found, middle[0], itself=None).references) == set(two.names) - of_second
    as_said = replace(scene, images=images, pairs=(), retrieve_within=("camera", "place"))
    said = compile_map(tmp_path / "said", as_said, network, points=50, progress=False)
    found_by = {
        asked: set(localize(asking.on(network, said), middle[0], itself=None).references)
        for asked in (None, False)
        for asking in [localizer(retrieval=DescriptorRetrieval(same_camera=asked), references=9)]
    }
    of_own_place = {i.name for i in images.values() if i.is_reference and i.place == middle[0].place}
    assert found_by == {None: of_own_place - of_second, False: of_own_place}
    other = Camera(wide.size, wide.parameters * 1.3)
    foreign = localize(localizer(references=9).on(network, said), middle[0], itself=None, camera=other)
    assert set(foreign.references) == of_own_place
    assert localize(found, middle[0], camera=other).status == Status.NO_REFERENCE


def test_ablations_of_the_camera(town, middle):
    network, image = untrained(), middle[0]
    plain = localize(localizer().on(network, town), image, itself=None)
    distorted = Camera(image.camera.size, image.camera.parameters + torch.tensor([0, 0, 0, 0, 0.1, 0.02, 0, 0]))
    without = localize(localizer(distortion=False).on(network, town), image, itself=None, camera=distorted)
    assert torch.equal(without.cam_from_world.matrix(), plain.cam_from_world.matrix())
    longer = Camera(image.camera.size, image.camera.parameters * torch.tensor([1.2, 1.2, 1, 1, 1, 1, 1, 1]))
    wrong = localize(localizer(refiner=None).on(network, town), image, itself=None, camera=longer)
    assert errors(wrong, image)[0] > 0.05
    corrected = localize(localizer(reference_camera=True).on(network, town), image, itself=None, camera=longer)
    assert torch.equal(corrected.cam_from_world.matrix(), plain.cam_from_world.matrix())


def test_what_does_not_fit_is_said(town, middle, scene, tmp_path):
    network, image = untrained(), middle[0]
    with pytest.raises(ValueError, match="settings only"):
        localize(localizer(), image)
    for pixels in (torch.zeros(3, 96, 95, dtype=torch.uint8), torch.zeros(3, 48, 48, dtype=torch.uint8)):
        found = localize(localizer().on(network, town), image, itself=None, pixels=pixels)
        assert found.status == Status.NO_CAMERA and found.cam_from_world is None
        assert re.search(rf"{pixels.shape[-1]}×{pixels.shape[-2]} pixels, .* 96×96", found.reason)
    other = UNet(**{**SETTINGS, "normalize": False}).eval()
    other.load_state_dict(network.state_dict())
    with pytest.raises(ValueError, match=r"town\.gnmap was compiled with the network"):
        localizer().on(other, town)
    with pytest.raises(ValueError, match="compiled with the local features None, not with sift"):
        localizer(pose=PoseFromMatches(LocalFeatures()), refiner=None).on(network, town)
    with pytest.raises(ValueError, match="compiled with the retrieval gem"):
        localizer(retrieval=DescriptorRetrieval(network=nn.Flatten())).on(network, town)
    for settings in ({"pose": PoseFromMatches(LocalFeatures())}, {"references": 0}, {"best_references": 0}):
        with pytest.raises(ValueError, match=r"localizer\.refiner=null|expected 1 or more"):
            localizer(**settings)
    for settings in ({"points": 0}, {"hypotheses": 0}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            Refiner(**settings)


class Pooled(nn.Module):
    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float(), 3).flatten(1)


def test_another_network_may_retrieve(scene, middle, tmp_path):
    network = untrained()
    town = compile_map(tmp_path / "map", scene, network, points=300, retrieval_network=Pooled(), progress=False)
    found = localizer(retrieval=DescriptorRetrieval(network=Pooled())).on(network, town)
    result = localize(found, middle[0], itself=None)
    assert result.references[0] == middle[0].name and errors(result, middle[0])[0] < 0.01
    with pytest.raises(ValueError, match="retrieval"):
        localizer().on(network, town)


def test_a_map_of_smaller_images_shrinks_the_query(scene, middle, tmp_path):
    network = untrained()
    town = compile_map(tmp_path / "small", scene, network, points=300, largest_side=72, progress=False)
    result = localize(localizer(references=2).on(network, town), middle[0], itself=None)
    assert errors(result, middle[0])[0] < 0.02 and errors(result, middle[0])[1] < 0.1


@pytest.mark.slow
def test_far_from_the_origin_poses_are_as_good(scene, town, middle, tmp_path):
    shift = torch.tensor([1e6, -7e5, 2e5], dtype=torch.float64)
    images = {
        name: replace(i, cam_from_world=Pose(p.rotation, p.translation - p.rotation @ shift))
        for name, i in scene.images.items()
        for p in [i.cam_from_world]
        if p is not None
    }
    network = untrained()
    far = replace(scene, images=images, points=scene.points + shift, pairs=())
    town_far = compile_map(tmp_path / "far", far, network, points=500, progress=False)
    for settings in ({}, {"refiner": None}):
        near, away = (localizer(**settings).on(network, m) for m in (town, town_far))
        for image in middle[:2]:
            one, other = localize(near, image), localize(away, images[image.name])
            back = Pose(other.cam_from_world.rotation, other.cam_from_world.transform(shift[None])[0])
            position, rotation = pose_errors(back, one.cam_from_world)
            assert position < 1e-3 and rotation < 1e-2 and other.inliers == one.inliers


@pytest.mark.slow
@pytest.mark.cases
@pytest.mark.parametrize("unit", [1e3, 1e-3])
def test_the_unit_of_the_world_does_not_matter(scene, town, middle, tmp_path, unit):
    """A model in millimetres or kilometres: the same references, the same pose."""

    def scaled(pose: Pose) -> Pose:
        return Pose(pose.rotation, pose.translation * unit)

    images = {
        i.name: replace(i, cam_from_world=i.cam_from_world and scaled(i.cam_from_world)) for i in scene.images.values()
    }
    other = replace(scene, images=images, points=scene.points * unit)
    map = compile_map(tmp_path / "scaled.gnmap", other, untrained(), points=500, progress=False)
    found = localizer(retrieval=InitialPoseRetrieval(), refiner=None)
    for image in middle:
        initial = perturb(image.cam_from_world, 1.0, 20.0, torch.Generator().manual_seed(0))
        expected = localize(found.on(untrained(), town), image, initial=initial)
        result = localize(found.on(untrained(), map), image, initial=scaled(initial))
        assert result.references == expected.references and result.inliers == expected.inliers
        torch.testing.assert_close(result.cam_from_world.rotation, expected.cam_from_world.rotation, atol=1e-7, rtol=0)
        torch.testing.assert_close(
            result.cam_from_world.translation / unit, expected.cam_from_world.translation, atol=1e-6, rtol=0
        )


def write_checkpoint(path, network, **changes):
    content = {
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "config": {"model": {"_target_": "gnnet.models.unet.UNet", **SETTINGS}},
        "global_step": 3,
        **changes,
    }
    torch.save(content, path)
    return path


def test_a_localizer_of_a_checkpoint(town, middle, tmp_path):
    path = write_checkpoint(tmp_path / "best.ckpt", untrained())
    # By default it matches as conf/localizer/sparse_to_dense.yaml; an untrained network has no match so distinct.
    assert Localizer.from_checkpoint(path, town.path).pose.matcher == Matcher(ratio=0.9)
    found = Localizer.from_checkpoint(str(path), str(town.path), references=4, pose=PoseFromMatches(Matcher()))
    assert not found.network.training and found.references == 4
    expected = localize(localizer().on(untrained(), town), middle[0])
    assert torch.equal(localize(found, middle[0]).cam_from_world.matrix(), expected.cam_from_world.matrix())
    with pytest.raises(ValueError, match="compiled with the network"):
        torch.manual_seed(1)
        Localizer.from_checkpoint(write_checkpoint(path, UNet(**SETTINGS)), town.path)
    with pytest.raises(FileNotFoundError, match="map"):
        Localizer.from_checkpoint(path, tmp_path / "none.gnmap")
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        Localizer.from_checkpoint(tmp_path / "none.ckpt", town.path)


# --- what programs of others hand over


@pytest.mark.cases
def test_an_initial_pose_is_used_or_refused(town, middle):
    image, network = middle[0], untrained()
    for settings in ({}, {"pose": NearestPose()}, {"refiner": None}, {"retrieval": OracleRetrieval()}):
        with pytest.raises(ValueError, match="but this localizer uses none; take pose=GivenPose"):
            localize(localizer(**settings).on(network, town), image, initial=image.cam_from_world)
    given = localizer(pose=GivenPose(), retrieval=InitialPoseRetrieval()).on(network, town)
    matrix, batch = image.cam_from_world.matrix(), Pose.stack([image.cam_from_world])
    broken = Pose(image.cam_from_world.rotation, image.cam_from_world.translation * torch.nan)
    for wrong, message in ((matrix, "is a Tensor"), (batch, r"a batch \(1,\) of Poses?"), (broken, "is not finite")):
        with pytest.raises(ValueError, match=f"the initial pose {message}" if wrong is broken else message):
            localize(given, image, initial=wrong)


@pytest.mark.cases
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_floating_image_counts_from_0_to_1(town, middle, kind):
    image, found = middle[0], localizer().on(untrained(), town)
    pixels = read_image(image.path)
    expected = localize(found, image, pixels=pixels)
    result = localize(found, image, pixels=(pixels.double() / 255).to(kind))
    if kind != torch.bfloat16:  # whose 8 bits do not tell all grey values apart
        assert torch.equal(result.cam_from_world.matrix(), expected.cam_from_world.matrix())
    assert errors(result, image)[0] < 0.4
    for wrong in (pixels.to(kind), pixels.to(kind) / 255 - 0.5, pixels.to(kind) * torch.nan):
        with pytest.raises(ValueError, match=r"is floating, from .* expected 0 to 1, or uint8 from 0 to 255"):
            localize(found, image, pixels=wrong)


@pytest.mark.cases
def test_an_image_of_another_form_is_said_with_what_makes_it_one(town, middle):
    image, found = middle[0], localizer().on(untrained(), town)
    pixels = read_image(image.path)
    rows = pixels.permute(1, 2, 0)
    wrong = {
        r"\(96, 96, 3\).*permute\(2, 0, 1\)": rows,
        r"\(1, 3, 96, 96\).*image\[0\]": pixels[None],
        r"\(96, 96\).*grey": pixels[0],
        r"\(1, 96, 96\).*grey": pixels[:1],
        r"\(4, 96, 96\).*transparency": torch.cat([pixels, pixels[:1]]),
        r"\(3, 0, 96\)": pixels[:, :0],
        "is a numpy.ndarray; .*from_numpy.*BGR": rows.numpy(),
        "is a PIL.Image.Image": Image.fromarray(rows.numpy()),
        "type torch.int64; expected uint8": pixels.long(),
        "type torch.bool; expected uint8": pixels > 0,
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=f"the image .*{message}"):
            localize(found, image, pixels=given)
    cameras = {
        r"a batch \(1,\) of Cameras": Camera.stack([image.camera]),
        "is a dict": {"model": "PINHOLE"},
        "is not finite": Camera(image.camera.size, image.camera.parameters * torch.nan),
    }
    for message, camera in cameras.items():
        with pytest.raises(ValueError, match=f"the camera .*{message}"):
            localize(found, image, camera=camera)


@pytest.mark.cases
def test_what_lies_on_another_device_is_fetched(town, middle):
    """Tensors of the device `meta` hold nothing, so that fetching them is told by torch; using them would not be."""
    image, network = middle[0], untrained()
    found = localizer(pose=GivenPose(), retrieval=InitialPoseRetrieval()).on(network, town)
    elsewhere = {
        "pixels": read_image(image.path).to("meta"), "camera": image.camera.to("meta"),
        "initial": image.cam_from_world.to("meta"), "truth": image.cam_from_world.to("meta"),
    }  # fmt: skip
    for name, value in elsewhere.items():
        with pytest.raises(NotImplementedError, match="meta tensor"):
            localize(found, image, **{"initial": image.cam_from_world, name: value})


@pytest.mark.cases
def test_references_that_the_map_has_not_are_named(town, middle):
    found, image = localizer(references=3).on(untrained(), town), middle[0]
    none = localize(found, image, references=["night/nowhere.jpg"])
    assert none.status == Status.NO_REFERENCE and "night/nowhere.jpg" in none.reason
    some = localize(found, image, references=["a.jpg", middle[1].name, "b.jpg"])
    assert some.references == (middle[1].name,) and some.reason.endswith("; the map has no reference a.jpg, b.jpg")
    assert "no reference" not in localize(found, image, references=[middle[1].name]).reason


@pytest.mark.cases
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_types_localize(scene, town, middle, tmp_path, kind):
    network, image = untrained().to(kind), middle[0]
    own = compile_map(tmp_path / "own", scene, network, points=300, progress=False)
    result = localize(localizer(references=1).on(network, own), image, itself=None)
    assert result.references == (image.name,) and errors(result, image)[0] < 0.02
    if kind == torch.float64:  # the weights are the same
        assert errors(localize(localizer(references=1).on(network, town), image, itself=None), image)[0] < 0.02
    else:
        with pytest.raises(ValueError, match=rf"compiled with the network .*\(its weights are {kind}\)"):
            localizer().on(network, town)


@pytest.mark.slow
@pytest.mark.cases
@pytest.mark.parametrize("matcher", [Matcher(), Matcher(dense=False), LocalFeatures("sift", 500)])
def test_the_default_type_may_be_float64(scene, middle, tmp_path, matcher):
    features = matcher.local_features
    refiner = None if features else Refiner()
    network = untrained()
    own = compile_map(tmp_path / "own", scene, network, points=300, local_features=features, progress=False)
    found = localizer(pose=PoseFromMatches(matcher), refiner=refiner, references=1).on(network, own)
    expected = localize(found, middle[0], itself=None)
    torch.set_default_dtype(torch.float64)
    try:
        again = compile_map(tmp_path / "again", scene, network, points=300, local_features=features, progress=False)
        for map, of_type in ((own, network), (again, deepcopy(network).double())):
            result = localize(found.on(of_type, map), middle[0], itself=None)
            assert errors(result, middle[0])[0] < 0.05 and result.inliers == pytest.approx(expected.inliers, abs=3)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.cases
def test_threads_share_a_localizer_and_localizers_a_map(town, scene):
    network = untrained()
    refiner = Refiner(iterations=2)
    two = [localizer(refiner=refiner, references=n).on(net, town) for n, net in ((2, network), (1, untrained()))]
    jobs = [(found, image) for image in list(scene.images.values())[:2] for found in two]
    alone = [localize(found, image) for found, image in jobs]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda job: localize(*job), 2 * jobs))
    for one, other in zip(2 * alone, together, strict=True):
        assert (one.name, one.status, one.references, one.inliers) == (
            other.name, other.status, other.references, other.inliers,
        )  # fmt: skip
        assert (one.cam_from_world is None) == (other.cam_from_world is None)
        assert one.cam_from_world is None or torch.equal(one.cam_from_world.matrix(), other.cam_from_world.matrix())


@pytest.mark.cases
@pytest.mark.slow
def test_a_compiled_network_is_the_same_network(town, middle):
    plain, compiled = untrained(), torch.compile(untrained(), backend="eager")
    expected = localize(localizer().on(plain, town), middle[0])
    result = localize(localizer().on(compiled, town), middle[0])
    assert torch.equal(result.cam_from_world.matrix(), expected.cam_from_world.matrix())
