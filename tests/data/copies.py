"""What a copy of a source in a loader process has to do."""

import pickle
from typing import Any

import numpy as np
from torch.utils.data import DataLoader


def assert_a_copy_reads(images: Any, pixels: np.ndarray, index: int, size: int) -> None:
    """Checks that a copy has fewer bytes than ``size`` and the same images, in this process and in another one."""
    images[0]  # what is open stays behind
    copy = pickle.dumps(images)
    assert len(copy) < size
    assert np.array_equal(np.asarray(pickle.loads(copy)[index]), pixels[index])
    loader: Any = DataLoader(images, batch_size=len(images) // 2, num_workers=1, collate_fn=_as_arrays)
    assert np.array_equal(np.concatenate([*loader]), pixels)


def _as_arrays(images: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])
