"""Pickles that would act when they are read: none does, and the reader says what it refused."""

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

from dat_lightning.weights import StandIn, load_weights, pickles, read_checkpoint
from tests.weights.test_loading import assert_same_weights, small_model

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
FORMATS = ["torch", "torch legacy", "pickle 0", "pickle 2", "pickle 4", "pickle 5"]


class Call:
    """Calls a function wherever it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.reduced


def attacks(folder: Path) -> dict[str, Call]:
    """Calls that each leave a file or folder named ``effect``, under the names by which they are refused."""
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


# As a message shows them: old protocols write names of Python 2, new ones those of the C modules.
ATTACKS = {
    "posix.system": "posix.system",
    "posix.mkdir": "posix.mkdir",
    "builtins.exec": "(__builtin__|builtins).exec",
    "builtins.eval": "(__builtin__|builtins).eval",
    "subprocess.call": "(commands|subprocess).call",
    "runpy.run_path": "runpy.run_path",
    "shutil.copy": "shutil.copy",
    "pickle.loads": "_?pickle.loads",
    "torch.hub._load_local": "torch.hub._load_local",
    "torch.serialization.save": "torch.serialization.save",
    "torch.storage._load_from_bytes": "torch.storage._load_from_bytes",
}


def write(contents: Any, path: Path, form: str) -> None:
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(contents, protocol=int(form[-1])))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=form == "torch")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_by_name_and_does_nothing(name: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.ckpt"
    write({"state_dict": {}, "callbacks": attacks(tmp_path)[name]}, path, form)
    for load in (read_checkpoint, lambda p: load_weights(small_model(), p)):
        with pytest.raises(
            ValueError, match=rf"{path} is not a readable checkpoint: it names {ATTACKS[name]}, and .* run"
        ):
            load(path)
        assert not (tmp_path / "effect").exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_acts_where_a_file_is_trusted(name: str, tmp_path: Path) -> None:
    # Otherwise the test above would show nothing.
    pickle.loads(pickle.dumps(attacks(tmp_path)[name]))
    assert (tmp_path / "effect").exists()


class Parameters:
    """As in cox: an object of arguments."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


PLACES: dict[str, Callable[[Any], Any]] = {
    "the file": lambda call: call,
    "the arguments": lambda call: {"args": Parameters(deep=Parameters(hook=[(call,)]))},
    "a weight": lambda call: {"state_dict": {"backbone.0.weight": call}},
    "a key": lambda call: {("a", call): 1},
    "a set": lambda call: {"a": {1, call}},
    "an argument of a stand-in": lambda call: {"a": Call(complex, call)},
    "an attribute of a mapping": lambda call: attributed(OrderedDict(), call),
}


def attributed(target: Any, call: Any) -> Any:
    target.hook = call
    return target


@pytest.mark.parametrize("form", ["torch", "torch legacy", "pickle 2"])
@pytest.mark.parametrize("place", PLACES)
def test_an_attack_is_refused_wherever_it_hides(place: str, form: str, tmp_path: Path) -> None:
    write(PLACES[place](attacks(tmp_path)["posix.system"]), tmp_path / "hostile.ckpt", form)
    with pytest.raises(ValueError, match=r"it names posix\.system"):
        load_weights(small_model(), tmp_path / "hostile.ckpt")
    assert not (tmp_path / "effect").exists()


class Acts(list[Any]):
    """Acts in every method that unpickling may call."""

    effect = ""

    def touch(self) -> None:
        Path(self.effect).touch()

    def __setstate__(self, state: Any) -> None:
        Path(state["effect"]).touch()

    def append(self, value: Any) -> None:
        Path(value).touch()

    def extend(self, values: Any) -> None:
        Path(next(iter(values))).touch()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Acts, (), {"effect": self.effect}, iter([self.effect])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_foreign_object_is_not_built_and_the_weights_beside_it_load(zipped: bool, tmp_path: Path) -> None:
    source, model, acts = small_model(seed=1), small_model(seed=0), Acts()
    acts.effect = str(tmp_path / "effect")
    contents = {"args": acts, "model": source.backbone.state_dict(), "after": [acts, Path("x"), torch.device("cpu")]}
    torch.save(contents, tmp_path / "foreign.pt", _use_new_zipfile_serialization=zipped)
    load_weights(model, tmp_path / "foreign.pt")
    assert_same_weights(model, source)
    assert not (tmp_path / "effect").exists()
    read = read_checkpoint(tmp_path / "foreign.pt")
    assert read["args"] == StandIn("tests.weights.test_pickles.Acts")
    assert read["after"][0] is read["args"]
    torch.load(tmp_path / "foreign.pt", weights_only=False)
    assert (tmp_path / "effect").exists()


def test_a_foreign_module_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "landmine.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "foreign.pt").write_bytes(b"\x80\x02clandmine\nThing\n)R.")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "foreign.pt")
    assert "landmine" not in sys.modules
    assert pickles.load(io.BytesIO(b"\x80\x02clandmine\nThing\n)R.")) == StandIn("landmine.Thing")


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


SYSTEM = b"cposix\nsystem\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    ("crafted", "complaint"),
    [
        (SYSTEM + b"q\x000h\x00" + text("true") + b"\x85R.", "names posix.system"),  # through the memo
        (b"\x80\x04" + text("os") + text("system") + b"\x93" + text("true") + b"\x85R.", "names os.system"),
        (b"(" + b"S'true'\niposix\nsystem\n.", "names posix.system"),  # INST
        (b"(" + SYSTEM + text("true") + b"o.", "names posix.system"),  # OBJ
        (b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93.", "serialization.os.system"),
        (b"\x80\x04" + text("foreign.os") + text("system") + b"\x93.", "names foreign.os.system"),
        (b"\x80\x04" + text("builtins") + text("object.__reduce__") + b"\x93.", "names builtins.object.__reduce__"),
        (b"ctorch\nload\n.", "names torch.load"),
        (b"ctorch\ncompile\n.", "names torch.compile"),
        (b"ctorch._C\n_cuda_init\n.", "names torch._C._cuda_init"),
        (b"ctorch.jit\nload\n.", "names torch.jit.load"),
        (b"cbuiltins\ngetattr\n.", "names builtins.getattr"),
        (b"c__builtin__\nexecfile\n.", "names __builtin__.execfile"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"Pstorage\n.", "opcode PERSID"),
        (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
        (text("storage") + b"Q.", "reference to something other than a storage"),
        (REBUILD + b"N}" + text("__code__") + b"Ns\x86b.", "changes a _Builder"),
        (REBUILD + b"NNNN(tR.", "calls a NoneType"),
        (text("a") + b")R.", "calls a str"),
        (b"ctorch\nfloat32\n)R.", "calls a dtype"),
        (b"ccollections\nOrderedDict\n)\x92.", "takes more than it holds"),
        (text("a") + b"K\x01a.", "appends to a str"),
        (b"]K\x01K\x02s.", "sets items of a list"),
        (b"K\x01}b.", "changes a int"),
        (REBUILD + b"(K\x01K\x00)))}tR.", "without a storage"),
        (b"ccollections\nOrderedDict\n)}\x92.", "calls a NoneType"),
        (b"]q\x00", "exhausted before seeing STOP"),
        (b"0.", "pop from empty list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_crafted_pickle_is_refused(crafted: bytes, complaint: str) -> None:
    with pytest.raises((pickle.UnpicklingError, ValueError, IndexError), match=complaint):
        pickles.load(io.BytesIO(crafted))


def test_an_attribute_of_a_class_cannot_be_set() -> None:
    crafted = b"ctorch.utils.data.dataset\nDataset\nN}" + text("hooked") + b"\x88s\x86b."
    assert pickles.load(io.BytesIO(crafted)) == StandIn("torch.utils.data.dataset.Dataset")
    assert not hasattr(torch.utils.data.Dataset, "hooked")
    pickle.loads(crafted)  # where it is trusted, it can
    assert hasattr(torch.utils.data.Dataset, "hooked")
    del torch.utils.data.Dataset.hooked


def test_classes_of_the_language_are_stand_ins_and_not_refused() -> None:
    for name in ("object", "type", "range", "dict", "ValueError"):
        assert pickles.load(io.BytesIO(f"cbuiltins\n{name}\n.".encode())) == StandIn(f"builtins.{name}")
    assert pickles.load(io.BytesIO(b"c__builtin__\nxrange\n.")) == StandIn("__builtin__.xrange")
    assert pickles.load(io.BytesIO(b"cscipy.signal.windows\nHann\n.")) == StandIn("scipy.signal.windows.Hann")


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
DATA = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner)
)


@settings(max_examples=60, deadline=None)
@given(data=DATA, protocol=st.integers(0, 5))
def test_data_are_read_as_python_reads_them(data: Any, protocol: int) -> None:
    assert pickles.load(io.BytesIO(pickle.dumps(data, protocol))) == data


def test_mappings_and_shared_parts_are_read() -> None:
    shared = [1]
    data = {"a": OrderedDict(x=shared), "b": defaultdict(list, y=shared), "c": b"bytes", "d": {3, 4}, "e": shared}
    data["self"] = data["e"]
    read = pickles.load(io.BytesIO(pickle.dumps(data, 4)))
    assert read["d"] == StandIn("builtins.set")
    assert {key: read[key] for key in "abce"} == {"a": {"x": [1]}, "b": {"y": [1]}, "c": b"bytes", "e": [1]}
    assert read["a"]["x"] is read["e"]


def test_entries_that_no_checkpoint_needs_are_left_out() -> None:
    """A key made of tuples in tuples would take torch's readers past the end of the stack when it is hashed."""
    crafted = b"}(K\x01K\x02" + b")" + b"\x85" * 10**5 + b"K\x03" + b"u."
    assert pickles.load(io.BytesIO(crafted)) == {1: 2}


def test_the_memo_keeps_what_was_put_under_a_number() -> None:
    assert pickles.load(io.BytesIO(b"K\x07q\x050h\x05.")) == 7
    assert pickles.load(io.BytesIO(b"\x80\x04K\x07\x94K\x08\x94\x86h\x00\x86.")) == ((7, 8), 7)


def test_numbers_without_a_storage_type_of_their_own_are_read(tmp_path: Path) -> None:
    tensor = torch.arange(5).to(torch.uint16)
    torch.save(with_object({"a": tensor}), tmp_path / "new.pt")
    assert torch.equal(read_checkpoint(tmp_path / "new.pt")["state_dict"]["a"], tensor)


def with_object(state: dict[str, Any]) -> dict[str, Any]:
    # The object makes torch's own reader refuse the file, so that ours reads it.
    return {"args": Parameters(), "state_dict": state}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_tensors_are_read_as_torch_reads_them(dtype: torch.dtype, zipped: bool, tmp_path: Path) -> None:
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


def test_a_tensor_may_not_reach_beyond_its_storage(tmp_path: Path) -> None:
    """Torch's own way would fill what is missing from memory that holds anything."""
    for size, stride, fits in [
        ((2, 3), (3, 1), True),
        ((2, 4), (4, 1), False),
        ((7,), (1,), False),
        ((6,), (-1,), False),
    ]:
        storage = torch.arange(6.0)._typed_storage()
        if fits:
            assert pickles._tensor(storage, 0, size, stride).tolist() == [[0, 1, 2], [3, 4, 5]]
            with pytest.raises(pickle.UnpicklingError, match="in a storage of 24 bytes"):
                pickles._tensor(storage, 1, size, stride)
        else:
            with pytest.raises(pickle.UnpicklingError, match=r"in a storage of 24 bytes|no natural numbers"):
                pickles._tensor(storage, 0, size, stride)


def test_a_stand_in_is_no_weight(tmp_path: Path) -> None:
    state = small_model().state_dict()
    torch.save(state | {"backbone.2.bias": Parameters()}, tmp_path / "object.pt")
    with pytest.raises(ValueError, match=r"backbone\.2\.bias is an object of .*Parameters instead of a tensor"):
        load_weights(small_model(), tmp_path / "object.pt")
    torch.save({"state_dict": small_model()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"no weights found; .*state_dict is an object of .*EnergyModel"):
        load_weights(small_model(), tmp_path / "model.pt")


def test_network_objects_of_old_torch_are_not_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would compare such a network's source with a text in the file, and write a patch beside it."""
    monkeypatch.chdir(tmp_path)
    reader = pickles.Unpickler(io.BytesIO(b"(" + text("module") + b"cforeign\nNet\n" + text("f") + text("s") + b"tQ."))
    reader.persistent_load = lambda identifier: pytest.fail("asked torch")
    assert reader.load() == StandIn("torch.nn.Module")


FLIPS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)


@pytest.fixture(scope="module", params=[True, False], ids=["zip", "legacy"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> types.SimpleNamespace:
    folder = tmp_path_factory.mktemp("fuzz")
    hostile = {"args": Call(os.system, f"touch {folder / 'effect'}")}
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
