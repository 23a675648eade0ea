"""What is loaded when: names when they are asked for, and a published model without the training stack."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dat_lightning
from dat_lightning import EnergyModel, SmallResNet, WideResNet

SOURCE = ast.parse(Path(dat_lightning.__file__).read_text(encoding="utf-8"))
TRAINING = {"lightning", "torchmetrics", "jsonargparse", "sklearn", "tensorboard", "matplotlib", "timm", "torchvision"}


def loaded_after(code: str) -> set[str]:
    """Top-level names of the modules that a new process has loaded."""
    code += "\nimport sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_core_loads_what_torch_and_numpy_load() -> None:
    assert loaded_after("import dat_lightning.core") - loaded_after("import torch, numpy") == {"dat_lightning"}


def test_the_package_and_its_program_are_imported_without_torch() -> None:
    """Threads are set in the environment, which torch reads when it is loaded."""
    assert loaded_after("import dat_lightning.__main__").isdisjoint({"torch", "numpy", *TRAINING})


@pytest.mark.parametrize("network", [SmallResNet(3, 1, (4,)), WideResNet(10, 1, 3)], ids=["SmallResNet", "WideResNet"])
def test_a_published_model_is_loaded_without_the_training_stack(
    network: SmallResNet | WideResNet, tmp_path: Path
) -> None:
    EnergyModel(network).save_pretrained(tmp_path)
    loaded = loaded_after(f"import dat_lightning; dat_lightning.EnergyModel.from_pretrained({str(tmp_path)!r})")
    assert "safetensors" in loaded
    assert loaded.isdisjoint(TRAINING)


def test_a_model_that_ships_is_loaded_without_the_training_stack() -> None:
    loaded = loaded_after("import dat_lightning; dat_lightning.pretrained('digits')")
    assert "safetensors" in loaded
    assert loaded.isdisjoint(TRAINING)


def test_the_table_the_imports_of_type_checkers_and_all_agree() -> None:
    (block,) = (node for node in SOURCE.body if isinstance(node, ast.If))
    imported = {
        alias.name: (node.module or "").removeprefix("dat_lightning.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == dat_lightning._ROOMS
    assert [*dat_lightning.__all__] == sorted([*imported, "__version__"])


def test_every_name_is_what_its_room_has_and_is_listed() -> None:
    for name in dat_lightning.__all__:
        assert name in dir(dat_lightning)
        value = getattr(dat_lightning, name)
        if name != "__version__":
            room = __import__(f"dat_lightning.{dat_lightning._ROOMS[name]}", fromlist=["*"])
            assert value is getattr(room, name)
    assert dat_lightning.core.marginal_energy is not None


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dat_lightning' has no attribute 'EnergyModle'"):
        dat_lightning.EnergyModle  # type: ignore[attr-defined]  # noqa: B018


def test_a_name_can_be_replaced_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(dat_lightning, "TorchFidelityFeatures", SmallResNet)
        assert dat_lightning.TorchFidelityFeatures is SmallResNet  # type: ignore[comparison-overlap]
    assert dat_lightning.TorchFidelityFeatures.__module__ == "dat_lightning.features.extractors"


@pytest.mark.slow
def test_the_command_line_finds_classes_by_their_last_name() -> None:
    arguments = ["--config", "configs/digits/stage1.yaml", "--trainer.callbacks+", "Memorisation", "--print_config"]
    command = [sys.executable, "-m", "dat_lightning", "fit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert "class_path: dat_lightning.Memorisation" in done.stdout
