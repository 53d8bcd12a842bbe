"""The floors of the package: what a folder may import, and that no two modules need each other."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import lsiq

PACKAGE = Path(lsiq.__file__).parent
# From the ground up; docs/architecture.md draws them. The package itself holds only names of what lies in its folders.
FLOORS = [
    {"errors", "assets", "__version__"},
    {"settings"},
    {"runtime"},
    {"formats", "linalg", "data"},
    {"kernels", "bundle"},
    {"models"},
    {"calib", "results"},
    {"parts", "evals", "track"},
    {"learning", "report"},
    {"methods"},
    {"pipeline", "export", "allocation"},
    {"experiment"},
    {"sweeps", "bench", "tables"},
    {"cli"},
    {"api"},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}

# What chooses codes, for formats of any kind.
QUANTISING = {"methods", "parts", "learning"}


def imports(file: Path, types: bool = True) -> Iterator[str]:
    """The modules of the package that a file imports, inside functions as well, and for `types` alone if asked for."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if not types:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "lsiq")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lsiq":
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from (path if is_module(path) else f"{node.module}" for path in names.values())
            yield from ("lsiq.__version__" for name in names if name == "__version__")


def is_module(path: str) -> bool:
    place = PACKAGE.parent / path.replace(".", "/")
    return place.with_suffix(".py").is_file() or place.is_dir()


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    return module.split(".")[1]


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"}
GRAPH = {module: set(imports(file)) - {"lsiq"} for module, file in FILES.items()}


def test_every_folder_has_a_floor() -> None:
    assert {room(module) for module in GRAPH} == set(FLOOR) - {"__version__"}


def test_nothing_imports_from_a_floor_above_or_from_a_neighbour() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, several in GRAPH.items()
        for imported in sorted(several)
        if room(imported) != room(module) and FLOOR[room(imported)] >= FLOOR[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_need_each_other() -> None:
    """Inside a folder, settings and what computes with them may name each other's types."""
    graph = {module: {name for name in imports(file, types=False) if name != "lsiq"} for module, file in FILES.items()}
    for module, file in FILES.items():
        if file.name == "__init__.py":  # a folder may pass on names of its own modules
            graph[module] = {name for name in graph[module] if not name.startswith(f"{module}.")}
    graphlib.TopologicalSorter(graph).prepare()


def test_what_quantises_knows_no_number_format_by_name() -> None:
    """Methods, parts and the learner take any format: they import what formats have in common, never one of them."""
    common = {"base", "factors", "grid", "low_rank", "quant", "rounding", "tensor"}
    kinds = {f"lsiq.formats.{file.stem}" for file in (PACKAGE / "formats").glob("*.py") if file.stem not in common}
    assert {"lsiq.formats.integer", "lsiq.formats.mxint"} < kinds
    named = {module: kinds & imported for module, imported in GRAPH.items() if room(module) in QUANTISING}
    assert not {module: formats for module, formats in named.items() if formats}
