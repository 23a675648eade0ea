"""An independent reader of digits: it has no part in training, and shares no network with anything that is judged."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_lightning.data.digits import split_indices

# The side of scikit-learn's own images, which ours are enlarged from.
_ORIGINAL_SIZE = 8


class DigitsJudge(nn.Module):
    """A support vector machine on scikit-learn's original 8×8 digits, as a classifier of images (N, 1, 16, 16).

    It has no part in training: it is fitted when it is made, on the 1 437 digits that are not for testing. It returns
    one-hot vectors (N, 10) and has no gradient.
    """

    support_vectors: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Importing scikit-learn takes seconds.
        from sklearn.datasets import load_digits
        from sklearn.svm import SVC

        digits = load_digits()
        train = split_indices(0)["train"]
        self._machine = SVC(C=10, gamma="scale").fit(digits.data[train] / 16, digits.target[train])
        # What a fingerprint of the weights sees.
        self.register_buffer("support_vectors", torch.from_numpy(self._machine.support_vectors_))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Returns one-hot vectors (N, 10) of the digits that the machine reads."""
        grey = F.adaptive_avg_pool2d(images[:, :1].float(), _ORIGINAL_SIZE).flatten(1)
        read = torch.from_numpy(self._machine.predict(grey.double().cpu().numpy())).long()
        return F.one_hot(read, 10).float().to(images.device)
