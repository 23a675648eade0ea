import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dat_lightning import EnergyModel
from dat_lightning.checkpoints import energy_model_weights, load_weights, read_checkpoint


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
    weights = energy_model_weights(lightning_checkpoint(model))
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


class Hostile:
    """Creates a folder wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["pickle 2", "pickle 4", "torch", "torch legacy"])
def test_a_hostile_file_is_refused_and_never_executed(writer: str, tmp_path: Path) -> None:
    path, effect = tmp_path / "hostile.ckpt", tmp_path / "effect"
    contents = {"state_dict": small_model().state_dict(), "callbacks": Hostile(effect)}
    if writer.startswith("pickle"):
        path.write_bytes(pickle.dumps(contents, protocol=int(writer[-1])))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=writer == "torch")
    for load in (read_checkpoint, lambda p: load_weights(small_model(), p)):
        with pytest.raises(ValueError, match=f"{path} is not a readable checkpoint: .* that could run code"):
            load(path)
        assert not effect.exists()


def test_the_hostile_object_acts_where_a_file_is_trusted(tmp_path: Path) -> None:
    # Otherwise the test above would show nothing.
    pickle.loads(pickle.dumps(Hostile(tmp_path / "effect")))
    assert (tmp_path / "effect").is_dir()


def test_a_harmless_object_is_refused_too(tmp_path: Path) -> None:
    torch.save({"state_dict": small_model()}, tmp_path / "object.ckpt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "object.ckpt")


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
