"""The documents hold together: links lead somewhere, and sections that the code names are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def headings(document: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_sections(document: Path):
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if not link.startswith("http"):
            name, _, section = link.partition("#")
            target = document.parent / name if name else document
            assert target.exists(), link
            assert not section or section in map(anchor, headings(target)), link


def test_sections_named_in_code_and_settings_exist():
    sections = {heading for document in DOCUMENTS for heading in headings(document)}
    files = [*ROOT.glob("gnnet/**/*.py"), *ROOT.glob("conf/**/*.yaml")]
    pattern = re.compile(r'(?:README|docs/\w+\.md) "([^"]+)"')
    named = {section for file in files for section in pattern.findall(file.read_text())}
    assert named and named <= sections


def test_the_two_commands_are_targets():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = {c for document in DOCUMENTS for c in re.findall(r"^make ([\w-]+)", document.read_text(), re.MULTILINE)}
    assert {"demo", "test", "lint", "test-fast", "hooks", "benchmarks"} <= commands <= set(targets)


def test_every_dataset_has_a_row_in_the_readme():
    table = re.findall(r"^\| `([a-z]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    options = {path.stem for path in (ROOT / "conf" / "dataset").glob("*.yaml")}
    assert table and options - {"toy"} == set(table)
