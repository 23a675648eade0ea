import copy
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dat_lightning import EnergyModel
from dat_lightning.weights import load_weights, read_checkpoint
from dat_lightning.weights.layouts import find_weights


def small_model(classes: int = 3, seed: int = 0) -> EnergyModel:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, classes))
    return EnergyModel(backbone, mean=[0.1], std=[0.5])


def lightning_checkpoint(model: EnergyModel) -> dict[str, Any]:
    """The layout of our modules' checkpoints, with an average under ``state_dict`` and raw weights beside it."""
    averaged = {f"energy_model.{name}": value for name, value in model.state_dict().items()}
    raw = {name: value + 1 for name, value in averaged.items()}
    other = {"curriculum.num_steps": torch.tensor(3), "metrics.on_val.loss.mean_value": torch.zeros(())}
    return {
        "epoch": 3,
        "state_dict": averaged | other,
        "current_model_state": raw | other,
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(2)}}}],
    }


def assert_same_weights(a: EnergyModel, b: EnergyModel) -> None:
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.mark.parametrize("layout", [lightning_checkpoint, EnergyModel.state_dict])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_layout_loads_weights_and_buffers(
    layout: Callable[[EnergyModel], dict[str, Any]], zipped: bool, tmp_path: Path
) -> None:
    source, model = small_model(seed=1), small_model(seed=0)
    source.backbone(torch.rand(4, 1, 2, 2))  # moves the running statistics
    torch.save(layout(source), tmp_path / "weights.ckpt", _use_new_zipfile_serialization=zipped)
    load_weights(model, str(tmp_path / "weights.ckpt"))
    assert_same_weights(model, source)


def test_averaged_weights_are_preferred_to_raw_ones() -> None:
    model = small_model()
    weights = find_weights(lightning_checkpoint(model)).weights
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "last.ckpt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}$"):
            load_weights(small_model(), path)


def corrupt(path: Path, kind: str) -> None:
    torch.save(small_model().state_dict(), path)
    contents = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"not a checkpoint\n",
            "truncated": contents[: len(contents) // 2],
            "zeros": bytes(1000),
            "overwritten": contents[:200] + bytes(400) + contents[600:],
        }[kind]
    )


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "zeros", "overwritten"])
def test_a_damaged_file_is_named(kind: str, tmp_path: Path) -> None:
    path, model = tmp_path / "broken.ckpt", small_model()
    before = copy.deepcopy(model)
    corrupt(path, kind)
    with pytest.raises(ValueError, match=f"{path} is not a readable checkpoint: it is (damaged|of another kind)"):
        load_weights(model, path)
    assert_same_weights(model, before)


@pytest.mark.parametrize(("contents", "kind"), [([1, 2], "list"), (torch.zeros(3), "Tensor")])
def test_a_file_of_something_else_is_refused(contents: Any, kind: str, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"other.pt holds a {kind}"):
        read_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("contents", [{}, {"epoch": 1, "lr": 0.1}, {"state_dict": {}, "epoch": 1}])
def test_a_file_without_weights_is_refused(contents: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "none.ckpt"
    torch.save(contents, path)
    with pytest.raises(ValueError, match=f"{path}: no weights found; the file has the entries") as error:
        load_weights(small_model(), path)
    assert all(repr(key) in str(error.value) for key in contents)


def test_wrong_shapes_are_listed_by_name(tmp_path: Path) -> None:
    path, model = tmp_path / "ten.ckpt", small_model(classes=3)
    before = copy.deepcopy(model)
    torch.save(lightning_checkpoint(small_model(classes=10)), path)
    with pytest.raises(ValueError, match="does not fit the network") as error:
        load_weights(model, path)
    assert str(path) in str(error.value)
    assert "backbone.2.weight has shape (10, 4) instead of (3, 4)" in str(error.value)
    assert "backbone.2.bias has shape (10,) instead of (3,)" in str(error.value)
    assert_same_weights(model, before)


def test_missing_and_unexpected_weights_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    path, model = tmp_path / "renamed.ckpt", small_model(seed=0)
    before = copy.deepcopy(model)
    state = small_model(seed=1).state_dict()
    state["backbone.head.weight"] = state.pop("backbone.2.weight")
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"missing backbone\.2\.weight, unexpected backbone\.head\.weight$"):
        load_weights(model, path)
    assert_same_weights(model, before)


def test_a_long_list_of_faults_is_cut(tmp_path: Path) -> None:
    faults: dict[str, Tensor] = {f"layer{i}.weight": torch.zeros(1) for i in range(20)}
    torch.save(small_model().state_dict() | faults, tmp_path / "many.ckpt")
    with pytest.raises(ValueError, match=r"unexpected layer4\.weight and 15 more$"):
        load_weights(small_model(), tmp_path / "many.ckpt")


def test_another_normalisation_is_refused(tmp_path: Path) -> None:
    path, backbone = tmp_path / "weights.pt", small_model().backbone
    torch.save(small_model().state_dict(), path)
    with pytest.raises(ValueError, match=r"mean is \[0\.1\d*\] instead of \[0\.2\d*\]$"):
        load_weights(EnergyModel(backbone, mean=[0.2], std=[0.5]), path)
    with pytest.raises(ValueError, match="unexpected mean, unexpected std"):
        load_weights(EnergyModel(backbone), path)


@pytest.mark.parametrize("contents", [{"state_dict": [1]}, {0: torch.zeros(1)}, {"epoch": 3}])
def test_contents_without_weights_are_refused(contents: dict[Any, Any], tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match=r"odd\.ckpt: no weights found"):
        load_weights(small_model(), tmp_path / "odd.ckpt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_anywhere_is_one_clear_error(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    torch.save(small_model().state_dict(), path, _use_new_zipfile_serialization=zipped)
    contents = path.read_bytes()
    for length in range(0, len(contents) - 1, max(1, len(contents) // 150)):
        path.write_bytes(contents[:length])
        with pytest.raises(ValueError, match=r"not a readable checkpoint|does not fit|no weights"):
            load_weights(small_model(), path)


@pytest.mark.parametrize("layout", [lightning_checkpoint, lambda model: model.backbone.state_dict()])
def test_a_head_of_other_classes_is_left_out_if_asked_for(
    layout: Callable[[EnergyModel], dict[str, Any]], tmp_path: Path
) -> None:
    path, source, model = tmp_path / "ten.ckpt", small_model(classes=10, seed=1), small_model(classes=3)
    source.backbone(torch.rand(4, 1, 2, 2))
    before = copy.deepcopy(model)
    torch.save(layout(source), path)
    with pytest.raises(ValueError, match=r"\(10, 4\) instead of \(3, 4\).* classes differs: new_head=True .*new_head"):
        load_weights(model, path)
    assert_same_weights(model, before)
    report = load_weights(model, path, new_head=True)
    assert set(report.initialised) == {"backbone.2.weight", "backbone.2.bias"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name in report.initialised else source).state_dict()[name]), name
    assert "initial values kept for backbone.2.bias, backbone.2.weight" in str(report)


def test_a_head_of_the_same_classes_is_loaded_even_if_a_new_one_is_allowed(tmp_path: Path) -> None:
    source, model = small_model(seed=1), small_model(seed=0)
    torch.save(source.state_dict(), tmp_path / "same.ckpt")
    assert load_weights(model, tmp_path / "same.ckpt", new_head=True).initialised == ()
    assert_same_weights(model, source)


def test_a_head_of_one_by_one_convolution_is_a_head(tmp_path: Path) -> None:
    def conv(classes: int) -> EnergyModel:
        return EnergyModel(nn.Sequential(nn.Linear(2, 2), nn.Conv2d(4, classes, 1, bias=False), nn.Flatten()))

    torch.save(conv(10).state_dict(), tmp_path / "ten.pt")
    assert load_weights(conv(3), tmp_path / "ten.pt", new_head=True).initialised == ("backbone.1.weight",)


def mlp(hidden: int = 4, classes: int = 3, inputs: int = 4) -> EnergyModel:
    layers = OrderedDict(first=nn.Linear(inputs, hidden), norm=nn.BatchNorm1d(hidden), fc=nn.Linear(hidden, classes))
    return EnergyModel(nn.Sequential(layers))


@pytest.mark.parametrize("change", ["hidden", "inputs", "missing", "renamed", "bias alone", "inputs of the head"])
def test_anything_else_than_a_head_is_refused_even_if_a_new_one_is_allowed(change: str, tmp_path: Path) -> None:
    state = {
        "hidden": mlp(hidden=5, classes=10),
        "inputs": mlp(inputs=6),
    }.get(change, mlp(classes=10)).state_dict()
    if change == "missing":
        del state["backbone.fc.bias"]
    if change == "renamed":
        state["backbone.head.weight"] = state.pop("backbone.fc.weight")
    if change == "bias alone":
        state["backbone.fc.weight"] = torch.zeros(3, 4)
    if change == "inputs of the head":
        state["backbone.fc.weight"] = torch.zeros(10, 5)
    torch.save(state, tmp_path / "other.pt")
    model = mlp()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="does not fit the network") as error:
        load_weights(model, tmp_path / "other.pt", new_head=True)
    assert "new_head" not in str(error.value)
    assert_same_weights(model, before)


def test_leaving_the_head_out_is_not_offered_where_more_differs(tmp_path: Path) -> None:
    torch.save(mlp(classes=10).state_dict() | {"backbone.more": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"unexpected backbone\.more") as error:
        load_weights(mlp(), tmp_path / "other.pt")
    assert "new_head" not in str(error.value)


def test_an_inner_layer_that_differs_is_no_head(tmp_path: Path) -> None:
    state = mlp().state_dict() | {"backbone.first.weight": torch.zeros(9, 4), "backbone.first.bias": torch.zeros(9)}
    torch.save(state, tmp_path / "inner.pt")
    with pytest.raises(ValueError, match=r"first\.weight has shape \(9, 4\)"):
        load_weights(mlp(), tmp_path / "inner.pt", new_head=True)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("name", ["backbone.2.weight", "backbone.0.running_var"])
def test_weights_that_are_no_finite_numbers_are_named(name: str, number: float, tmp_path: Path) -> None:
    """1e300 is finite in the file, and infinite in the network."""
    state, model = small_model(seed=1).state_dict(), small_model()
    state[name] = state[name].double()
    state[name].view(-1)[-1] = number
    torch.save(state, tmp_path / "odd.pt")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} holds NaN or infinite numbers$"):
        load_weights(model, tmp_path / "odd.pt")
    assert_same_weights(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    source, model = small_model(seed=1), small_model(seed=0)
    torch.save(
        {name: value.to(dtype) for name, value in source.backbone.state_dict().items() if value.is_floating_point()},
        tmp_path / "half.pt",
    )
    load_weights(model, tmp_path / "half.pt")
    for name, value in model.backbone.state_dict().items():
        expected = source.backbone.state_dict()[name]
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected.to(dtype).to(expected.dtype)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_normaliser_in_half_precision_is_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    """0.3 is 0.30078125 in bfloat16, which has eight bits of precision; 0.31 is another number there too."""
    backbone = small_model().backbone
    half = EnergyModel(backbone, mean=[0.3], std=[0.35]).to(dtype)
    torch.save(half.state_dict(), tmp_path / "half.pt")
    model = EnergyModel(small_model(seed=1).backbone, mean=[0.3], std=[0.35])
    load_weights(model, tmp_path / "half.pt")
    assert model.mean is not None
    assert model.mean.item() == torch.tensor(0.3).item()
    assert torch.equal(next(model.backbone.parameters()), next(half.backbone.parameters()).float())
    other = EnergyModel(small_model(seed=1).backbone, mean=[0.31], std=[0.35])
    with pytest.raises(ValueError, match=r"does not fit the network: mean is \[0.3.*\] instead of \[0.31"):
        load_weights(other, tmp_path / "half.pt")


def test_counters_that_old_files_lack_start_at_zero(tmp_path: Path) -> None:
    source, model = small_model(seed=1), small_model(seed=0)
    model.backbone(torch.rand(4, 1, 2, 2))
    assert model.state_dict()["backbone.0.num_batches_tracked"] == 1
    state = source.state_dict()
    del state["backbone.0.num_batches_tracked"]
    torch.save(state, tmp_path / "old.pt")
    load_weights(model, tmp_path / "old.pt")
    assert_same_weights(model, source)
    assert model.state_dict()["backbone.0.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (torch.zeros(3, dtype=torch.int64), "holds torch.int64 instead of torch.float32"),
        (torch.zeros(3, dtype=torch.complex64), "holds torch.complex64 instead of torch.float32"),
        (torch.zeros(3).to_sparse(), "holds no plain numbers"),
        (torch.zeros(3, device="meta"), "holds no plain numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_tensors_of_another_kind_are_named(value: Tensor, fault: str, tmp_path: Path) -> None:
    torch.save(small_model().state_dict() | {"backbone.2.bias": value}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=rf"does not fit the network: backbone\.2\.bias {fault}$"):
        load_weights(small_model(), tmp_path / "odd.pt")


def test_an_archive_of_code_is_named_and_not_given_to_its_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: called.append(args))
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", pickle.dumps(()))
        archive.writestr("script/data.pkl", pickle.dumps({}))
        archive.writestr("script/version", "3\n")
    with pytest.raises(ValueError, match="not a readable checkpoint: it is of another kind: a TorchScript archive"):
        load_weights(small_model(), tmp_path / "script.pt")
    assert called == []


def test_a_tar_file_is_named_and_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "storages").write_bytes(pickle.dumps(0))
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        archive.add(tmp_path / "storages", "storages")
    with pytest.raises(ValueError, match="not a readable checkpoint: it is of another kind: torch's tar format"):
        load_weights(small_model(), tmp_path / "old.pt")


@pytest.mark.parametrize("contents", [b"", b"not", b"\xff" * 100, (10**12).to_bytes(8, "little") + b"{}"])
def test_damaged_safetensors_are_named(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(contents)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match=f"{path} is not a readable checkpoint: it is (damaged|of another kind)"):
            load_weights(small_model(), path)


def test_a_new_head_is_not_offered_for_a_fault_that_it_would_not_mend(tmp_path: Path) -> None:
    """Two faults, as many as a head has parameters, but of the normaliser."""
    torch.save({f"energy_model.{k}": v for k, v in small_model().state_dict().items()}, tmp_path / "a.ckpt")
    model = small_model()
    model.mean, model.std = torch.full((1, 1, 1, 1), 0.7), torch.full((1, 1, 1, 1), 0.9)
    for new_head in (False, True):
        with pytest.raises(ValueError, match="mean is") as error:
            load_weights(model, tmp_path / "a.ckpt", new_head=new_head)
        assert "new_head=True" not in str(error.value)


@pytest.mark.parametrize("saved_compiled", [True, False])
def test_a_compiled_network_loads_its_own_file_and_a_plain_one(saved_compiled: bool, tmp_path: Path) -> None:
    def compiled(seed: int) -> EnergyModel:
        model = small_model(seed=seed)
        return EnergyModel(torch.compile(model.backbone), [0.5], [0.25])  # type: ignore[arg-type]

    source = compiled(1) if saved_compiled else EnergyModel(small_model(seed=1).backbone, [0.5], [0.25])
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    model = compiled(0)
    load_weights(model, tmp_path / "weights.pt")
    assert_same_weights(model, source)
    # Of another project, which saved the compiled network itself.
    torch.save({"model": source.backbone.state_dict()}, tmp_path / "theirs.pt")
    model = compiled(0)
    load_weights(model, tmp_path / "theirs.pt")
    assert_same_weights(model, source)
