"""The order of the rooms, who may import torch and Megatron, and sizes of files and functions."""

import ast
import graphlib
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_rl"

LEVELS = {
    # errors and records are the ground of level 0, which files and config stand on
    **dict.fromkeys(("records", "errors"), 0.0),
    "files": 0.2,
    "families": 0.3,
    "catalogue": 0.4,
    "paths": 0.2,
    "config": 0.5,
    **dict.fromkeys(("rewards", "algorithms", "device", "parallel"), 1),
    **dict.fromkeys(("data", "observe", "router"), 2),
    "report": 2.5,
    "extend": 1.5,
    "models": 3,
    "optimizers": 3.5,
    "checkpoint": 4,
    "weights": 5,
    "rollout": 6,
    "policy": 7,
    "tasks": 7.2,
    "run": 7.4,
    "arguments": 7.5,
    "study": 7.6,
    "cli": 8,
    "__main__": 9,
}

#: Files and folders (with a final slash) that may import Megatron.
MEGATRON = (
    "device/megatron_on_cpu.py",
    "parallel/groups.py",
    "router/capture.py",
    "router/replay.py",
    "models/",
    "optimizers/members.py",
    "optimizers/replace.py",
    "weights/",
    "checkpoint/",
    "rollout/builtin/",
    "policy/",
    "run/",
)

#: Slow to import, and not needed by most commands: only inside functions.
LAZY = {"transformers", "tensorboard", "rich", "wandb"}


class Import(NamedTuple):
    """One imported module, and whether it is imported when its file is."""

    module: str
    line: int
    at_load: bool


def modules_of(path: Path) -> str:
    """``megatron_rl/config/load.py`` -> ``config/load.py``."""
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> list[Import]:
    """Every import of a file; of ``from a import b`` both ``a`` and ``a.b``."""
    found: list[Import] = []

    def visit(node: ast.AST, at_load: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found.extend(Import(name, node.lineno, at_load) for name in names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, False)
            return
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, at_load and not inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def room(module: str) -> str:
    """``megatron_rl.config.load`` -> ``config``."""
    return module.split(".")[1]


FILES = sorted(PACKAGE.rglob("*.py"))
OWN = [path for path in FILES if path != PACKAGE / "__init__.py"]


def top(path: Path) -> str:
    """The room of a file of the package."""
    return modules_of(path).split("/")[0].removesuffix(".py")


def test_every_room_has_a_level():
    assert {top(path) for path in OWN} - set(LEVELS) == set()


@pytest.mark.parametrize("path", OWN, ids=modules_of)
def test_rooms_import_only_from_below(path):
    here = top(path)
    for found in imports(path):
        parts = found.module.split(".")
        if parts[0] != "megatron_rl" or len(parts) == 1 or parts[1] not in LEVELS:
            continue
        there = room(found.module)
        allowed = there == here or LEVELS[there] < LEVELS[here]
        assert allowed, (
            f"line {found.line}: {here} imports {found.module} of its own level or above"
        )


def test_no_file_imports_itself_in_a_circle():
    """Lazy and type-only imports count."""
    files = {modules_of(p).removesuffix(".py").removesuffix("/__init__"): p for p in FILES}
    modules = {"megatron_rl." + name.replace("/", "."): path for name, path in files.items()}
    graph = {
        module: {found.module for found in imports(path)} & modules.keys() - {module}
        for module, path in modules.items()
    }
    assert len(graph) == len(FILES)
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_every_room_says_what_its_files_are():
    """The README of a folder has a phrase for each of its files and folders."""
    for folder in sorted({path.parent for path in FILES} - {PACKAGE}):
        readme = folder / "README.md"
        if not readme.exists() and folder.parent != PACKAGE:
            readme = folder.parent / "README.md"
        text = readme.read_text(encoding="utf-8")
        names = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        missing = [name for name in names if not re.search(rf"\b{name}\b", text)]
        assert not missing, f"{readme.relative_to(ROOT)} does not name {', '.join(missing)}"


#: Without torch, besides the rooms below level 1 and ``study``.
LIGHT = ("__init__.py", "arguments.py", "cli.py", "__main__.py", "device/launch.py", "extend.py")


def is_light(path: Path) -> bool:
    """Whether a file imports neither torch nor Megatron."""
    return modules_of(path) in LIGHT or top(path) == "study" or LEVELS[top(path)] < 1


@pytest.mark.parametrize("path", FILES, ids=modules_of)
def test_heavy_libraries_stay_in_their_places(path):
    name, light = modules_of(path), is_light(path)
    for found in imports(path):
        library = found.module.split(".")[0]
        if light:
            assert library not in ("torch", "megatron"), f"line {found.line}: {found.module}"
        if library == "megatron":
            assert name.startswith(MEGATRON), f"line {found.line}: Megatron outside its rooms"
        if library in LAZY or found.module.startswith("torch.utils.tensorboard"):
            assert not found.at_load, f"line {found.line}: {found.module} at the top of the file"


def test_light_files_import_no_file_that_is_not():
    """Files that they import as they are imported, and what those import, and so on."""
    at_load = {path: [found for found in imports(path) if found.at_load] for path in FILES}
    files = {modules_of(p).removesuffix(".py").removesuffix("/__init__"): p for p in FILES}
    modules = {"megatron_rl." + name.replace("/", "."): path for name, path in files.items()}
    left = [path for path in FILES if is_light(path)]
    seen = set(left)
    while left:
        path = left.pop()
        for found in at_load[path]:
            library = found.module.split(".")[0]
            assert library not in ("torch", "megatron"), f"{modules_of(path)}, line {found.line}"
        new = {modules[found.module] for found in at_load[path] if found.module in modules} - seen
        seen |= new
        left += new


def test_rooms_on_the_way_to_the_command_line_are_light():
    """Importing ``config.load`` runs these files too."""
    for name in ("__init__.py", "config/__init__.py", "device/__init__.py"):
        libraries = {found.module.split(".")[0] for found in imports(PACKAGE / name)}
        assert libraries & {"torch", "megatron", "numpy"} == set(), name


SOURCES = [
    path
    for folder in ("megatron_rl", "tests", "tools", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    own = path.is_relative_to(PACKAGE)
    assert len(text.splitlines()) <= (400 if own else 500)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= (60 if own else 80), (
                f"line {node.lineno}: {node.name} has {length} lines"
            )


def test_the_package_names_no_file_that_a_wheel_lacks():
    lacks = re.compile(r"\b(?:tools|examples|tests)/\w+[\w./]*")
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert not [(path, found) for path in texts if (found := lacks.findall(texts[path]))]


def test_the_training_loop_reads_as_one_page():
    loop = PACKAGE / "run" / "loop.py"
    assert len(loop.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readers_of_imports_find_them(tmp_path):
    """The checks above are only as good as this: nested, aliased, lazy and type-only imports."""
    path = tmp_path / "x.py"
    path.write_text(
        "import torch.nn as nn\n"
        "from megatron_rl.config import load\n"
        "if TYPE_CHECKING:\n    import rich\n"
        "class A:\n    import wandb\n"
        "def f():\n    from transformers import AutoTokenizer\n"
        "try:\n    import megatron\nexcept ImportError:\n    pass\n"
    )
    assert imports(path) == [
        Import("torch.nn", 1, True),
        Import("megatron_rl.config", 2, True),
        Import("megatron_rl.config.load", 2, True),
        Import("rich", 4, False),
        Import("wandb", 6, True),
        Import("transformers", 8, False),
        Import("transformers.AutoTokenizer", 8, False),
        Import("megatron", 10, True),
    ]
