"""The rooms of the package: checks in the source which room imports which."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_cld

PACKAGE = Path(lightning_cld.__file__).parent
WINGS = {"functional", "storage", "data", "recording", "showing"}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")

# What each wing and each public file may import from the package, besides itself. Anything else points upwards.
MAY_IMPORT = {
    "functional": set(),
    "storage": set(),
    "guards": set(),
    "names": set(),
    "data": {"functional", "guards", "names"},
    "scores": {"functional", "storage", "data", "names"},
    "trajectories": {"functional", "storage", "data", "names", "scores"},
    "baselines": {"functional", "trajectories", "scores"},
    "showing": {"functional", "data", "guards", "names", "scores", "trajectories", "plotting"},
    "plotting": {"functional", "showing", "scores", "trajectories"},
    "recording": {"functional", "storage", "data", "guards", "names", "scores", "trajectories", "plotting"},
    "metric": {"functional", "storage", "scores"},
    "datamodule": {"functional", "data", "names", "scores"},
    "callback": {"functional", "guards", "recording", "scores", "trajectories"},
    "checkpoints": {"guards", "recording", "trajectories"},
}
# `showing` imports `scores`, so `scores` may import it only inside a function.
LATE = {("scores", "showing")}


def room_of(module: str) -> str:
    """The wing or public file of `lightning_cld.x.y`."""
    return module.split(".")[1]


def module_of(file: Path) -> str:
    return ".".join(["lightning_cld", *file.with_suffix("").parts])


def imports(file: Path, *, late: bool) -> set[str]:
    """The modules that a file imports at its top, or `late` inside functions, without imports for type checkers."""
    tree = ast.parse((PACKAGE / file).read_text())
    nodes = list(tree.body)
    if late:
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        nodes = [node for function in functions for node in ast.walk(function)]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            # `from lightning_cld import plotting` names the module after `import`.
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "lightning_cld"
                else {str(node.module)}
            )
    return found


def test_every_file_is_in_a_room():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == WINGS
    assert {room_of(module_of(file)) for file in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_arrows_lead_downwards(file):
    own = room_of(module_of(file))
    ours = {room_of(module) for module in imports(file, late=False) if module.startswith("lightning_cld.")}
    assert ours <= MAY_IMPORT[own] | {own}
    late = {room_of(module) for module in imports(file, late=True) if module.startswith("lightning_cld.")}
    assert {(own, room) for room in late} <= LATE


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] == "functional"], ids=str)
def test_functional_needs_torch_alone(file):
    packages = {module.split(".")[0] for module in imports(file, late=False) | imports(file, late=True)}
    assert packages - sys.stdlib_module_names <= {"torch", "lightning_cld"}


def test_no_files_import_each_other_in_a_ring():
    graph = {
        module_of(file): {module for module in imports(file, late=False) if module.startswith("lightning_cld.")}
        for file in FILES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a ring: {' -> '.join(error.args[1])}")
