"""torch-fidelity's own Inception with random weights, where its published ones are not at hand."""

import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def random_inception(path: Path, *layers: str) -> Any:
    """Returns the network, which gives some of its layers, and writes its weights to a file."""
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[FeatureExtractorInceptionV3.__module__]
        patch.setattr(module, "load_state_dict_from_url", lambda url, **_: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = cast(Any, FeatureExtractorInceptionV3)("inception-v3-compat", [*layers])
    torch.save(network.state_dict(), path)
    return network
