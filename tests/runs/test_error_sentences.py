"""Which errors the command line says in a sentence; other libraries' messages come from the libraries themselves."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import SVHN, FashionMNIST

from dat_lightning import DigitsDataModule, EnergyModel, EnergyModule
from dat_lightning.core.errors import InputError
from dat_lightning.data.pixels import CorruptImageError
from dat_lightning.runs.error_sentences import argument_sentence, constructor_error, error_sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (InputError("eps is\n  wrong"), "eps is wrong"),
        (CorruptImageError("a.jpg is no image"), "a.jpg is no image"),
        (MisconfigurationException("no such metric"), "no such metric"),
        (FileNotFoundError("no folder at x"), "no folder at x"),
        (ConnectionError("could not download it"), "could not download it"),
        (URLError(OSError(-2, "Name or service not known")), "a download failed: [Errno -2] Name or service"),
        (OSError(errno.EACCES, "Permission denied", "a.txt"), "a.txt: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "a file could not be written: No space left on device; "),
        (OSError(errno.ENOSPC, "No space left on device", "a"), "a: a file could not be written: No space left on"),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(error: Exception, sentence: str) -> None:
    assert (error_sentence(error) or "").startswith(sentence)


@pytest.mark.parametrize("source", [FashionMNIST, SVHN])
def test_a_data_set_of_torchvision_that_is_not_there_is_a_sentence(source: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as found:
        source(tmp_path)
    assert "not below the folder that is its root" in (error_sentence(found.value) or "")


def test_a_data_set_of_torchvision_that_cannot_be_fetched_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://localhost:9/"])  # nobody listens there
    with pytest.raises(RuntimeError) as found:
        FashionMNIST(tmp_path, download=True)
    sentence = error_sentence(found.value) or ""
    assert sentence.startswith("Error downloading train-images-idx3-ubyte.gz: Tried http://localhost:9/, got: ")
    assert "\n" not in sentence
    assert "root" in sentence


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        TypeError("a bug"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ImportError("cannot import name"),
        OSError("without a number"),
        OSError(errno.EINVAL, "Invalid argument"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_everything_else_keeps_its_traceback(error: Exception) -> None:
    assert error_sentence(error) is None
    # Also where something that a user could mend has led to it.
    error.__cause__ = InputError("behind it")
    assert error_sentence(error) is None


class Failing(Dataset[int]):
    """Raises an error in a loader process, or ends that process."""

    def __init__(self, fail: Callable[[], Any]) -> None:
        self.fail = fail

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        self.fail()
        return index


def refuse() -> None:
    try:
        _ = dict[str, int]()["inner"]
    except KeyError as error:
        raise CorruptImageError("x.png is no image:\nits header is short") from error


def open_nothing() -> None:
    Path("nowhere.png").read_bytes()


def have_a_bug() -> None:
    raise ValueError("a bug")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("fail", "start"),
    [
        (refuse, "x.png is no image: its header is short"),
        (open_nothing, "[Errno 2] No such file or directory: 'nowhere.png'"),
        (have_a_bug, None),
        (be_killed, "a loader process (pid "),
    ],
)
# torch raises for the killed process wherever the program is when it hears of it; that may be in the iterator's end.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*DataLoaderIter:pytest.PytestUnraisableExceptionWarning")
def test_errors_of_loader_processes(fail: Callable[[], None], start: str | None) -> None:
    with pytest.raises((ValueError, OSError, RuntimeError)) as caught:
        list(DataLoader(Failing(fail), num_workers=1))
    sentence = error_sentence(caught.value)
    if start is None:
        assert sentence is None
    elif fail is be_killed:
        assert sentence is not None
        assert sentence.startswith(start)
        assert "was killed" in sentence
        assert "lower data.num_workers" in sentence
    else:
        assert sentence == start


@pytest.mark.slow
def test_a_compiler_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError) as caught:
        torch.compile(lambda x: (x + 1).sin())(torch.ones(7))
    sentence = error_sentence(caught.value) or ""
    assert sentence.startswith("the network could not be compiled: ")
    assert "set model.execution.compile to false, or install the compiler that torch misses" in sentence


class Hostile:
    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return (os.system, ("true",))


def test_a_checkpoint_of_objects_that_another_plugin_reads(tmp_path: Path) -> None:
    torch.save({"evil": Hostile()}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match="Weights only load failed") as caught:
        TorchCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=True)
    assert "that could run code" in (error_sentence(caught.value) or "")


def test_a_process_that_lost_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo's own words, and what PairedDataModule makes of them; tests/ddp has the processes."""
    data = DigitsDataModule()
    monkeypatch.setattr(data, "_rank", lambda: (0, 2))
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert error_sentence(error) is None
    data.on_exception(error)
    assert (error_sentence(error) or "").startswith("process 0 of 2 has lost contact with another one, which was")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            {"class_path": "dat_lightning.EnergyModel", "init_args": {"backbone": 3}},
            "model: dat_lightning.EnergyModel: backbone: Not a valid subclass of Module. Got value: 3 ",
        ),
        ("wide", "model: Expected a dot import path string: wide"),
    ],
)
def test_arguments_that_jsonargparse_refuses(value: Any, sentence: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=EnergyModel | None)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_object({"model": value})
    said = argument_sentence(str(caught.value))
    assert said.startswith(sentence)
    assert "\n" not in said


class Refusing:
    """Raises an error when it is constructed."""

    def __init__(self, kind: str) -> None:
        raise {"input": InputError, "value": ValueError, "type": TypeError, "attribute": AttributeError}[kind](kind)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("input", InputError), ("value", ValueError), ("type", TypeError), ("attribute", AttributeError)],
)
@pytest.mark.parametrize("alternatives", [Refusing, Refusing | None])
def test_what_a_constructor_raises_comes_out_of_jsonargparse(alternatives: Any, kind: str, expected: type) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=alternatives)
    given = {"class_path": f"{__name__}.Refusing", "init_args": {"kind": kind}}
    config = parser.parse_object({"part": given})
    with pytest.raises((ValueError, TypeError, AttributeError)) as caught:
        parser.instantiate_classes(config)
    assert type(constructor_error(caught.value)) is expected


def test_a_list_in_the_place_of_settings_with_names() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--module", type=EnergyModule)
    network = {
        "class_path": "dat_lightning.EnergyModel",
        "init_args": {"backbone": {"class_path": "dat_lightning.SmallResNet"}, "mean": [0.5], "std": [0.5]},
    }
    init_args = {"energy_model": network, "threat_model": []}
    config = parser.parse_object({"module": {"class_path": "dat_lightning.EnergyModule", "init_args": init_args}})
    with pytest.raises(TypeError) as caught:
        parser.instantiate_classes(config)
    assert str(constructor_error(caught.value)) == "a list stands where settings with names belong"


def test_nested_messages_become_one_sentence() -> None:
    message = """Parser key "model": Does not validate against any of the Union subtypes
Subtypes: [<class 'a.B'>, <class 'NoneType'>]
Errors:
  - Problem with given class_path 'a.B':
      - Parser key "eps": Expected a <class 'float'>. Got value: x
  - Expected a <class 'NoneType'>
Given value type: <class 'jsonargparse._util.NestedArg'>
Given value: NestedArg(key='eps', val='x')"""
    assert argument_sentence(message) == "model: a.B: eps: Expected a float. Got value: x"
