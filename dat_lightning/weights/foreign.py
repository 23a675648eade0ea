"""Files of other programs: ``torch.load`` with inert stand-ins for every object that it would refuse."""

import mmap
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import _weights_only_unpickler as torch_reader
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dat_lightning.core.errors import InputError
from dat_lightning.weights.archives import is_archive, read_pickle
from dat_lightning.weights.extents import Opcode, check_pickle

# Before archives torch wrote its magic number, the format, the machine and the contents, as one pickle each.
_LEGACY_PICKLES = 4
_DEFAULTDICT = "collections.defaultdict"


class StandIn(type):
    """Takes the place of a class or function of a file, of its calls and of its instances; it does nothing.

    A class, because torch's reader makes objects of classes alone; calling it, or making or changing an instance of it,
    gives the stand-in itself.

    Args:
        name: Full name of the class or function in the file.
    """

    name: str

    def __new__(mcs, name: str) -> "StandIn":
        """Returns a new one, which gives itself for an instance."""
        return super().__new__(mcs, name, (), {"__new__": lambda cls, *args: cls, "name": name})

    def __init__(cls, name: str) -> None:
        super().__init__(name, (), {})

    def __call__(cls, *args: Any) -> "StandIn":
        """Returns itself."""
        return cls

    def __setstate__(cls, state: Any) -> None:
        pass


class _Contents(mmap.mmap):
    """A file's bytes, of which some can be changed in memory alone; ``seekable`` is new in Python 3.13."""

    def seekable(self) -> bool:
        return True


@contextmanager
def _readable(file: Path) -> Iterator[IO[bytes]]:
    """Opens a file as torch's reader can read it.

    That reader lacks the operation that drops a result, with which dill from 0.3.6 on ends the setting of a class's
    attributes. In memory it becomes the one that gives a result to the object below: a stand-in, which ignores it.
    """
    with file.open("rb") as opened, _Contents(opened.fileno(), 0, access=mmap.ACCESS_COPY) as contents:
        start, pickles = 0, _LEGACY_PICKLES
        if is_archive(file):
            with zipfile.ZipFile(opened) as archive:
                pickled, before = read_pickle(archive)
                start, pickles = contents.find(pickled, before), 1
        opened.seek(start)
        size = file.stat().st_size
        for _ in range(pickles):
            storages = check_pickle(_with_results_kept(pickletools.genops(opened), contents), size)
        if pickles == _LEGACY_PICKLES:
            # Behind them is a list of the storages that follow; torch would leave others as it found the memory.
            listed = {str(argument) for _, argument, _ in pickletools.genops(opened) if isinstance(argument, str)}
            if missing := sorted(storages.keys() - listed):
                raise InputError(f"it refers to storages that it does not have, such as {missing[0][:80]}")
        yield cast(IO[bytes], contents)


def _with_results_kept(opcodes: Iterable[Opcode], contents: mmap.mmap) -> Iterator[Opcode]:
    for opcode, argument, place in opcodes:
        if opcode.name == "POP" and place is not None:
            contents[place : place + 1] = pickle.BUILD
        yield opcode, argument, place


def load_with_stand_ins(file: Path) -> Any:
    """Returns what ``torch.save`` wrote, on the CPU; nothing that the file names is imported or called.

    Raises:
        InputError: If it stands for more values than any checkpoint has.
        Exception: Whatever torch's restricted reader raises for what it does not read.
    """
    stand_ins: list[Any] = [(StandIn(name), name) for name in foreign_names(file) if name != _DEFAULTDICT]
    # The one other mapping that is common in checkpoints; its factory is not kept.
    stand_ins.append((lambda *factory: {}, _DEFAULTDICT))
    with _readable(file) as opened, safe_globals([StandIn, *stand_ins]), warnings.catch_warnings():
        # About pickle protocols, sparse tensors and storages of old; none is for the reader of a checkpoint.
        warnings.simplefilter("ignore")
        return torch.load(opened, map_location="cpu", weights_only=True)


def foreign_names(file: Path) -> list[str]:
    """Returns the names in a file beyond those that torch reads by itself; nothing is imported to find out.

    Raises:
        Exception: Whatever torch's reader raises for what it does not read.
    """
    with _readable(file) as opened:
        if is_archive(file):
            return sorted(get_unsafe_globals_in_checkpoint(opened))
        # torch's own function reads archives alone.
        names: set[str] = set().union(*(torch_reader.get_globals_in_pkl(opened) for _ in range(_LEGACY_PICKLES)))
    return sorted(names - torch_reader._get_allowed_globals().keys())
