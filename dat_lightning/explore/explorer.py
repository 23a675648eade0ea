"""What the page asks of a network, without a page: readings of images, counterfactuals, fillings, samples."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dat_lightning.core.ascent import Ascent, no_trace, unbounded_ascent
from dat_lightning.core.editing import inpainting
from dat_lightning.core.energy import EnergyModel, marginal_energy
from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.core.objectives import negative_marginal_energy, targeted_logit
from dat_lightning.core.random_streams import uniform_noise
from dat_lightning.core.threat_model import ThreatModel
from dat_lightning.core.update_rules import STEEPEST, UpdateRule
from dat_lightning.data.batches import logits_of

MAX_STEPS = 500
MAX_IMAGES = 64
# Images per pass; what is computed of an image does not depend on it.
_BATCH_SIZE = 16

Watch = Callable[[int, int], None]
"""Told after each step how many of how many are done."""

SeedStream = Callable[[int], tuple[Tensor, int | None]]
"""Draw number → OOD seed (C, H, W) in [0, 1], as ``PairedDataModule.held_out_seeds()`` gives them."""


@dataclass(frozen=True)
class Reading:
    """What the network says about one image.

    Attributes:
        logits: f(x), (K,), on the CPU.
    """

    logits: Tensor

    @property
    def probabilities(self) -> Tensor:
        """p(y|x), (K,)."""
        return self.logits.softmax(0)

    @property
    def joint_energies(self) -> Tensor:
        """E(x, y) of each class, (K,); low means likely."""
        return -self.logits

    @property
    def energy(self) -> float:
        """E(x)."""
        return float(marginal_energy(self.logits.unsqueeze(0)))

    @property
    def prediction(self) -> int:
        """The most likely class."""
        return int(self.logits.argmax())


@dataclass(frozen=True)
class Walk:
    """Every state of an ascent from one image.

    Attributes:
        target: The class that it climbs to, or ends at where none was asked for.
        images: (T+1, C, H, W), its start first, on the CPU.
        logits: Of each state, (T+1, K).
        threat_model: Ball and steps.
    """

    target: int
    images: Tensor
    logits: Tensor
    threat_model: ThreatModel

    def __len__(self) -> int:
        return len(self.images) - 1

    def reading(self, step: int) -> Reading:
        """Returns what the network says after ``step`` steps."""
        return Reading(self.logits[step])

    def distances(self, step: int) -> tuple[float, float]:
        """Returns L2 and Linf distance from the start after ``step`` steps."""
        delta = (self.images[step] - self.images[0]).double()
        return float(delta.norm()), float(delta.abs().max())


@dataclass(frozen=True)
class Samples:
    """Generated images of one class.

    Attributes:
        target: The class.
        starts: Where the chains began, (N, C, H, W), on the CPU.
        images: Where they ended, likewise.
        logits: Of the ends, (N, K).
    """

    target: int
    starts: Tensor
    images: Tensor
    logits: Tensor


class Explorer:
    """Answers a page's questions about one network; safe to use from several threads, one of which computes at a time.

    Args:
        model: The network; it is put in eval mode.
        image_shape: Channels, height and width of its images.
        class_names: A name for each class; by default their numbers.
        seeds: Where generation starts; ``None`` for uniform noise.
        device: Where to compute.

    Attributes:
        num_classes: K.

    Raises:
        InputError: If the network does not map such images to logits, or the names are not one per class.
    """

    def __init__(
        self,
        model: EnergyModel,
        image_shape: Sequence[int],
        class_names: Sequence[str] | None = None,
        seeds: SeedStream | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise InputError(f"image_shape must be channels, height and width, got {tuple(image_shape)}")
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.image_shape = (image_shape[0], image_shape[1], image_shape[2])
        self.seeds = seeds
        self._lock = threading.RLock()
        self.num_classes = self._count_classes()
        names = tuple(str(k) for k in range(self.num_classes)) if class_names is None else tuple(class_names)
        if len(names) != self.num_classes:
            raise InputError(f"class_names must name the network's {self.num_classes} classes, got {len(names)} names")
        self.class_names = names

    def classify(self, image: Tensor) -> Reading:
        """Returns what the network says about an image (C, H, W) in [0, 1].

        Raises:
            InputError: If the image has another shape or range, or its logits are not finite.
        """
        return Reading(self._logits(self._checked(image).unsqueeze(0))[0])

    def counterfactual(
        self,
        image: Tensor,
        target: int,
        eps: float,
        num_steps: int = 20,
        step_size: float | None = None,
        watch: Watch | None = None,
    ) -> Walk:
        """Returns the ascent on f(x)[target] from an image, inside the L2 ball of radius ``eps`` around it.

        Args:
            image: Shape (C, H, W), in [0, 1].
            target: Class to turn it into.
            eps: Radius, in units of [0, 1] pixels.
            num_steps: Number of steps.
            step_size: L2 length of a step; by default 2.5 ε / ``num_steps``, so that the walk can turn at the rim.
            watch: Told after each step.

        Raises:
            InputError: If an argument is outside its range, or logits are not finite.
        """
        self._check_walk(target, num_steps)
        if not 0 <= eps < math.inf:
            raise InputError(f"eps must be a finite radius of at least 0, got {eps}")
        step_size = 2.5 * eps / num_steps if step_size is None else step_size
        threat_model = ThreatModel(norm="L2", eps=eps, step_size=step_size, num_steps=num_steps)
        climb = Ascent(targeted_logit, threat_model)
        return self._walk(self._checked(image).unsqueeze(0).to(self.device), target, climb, watch)

    def fill(
        self,
        image: Tensor,
        mask: Tensor,
        target: int | None = None,
        num_steps: int = 20,
        step_size: float = 0.5,
        watch: Watch | None = None,
        rule: UpdateRule = STEEPEST,
    ) -> Walk:
        """Returns the walk that fills a part of an image, beginning at its smoothest filling; the rest keeps its bits.

        Args:
            image: Shape (C, H, W), in [0, 1].
            mask: What is to be filled, bool (H, W).
            target: The class that f(x)[target] is climbed of; without one it is logsumexp f(x), and the walk's target
                is what the network reads at its end.
            num_steps: Number of steps.
            step_size: L2 length of a step.
            watch: Told after each step.
            rule: How steps are made.

        Raises:
            InputError: If an argument is outside its range, the mask is of another shape or empty, or logits are not
                finite.
        """
        self._check_walk(target or 0, num_steps)
        if tuple(mask.shape) != self.image_shape[1:] or not bool(mask.any()):
            height, width = self.image_shape[1:]
            raise InputError(f"mask must be of {height}×{width} pixels, some of them true, got {tuple(mask.shape)}")
        objective = negative_marginal_energy if target is None else targeted_logit
        edit = inpainting(self._checked(image).unsqueeze(0).to(self.device), mask.to(self.device))
        climb = edit.ascent(Ascent(objective, unbounded_ascent(step_size, num_steps), rule))
        return self._walk(edit.start, target, climb, watch)

    def generate(
        self,
        target: int,
        num_images: int = 8,
        num_steps: int = 20,
        step_size: float = 0.5,
        seed: int = 0,
        watch: Watch | None = None,
        rule: UpdateRule = STEEPEST,
    ) -> Samples:
        """Returns samples of a class: the unbounded ascent on f(x)[target] from OOD seeds.

        Image i is a function of class, seed and i, however many there are.

        Args:
            target: The class.
            num_images: How many.
            num_steps: Number of steps.
            step_size: L2 length of a step.
            seed: Which starting images; no two seeds share one, as long as there are enough.
            watch: Told after each step, of all images together.
            rule: How steps are made.

        Raises:
            InputError: If an argument is outside its range, or logits are not finite.
        """
        self._check_walk(target, num_steps)
        if not 1 <= num_images <= MAX_IMAGES:
            raise InputError(f"num_images must lie in 1 … {MAX_IMAGES}, got {num_images}")
        require_at_least(0, seed=seed)
        starts = self.starting_images(seed, num_images)
        chain, parts = Ascent(targeted_logit, unbounded_ascent(step_size, num_steps), rule), []
        chunks = starts.split(_BATCH_SIZE)
        for number, chunk in enumerate(chunks):
            told = None if watch is None else _part(watch, number, len(chunks))
            draws = seed * MAX_IMAGES + number * _BATCH_SIZE + torch.arange(len(chunk))
            parts.append(self._ascend(chunk.to(self.device), target, chain, (num_steps,), told, draws)[num_steps])
        images = torch.cat(parts)
        return Samples(target, starts, images, self._logits(images))

    def starting_images(self, seed: int, num_images: int) -> Tensor:
        """Returns where the samples of a seed start, (N, C, H, W): OOD seeds, or noise where there are none."""
        if self.seeds is None:
            return uniform_noise(seed, "explored noise", range(num_images), self.image_shape)
        draws = range(seed * MAX_IMAGES, seed * MAX_IMAGES + num_images)
        with self._lock:
            return torch.stack([self._checked(self.seeds(draw)[0]) for draw in draws])

    # Parts.

    def _walk(self, start: Tensor, target: int | None, climb: Ascent, watch: Watch | None) -> Walk:
        """Every state of one image's ascent; without a target, the walk's is what the network reads at its end."""
        steps = range(climb.threat_model.num_steps + 1)
        chain = self._ascend(start, target or 0, climb, steps, watch)
        images = torch.cat([chain[step] for step in steps])
        logits = self._logits(images)
        return Walk(int(logits[-1].argmax()) if target is None else target, images, logits, climb.threat_model)

    def _ascend(
        self,
        x: Tensor,
        target: int,
        climb: Ascent,
        snapshots: Sequence[int],
        watch: Watch | None,
        draws: Tensor | None = None,
    ) -> dict[int, Tensor]:
        done, steps = 0, climb.threat_model.num_steps

        def watched(x: Tensor) -> Tensor:
            nonlocal done
            if watch is not None:
                watch(done, steps)
            done += 1
            logits: Tensor = self.model(x)
            return logits

        y = torch.full((len(x),), target, device=self.device)
        with self._alone():
            states = climb.snapshots(watched, x, y, snapshots, draws=draws)
        if watch is not None:
            watch(steps, steps)
        return {step: state.cpu() for step, state in states.items()}

    def _logits(self, images: Tensor) -> Tensor:
        """Logits on the CPU, (N, K)."""
        with self._alone(), torch.no_grad():
            parts = [logits_of(self.model, x.to(self.device), "explore") for x in images.split(_BATCH_SIZE)]
            logits = torch.cat([part.float().cpu() for part in parts])
        if not bool(logits.isfinite().all()):
            raise InputError("the network gives NaN or infinite logits for this image: its weights have diverged")
        return logits

    @contextmanager
    def _alone(self) -> Iterator[None]:
        # What an ascent does to the network, and undoes, is not for another thread to see.
        with self._lock, no_trace(self.model):
            yield

    def _count_classes(self) -> int:
        try:
            logits = self._logits(torch.full((1, *self.image_shape), 0.5))
        except (RuntimeError, AssertionError) as error:  # timm asserts the size of images
            shape = "×".join(map(str, self.image_shape))
            raise InputError(
                f"the network does not take images of {shape} (channels, height, width): {error}"
            ) from error
        return logits.shape[1]

    def _checked(self, image: Tensor) -> Tensor:
        if tuple(image.shape) != self.image_shape:
            raise InputError(f"image must have the shape {self.image_shape}, got {tuple(image.shape)}")
        image = image.detach().float().cpu()
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise InputError(f"image must lie in [0, 1], got {float(image.min()):g} … {float(image.max()):g}")
        return image

    def _check_walk(self, target: int, num_steps: int) -> None:
        if not 0 <= target < self.num_classes:
            raise InputError(f"target must be a class in 0 … {self.num_classes - 1}, got {target}")
        if not 1 <= num_steps <= MAX_STEPS:
            raise InputError(f"num_steps must lie in 1 … {MAX_STEPS}, got {num_steps}")


def _part(watch: Watch, number: int, count: int) -> Watch:
    """Reports one of several equal parts of the work as what it is of the whole."""
    return lambda done, total: watch(number * total + done, count * total)
