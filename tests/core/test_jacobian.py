from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dat_lightning import EnergyModel, SmallResNet
from dat_lightning.core import energy_gradient_norm, jacobian_norm, no_trace, normal_noise
from dat_lightning.core.errors import InputError

SHAPE = (1, 6, 6)


def network(num_classes: int = 4, norm: Literal["batch", "layer"] = "batch") -> EnergyModel:
    """Random weights and statistics, so that no singular value is like another."""
    model = EnergyModel(SmallResNet(num_classes, widths=(3, 5), norm=norm), mean=[0.3], std=[0.35])
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name not in ("mean", "std"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    return model.double().eval()


def images(count: int) -> Tensor:
    return torch.rand(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def dense_singular_values(model: nn.Module, x: Tensor) -> Tensor:
    """Singular values (N, K) of each image's Jacobian, put together row by row by backward passes."""
    rows = []
    for image in x:
        leaf = image[None].clone().requires_grad_()
        logits = model(leaf)[0]
        jacobian = torch.stack([torch.autograd.grad(f, leaf, retain_graph=True)[0].flatten() for f in logits])
        rows.append(torch.linalg.svdvals(jacobian))
    return torch.stack(rows)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_power_iteration_finds_the_largest_singular_value(norm: Literal["batch", "layer"]) -> None:
    model, x = network(norm=norm), images(5)
    expected = dense_singular_values(model, x)
    # So that the first is told from the second, and is not the same for all images.
    assert (expected[:, 0] / expected[:, 1]).min() > 1.01
    assert expected[:, 0].std() > 0.01 * expected[:, 0].mean()
    torch.testing.assert_close(jacobian_norm(model, x, num_steps=2000), expected[:, 0], rtol=1e-9, atol=0)
    found = torch.stack([jacobian_norm(model, x, num_steps) for num_steps in range(21)])
    assert (found <= expected[:, 0] * (1 + 1e-12)).all()  # a bound from below,
    assert (found.diff(dim=0) >= -1e-12 * expected[:, 0]).all()  # that grows,
    torch.testing.assert_close(found[-1], expected[:, 0], rtol=0.05, atol=0)  # and is near soon


def test_a_linear_network_of_known_singular_values() -> None:
    left, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(36, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    matrix = left @ torch.diag(torch.tensor([7.0, 2.0, 1.0], dtype=torch.float64)) @ right.T
    found = jacobian_norm(lambda x: x.flatten(1) @ matrix.T, images(2))
    torch.testing.assert_close(found, torch.full((2,), 7.0, dtype=torch.float64), rtol=1e-12, atol=0)
    # After k steps: the Rayleigh quotient of (MMᵀ)ᵏu.
    start = normal_noise(3, "jacobian_norm", [0, 1], (3,)).double()
    for steps in (0, 1, 3):
        u = start @ torch.linalg.matrix_power(matrix @ matrix.T, steps)
        expected = (u @ matrix).norm(dim=1) / u.norm(dim=1)
        found = jacobian_norm(lambda x: x.flatten(1) @ matrix.T, images(2), num_steps=steps, seed=3)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_of_one_logit_it_is_the_gradients_length_at_once() -> None:
    model, x = network(num_classes=1), images(4)
    with no_trace(model):
        expected = energy_gradient_norm(model, x).sqrt()
    torch.testing.assert_close(jacobian_norm(model, x, num_steps=0), expected, rtol=1e-12, atol=0)


def test_it_bounds_the_energys_gradient() -> None:
    model, x = network(), images(5)
    with no_trace(model):
        assert (energy_gradient_norm(model, x).sqrt() <= jacobian_norm(model, x)).all()


def test_the_start_is_a_function_of_seed_and_row() -> None:
    model, x = network(), images(5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = jacobian_norm(model, x, num_steps=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(jacobian_norm(model, x, num_steps=1), found)
    torch.testing.assert_close(jacobian_norm(model, x[:2], num_steps=1), found[:2], rtol=1e-12, atol=0)
    assert not torch.allclose(jacobian_norm(model, x, num_steps=1, seed=1), found)
    # Images alike in all have starts of their own.
    assert len(set(jacobian_norm(model, x[:1].expand(3, -1, -1, -1), num_steps=0).tolist())) == 3


def test_slopes_too_large_to_square_flat_ones_and_nan() -> None:
    def logits(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * torch.tensor([[3e15], [0.0], [torch.nan], [2.0]])

    found = jacobian_norm(logits, torch.rand(4, *SHAPE))
    torch.testing.assert_close(found, torch.tensor([3e15, 0.0, torch.nan, 2.0]), rtol=1e-6, atol=0, equal_nan=True)


def test_steps_are_a_whole_number_and_not_negative() -> None:
    for steps in (-1, 2.5):
        with pytest.raises(InputError, match=f"num_steps must be a whole number of at least 0, got {steps}"):
            jacobian_norm(network(), images(1), num_steps=steps)  # type: ignore[arg-type]
