"""Files that nobody saved by accident: small, and each a trap for whoever believes it."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MEGABYTE = 1 << 20


def rewritten(
    path: Path, change: Callable[[str, bytes], bytes], names: Callable[[str], list[str]] | None = None
) -> None:
    """Writes an archive of ``torch.save`` again, with other bytes in its parts, or other names for them."""
    with zipfile.ZipFile(path) as archive:
        parts = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts:
            for new in [name] if names is None else names(name):
                archive.writestr(new, change(name, data))


def with_part(path: Path, name: str, size: int, kind: int = zipfile.ZIP_DEFLATED) -> None:
    """Adds a part of zeros; compressed it takes a thousandth of its size."""
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo(f"{archive.namelist()[0].partition('/')[0]}/{name}")
        info.compress_type = kind
        with archive.open(info, "w") as part:
            for _ in range(size // MEGABYTE):
                part.write(bytes(MEGABYTE))


def nested(make: Callable[[list[Any]], Any], levels: int = 12, references: int = 12) -> Any:
    """A collection of references to one collection, of references to one collection, and so on: references^levels."""
    value: Any = 1.0
    for _ in range(levels):
        value = make([value] * references)
    return value


def with_pickle(path: Path, body: bytes, legacy: bool = False) -> None:
    """Writes a file of ``torch.save`` whose pickle has these opcodes, which leave one value."""
    torch.save({"w": torch.zeros(1)}, path, _use_new_zipfile_serialization=not legacy)
    new = b"\x80\x02" + body + b"."
    if legacy:
        whole = path.read_bytes()
        start = whole.index(b"\x80\x02}q\x00X\x01\x00\x00\x00w")
        path.write_bytes(whole[:start] + new + whole[whole.rindex(b"\x80\x02]") :])
    else:
        rewritten(path, lambda name, data: new if name.endswith("data.pkl") else data)


def tuple_as_key(path: Path) -> None:
    """A dictionary whose key is a nested tuple: hashing it, to make the dictionary, takes references^levels steps."""
    with_pickle(path, b"}" + pickle.dumps(nested(tuple), 2)[2:-1] + b"K\x01s")


def list_in_itself(path: Path) -> None:
    """A dictionary with a list that contains itself."""
    circle: list[Any] = []
    circle.append(circle)
    torch.save({"hyper_parameters": {"circle": circle}}, path)


def call_of(name: str, number: int, legacy: bool = False) -> Callable[[Path], None]:
    """A dictionary with what a class or function makes of a number, which may be any memory."""

    def make(path: Path) -> None:
        module, _, attribute = name.rpartition(".")
        called = f"c{module}\n{attribute}\n".encode() + b"J" + struct.pack("<i", number) + b"\x85R"
        with_pickle(path, b"}X\x01\x00\x00\x00w" + called + b"s", legacy)

    return make


def uncovered(path: Path) -> None:
    """A file as torch wrote them of old, whose storages are nowhere in it."""
    torch.save({"w": torch.zeros(5)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    # The list of the storages, the last pickle, and all that follows it.
    place = whole.rindex(b"\x80\x02]")
    path.write_bytes(whole[:place] + b"\x80\x02]q\x00.")


def too_large(path: Path) -> None:
    """Such a file whose storage is to have more numbers than the file has bytes."""
    torch.save({"w": torch.zeros(5)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    old = b"cpuq\x06K\x05"
    assert old in whole
    path.write_bytes(whole.replace(old, old[:-2] + b"J" + struct.pack("<i", 2 * 10**9)))


def storage_of(path: Path, numbers: int, shown: int, **more: Any) -> None:
    """Saves a tensor of eight numbers whose pickle says that its storage has others, and the tensor too."""
    torch.save({"w": torch.arange(8.0), **more}, path)

    def lie(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        for old, new in ((b"cpuq\x06K\x08", numbers), (b"QK\x00K\x08", shown)):
            assert old in data
            data = data.replace(old, old[:-2] + b"J" + struct.pack("<i", new), 1)
        return data

    rewritten(path, lie)


def overlapping(path: Path) -> None:
    """Has two entries of the directory stand for the same bytes, as in bombs that no compression is needed for."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        first, second = [entry for entry in archive.infolist() if "/data/" in entry.filename][:2]
        start = archive.start_dir
    place = data.index(second.filename.encode(), start) - 46  # of its entry in the directory
    data[place + 42 : place + 46] = struct.pack("<I", first.header_offset)
    path.write_bytes(data)
