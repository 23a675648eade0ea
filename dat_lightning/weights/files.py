"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


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


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
