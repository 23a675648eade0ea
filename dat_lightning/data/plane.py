"""Points of a plane whose density is known, as images of two channels and one pixel, with uniform seeds around them."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from dat_lightning.core.errors import InputError, require_at_least, require_choice
from dat_lightning.core.random_streams import stream_generator
from dat_lightning.data.draws import Transform
from dat_lightning.data.entries import SizedDataset
from dat_lightning.data.paired import OODSplit, PairedDataModule, Split, Stream

Plane = Literal["moons", "gaussians", "pinwheel"]


class PlaneDensity:
    """A mixture of round Gaussians on the unit square, zero outside, whose components belong to classes.

    What a Gaussian has outside of the square is cut off; its mass inside is a product of two differences of Φ, so that
    density and samples are exact.

    Args:
        means: Centres of the components, (M, 2), in [0, 1].
        deviations: Their standard deviations, (M,).
        weights: Their weights before the cut, (M,), in any unit.
        labels: Their classes, (M,).

    Raises:
        InputError: If a deviation or a weight is not positive, or a centre outside the square.
    """

    def __init__(self, means: Tensor, deviations: Tensor, weights: Tensor, labels: Tensor) -> None:
        if not (float(deviations.min()) > 0 and float(weights.min()) > 0):
            raise InputError(
                f"deviations and weights must be positive, got {float(deviations.min())} and {float(weights.min())}"
            )
        if not (float(means.min()) >= 0 and float(means.max()) <= 1):
            raise InputError(f"means must lie in [0, 1], got {float(means.min())} … {float(means.max())}")
        self.means, self.deviations, self.labels = means.double(), deviations.double(), labels
        scale = self.deviations.unsqueeze(1)
        self._ends = torch.special.ndtr(-self.means / scale), torch.special.ndtr((1 - self.means) / scale)
        inside = (self._ends[1] - self._ends[0]).prod(1)
        self.shares = weights.double() * inside / (weights.double() * inside).sum()
        self._log_scale = self.shares.log() - inside.log() - math.log(2 * math.pi) - 2 * self.deviations.log()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1

    def log_prob(self, points: Tensor) -> Tensor:
        """Returns log p, (N,), float64, of points of the square (N, 2) or (N, 2, 1, 1)."""
        points = points.detach().cpu().double().flatten(1)
        distance = (points.unsqueeze(1) - self.means).square().sum(2)
        log_p = (self._log_scale - 0.5 * distance / self.deviations.square()).logsumexp(1)
        return torch.where(((points >= 0) & (points <= 1)).all(1), log_p, -torch.inf)

    def sample(self, size: int, *stream: int | str) -> tuple[Tensor, Tensor]:
        """Returns points (N, 2), float32, and their classes, (N,); a function of the parts that name the stream."""
        generator = stream_generator(*stream)
        component = torch.multinomial(self.shares, size, replacement=True, generator=generator)
        low, high = (end[component] for end in self._ends)
        uniform = torch.rand(size, 2, dtype=torch.float64, generator=generator)
        normal = torch.special.ndtri(low + uniform * (high - low))
        points = self.means[component] + self.deviations[component].unsqueeze(1) * normal
        return points.clamp(0, 1).float(), self.labels[component]


def plane_density(name: Plane) -> PlaneDensity:
    """Returns a density whose first class is the most common one.

    | name | classes | their weights |
    |---|---|---|
    | ``moons`` | 2 half circles that reach into each other | 10 : 1 |
    | ``gaussians`` | 8 round Gaussians on a circle | from 100 to 1, each 0.52 times the one before |
    | ``pinwheel`` | 5 bent arms that grow broader outwards | from 100 to 1, each 0.32 times the one before |
    """
    if name == "moons":
        t = torch.linspace(0, math.pi, 80, dtype=torch.float64)
        upper, lower = (torch.cos(t), torch.sin(t)), (1 - torch.cos(t), 0.5 - torch.sin(t))
        arcs = [torch.stack([0.375 + 0.25 * x, 0.4375 + 0.25 * y], 1) for x, y in (upper, lower)]
        return _of_arcs(arcs, [torch.full((80,), 0.02)] * 2, weights=[10.0, 1.0])
    if name == "gaussians":
        angles = [2 * math.pi * k / 8 for k in range(8)]
        centres = [torch.tensor([[0.5 + 0.35 * math.cos(a), 0.5 + 0.35 * math.sin(a)]]) for a in angles]
        return _of_arcs(centres, [torch.tensor([0.03])] * 8, weights=[10 ** (2 - 2 * k / 7) for k in range(8)])
    radius = torch.linspace(0.08, 0.4, 60, dtype=torch.float64)
    turns = [2 * math.pi * k / 5 + 4 * radius for k in range(5)]
    arms = [0.5 + radius.unsqueeze(1) * torch.stack([t.cos(), t.sin()], 1) for t in turns]
    return _of_arcs(arms, [0.008 + 0.05 * radius] * 5, weights=[10 ** (2 - k / 2) for k in range(5)])


def _of_arcs(arcs: list[Tensor], deviations: list[Tensor], weights: list[float]) -> PlaneDensity:
    """Classes of equal components along arcs."""
    each = torch.cat([torch.full((len(arc),), w / len(arc)) for arc, w in zip(arcs, weights, strict=True)])
    labels = torch.cat([torch.full((len(arc),), k) for k, arc in enumerate(arcs)])
    return PlaneDensity(torch.cat(arcs), torch.cat(deviations), each, labels)


class PlaneDataModule(PairedDataModule):
    """Points of a :func:`plane_density` as in-distribution images (2, 1, 1), and uniform points of the square as seeds.

    Nothing is augmented.

    Args:
        density: Its name.
        num_train: Points to train with.
        num_test: Points for validation, and as many others to test with; both are the same for every ``seed``.
        num_ood: Different seeds in training.
        num_held_out: Different seeds for generation.
        batch_size: See :class:`PairedDataModule`.
        shared: The other arguments of :class:`PairedDataModule`.

    Raises:
        InputError: If a number is not positive, or the density unknown.
    """

    def __init__(
        self,
        density: Plane = "moons",
        num_train: int = 10_000,
        num_test: int = 5_000,
        num_ood: int = 10_000,
        num_held_out: int = 2_000,
        batch_size: int = 256,
        **shared: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **shared)
        require_choice(get_args(Plane), density=density)
        require_at_least(1, num_train=num_train, num_test=num_test, num_ood=num_ood, num_held_out=num_held_out)
        self.density = density
        self._plane = plane_density(density)
        self.sizes: dict[Split, int] = {"train": num_train, "val": num_test, "test": num_test}
        self.num_ood, self.num_held_out = num_ood, num_held_out

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self._plane.num_classes

    def in_distribution(self, split: Split) -> SizedDataset:
        """Returns the points of a split, with their classes."""
        points, labels = self._plane.sample(self.sizes[split], "plane", self.density, split)
        return TensorDataset(points.view(-1, 2, 1, 1), labels)

    def out_of_distribution(self, split: OODSplit) -> SizedDataset | None:
        """Returns uniform points."""
        size = self.num_ood if split == "train" else self.num_held_out
        return TensorDataset(torch.rand(size, 2, 1, 1, generator=stream_generator("plane", "seeds", split)))

    def transform(self, stream: Stream) -> Transform:
        """Returns points as they are."""
        return _unchanged()

    def evaluation_transform(self) -> Transform:
        """Returns points as they are."""
        return _unchanged()

    # What evaluators of densities ask for.

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the classes, the most common one first."""
        return tuple(f"class_{k}" for k in range(self.num_classes))

    def groups(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the classes, (N,)."""
        return y

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns log p(x), (N,), float64, of points (N, 2, 1, 1)."""
        return self._plane.log_prob(x)


def _unchanged() -> Transform:
    unchanged: Transform = v2.Identity()
    return unchanged
