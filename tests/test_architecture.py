"""The shape of the tree: imports point down only, and a few habits that a reader cannot be asked to police."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import gemini
from gemini import errors

ROOT = Path(__file__).parent.parent
LIBRARY = ("gemini", "zero")
PROGRAMS = ("examples", "benchmarks")
MAX_MODULE_LINES = 500
MAX_METHODS = 12
WITH_MORE_METHODS = {
    "GeminiDDP": "the face of an engine: what users do with one",
    "RuntimeEvents": "a protocol: each event that hooks report",
    "Passes": "answers RuntimeEvents",
    "_Events": "answers RuntimeEvents",
    "Gradients": "a protocol: the interface between backward and update",
    "GradientStore": "is Gradients and DirectGradients",
    "ShardedGradients": "is Gradients",
    "Weight": "a protocol: what a parameter's class asks of its weight",
    "ParamWeight": "is Weight",
    "ChunkCore": "the moves of chunks: holds, fetches, evictions, and their reservation for an update",
    "UpdateSchedule": "every moment at which an update begins, counts, is dropped or is waited for",
    "TiledHome": "one home, tile by tile",
    "LeaseManager": "answers each message about leases",
    "SharedChunkManager": "answers each message about shared chunks",
}
"""Classes that have more public methods than a class should, and why."""

FLOORS = (
    ("examples", "benchmarks"),
    ("__main__", "cli"),
    ("__init__", "recipe"),
    ("zero", "integrations", "pretrained_model"),
    ("ddp",),
    ("planning", "pretrained"),
    ("observe", "assembly", "optimizer", "checkpoint"),
    ("weights",),
    ("runtime",),
    ("commits",),
    ("update",),
    ("gradients",),
    ("chunk",),
    ("slicing", "ranks", "files"),
    ("offload",),
    ("config", "nn"),
    ("config_deepspeed", "placement", "profile", "autograd", "service"),
    ("kernels", "heap", "tiers", "model"),
    ("errors", "_native"),
)
"""The rooms, top to bottom: packages of gemini, and modules at its root. A module may import from its own room and from
floors below, whether it does so when it is imported, in a function or for type checkers only."""

OFFERED_LATER = "gemini.__init__"
"""Imports what it offers when that is first used; the modules below it may import it, which loads errors only."""


@dataclass(frozen=True)
class Import:
    """One import statement's target."""

    source: str
    target: str
    line: int
    runs_at_import: bool
    """Whether it is executed when the module is imported: not inside a function, not for type checking only."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def library_files() -> list[Path]:
    return [path for top in LIBRARY for path in sorted((ROOT / top).rglob("*.py"))]


@cache
def modules() -> dict[str, Path]:
    """All modules by dotted name; a package is its __init__."""
    files = [path for top in LIBRARY + PROGRAMS for path in sorted((ROOT / top).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def resolve(name: str) -> str:
    """Return our module that a dotted name means; other people's names are returned as they are."""
    if name == "gemini._native" or name.startswith("gemini._native."):
        return "gemini._native"
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for module in (prefix, f"{prefix}.__init__"):
            if module in modules():
                return module
    return name


def imports_of(module: str) -> Iterator[Import]:
    yield from _imports_in(module, parsed(modules()[module]).body, runs_at_import=True)


def _imports_in(module: str, body: list[ast.stmt], *, runs_at_import: bool) -> Iterator[Import]:
    for node in body:
        runs_inside = runs_at_import and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            runs_inside = False
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            yield Import(module, resolve(name), node.lineno, runs_inside)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                yield from _imports_in(module, [child], runs_at_import=runs_inside)
            elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
                yield from _imports_in(module, child.body, runs_at_import=runs_inside)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    package = module.split(".")[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room_of(module: str) -> str:
    """Return the room of one of our modules."""
    top, *inside = module.split(".")
    return inside[0] if top == "gemini" else top


def floor_of(module: str) -> int:
    """Return the number of a module's floor, from the top; a room without a floor is an error."""
    (floor,) = [number for number, floor in enumerate(FLOORS) if room_of(module) in floor]
    return floor


def is_ours(module: str) -> bool:
    return module.split(".")[0] in LIBRARY + PROGRAMS


def is_allowed(each: Import) -> bool:
    if not is_ours(each.target) or each.target == OFFERED_LATER:
        return True
    if each.source == OFFERED_LATER and not each.runs_at_import:
        return True
    return room_of(each.source) == room_of(each.target) or floor_of(each.source) < floor_of(each.target)


@cache
def reachable(module: str) -> dict[str, Import | None]:
    """All modules that importing this one imports, each with the import that led there."""
    found: dict[str, Import | None] = {module: None}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        for each in imports_of(current) if current in modules() else ():
            if each.runs_at_import and each.target not in found:
                found[each.target] = each
                waiting.append(each.target)
    return found


@cache
def reachable_ever(module: str) -> set[str]:
    """Return all of our modules that this one may ever import: in functions and for type checkers too."""
    found, waiting = {module}, [module]
    while waiting:
        current = waiting.pop()
        for each in imports_of(current) if current in modules() and current != OFFERED_LATER else ():
            if each.target not in found:
                found.add(each.target)
                waiting.append(each.target)
    return found


def calls_in(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def named(paths_and_lines: Iterator[tuple[Path, int]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line}" for path, line in paths_and_lines]


def test_imports_point_down() -> None:
    refused = [str(each) for module in modules() for each in imports_of(module) if not is_allowed(each)]
    assert refused == []


def test_the_page_on_architecture_says_what_each_room_imports() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"^\*\*(\w+)\.\*\* .*?^\*Imports\* (.*?)\.$", page, re.MULTILINE | re.DOTALL))
    found: dict[str, set[str]] = {room: set() for room in said}
    for module in modules():
        for each in imports_of(module):
            if room_of(module) in said and is_ours(each.target) and each.target != OFFERED_LATER:
                found[room_of(module)].add(room_of(each.target))
    wrong = {
        room: ", ".join(sorted(rooms - {room, "errors", "_native"})) or "nothing"
        for room, rooms in found.items()
        if (", ".join(sorted(rooms - {room, "errors", "_native"})) or "nothing") != said[room]
    }
    assert wrong == {}
    packages = {path.name for path in (ROOT / "gemini").iterdir() if (path / "__init__.py").exists()}
    assert packages <= set(said)


def test_the_root_of_gemini_holds_faces_and_leaves_only() -> None:
    assert {path.stem for path in (ROOT / "gemini").glob("*.py")} == {
        *(
            "__init__",
            "__main__",
            "config",
            "config_deepspeed",
            "ddp",
            "errors",
            "optimizer",
            "pretrained_model",
            "tiers",
        )
    }


def test_no_module_imports_itself_in_a_circle() -> None:
    circles = [
        str(each)
        for module in modules()
        for each in imports_of(module)
        if each.target not in (module, OFFERED_LATER) and module in reachable_ever(each.target)
    ]
    assert circles == []


def test_importing_gemini_loads_nothing_but_its_errors() -> None:
    assert set(filter(is_ours, reachable("gemini.__init__"))) == {"gemini.__init__", "gemini.errors"}


def test_what_gemini_offers_needs_no_integration() -> None:
    offered = {f"gemini.{name}" for name in ("nn.__init__", "chunk.manager")} | set(gemini._NAMES_OF_MODULE)
    found = {target for module in offered for target in reachable(resolve(module))}
    assert "gemini.ddp" in found
    assert not [module for module in found if is_within(module, "gemini.integrations")]


def test_every_name_that_gemini_offers_is_there() -> None:
    assert set(gemini._MODULE_OF_NAME) == {name for name in gemini.__all__ if not hasattr(errors, name)}
    assert [name for name in [*gemini.__all__, "nn"] if not hasattr(gemini, name)] == []


def test_the_memory_service_needs_no_torch() -> None:
    service = [module for module in modules() if is_within(module, "gemini.service")]
    assert service
    assert not [module for module in service for target in reachable(module) if target.split(".")[0] == "torch"]


def test_deciding_placement_needs_no_torch() -> None:
    placement = [module for module in modules() if is_within(module, "gemini.placement")]
    with_torch = [
        str(each)
        for module in placement
        for target, each in reachable(module).items()
        if target.split(".")[0] in ("torch", "triton")
    ]
    assert placement
    assert with_torch == []


def test_only_kernels_and_offload_touch_the_compiled_module() -> None:
    users = {each.source for module in modules() for each in imports_of(module) if each.target == "gemini._native"}
    assert {user for user in users if not user.startswith(("gemini.kernels.", "gemini.offload."))} == set()


@pytest.mark.parametrize("call", ["print", "logging.basicConfig", "os.getenv", "os.putenv", "getenv", "basicConfig"])
def test_the_library_never_calls(call: str) -> None:
    found = ((path, line) for path in library_files() for line, name in calls_in(path) if name == call)
    assert named(found) == []


def test_the_library_but_for_its_command_line_reads_no_environment_variables() -> None:
    found = (
        (path, node.lineno)
        for path in library_files()
        if ROOT / "gemini" / "cli" not in path.parents
        for node in ast.walk(parsed(path))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ")
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and "environ" in [n.name for n in node.names])
    )
    assert named(found) == []


def test_every_package_says_what_it_exports() -> None:
    without = [
        str(path.relative_to(ROOT))
        for path in library_files()
        if path.name == "__init__.py" and "__all__" not in _assigned_names(parsed(path))
    ]
    assert without == []


def _assigned_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_every_folder_of_the_library_is_a_package() -> None:
    folders = {path.parent for path in library_files()}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_modules_stay_short_enough_to_read() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in library_files()}
    too_long = {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > MAX_MODULE_LINES}
    assert too_long == {}


def test_classes_have_few_methods_or_a_reason() -> None:
    found = {
        node.name
        for path in library_files()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and len(list(_public_methods(node))) > MAX_METHODS
    }
    assert found == set(WITH_MORE_METHODS)


def _public_methods(node: ast.ClassDef) -> Iterator[str]:
    for member in node.body:
        if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)) and not member.name.startswith("_"):
            decorators = " ".join(map(ast.unparse, member.decorator_list))
            if "property" not in decorators and "setter" not in decorators:
                yield member.name
