"""The import graph of gnnet, and the rules it keeps: `python -m tests.walls` prints both.

Imports are read from the source, so that those inside functions and under `TYPE_CHECKING` count too.
The exit status is 1 if a rule is broken.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]

# The rooms, the highest floor first. A module imports from its own floor and from those below.
FLOORS = (
    ("entry points",),  # train.py, evaluate.py, and each `__main__.py` that only calls a `main`
    ("training",),
    ("evaluation",),
    ("localization",),
    ("losses",),
    ("data",),
    ("toy",),
    ("scenes",),
    ("models",),
    ("geometry",),
    ("files", "arrays", "sampling", "progress", "processes", "colmap", "gnnet"),
)
HEIGHT = {room: -floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SCRIPTS = ("train", "evaluate")

# Slow or optional packages: a function may import them, on a line with a comment.
SLOW = {
    "h5py", "kornia", "matplotlib", "pycolmap", "scipy", "torchvision", "jinja2", "wandb", "wandb_workspaces", "faiss",
    "gnnet.colmap",
}  # fmt: skip

# Which modules may import a package at all; a room or a module stands for all below it.
ALLOWED = {
    "hydra": SCRIPTS,
    # `inspect.command` reads `--set KEY=VALUE` as Hydra does; a sweep names the folders of jobs in other processes
    "omegaconf": (*SCRIPTS, "gnnet.evaluation.inspect.command", "gnnet.training.sweep"),
    "pytorch_lightning": (*SCRIPTS, "gnnet.training", "gnnet.data.datamodule"),
    "lightning": (),
}

# Packages that only training needs: nothing that `gnnet.localization` imports, directly or not, may load one.
TRAINING_PACKAGES = frozenset(
    ["pytorch_lightning", "lightning", "hydra", "omegaconf", "wandb", "h5py", "matplotlib", "jinja2", "torchmetrics"]
)


class Import(NamedTuple):
    """One imported module: by whom, where, and how."""

    importer: str
    target: str
    line: int
    hidden: bool
    commented: bool

    @property
    def package(self) -> str:
        """Top-level package of the target."""
        return self.target.partition(".")[0]


@cache
def modules() -> dict[str, Path]:
    """Every module of gnnet and the two scripts: name → file."""
    found = {script: ROOT / f"{script}.py" for script in SCRIPTS}
    for path in sorted((ROOT / "gnnet").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> tuple[Import, ...]:
    """Every import of every module, in the order of the source."""
    return tuple(i for name, path in modules().items() for i in imports_of(name, path.read_text(), set(modules())))


def imports_of(importer: str, source: str, known: set[str]) -> Iterator[Import]:
    """Imports in the source of one module; `from package import module` names the module if it is in `known`."""
    lines = source.splitlines()
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    hidden = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{importer}, line {node.lineno}: relative import; expected the full name")
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [name if name in known else str(node.module) for name in names]
        else:
            continue
        commented = any("#" in line for line in lines[node.lineno - 1 : node.end_lineno])
        for target in dict.fromkeys(targets):
            yield Import(importer, target, node.lineno, id(node) in hidden, commented)


@cache
def room(module: str) -> str:
    """Room of a module of gnnet or of a script."""
    if module in SCRIPTS or (module.endswith(".__main__") and is_entry_point(modules()[module].read_text())):
        return "entry points"
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def is_entry_point(source: str) -> bool:
    """Whether a `__main__.py` holds imports and the call under `if __name__ == "__main__"`, and nothing else."""
    docstring, *body = ast.parse(source).body
    *first, last = [docstring, *body] if not isinstance(docstring, ast.Expr) else body
    return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in first) and (
        isinstance(last, ast.Expr) or (isinstance(last, ast.If) and len(last.body) == 1)
    )


def inner_imports() -> list[Import]:
    """Imports of one module of gnnet, or a script, by another."""
    return [i for i in imports() if i.target in modules() and i.target != i.importer]


def room_counts() -> Counter[tuple[str, str]]:
    """Number of imports from room to room."""
    return Counter((room(i.importer), room(i.target)) for i in inner_imports())


def unknown_rooms() -> list[str]:
    """Modules that stand on no floor."""
    return [f"{m} stands on no floor: {room(m)} is not in FLOORS" for m in modules() if room(m) not in HEIGHT]


def missing_modules() -> list[str]:
    """Imports of a module of gnnet that does not exist."""
    return [
        f"{i.importer} imports {i.target}, which does not exist"
        for i in imports()
        if i.package in ("gnnet", *SCRIPTS) and i.target not in modules()
    ]


def upward_imports() -> list[str]:
    """Imports from a higher floor."""
    return [
        f"{i.importer} imports {i.target}, which stands higher"
        for i in inner_imports()
        if HEIGHT.get(room(i.target), 0) > HEIGHT.get(room(i.importer), 0)
    ]


def circles() -> list[str]:
    """Groups of modules that import each other, directly or through others."""
    graph: dict[str, set[str]] = {m: set() for m in modules()}
    for i in inner_imports():
        graph[i.importer].add(i.target)
    reach = {m: _reachable(m, graph) for m in graph}
    groups = {frozenset(n for n in reach[m] if m in reach[n]) for m in graph if m in reach[m]}
    return sorted("circle: " + ", ".join(sorted(group)) for group in groups)


def _reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(graph[module])
    return seen


def foreign_imports_of_geometry() -> list[str]:
    """What `geometry` imports beside torch, the standard library and itself."""
    own = {"torch", *sys.stdlib_module_names}
    return [
        f"{i.importer} imports {i.target}; geometry imports torch alone"
        for i in imports()
        if room(i.importer) == "geometry" and i.package not in own and not i.target.startswith("gnnet.geometry")
    ]


def hidden_imports() -> list[str]:
    """Imports inside functions without a reason: of a package that is not in `SLOW`, or without a comment."""
    found = []
    for i in imports():
        if i.hidden and not {i.package, i.target} & SLOW:
            found.append(f"{i.importer} imports {i.target} inside a function; only slow packages may be")
        elif i.hidden and not i.commented:
            found.append(f"{i.importer} imports {i.target} inside a function, with no comment that says why")
    return list(dict.fromkeys(found))


def strangers() -> list[str]:
    """Imports of a package by a module that is not among those allowed to know it."""
    return [
        f"{i.importer} imports {i.package}; only {', '.join(ALLOWED[i.package]) or 'nothing'} may"
        for i in imports()
        if i.package in ALLOWED and not _within(i.importer, ALLOWED[i.package])
    ]


def _within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


RULES = (
    unknown_rooms,
    missing_modules,
    upward_imports,
    circles,
    foreign_imports_of_geometry,
    hidden_imports,
    strangers,
)


def violations() -> list[str]:
    """Every broken rule, a line each."""
    return [line for rule in RULES for line in rule()]


def main() -> int:
    """Print the graph and the broken rules; 1 if there are any."""
    table = Table(title="Imports from room to room", title_justify="left")
    for column in ("room", "modules", "imports"):
        table.add_column(column, justify="right" if column == "modules" else "left")
    counts, sizes = room_counts(), Counter(room(m) for m in modules())
    for importer in HEIGHT:
        targets = ((target, counts[importer, target]) for target in HEIGHT)
        table.add_row(importer, str(sizes[importer]), "  ".join(f"{t} {n}" for t, n in targets if n))
    console = Console(width=160)
    console.print(table)
    found = violations()
    for line in found:
        console.print(f"broken: {line}", soft_wrap=True, highlight=False)
    console.print(f"{len(modules())} modules, {len(inner_imports())} imports among them, {len(found)} broken rules")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
