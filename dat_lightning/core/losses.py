"""Loss terms, as functions of energies and logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dat_lightning.core.ascent import Logits
from dat_lightning.core.energy import marginal_energy
from dat_lightning.core.objectives import distance_to_uniform


def energy_bce(energy_real: Tensor, energy_contrast: Tensor) -> Tensor:
    """Returns the binary cross-entropy of −E(x) as the logit of "real", a scalar.

    The mean is over all logits, real and contrastive together; the paper's sum of two expectations is twice this.

    Args:
        energy_real: E of in-distribution images, shape (N,).
        energy_contrast: E of contrastive samples, shape (M,).

    Source: DAT (arXiv 2510.13872); the mean is the reference implementation's.
    """
    logits = -torch.cat([energy_real, energy_contrast])
    target = torch.cat([torch.ones_like(energy_real), torch.zeros_like(energy_contrast)])
    return F.binary_cross_entropy_with_logits(logits, target)


def energy_difference(energy_data: Tensor, energy_samples: Tensor) -> Tensor:
    """Returns E_data[E(x)] − E_q[E(x)], a scalar: if q is the model's density, the gradient of −log p of the data.

    Args:
        energy_data: E of images, shape (N,).
        energy_samples: E of samples of q, shape (M,).

    Source: Grathwohl et al. 2020 (arXiv 1912.03263), Eq. 2.
    """
    return energy_data.mean() - energy_samples.mean()


def mean_distance_to_uniform(logits: Tensor) -> Tensor:
    """Returns the mean of KL(uniform ‖ softmax) over logits (N, K), a scalar.

    Source: Augustin et al. 2020, RATIO (arXiv 2003.09461), Eq. 5.
    """
    return distance_to_uniform(logits, logits).mean()


def robust_cross_entropy(logits_adv: Tensor, y: Tensor) -> Tensor:
    """Returns the mean cross-entropy at adversarial examples, a scalar, from their logits (N, K) and labels (N,).

    Source: Madry et al. 2018 (arXiv 1706.06083), Eq. 2.1.
    """
    return F.cross_entropy(logits_adv, y)


def is_right(logits: Tensor, y: Tensor) -> Tensor:
    """Returns whether the largest of logits (N, K) is that of the label, (N,); NaN is never right.

    torch's ``argmax`` takes NaN for the largest, so that a broken network would have the accuracy of a class.
    """
    return (logits.argmax(1) == y) & ~logits.isnan().any(1)


def energy_gradient_norm(logits: Logits, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """Returns ‖∇ₓE(x)‖² of each image, shape (N,); needs gradients enabled.

    Args:
        logits: The network, images to logits.
        x: Images, shape (N, C, H, W), in [0, 1].
        create_graph: Whether the result can be differentiated with respect to the parameters.
    """
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(marginal_energy(logits(x)).sum(), x, create_graph=create_graph)
    return gradient.flatten(1).square().sum(1)


def r1_penalty(logits: Logits, x: Tensor) -> Tensor:
    """Returns ½ E‖∇ₓE(x)‖² over real images, a scalar with a graph to the parameters.

    Source: Mescheder et al. 2018 (arXiv 1801.04406), Eq. 9.
    """
    return 0.5 * energy_gradient_norm(logits, x, create_graph=True).mean()
