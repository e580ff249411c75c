"""Image files read and shrunk, with their cameras and keypoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import write_jpeg

from gnnet.data import images
from gnnet.data.images import even_subset, limit_size, read_image, read_pixels, read_view
from gnnet.geometry.camera import Camera
from gnnet.sampling import turns
from gnnet.scenes.scene import SceneImage


def test_unreadable_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
        read_image(tmp_path / "missing.jpg")
    whole = tmp_path / "whole.jpg"
    write_jpeg(torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8), str(whole))
    assert read_image(whole).shape == (3, 64, 64)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.jpg \(200 bytes\) cannot be read"):
        read_image(tmp_path / "cut.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.jpg \(8 bytes\) cannot be read"):
        read_image(tmp_path / "text.jpg")


@pytest.mark.cases
@pytest.mark.parametrize("kind", ["grey.png", "rgb.tif", "rgb.bmp", "rgb.webp"])
def test_a_photograph_of_another_format_has_the_same_pixels(tmp_path, kind):
    """16-bit grey is scaled, not cut off at white."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    path = tmp_path / kind
    if kind == "grey.png":
        pixels[:] = pixels[..., :1]
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(pixels).save(path, **({"lossless": True} if kind.endswith("webp") else {}))
    np.testing.assert_array_equal(read_image(path).permute(1, 2, 0), pixels)


def test_resized_image_and_keypoints_stay_together():
    # A bright square of 8 pixels; its centre of mass must be at the scaled keypoint.
    image = torch.zeros(3, 90, 120, dtype=torch.uint8)
    image[:, 40:48, 60:68] = 255
    small, factors = limit_size(image, 60)
    assert small.shape == (3, 45, 60)
    weight = small[0].double()
    ys, xs = torch.meshgrid(torch.arange(45) + 0.5, torch.arange(60) + 0.5, indexing="ij")
    center = torch.stack([(weight * xs).sum(), (weight * ys).sum()]) / weight.sum()
    np.testing.assert_allclose(center, np.array([64.0, 44.0]) * factors, atol=0.02)
    same, factors = limit_size(image, 120)
    assert same is image and (factors == 1).all()


def test_even_subset_is_even_without_repeats():
    generator = np.random.default_rng(0)
    dense = generator.uniform((0, 0), (20, 20), (5000, 2))
    sparse = generator.uniform((0, 0), (200, 200), (500, 2))
    xy = np.concatenate([dense, sparse])
    chosen = even_subset(xy, (200, 200), 200, generator)
    assert len(set(chosen.tolist())) == 200
    assert (chosen < 5000).mean() < 0.1  # 1 % of the area, 91 % of the points
    preference = np.ones(len(xy))
    preference[5000::2] = 0.01
    preferred = even_subset(xy, (200, 200), 200, generator, preference=preference)
    assert (preference[preferred[preferred >= 5000]] == 1).mean() > 0.6
    assert even_subset(xy[:7], (200, 200), 10, generator).tolist() == list(range(7))


def test_each_cell_gives_its_points_in_turn():
    """The order is that of a loop over the points in the order of their draws."""
    xy = np.random.default_rng(0).uniform((0, 0), (200, 100), (900, 2))
    cell = np.sqrt(2 * 200 * 100 / 64)
    cells = [(int(x // cell), int(y // cell)) for x, y in xy]
    order = np.argsort(np.random.default_rng(1).exponential(size=len(xy)))
    turn = turns(cells[row] for row in order)
    expected = [order[row] for row in sorted(range(len(xy)), key=turn.__getitem__)[:64]]
    assert even_subset(xy, (200, 100), 64, np.random.default_rng(1)).tolist() == expected


def test_a_damaged_png_is_an_error_that_names_the_file_not_a_crash(tmp_path):
    path, generator = tmp_path / "damaged.png", np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    for _ in range(40):
        content = bytearray(whole)
        content[generator.integers(60, len(whole) - 30)] ^= 1 << generator.integers(0, 8)
        path.write_bytes(content)
        try:
            assert read_image(path).shape == (3, 60, 80)
        except ValueError as error:
            assert "damaged.png" in str(error)
    path.write_bytes(whole)
    assert (read_image(path).permute(1, 2, 0).numpy() == np.asarray(Image.open(path))).all()


def test_a_view_is_an_image_with_its_camera_at_one_size(tmp_path):
    path = tmp_path / "view.jpg"
    write_jpeg(torch.full((3, 90, 121), 128, dtype=torch.uint8), str(path))
    camera = Camera.from_colmap("PINHOLE", 121, 90, (100.0, 110.0, 60.0, 45.0), dtype=torch.float64)
    view = read_view(SceneImage("view", path, camera=camera), 60)
    assert view.pixels.shape == (3, 45, 60) and view.size == (60, 45) and view.file_size == (121, 90)
    assert view.camera.size.tolist() == [60, 45] and view.factors.tolist() == [60 / 121, 0.5]
    torch.testing.assert_close(view.camera.parameters[:4], camera.parameters[:4] * torch.tensor([60 / 121, 0.5] * 2))
    whole = read_view(SceneImage("view", path))
    assert whole.pixels.shape == (3, 90, 121) and whole.camera is None and (whole.factors == 1).all()
    with pytest.raises(ValueError, match=r"view\.jpg is 121×90 pixels, its camera says 60×45; give the camera"):
        read_view(SceneImage("view", path, camera=view.camera))


@pytest.mark.cases
def test_a_very_large_jpeg_is_shrunk_while_it_is_decoded(tmp_path, monkeypatch):
    path, (height, width) = tmp_path / "large.jpg", (901, 1203)  # no multiple of what the decoder shrinks by
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x * 255 / width, y * 255 / height, 128 + 100 * np.sin(x / 40) * np.cos(y / 30)], -1)
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)
    whole = read_view(SceneImage("large", path), 150)
    monkeypatch.setattr(images, "_LARGE", 1e6)
    monkeypatch.setattr(images, "decode_image", None)  # which would decode it whole
    shrunk = read_view(SceneImage("large", path), 150)
    assert shrunk.file_size == whole.file_size == (width, height)
    np.testing.assert_array_equal(shrunk.factors, whole.factors)
    assert (shrunk.pixels.float() - whole.pixels.float()).abs().mean() < 1


@pytest.mark.cases
def test_a_view_is_turned_by_its_tag_where_its_camera_says_so(tmp_path):
    exif, path = Image.Exif(), tmp_path / "phone.jpg"
    exif[0x0112] = 6
    stored = np.zeros((60, 80, 3), np.uint8)
    stored[:30] = 200
    Image.fromarray(stored).save(path, exif=exif)
    camera = Camera.from_colmap("PINHOLE", 60, 80, (50.0, 50.0, 30.0, 40.0), dtype=torch.float64)
    upright = read_view(SceneImage("phone", path, camera=camera)).pixels
    assert upright.shape == (3, 80, 60) and upright[0, :, :25].min() < 10 and upright[0, :, 35:].min() > 190
    assert torch.equal(read_image(path, camera), upright) and read_image(path).shape == (3, 60, 80)


@pytest.mark.cases
@pytest.mark.parametrize("tag", [1, 6, 7])
def test_a_very_large_query_is_shrunk_while_it_is_decoded_and_turned(tmp_path, monkeypatch, tag):
    path, (height, width) = tmp_path / "large.jpg", (901, 1203)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x * 255 / width, y * 255 / height, 128 + 100 * np.sin(x / 40) * np.cos(y / 30)], -1)
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95, exif=exif)
    size = (width, height) if tag == 1 else (height, width)
    camera = Camera.from_colmap("PINHOLE", *size, (500.0, 500.0, 300.0, 300.0), dtype=torch.float64)
    whole = read_pixels(path, camera, 150)
    monkeypatch.setattr(images, "_LARGE", 1e6)
    monkeypatch.setattr(images, "decode_image", None)  # which would decode it whole
    shrunk = read_pixels(path, camera, 150)
    assert shrunk.file_size == whole.file_size == size
    np.testing.assert_array_equal(shrunk.factors, whole.factors)
    assert (shrunk.pixels.float() - whole.pixels.float()).abs().mean() < 1
