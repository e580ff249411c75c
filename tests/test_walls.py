"""The rooms of gnnet keep to their floors; see `tests.walls` for the rules."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import walls

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("rule", walls.RULES, ids=lambda rule: rule.__name__)
def test_rule_is_kept(rule: Callable[[], list[str]]):
    assert rule() == []


def test_every_module_and_floor_is_seen():
    assert {"train", "evaluate", "gnnet", "gnnet.geometry.pose", "gnnet.scenes.__main__"} <= set(walls.modules())
    rooms = {walls.room(module) for module in walls.modules()}
    assert rooms == set(walls.HEIGHT), "a floor of the plan has no module, or a module no floor"
    assert walls.room("gnnet.scenes.__main__") == "entry points"


@pytest.mark.slow
def test_localization_loads_no_training_package():
    """What a robot imports: every module of `gnnet.localization`, in a process of its own."""
    code = (
        "import gnnet.localization as room, importlib, pkgutil, sys\n"
        "for module in pkgutil.walk_packages(room.__path__, room.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch" in loaded.stdout.split()
    assert walls.TRAINING_PACKAGES & set(loaded.stdout.split()) == set()


SOURCE = '''
"""A module."""
from __future__ import annotations
from typing import TYPE_CHECKING
from gnnet.geometry import pose, Nothing
if TYPE_CHECKING:
    import gnnet.data.pairs

class Thing:
    def act(self):
        import pycolmap  # slow to import
        from gnnet.losses import (
            term,
        )
'''


def test_imports_are_read_in_functions_and_under_type_checking():
    known = {"gnnet.geometry.pose", "gnnet.losses.term"}
    found = {i.target: (i.hidden, i.commented) for i in walls.imports_of("gnnet.models.new", SOURCE, known)}
    assert found["gnnet.geometry.pose"] == (False, False)
    assert found["gnnet.geometry"] == (False, False)  # `Nothing` is no module: a name of the package
    assert found["gnnet.data.pairs"] == (False, False)
    assert found["pycolmap"] == (True, True)
    assert found["gnnet.losses.term"] == (True, False)


def test_rules_find_what_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    files = {
        "gnnet.geometry.new": "import numpy\nimport hydra\nfrom gnnet.models import new\n",
        "gnnet.models.new": "import pytorch_lightning\nfrom gnnet.geometry import new\n",
        "gnnet.scenes.new": "def f():\n    import gnnet.geometry.new\n    import pycolmap\n    import gnnet.gone\n",
        "gnnet.attic.new": "",
    }
    paths = {name: tmp_path / f"{name}.py" for name in files}
    for name, source in files.items():
        paths[name].write_text(source)
    monkeypatch.setattr(walls, "modules", lambda: paths)
    monkeypatch.setattr(walls, "imports", walls.imports.__wrapped__)
    assert walls.upward_imports() == ["gnnet.geometry.new imports gnnet.models.new, which stands higher"]
    assert walls.circles() == ["circle: gnnet.geometry.new, gnnet.models.new"]
    assert len(walls.foreign_imports_of_geometry()) == 3  # numpy, hydra and another room
    assert len(walls.hidden_imports()) == 3
    assert [line.split(";")[0] for line in walls.strangers()] == [
        "gnnet.geometry.new imports hydra",
        "gnnet.models.new imports pytorch_lightning",
    ]
    assert walls.missing_modules() == ["gnnet.scenes.new imports gnnet.gone, which does not exist"]
    assert walls.unknown_rooms() == ["gnnet.attic.new stands on no floor: attic is not in FLOORS"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""Text."""\nimport sys\nfrom a import main\nif __name__ == "__main__":\n    sys.exit(main())', True),
        ("from a import main\nmain()", True),
        ("from a import main\nx = 1\nmain(x)", False),
        ("def main():\n    pass\nmain()", False),
    ],
)
def test_an_entry_point_only_calls(source: str, expected: bool):
    assert walls.is_entry_point(source) is expected


def test_command_prints_the_graph(capsys: pytest.CaptureFixture[str]):
    assert walls.main() == 0
    out = capsys.readouterr().out
    assert "geometry" in out and "broken rules" in out and "BROKEN" not in out
