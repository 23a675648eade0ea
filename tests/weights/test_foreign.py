"""Files of other programs, hostile ones among them: nothing in them acts, and the weights beside load."""

import contextlib
import io
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dat_lightning.weights import StandIn, load_weights, read_checkpoint
from dat_lightning.weights.foreign import foreign_names
from tests.weights.test_loading import assert_same_weights, small_model


class Call:
    """Calls a function wherever it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.reduced


def attacks(folder: Path) -> dict[str, Call]:
    """Calls that each leave a file or folder named ``effect``."""
    effect, script = folder / "effect", folder / "hubconf.py"
    code = f"open({str(effect)!r}, 'w').close()"
    script.write_text(f"dependencies = []\n{code}\ndef entry():\n    pass\n")
    inner = io.BytesIO()
    torch.save(Call(exec, code), inner)
    return {
        "posix.system": Call(os.system, f"touch {effect}"),
        "posix.mkdir": Call(os.mkdir, str(effect)),
        "builtins.exec": Call(exec, code),
        "builtins.eval": Call(eval, code),
        "subprocess.call": Call(subprocess.call, ["touch", str(effect)]),
        "runpy.run_path": Call(runpy.run_path, str(script)),
        "shutil.copy": Call(shutil.copy, str(script), str(effect)),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(exec, code))),
        "torch.hub._load_local": Call(torch.hub._load_local, str(folder), "entry"),
        "torch.serialization.save": Call(torch.save, {}, str(effect)),
        "torch.storage._load_from_bytes": Call(torch.storage._load_from_bytes, inner.getvalue()),
    }


ATTACKS = (
    "posix.system",
    "posix.mkdir",
    "builtins.exec",
    "builtins.eval",
    "subprocess.call",
    "runpy.run_path",
    "shutil.copy",
    "pickle.loads",
    "torch.hub._load_local",
    "torch.serialization.save",
    "torch.storage._load_from_bytes",
)


def write(contents: Any, path: Path, form: str) -> None:
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(contents, protocol=int(form[-1])))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=form == "torch")


@pytest.mark.parametrize("form", ["torch", "torch legacy"])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_does_nothing(name: str, form: str, tmp_path: Path) -> None:
    """Torch refuses names of the operating system even as stand-ins; the weights beside the others load."""
    path, source, model = tmp_path / "hostile.ckpt", small_model(seed=1), small_model()
    write({"state_dict": source.state_dict(), "callbacks": attacks(tmp_path)[name]}, path, form)
    if name.startswith("posix."):
        with pytest.raises(ValueError, match=rf"{path} is not a readable checkpoint: .* it holds {name}; if you"):
            load_weights(model, path)
    else:
        load_weights(model, path)
        assert_same_weights(model, source)
    assert not (tmp_path / "effect").exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_acts_where_a_file_is_trusted(name: str, tmp_path: Path) -> None:
    # Otherwise the test above would show nothing.
    pickle.loads(pickle.dumps(attacks(tmp_path)[name]))
    assert (tmp_path / "effect").exists()


@pytest.mark.parametrize("form", ["pickle 0", "pickle 2", "pickle 4", "pickle 5"])
def test_a_bare_pickle_is_no_checkpoint(form: str, tmp_path: Path) -> None:
    write({"state_dict": {}, "callbacks": attacks(tmp_path)["builtins.exec"]}, tmp_path / "bare.ckpt", form)
    with pytest.raises(ValueError, match=r"not a readable checkpoint: .*safetensors\.torch\.save_file"):
        read_checkpoint(tmp_path / "bare.ckpt")
    assert not (tmp_path / "effect").exists()


class Parameters:
    """As in cox: an object of arguments."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def attributed(target: Any, call: Any) -> Any:
    target.hook = call
    return target


PLACES: dict[str, Callable[[Any], Any]] = {
    "the file": lambda call: call,
    "the arguments": lambda call: {"args": Parameters(deep=Parameters(hook=[(call,)]))},
    "a weight": lambda call: {"state_dict": {"backbone.0.weight": call}},
    "a key": lambda call: {("a", call): 1},
    "a set": lambda call: {"a": {1, call}},
    "an argument of a stand-in": lambda call: {"a": Call(complex, call)},
    "an attribute of a mapping": lambda call: attributed(OrderedDict(), call),
}


@pytest.mark.parametrize("form", ["torch", "torch legacy"])
@pytest.mark.parametrize("name", ["posix.system", "builtins.exec"])
@pytest.mark.parametrize("place", PLACES)
def test_an_attack_does_nothing_wherever_it_hides(place: str, name: str, form: str, tmp_path: Path) -> None:
    write(PLACES[place](attacks(tmp_path)[name]), tmp_path / "hostile.ckpt", form)
    with pytest.raises(ValueError, match=r"hostile\.ckpt"):
        load_weights(small_model(), tmp_path / "hostile.ckpt")
    assert not (tmp_path / "effect").exists()


class Acts(list[Any]):
    """Acts in every method that unpickling may call."""

    effect = ""

    def touch(self) -> None:
        Path(self.effect).touch()

    def __setstate__(self, state: Any) -> None:
        Path(state["effect"]).touch()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Acts, (), {"effect": self.effect}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_foreign_object_is_not_built_and_the_weights_beside_it_load(zipped: bool, tmp_path: Path) -> None:
    source, model, acts = small_model(seed=1), small_model(seed=0), Acts()
    acts.effect = str(tmp_path / "effect")
    contents = {"args": acts, "model": source.backbone.state_dict(), "after": [acts, Path("x"), torch.device("cpu")]}
    torch.save(contents, tmp_path / "foreign.pt", _use_new_zipfile_serialization=zipped)
    before, safe = (tmp_path / "foreign.pt").read_bytes(), set(torch.serialization.get_safe_globals())
    load_weights(model, tmp_path / "foreign.pt")
    assert_same_weights(model, source)
    assert not (tmp_path / "effect").exists()
    read = read_checkpoint(tmp_path / "foreign.pt")
    assert isinstance(read["args"], StandIn)
    assert read["args"].name == "tests.weights.test_foreign.Acts"
    assert read["after"][0] is read["args"]
    assert set(torch.serialization.get_safe_globals()) == safe
    assert (tmp_path / "foreign.pt").read_bytes() == before
    torch.load(tmp_path / "foreign.pt", weights_only=False)
    assert (tmp_path / "effect").exists()


# What a training script of its own does, in a process whose __main__ it is.
SCRIPT = """
import sys
from pathlib import Path

import dill
import torch


class Arguments:
    def __init__(self, **given):
        self.__dict__.update(given)

    def rate(self):
        return decay(self.epoch)


def decay(epoch):
    Path(sys.argv[3]).touch()
    return 0.1 if epoch < 1 else decay(epoch - 1)


if __name__ == "__main__":
    state = {f"module.model.{name}": value for name, value in torch.load(sys.argv[1]).items()}
    contents = {
        "model": state,
        "args": Arguments(epoch=3),
        "kind": Arguments,
        "schedule": {"lr_lambdas": [decay, lambda epoch: decay(epoch + 1)]},
        "epoch": 3,
    }
    for zipped in (True, False):
        torch.save(contents, f"{sys.argv[2]}/{zipped}.pt", pickle_module=dill, _use_new_zipfile_serialization=zipped)
"""


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_beside_a_class_and_functions_of_main_load_from_what_dill_wrote(zipped: bool, tmp_path: Path) -> None:
    source, model, effect = small_model(seed=1), small_model(seed=0), tmp_path / "effect"
    torch.save(source.backbone.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = [str(tmp_path / name) for name in ("script.py", "weights.pt", "", "effect")]
    subprocess.run([sys.executable, *paths], check=True)
    path = tmp_path / f"{zipped}.pt"
    names = foreign_names(path)
    assert any(name.startswith("__main__") for name in names)
    assert {"dill._dill._create_type", "dill._dill._create_function"} <= set(names)
    before, dill_loaded = path.read_bytes(), "dill" in sys.modules
    load_weights(model, path)
    assert_same_weights(model, source)
    assert not effect.exists()
    assert ("dill" in sys.modules) == dill_loaded
    assert path.read_bytes() == before
    assert read_checkpoint(path)["epoch"] == 3


def test_a_foreign_module_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "landmine.py").write_text("class Thing:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    thing = __import__("landmine").Thing()
    torch.save({"a": thing}, tmp_path / "foreign.pt")
    monkeypatch.delitem(sys.modules, "landmine")
    assert read_checkpoint(tmp_path / "foreign.pt")["a"].name == "landmine.Thing"
    assert "landmine" not in sys.modules


def test_mappings_are_read_and_others_are_a_sentence(tmp_path: Path) -> None:
    torch.save({"a": defaultdict(list, x=[1]), "b": OrderedDict(y=2), "c": {3}}, tmp_path / "mappings.pt")
    assert read_checkpoint(tmp_path / "mappings.pt") == {"a": {"x": [1]}, "b": {"y": 2}, "c": {3}}

    torch.save({"a": Names(x=1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"it holds tests\.weights\.test_foreign\.Names; if you trust it"):
        read_checkpoint(tmp_path / "other.pt")


class Names(dict[str, int]):
    """As attribute dictionaries of other projects are."""


def test_another_protocol_is_a_sentence_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"a": Parameters()}, tmp_path / "new.pt", pickle_protocol=4)
    with pytest.raises(ValueError, match=r"of another kind than torch\.load\(weights_only=True\) reads; .*save_file"):
        read_checkpoint(tmp_path / "new.pt")


def with_object(state: dict[str, Any]) -> dict[str, Any]:
    return {"args": Parameters(), "state_dict": state}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_tensors_beside_objects_are_read(dtype: torch.dtype, zipped: bool, tmp_path: Path) -> None:
    base = torch.arange(24).to(dtype).reshape(2, 3, 4)
    tensors = {
        "whole": base,
        "view": base[:, 1, ::2],
        "transposed": base.permute(2, 0, 1),
        "expanded": base[:1, :1, :1].expand(2, 5, 3),
        "scalar": base[0, 0, 1],
        "empty": base[:0],
    }
    if dtype.is_floating_point:
        tensors["parameter"] = torch.nn.Parameter(base.clone())
    torch.save(with_object(tensors), tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / "file.pt")["state_dict"]
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor.detach()), name


def test_a_stand_in_is_no_weight(tmp_path: Path) -> None:
    state = small_model().state_dict()
    torch.save(state | {"backbone.2.bias": Parameters()}, tmp_path / "object.pt")
    with pytest.raises(ValueError, match=r"backbone\.2\.bias is an object of .*Parameters instead of a tensor"):
        load_weights(small_model(), tmp_path / "object.pt")
    torch.save({"state_dict": Parameters(model=small_model())}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"no weights found; .*state_dict is an object of .*Parameters"):
        load_weights(small_model(), tmp_path / "model.pt")


FLIPS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)


@pytest.fixture(scope="module", params=[True, False], ids=["zip", "legacy"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> types.SimpleNamespace:
    folder = tmp_path_factory.mktemp("fuzz")
    hostile = {"args": Call(exec, f"open({str(folder / 'effect')!r}, 'w').close()")}
    contents = with_object(small_model(seed=1).state_dict()) | {"lr": 0.1, "betas": (0.9, 0.99), "names": ["a", "b"]}
    files = {}
    for name, value in {"harmless": contents, "hostile": contents | hostile}.items():
        torch.save(value, folder / name, _use_new_zipfile_serialization=request.param)
        files[name] = (folder / name).read_bytes()
    # Flips in the pickle are the interesting ones.
    start = files["hostile"].index(b"state_dict")
    return types.SimpleNamespace(folder=folder, start=start, **files)


@settings(max_examples=120, deadline=None)
@given(flips=FLIPS, in_pickle=st.booleans(), hostile=st.booleans())
def test_flipped_bytes_never_act_and_never_give_another_shape(
    foreign: types.SimpleNamespace, flips: list[tuple[int, int]], in_pickle: bool, hostile: bool
) -> None:
    contents = bytearray(foreign.hostile if hostile else foreign.harmless)
    for place, mask in flips:
        where = foreign.start + place % 1000 if in_pickle else place
        contents[where % len(contents)] ^= mask
    path, model = foreign.folder / "flipped.ckpt", small_model()
    path.write_bytes(contents)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    with contextlib.suppress(ValueError):
        load_weights(model, path)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not (foreign.folder / "effect").exists()
