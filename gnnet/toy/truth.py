"""Exact ground truth of the toy town: depth, 3D points with their observations, and correspondences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.toy.camera import pixel_centers, pixel_rays, rays_to_depth, trace
from gnnet.toy.streets import Street

POINT_CELL = 7.5  # pixels of a 256-pixel image; a cell of this side gets at most one new 3D point
MOST_OBSERVATIONS = 1000  # in one image
MATCH_CELL = 5.0  # pixels; a cell of this side gets at most one correspondence
MOST_MATCHES = 1500  # in one pair of images


class Observations(NamedTuple):
    """3D points and where images see them; arrays, because these pass between processes cheaply.

    Fields:
        points: (P, 3) float64 metres.
        rows: for each image, (K,) the rows of `points` that it sees.
        keypoints: for each image, (K, 2) the pixels where it sees them.
    """

    points: np.ndarray
    rows: list[np.ndarray]
    keypoints: list[np.ndarray]

    @classmethod
    def cat(cls, parts: Sequence[Observations]) -> Observations:
        """Points and images of several parts, which have none in common, one after another."""
        starts = np.cumsum([0, *(len(part.points) for part in parts)])
        rows = [rows + start for part, start in zip(parts, starts, strict=False) for rows in part.rows]
        points = np.concatenate([part.points for part in parts])
        return cls(points, rows, [keypoints for part in parts for keypoints in part.keypoints])

    def tracks(self) -> list[list[tuple[int, int]]]:
        """For each point, the images that see it and its positions in their keypoints."""
        tracks: list[list[tuple[int, int]]] = [[] for _ in range(len(self.points))]
        for image, rows in enumerate(self.rows):
            for position, row in enumerate(rows.tolist()):
                tracks[row].append((image, position))
        return tracks


class Spread(NamedTuple):
    """Pixels of an image with their 3D points.

    Fields:
        xy: (N, 2) pixels.
        depth: (N,) depths along the optical axis in metres.
        points: (N, 3) in the place's frame, metres.
    """

    xy: Tensor
    depth: Tensor
    points: Tensor


class Match(NamedTuple):
    """Correspondences of two images: pixels (N, 2) of each, and weights (N,) in (0, 1]."""

    xy_a: np.ndarray
    xy_b: np.ndarray
    weight: np.ndarray


def render_depth(street: Street, camera: Camera, camera_from_place: Pose) -> np.ndarray:
    """Depth along the optical axis at every pixel's centre, (H, W) float64 metres, 0 for sky."""
    width, height = (int(s) for s in camera.size)
    xy = pixel_centers(width, height)
    depth = _depth_at(street.bounds(torch.float64), camera, camera_from_place, xy.flatten(0, 1))
    return torch.where(depth.isinf(), 0.0, depth).view(height, width).numpy()


def observe_points(street: Street, camera: Camera, poses: Pose, images: list[np.ndarray]) -> Observations:
    """3D points, in the place's frame, at corners of the images (H, W, 3), and where each image sees them.

    Corners at depth edges are left out. An image adds points only where it does not see one yet.

    Args:
        poses: `camera_from_place` of each image.
    """
    bounds = street.bounds(torch.float64)
    points = torch.zeros(0, 3, dtype=torch.float64)
    for index, image in enumerate(images):
        pose = poses[index]
        xy, visible, _ = see_points(bounds, camera, pose, points)
        corners = _corners(image, taken=xy[visible].numpy(), cell=POINT_CELL * len(image) / 256)
        new = torch.from_numpy(corners)
        depth = _depth_at(bounds, camera, pose, new)
        keep = depth.isfinite() & _on_one_plane(bounds, camera, pose, new, depth)
        points = torch.cat([points, lift(camera, pose, new[keep], depth[keep])])
    # One order of preference for all images, so that a point is kept by all images that see it, or by none.
    rank = torch.from_numpy(np.random.default_rng(len(points)).permutation(len(points)))
    rows, keypoints = [], []
    for index in range(len(images)):
        xy, visible, _ = see_points(bounds, camera, poses[index], points)
        seen = visible.nonzero().squeeze(1)
        seen = seen[rank[seen].argsort()[:MOST_OBSERVATIONS]].sort().values
        rows.append(seen.numpy())
        keypoints.append(xy[seen].numpy())
    return Observations(points.numpy(), rows, keypoints)


def spread_points(street: Street, camera: Camera, camera_from_place: Pose, rng: np.random.Generator) -> Spread:
    """Random points spread evenly over a square image: one in each square of `MATCH_CELL` pixels, without sky."""
    width = int(camera.size[0])
    cells = int(width / MATCH_CELL)
    grid = np.stack(np.meshgrid(np.arange(cells), np.arange(cells)), -1).reshape(-1, 2)
    xy = torch.from_numpy((grid + rng.uniform(0, 1, grid.shape)) * (width / cells))
    xy = xy[((xy > 1) & (xy < width - 1)).all(-1)]
    depth = _depth_at(street.bounds(torch.float64), camera, camera_from_place, xy)
    xy, depth = xy[depth.isfinite()], depth[depth.isfinite()]
    return Spread(xy, depth, lift(camera, camera_from_place, xy, depth))


def match_image(
    street: Street, camera: Camera, spreads: list[Spread], camera_from_place: Pose, rng: np.random.Generator
) -> list[Match]:
    """Correspondences of each of the other images (a), whose points are `spreads`, with this image (b).

    The weight is exp(-d) with the change of scale d = |log(depth_a / depth_b)|.
    """
    bounds = street.bounds(torch.float64)
    xy_b, visible, depth_b = see_points(bounds, camera, camera_from_place, torch.cat([s.points for s in spreads]))
    weight = torch.exp(-(torch.cat([s.depth for s in spreads]) / depth_b.clamp(min=1e-3)).log().abs())
    matches, first = [], 0
    for spread in spreads:
        chosen = visible[first : first + len(spread.xy)].nonzero().squeeze(1).numpy()
        if len(chosen) > MOST_MATCHES:
            chosen = np.sort(rng.choice(chosen, MOST_MATCHES, replace=False))
        matches.append(Match(spread.xy[chosen].numpy(), xy_b[first + chosen].numpy(), weight[first + chosen].numpy()))
        first += len(spread.xy)
    return matches


def lift(camera: Camera, camera_from_place: Pose, xy: Tensor, depth: Tensor) -> Tensor:
    """Points (N, 3) in the place's frame that lie at pixels (N, 2) and depths (N,)."""
    return camera_from_place.inverse().transform(rays_to_depth(camera, xy) * depth[:, None])


def see_points(
    bounds: Tensor, camera: Camera, camera_from_place: Pose, points: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (N, 2) of points (N, 3), whether each is visible (N,), and their depths (N,).

    A point is visible if it is in the image and no box stands before it. Points are in the place's frame.
    """
    in_camera = camera_from_place.transform(points)
    xy, visible = camera.project(in_camera)
    depth = in_camera[:, 2]
    inside = visible.nonzero().squeeze(1)
    met = _depth_at(bounds, camera, camera_from_place, xy[inside])
    visible[inside] &= (met - depth[inside]).abs() < 1e-6 * depth[inside]
    return xy, visible, depth


def _depth_at(bounds: Tensor, camera: Camera, camera_from_place: Pose, xy: Tensor) -> Tensor:
    return trace(bounds, *pixel_rays(camera, camera_from_place, xy)).depth


def _on_one_plane(bounds: Tensor, camera: Camera, pose: Pose, xy: Tensor, depth: Tensor) -> Tensor:
    """Whether the surface within 1.5 pixels is one plane: on a plane inverse depth is linear in the pixel."""
    flat = torch.ones(len(xy), dtype=torch.bool)
    for step in 1.5 * torch.eye(2, dtype=xy.dtype):
        before, after = (1 / _depth_at(bounds, camera, pose, xy + sign * step) for sign in (-1, 1))
        flat &= (before + after - 2 / depth).abs() < 1e-6 / depth
    return flat


def _corners(image: np.ndarray, taken: np.ndarray, cell: float) -> np.ndarray:
    """Centres (N, 2) of the pixels with the strongest corner (Shi and Tomasi) of their cell.

    Args:
        image: (H, W, 3).
        taken: (M, 2) pixels of points; cells that hold one are left out.
        cell: side of a cell in pixels.
    """
    gray = torch.from_numpy(image).double().mean(-1)
    dy, dx = torch.gradient(gray)
    products = torch.stack([dx * dx, dy * dy, dx * dy])[None]
    xx, yy, xy = torch.nn.functional.avg_pool2d(products, 3, stride=1, padding=1)[0]
    strength = (xx + yy) / 2 - (((xx - yy) / 2) ** 2 + xy**2).sqrt()  # smaller eigenvalue
    strength[:4], strength[-4:], strength[:, :4], strength[:, -4:] = 0, 0, 0, 0
    height, width = gray.shape
    columns, rows = int(width / cell) + 1, int(height / cell) + 1
    y, x = np.divmod(np.arange(height * width), width)
    cells = ((y + 0.5) / cell).astype(int) * columns + ((x + 0.5) / cell).astype(int)
    occupied = np.zeros(rows * columns, bool)
    occupied[(taken[:, 1] / cell).astype(int) * columns + (taken[:, 0] / cell).astype(int)] = True
    flat = strength.flatten().numpy()
    order = np.lexsort((-flat, cells))
    first = order[np.unique(cells[order], return_index=True)[1]]
    first = first[(flat[first] > 4.0) & ~occupied[cells[first]]]
    return np.stack([x[first] + 0.5, y[first] + 0.5], -1)
