import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dat_lightning

PACKAGE = Path(dat_lightning.__file__).parent
ROOMS = ("core", "backbones", "data", "modules", "callbacks", "metrics", "reports", "explore", "studies")
# The Hub's mixin is a base class of EnergyModel, and safetensors its file format: hub.py keeps both in one place.
CORE_EXCEPTIONS = {"hub.py": {"huggingface_hub", "safetensors", "typing_extensions"}}
# What a room may import beside core and itself; a file is named by its path in the package.
EXCEPTIONS = {
    "metrics/train_digits_features.py": {"data"},
    "metrics/classifier_features.py": {"checkpoints"},
    "callbacks/evaluation_report.py": {"reports", "version"},
    "callbacks/provenance.py": {"reports", "version"},
    "callbacks/kept_values.py": {"version"},
    # Evaluators are callbacks around the functions of metrics.
    **{
        f"callbacks/{name}.py": {"metrics"}
        for name in ("calibration", "memorisation", "ood_detection", "sample_metrics")
    },
    "explore/opening.py": {"backbones", "checkpoints", "data", "modules"},
    "explore/markup.py": {"callbacks"},
    # Runs of the command line, told as the pages of reports are.
    "studies/study_file.py": {"cli"},
    **{f"studies/{name}.py": {"reports", "version"} for name in ("collection", "execution")},
    **{f"studies/{name}.py": {"reports"} for name in ("page", "plots", "running")},
    "studies/label_agreement.py": {"callbacks", "data"},
    **{path.relative_to(PACKAGE).as_posix(): {"checkpoints"} for path in PACKAGE.glob("modules/**/*.py")},
}


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


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_files_and_says_what_it_is(room: str) -> None:
    assert len(files(room)) >= 2
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert docstring


def test_core_needs_torch_numpy_and_the_standard_library_alone_but_for_the_hub() -> None:
    allowed = {"torch", "numpy", "dat_lightning"} | sys.stdlib_module_names
    foreign = {
        f"{path.name}: {name}"
        for path in files("core")
        for name in imported_modules(path)
        if name.split(".")[0] not in allowed | CORE_EXCEPTIONS.get(path.name, set())
    }
    assert foreign == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_core_and_itself_alone(room: str) -> None:
    for path in files(room):
        name = path.relative_to(PACKAGE).as_posix()
        allowed = {"core", room} | EXCEPTIONS.get(name, set())
        assert imported_rooms(path) <= allowed, name


def test_checkpoints_need_core_alone() -> None:
    assert files("checkpoints")
    for path in files("checkpoints"):
        assert imported_rooms(path) <= {"core", "checkpoints"}, path.name


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
    assert imported_rooms(PACKAGE / "core" / "pgd.py", source) == rooms
