"""How far a small change of an image can move the logits: the spectral norm of the network's Jacobian."""

import torch
from torch import Tensor

from dat_lightning.core.ascent import Logits
from dat_lightning.core.errors import require_counts
from dat_lightning.core.random_streams import normal_noise
from dat_lightning.core.threat_model import per_example_norm


def jacobian_norm(logits: Logits, x: Tensor, num_steps: int = 20, seed: int = 0) -> Tensor:
    """Returns the largest singular value of ∂f/∂x of each image, (N,), by power iteration; needs gradients enabled.

    It is a lower bound that grows with each step, and is exact for one logit after none. It bounds the energy's
    gradient, which is −Jᵀ softmax f(x), in each image: ‖∇ₓE(x)‖ ≤ ‖J‖. A step costs about two backward passes.

    Args:
        logits: The network, images to logits; not compiled, as it needs second derivatives.
        x: Images, shape (N, C, H, W), in [0, 1].
        num_steps: Steps of the iteration, which shrink what is not of the largest singular value by (σ₂/σ₁)² each.
        seed: Of the start vectors in the space of logits; that of row i depends on i alone.

    Raises:
        InputError: If ``num_steps`` is no whole number, or negative.

    Source: Golub & Van Loan, Matrix Computations, 8.2.1, on JJᵀ; Miyato et al. 2018 (arXiv 1802.05957) for networks.
    """
    require_counts(0, num_steps=num_steps)
    x = x.detach().requires_grad_(True)
    output = logits(x)
    direction = torch.zeros_like(output, requires_grad=True)
    # Jᵀu, whose graph is linear in u, so that its derivative along v is Jv.
    (pulled,) = torch.autograd.grad(output, x, direction, create_graph=True)
    u = normal_noise(seed, "jacobian_norm", range(len(x)), tuple(output.shape[1:])).to(output)
    (v,) = torch.autograd.grad(output, x, _unit(u), retain_graph=True)
    for _ in range(num_steps):
        # Unit vectors both ways: the square of a large Jacobian overflows in float32.
        (u,) = torch.autograd.grad(pulled, direction, _unit(v), retain_graph=True)
        (v,) = torch.autograd.grad(output, x, _unit(u), retain_graph=True)
    return per_example_norm(v).flatten()


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; those that are 0 stay so."""
    length = per_example_norm(x)
    return (x / torch.where(length > 0, length, 1)).to(x.dtype)
