"""How many contrastive steps: more of them once the contrastive samples have become easy to tell from real images."""

import math

import torch
from torch import Tensor, nn

from dat_lightning.core.errors import InputError, require_at_least, require_counts


def auc(positive: Tensor, negative: Tensor) -> Tensor:
    """Returns the area under the ROC curve, a scalar: P(positive > negative) + ½ P(equal).

    Args:
        positive: Scores of in-distribution images, shape (N,).
        negative: Scores of contrastive samples, shape (M,).
    """
    # Counted in integers, so that the order of the images, and with it the number of ranks, changes no bit.
    above = (positive.unsqueeze(1) > negative.unsqueeze(0)).sum()
    equal = (positive.unsqueeze(1) == negative.unsqueeze(0)).sum()
    return (2 * above + equal) / (2 * len(positive) * len(negative))


class AUCCurriculum(nn.Module):
    """The number of contrastive steps T, which grows by one whenever the last AUCs were high enough.

    The window holds the last ceil(``window_samples`` / B) values. When it is full, its mean reaches ``auc_threshold``
    and T < ``max_steps``, T grows by one and the window is emptied. All state is in buffers, so a checkpoint resumes
    it; updates stay on the device.

    Args:
        max_steps: T_max, the largest T.
        auc_threshold: Mean AUC at which T grows, in [0, 1].
        initial_steps: T at the start.
        window_samples: Number of training images that the window spans.

    Raises:
        InputError: If a number is outside its range.

    Source: DAT (arXiv 2510.13872), its reference implementation.
    """

    num_steps: Tensor
    values: Tensor
    count: Tensor
    window: Tensor

    def __init__(
        self, max_steps: int = 50, auc_threshold: float = 0.8, initial_steps: int = 0, window_samples: int = 1000
    ) -> None:
        super().__init__()
        require_counts(0, max_steps=max_steps, initial_steps=initial_steps)
        if initial_steps > max_steps:
            raise InputError(f"initial_steps must lie in 0 … max_steps={max_steps}, got {initial_steps}")
        if not 0 <= auc_threshold <= 1:
            raise InputError(f"auc_threshold must lie in [0, 1], got {auc_threshold}")
        require_counts(1, window_samples=window_samples)
        self.max_steps = max_steps
        self.auc_threshold = auc_threshold
        self.window_samples = window_samples
        self.register_buffer("num_steps", torch.tensor(initial_steps))
        # One entry per training image is the most that any batch size needs, so the shape never depends on it.
        self.register_buffer("values", torch.zeros(window_samples))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("window", torch.tensor(0))
        self._noted: tuple[Tensor, int, int | None] | None = None

    def steps_on_host(self) -> int:
        """Returns T; waits for the device, unless :meth:`note_steps` has told it since T last changed."""
        if self._noted is not None:
            tensor, version, value = self._noted
            if value is not None and tensor is self.num_steps and version == tensor._version:
                return value
        return int(self.num_steps)

    def note_steps(self, value: int | None) -> None:
        """Says what T is now, by someone who has read it together with other numbers.

        Args:
            value: T, as read after the last :meth:`update`; ``None`` for what has changed without a trace.
        """
        traced = value is not None and not self.num_steps.is_inference()  # such a tensor does not count its changes
        self._noted = (self.num_steps, self.num_steps._version, value) if traced else None

    def update(self, value: Tensor, batch_size: int) -> None:
        """Records the AUC of one step and lets T grow if the window says so; no host synchronisation.

        Args:
            value: AUC over all ranks, a scalar; a step whose value is NaN, which has none, is not recorded.
            batch_size: Global batch size B; if it changes, the window starts anew, as its length does.

        Raises:
            InputError: If ``batch_size`` is not positive.
        """
        require_at_least(1, batch_size=batch_size)
        length = math.ceil(self.window_samples / batch_size)
        same = self.window == length
        self.values.masked_fill_(~same, 0)
        self.count.mul_(same)
        self.window.fill_(length)
        place = (self.count % length).reshape(1)
        value = value.detach().to(self.values).reshape(1)
        known = ~value.isnan()
        self.values.index_copy_(0, place, torch.where(known, value, self.values[place]))
        self.count.add_(known.squeeze(0))
        easy = self.values[:length].mean() >= self.auc_threshold
        grow = (self.count >= length) & easy & (self.num_steps < self.max_steps)
        self.num_steps.add_(grow)
        self.count.mul_(~grow)
        self.values.masked_fill_(grow, 0)
