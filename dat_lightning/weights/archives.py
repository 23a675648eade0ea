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
            if not any(entry.CRC for entry in archive.infolist()):
                return None
            broken = next((entry.filename for entry in archive.infolist() if _is_odd(entry)), None)
            if broken is None and tensors:
                broken = archive.testzip()
            elif broken is None:
                for entry in archive.infolist():
                    if entry.filename.endswith("/data.pkl"):
                        archive.read(entry)  # an error if its checksum is another
    except Exception:  # whatever a reader of archives stumbles over
        return f"it is damaged or of another kind ({size} bytes)"
    return None if broken is None else f"it is damaged, in its part {broken}"


def _is_odd(entry: zipfile.ZipInfo) -> bool:
    """Whether a part is marked as a folder, for which torch's reader leaves memory as it was, or has two sizes."""
    return bool(entry.external_attr & 0x10) or (entry.compress_type == 0 and entry.compress_size != entry.file_size)


def check_whole(path: Path) -> None:
    """Reads every byte of a file that ``torch.save`` wrote.

    Raises:
        DamagedCheckpointError: If it is damaged, as far as its checksums tell, or of another kind.
    """
    fault = damaged_part(path)
    if fault is not None:
        raise DamagedCheckpointError(f"{path} is not a readable checkpoint: {fault}")
