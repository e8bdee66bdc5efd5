"""The layers of the package, torch's place in it, and the size of files and functions: read from the source."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "graphpart"

LAYERS = (
    ("errors",),
    ("ir",),
    ("rules",),
    ("cost", "lower", "order", "draw"),
    ("trace", "simulator"),
    ("strategies", "runtime"),
    ("planning",),
    ("module",),
    ("api",),
    ("cli",),
    ("__main__",),
)
"""A room imports rooms of the layers above it only, and itself."""

SUB_ROOMS = {
    "cost": ("devices", "time", "memory"),
    "draw": ("words", "picture", "timeline"),
    "lower": ("rewrites",),
    "rules": ("families", "local"),
    "runtime": ("kernels", "device", "executors", "parameters"),
    "strategies": ("cuts", "memory", "stages", "by_hand"),
    "trace": ("derivatives", "dynamo"),
}
"""A sub-room imports those before it only, and files of the room that import no sub-room after it."""

LAZY = {("ir", "draw")}
"""Imports inside a function that go the other way: a ``Timeline`` shows itself (``draw``, ``save_trace``, ``compare``,
``print``) by what ``draw`` does.
"""

MOST_LAYERS = 11
MOST_FILES_OF_A_ROOM = 18

TORCH = {"trace", "runtime", "module", "api", "cli"}
"""Parts that may import torch."""

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        module: full name of the importing module.
        target: full name of what is imported, as far as it is a module.
        line: where.
        kind: ``start`` if it is imported with the module, ``function`` if later, ``types`` if for type checkers only.
    """

    module: str
    target: str
    line: int
    kind: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str) -> Iterator[Import]:
    def walk(node: ast.AST, kind: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, alias.name, child.lineno, kind)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno}: a relative import"
                for alias in child.names:
                    inner = f"{child.module}.{alias.name}"
                    yield Import(module, inner if inner in SOURCES else str(child.module), child.lineno, kind)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from walk(child, "types")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from walk(child, "function" if kind == "start" else kind)
            else:
                yield from walk(child, kind)

    yield from walk(ast.parse(SOURCES[module].read_text(encoding="utf-8")), "start")


@functools.cache
def all_imports() -> list[Import]:
    """Read when a test asks: every process that runs tests imports this file."""
    return [found for module in SOURCES for found in imports_of(module)]


def own_imports() -> list[Import]:
    """Imports within the package; the face, ``graphpart/__init__.py``, may name anything."""
    return [i for i in all_imports() if i.target.split(".")[0] == "graphpart" and i.module != "graphpart"]


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def layer(name: str) -> int:
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert found, f"graphpart.{name} has no layer; give it one in tests/test_layers.py"
    return found[0]


def test_every_part_has_a_layer() -> None:
    for module in SOURCES:
        if module != "graphpart":
            layer(part(module))


def test_layers_import_only_those_before_them() -> None:
    wrong = []
    for found in own_imports():
        ours, theirs = part(found.module), part(found.target)
        if not theirs:
            wrong.append(f"{found}: import the name from where it is made")
        elif ours != theirs and layer(theirs) >= layer(ours) and not ((ours, theirs) in LAZY and found.kind != "start"):
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_there_are_few_layers() -> None:
    assert len(LAYERS) <= MOST_LAYERS


def test_the_documentation_says_what_is_there() -> None:
    lines = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    found = [(int(number), room.strip("`"), tuple(re.findall(r"`(\w+)`", inner))) for number, room, inner, _ in rows]
    expected = [(n, room, SUB_ROOMS.get(room, ())) for n, rooms in enumerate(LAYERS, 1) for room in rooms]
    assert found == expected


def sub_room(module: str) -> str:
    """The sub-room that a module is in, or the file itself where it lies in the room; "" for the room's face."""
    parts = module.split(".")
    return parts[2] if len(parts) > 2 else ""


def test_sub_rooms_are_listed() -> None:
    found: dict[str, set[str]] = {}
    for path in SOURCES.values():
        folder = path.parent.relative_to(PACKAGE).parts
        assert len(folder) <= 2, f"{path.relative_to(ROOT)} lies too deep"
        if len(folder) == 2:
            found.setdefault(folder[0], set()).add(folder[1])
    assert found == {room: set(names) for room, names in SUB_ROOMS.items()}


@pytest.mark.parametrize("room", SUB_ROOMS)
def test_sub_rooms_import_only_those_before_them(room: str) -> None:
    arrows: dict[str, set[str]] = {name: set() for name in SUB_ROOMS[room]}
    wrong = []
    for found in own_imports():
        if part(found.module) != room or part(found.target) != room or found.kind == "types":
            continue
        ours, theirs = sub_room(found.module), sub_room(found.target)
        if not ours or ours == theirs:
            continue
        if not theirs:
            wrong.append(f"{found}: import the name from where it is made")
        arrows.setdefault(ours, set()).add(theirs)
        if ours in SUB_ROOMS[room] and theirs in SUB_ROOMS[room][SUB_ROOMS[room].index(ours) :]:
            wrong.append(str(found))
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        wrong.append(f"{room}: " + " ← ".join(error.args[1]))
    assert not wrong, "\n".join(wrong)


def test_rooms_stay_small() -> None:
    num_files = Counter(path.parent.relative_to(ROOT) for path in SOURCES.values())
    wrong = [
        f"{room} has {n} files; at most {MOST_FILES_OF_A_ROOM}"
        for room, n in num_files.items()
        if n > MOST_FILES_OF_A_ROOM
    ]
    assert not wrong, "\n".join(wrong)


def test_strategies_do_not_import_one_another() -> None:
    registry = "graphpart.strategies.registry"
    strategies = {i.target for i in own_imports() if i.module == registry and part(i.target) == "strategies"}
    strategies = {name for name in strategies if sub_room(name) not in SUB_ROOMS["strategies"]}
    strategies.add("graphpart.strategies.by_hand.place")
    assert {"graphpart.strategies.layer", "graphpart.strategies.single"} <= strategies
    meant_to = {registry, "graphpart.strategies.auto", "graphpart.strategies"}
    inside = [i for i in own_imports() if part(i.module) == "strategies" and i.module not in meant_to]
    wrong = [str(i) for i in inside if i.target in strategies | meant_to]
    assert not wrong, "\n".join(wrong)


def test_modules_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in SOURCES}
    for found in all_imports():
        if found.kind == "start" and found.target in SOURCES and found.target != found.module:
            graph[found.module].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" ← ".join(error.args[1]))


def test_torch_is_imported_only_where_tensors_are() -> None:
    wrong = [str(i) for i in all_imports() if i.target.split(".")[0] == "torch" and part(i.module) not in TORCH]
    assert not wrong, "\n".join(wrong)


def test_importing_loads_no_torch() -> None:
    """One after the other in one process; the first that loads torch is named."""
    modules = ["graphpart", *sorted({f"graphpart.{part(m)}" for m in SOURCES if part(m) and part(m) not in TORCH})]
    program = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    found = [name for name in sys.modules if name.split(".")[0] == "torch"]
    assert not found, f"import {{module}} loads {{found[:5]}}"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_partition_is_the_function_whatever_was_imported_first() -> None:
    program = """
import graphpart as gp
import graphpart.strategies.layer
assert callable(gp.partition), gp.partition
import graphpart.api
from graphpart import partition
assert partition is gp.partition is graphpart.api.partition
from graphpart.strategies import STRATEGIES
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_files_and_functions_stay_short() -> None:
    wrong = []
    extra = [*(ROOT / "examples").glob("*.py"), *(ROOT / "viz").glob("*.py")]
    for path in [*SOURCES.values(), *extra]:
        text = path.read_text(encoding="utf-8")
        lines, name = len(text.splitlines()), path.relative_to(ROOT)
        if lines > MOST_LINES_OF_A_FILE:
            wrong.append(f"{name} has {lines} lines; at most {MOST_LINES_OF_A_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = code_lines(node)
                if length > MOST_LINES_OF_A_FUNCTION:
                    wrong.append(
                        f"{name}:{node.lineno} {node.name} has {length} lines; at most {MOST_LINES_OF_A_FUNCTION}"
                    )
    assert not wrong, "\n".join(wrong)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, its docstring left out."""
    body = function.body
    if (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        body = body[1:]
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_the_face_names_what_exists() -> None:
    import graphpart

    for name in graphpart.__all__:
        assert getattr(graphpart, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = graphpart.nothing


def test_no_class_has_the_name_of_another() -> None:
    places: dict[str, list[str]] = {}
    for module in SOURCES:
        for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}
