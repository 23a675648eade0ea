from typing import Any

import numpy as np
import pytest
import torch

from dat_lightning import EnergyModel, Perceptron, architecture_of, build_architecture
from dat_lightning.core.errors import InputError


def test_logits_are_those_of_matrix_products() -> None:
    network = Perceptron(num_classes=3, in_features=4, widths=(5, 2)).double()
    x = torch.rand(6, 4, 1, 1, dtype=torch.float64)
    weights = [value.numpy() for value in network.state_dict().values()]
    h = x.flatten(1).numpy()
    for w, b in zip(weights[0:4:2], weights[1:4:2], strict=True):
        z = h @ w.T + b
        h = z / (1 + np.exp(-z))
    np.testing.assert_allclose(network(x).detach().numpy(), h @ weights[4].T + weights[5], rtol=1e-12)


def test_a_file_can_name_it() -> None:
    network = Perceptron(num_classes=5, widths=[8], activation="gelu")
    again = build_architecture(architecture_of(network))
    again.load_state_dict(network.state_dict())
    x = torch.rand(3, 2, 1, 1)
    assert torch.equal(again(x), network(x))
    assert EnergyModel(network, mean=[0.5, 0.5], std=[0.25, 0.25])(x).shape == (3, 5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"widths": []}, "sizes must be positive"),
        ({"num_classes": 0}, "sizes must be positive: num_classes=0"),
        ({"activation": "tanh"}, "activation must be one of .*, got 'tanh'"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Perceptron(**arguments)
