"""Two streams in one: real and generated images in a fixed proportion in every batch."""

import math

from torch import Tensor

from dat_lightning.core.errors import InputError
from dat_lightning.data.draws import DrawSource


class MixedStream:
    """Draws from two streams so that any run of consecutive draws has the same share of each, to within one image.

    So every batch, and every rank's part of it, mixes them alike. Draw n is generated where ⌊(n+1)·f⌋ > ⌊n·f⌋; it is
    then draw ⌊n·f⌋ of the generated stream, and otherwise draw n − ⌊n·f⌋ of the real one: a function of n alone.

    Args:
        real: The stream of real images.
        generated: The stream of generated ones.
        fraction: f, the share of generated images, in (0, 1).

    Raises:
        InputError: If the fraction is outside (0, 1).

    Source: Wang et al. 2023 (arXiv 2302.04638), on mixing generated images into adversarial training.
    """

    def __init__(self, real: DrawSource, generated: DrawSource, fraction: float) -> None:
        if not 0 < fraction < 1:
            raise InputError(f"generated_fraction must lie between 0 and 1, got {fraction}")
        self.real = real
        self.generated = generated
        self.fraction = fraction

    def __call__(self, draw: int, /) -> tuple[Tensor, int | None]:
        """Returns image (C, H, W) and label of a draw."""
        before, after = math.floor(draw * self.fraction), math.floor((draw + 1) * self.fraction)
        return self.generated(before) if after > before else self.real(draw - before)

    @property
    def size(self) -> int:
        """Number of images that either stream draws from."""
        return self.real.size + self.generated.size
