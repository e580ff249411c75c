"""VisualSFM's NVM files."""

from __future__ import annotations

import pytest
import torch

from gnnet.geometry.camera import Camera
from gnnet.scenes.formats.nvm import read_nvm
from gnnet.scenes.problems import BadInput

CAMERA = Camera.from_colmap("PINHOLE", 64, 48, (50.0, 50.0, 32.0, 24.0), dtype=torch.float64)
TEXT = "NVM_V3\n\n1\nä.jpg 400 1 0 0 0 1 2 3 0 0\n\n1\n1 2 5 0 0 0 1 0 0 1 1\n"


@pytest.mark.cases
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_of_any_encoding_is_read(tmp_path, encoding, end):
    (tmp_path / "a.nvm").write_bytes(TEXT.replace("\n", end).encode(encoding))
    model = read_nvm(tmp_path / "a.nvm", lambda name, source: (name, CAMERA), BadInput())
    assert [image.name for image in model.images] == ["ä.jpg"] and len(model.points) == 1


@pytest.mark.cases
def test_a_cut_character_of_utf16_is_named(tmp_path):
    (tmp_path / "a.nvm").write_bytes(TEXT.encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"a\.nvm is damaged"):
        read_nvm(tmp_path / "a.nvm", lambda name, source: (name, CAMERA), BadInput())


def test_signs_that_count_as_space_do_not_matter(tmp_path):
    (tmp_path / "a.nvm").write_text(TEXT.replace("\n1\n", "\n\x1c1\n"))
    assert len(read_nvm(tmp_path / "a.nvm", lambda name, source: (name, CAMERA), BadInput()).points) == 1
