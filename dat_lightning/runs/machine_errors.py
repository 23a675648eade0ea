"""Errors that the machine makes, not the program: a full disk, an unwritable folder, a process or compiler gone."""

import errno
import re

import torch

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How torch says that a loader process is gone, with the signal where it knows it.
_KILLED = re.compile(r"DataLoader worker \(pid.*?(\d+).*?\) (exited unexpectedly|is killed by signal: (?P<signal>\w+))")
# What PairedDataModule.on_exception adds to a backend's own words.
_LOST = re.compile(r"^process \d+ of \d+ has lost contact with another one.*", re.MULTILINE)
# torch.save into a file object hides the error of a write that failed, and says this.
_WRITER = re.compile(r"PytorchStreamWriter failed writing file|unexpected pos \d+ vs \d+")

# How torch and Triton say that they find no compiler for C++ or C.
_NO_COMPILER = re.compile(r"No working C\+\+ compiler|find C compiler")


def machine_error(error: BaseException) -> Exception | None:
    """Returns the error with a sentence that says what to do about it, or ``None`` if the machine is not to blame."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        lost = _LOST.search(str(current))
        if lost:
            return RuntimeError(lost[0])
        killed = _KILLED.search(str(current)) if isinstance(current, RuntimeError) else None
        if killed:
            return RuntimeError(_of_a_loader(killed))
        # By its name: torch's compiler is slow to import, and is not there unless it was used.
        if any(kind.__name__ == "BackendCompilerFailed" for kind in type(current).__mro__):
            inner = getattr(current, "inner_exception", current)
            return inner if isinstance(inner, torch.OutOfMemoryError) else RuntimeError(_of_the_compiler(inner))
        if isinstance(current, OSError) and current.errno is not None and current.strerror:
            return OSError(_of_a_file(current))
        # What was being handled when a RuntimeError was raised is its cause only where torch could not say so.
        hidden = current.__context__ if _WRITER.search(str(current)) else None
        current = current.__cause__ or hidden
    if _WRITER.search(str(error)):
        return OSError(f"a file could not be written, mostly because the disk is full ({error})")
    return None


def _of_a_loader(match: re.Match[str]) -> str:
    how = f" by signal {match['signal']}" if match["signal"] else ""
    return (
        f"a loader process (pid {match[1]}) was killed{how}, mostly because memory or shared memory ran out: lower"
        " data.num_workers, or give the job more memory, and go on from the last checkpoint with --ckpt_path"
    )


def _of_the_compiler(error: BaseException) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    missing = _NO_COMPILER.search(reason) is not None
    remedy = ", or install the compiler that torch misses (g++ or another one that CXX or CC names)" if missing else ""
    return f"the network could not be compiled: {reason}; set model.execution.compile to false{remedy}"


def _of_a_file(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename is not None else ""
    if error.errno in _FULL:
        return f"{name}a file could not be written: {error.strerror}; what was written whole before is still there"
    return f"{name}{error.strerror}"
