"""Photometric augmentation: the same view under another light, at night, and through another camera.

Everything works on a batch of images (B, 3, H, W) of display values (as stored in image files, not
linear in light), moves no pixel, and draws each image on its own. A display value is a power of the
light, so a factor on the light is a factor on the display value.

Neither torchvision nor kornia serves: the one draws one setting for a whole batch, the other from the global
generator, so that a resumed run could not repeat its draws; neither makes a night with lamps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

YCBCR_FROM_RGB = torch.tensor(  # ITU-R BT.601, as in JFIF; its first row is the luminance
    [[0.299, 0.587, 0.114], [-0.299 / 1.772, -0.587 / 1.772, 0.5], [0.5, -0.587 / 1.402, -0.114 / 1.402]]
)
RGB_FROM_YCBCR = YCBCR_FROM_RGB.inverse()
BLUR_SIZE = 11  # pixels; holds every blur that `blur_kernels` is asked for
# Quantisation tables of luminance and chrominance at quality 50 (ITU-T T.81, annex K).
LUMINANCE_STEPS = torch.tensor((
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
))  # fmt: skip
CHROMINANCE_STEPS = torch.tensor((
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *((99,) * 8,) * 4,
))  # fmt: skip
NIGHT_CASTS = torch.tensor([[1.25, 0.85, 0.45], [0.7, 0.85, 1.2]])  # R, G, B of sodium lamps, and of the sky
SHADOW_CAST = torch.tensor([0.92, 1.0, 1.1])


@dataclass(frozen=True)
class Photometric:
    """Augmentation of training images. With all settings at zero it changes nothing.

    The first five settings are strengths: each image gets a random amount up to that. The others are
    probabilities that an image gets the effect at all.

    Args:
        exposure, gamma, contrast: largest |log| of the factor on the values, of the exponent, and of the
            spread around the mean.
        colour: largest |log| of the factor on one channel; saturation changes by twice that share.
        noise: largest std, where white is 1.
        shade: uneven light and cast shadows.
        night: dark, blue or sodium-orange, unevenly lit by lamps, and noisy.
        blur: defocus, or motion in a random direction.
        jpeg: compression at a random quality from 20 to 90.
        grey: no colour.

    Raises:
        ValueError: a strength below 0, or a probability outside 0 to 1.
    """

    exposure: float = 0.0
    gamma: float = 0.0
    contrast: float = 0.0
    colour: float = 0.0
    noise: float = 0.0
    shade: float = 0.0
    night: float = 0.0
    blur: float = 0.0
    jpeg: float = 0.0
    grey: float = 0.0

    def __post_init__(self) -> None:
        for field, value in zip(fields(self), astuple(self), strict=True):
            strength = field.name in ("exposure", "gamma", "contrast", "colour", "noise")
            if not (0 <= value < math.inf if strength else 0 <= value <= 1):
                expected = "a strength of 0 or more" if strength else "a probability from 0 to 1"
                raise ValueError(f"photometric augmentation: {field.name} is {value}; expected {expected}")

    @classmethod
    def of_strength(cls, strength: float) -> Photometric:
        """From nothing (0) over mild (0.3) to strong (1), for images taken under similar conditions."""
        if not 0 <= strength <= 1:
            raise ValueError(f"photometric augmentation: strength is {strength}; expected 0 (off) to 1 (strong)")
        return cls(
            exposure=0.4 * strength, gamma=0.5 * strength, contrast=0.3 * strength, colour=0.15 * strength,
            noise=0.03 * strength, shade=0.5 * strength, night=0.2 * strength, blur=0.2 * strength,
            jpeg=0.4 * strength, grey=0.1 * strength,
        )  # fmt: skip

    @classmethod
    def conditions(cls) -> Photometric:
        """Strong changes, for features that must match from day to night and over the seasons."""
        return replace(cls.of_strength(1), night=0.35, jpeg=0.3)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch, each image on its own; one state of the generator gives one result.

        With a generator on the CPU, an effect is computed only for the images that get it. With one on the
        images' GPU, every effect is computed for the whole batch, and the host never waits for the GPU.

        Args:
            images: (B, 3, H, W) uint8.
            generator: on the CPU or on the images' device.

        Returns:
            (B, 3, H, W) float32 in [0, 1].
        """
        if not any(astuple(self)) or images.numel() == 0:
            return images.float() / 255
        draw = Draw(generator, images.device)
        if not known_to_host(generator):
            return self._augment(images, draw)
        # One by one, which is quicker on a CPU also because all that an image needs stays in the cache.
        return torch.cat([self._augment(image, draw) for image in images.split(1)])

    def _augment(self, images: Tensor, draw: Draw) -> Tensor:
        result = self._tone(images, draw)
        for probability, stage in ((self.blur, random_blur), (self.shade, random_shade), (self.night, random_night)):
            result = draw.sometimes(probability, stage, result)
        if self.noise:
            result = add_noise(result, read=draw.uniform(0, self.noise, len(images)), draw=draw)
        result = result.clamp(0, 1)
        result = draw.sometimes(self.grey, lambda images, _: luminance(images).expand_as(images), result)
        return draw.sometimes(self.jpeg, random_jpeg, result)

    def _tone(self, images: Tensor, draw: Draw) -> Tensor:
        """Exposure, gamma, contrast and colour; values may leave [0, 1]."""
        batch = len(images)
        if self.exposure or self.gamma or self.contrast:
            log_gain, log_gamma, log_contrast = (
                draw.uniform(-most, most, batch) for most in (self.exposure, self.gamma, self.contrast)
            )
            result = tone(images, gain=log_gain.exp(), gamma=log_gamma.exp(), contrast=log_contrast.exp())
        else:
            result = images.float() / 255
        if self.colour:
            cast = draw.uniform(-self.colour, self.colour, batch, 3).exp()
            saturation = 1 + draw.uniform(-2 * self.colour, 2 * self.colour, batch)
            result = recolour(result, cast=cast, saturation=saturation.clamp(min=0))
        return result


class Draw(NamedTuple):
    """Random numbers from one generator, on any device, for images on `device`."""

    generator: torch.Generator
    device: torch.device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        unit = torch.rand(*shape, generator=self.generator, device=self.generator.device)
        return self._moved(low + (high - low) * unit)

    def normal(self, *shape: int) -> Tensor:
        return self._moved(torch.randn(*shape, generator=self.generator, device=self.generator.device))

    def white_noise(self, *shape: int) -> Tensor:
        """Independent values of mean 0 and variance 1: differences of two random bytes, far cheaper than `normal`."""
        count = math.prod(shape)
        words = torch.empty(-(-count // 4), dtype=torch.int64, device=self.generator.device)
        words.random_(-(2**63), None, generator=self.generator)
        first, second = words.view(torch.uint8)[: 2 * count].to(torch.int16).view(2, *shape)
        return self._moved(first - second) * math.sqrt(6 / (256**2 - 1))

    def sometimes(self, probability: float, stage: Callable[[Tensor, Draw], Tensor], images: Tensor) -> Tensor:
        """Images (B, 3, H, W) of which each has gone through `stage` with this probability."""
        if probability == 0:
            return images
        chosen = torch.rand(len(images), generator=self.generator, device=self.generator.device) < probability
        if known_to_host(chosen) and len(images) == 1:
            return stage(images, self) if chosen else images
        return torch.where(self._moved(chosen)[:, None, None, None], stage(images, self), images)

    def _moved(self, drawn: Tensor) -> Tensor:
        return drawn.to(self.device, non_blocking=True)


def known_to_host(source: Tensor | torch.Generator) -> bool:
    """Whether its values can be read without waiting for a GPU."""
    return source.device.type == "cpu"


def on_device(constant: Tensor, like: Tensor) -> Tensor:
    """A constant, copied to the device of another tensor without waiting for it."""
    return constant.to(like.device, non_blocking=True)


def tone(images: Tensor, *, gain: Tensor, gamma: Tensor, contrast: Tensor) -> Tensor:
    """Images (B, 3, H, W) uint8 to values of at least 0; each setting is (B,), and 1 changes nothing."""
    # What depends on the value alone is worked out for 256 values, not for every pixel.
    mean = images.float().mean((1, 2, 3))[:, None] / 255
    levels = torch.arange(256, device=images.device) / 255
    curve = ((levels - mean) * contrast[:, None] + mean).clamp(1e-4, 1).pow(gamma[:, None]) * gain[:, None]
    return curve[:, None].expand(-1, 3, -1).gather(2, images.flatten(2).long()).view(images.shape)


def luminance(images: Tensor) -> Tensor:
    """The luminance (B, 1, H, W) of images (B, 3, H, W)."""
    return (on_device(YCBCR_FROM_RGB, images)[:1] @ images.flatten(2)).view(len(images), 1, *images.shape[2:])


def recolour(images: Tensor, *, cast: Tensor, saturation: Tensor) -> Tensor:
    """Scale the colourfulness by `saturation` (B,) (0: grey, 1: as it is), then each channel by `cast` (B, 3)."""
    saturation = saturation[:, None, None]
    grey = on_device(YCBCR_FROM_RGB, images)[:1]
    matrix = saturation * torch.eye(3, device=images.device) + (1 - saturation) * grey
    return ((cast[:, :, None] * matrix) @ images.flatten(2)).view(images.shape).clamp_(min=0)


def smooth_field(coefficients: Tensor, height: int, width: int) -> Tensor:
    """(..., H, W) sums of cosines: entry (k, l) of (..., K, L) makes k half waves down and l half waves across."""

    def waves(size: int, count: int) -> Tensor:
        centers = (torch.arange(size, device=coefficients.device) + 0.5) / size
        return (math.pi * centers[:, None] * torch.arange(count, device=coefficients.device)).cos()

    return waves(height, coefficients.shape[-2]) @ coefficients @ waves(width, coefficients.shape[-1]).mT


def random_coefficients(draw: Draw, *shape: int, falloff: float) -> Tensor:
    """Coefficients (..., K, K) for `smooth_field` of about unit variance and mean 0; `falloff` makes it smoother."""
    axis = torch.arange(shape[-1], device=draw.device)
    weight = (1.0 + axis[:, None] ** 2 + axis**2) ** (-falloff / 2)
    weight[0, 0] = 0
    return draw.normal(*shape) * (1.7 * weight / weight.norm())


def image_axes(images: Tensor) -> tuple[Tensor, Tensor]:
    """x (1, 1, W) and y (1, H, 1) of the pixels; 0 is the middle, 1 the end of the larger side."""
    height, width = images.shape[-2:]
    half = max(height, width) / 2
    x, y = ((torch.arange(n, device=images.device) + 0.5 - n / 2) / half for n in (width, height))
    return x[None, None, :], y[None, :, None]


def random_shade(images: Tensor, draw: Draw) -> Tensor:
    """Uneven light, and the shadow of something with straight or ragged edges, a little bluer than the rest."""
    batch, _, height, width = images.shape
    uneven = random_coefficients(draw, batch, 4, 4, falloff=2) * draw.uniform(0, 0.25, batch, 1, 1)
    depth = draw.uniform(0.35, 0.8, batch, 1) * on_device(SHADOW_CAST, images)
    shadow = random_shadow(images, draw)[:, None]
    light = smooth_field(uneven, height, width).exp_()[:, None]
    return images * light * (1 + shadow * (depth - 1)[:, :, None, None])


def random_shadow(images: Tensor, draw: Draw) -> Tensor:
    """(B, H, W), 1 in the shadow and 0 outside: what lies behind one edge, and a corner or band between three."""
    batch, _, height, width = images.shape
    x, y = image_axes(images)
    angle = draw.uniform(0, 2 * math.pi, batch, 4, 1, 1)
    # The second edge of the band looks back at the first; the third ends it somewhere.
    angle[:, 2] = angle[:, 1] + math.pi + draw.uniform(-0.5, 0.5, batch, 1, 1)
    offset = torch.cat((draw.uniform(-0.9, 0.1, batch, 1, 1, 1), draw.uniform(0.05, 0.5, batch, 3, 1, 1)), 1)
    one, *three = (angle[:, i].cos() * x + angle[:, i].sin() * y + offset[:, i] for i in range(4))
    inside = torch.maximum(one, torch.minimum(torch.minimum(three[0], three[1]), three[2]))
    ragged = random_coefficients(draw, batch, 24, 24, falloff=1) * draw.uniform(-0.1, 0.15, batch, 1, 1).clamp(min=0)
    penumbra = draw.uniform(math.log(0.01), math.log(0.1), batch, 1, 1).exp()
    return (inside.add_(smooth_field(ragged, height, width)) / penumbra + 0.5).clamp_(0, 1)


def random_night(images: Tensor, draw: Draw) -> Tensor:
    """Dark and pale, in the light of the sky or of street lamps, darker above and in the corners, and noisy."""
    batch, _, height, width = images.shape
    sodium, sky = on_device(NIGHT_CASTS, images)
    cast = torch.lerp(sky, sodium, draw.uniform(0, 1, batch, 1))
    cast = torch.lerp(torch.ones_like(cast), cast, draw.uniform(0.2, 1, batch, 1))
    pale = recolour(images, cast=cast, saturation=draw.uniform(0.2, 0.8, batch))
    uneven = random_coefficients(draw, batch, 5, 5, falloff=1.5) * draw.uniform(0.1, 0.5, batch, 1, 1)
    vignetting = draw.uniform(0, 0.2, batch)
    uneven[:, 1, 0] -= draw.uniform(0, 0.8, batch)
    uneven[:, 2, 0] -= vignetting
    uneven[:, 0, 2] -= vignetting
    warmer = 0.06 * random_coefficients(draw, batch, 5, 5, falloff=1.5)
    light = smooth_field(torch.stack((uneven + warmer, uneven, uneven - warmer), 1), height, width).exp_()
    pools, glare = random_lamps(images, draw)
    lamp = (0.6 + 0.4 * sodium)[:, None, None]
    lit = pale * (light + lamp * pools)
    # A camera exposes for the scene: what was dark before must not become black, nor brighter.
    mean = torch.minimum(draw.uniform(0.12, 0.25, batch), 0.7 * images.mean((1, 2, 3)))
    exposure = mean / lit.mean((1, 2, 3)).clamp(min=1e-4)
    lit = lit * exposure[:, None, None, None] + lamp * glare
    return add_noise(lit, read=draw.uniform(0.005, 0.03, batch), shot=draw.uniform(0.01, 0.06, batch), draw=draw)


def random_lamps(images: Tensor, draw: Draw, count: int = 3) -> tuple[Tensor, Tensor]:
    """The light that lamps throw on the scene, and their glare in the camera, both (B, 1, H, W)."""
    batch = len(images)
    x, y = image_axes(images)
    center_x, center_y = draw.uniform(-1, 1, batch, count, 1, 1), draw.uniform(-0.8, 0.6, batch, count, 1, 1)
    brightness = draw.uniform(-1, 1.5, batch, count, 1, 1).clamp(min=0)  # two in five are off
    reach = draw.uniform(0.15, 0.5, batch, count, 1, 1)
    pools = images.new_zeros(batch, *images.shape[2:])
    glare = torch.zeros_like(pools)
    for i in range(count):
        squared = ((x - center_x[:, i]) / reach[:, i]) ** 2 + ((y - center_y[:, i]) / reach[:, i]) ** 2
        pools.addcmul_(brightness[:, i], (1 + squared).reciprocal_())
        glare.addcmul_(0.3 * brightness[:, i], (1 + 60 * squared).reciprocal_())
    return pools[:, None], glare[:, None]


def random_blur(images: Tensor, draw: Draw) -> Tensor:
    """Defocus or motion, half of the images each."""
    batch = len(images)
    sigma = torch.where(draw.uniform(0, 1, batch) < 0.5, draw.uniform(0.5, 1.5, batch), 0.4)
    length = torch.where(sigma == 0.4, draw.uniform(2, 6, batch), 0.0)
    return blur(images, blur_kernels(sigma=sigma, length=length, angle=draw.uniform(0, math.pi, batch)))


def blur_kernels(*, sigma: Tensor, length: Tensor, angle: Tensor) -> Tensor:
    """Kernels (B, 11, 11): motion by `length` pixels along `angle` and a Gaussian of `sigma` pixels; each is (B,).

    A kernel is symmetric about its middle, so that blurring shifts nothing.
    """
    axis = torch.arange(BLUR_SIZE, device=sigma.device) - BLUR_SIZE // 2
    sigma, length, angle = (setting[:, None, None] for setting in (sigma, length, angle))
    x, y = axis[None, None, :], axis[None, :, None]
    along, across = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x
    beyond = (along.abs() - length / 2).clamp(min=0)
    kernels = (-(beyond**2 + across**2) / (2 * sigma**2)).exp()
    return kernels / kernels.sum((1, 2), keepdim=True)


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Images (B, 3, H, W) convolved with kernels (B, K, K), K odd; beyond the border its last pixel goes on."""
    batch, channels, height, _ = images.shape
    half = kernels.shape[-1] // 2
    padded = functional.pad(images, (half,) * 4, mode="replicate").view(1, batch * channels, height + 2 * half, -1)
    weight = kernels[:, None].expand(-1, channels, -1, -1).reshape(batch * channels, 1, *kernels.shape[1:])
    return functional.conv2d(padded, weight, groups=batch * channels).view(images.shape)


def add_noise(images: Tensor, *, read: Tensor, shot: Tensor | None = None, draw: Draw) -> Tensor:
    """Add noise of variance read² + shot² · value to each value; `read` and `shot` are (B,)."""
    std = read[:, None, None, None]
    if shot is not None:
        std = (std**2 + images.clamp(0, 1).mul_(shot[:, None, None, None] ** 2)).sqrt_()
    return draw.white_noise(*images.shape).mul_(std).add_(images)


def random_jpeg(images: Tensor, draw: Draw) -> Tensor:
    return jpeg(images, draw.uniform(20, 90, len(images)).round())


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] after JPEG of a quality (B,) from 1 to 100, with chroma at half size."""
    height, width = images.shape[-2:]
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[:, None, None]
    padded = functional.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
    planes = (255 * on_device(YCBCR_FROM_RGB, images) @ padded.flatten(2)).view(padded.shape)
    brightness = quantise_blocks(planes[:, :1] - 128, LUMINANCE_STEPS, scale) + 128
    chroma = quantise_blocks(functional.avg_pool2d(planes[:, 1:], 2), CHROMINANCE_STEPS, scale)
    chroma = functional.interpolate(chroma, scale_factor=2, mode="bilinear")
    planes = torch.cat((brightness, chroma), 1).flatten(2)
    result = (on_device(RGB_FROM_YCBCR, images) / 255 @ planes).view(padded.shape)
    return result[..., :height, :width].clamp(0, 1)


def quantise_blocks(planes: Tensor, steps: Tensor, scale: Tensor) -> Tensor:
    """Round the cosine transforms of the 8×8 blocks of planes (B, C, H, W) to steps times scale (B, 1, 1) percent."""
    batch, channels, height, width = planes.shape
    # The transform of a whole block in one product, (64, 64): the rows are the cosines, of length 1.
    axis = torch.arange(8, device=planes.device)
    cosines = (math.pi / 8 * axis[:, None] * (axis + 0.5)).cos() * torch.where(axis == 0, 0.125, 0.25)[:, None].sqrt()
    transform = torch.kron(cosines, cosines)
    step = ((on_device(steps, planes).view(1, 1, 64) * scale + 50) / 100).floor().clamp(1, 255)
    blocks = planes.view(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4).reshape(batch, -1, 64)
    blocks = (((blocks @ transform.mT) / step).round_() * step) @ transform
    return blocks.view(batch, channels, height // 8, width // 8, 8, 8).transpose(3, 4).reshape(planes.shape)
