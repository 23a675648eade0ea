"""Evaluates a trained stage: attacks on its classification, samples along one chain, counterfactuals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dat_lightning.core import Logits, ThreatModel, ascend, ascend_snapshots, cross_entropy, targeted_logit
from dat_lightning.data import to_uint8_rgb
from dat_lightning.data.draws import DrawStream
from dat_lightning.demo.judge import Judge, Quality
from dat_lightning.sampling import PGDSampler

ATTACK = ThreatModel(norm="L2", eps=1.0, step_size=0.25, num_steps=20)
"""The attack of ``robust_accuracy``, the same for both stages."""

ATTACK_STEPS = (0, 1, 2, 5, 10, 20)
ATTACK_RADII = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)

CHANGE = ThreatModel(norm="L2", eps=4.0, step_size=0.25, num_steps=20)
"""What a counterfactual may change; the radius that the paper reports for DAT on ImageNet."""


@dataclass(frozen=True)
class Robustness:
    """Accuracy of one network on the test digits, clean and attacked.

    Attributes:
        accuracy: On clean images.
        robust_accuracy: Under :data:`ATTACK`.
        by_steps: Number of attack steps → accuracy, radius as in :data:`ATTACK`.
        by_radius: L2 radius → accuracy, steps as in :data:`ATTACK`, their length in proportion to the radius.
    """

    accuracy: float
    robust_accuracy: float
    by_steps: Mapping[int, float]
    by_radius: Mapping[float, float]


@dataclass(frozen=True)
class Samples:
    """One set of generated images, at several points of its chain.

    Attributes:
        labels: Classes asked for, (N,).
        seeds: Images that the chain began with, (N, C, H, W) in [0, 1].
        images: Number of steps → uint8 images (N, 3, H, W).
    """

    labels: Tensor
    seeds: Tensor
    images: Mapping[int, Tensor]


@dataclass(frozen=True)
class Counterfactuals:
    """Real digits turned into other digits.

    Attributes:
        images: uint8, (K, K, 3, H, W): entry [i, j] is the digit i turned into j, and the original where i = j.
        readings: What the independent classifier reads there, (K, K).
    """

    images: Tensor
    readings: Tensor

    @property
    def success(self) -> float:
        """Share of the K·(K−1) changed digits that are read as their target."""
        targets = torch.arange(len(self.readings)).expand_as(self.readings)
        changed = ~torch.eye(len(self.readings), dtype=torch.bool)
        return float((self.readings == targets)[changed].double().mean())


@dataclass(frozen=True)
class Evaluation:
    """All that is measured of one stage.

    Attributes:
        robustness: Accuracy under attack.
        samples: What it generates.
        sweep: Number of sampling steps → figures of the samples there.
        counterfactuals: What it turns test digits into.
    """

    robustness: Robustness
    samples: Samples
    sweep: Mapping[int, Quality]
    counterfactuals: Counterfactuals

    @property
    def best_steps(self) -> int:
        """The number of sampling steps with the smallest Fréchet distance."""
        return min(self.sweep, key=lambda steps: self.sweep[steps].fid)

    @property
    def best(self) -> Quality:
        """The figures there."""
        return self.sweep[self.best_steps]


def accuracy(logits: Logits, x: Tensor, y: Tensor) -> float:
    """Returns the share of images (N, C, H, W) that are given their labels (N,)."""
    with torch.no_grad():
        return float((logits(x).argmax(1) == y).double().mean())


def robustness(logits: Logits, x: Tensor, y: Tensor, radii: Sequence[float] = ATTACK_RADII) -> Robustness:
    """Returns the accuracy on images (N, C, H, W) with labels (N,), against steps and radius of the attack."""
    # One chain gives all numbers of steps.
    states = ascend_snapshots(logits, x, y, cross_entropy, ATTACK, ATTACK_STEPS)
    by_steps = {steps: accuracy(logits, state, y) for steps, state in states.items()}
    by_radius = {}
    for radius in radii:
        attack = replace(ATTACK, eps=radius, step_size=ATTACK.step_size * radius / ATTACK.eps)
        known = by_steps[ATTACK.num_steps] if attack == ATTACK else by_steps[0] if radius == 0 else None
        by_radius[radius] = accuracy(logits, ascend(logits, x, y, cross_entropy, attack), y) if known is None else known
    return Robustness(by_steps[0], by_steps[ATTACK.num_steps], by_steps, by_radius)


def generate(logits: Logits, sampler: PGDSampler, seeds: DrawStream, num_classes: int, title: str) -> Samples:
    """Returns the samples that the sampler makes of the first seeds, class by class in turn.

    Args:
        logits: The network.
        sampler: How many, how many steps, how long.
        seeds: Index → image; both stages get the same.
        num_classes: Sample i has class i mod this.
        title: Of the progress bar.
    """
    starts = range(0, sampler.num_samples, sampler.batch_size)
    batches = []
    for start in tqdm(starts, desc=title, unit="batch"):
        indices = torch.arange(start, min(start + sampler.batch_size, sampler.num_samples))
        images = torch.stack([seeds(i)[0] for i in indices.tolist()])
        batches.append(sampler.generate(logits, images, indices, num_classes))
    return Samples(
        labels=torch.cat([b.labels for b in batches]),
        seeds=torch.cat([b.seeds for b in batches]),
        images={n: torch.cat([to_uint8_rgb(b.images[n]) for b in batches]) for n in sampler.num_steps},
    )


def turn_into_others(logits: Logits, originals: Tensor, judge: Judge) -> Counterfactuals:
    """Returns each of K digits (K, C, H, W), one of each class, turned into each other class.

    Source: DAT (arXiv 2510.13872), on counterfactuals; Augustin et al. 2020 (arXiv 2003.09461).
    """
    classes = len(originals)
    sources = originals.repeat_interleave(classes, dim=0)
    targets = torch.arange(classes).repeat(classes)
    images = to_uint8_rgb(ascend(logits, sources, targets, targeted_logit, CHANGE))
    grid = images.reshape(classes, classes, *images.shape[1:]).clone()
    diagonal = torch.arange(classes)
    grid[diagonal, diagonal] = to_uint8_rgb(originals)
    return Counterfactuals(grid, judge.read(grid.flatten(0, 1)).reshape(classes, classes))


def first_of_each_class(x: Tensor, y: Tensor) -> Tensor:
    """Returns the first image of each class 0 … K−1, (K, C, H, W), of images (N, C, H, W) with labels (N,)."""
    return torch.stack([x[y == label][0] for label in range(int(y.max()) + 1)])


def evaluate(
    logits: Logits, sampler: PGDSampler, seeds: DrawStream, x: Tensor, y: Tensor, judge: Judge, title: str
) -> Evaluation:
    """Returns all figures of one network.

    Args:
        logits: The network, in eval mode.
        sampler: How it generates.
        seeds: Where samples begin.
        x: Test images, (N, C, H, W).
        y: Their labels, (N,).
        judge: Judges samples.
        title: Of the progress bars.
    """
    originals = first_of_each_class(x, y)
    attacked = robustness(logits, x, y)
    samples = generate(logits, sampler, seeds, len(originals), f"{title}: generating")
    sweep = {n: judge.score(images, samples.labels) for n, images in samples.images.items()}
    return Evaluation(attacked, samples, sweep, turn_into_others(logits, originals, judge))
