"""Photometric augmentation: what it changes, what it keeps, and how close its JPEG is to that of an encoder."""

from __future__ import annotations

import io
import os
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gnnet.data import photometric
from gnnet.data.images import read_image
from gnnet.data.photometric import (
    Draw,
    Photometric,
    blur,
    blur_kernels,
    jpeg,
    random_shadow,
    recolour,
    smooth_field,
    tone,
)

ALL = Photometric(0.4, 0.5, 0.3, 0.15, 0.03, shade=1, night=1, blur=1, jpeg=1, grey=0.5)
STAGES = {
    "tone": Photometric(exposure=0.4, gamma=0.5, contrast=0.3),
    "colour": Photometric(colour=0.15),
    "noise": Photometric(noise=0.03),
    "shade": Photometric(shade=1),
    "night": Photometric(night=1),
    "blur": Photometric(blur=1),
    "jpeg": Photometric(jpeg=1),
    "grey": Photometric(grey=1),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenery(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images (B, 3, H, W) uint8 with structure of all sizes, as photos have."""
    spectrum = torch.fft.rfft2(torch.randn(batch, 3, height, width, generator=seeded(seed)))
    frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width) ** 2).sqrt().clamp(min=0.01)
    values = torch.fft.irfft2(spectrum / frequency**1.5, s=(height, width))
    values = 0.7 * values[:, :1] + 0.3 * values
    return (110 + 45 * values / values.std((1, 2, 3), keepdim=True)).clamp(0, 255).to(torch.uint8)


def shift(before: Tensor, after: Tensor) -> Tensor:
    """Shift (B, 2), x and y in pixels, of the detail in images (B, 3, H, W): the peak of the correlation."""
    height, width = before.shape[-2:]
    squared = torch.fft.fftfreq(height)[:, None].double() ** 2 + torch.fft.fftfreq(width).double() ** 2
    smooth = (-squared / (2 * 0.1**2)).exp()
    spectra = []
    for images in (before, after):
        # The log makes light a summand, and the second difference removes it where it is smooth.
        grey = (images.double().mean(1) + 0.05).log()
        detail = 4 * grey - sum(grey.roll(step, axis) for step in (-1, 1) for axis in (1, 2))
        detail[:, [0, 1, -2, -1]] = 0
        detail[:, :, [0, 1, -2, -1]] = 0
        spectra.append(torch.fft.fft2(detail.clamp(-0.5, 0.5)) * smooth)
    correlation = torch.fft.ifft2(spectra[1] * spectra[0].conj()).real
    middle, result = correlation[:, 0, 0], []
    for low, high in ((correlation[:, 0, -1], correlation[:, 0, 1]), (correlation[:, -1, 0], correlation[:, 1, 0])):
        assert (middle > torch.maximum(low, high)).all()
        result.append(0.5 * (high - low) / (2 * middle - low - high))
    return torch.stack(result, -1)


def test_nothing_is_changed_at_zero():
    images = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 3, 1)
    for off in (Photometric(), Photometric.of_strength(0)):
        result = off(images, seeded())
        assert result.dtype == torch.float32
        assert torch.equal(result, images.float() / 255)


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_is_seeded_and_draws_every_image_on_its_own(name):
    twins = scenery(1, 48, 64).expand(3, -1, -1, -1)
    one, same, other = (STAGES[name](twins, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert one.shape == twins.shape and one.dtype == torch.float32
    assert one.min() >= 0 and one.max() <= 1
    assert not torch.equal(one, twins.float() / 255)
    if name != "grey":  # where nothing is drawn but whether
        assert not torch.equal(one, other)
        assert not torch.equal(one[0], one[1]) and not torch.equal(one[1], one[2])


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (2, 3, 45, 83), (3, 3, 17, 8), (1, 3, 1, 1), (0, 3, 16, 16)])
@pytest.mark.parametrize("settings", [ALL, Photometric.conditions()])
def test_any_size_stays_in_range(shape, settings):
    for fill in (0, 128, 255):
        result = settings(torch.full(shape, fill, dtype=torch.uint8), seeded(fill))
        assert result.shape == shape
        assert ((result >= 0) & (result <= 1)).all()  # and so not NaN


def test_a_stage_is_applied_with_its_probability():
    images = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    result = Photometric(grey=0.3)(images, seeded(1))
    grey = (result == result[:, :1]).all(3).all(2).all(1)
    assert 0.22 < grey.float().mean() < 0.38
    assert torch.equal(result[~grey], images[~grey].float() / 255)


class NoReading(TorchDispatchMode):
    """Fails where the host would wait for values on the device, or where shapes depend on them."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name()
        forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "linalg_inv", "unique")
        assert name.split("::")[1].split(".")[0] not in forbidden, name
        return function(*arguments, **(keywords or {}))


def test_with_the_generator_on_the_gpu_the_host_never_waits(monkeypatch):
    # The code for a generator on the GPU, which draws for the whole batch, run on the CPU.
    monkeypatch.setattr(photometric, "known_to_host", lambda source: False)
    images = scenery(4, 48, 64)
    with NoReading():
        result = ALL(images, seeded())
    assert ((result >= 0) & (result <= 1)).all()
    chosen = Photometric(jpeg=0.5)(images, seeded(1)).sub(images.float() / 255).abs().amax((1, 2, 3)) > 0
    assert chosen.any() and not chosen.all()


@pytest.mark.parametrize("name", STAGES)
def test_nothing_moves(name):
    images = scenery(32, 128, 144)
    moved = shift(images.float() / 255, STAGES[name](images, seeded(3)))
    # Noise and quantization disturb single images; a stage that moves images moves all of them.
    assert moved.mean(0).abs().max() < 0.02
    assert moved.abs().max() < 0.25


def test_the_measure_of_shifts_sees_a_tenth_of_a_pixel():
    images = scenery(4, 128, 144).float() / 255
    frequency = torch.fft.fftfreq(144)
    turned = torch.fft.fft(images) * torch.exp(-2j * torch.pi * 0.1 * frequency)
    moved = shift(images, torch.fft.ifft(turned).real)
    assert (moved[:, 0] - 0.1).abs().max() < 0.03 and moved[:, 1].abs().max() < 0.02


def test_blur_keeps_the_centroid_and_the_sum_of_a_dot():
    count = 40
    draw = Draw(seeded(), torch.device("cpu"))
    kernels = blur_kernels(
        sigma=draw.uniform(0.4, 1.5, count), length=draw.uniform(0, 6, count), angle=draw.uniform(0, 3.14, count)
    )
    dots = torch.zeros(count, 3, 31, 40)
    dots[:, :, 12, 25] = 1
    blurred = blur(dots, kernels).double()
    torch.testing.assert_close(blurred.sum((2, 3)), torch.ones(count, 3, dtype=torch.float64), atol=1e-5, rtol=0)
    rows, columns = torch.arange(31.0).double(), torch.arange(40.0).double()
    assert (blurred.sum(3) @ rows - 12).abs().max() < 1e-4
    assert (blurred.sum(2) @ columns - 25).abs().max() < 1e-4


def test_motion_blurs_along_its_direction_by_its_length():
    kernel = blur_kernels(sigma=torch.tensor([0.4]), length=torch.tensor([6.0]), angle=torch.tensor([0.0]))[0]
    axis = torch.arange(11.0) - 5
    across, along = (kernel.sum(1) @ axis**2).sqrt(), (kernel.sum(0) @ axis**2).sqrt()
    assert across < 0.5
    assert abs(float(along) - 6 / 12**0.5) < 0.4  # the std of a line of 6 pixels


def test_jpeg_keeps_the_centroid_of_spots():
    # Rounding moves a single spot a little; over all positions in a block these shifts cancel.
    count, axis = 300, torch.arange(64.0) + 0.5
    center = 8 + 16 * torch.rand(count, 2, generator=seeded())
    from_x, from_y = axis - center[:, :1], axis - center[:, 1:]
    spots = (-(from_x[:, None, :] ** 2 + from_y[:, :, None] ** 2) / (2 * 2.0**2)).exp()
    colour = torch.tensor([0.8, 0.6, 0.3])[:, None, None]
    found = jpeg(0.1 + colour * spots[:, None], torch.full((count,), 90.0)) - 0.1
    near = (from_x.abs() < 6)[:, None, :] * (from_y.abs() < 6)[:, :, None]

    def centroid(values: Tensor) -> Tensor:
        mass = (values * near) / (values * near).sum((1, 2), keepdim=True)
        return torch.stack(((mass.sum(1) * axis).sum(1), (mass.sum(2) * axis).sum(1)), 1)

    for channel in range(3):
        moved = centroid(found[:, channel]) - centroid(spots)
        assert moved.mean(0).abs().max() < 0.02
        assert moved.square().mean().sqrt() < 0.2


@pytest.mark.parametrize("height, width", [(96, 128), (77, 91)])
def test_jpeg_is_that_of_an_encoder(height, width):
    images = scenery(4, height, width)
    qualities = [20, 45, 70, 90]
    encoded = []
    for image, quality in zip(images, qualities, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "jpeg", quality=quality, subsampling=2)
        encoded.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255)
    expected = torch.stack(encoded)
    before = images.float() / 255
    found = jpeg(before, torch.tensor(qualities).float())

    def psnr(a: Tensor, b: Tensor) -> Tensor:
        return -10 * (a - b).square().mean((1, 2, 3)).log10()

    assert (psnr(found, expected) > 40).all()
    assert (psnr(found, expected) > psnr(expected, before) + 4).all()
    assert (psnr(found, before) - psnr(expected, before)).abs().max() < 0.5


def test_night_is_dark_and_day_is_not():
    images = scenery(16, 64, 64)
    before = images.float().mean((1, 2, 3)) / 255
    night = Photometric(night=1)(images, seeded()).mean((1, 2, 3))
    assert (night < 0.8 * before).all()
    assert night.mean() < 0.6 * before.mean()
    assert (night > 0.05).all()  # yet something is visible
    # An image that is dark already becomes neither black nor bright.
    dusk = Photometric(night=1)(images // 4, seeded()).mean((1, 2, 3))
    assert (dusk > 0.5 * before / 4).all() and dusk.mean() < before.mean() / 4


def test_shadows_darken_a_part():
    shadow = random_shadow(torch.zeros(64, 3, 48, 60), Draw(seeded(), torch.device("cpu")))
    assert shadow.shape == (64, 48, 60) and shadow.min() == 0 and shadow.max() == 1
    share = shadow.mean((1, 2))
    assert 0.1 < share.mean() < 0.7
    assert ((share > 0.02) & (share < 0.98)).float().mean() > 0.7


def test_smooth_field_is_a_sum_of_cosines():
    coefficients = torch.randn(2, 3, 4, generator=seeded())
    field = smooth_field(coefficients, 5, 7)
    y, x = 3, 2
    expected = sum(
        coefficients[:, k, j] * np.cos(np.pi * k * (y + 0.5) / 5) * np.cos(np.pi * j * (x + 0.5) / 7)
        for k in range(3)
        for j in range(4)
    )
    torch.testing.assert_close(field[:, y, x], expected)


def test_tone_and_colour_follow_their_formulas():
    images = scenery(2, 16, 20)
    one = torch.ones(2)
    torch.testing.assert_close(
        tone(images, gain=2 * one, gamma=1.5 * one, contrast=one), 2 * (images / 255).clamp(1e-4) ** 1.5
    )
    values = images.float() / 255
    torch.testing.assert_close(recolour(values, cast=torch.ones(2, 3), saturation=one), values)
    grey = recolour(values, cast=torch.ones(2, 3), saturation=0 * one)
    luminance = (values * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, True)
    torch.testing.assert_close(grey, luminance.expand(-1, 3, -1, -1))


def test_white_noise_has_unit_variance_and_no_pattern():
    noise = Draw(seeded(), torch.device("cpu")).white_noise(2, 3, 101, 103)
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.01
    flat = noise.view(6, -1)
    assert (torch.corrcoef(flat) - torch.eye(6)).abs().max() < 0.05
    assert all(abs(float((flat[:, step:] * flat[:, :-step]).mean())) < 0.02 for step in (1, 2, 4, 8, 103))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"night": 1.5}, r"night is 1\.5; expected a probability from 0 to 1"),
        ({"blur": float("nan")}, "blur is nan"),
        ({"gamma": -0.1}, r"gamma is -0\.1; expected a strength of 0 or more"),
    ],
)
def test_impossible_settings_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        Photometric(**settings)
    with pytest.raises(ValueError, match="strength is 2"):
        Photometric.of_strength(2)


def test_presets_grow_with_strength():
    mild, strong = astuple(Photometric.of_strength(0.3)), astuple(Photometric.of_strength(1))
    assert all(0 < low < high for low, high in zip(mild, strong, strict=True))
    assert Photometric.conditions().night > Photometric.of_strength(1).night


@pytest.mark.skipif("GNNET_DATA" not in os.environ, reason="set GNNET_DATA to the folder that holds timelapse/")
def test_photos_keep_their_detail():
    files = sorted((Path(os.environ["GNNET_DATA"]) / "timelapse/stlouis").glob("*.jpg"))[:8]
    images = torch.stack([read_image(file)[:, 100:356, 100:356] for file in files])
    result = Photometric.conditions()(images, seeded())
    assert shift(images.float() / 255, result).mean(0).abs().max() < 0.05
    assert (result.std((1, 2, 3)) > 0.02).all()
