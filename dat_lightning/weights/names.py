"""Names that have no place in a checkpoint: a pickle that holds one is refused as a whole, called or not."""

import builtins
import pickle
import re

import torch


class ForbiddenNameError(pickle.UnpicklingError):
    """Says that a pickle names something which has no place in a checkpoint; :attr:`name` is the full name.

    Args:
        name: Module and name, joined by a dot.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"it names {name}, and that could run code")
        self.name = name


# Roads to the machine and to the interpreter, wherever they are in a dotted name.
_ANYWHERE = frozenset(
    ("os", "nt", "posix", "sys", "subprocess", "shutil", "importlib", "runpy", "ctypes", "builtins", "__builtin__")
)
# Modules of the standard library that are such roads; their names are common words elsewhere.
_STANDARD_LIBRARY = frozenset(
    re.findall(
        r"\w+",
        """_ctypes _imp _io _operator _pickle _posixsubprocess _socket _thread asyncio atexit bdb cPickle cProfile cffi
        code codeop commands concurrent distutils doctest ensurepip fileinput ftplib gc http imp inspect io linecache
        marshal multiprocessing operator pdb pickle pip pkgutil popen2 profile pty pydoc shelve signal smtplib socket
        socketserver sqlite3 ssl tempfile threading timeit trace urllib urllib2 venv webbrowser xmlrpc zipimport""",
    )
)
_IN_TORCH = frozenset(
    re.findall(
        r"\w+",
        """_C _classes _dynamo _inductor _load_from_bytes _ops classes cpp_extension hub jit library model_zoo
        multiprocessing ops package rpc serialization""",
    )
)
_TYPES_OF_PYTHON_2 = ("basestring", "long", "unicode", "xrange")


def is_forbidden(path: str) -> bool:
    """Returns whether a full name leads to the operating system, the interpreter, a loader of code, or a function.

    Forbidden are functions of ``builtins`` and of ``torch``, though not their classes; whole modules such as ``os``,
    ``sys``, ``subprocess``, ``importlib``, ``pickle`` and ``socket``; and the parts of torch that load or compile, such
    as ``torch.hub``, ``torch.jit`` and ``torch.serialization``. No module is imported to find out.

    Args:
        path: Module and name, joined by a dot.
    """
    parts = re.split(r"[.\s]", path)
    if parts[0] in ("builtins", "__builtin__") and len(parts) == 2:
        return not isinstance(getattr(builtins, parts[1], None), type) and parts[1] not in _TYPES_OF_PYTHON_2
    if not _ANYWHERE.isdisjoint(parts) or parts[0] in _STANDARD_LIBRARY:
        return True
    if parts[0] != "torch":
        return False
    inside = vars(torch).get(parts[1]) if len(parts) == 2 else None
    return (callable(inside) and not isinstance(inside, type)) or not _IN_TORCH.isdisjoint(parts)
