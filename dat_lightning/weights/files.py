"""Files that are written whole or not at all, and read only if they have an end."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from dat_lightning.core.errors import InputError


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that gets its name when the body ends, and leaves what was there if the body or the disk fails.

    Args:
        path: Its name; the folder is made if there is none.

    Raises:
        OSError: If the disk is full or the folder cannot be written, with the name of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
        try:
            yield file
            # A full disk may show here only.
            file.flush()
            os.fsync(file.fileno())
        except BaseException as error:
            # Closing would try once more to write what did not fit.
            with suppress(OSError):
                file.close()
            temporary.unlink()
            # torch.save says in a RuntimeError that a write has failed.
            cause = error.__context__ if isinstance(error, RuntimeError) else error
            if isinstance(cause, OSError) and cause.errno is not None and cause.filename is None:
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise
    # Temporary files are for the owner's eyes alone; this one is to be read like any other.
    temporary.chmod(0o666 & ~_umask())
    temporary.replace(path)


@contextmanager
def as_local_file(source: str | Path | IO[bytes]) -> Iterator[Path]:
    """Gives a file's path on this machine, of a copy if it is elsewhere.

    Args:
        source: Its path, an address that fsspec knows, or an open binary file, of which the rest is copied.

    Raises:
        OSError: If there is no such file.
    """
    files, inner = (None, "") if hasattr(source, "read") else url_to_fs(str(source))
    if isinstance(files, LocalFileSystem):
        yield Path(inner)
        return
    with tempfile.NamedTemporaryFile(suffix=Path(inner).suffix) as copy:
        if files is None:
            shutil.copyfileobj(cast(IO[bytes], source), copy)
        else:
            files.get_file(inner, copy.name)
        copy.flush()
        yield Path(copy.name)


def require_regular(path: Path) -> None:
    """Checks that what is at a path is a file of bytes.

    Reading from a pipe or a device waits for whoever writes there, or has no end.

    Raises:
        InputError: If it is none.
    """
    if not path.is_file():
        kind = "folder" if path.is_dir() else "pipe, device or socket"
        raise InputError(f"{path} is a {kind}, and must be a file")


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
