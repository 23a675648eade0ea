"""Energies and their gradients on sets of images."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from dat_lightning import PGDSampler, ThreatModel, ascend
from dat_lightning.core import cross_entropy
from dat_lightning.evaluation import EnergyStatistics
from dat_lightning.evaluation.energy_statistics import energy_values
from dat_lightning.results import Figure
from tests import tiny
from tests.evaluation.test_evaluator import ALL, IMAGES, LABELS, Plain
from tests.evaluation.test_ood_detection import Others
from tests.sampling.test_sampling import Collector


def run(path: Path, *callbacks: Callback, module: LightningModule | None = None, **data: Any) -> dict[str, Figure]:
    trainer = tiny.trainer(path, callbacks, inference_mode=True)
    batches: DataLoader[Any] = DataLoader(ALL, batch_size=None)  # type: ignore[arg-type]
    trainer.test(module or Plain(), verbose=False, **(data or {"dataloaders": batches}))
    (statistics,) = (c for c in callbacks if isinstance(c, EnergyStatistics))
    found = {figure.name: figure for figure in statistics.figures}
    for name, figure in found.items():
        assert float(trainer.callback_metrics[f"test/{name}"]) == pytest.approx(figure.value, rel=1e-5)
    return found


def linear(module: Plain, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """E = −log Σ exp(Wx) and ‖∇ₓE‖² = ‖Wᵀ softmax(Wx)‖² of a linear network."""
    weight = module.net.weight.detach().double().numpy()
    e = np.exp(x.flatten(1).double().numpy() @ weight.T)
    p = e / e.sum(1, keepdims=True)
    return -np.log(e.sum(1)), ((p @ weight) ** 2).sum(1)


def test_a_linear_network_has_a_closed_form(tmp_path: Path) -> None:
    module, others = Plain(), Others()
    statistics = EnergyStatistics({"grey": others}, num_bins=7, batch_size=3)
    found = run(tmp_path, statistics, module=module)
    assert set(found) == {"energy_test", "r1_test", "energy_ood_grey", "r1_ood_grey"}
    energies = {}
    for name, x in (("test", IMAGES), ("ood_grey", others.images)):
        energies[name], r1 = linear(module, x)
        for quantity, values in (("energy", energies[name]), ("r1", r1)):
            figure = found[f"{quantity}_{name}"]
            assert figure.value == pytest.approx(values.mean(), rel=1e-5)
            assert figure.num_samples == len(x)
            assert figure.details["std"] == pytest.approx(values.std(), rel=1e-4)
            quantiles = np.quantile(values, figure.details["quantile_levels"])
            assert figure.details["quantiles"] == pytest.approx(quantiles.tolist(), rel=1e-5)
    histogram = found["energy_test"].details["histogram"]
    everything = np.concatenate(list(energies.values()))
    assert histogram["edges"] == pytest.approx(np.linspace(everything.min(), everything.max(), 8).tolist(), rel=1e-5)
    for name, values in energies.items():
        inner = np.searchsorted(histogram["edges"][1:-1], values, side="right")
        assert histogram["counts"][name] == np.bincount(inner, minlength=7).tolist()


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    found = run(tmp_path, EnergyStatistics())
    assert set(found) == {"energy_test", "r1_test"}
    said = found["energy_test"].details["left_out"]
    assert set(said) == {"adversarial", "train", "ood", "generated"}
    assert said["generated"] == "no PGDSampler of the Trainer samples in test"


def test_adversarial_images_are_those_of_the_attack(tmp_path: Path) -> None:
    module, attack = Plain(), ThreatModel(eps=0.3, step_size=0.2, num_steps=2, random_start=True)
    found = run(tmp_path, EnergyStatistics(attack=attack, seed=5), module=module)
    x_adv = ascend(module, IMAGES, LABELS, cross_entropy, attack, draws=torch.arange(10), seed=5)
    energy, r1 = linear(module, x_adv)
    assert found["energy_adversarial"].value == pytest.approx(energy.mean(), rel=1e-5)
    assert found["r1_adversarial"].value == pytest.approx(r1.mean(), rel=1e-5)
    assert found["energy_adversarial"].value != pytest.approx(found["energy_test"].value, rel=1e-3)
    assert found["energy_adversarial"].settings["threat_model"] == asdict(attack)


def test_digits_have_every_set_whatever_the_order_of_callbacks(tmp_path: Path) -> None:
    results = []
    for order in (1, -1):
        collector, statistics = Collector(), EnergyStatistics(num_images=40)
        sampler = PGDSampler(num_samples=25, num_steps=[1, 3], step_size=0.5, batch_size=10)
        module, data = tiny.stage1(), tiny.digits()
        found = run(tmp_path, *[statistics, sampler, collector][::order], module=module, datamodule=data)
        results.append({name: figure.value for name, figure in found.items()})
        sets = ["test", "adversarial", "train", "ood_held_out", "generated_1_steps", "generated_3_steps"]
        assert set(found) == {f"{quantity}_{name}" for quantity in ("energy", "r1") for name in sets}
        assert found["energy_test"].details["left_out"] == {}
        counts = found["energy_test"].details["histogram"]["counts"]
        assert {name: sum(row) for name, row in counts.items()} == dict(
            zip(sets, [360, 360, 40, 40, 25, 25], strict=True)
        )
        module.eval()
        x = collector.images(3).clone()
        r1 = module.energy_gradient_norm(x).mean()
        assert results[-1]["energy_generated_3_steps"] == pytest.approx(
            -float(module(x).detach().logsumexp(1).mean()), rel=1e-4
        )
        assert results[-1]["r1_generated_3_steps"] == pytest.approx(float(r1), rel=1e-3)
        assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    train = data.reference_data()[range(1437)]["x"]
    mean = -module(train).detach().logsumexp(1)
    assert mean.min() < results[0]["energy_train"] < mean.max()
    assert results[0]["energy_train"] == pytest.approx(float(mean.mean()), abs=5 * float(mean.std()) / 40**0.5)


def test_the_attack_of_the_module_is_the_default(tmp_path: Path) -> None:
    module = tiny.stage1(eval_threat_model=ThreatModel(eps=0.7, step_size=0.25, num_steps=3))
    found = run(tmp_path, EnergyStatistics(num_images=20), module=module, datamodule=tiny.digits())
    assert found["r1_adversarial"].settings["threat_model"] == asdict(module.eval_threat_model)


def test_all_training_images_are_their_mean(tmp_path: Path) -> None:
    module, data = tiny.stage1(), tiny.digits()
    found = run(tmp_path, EnergyStatistics(num_images=5000, batch_size=500), module=module, datamodule=data)
    train = -module.eval()(data.reference_data()[range(1437)]["x"]).detach().logsumexp(1).double().mean()
    assert found["energy_train"].value == pytest.approx(float(train), rel=1e-5)
    assert found["energy_train"].num_samples == 1437


def test_another_attack_is_not_mistaken_for_the_one_in_the_folder(tmp_path: Path) -> None:
    values = []
    for eps in (0.1, 2.0, 0.1):
        module = tiny.stage1(eval_threat_model=ThreatModel(eps=eps, step_size=1.0, num_steps=1))
        statistics = EnergyStatistics(num_images=5, dirpath=str(tmp_path / "kept"))
        found = run(tmp_path, statistics, module=module, datamodule=tiny.digits())
        values.append(found["energy_adversarial"].value)
    assert values[0] == values[2] != values[1]


def test_samples_of_validation_are_left_alone(tmp_path: Path) -> None:
    statistics, sampler = EnergyStatistics(num_images=5), PGDSampler(num_samples=4, num_steps=[1], batch_size=4)
    trainer = tiny.trainer(tmp_path, [statistics, sampler], limit_val_batches=1, limit_test_batches=1)
    trainer.validate(tiny.stage1(), datamodule=tiny.digits(), verbose=False)
    assert statistics.figures == []
    assert statistics._samples == {}
    for _ in range(2):
        trainer.test(tiny.stage1(), datamodule=tiny.digits(), verbose=False)
        assert {f.num_samples for f in statistics.figures if f.name == "energy_generated_1_steps"} == {4}


def test_energies_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="EnergyStatistics: 20 energies or gradients of test are NaN or infinite"):
        run(tmp_path, EnergyStatistics(), module=Plain(later=float("nan")))
    for name in ("num_images", "num_bins", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            EnergyStatistics(**{name: 0})  # type: ignore[arg-type]


def test_energies_are_those_of_eval_mode_and_leave_no_trace() -> None:
    network = tiny.stage1().train()
    x = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    values = energy_values(network, x)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert values["energy"].tolist() == pytest.approx((-network.eval()(x).detach().logsumexp(1)).tolist(), rel=1e-5)
    assert values["r1"].tolist() == pytest.approx(network.energy_gradient_norm(x).tolist(), rel=1e-4)
