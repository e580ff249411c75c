"""Compiling a map: what it holds, going on after a kill, what it refuses, covisibility, memory."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from gnnet.arrays import ArrayFile
from gnnet.data.images import limit_size, read_image
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.geometry.triangulation import MIN_ANGLE
from gnnet.localization.compile import compile_map, references_of
from gnnet.localization.covisibility import covisible_by_depth
from gnnet.localization.global_descriptors import gem
from gnnet.localization.local_features import LocalFeatures
from gnnet.localization.map import Map, Observations
from gnnet.localization.refinement import sample_confidences, sample_descriptors
from gnnet.models.pyramid import FeaturePyramid
from gnnet.models.unet import UNet
from gnnet.processes import devices_of
from gnnet.scenes.layouts.rgbd import load_rgbd
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.pairing import shared_points
from gnnet.scenes.scene import Scene, SceneImage


def small_unet(seed: int = 0, **settings) -> UNet:
    torch.manual_seed(seed)
    return UNet(**{"widths": (8, 16, 16), "channels": (6, 4), "strides": (4, 2), "stem_stride": 2, **settings}).eval()


class Counting(nn.Module):
    """Passes images on, counts them, and fails from some image on."""

    def __init__(self, network: nn.Module, *, fails_at: int | None = None) -> None:
        super().__init__()
        self.network, self.channels, self._calls, self._fails_at = network, network.channels, [], fails_at

    def forward(self, images):
        self._calls.append(tuple(images.shape))
        if len(self._calls) == self._fails_at:
            raise KeyboardInterrupt
        return self.network(images)


def compiled(path: Path, scene: Scene, network: nn.Module, **settings) -> Map:
    return compile_map(path, scene, network, progress=False, **settings)


def contents(path: Path) -> dict[str, bytes]:
    file = ArrayFile(path)
    return {name: file[name].tobytes() for name in file.arrays}


@pytest.fixture(scope="module")
def scene(toy_root) -> Scene:
    return load_robotcar(toy_root, progress=False)


@pytest.fixture(scope="module")
def town(scene, tmp_path_factory) -> Map:
    return compiled(tmp_path_factory.mktemp("map") / "town.gnmap", scene, small_unet(), points=500)


def test_it_holds_the_references_and_their_observations(scene, town):
    references = {i.name: i for i in scene.images.values() if i.is_reference}
    assert town.names == tuple(sorted(references)) and town.levels == 2 and town.largest_side is None
    assert town.image_sizes.tolist() == [[96, 96]] * len(references)
    assert town.retrieve_within == ("camera",)  # as the reader says
    assert town.places == tuple(references[name].place for name in town.names)
    network = small_unet()
    for row, name in enumerate(town.names):
        reference = references[name]
        assert torch.equal(town.poses[row].matrix(), reference.cam_from_world.matrix())
        assert torch.equal(town.cameras[row].parameters, reference.camera.parameters)
        found = town.observations(torch.tensor([row]))
        assert len(found.points) == min(500, len(reference.point_ids)) and (found.reference == row).all()
        assert len(found.ids.unique()) == len(found.ids) and set(found.ids.tolist()) <= set(reference.point_ids)
        assert (found.points - scene.points[found.ids]).norm(dim=-1).max() < 5e-3  # keypoints have a file's digits
        keypoints, visible = reference.camera.project(reference.cam_from_world.transform(found.points))
        torch.testing.assert_close(found.keypoints, keypoints.float())
        with torch.no_grad():
            pyramid = network(read_image(reference.path)[None])
        descriptors, valid = sample_descriptors(pyramid, keypoints[None].float())
        for level in range(2):
            torch.testing.assert_close(found.descriptors[level], descriptors[level][0], atol=1e-3, rtol=1e-3)
            assert torch.equal(found.valid[:, level], valid[level][0] & visible)
        assert found.valid.any()
        described = town.whitening.apply(gem(pyramid))[0]
        np.testing.assert_allclose(town.global_descriptors[row], described, atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(town.global_descriptors, axis=1), 1, atol=1e-5)


def test_what_is_described_is_where_the_reference_observes_a_point(scene, tmp_path):
    """Not where its pose, which may be off, projects it; where they are far apart, nothing is described."""
    reference = next(i for i in scene.images.values() if i.is_reference)
    observed = np.asarray(reference.keypoints) + np.array([1.5, -0.5])
    observed[::7] += 20
    one = replace(scene, images={reference.name: replace(reference, keypoints=observed)}, pairs=())
    found = compiled(tmp_path / "one", one, small_unet(), points=500).observations(torch.tensor([0]))
    row = {int(i): n for n, i in enumerate(reference.point_ids)}
    rows = np.array([row[i] for i in found.ids.tolist()])
    np.testing.assert_allclose(found.keypoints, observed[rows], atol=1e-3)
    assert not found.valid[torch.from_numpy(rows % 7 == 0)].any() and found.valid[torch.from_numpy(rows % 7 > 0)].any()
    with torch.no_grad():
        pyramid = small_unet()(read_image(reference.path)[None])
    descriptors, _ = sample_descriptors(pyramid, found.keypoints[None])
    torch.testing.assert_close(found.descriptors[1], descriptors[1][0], atol=1e-3, rtol=1e-3)


def test_a_network_with_confidence_has_it_in_its_map(scene, tmp_path, town):
    network = small_unet(confidence=True)
    for head in network.confidence_heads:
        nn.init.normal_(head.weight)
    found = compiled(tmp_path / "town.gnmap", scene, network, points=500).observations(torch.tensor([2, 0]))
    assert found.confidence.shape == found.valid.shape and found.confidence.std() > 0.05
    name = town.names[2]
    with torch.no_grad():
        pyramid = network(read_image(scene.images[name].path)[None])
    here = found.reference == 2
    expected = torch.stack([c[0] for c in sample_confidences(pyramid, found.keypoints[here][None])], -1)
    torch.testing.assert_close(found.confidence[here], expected, atol=1e-3, rtol=1e-3)
    # Everything else is as of the network without; a map of that has no such array, as maps had before.
    plain = town.observations(torch.tensor([2, 0]))
    assert "confidence" not in town.file and plain.confidence is None
    assert all(torch.equal(a, b) for a, b in zip(found.descriptors, plain.descriptors, strict=True))
    both = Observations.cat([found.select(here), found.select(~here)])
    assert torch.equal(both.confidence, found.confidence)


def test_observations_come_in_the_order_of_the_rows_asked_for(town):
    both = town.observations(torch.tensor([4, 1]))
    parts = [town.observations(torch.tensor([row])) for row in (4, 1)]
    assert both.confidence is None
    for value, first, second in zip(both[:-1], *(part[:-1] for part in parts), strict=True):
        if isinstance(value, tuple):
            for level, a, b in zip(value, first, second, strict=True):
                assert torch.equal(level, torch.cat([a, b]))
        else:
            assert torch.equal(value, torch.cat([first, second]))
    nothing = town.observations(torch.zeros(0, dtype=torch.int64))
    assert nothing.points.shape == (0, 3) and nothing.descriptors[0].shape == (0, 6)


def test_observations_of_one_point_become_one():
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([7, -1, 3, 7, -1, 7])
    points = torch.where(ids < 0, torch.arange(6), ids).double()[:, None].expand(-1, 3)
    level = torch.randn(6, 4, generator=generator).half()
    valid = torch.ones(6, 2, dtype=torch.bool)
    valid[3, 0] = valid[2, 1] = False
    seen = Observations(points, ids, torch.rand(6, 2), (level, level.float()), valid, torch.arange(6))
    merged, row = seen.by_point()
    assert len(merged.ids) == 4  # 3, 7, and twice no id
    assert torch.equal(merged.points[row], points)
    assert torch.equal(merged.ids[row], ids)
    for here, vectors in zip(merged.descriptors, seen.descriptors, strict=True):
        torch.testing.assert_close(here[row[[1, 4]]], vectors[[1, 4]].float())
    # Point 7 is seen three times; at the first level the second of them is not known.
    for i, known in enumerate(([0, 5], [0, 3, 5])):
        vectors, here = seen.descriptors[i][known].float(), merged.descriptors[i][row[0]]
        assert torch.cosine_similarity(here, vectors.mean(0), dim=0) > 0.9999
        torch.testing.assert_close(here.norm(), vectors.norm(dim=-1).mean())
    assert merged.valid[row[0]].tolist() == [True, True]
    assert merged.valid[row[2]].tolist() == [True, False]
    assert merged.reference[row[0]] == 0
    confidence = torch.rand(6, 2, generator=generator)
    trusted, _ = seen._replace(confidence=confidence).by_point()
    mean = torch.stack([confidence[[0, 5], 0].mean(), confidence[[0, 3, 5], 1].mean()])
    torch.testing.assert_close(trusted.confidence[row[0]], mean)
    torch.testing.assert_close(trusted.confidence[row[[1, 4]]], confidence[[1, 4]])
    nothing, row = seen.select(ids > 9).by_point()
    assert len(nothing.ids) == len(row) == 0 and nothing.descriptors[0].shape == (0, 4)


def localized_row(scene: Scene, town: Map) -> tuple[int, Tensor, dict[int, float]]:
    """The middle reference of a place, the other rows, and the largest angle (degrees) between the others' rays to
    each point that it observes; 0 where one other observes it, -1 where none does.
    """
    row = next(row for row, name in enumerate(town.names) if name.endswith("250000.jpg"))
    others = [r for r in range(len(town.names)) if r != row]
    angles = {}
    for point in scene.images[town.names[row]].point_ids.tolist():
        seen_by = [r for r in others if point in scene.images[town.names[r]].point_ids]
        rays = nn.functional.normalize(scene.points[point] - town.poses.center()[seen_by], dim=-1)
        angles[point] = (rays @ rays.T).min().clamp(-1, 1).arccos().rad2deg().item() if seen_by else -1
    return row, torch.tensor(others), angles


def test_points_that_a_query_saw_are_triangulated_without_it(scene, town):
    row, others, angles = localized_row(scene, town)
    before, found = town.observations(others), town.observations(others, excluded=row)
    point = dict(zip(before.ids.tolist(), before.points, strict=True))
    missing = set(before.ids.tolist()) - set(found.ids.tolist())
    assert missing == {i for i in point if angles.get(i, 90) < MIN_ANGLE}
    assert any(angles[i] == 0 for i in missing) and any(angles.get(i, 0) > MIN_ANGLE for i in point)
    saw = torch.tensor([i in angles for i in found.ids.tolist()])
    kept = torch.tensor([i not in missing for i in before.ids.tolist()])
    old = before.points[kept]
    assert saw.any() and torch.equal(found.points[~saw], old[~saw])
    # Keypoints and poses are exact but for the digits of the file, which a ray stretches to millimetres at most.
    moved = (found.points - old)[saw].norm(dim=-1)
    assert 0 < moved.max() < 5e-3 and moved.median() < 1e-4
    for name in ("keypoints", "reference"):  # all else of an observation stays with it
        assert torch.equal(getattr(found, name), getattr(before, name)[kept])


def test_a_point_does_not_feel_the_querys_own_keypoint(scene, town, tmp_path):
    """Points that were triangulated with a wrong keypoint of the query are right again without it."""
    row, others, angles = localized_row(scene, town)
    shift = torch.tensor([0.0, 0.05, 0.0], dtype=torch.float64)
    points, query = scene.points.clone(), scene.images[town.names[row]]
    points[query.point_ids] += shift
    wrong = {**scene.images, query.name: replace(query, keypoints=query.keypoints + 3.0)}
    noisy = compiled(tmp_path / "map", replace(scene, images=wrong, points=points, pairs=()), small_unet(), points=500)
    found = noisy.observations(others, excluded=row)
    seen = torch.tensor([angles.get(i, 0) > MIN_ANGLE for i in found.ids.tolist()])
    assert seen.any() and (found.points - scene.points[found.ids])[seen].norm(dim=-1).max() < 5e-3
    for one, other in zip(found[:3], town.observations(others, excluded=row)[:3], strict=True):
        torch.testing.assert_close(one[seen], other[seen])


@pytest.mark.slow
def test_detections_take_the_depth_of_the_point_that_is_triangulated_anew(scene, tmp_path):
    features = LocalFeatures("sift", count=300)
    clean = compiled(tmp_path / "clean", scene, small_unet(), points=300, local_features=features)
    row, others, angles = localized_row(scene, clean)
    ids = scene.images[clean.names[row]].point_ids
    points = scene.points.clone()
    points[ids] += 0.02 * (points[ids] - clean.poses[row].center())  # along the query's rays
    noisy = compiled(
        tmp_path / "noisy", replace(scene, points=points, pairs=()), small_unet(), points=300, local_features=features
    )
    before, found = noisy.observations(others), noisy.observations(others, excluded=row)
    for observations, most in ((before, np.inf), (found, 5e-3)):
        seen = torch.tensor([angles.get(i, 0) > MIN_ANGLE for i in observations.ids.tolist()])
        depth, true = (
            noisy.poses[observations.reference].transform(p[:, None])[seen, 0, 2]
            for p in (observations.points, scene.points[observations.ids])
        )
        assert seen.any() and (depth - true).abs().max() < most
        assert most < np.inf or (depth - true).abs().median() > 0.05
    xy, _ = noisy.cameras[found.reference].project(noisy.poses[found.reference].transform(found.points[:, None]))
    torch.testing.assert_close(xy.squeeze(1).float(), found.keypoints, atol=1e-3, rtol=0)  # on its own ray


def test_without_keypoints_points_stay_as_they_are(scene, tmp_path):
    blind = moved(scene, keypoints=lambda i: None)
    found = compiled(tmp_path / "map", blind, small_unet(), points=50)
    others = torch.arange(1, len(found.names))
    assert torch.equal(found.observations(others, excluded=0).points, found.observations(others).points)


def test_largest_side_is_that_of_keypoints_and_descriptors(scene, tmp_path):
    network = Counting(small_unet())
    found = compiled(tmp_path / "small", scene, network, points=50, largest_side=60)
    assert set(network._calls) == {(1, 3, 60, 60)} and found.largest_side == 60
    assert found.image_sizes.tolist() == [[60, 60]] * len(found.names)
    observations = found.observations(torch.tensor([0]))
    reference = scene.images[found.names[0]]
    image, factors = limit_size(read_image(reference.path), 60)
    keypoints, _ = reference.camera.project(reference.cam_from_world.transform(observations.points))
    torch.testing.assert_close(observations.keypoints, (keypoints * torch.from_numpy(factors)).float())
    with torch.no_grad():
        descriptors, _ = sample_descriptors(network(image[None]), observations.keypoints[None])
    torch.testing.assert_close(observations.descriptors[1], descriptors[1][0], atol=1e-3, rtol=1e-3)
    assert torch.equal(found.cameras[0].size, reference.camera.size)  # as the image is on disk


def test_it_goes_on_where_it_was_interrupted_and_ends_the_same(scene, town, tmp_path):
    whole = Counting(small_unet())
    compiled(tmp_path / "whole", scene, whole, points=500)
    assert len(whole._calls) == 9
    path = tmp_path / "in parts"
    for fails_at, done in ((4, 3), (1, 3), (3, 5)):
        with pytest.raises(KeyboardInterrupt):
            compiled(path, scene, Counting(small_unet(), fails_at=fails_at), points=500)
        assert ArrayFile(path)["done"].sum() == done
        with pytest.raises(ValueError, match=r"in parts was not compiled to its end"):
            Map.open(path)
    rest = Counting(small_unet())
    compiled(path, scene, rest, points=500)
    assert len(rest._calls) == 9 - 5
    assert contents(path) == contents(tmp_path / "whole")
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    again = Counting(small_unet())
    compiled(path, scene, again, points=500)
    assert len(again._calls) == 0


@pytest.mark.slow
def test_several_processes_write_what_one_writes(scene, own_photographs, town, tmp_path, caplog):
    found = compiled(tmp_path / "two", scene, small_unet(), points=500, device=devices_of("cpu", 2))
    assert found.path.read_bytes() == town.path.read_bytes()
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    compiled(tmp_path / "broken", own_photographs, small_unet(), device=devices_of("cpu", 2), on_bad="skip")
    assert "left out of the map: 1 problems" in caplog.text
    compiled(tmp_path / "one", own_photographs, small_unet(), on_bad="skip")
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "one").read_bytes()


KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[3])
from test_map import Counting, compiled, small_unet
from gnnet.scenes.layouts.robotcar import load_robotcar
torch.set_num_threads(int(sys.argv[4]))
network = Counting(small_unet())
images = network.forward
def forward(x):
    if len(network._calls) == int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)
    if len(sys.argv) > 6:  # so many jobs begin together
        Path(sys.argv[1]).with_suffix(f".{os.getpid()}.begun").touch()
        while len(list(Path(sys.argv[1]).parent.glob("*.begun"))) < int(sys.argv[6]):
            time.sleep(0.01)
    return images(x)
network.forward = forward
compiled(Path(sys.argv[1]), load_robotcar(sys.argv[2], progress=False), network, points=500)
"""


def test_two_that_compile_one_map_share_its_references(scene, town, tmp_path):
    """No reference is described twice, and both wait for the other's."""
    path, jobs = tmp_path / "x.gnmap", []
    first, second = Counting(small_unet()), Counting(small_unet())
    describe = first.forward

    def joined(images):
        if len(first._calls) == 2:
            jobs.append(pool.submit(compiled, path, scene, second, points=500))
        time.sleep(0.02)
        return describe(images)

    first.forward = joined
    with ThreadPoolExecutor() as pool:
        compiled(path, scene, first, points=500)
        assert jobs[0].result().path == path
    assert len(first._calls) + len(second._calls) == 9 and len(first._calls) >= 3
    assert contents(path) == contents(town.path)


def test_a_reference_is_left_to_others_when_a_process_fails(scene, town, tmp_path):
    path, first = tmp_path / "x.gnmap", Counting(small_unet(), fails_at=3)
    with pytest.raises(KeyboardInterrupt):
        compiled(path, scene, first, points=500)
    with ThreadPoolExecutor() as pool:  # the locks of this thread would not hinder itself
        assert pool.submit(compiled, path, scene, Counting(small_unet()), points=500).result(60).path == path
    assert contents(path) == contents(town.path)


@pytest.mark.slow
def test_jobs_that_are_started_apart_compile_one_map(scene, toy_root, town, tmp_path):
    """One of three is killed at its second reference and started anew."""
    path = tmp_path / "x.gnmap"

    def start(kill_at: int) -> subprocess.Popen:
        command = [sys.executable, "-c", KILLED, str(path), str(toy_root), str(Path(__file__).parent)]
        return subprocess.Popen([*command, str(torch.get_num_threads()), str(kill_at), "3"])

    killed, *others = start(1), start(9), start(9)
    assert killed.wait(120) == -signal.SIGKILL
    statuses = [job.wait(120) for job in (start(9), *others)]
    assert statuses == [0, 0, 0]
    assert contents(path) == contents(town.path)


@pytest.mark.slow
def test_a_killed_process_leaves_what_can_be_gone_on_with(scene, toy_root, tmp_path):
    path = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(path), str(toy_root), str(Path(__file__).parent)]
    command += [str(torch.get_num_threads()), "5"]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert ArrayFile(path)["done"].sum() == 5
    rest = Counting(small_unet())
    compiled(path, scene, rest, points=500)
    assert len(rest._calls) == 4
    compiled(tmp_path / "whole", scene, Counting(small_unet()), points=500)
    found, whole = ArrayFile(path), ArrayFile(tmp_path / "whole")
    for name in found.arrays:  # another process may round another way
        loose = 2e-3 if name.startswith(("descriptors", "global/raw")) else 0.1 if "whi" in name or "glo" in name else 0
        np.testing.assert_allclose(found[name], whole[name], atol=loose, rtol=loose)


def moved(scene: Scene, **changes) -> Scene:
    images = {name: replace(i, **{k: change(i) for k, change in changes.items()}) for name, i in scene.images.items()}
    return replace(scene, images=images, pairs=())


def test_what_was_made_of_something_else_is_refused(scene, town, monkeypatch):
    before = town.path.read_bytes()

    def refused(what: str, scene=scene, network=None, **settings):
        with pytest.raises(ValueError, match=rf"town\.gnmap was made of something else: {what} .* instead of"):
            compiled(town.path, scene, network or small_unet(), **{"points": 500, **settings})

    refused("network", network=small_unet(seed=1))
    refused("network", network=small_unet(normalize=False))  # of the same weights
    refused("points", points=400)
    refused("largest_side", largest_side=64)
    refused("seed", seed=1)
    refused("dimensions", dimensions=3)
    refused("retrieval", retrieval_network=nn.Sequential(Resized(), nn.Flatten()))
    refused("scene", scene=replace(scene, points=scene.points * 1.01, pairs=()))
    refused(
        "scene",
        scene=moved(scene, cam_from_world=lambda i: Pose(i.cam_from_world.rotation, i.cam_from_world.translation + 1)),
    )
    refused("scene", scene=scene.with_places(scene.places[:2]))
    refused("local features", local_features=LocalFeatures("sift"), network=small_unet())
    monkeypatch.setattr("gnnet.localization.compile.VERSION", 1)
    refused("version")
    assert town.path.read_bytes() == before
    empty = moved(scene, is_reference=lambda i: False)
    with pytest.raises(ValueError, match="no reference with pose"):
        compiled(town.path.with_name("other"), empty, small_unet())
    assert not town.path.with_name("other").exists()


def test_other_files_are_no_maps(tmp_path, scene):
    path = tmp_path / "other"
    with pytest.raises(FileNotFoundError):
        Map.open(path)
    ArrayFile.create(path, {"finished": ("u1", (1,)), "done": ("u1", (3,))}, {"names": ["a"]}).close()
    for act in (Map.open, lambda path: compiled(path, scene, small_unet())):
        with pytest.raises(ValueError, match="other holds other arrays than a map"):
            act(path)
        path.write_bytes(b"pictures" * 1000)
        with pytest.raises(ValueError, match="other is no map or index"):
            act(path)
        ArrayFile.create(path, {"done": ("u1", (3,))}, {}).close()


def test_covisible_counts_are_those_of_sets(scene, town):
    point_ids = [scene.images[name].point_ids for name in town.names]
    sets = [set(ids.tolist()) for ids in point_ids]
    common = np.array([[len(a & b) for b in sets] for a in sets])
    np.fill_diagonal(common, 0)
    assert common.any()
    rows = torch.tensor([5, 0, 3, 4, 8])
    np.testing.assert_array_equal(town.shared(rows).numpy(), common[rows][:, rows])
    counts = np.zeros_like(common)
    for row, (others, shared) in enumerate(shared_points(point_ids)):
        counts[row, others] = shared
    np.testing.assert_array_equal(counts, common)


def test_points_that_are_observed_twice_count_once_and_few_neighbours_are_kept(tmp_path):
    generator = np.random.default_rng(0)
    scene = synthetic_scene(tmp_path, 50, observe=lambda row: generator.integers(0, 60, 80))
    found = compiled(tmp_path / "map", scene, Flat(), points=100)
    sets = [set(i.point_ids.tolist()) for i in scene.images.values()]
    common = torch.tensor([[0 if a is b else len(a & b) for b in sets] for a in sets])
    shared = found.shared(torch.arange(50))
    least = torch.minimum(*(common.sort(dim, descending=True).values.select(dim, 31).unsqueeze(dim) for dim in (0, 1)))
    known = shared > 0
    assert torch.equal(shared[known], common[known]) and torch.equal(shared, shared.T)
    assert (known | (common <= least)).all() and not known.all()  # what is left out is no more than what is kept


def test_cameras_that_look_at_one_wall_are_covisible_by_its_depth(tmp_path):
    folder = tmp_path / "walk"
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True)
    poses = []
    for number, (x, turned) in enumerate([(0, 0), (0.2, 0), (0.4, 0), (0.2, np.pi), (30, 0)]):
        Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(folder / f"images/{number:05d}.jpg")
        Image.fromarray(np.full((48, 64), 2000, np.uint16)).save(folder / f"depth/{number:05d}.png")
        matrix = np.eye(4)
        matrix[:3, :3], matrix[0, 3] = Rotation.from_rotvec([0, turned, 0]).as_matrix(), x
        poses.append(matrix.ravel())
    np.savetxt(folder / "K.txt", [[50.0, 0, 31.5], [0, 50, 23.5], [0, 0, 1]])
    np.savetxt(folder / "poses.txt", poses)
    scene = load_rgbd(folder, gaps=(1,), places=1, progress=False)
    found = compiled(tmp_path / "map", scene, Flat(), points=300)
    observations = found.observations(torch.arange(5))
    assert (observations.ids == -1).all()
    assert (observations.points[observations.reference == 0][:, 2] - 2).abs().max() < 1e-3
    shared = found.shared(torch.arange(5))
    assert (shared[:3, :3].fill_diagonal_(1) > 0).all() and (shared[3:] == 0).all()
    assert shared[0, 1] > shared[0, 2]
    # Of a wall 2 m off a camera 0.4 m aside sees the share that 10 of 64 pixels leave.
    points = [observations.points[observations.reference == row] for row in range(5)]
    covisible = partial(covisible_by_depth, found.poses, found.cameras, candidates=8, points_of=points.__getitem__)
    counts = {
        row: dict(zip(near.tolist(), seen.tolist(), strict=True))
        for row, (near, seen) in enumerate(covisible(places=found.places))
    }
    assert counts[0][2] / -(-300 // (300 // 128)) == pytest.approx(54 / 64, abs=0.08)
    places = ["elsewhere" if row == 1 else place for row, place in enumerate(found.places)]
    assert 1 not in next(covisible(places=places))[0]


@pytest.mark.slow
def test_detections_may_outnumber_the_points_of_a_reference(scene, tmp_path):
    """Several lie near one point; each reference's rows stay its own."""
    features = LocalFeatures("sift", count=300)

    def most_detected(i: SceneImage) -> np.ndarray:
        projected, _ = i.camera.project(i.cam_from_world.transform(scene.points[i.point_ids]))
        near = torch.cdist(projected, features.detect(read_image(i.path)).keypoints.double()) < 2.5
        return i.point_ids[near.sum(1).argsort(descending=True)[:4]]

    few = {
        name: replace(i, point_ids=most_detected(i), keypoints=None) if i.is_reference else i
        for name, i in scene.images.items()
    }
    scene = replace(scene, images=few, pairs=())
    found = compiled(tmp_path / "map", scene, small_unet(), points=300, local_features=features)
    outnumbered = 0
    for row, name in enumerate(found.names):
        reference = scene.images[name]
        observations = found.observations(torch.tensor([row]))
        outnumbered += len(observations.points) > len(reference.point_ids)
        assert set(observations.ids.tolist()) <= set(reference.point_ids.tolist())
        keypoints, _ = reference.camera.project(reference.cam_from_world.transform(observations.points))
        torch.testing.assert_close(keypoints.float(), observations.keypoints, atol=1e-3, rtol=0)
        detected = features.detect(read_image(reference.path))
        described = (observations.keypoints, observations.descriptors[0]), (detected.keypoints, detected.descriptors)
        both = [torch.cat(parts, 1) for parts in described]
        assert torch.cdist(*both, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() < 0.01
        depth = reference.cam_from_world.transform(observations.points)[:, 2]
        own = reference.cam_from_world.transform(scene.points[observations.ids])
        torch.testing.assert_close(depth, own[:, 2])
        assert (reference.camera.project(own)[0] - keypoints).norm(dim=-1).max() <= 3
    assert outnumbered > 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_references_are_a_map_too(scene, tmp_path, count):
    names = sorted(name for name, i in scene.images.items() if i.is_reference)[:count]
    few = replace(scene, images={name: scene.images[name] for name in names}, pairs=())
    network = nn.Sequential(Resized(), nn.Flatten(), nn.Linear(192, 5000))
    found = compiled(tmp_path / "map", few, small_unet(), points=20, retrieval_network=network)
    assert found.global_descriptors.shape == (count, 256 if count < 3 else 2)
    assert found.path.stat().st_size < 10e6


class Resized(nn.Module):
    def forward(self, images):
        return nn.functional.interpolate(images.float() / 255, size=(8, 8))


class Flat(nn.Module):
    """Maps of 32 channels without any work."""

    strides, channels = (8,), (32,)

    def __init__(self, watch=lambda: None) -> None:
        super().__init__()
        self._watch = watch

    def forward(self, images):
        self._watch()
        pooled = nn.functional.avg_pool2d(images.float() / 255, 8, ceil_mode=True)
        return FeaturePyramid((pooled.repeat(1, 11, 1, 1)[:, :32],), self.strides)


def synthetic_scene(folder: Path, count: int, *, observe) -> Scene:
    """References in a row that share one image file; points on a wall before them."""
    path = folder / "all.png"
    if not path.exists():
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    camera = Camera.from_colmap("PINHOLE", 64, 64, (60.0, 60.0, 32.0, 32.0), dtype=torch.float64)
    images = {}
    for row in range(count):
        pose = Pose(torch.eye(3, dtype=torch.float64), torch.tensor([-0.01 * row, 0, 0], dtype=torch.float64))
        name = f"{row:04d}.png"
        images[name] = SceneImage(
            name, path, "reference", "wall", camera, pose, is_reference=True, point_ids=observe(row)
        )
    points = np.random.default_rng(1).uniform((-1, -1, 3), (1, 1, 5), (4000, 3))
    return Scene("wall", images, [], points=torch.from_numpy(points))


def test_a_map_holds_cameras_of_several_models(tmp_path):
    scene = synthetic_scene(tmp_path, 3, observe=lambda row: np.arange(100))
    fisheye = Camera.from_colmap("OPENCV_FISHEYE", 64, 64, (60, 60, 32, 32, 0.1, 0, 0, 0), dtype=torch.float64)
    images = dict(scene.images)
    images["0001.png"] = replace(images["0001.png"], camera=fisheye)
    expected = [image.camera.to_colmap() for image in images.values()]
    scene = Scene("wall", images, [], points=scene.points)
    found = compiled(tmp_path / "wall.gnmap", scene, Flat(), points=100)
    assert [found.cameras[row].to_colmap() for row in range(3)] == expected
    again = Map.open(found.path)
    assert torch.equal(again.cameras.parameters, found.cameras.parameters)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_references(tmp_path):
    """150 references hold 47 MB of descriptors and points; 20 references need about the same memory.

    But for 20 bytes an observation, of which covisibility is reckoned at the end.
    """
    ids = np.arange(3000)
    peaks, resident = {}, []
    for count in (20, 150):
        scene = synthetic_scene(tmp_path, count, observe=lambda row: ids)
        resident.clear()
        network = Flat(watch=lambda: resident.append(anonymous_bytes()))
        gc.collect()
        tracemalloc.start()
        found = compiled(tmp_path / str(count), scene, network, points=3000)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found.path.stat().st_size > 45e6
    assert resident[-1] - resident[20] < 15e6  # torch's too
    assert peaks[150] - peaks[20] < 24 * 130 * 3000


def test_references_are_looked_up_one_by_one(tmp_path):
    """A list of them, each with its tensors, was most of what compiling a map of many references held."""
    scene = synthetic_scene(tmp_path, 500, observe=lambda row: np.arange(4))
    tracemalloc.start()
    references = references_of(scene)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(references) == 500 and held < 500 * 200


@pytest.fixture
def own_photographs(scene, tmp_path) -> Scene:
    """Three references whose files are this test's own."""
    names = [i.name for i in scene.images.values() if i.is_reference][:3]
    images = {n: replace(scene.images[n], path=tmp_path / f"{i}.png") for i, n in enumerate(names)}
    for number, name in enumerate(names):
        Image.open(scene.images[name].path).convert("RGB").save(tmp_path / f"{number}.png")
    return Scene("own", images, (), scene.points)


@pytest.mark.cases
def test_a_map_of_other_photographs_of_the_same_names_is_refused(own_photographs, tmp_path):
    make = partial(compiled, tmp_path / "m.gnmap", own_photographs, small_unet(), points=20)
    make()
    content = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(content)  # another time of change
    make()
    Image.new("RGB", (96, 96), (120, 120, 120)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"m\.gnmap was made of something else: images .* instead of .*delete it"):
        make()


@pytest.mark.cases
def test_a_reference_that_cannot_be_read_is_left_out_of_the_map_where_it_may(own_photographs, tmp_path, caplog):
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[: len(content) // 2] + content[-12:])
    with pytest.raises(ValueError, match=r"1\.png"):
        compiled(tmp_path / "a.gnmap", own_photographs, small_unet())
    map = compiled(tmp_path / "b.gnmap", own_photographs, small_unet(), on_bad="skip")
    row = map.rows[next(n for n, i in own_photographs.images.items() if i.path.name == "1.png")]
    others = [r for r in range(3) if r != row]
    assert "left out of the map: 1 problems" in caplog.text and len(map.observations(torch.tensor([row])).points) == 0
    assert len(map.observations(torch.tensor(others)).points) > 0
    assert np.isnan(map.global_descriptors[row]).all() and np.isfinite(map.global_descriptors[others]).all()
