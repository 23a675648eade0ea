import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dat_lightning

PACKAGE = Path(dat_lightning.__file__).parent
# Not rooms but files, without imports of their own.
FILES = ("version", "threads")
# In the order of their imports: a room may import those before it, and nothing behind it.
ROOMS = (
    *FILES,
    "core",
    "backbones",
    "data",
    "speed",
    "weights",
    "modules",
    "training",
    "runs",
    "results",
    "features",
    "sampling",
    "evaluation",
    "pages",
    "explore",
)


def imported_modules(path: Path, source: str | None = None) -> Iterator[str]:
    """Full names of all modules that a file imports, also inside functions and relatively."""
    package = ("dat_lightning", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if source is None else source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            # "from dat_lightning import data" names a room as well.
            yield from (f"{module}.{alias.name}" if module == "dat_lightning" else module for alias in node.names)


def imported_rooms(path: Path, source: str | None = None) -> set[str]:
    """First components below dat_lightning; "." stands for the package itself."""
    parts = [name.split(".") for name in imported_modules(path, source)]
    return {part[1] if len(part) > 1 else "." for part in parts if part[0] == "dat_lightning"}


def files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROOMS) - set(FILES)


@pytest.mark.parametrize("room", ROOMS[len(FILES) :])
def test_every_room_has_files_and_says_what_it_is(room: str) -> None:
    assert len(files(room)) >= 2
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert docstring


def test_core_needs_torch_numpy_and_the_standard_library_alone() -> None:
    allowed = {"torch", "numpy", "dat_lightning"} | sys.stdlib_module_names
    foreign = {
        f"{path.name}: {name}"
        for path in files("core")
        for name in imported_modules(path)
        if name.split(".")[0] not in allowed
    }
    assert foreign == set()


@pytest.mark.parametrize("place", range(len(FILES), len(ROOMS)))
def test_a_room_imports_those_before_it(place: int) -> None:
    for path in files(ROOMS[place]):
        assert imported_rooms(path) <= set(ROOMS[: place + 1]), path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import torch", set()),
        ("import dat_lightning", {"."}),
        ("from dat_lightning import data", {"data"}),
        ("import dat_lightning.data.draws as d", {"data"}),
        ("def f():\n    from dat_lightning.modules.base import EnergyModule", {"modules"}),
        ("from ..callbacks import ema", {"callbacks"}),
        ("from . import energy", {"core"}),
    ],
)
def test_no_form_of_import_escapes(source: str, rooms: set[str]) -> None:
    assert imported_rooms(PACKAGE / "core" / "ascent.py", source) == rooms
