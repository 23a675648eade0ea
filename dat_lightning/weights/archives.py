"""The archives that ``torch.save`` writes: whole, or refused."""

import zipfile
from pathlib import Path

from dat_lightning.core.errors import InputError


class DamagedCheckpointError(InputError):
    """Says that a file is not a checkpoint that can be read whole."""


def is_archive(path: Path) -> bool:
    """Returns whether a file begins as the archives of ``torch.save`` do, by which ``torch.load`` tells them."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def damaged_part(path: Path, tensors: bool = True) -> str | None:
    """Returns what is wrong with a file that ``torch.save`` wrote, or ``None``; every byte of it is read.

    ``torch.load`` does not compare checksums: a file with a flipped bit gives other numbers in silence. A file that was
    saved without checksums, which torch allows, has zeros in their place and cannot be checked.

    Args:
        path: The file.
        tensors: Whether to read the bytes of the tensors as well, which are nearly all.
    """
    size = path.stat().st_size
    if size == 0:
        return "it is of another kind: it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            fault = _oddity(archive.infolist(), size)
            if fault is not None:
                return fault
            if not any(entry.CRC for entry in archive.infolist()):
                return None
            broken = None
            if tensors:
                broken = archive.testzip()
            else:
                read_pickle(archive, checked=True)
    except Exception:  # whatever a reader of archives stumbles over
        return f"it is damaged or of another kind ({size} bytes)"
    return None if broken is None else f"it is damaged, in its part {broken}"


def read_pickle(archive: zipfile.ZipFile, checked: bool = False) -> tuple[bytes, int]:
    """Returns the bytes of the part that torch reads first, and a place in the file before them.

    Args:
        archive: That ``torch.save`` wrote.
        checked: Whether to compare its checksum, which a file may lack.

    Raises:
        KeyError: If there is none.
        BadZipFile: If its checksum is another.
    """
    root = archive.infolist()[0].filename.partition("/")[0]
    entry = archive.getinfo(f"{root}/data.pkl")
    if not checked:
        entry.CRC = None  # type: ignore[assignment]  # by which zipfile knows that there is nothing to compare
    return archive.read(entry), entry.header_offset


def _oddity(entries: list[zipfile.ZipInfo], size: int) -> str | None:
    """Says what ``torch.save`` does not write: what two readers would read differently, or what grows when it is read.

    Args:
        entries: All parts.
        size: Of the file.
    """
    end = 0
    for entry in sorted(entries, key=lambda each: each.header_offset):
        name = entry.filename[:80]
        if entry.compress_type != zipfile.ZIP_STORED:
            return f"its part {name} is compressed, which torch.save never does"
        # Marked as a folder, for which torch's reader leaves memory as it was; or beyond its place.
        overlaps = entry.header_offset < end
        end = entry.header_offset + entry.compress_size
        if entry.external_attr & 0x10 or entry.compress_size != entry.file_size or overlaps or end > size:
            return f"it is damaged, in its part {name}"
    # torch's reader takes the first part of a name, in capitals or not.
    names = {entry.filename.lower() for entry in entries}
    roots = {entry.filename.partition("/")[0] for entry in entries}
    if len(names) != len(entries) or len(roots) != 1:
        return "it is of another kind: torch.save writes one folder, and each part once"
    return None


def check_whole(path: Path) -> None:
    """Reads every byte of a file that ``torch.save`` wrote.

    Raises:
        DamagedCheckpointError: If it is damaged, as far as its checksums tell, or of another kind.
    """
    fault = damaged_part(path)
    if fault is not None:
        raise DamagedCheckpointError(f"{path} is not a readable checkpoint: {fault}")
