"""Lightning's plug-in for checkpoints that are written whole or not at all, and checked when they are read."""

import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from dat_lightning.runs.checkpoints import name_another, read_run_checkpoint
from dat_lightning.weights.archives import DamagedCheckpointError, check_whole
from dat_lightning.weights.files import require_regular, written_whole

# How a file is called before it is whole. The final name must not be in it: Lightning reads numbers after hpc_ckpt_.
_UNFINISHED = re.compile(r"tmp[a-z0-9_]{8}\.tmp")
# A file being written changes all the time; one that has rested for so long is what a crash left.
_LEFT_OVER_SECONDS = 600.0


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, has it on the disk, and only then gives it its name.

    A process, a disk or a machine that fails in between leaves the previous checkpoint as it was. Lightning's own
    plug-in writes to the system's temporary folder and moves the file: where that folder is another file system, the
    move is a copy over the previous checkpoint, and nothing waits for the disk. What a crashed run left unfinished is
    removed by the first save into the same folder after ten minutes. On reading, every byte is compared with the
    file's checksums, which ``torch.load`` does not do; a file that is damaged is an error that names the newest whole
    one beside it. Files that are not local, such as ``s3://…``, are left to Lightning.

    The command line uses it wherever the configuration names no other plug-in; ``AsyncCheckpointIO`` writes through it.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: If the disk is full or the folder cannot be written; the previous checkpoint is still there.
        """
        local = local_path(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with written_whole(local) as file:
            torch.save(checkpoint, file)
        remove_leftovers(local.parent)

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Returns a checkpoint, checked.

        Raises:
            FileNotFoundError: If there is none.
            InputError: If it is damaged, of another kind, or of a newer version.
        """
        local = local_path(path)
        if local is not None and local.exists() and not local.is_dir():
            require_regular(local)
        if local is None or not local.is_file():
            return super().load_checkpoint(path, map_location, weights_only)
        try:
            if weights_only is not False:
                return read_run_checkpoint(local)
            check_whole(local)
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{error}{name_another(local)}") from error
        return super().load_checkpoint(path, map_location, weights_only)


def local_path(path: str | Path) -> Path | None:
    """Returns the path on this machine that a path or address stands for, or ``None`` if it is elsewhere."""
    files, inner = url_to_fs(str(path))
    return Path(inner) if isinstance(files, LocalFileSystem) else None


def remove_leftovers(folder: Path) -> None:
    """Removes what crashed runs left unfinished in a folder."""
    for path in folder.glob("tmp*.tmp"):
        with suppress(OSError):  # another process was faster
            if _UNFINISHED.fullmatch(path.name) and time.time() - path.stat().st_mtime > _LEFT_OVER_SECONDS:
                path.unlink()
