"""Images of the toy town: ray casting of a lit street, then haze, falling snow or rain, and the sensor.

Rays are in the place's frame, in metres; colours are linear RGB until `_expose`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.toy.camera import image_rays, trace, windows_in_image
from gnnet.toy.light import LEVELS, LitStreet, Weather


def render_frame(lit: LitStreet, camera: Camera, camera_from_place: Pose, rng: np.random.Generator) -> np.ndarray:
    """Render an image (H, W, 3) uint8 of the street, antialiased by two rays per pixel and by mip levels."""
    painted, weather = lit.painted, lit.weather
    origin, direction = image_rays(camera, camera_from_place)
    depth, box = trace(painted.bounds, origin, direction, windows_in_image(painted.bounds, camera, camera_from_place))
    spread = 1 / (float(camera.parameters[0]) * math.sqrt(2))
    # The two rays of a pixel round the mip level differently, so that their mean interpolates between two levels.
    dither = torch.tensor([0.25, 0.75]).repeat(depth.numel() // 2)
    seen = _appearance(lit, origin, direction.flatten(1), depth.flatten(), box.flatten().long(), spread, dither)
    seen = seen.T.unflatten(1, depth.shape)  # [4, H, 2·W]
    if weather.wet:
        seen = _add_reflections(lit, seen, origin, direction, depth, spread, rng)
    return _expose(functional.avg_pool2d(seen[None, :3], (1, 2)), weather, rng)


def _length(vectors: Tensor) -> Tensor:
    x, y, z = vectors
    return (x * x + y * y + z * z).sqrt()


def _appearance(
    lit: LitStreet, origin: Tensor, direction: Tensor, depth: Tensor, box: Tensor, spread: float, dither: Tensor
) -> Tensor:
    """Linear RGB and gloss (N, 4) that N rays see: a surface through haze, or the sky.

    Args:
        origin: (3, 1) or (3, N).
        direction: (3, N).
        depth: (N,) where each ray ends, in lengths of its direction.
        box: (N,) index of the box that it meets, -1 for the sky.
        spread: size of a ray's footprint, in metres for each metre of depth.
        dither: (N,) in [0, 1), added to the mip level before it is rounded down.
    """
    seen = torch.zeros(len(depth), 4)
    hit = (box >= 0).nonzero().squeeze(1)
    miss = (box < 0).nonzero().squeeze(1)
    seen[miss, :3] = _sky_color(lit.sky, direction[:, miss])
    surface_origin = origin if origin.shape[1] == 1 else origin[:, hit]
    surface = _surface(lit, surface_origin, direction[:, hit], depth[hit], box[hit], spread, dither[hit])
    clear = torch.exp(-lit.weather.haze * depth[hit])[:, None]
    haze = torch.tensor(lit.weather.sky_low)
    surface[:, :3] = clear * surface[:, :3] + (1 - clear) * haze
    seen[hit] = surface
    return seen


def _surface(
    lit: LitStreet, origin: Tensor, direction: Tensor, depth: Tensor, box: Tensor, spread: float, dither: Tensor
) -> Tensor:
    """Texels (N, 4) where rays meet boxes, bilinear in the mip level that fits the ray's footprint."""
    painted = lit.painted
    corners = painted.bounds[box]  # [N, 2, 3]
    entry = torch.minimum(
        (corners[:, 0].T - origin) / direction, (corners[:, 1].T - origin) / direction
    )  # [3, N]; of the three slabs, a ray enters the box through the last
    axis = entry.nan_to_num(-torch.inf, -torch.inf, -torch.inf).argmax(0)
    along = direction.gather(0, axis[None])[0]
    face = painted.faces[painted.face_of[box, 2 * axis + (along < 0)]]  # [N, 7]
    left, top, width, height, first_u, first_v, texel = face.unbind(1)
    x, y, z = origin + depth * direction
    column = left + (torch.where(axis == 0, y, x) - first_u) / texel
    row = top + (torch.where(axis == 2, y, -z) - first_v) / texel
    cosine = along.abs() / _length(direction)
    level = torch.log2(depth * spread / texel / cosine.clamp(min=0.02).sqrt()) - 0.2 + dither
    return _texel(lit, column, row, level.long().clamp(0, LEVELS - 1), (left, top, left + width, top + height))


def _texel(lit: LitStreet, column: Tensor, row: Tensor, level: Tensor, tile: tuple[Tensor, ...]) -> Tensor:
    """Bilinear samples (N, 4) of the atlas's mip levels, at positions in texels of the finest level.

    Samples stay within their tile, whose left, top, right and bottom are given likewise.
    """
    scale = torch.exp2(-level.float())
    left, top, right, bottom = (edge * scale for edge in tile)
    x = torch.minimum((column * scale - 0.5).maximum(left), right - 1)
    y = torch.minimum((row * scale - 0.5).maximum(top), bottom - 1)
    x0, y0 = x.floor(), y.floor()
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]
    step_x, step_y = (x0 + 1 < right).long(), (y0 + 1 < bottom).long()
    width = lit.widths[level]
    first = lit.starts[level] + y0.long() * width + x0.long()
    below = first + step_y * width
    a, b, c, d = (lit.texels.index_select(0, i) for i in (first, first + step_x, below, below + step_x))
    upper = torch.lerp(a, b, fx)
    return torch.lerp(upper, torch.lerp(c, d, fx), fy)


def _sky_color(sky: Tensor, direction: Tensor) -> Tensor:
    """Colours (N, 3) of the panorama in directions (3, N)."""
    azimuth = torch.atan2(direction[1], -direction[0]) / (math.pi / 2)
    elevation = torch.atan2(direction[2], torch.hypot(direction[0], direction[1])).clamp(min=0) / (math.pi / 4) - 1
    grid = torch.stack([azimuth, elevation], -1)[None, None]
    return functional.grid_sample(sky[None], grid, padding_mode="border", align_corners=False)[0, :, 0].T


def _add_reflections(
    lit: LitStreet,
    seen: Tensor,
    origin: Tensor,
    direction: Tensor,
    depth: Tensor,
    spread: float,
    rng: np.random.Generator,
) -> Tensor:
    """Add to what rays see (4, H, 2·W) the mirror image in wet ground, with ripples; one mirrored ray per pixel."""
    gloss = seen[3, :, ::2]
    wet = gloss.flatten().gt(0.02).nonzero().squeeze(1)
    d, t = direction[..., ::2].flatten(1)[:, wet], depth[:, ::2].flatten()[wet]
    length = _length(d)
    ripple = torch.from_numpy(rng.standard_normal((3, len(wet)), dtype=np.float32)) * 0.02
    ripple[2] *= 2.5
    mirrored = torch.stack([d[0], d[1], -d[2]]) + ripple * length
    mirrored[2] = mirrored[2].abs() + 1e-3
    start = origin + t * d + torch.tensor([0.0, 0.0, 0.01])[:, None]
    further, box = trace(lit.painted.bounds, start, mirrored)
    mirror = _appearance(lit, start, mirrored, further, box.long(), 4 * spread, torch.full_like(t, 0.5))
    fresnel = 0.1 + 0.9 * (1 - d[2].abs() / length) ** 4  # more than that of water, because the sky is much brighter
    share = (fresnel * (0.35 + 0.65 * gloss.flatten()[wet])).clamp(0, 0.85)
    added = torch.zeros(4, gloss.numel())  # the mirror image and what it takes from the ground
    added[:3, wet], added[3, wet] = share * mirror[:, :3].T, 0.6 * share
    added = added.view(4, *gloss.shape).repeat_interleave(2, -1)
    return torch.cat([(1 - added[3]) * seen[:3] + added[:3], seen[3:]])


def _expose(radiance: Tensor, weather: Weather, rng: np.random.Generator) -> np.ndarray:
    """Apply lens blur, falling snow or rain, tone curve and sensor noise: (1, 3, H, W) linear to (H, W, 3) uint8."""
    height, width = radiance.shape[-2:]
    if weather.blur > 0:
        radiance = _blur(radiance, weather.blur * width / 256)
    if weather.snow or weather.wet:
        radiance = radiance + _falling(height, width, weather, rng) * (0.75 - radiance)
    gray = radiance.mean(1, keepdim=True)
    radiance = gray + weather.saturation * (radiance - gray)
    exposure = weather.exposure * math.exp(rng.uniform(-0.12, 0.12))
    value = (1 - torch.exp(-exposure * radiance.clamp(min=0))) ** (1 / 2.2)
    grain = torch.from_numpy(rng.standard_normal(tuple(value.shape), dtype=np.float32))
    value = value + weather.noise * grain
    return (value[0].permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of an image (1, 3, H, W); `sigma` is in pixels, about one at most."""
    taps = torch.exp(-0.5 * (torch.arange(-3, 4) / max(sigma, 1e-3)) ** 2)
    taps = (taps / taps.sum()).expand(3, 1, 1, 7)
    image = functional.conv2d(functional.pad(image, (3, 3, 0, 0), mode="replicate"), taps, groups=3)
    return functional.conv2d(functional.pad(image, (0, 0, 3, 3), mode="replicate"), taps.transpose(2, 3), groups=3)


def _falling(height: int, width: int, weather: Weather, rng: np.random.Generator) -> Tensor:
    """Opacity (1, 1, H, W) of flakes (small discs) or drops (slanted streaks)."""
    count = int((0.004 if weather.snow else 0.003) * height * width)
    drops = torch.zeros(height * width)
    drops[torch.from_numpy(rng.integers(0, height * width, count))] = torch.from_numpy(
        rng.uniform(0.2, 1.0, count).astype(np.float32)
    )
    if weather.snow:
        kernel = torch.tensor([[0.1, 0.35, 0.1], [0.35, 0.8, 0.35], [0.1, 0.35, 0.1]])
    else:
        kernel = torch.zeros(9, 9)
        kernel[torch.arange(9), (torch.arange(9) // 3) + 3] = 0.22
    padding = (kernel.shape[0] // 2, kernel.shape[1] // 2)
    return functional.conv2d(drops.view(1, 1, height, width), kernel[None, None], padding=padding).clamp(0, 0.9)
