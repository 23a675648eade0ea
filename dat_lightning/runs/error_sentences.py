"""What the command line says in one sentence instead of a traceback: errors that a user can mend.

These are told by their class. Other libraries' messages are recognised by their words here alone, where there is no
other way; tests/runs/test_error_sentences.py provokes each of them in the library itself.
"""

import errno
import pickle
import re
import sys
from urllib.error import URLError

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from dat_lightning.core.errors import InputError, printable

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How torch says that a loader process is gone, with the signal where it knows it.
_KILLED_LOADER = re.compile(
    r"DataLoader worker \(pid.*?(\d+).*?\) (exited unexpectedly|is killed by signal: (?P<signal>\w+))"
)
# What PairedDataModule.on_exception adds to a backend's own words.
_LOST_PROCESS = re.compile(r"^process \d+ of \d+ has lost contact with another one.*", re.MULTILINE)
# How torch and Triton say that they find no compiler for C++ or C.
_NO_COMPILER = re.compile(r"No working C\+\+ compiler|find C compiler")
# How torchvision's data sets say that their files are not where they look.
_NO_DATA_SET = re.compile(r"^Dataset not found( or corrupted)?\. You can use download=True")
# How those of the MNIST family say that no mirror could be reached.
_NO_DOWNLOAD = re.compile(r"^Error downloading ")
# What jsonargparse says of nested types besides the point.
_PARSER_NOISE = re.compile(
    r"^(Subtypes:.*|Errors:|Expected a <class 'NoneType'>|Given value type:.*|Given value: (NestedArg|Namespace).*)$"
)
# What jsonargparse puts before the error of a constructor.
_FROM_CONSTRUCTOR = re.compile(r"Does not validate against any of the Union subtypes|Problem with given class_path")
# Where a class whose settings are keys of the configuration is given something without keys, which it lets pass.
_NO_MAPPING = re.compile(r"_instantiate_context.* argument after \*\* must be a mapping, not (\w+)")


def error_sentence(error: BaseException) -> str | None:
    """Returns an error about a user's input, files or machine as one sentence; ``None`` for a fault of a program."""
    sentence = _sentence(error)
    return None if sentence is None else printable(sentence)


def _sentence(error: BaseException) -> str | None:
    if isinstance(error, InputError | MisconfigurationException):
        return _one_line(_text_from_loader(error) or str(error))
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, pickle.UnpicklingError):
        return (
            "the checkpoint is no file of ours: it is damaged or holds Python objects, which are not loaded because"
            " that could run code"
        )
    dynamo = sys.modules.get("torch._dynamo.exc")  # not there unless something was compiled
    if dynamo is not None and isinstance(error, dynamo.BackendCompilerFailed):
        return _of_compiler(error)
    lost = _LOST_PROCESS.search(str(error))
    if lost:
        return lost[0]
    if isinstance(error, RuntimeError) and _NO_DATA_SET.match(str(error)):
        return (
            "a data set of torchvision is not below the folder that is its root, or is damaged there: name another"
            " root, or let it be fetched (download: true among its init_args)"
        )
    if isinstance(error, RuntimeError) and _NO_DOWNLOAD.match(str(error)):
        return f"{_one_line(str(error))}; put the files below the folder that is the data set's root"
    killed = _KILLED_LOADER.search(str(error)) if isinstance(error, RuntimeError) else None
    return _of_killed_loader(killed) if killed else None


def argument_sentence(message: str) -> str:
    """Returns what matters of jsonargparse's nested message about an argument, on one line."""
    lines = [line.strip().lstrip("- ") for line in message.splitlines()]
    text = " ".join(line for line in lines if line and not _PARSER_NOISE.match(line))
    text = text.replace("Does not validate against any of the Union subtypes ", "")
    text = re.sub(r"Parser key \"([^\"]+)\":", r"\1:", text)
    text = re.sub(r"Problem with given class_path '([^']+)':", r"\1:", printable(text))
    return re.sub(r"<class '([^']+)'>|typing\.(?=Literal)", lambda match: match[1] or "", text)


def constructor_error(error: Exception) -> Exception:
    """Returns what a constructor raised, out of what jsonargparse makes of it."""
    while (
        error.__cause__ is not None and isinstance(error.__cause__, Exception) and _FROM_CONSTRUCTOR.match(str(error))
    ):
        error = error.__cause__
    no_mapping = _NO_MAPPING.search(str(error)) if isinstance(error, TypeError) else None
    return InputError(f"a {no_mapping[1]} stands where settings with names belong") if no_mapping else error


def _one_line(message: str) -> str:
    return " ".join(line.strip() for line in message.splitlines())


def _text_from_loader(error: BaseException) -> str | None:
    """Returns the message of an error in a loader process, which torch raises anew with the whole traceback as text."""
    kind = type(error)
    if not str(error).startswith(f"Caught {kind.__name__} in "):
        return None
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return str(error).rpartition(f"\n{module}{kind.__qualname__}: ")[2].strip()


def _of_system(error: OSError) -> str | None:
    from_loader = _text_from_loader(error)
    if from_loader is not None:
        return _one_line(from_loader)
    if error.errno is None:
        if isinstance(error, URLError):
            return f"a download failed: {error.reason}"
        # Without a number it is a library's or our own sentence about a file or a download.
        own = isinstance(error, FileNotFoundError | FileExistsError) or type(error) is ConnectionError
        return _one_line(str(error)) if own else None
    name = f"{error.filename}: " if error.filename is not None else ""
    if error.errno in _DISK_FULL:
        return f"{name}a file could not be written: {error.strerror}; what was written whole before is still there"
    return f"{name}{error.strerror}" if name else None


def _of_compiler(error: BaseException) -> str | None:
    inner = getattr(error, "inner_exception", error)
    if isinstance(inner, torch.OutOfMemoryError):
        return None
    reason = str(inner).strip().splitlines()[0] if str(inner).strip() else type(inner).__name__
    missing = _NO_COMPILER.search(reason) is not None
    remedy = ", or install the compiler that torch misses (g++ or another one that CXX or CC names)" if missing else ""
    return f"the network could not be compiled: {reason}; set model.execution.compile to false{remedy}"


def _of_killed_loader(match: re.Match[str]) -> str:
    how = f" by signal {match['signal']}" if match["signal"] else ""
    return (
        f"a loader process (pid {match[1]}) was killed{how}, mostly because memory or shared memory ran out: lower"
        " data.num_workers, or give the job more memory, and go on from the last checkpoint with --ckpt_path"
    )
