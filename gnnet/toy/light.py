"""Light on the toy town: all painted faces of a street in one texture atlas, lit once for each condition.

Everything that does not depend on the viewer is computed here: light of the sky, sun with cast shadows, lamps,
snow and wetness. Colours are linear RGB, positions in metres in the place's frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gnnet.toy.camera import occluded
from gnnet.toy.canvas import ALBEDO, CHANNELS, GLASS, GLOW, LEDGE, SLOPE, fractal_noise
from gnnet.toy.streets import Street, Triple
from gnnet.toy.textures import paint_face

LEVELS = 6  # mip levels
TILE = 2 ** (LEVELS - 1)  # the sides of a face's tile are multiples of this, so that every mip level has whole texels
ATLAS_WIDTH = 2048  # texels
LIGHT_STEP = 4  # texels between two samples of the light
SKY_DIRECTIONS = 10  # directions in which the visibility of the sky is tested
TEXEL_ANGLE = 1 / 210  # radians; no texel looks smaller than this from the nearest position of the camera


@dataclass(frozen=True)
class Weather:
    """Light and air of one condition; colours are linear RGB.

    Args:
        ambient, sun, lamps: light of the sky, the sun and each lamp.
        sky_low, sky_high: colour of the sky at the horizon, which is that of haze too, and at the zenith.
        clouds: contrast of the clouds.
        glow: brightness of lit windows and signs.
        haze: attenuation for each metre.
        snow, wet: whether snow lies, and whether the ground is wet.
        exposure, saturation: of the camera; 1 changes nothing.
        noise: std of the sensor's noise, where white is 1.
        blur: std of the lens blur, in pixels of a 256-pixel image.
    """

    ambient: Triple
    sky_low: Triple
    sky_high: Triple
    sun: Triple = (0.0, 0.0, 0.0)
    lamps: Triple = (0.0, 0.0, 0.0)
    clouds: float = 0.2
    glow: float = 0.0
    haze: float = 0.002
    snow: bool = False
    wet: bool = False
    exposure: float = 1.0
    saturation: float = 1.0
    noise: float = 0.006
    blur: float = 0.0


WEATHERS = {
    "overcast-reference": Weather(
        ambient=(1.0, 1.02, 1.06), sky_low=(0.95, 0.97, 1.0), sky_high=(0.6, 0.64, 0.7), exposure=1.5,
    ),
    "sun": Weather(
        ambient=(0.2, 0.26, 0.4), sun=(2.5, 1.95, 1.2), sky_low=(0.75, 0.85, 1.0), sky_high=(0.12, 0.28, 0.7),
        clouds=0.5, exposure=1.15, haze=0.001,
    ),
    "night": Weather(
        ambient=(0.006, 0.008, 0.016), lamps=(2.5, 1.5, 0.6), sky_low=(0.02, 0.015, 0.012),
        sky_high=(0.002, 0.003, 0.008), glow=0.7, exposure=1.5, noise=0.035, blur=0.4, saturation=0.85,
    ),
    "snow": Weather(
        ambient=(0.98, 1.04, 1.14), sky_low=(0.9, 0.93, 0.97), sky_high=(0.82, 0.86, 0.92), snow=True, haze=0.02,
        clouds=0.05, exposure=1.35, saturation=0.8, noise=0.012,
    ),
    "rain": Weather(
        ambient=(0.5, 0.53, 0.58), sky_low=(0.62, 0.65, 0.68), sky_high=(0.34, 0.37, 0.41),
        wet=True, haze=0.009, glow=0.25, exposure=1.9, saturation=0.5, noise=0.02, blur=0.55,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PaintedStreet:
    """A street with the atlas of its painted faces.

    Args:
        street: the street.
        bounds: (K, 2, 3) float32 corners of the boxes.
        paint: (CHANNELS, H, W) atlas of the painted faces.
        up: (H, W) float, 1 where the face looks up, else 0.
        face_of: (K, 6) row of `faces` for each box and direction 2·axis + (1 if the face looks along +axis).
        faces: (F, 7) column, row, width and height of the tile in texels; smallest u, smallest v and side of a
            texel in metres.
        positions: (3, M) where the light is sampled.
        normals: (3, M) unit normals of the faces there.
        cells: (M,) flat indices of the samples in an atlas of one cell for LIGHT_STEP² texels.
        open_sky: (M,) share of the sky that is visible from each sample, weighted by the cosine.
    """

    street: Street
    bounds: Tensor
    paint: Tensor
    up: Tensor
    face_of: Tensor
    faces: Tensor
    positions: Tensor
    normals: Tensor
    cells: Tensor
    open_sky: Tensor


@dataclass(frozen=True)
class LitStreet:
    """A painted street in one condition.

    Args:
        painted, weather: the street and the condition.
        texels: (T, 4) linear RGB and gloss of all mip levels of the atlas, row by row.
        widths: (LEVELS,) width of each level in texels.
        starts: (LEVELS,) position in `texels` of each level's first texel.
        sky: (3, H, W) panorama, see `_sky`.
    """

    painted: PaintedStreet
    weather: Weather
    texels: Tensor
    widths: Tensor
    starts: Tensor
    sky: Tensor


def paint_street(street: Street, rng: np.random.Generator, *, coarseness: float = 1.0) -> PaintedStreet:
    """Paint every face that the camera may see, and compute how much of the sky is visible from it.

    Args:
        street: the street.
        rng: source of all random draws.
        coarseness: factor of the side of a texel; 1 suits images of 256 pixels.
    """
    wanted = [
        (k, axis, positive)
        for k, box in enumerate(street.boxes)
        for axis in range(3)
        for positive in (0, 1)
        if _may_be_seen(box.low, box.high, axis, positive)
    ]
    layers = [torch.zeros(CHANNELS, TILE, TILE)]
    rows = [(0.0, 0.0, 0.03)]
    for k, axis, _ in wanted:
        box = street.boxes[k]
        low, high = box.low, box.high
        u_axis = 1 if axis == 0 else 0
        width, height = high[u_axis] - low[u_axis], (high[1] - low[1]) if axis == 2 else high[2] - low[2]
        texel = coarseness * max(box.texel, _nearest_view(low, high) * TEXEL_ANGLE)
        texel = max(texel, width / (ATLAS_WIDTH - 2 * TILE))  # for large images: a long face must still fit
        painted = paint_face(box.material, box.color, width=width, height=height, texel=texel, axis=axis, rng=rng)
        pad = [-s % TILE for s in painted.shape[1:]]
        layers.append(torch.from_numpy(np.pad(painted, ((0, 0), (0, pad[0]), (0, pad[1])), mode="edge")))
        rows.append((low[u_axis], low[1] if axis == 2 else -high[2], texel))
    corners, height = _pack([(layer.shape[1], layer.shape[2]) for layer in layers])
    paint = torch.zeros(CHANNELS, height, ATLAS_WIDTH)
    up = torch.zeros(height, ATLAS_WIDTH)
    face_of = torch.zeros(len(street.boxes), 6, dtype=torch.long)
    faces = torch.zeros(len(layers), 7)
    for f, (layer, (top, left), row) in enumerate(zip(layers, corners, rows, strict=True)):
        h, w = layer.shape[1:]
        paint[:, top : top + h, left : left + w] = layer
        faces[f] = torch.tensor([left, top, w, h, *row])
        if f > 0:
            k, axis, positive = wanted[f - 1]
            face_of[k, 2 * axis + positive] = f
            if axis == 2 and positive:
                up[top : top + h, left : left + w] = 1
    bounds = street.bounds(torch.float32)
    positions, normals, cells = _light_samples(wanted, bounds, faces)
    open_sky = _open_sky(bounds, positions, normals)
    return PaintedStreet(street, bounds, paint, up, face_of, faces, positions, normals, cells, open_sky)


def _may_be_seen(low: Triple, high: Triple, axis: int, positive: int) -> bool:
    """Whether the camera, or its mirror image in wet ground, may be on the side to which a face looks."""
    camera_low, camera_high = (13.0, -1.0, 1.4), (40.0, 1.0, 1.9)
    return camera_high[axis] > high[axis] if positive else camera_low[axis] < low[axis]


def _nearest_view(low: Triple, high: Triple) -> float:
    """Lower bound of the depth in metres at which the camera, which looks along -x, sees any part of a box."""
    beside = max(low[1] - 1.0, -1.0 - high[1], 0.0)
    return max(14.0 - high[0], beside / 0.9)


def _pack(shapes: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], int]:
    """Place tiles (height, width) in rows, tallest first: their corners (top, left) and the height of the atlas."""
    corners = [(0, 0)] * len(shapes)
    top = left = shelf = 0
    for i in sorted(range(len(shapes)), key=lambda i: -shapes[i][0]):
        height, width = shapes[i]
        if left + width > ATLAS_WIDTH:
            top, left, shelf = top + shelf, 0, 0
        corners[i] = (top, left)
        left, shelf = left + width, max(shelf, height)
    return corners, top + shelf


def _light_samples(wanted: list[tuple[int, int, int]], bounds: Tensor, faces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`positions`, `normals` and `cells` of `PaintedStreet`; faces are given by box, axis and positive direction."""
    positions, normals, cells = [], [], []
    for (k, axis, positive), face in zip(wanted, faces[1:].tolist(), strict=True):
        left, top, width, height, first_u, first_v, texel = face
        columns, rows = int(width) // LIGHT_STEP, int(height) // LIGHT_STEP
        u = first_u + (torch.arange(columns) + 0.5) * LIGHT_STEP * texel
        v = first_v + (torch.arange(rows) + 0.5) * LIGHT_STEP * texel
        v, u = torch.meshgrid(v, u, indexing="ij")
        point = torch.zeros(3, rows, columns)
        point[axis] = bounds[k, positive, axis] + (0.02 if positive else -0.02)
        point[1 if axis == 0 else 0] = u
        point[1 if axis == 2 else 2] = v if axis == 2 else -v
        for other in {0, 1, 2} - {axis}:  # the padding gets the light of the face's edge
            point[other] = point[other].clamp(bounds[k, 0, other] + 0.01, bounds[k, 1, other] - 0.01)
        normal = torch.zeros(3, rows * columns)
        normal[axis] = 1.0 if positive else -1.0
        row = int(top) // LIGHT_STEP + torch.arange(rows)
        column = int(left) // LIGHT_STEP + torch.arange(columns)
        positions.append(point.flatten(1))
        normals.append(normal)
        cells.append((row[:, None] * (ATLAS_WIDTH // LIGHT_STEP) + column).flatten())
    return torch.cat(positions, 1), torch.cat(normals, 1), torch.cat(cells)


def _open_sky(bounds: Tensor, positions: Tensor, normals: Tensor) -> Tensor:
    """`open_sky` of `PaintedStreet`."""
    # Directions spread evenly over the upper half sphere, on a golden spiral.
    i = torch.arange(SKY_DIRECTIONS) + 0.5
    z, angle = 1 - i / SKY_DIRECTIONS, i * math.pi * (3 - math.sqrt(5))
    radius = (1 - z * z).sqrt()
    total, seen = 0.0, torch.zeros(positions.shape[1])
    for direction in torch.stack([radius * angle.cos(), radius * angle.sin(), z], 1):
        cosine = (normals * direction[:, None]).sum(0)
        facing = (cosine > 0.02).nonzero().squeeze(1)
        free = ~occluded(bounds, positions[:, facing], direction[:, None], math.inf)
        seen[facing] += cosine[facing] * free
        total += float(direction[2])
    return seen / total


def light_street(painted: PaintedStreet, weather: Weather, rng: np.random.Generator) -> LitStreet:
    """Light a street, and cover it with snow or water, in one condition."""
    light = _light(painted, weather)  # [5, H, W]
    height, width = painted.up.shape
    cover = _snow_cover(painted, rng) if weather.snow else None
    grain = _atlas_noise(rng, height, coarsest=64 if weather.wet else 24)
    streaks = torch.from_numpy(fractal_noise(rng, (1, width), coarsest=16, finest=4)).sigmoid()
    shaded = torch.empty(4, height, width)
    for top in range(0, height, 64):  # in bands that fit in the processor's cache
        band = slice(top, top + 64)
        paint, up, lit = painted.paint[:, band], painted.up[band], light[:, band]
        albedo, slope, gloss = paint[ALBEDO], paint[SLOPE], torch.zeros_like(up)
        relief: Tensor | float = 1.0
        if cover is not None:
            albedo = albedo + cover[band] * ((0.8 + 0.05 * grain[band]) - albedo)
            relief = 1 - 0.8 * cover[band]
        if weather.wet:
            puddles = grain[band].sigmoid()
            albedo = albedo * (1 - up * (0.35 + 0.4 * puddles) - (1 - up) * 0.5 * streaks)
            gloss = up * (0.1 + 0.9 * puddles**2)
        shading = (1 + relief * (lit[3] * slope[0] + lit[4] * slope[1])).clamp(0.15, 2.5)
        sky = torch.tensor(weather.sky_low)[:, None, None]
        warm = torch.tensor([1.0, 0.68, 0.34])[:, None, None] * (0.35 + albedo.sqrt())
        shaded[:3, band] = (
            albedo * lit[:3] * shading + 0.17 * paint[GLASS] * (sky + 0.3 * lit[:3]) + weather.glow * paint[GLOW] * warm
        )
        shaded[3, band] = gloss
    return LitStreet(painted, weather, *_mip_levels(shaded), _sky(weather, rng))


def _atlas_noise(rng: np.random.Generator, height: int, *, coarsest: float) -> Tensor:
    """Noise (height, ATLAS_WIDTH) that repeats every 512 rows."""
    noise = torch.from_numpy(fractal_noise(rng, (512, ATLAS_WIDTH), coarsest=coarsest, finest=4))
    return noise.repeat(-(-height // 512), 1)[:height]


def _snow_cover(painted: PaintedStreet, rng: np.random.Generator) -> Tensor:
    """Share of each texel that snow covers (H, W): ground without wheel tracks, tops, ledges, and drifts on walls."""
    drifts = _atlas_noise(rng, len(painted.up), coarsest=64)
    cover = painted.up * (0.93 + 0.25 * drifts)
    road = next(k for k, box in enumerate(painted.street.boxes) if box.material in ("asphalt", "cobbles"))
    left, top, width, height, _, first_v, texel = painted.faces[painted.face_of[road, 5]].tolist()
    rows, columns = slice(int(top), int(top + height)), slice(int(left), int(left + width))
    y = first_v + (torch.arange(int(height)) + 0.5) * texel
    for lane in rng.uniform(-0.5, 0.5, 2):
        for wheel in (-0.75, 0.75):
            wander = torch.from_numpy(fractal_noise(rng, (1, int(width)), coarsest=300, finest=60)) * 0.08
            track = torch.exp(-(((y[:, None] - lane - wheel - wander) / 0.16) ** 4))
            cover[rows, columns] *= 1 - track * (0.75 + 0.3 * drifts[rows, columns]).clamp(0, 1)
    cover += (1 - painted.up) * ((drifts - 1.25) * 1.6).clamp(0, 0.9)  # blown against walls
    return torch.maximum(cover, 0.95 * painted.paint[LEDGE]).clamp(0, 1)


def _light(painted: PaintedStreet, weather: Weather) -> Tensor:
    """Light on each texel (5, H, W): irradiance RGB, and its relative change with the relief's slopes in u and v."""
    positions, normals, bounds = painted.positions, painted.normals, painted.bounds
    ambient = torch.tensor(weather.ambient)[:, None]
    irradiance = ambient * (0.12 + 0.95 * painted.open_sky)
    # The sky lights walls from above: where their relief faces up, they are brighter (v runs downwards).
    wall = 1 - normals[2].abs()
    brightness = ambient.mean() * painted.open_sky * wall
    tilt = torch.stack([torch.zeros_like(brightness), -0.7 * brightness])
    for direction, color, reach, chosen in _sources(painted.street, weather, positions):
        direction, normal = direction.expand(3, len(chosen)), normals[:, chosen]
        cosine = (normal * direction).sum(0)
        facing = (cosine > 0).nonzero().squeeze(1)
        chosen, direction, cosine, color = chosen[facing], direction[:, facing], cosine[facing], color[:, facing]
        free = ~occluded(bounds, positions[:, chosen], direction, reach[facing])
        color = color * free
        irradiance[:, chosen] += color * cosine
        along_x = normals[0, chosen].abs() > 0.5
        along_u = torch.where(along_x, direction[1], direction[0])
        along_v = torch.where(normals[2, chosen].abs() > 0.5, direction[1], -direction[2])
        tilt[:, chosen] -= color.mean(0) * torch.stack([along_u, along_v])
    tilt = tilt / irradiance.mean(0).clamp(min=1e-3)
    coarse = torch.zeros(5, painted.up.shape[0] // LIGHT_STEP * (ATLAS_WIDTH // LIGHT_STEP))
    coarse[:, painted.cells] = torch.cat([irradiance, tilt])
    coarse = coarse.view(1, 5, -1, ATLAS_WIDTH // LIGHT_STEP)
    light = torch.zeros(5, *painted.up.shape)
    for left, top, width, height in painted.faces[:, :4].int().tolist():
        s = LIGHT_STEP
        tile = coarse[:, :, top // s : (top + height) // s, left // s : (left + width) // s]
        fine = functional.interpolate(tile, scale_factor=s, mode="bilinear", align_corners=False)
        light[:, top : top + height, left : left + width] = fine[0]
    return light


def _sources(street: Street, weather: Weather, positions: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Sun and lamps, each with the samples that it may light.

    Yields:
        Unit directions (3, 1) or (3, N) to the source, colours (3, N), distances (N,) within which a box casts a
        shadow, and indices (N,) of the samples.
    """
    if max(weather.sun) > 0:
        everywhere = torch.arange(positions.shape[1])
        color = torch.tensor(weather.sun)[:, None].expand(3, len(everywhere))
        yield street.to_sun[:, None], color, torch.full(everywhere.shape, math.inf), everywhere
    if max(weather.lamps) > 0:
        for lamp in street.lamps:
            to_lamp = lamp[:, None] - positions
            distance = to_lamp.norm(dim=0)
            near = (distance < 12).nonzero().squeeze(1)
            distance = distance[near]
            direction = to_lamp[:, near] / distance
            fall = 7.0 / (1.0 + distance**2) * direction[2].clamp(min=0.05) ** 0.5
            yield direction, torch.tensor(weather.lamps)[:, None] * fall, distance - 0.05, near


def _mip_levels(atlas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`texels` (T, C), `widths` and `starts` of `LitStreet` for an atlas (C, H, W)."""
    rows, widths, starts, start = [], [], [], 0
    for level in range(LEVELS):
        if level > 0:
            atlas = functional.avg_pool2d(atlas[None], 2)[0]
        rows.append(atlas.flatten(1).T)
        widths.append(atlas.shape[2])
        starts.append(start)
        start += atlas.shape[1] * atlas.shape[2]
    return torch.cat(rows).contiguous(), torch.tensor(widths), torch.tensor(starts)


def _sky(weather: Weather, rng: np.random.Generator) -> Tensor:
    """Panorama (3, 128, 256): columns are azimuths from -90° to 90° about -x, rows elevations from 0° to 90°."""
    height = torch.linspace(0, 1, 128)[None, :, None] ** 0.6
    low, high = torch.tensor(weather.sky_low)[:, None, None], torch.tensor(weather.sky_high)[:, None, None]
    clouds = torch.from_numpy(fractal_noise(rng, (128, 256), coarsest=48, finest=2, persistence=0.6))
    sky = low + height * (high - low)
    if max(weather.sun) > 0:
        return sky + (clouds - 0.3).clamp(0, 1.2) * weather.clouds * (1 - sky)
    return sky * (1 + weather.clouds * clouds).clamp(min=0.2)
