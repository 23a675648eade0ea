import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dat_lightning.core import batch_norm_layers, joint_energy, marginal_energy
from dat_lightning.core.errors import InputError
from dat_lightning.weights import EnergyModel


def random_logits(num_classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    logits = 3 * torch.randn(6, num_classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(num_classes, (6,), generator=generator)


def mixed_network() -> nn.Sequential:
    """Every kind of layer whose mode matters, on images (N, 2, 4, 4)."""
    return nn.Sequential(
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 3, 3, padding=1),
        nn.SyncBatchNorm(3),
        nn.LayerNorm([3, 4, 4]),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.BatchNorm1d(48),
        nn.Linear(48, 4),
    )


@pytest.mark.parametrize("num_classes", [1, 2, 10])
def test_energies_equal_their_definitions(num_classes: int) -> None:
    logits, y = random_logits(num_classes)
    joint, marginal = joint_energy(logits, y), marginal_energy(logits)
    for i, (row, label) in enumerate(zip(logits.tolist(), y.tolist(), strict=True)):
        assert math.isclose(joint[i], -row[label], rel_tol=1e-15)
        assert math.isclose(marginal[i], -math.log(sum(math.exp(value) for value in row)), rel_tol=1e-13)


def test_one_class_gives_one_energy() -> None:
    logits, y = random_logits(1)
    torch.testing.assert_close(joint_energy(logits, y), marginal_energy(logits), rtol=1e-15, atol=0)


def test_energies_give_the_class_posterior() -> None:
    logits, y = random_logits(5)
    exponentials = np.exp(logits.numpy())
    posterior = exponentials[np.arange(6), y.numpy()] / exponentials.sum(1)
    np.testing.assert_allclose((marginal_energy(logits) - joint_energy(logits, y)).exp(), posterior, rtol=1e-12)


def test_marginal_energy_of_huge_logits_is_finite() -> None:
    assert marginal_energy(torch.tensor([[1e4, 1e4], [-1e4, -1e4]])).tolist() == pytest.approx(
        [-1e4 - math.log(2), 1e4 - math.log(2)]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_energies_of_half_precision_logits_are_float32(dtype: torch.dtype) -> None:
    logits = (30 + random_logits(10)[0]).to(dtype).requires_grad_(True)
    energy = marginal_energy(logits)
    assert energy.dtype == torch.float32
    assert torch.allclose(energy.double(), -logits.double().logsumexp(1), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(energy.sum(), logits)
    # The weights of the softmax, rounded one by one; from an energy in half precision they would sum to 1 ± 0.1.
    assert torch.allclose(gradient.double().sum(1), torch.tensor(-1.0).double(), atol=2e-3)
    assert marginal_energy(random_logits(10)[0]).dtype == torch.float64


def test_the_model_normalises_each_channel_inside() -> None:
    model = EnergyModel(nn.Flatten(), mean=[0.1, 0.2], std=[0.5, 4.0]).double()
    x = torch.rand(3, 2, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.concatenate([(x[:, 0, 0] - 0.1) / 0.5, (x[:, 1, 0] - 0.2) / 4], axis=1)
    np.testing.assert_allclose(model(x).numpy(), expected, rtol=1e-6)  # the buffers started as float32


def test_images_of_one_channel_are_not_spread_over_three() -> None:
    model = EnergyModel(nn.Flatten(), mean=[0.1, 0.2, 0.3], std=[1.0, 1.0, 1.0])
    with pytest.raises(InputError, match=r"takes images of 3 channel\(s\), got the shape \(2, 1, 4, 4\)"):
        model(torch.rand(2, 1, 4, 4))
    with pytest.raises(InputError, match=r"y must have one label for each of 2 images, got the shape \(1,\)"):
        model.joint_energy(torch.rand(2, 3, 4, 4), torch.zeros(1, dtype=torch.long))


def test_a_model_without_normalisation_passes_raw_pixels() -> None:
    x = torch.rand(2, 3, 2, 2)
    assert torch.equal(EnergyModel(nn.Flatten())(x), x.flatten(1))


def test_the_model_s_energies_are_those_of_its_logits() -> None:
    model, y = EnergyModel(mixed_network()).eval(), torch.tensor([3, 0, 1])
    x = torch.rand(3, 2, 4, 4)
    logits = model(x)
    assert torch.equal(model.joint_energy(x, y), -logits[torch.arange(3), y])
    torch.testing.assert_close(model.marginal_energy(x), -logits.exp().sum(1).log())


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], None, "go together"),
        (None, [0.5], "go together"),
        ([0.5], [0.5, 0.5], "one entry per channel"),
        ([0.5], [0.0], "std must be positive"),
        ([0.5], [float("nan")], "std must be positive"),
    ],
)
def test_incomplete_normalisation_is_refused(mean: list[float] | None, std: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnergyModel(nn.Identity(), mean, std)


def test_batch_norm_layers_are_all_batch_norms_and_nothing_else() -> None:
    assert [type(m) for m in batch_norm_layers(mixed_network())] == [
        nn.BatchNorm2d,
        nn.SyncBatchNorm,
        nn.BatchNorm1d,
    ]


def test_frozen_batch_norm_stays_in_eval_mode_and_other_layers_follow_train() -> None:
    model = EnergyModel(mixed_network())
    parent = nn.Sequential(model)
    model.freeze_batch_norm()
    for mode in (True, False, True, True):
        parent.train(mode)
        batch_norms = batch_norm_layers(model)
        assert [m.training for m in batch_norms] == [False, False, False]
        others = [m for m in model.modules() if m not in batch_norms]
        assert all(m.training == mode for m in others)
        assert {nn.LayerNorm, nn.Dropout} <= {type(m) for m in others}


def test_without_freezing_all_layers_follow_train() -> None:
    model = EnergyModel(mixed_network())
    for mode in (False, True):
        assert all(m.training == mode for m in model.train(mode).modules())


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_affine_parameters() -> None:
    torch.manual_seed(0)
    # Without SyncBatchNorm, which refuses CPU tensors in train mode.
    model = EnergyModel(nn.Sequential(nn.BatchNorm2d(2), nn.LayerNorm([2, 4, 4]), nn.Flatten(), nn.Linear(32, 3)))
    model.freeze_batch_norm()
    model.train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    energy = model.marginal_energy(torch.rand(8, 2, 4, 4)).square().sum()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(energy, list(parameters.values()))
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("saved_compiled", [True, False])
def test_the_names_of_a_compiled_network_are_those_of_the_network(saved_compiled: bool) -> None:
    """torch.compile wraps a network at once, and compiles it when it is called, which is not here."""

    def model(compiled: bool) -> EnergyModel:
        network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))
        return EnergyModel(torch.compile(network) if compiled else network, mean=[0.5], std=[0.5])  # type: ignore[arg-type]

    source = nn.ModuleDict({"energy_model": model(saved_compiled)})
    state = source.state_dict()
    plain = nn.ModuleDict({"energy_model": model(False)}).state_dict()
    assert set(state) == set(plain)
    named = {name.replace("backbone.", "backbone._orig_mod."): value for name, value in state.items()}
    for compiled in (True, False):
        for file in (state, named):  # the second as older versions wrote it
            target = nn.ModuleDict({"energy_model": model(compiled)})
            target.load_state_dict(file)
            for name, value in target.state_dict().items():
                assert torch.equal(value, state[name]), name
        with pytest.raises(RuntimeError, match=r"Missing key.*backbone\..*2\.bias"):
            target.load_state_dict({name: value for name, value in state.items() if not name.endswith("2.bias")})
        with pytest.raises(RuntimeError, match=r"Unexpected key.*backbone\..*surplus"):
            target.load_state_dict({**state, "energy_model.backbone.surplus": torch.zeros(1)})


def test_classes_are_counted_without_a_trace() -> None:
    model = EnergyModel(mixed_network()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert model.count_classes(torch.rand(3, 2, 4, 4)) == 4
        drawn = torch.rand(1)
        torch.manual_seed(0)
        torch.rand(3, 2, 4, 4)  # the images
        assert torch.equal(torch.rand(1), drawn)  # dropout drew nothing
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
