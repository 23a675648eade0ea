"""Files from strangers cost a sentence: no memory, no time, and nothing that they ask for happens."""

import io
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dat_lightning.runs.checkpoints import newest_whole
from dat_lightning.weights import read_checkpoint
from tests import tiny
from tests.reliability import hostile

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # for what takes a second; hours where something is believed
MEGABYTES = 200  # beyond what the imports take


def contents(**more: Any) -> dict[str, Any]:
    """A checkpoint of a run, as far as its readers ask."""
    return {
        "pytorch-lightning_version": "2.6.6",
        "global_step": 3,
        "epoch": 0,
        "state_dict": tiny.stage1().state_dict(),
        "loops": {"fit_loop": {}},
        "optimizer_states": [],
        "lr_schedulers": [],
        **more,
    }


def saved(change: Callable[[Path], None] = lambda path: None, **more: Any) -> Callable[[Path], None]:
    """Makes a file of a checkpoint with other contents, and changes it."""

    def make(path: Path) -> None:
        torch.save(contents(**more), path)
        change(path)

    return make


def compressed_pickle(path: Path) -> None:
    torch.save(contents(), path)
    with zipfile.ZipFile(path) as archive:
        parts = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts:
            kind = zipfile.ZIP_DEFLATED if name.endswith("data.pkl") else zipfile.ZIP_STORED
            archive.writestr(name, data, compress_type=kind)


def twice(name: str) -> list[str]:
    return [name, name.replace("data.pkl", "DATA.PKL")] if name.endswith("data.pkl") else [name]


def other_root(name: str) -> list[str]:
    return [name, f"other/{name.partition('/')[2]}"] if name.endswith("data.pkl") else [name]


same = lambda name, data: data  # noqa: E731
BOMB = 400 * hostile.MEGABYTE

# (how it is made, what is said of it)
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "compressed_part": (saved(lambda p: hostile.with_part(p, "data/99", BOMB)), "data/99 is compressed"),
    "compressed_by_lzma": (saved(lambda p: hostile.with_part(p, "x", BOMB, zipfile.ZIP_LZMA)), "x is compressed"),
    "compressed_pickle": (compressed_pickle, "data.pkl is compressed"),
    "parts_that_overlap": (saved(hostile.overlapping), "damaged, in its part"),
    "a_part_twice": (saved(lambda p: hostile.rewritten(p, same, twice)), "each part once"),
    "two_folders": (saved(lambda p: hostile.rewritten(p, same, other_root)), "one folder"),
    "nested_lists": (saved(hyper_parameters={"x": hostile.nested(list)}), "more than 2000000 values"),
    "nested_tuples": (saved(hyper_parameters={"x": hostile.nested(tuple)}), "more than 2000000 values"),
    "nested_dicts": (
        saved(hyper_parameters=hostile.nested(lambda inner: {str(i): each for i, each in enumerate(inner)})),
        "more than 2000000 values",
    ),
    "nested_in_a_callback": (saved(callbacks={"x": hostile.nested(list)}), "more than 2000000 values"),
    "tuple_as_key": (hostile.tuple_as_key, "more than 2000000 values"),
    "long_text_again_and_again": (saved(hyper_parameters={"x": ["x" * 100_000] * 1000}), "more than 2000000 values"),
    "deep": (saved(hyper_parameters={"x": hostile.nested(list, 150, 1)}), "nested more than 100 deep"),
    "list_in_itself": (hostile.list_in_itself, "contains itself"),
    "expanded_tensor": (
        saved(state_dict={"energy_model.mean": torch.zeros(1).expand(3_000_000_000)}),
        "3000000000, for which the file has 4 bytes",
    ),
    "bytearray": (hostile.call_of("builtins.bytearray", 2 * 10**9), "calls builtins.bytearray, which takes memory"),
    "tensor": (hostile.call_of("torch.Tensor", 2 * 10**9), "calls torch.Tensor, which takes memory"),
    "float_tensor": (hostile.call_of("torch.FloatTensor", 2 * 10**9), "calls torch.FloatTensor, which takes memory"),
    "storage": (hostile.call_of("torch.storage.UntypedStorage", 2 * 10**9), "calls torch.*Storage, which takes memory"),
    "no_mapping_as_weights": (saved(state_dict=[torch.zeros(1)]), "its state_dict is a list"),
    "integer_keys": (saved(state_dict={1: torch.zeros(1)}), "its state_dict has a Tensor as '1'"),
    "text_as_callbacks": (saved(callbacks="x"), "its callbacks is a str"),
    "negative_step": (saved(global_step=-1), "its global_step is -1"),
    "negative_progress": (
        saved(loops={"fit_loop": {"epoch_progress": {"current": {"processed": -3}}}}),
        r"loops.fit_loop.epoch_progress.current.processed is -3",
    ),
    "text_as_optimiser": (saved(optimizer_states=["x"]), "its optimizer_states hold a str"),
}
# As torch wrote files of old; a run's checkpoint is none.
OLD: dict[str, tuple[Callable[[Path], None], str]] = {
    "old_bytearray": (hostile.call_of("builtins.bytearray", 2 * 10**9, legacy=True), "calls builtins.bytearray"),
    "old_uncovered": (hostile.uncovered, "refers to storages that it does not have"),
    "old_too_large": (hostile.too_large, r"storages have more numbers than the \d+ bytes of the file"),
}
# What is wrong with a run's checkpoint alone is nothing to whoever takes its weights.
OF_RUNS = (
    "text_as_callbacks",
    "negative_step",
    "negative_progress",
    "text_as_optimiser",
    "no_mapping_as_weights",
    "integer_keys",
)

CHILD = """
import json, resource, sys, warnings
from pathlib import Path
from dat_lightning.runs import read_run_checkpoint, read_without_tensors
from dat_lightning.runs.checkpoints import newest_whole
from dat_lightning.weights import load_weights, read_checkpoint
from tests import tiny

model = tiny.energy_model()
allowed = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + {megabytes} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
readers = {{
    "weights": lambda path: load_weights(model, path),
    "run": read_run_checkpoint,
    "without_tensors": read_without_tensors,
}}
said = {{}}
for path in sorted(Path(sys.argv[1]).iterdir()):
    for name, read in readers.items():
        try:
            read(path)
            said[f"{{path.stem}} {{name}}"] = "read"
        except ValueError as error:
            said[f"{{path.stem}} {{name}}"] = str(error)
passed_over = []
said["newest"] = str(newest_whole(sorted(Path(sys.argv[1]).iterdir()), tell=passed_over.append))
said["passed over"] = len(passed_over)
print(json.dumps(said))
"""


def in_a_child(code: str, *arguments: str, megabytes: int = MEGABYTES) -> Any:
    """What a program prints as JSON that may take so much memory beyond its imports, and so much time."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code.format(megabytes=megabytes), *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hostile")
    for name, (make, _) in {**FILES, **OLD}.items():
        make(folder / f"{name}.ckpt")
    torch.save(contents(), folder / "good.ckpt")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8 * hostile.MEGABYTE
    return dict(in_a_child(CHILD, str(folder)), folder=str(folder))


def test_a_good_file_is_read_within_the_same_limits(said: dict[str, Any]) -> None:
    assert {said[f"good {reader}"] for reader in ("weights", "run", "without_tensors")} == {"read"}


@pytest.mark.parametrize("reader", ["weights", "run", "without_tensors"])
@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_a_sentence(name: str, reader: str, said: dict[str, Any]) -> None:
    if reader == "weights" and name in OF_RUNS:
        return
    assert re.search(FILES[name][1], said[f"{name} {reader}"]), said[f"{name} {reader}"]
    assert f"{name}.ckpt" in said[f"{name} {reader}"]


@pytest.mark.parametrize("name", OLD)
def test_a_hostile_file_of_the_old_format_is_a_sentence(name: str, said: dict[str, Any]) -> None:
    assert re.search(OLD[name][1], said[f"{name} weights"]), said[f"{name} weights"]
    assert "not a readable checkpoint" in said[f"{name} run"]


def test_a_good_file_beside_them_is_reached_and_each_of_them_named(said: dict[str, Any]) -> None:
    assert said["newest"] == f"{said['folder']}/good.ckpt"
    assert said["passed over"] == len(FILES) + len(OLD)


@pytest.mark.parametrize(("numbers", "shown"), [(100, 8), (100, 100), (4, 4), (2**31 - 1, 2**31 - 1)])
def test_a_storage_of_another_size_than_the_files_is_passed_over(numbers: int, shown: int, tmp_path: Path) -> None:
    hostile.storage_of(tmp_path / "b.ckpt", numbers, shown)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "b.ckpt")
    torch.save(contents(global_step=1), tmp_path / "a.ckpt")
    hostile.storage_of(tmp_path / "c.ckpt", numbers, shown, **contents(global_step=9))
    assert newest_whole(sorted(tmp_path.glob("[ac].ckpt"))) == tmp_path / "a.ckpt"


SETS = """
import json, resource, sys
from pathlib import Path
from dat_lightning.features.image_sets import read_set

allowed = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + {megabytes} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
said = {{}}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_set(path)
    except ValueError as error:
        said[path.stem] = str(error)
print(json.dumps(said))
"""


def with_zeros(path: Path, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Adds an array of zeros to a .npz, compressed."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
    size = math.prod(shape) * np.dtype(kind).itemsize
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(f"{name}.npy", "w") as part,
    ):
        part.write(header.getvalue())
        for _ in range(size // (16 * hostile.MEGABYTE)):
            part.write(bytes(16 * hostile.MEGABYTE))
        part.write(bytes(size % (16 * hostile.MEGABYTE)))


def test_statistics_and_images_of_others_are_bounded_before_they_are_read(tmp_path: Path) -> None:
    with_zeros(tmp_path / "statistics.npz", "mu", (12_000,), "<f8")
    with_zeros(tmp_path / "statistics.npz", "sigma", (12_000, 12_000), "<f8")
    with_zeros(tmp_path / "images.npz", "arr_0", (1, 12_000, 12_000, 3), "|u1")
    with_zeros(tmp_path / "labels.npz", "arr_0", (1, 2, 2, 3), "|u1")
    with_zeros(tmp_path / "labels.npz", "arr_1", (150_000_000,), "<i8")
    said = in_a_child(SETS, str(tmp_path))
    assert re.search(r"sigma\.npy has 11520001\d\d bytes, and at most 1073741824 are read whole", said["statistics"])
    assert "images of 12000×12000 pixels" in said["images"]
    assert re.search(r"arr_1\.npy has 12000001\d\d bytes", said["labels"])
