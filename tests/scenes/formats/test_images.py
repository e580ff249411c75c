"""Image files that are whole, and those that are not."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from gnnet.scenes.formats import images
from gnnet.scenes.formats.images import (
    LIMIT,
    eight_bits,
    exif_focal_length,
    image_size,
    in_order,
    limit_images,
    open_image,
)


def picture(kind: str = "JPEG", size: tuple[int, int] = (64, 48), **settings) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **settings)
    return file.getvalue()


def with_thumbnail() -> bytes:
    """A JPEG whose notes (EXIF) hold a small JPEG with an end mark of its own."""
    thumbnail, whole = picture(size=(8, 8)), picture()
    note = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\0\0" + thumbnail
    return whole[:2] + note + whole[2:]


@pytest.mark.parametrize(
    "content",
    [
        picture(),
        picture(progressive=True),
        picture(quality=100),
        picture("PNG"),
        with_thumbnail(),
        picture() + b"a camera's note" * 20,
        picture() + b"a film of three seconds" * 1000,
        picture("PNG") + bytes(10_000),
    ],
)
def test_whole_images(tmp_path: Path, content: bytes):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    assert image_size(path) == (64, 48)


@pytest.mark.parametrize("content", [picture(), picture(progressive=True), picture("PNG"), with_thumbnail()])
def test_an_image_cut_anywhere_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "x.jpg"
    for length in [*range(0, len(content) - 8, max(1, len(content) // 40)), len(content) - 8]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"x\.jpg \({length} bytes\).*fetch it again"):
            image_size(path)
    path.write_bytes(content[:1500].ljust(len(content), b"\0"))  # a download that reserved its place
    with pytest.raises(ValueError, match=r"truncated|cannot be read"):
        image_size(path)


def test_other_things(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg does not exist"):
        image_size(tmp_path / "gone.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(ValueError, match="folder or device"):
        image_size(tmp_path / "folder.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="folder or device"):
        image_size(tmp_path / "pipe.jpg")


def test_damaged_images_raise_value_errors_alone(tmp_path: Path):
    rng, path = np.random.default_rng(0), tmp_path / "x.jpg"
    for content in (picture(), picture("PNG"), picture(progressive=True)):
        for _ in range(100):
            damaged = bytearray(content)
            for position in rng.integers(200, size=rng.integers(1, 8)):
                damaged[position] = rng.choice([0, 1, 127, 255, rng.integers(256)])
            path.write_bytes(damaged)
            try:
                image_size(path)
            except ValueError as error:
                assert str(path) in str(error)


GREY = np.random.default_rng(1).integers(0, 256, (48, 64), np.uint8)


def saved(path: Path, pixels: np.ndarray, **settings) -> Path:
    Image.fromarray(pixels).save(path, **settings)
    return path


def png_of_16_bits(path: Path, colours: np.ndarray, kind: int) -> Path:
    """A PNG of 16 bits a channel (H, W, C), which Pillow does not write; kind 2 is RGB, 4 grey with alpha, 6 RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    header = struct.pack(">IIBBBBB", colours.shape[1], colours.shape[0], 16, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def pixels(path: Path) -> np.ndarray:
    with open_image(path) as image:
        return np.asarray(eight_bits(image).convert("RGB"))


@pytest.mark.cases
@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_deep_grey_is_the_same_picture_as_in_8_bits(tmp_path: Path, bits: int, ending: str):
    deep = (GREY.astype(np.uint16) * 257) >> (16 - bits)
    np.testing.assert_array_equal(pixels(saved(tmp_path / f"deep.{ending}", deep))[..., 0], GREY)


@pytest.mark.cases
def test_other_kinds_of_pixels_are_right_or_named(tmp_path: Path):
    grey = np.repeat(GREY[..., None], 3, -1)
    wide = grey.astype(np.uint16) * 257
    opaque = np.full_like(wide[..., :1], 65535)
    for name, colours, kind in (("2", wide, 2), ("4", wide[..., :1], 4), ("6", wide, 6)):
        channels = colours if kind == 2 else np.concatenate([colours, opaque], -1)
        np.testing.assert_array_equal(pixels(png_of_16_bits(tmp_path / f"{name}.png", channels, kind)), grey)
    with pytest.raises(ValueError, match=r"dark\.png .*16 bits a colour, of which it uses the lower 12"):
        pixels(png_of_16_bits(tmp_path / "dark.png", wide >> 4, 2))
    for name, mode in (("a.png", "LA"), ("b.png", "RGBA"), ("c.tif", "CMYK"), ("d.png", "P"), ("e.bmp", "L")):
        Image.fromarray(GREY).convert("RGB" if mode == "CMYK" else "L").convert(mode).save(tmp_path / name)
        np.testing.assert_array_equal(pixels(tmp_path / name), grey, err_msg=name)
    for name, mode, message in (("f.tif", "F", "32-bit floating"), ("g.tif", "LAB", "the kind LAB")):
        Image.fromarray(grey).convert("L" if mode == "F" else "RGB").convert(mode).save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} .*{message}.*convert it"):
            image_size(tmp_path / name)  # before a pixel is decoded
    with pytest.raises(ValueError, match=r"deeper than 16 bits"):
        pixels(saved(tmp_path / "h.tif", GREY.astype(np.int32) * 70_000))


@pytest.mark.cases
@pytest.mark.parametrize("kind", ["TIFF", "BMP", "WEBP"])
def test_tiff_bmp_and_webp_are_read_whole(tmp_path: Path, kind: str):
    path = tmp_path / "x.jpg"  # whatever the ending says
    path.write_bytes(content := picture(kind, **({"lossless": True} if kind == "WEBP" else {})))
    np.testing.assert_array_equal(pixels(path), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(ValueError, match=r"x\.jpg .*fetch it again"):
        image_size(path)


@pytest.mark.cases
def test_the_advice_fits_the_cause(tmp_path: Path):
    for kind, what in (("GIF", "a GIF"), ("JPEG2000", "JPEG 2000"), ("PPM", "PPM")):
        (tmp_path / "x.jpg").write_bytes(picture(kind))
        with pytest.raises(ValueError, match=rf"x\.jpg .* is {what}, which is not read; convert it to an 8-bit"):
            image_size(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes(b"<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(ValueError, match=r"begins b'<!DOCTYPE.*fetch it again"):
        image_size(tmp_path / "x.jpg")
    twelve_bits = bytearray(picture())
    twelve_bits[twelve_bits.find(b"\xff\xc0") + 4] = 12
    (tmp_path / "x.jpg").write_bytes(twelve_bits)
    with pytest.raises(ValueError, match=r"12-bit layers.*convert it"):
        image_size(tmp_path / "x.jpg")


@pytest.mark.cases
def test_the_limit_on_pixels_is_a_setting(tmp_path: Path, monkeypatch):
    large = saved(tmp_path / "large.png", np.zeros((13_000, 14_000), bool))  # 182 megapixels: more than Pillow's limit
    assert image_size(large) == (14_000, 13_000)
    monkeypatch.setenv(LIMIT, "")
    limit_images(100)
    limit_images(None)  # as it is
    with pytest.raises(ValueError, match=r"14000×13000 = 182 megapixels, more than .* of 100; .*max_megapixels=N"):
        image_size(large)
    for wrong in (0, "many"):
        with pytest.raises(ValueError, match=f"max_megapixels={wrong}; expected a positive number"):
            limit_images(wrong)
    monkeypatch.setenv(LIMIT, "many")
    with pytest.raises(ValueError, match=r"large\.png .*GNNET_MAX_MEGAPIXELS in the env.*t is no number: .*'many'"):
        image_size(large)


@pytest.mark.cases
def test_a_header_that_tells_more_pixels_than_the_file_can_hold_is_named(tmp_path: Path):
    """The decoder would fill gigabytes with grey."""
    content, path = bytearray(picture()), tmp_path / "x.jpg"
    at = content.find(b"\xff\xc0") + 5
    content[at : at + 4] = (12_000).to_bytes(2, "big") * 2
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.jpg .*is too short for the 12000×12000 pixels that its header tells"):
        image_size(path)
    Image.new("L", (32, 24)).save(tmp_path / "x.tif")
    content = bytearray((tmp_path / "x.tif").read_bytes())
    at = content.find(struct.pack("<HHI", 257, 4, 1)) + 8  # the height
    content[at : at + 4] = struct.pack("<I", 4_000_000)
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.tif .*is too short for the 32×4000000 pixels that its header tells"):
        image_size(tmp_path / "x.tif")
    Image.new("L", (1600, 1200), 255).save(path, quality=10, optimize=True, progressive=True)  # nothing is shorter
    assert image_size(path) == (1600, 1200)


def tiff_of_big_numbers(path: Path, grey: np.ndarray) -> Path:
    """A TIFF of 16 bits whose numbers begin with the upper byte, which Pillow does not write."""
    height, width = grey.shape
    values = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 2 * grey.size}
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in values.items())
    directory = struct.pack(">H", len(values)) + entries + bytes(4)
    path.write_bytes(b"MM\0*" + struct.pack(">I", 8 + 2 * grey.size) + grey.astype(">u2").tobytes() + directory)
    return path


@pytest.mark.cases
@pytest.mark.parametrize("tag", [1, 6, 7])
def test_an_image_shrunk_strip_by_strip_is_as_one_shrunk_whole(tmp_path: Path, monkeypatch, tag: int):
    x, y = np.meshgrid(np.arange(403), np.arange(301))
    colour = np.stack([x * 255 / 403, y * 255 / 301, 128 + 100 * np.sin(x / 40) * np.cos(y / 30)], -1).astype(np.uint8)
    grey, exif = colour[..., 2], Image.Exif()
    exif[0x0112] = tag
    files = [
        saved(tmp_path / "grey.png", grey, exif=exif),
        saved(tmp_path / "deep.png", grey.astype(np.uint16) << 4, exif=exif),
        saved(tmp_path / "alpha.png", np.dstack([colour, grey]), exif=exif),
        saved(tmp_path / "colour.tif", colour, exif=exif),
        saved(tmp_path / "colour.jpg", colour, exif=exif, quality=98),
    ]
    Image.fromarray(colour).convert("P").save(tmp_path / "palette.png", exif=exif)
    files.append(tmp_path / "palette.png")
    if tag == 1:
        files.append(tiff_of_big_numbers(tmp_path / "big.tif", grey.astype(np.uint16) << 8))
        files.append(png_of_16_bits(tmp_path / "deep_colour.png", colour.astype(np.uint16) * 257, 2))
    monkeypatch.setattr(images, "_STRIP", 3000)
    camera, small = ((403, 301), (50, 37)) if tag == 1 else ((301, 403), (37, 50))
    for path in files:
        with open_image(path) as image:
            whole = eight_bits(image, camera).convert("RGB").resize(small, Image.Resampling.BILINEAR)
        with open_image(path) as image:
            shrunk = eight_bits(image, camera, (50, 37)).convert("RGB")
        off = np.abs(np.asarray(shrunk, np.float64) - np.asarray(whole))
        assert shrunk.size == small and off.mean() < 0.6 and off.max() <= 4, path


@pytest.mark.cases
@pytest.mark.parametrize("ending", ["jpg", "tif", "png"])
def test_an_orientation_tag_counts_where_only_so_the_size_is_the_cameras(tmp_path: Path, ending: str):
    exif, path = Image.Exif(), tmp_path / f"x.{ending}"
    for tag in (1, 3, 5, 6, 8):
        exif[0x0112] = tag
        Image.fromarray(GREY).save(path, exif=exif)
        assert image_size(path) == image_size(path, (64, 48)) == (64, 48)
        assert image_size(path, (48, 64)) == ((48, 64) if tag >= 5 else (64, 48))
        with open_image(path) as image:
            turned = np.asarray(eight_bits(image, (48, 64)))
        with open_image(path) as image:
            stored = np.asarray(eight_bits(image))
        expected = {5: GREY.T, 6: np.rot90(GREY, -1), 8: np.rot90(GREY)}.get(tag, GREY)
        for found, wanted in ((turned, expected), (stored, GREY)):
            assert found.shape == wanted.shape
            assert np.abs(found.astype(int) - wanted).mean() < (30 if ending == "jpg" else 1e-9)


@pytest.mark.cases
def test_frames_are_in_the_order_of_their_numbers_or_refused():
    def ordered(*names: str) -> list[str]:
        return [path.name for path in in_order([Path("d") / name for name in names])]

    plain = [f"{i}.jpg" for i in range(12)]
    assert ordered(*sorted(plain)) == plain
    assert ordered("f-10-left.png", "f-9-left.png") == ["f-9-left.png", "f-10-left.png"]
    assert ordered("b.jpg", "a.jpg") == ["a.jpg", "b.jpg"]
    assert ordered("1305.25.png", "1305.50.png", "1304.99.png") == ["1304.99.png", "1305.25.png", "1305.50.png"]
    for names in (
        ("a1_b10.jpg", "a1_b9.jpg", "a2_b9.jpg"),
        ("x9.jpg", "y.jpg", "x10.jpg"),
        ("1.jpg", "01.jpg", "10.jpg", "9.jpg"),
    ):
        with pytest.raises(ValueError, match=r"the order of the images in d is not certain: .*as many digits"):
            ordered(*names)


def with_exif(path, size, **notes):
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({getattr(ExifTags.Base, name).value: value for name, value in notes.items()})
    Image.new("RGB", size).save(path, exif=exif)
    return path


@pytest.mark.cases
def test_the_focal_length_of_a_photograph_is_in_its_exif(tmp_path):
    path, diagonal = tmp_path / "a.jpg", np.hypot(36, 24)
    assert exif_focal_length(with_exif(path, (400, 300), FocalLengthIn35mmFilm=26)) == pytest.approx(
        26 * 500 / diagonal
    )
    sensor = {"FocalLength": 5.4, "FocalPlaneXResolution": 1000.0, "FocalPlaneResolutionUnit": 3}  # a cm
    assert exif_focal_length(with_exif(path, (400, 300), **sensor)) == pytest.approx(540)
    shrunk = with_exif(path, (400, 300), **sensor, ExifImageWidth=800)  # since it was taken
    assert exif_focal_length(shrunk) == pytest.approx(270)
    inches = with_exif(path, (400, 300), FocalLength=25.4, FocalPlaneXResolution=300.0)
    assert exif_focal_length(inches) == pytest.approx(300)


@pytest.mark.cases
def test_notes_without_or_with_a_senseless_focal_length_are_ignored(tmp_path):
    path = tmp_path / "a.jpg"
    for notes in ({}, {"FocalLength": 5.4}, {"FocalLengthIn35mmFilm": 0}, {"FocalLengthIn35mmFilm": 65535}):
        assert exif_focal_length(with_exif(path, (400, 300), **notes)) is None
    sensor = {"FocalLength": 5.4, "FocalPlaneXResolution": 1000.0}
    for wrong in ({"FocalPlaneResolutionUnit": 77}, {"FocalPlaneXResolution": float("inf")}, {"FocalLength": -1.0}):
        assert exif_focal_length(with_exif(path, (400, 300), **(sensor | wrong))) is None
    whole = with_exif(path, (400, 300), FocalLengthIn35mmFilm=26).read_bytes()
    start, generator = whole.index(b"Exif"), np.random.default_rng(0)
    for _ in range(200):
        content = bytearray(whole)
        for at in generator.integers(start, start + 60, 4):
            content[at] = generator.integers(256)
        path.write_bytes(content)
        found = exif_focal_length(path)
        assert found is None or 0 < found < 1e6
