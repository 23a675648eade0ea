"""Fréchet and kernel distance, Inception score, precision and recall: from features that are collected once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.features.gaussian_stats import FeatureMoments, Gaussian, frechet_distance
from dat_lightning.results.digests import identity
from dat_lightning.results.gathering import Values, all_ranks, gather
from dat_lightning.results.measurement import Measurement

Metric = Literal["fid", "kid", "isc", "prc"]
METRICS: tuple[Metric, ...] = ("fid", "kid", "isc", "prc")

# The settings that a score depends on.
_SETTINGS = {
    "fid": (),
    "kid": ("kid_subsets", "kid_subset_size", "seed"),
    "inception_score": ("isc_splits", "seed"),
    "precision": ("prc_neighborhood", "prc_num_reference", "seed"),
    "recall": ("prc_neighborhood", "prc_num_reference", "seed"),
}


@dataclass(frozen=True)
class FidelitySettings:
    """What the definitions leave open; the defaults are torch-fidelity's.

    Attributes:
        isc_splits: Parts of the shuffled samples, over whose scores the Inception score is the mean.
        isc_size: Side to which PIL resizes images, bilinear and in eight bits, before the network reads the score's
            logits, as the paper's published code does with 299; ``None`` leaves that to the extractor.
        kid_subsets: Random pairs of subsets, over whose distances KID is the mean.
        kid_subset_size: Images in each of them.
        prc_neighborhood: Number of the neighbour whose distance is the radius of an image's ball.
        prc_num_reference: How many images of the reference precision and recall look at, a random choice; ``None`` all.
            Sets of equal size are the definition's, and time grows with the square of the number.
        seed: Of the shuffling, of the subsets and of that choice.

    Raises:
        InputError: If a number is outside its range.
    """

    isc_splits: int = 10
    isc_size: int | None = None
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    prc_neighborhood: int = 3
    prc_num_reference: int | None = None
    seed: int = 2020

    def __post_init__(self) -> None:
        require_at_least(0, seed=self.seed)
        require_at_least(
            1, isc_splits=self.isc_splits, kid_subsets=self.kid_subsets, prc_neighborhood=self.prc_neighborhood
        )
        require_at_least(2, kid_subset_size=self.kid_subset_size)
        if self.isc_size is not None:
            require_at_least(1, isc_size=self.isc_size)
        if self.prc_num_reference is not None:
            require_at_least(self.prc_neighborhood + 1, prc_num_reference=self.prc_num_reference)


_DEFINITIONS: Mapping[str, tuple[str, Literal["higher", "lower"]]] = {
    "fid": ("Fréchet distance between features of samples and of {reference}", "lower"),
    "kid": (
        "mean kernel distance (cubic polynomial) between random subsets of samples and of {reference}",
        "lower",
    ),
    "inception_score": ("Inception score, mean over splits of the shuffled samples", "higher"),
    "precision": ("share of samples inside the k-nearest-neighbour manifold of {reference}", "higher"),
    "recall": ("share of {reference} inside the k-nearest-neighbour manifold of the samples", "higher"),
}


@dataclass(frozen=True)
class Features:
    """What is known of a set of images.

    Attributes:
        num_images: How many; 0 where a file of statistics does not say.
        gaussian: Mean and covariance of their features, for FID.
        features: (N, D) in a fixed order, for KID, precision and recall.
        logits: (N, K) in that order, for the Inception score.
    """

    num_images: int = 0
    gaussian: Gaussian | None = None
    features: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Reference(Features):
    """What samples are compared with.

    Attributes:
        name: For people: which images, or which file.
        digest: Tells it from others.
    """

    name: str = "nothing"
    digest: str = ""


class FeatureCollector:
    """Adds up moments of features batch by batch, and keeps features and logits only where a metric needs them.

    Args:
        metrics: What is to be measured.
        device: Where moments are added up.
        is_reference: Whether the Inception score needs nothing of these images.
    """

    def __init__(self, metrics: Sequence[Metric], device: torch.device, is_reference: bool = False) -> None:
        # Float64 sums cannot live on devices without that type.
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.with_moments = "fid" in metrics
        wanted = {"features": bool({"kid", "prc"} & set(metrics)), "logits": "isc" in metrics and not is_reference}
        self.kept = [name for name, needed in wanted.items() if needed]
        self._moments: FeatureMoments | None = None
        self._values: list[Values] = []
        self._count = 0

    def add(self, batch: Values) -> None:
        """Adds ``features`` (N, D), perhaps ``logits`` (N, K), with ``index`` (N,) and perhaps ``label`` (N,).

        Raises:
            InputError: If a feature is NaN or infinite.
        """
        self._count += len(batch["index"])
        if self.with_moments:
            if self._moments is None:
                self._moments = FeatureMoments(batch["features"].shape[1], self.device)
            self._moments.update(batch["features"])
        if self.kept:
            names = [name for name in ("index", "label", *self.kept) if name in batch]
            self._values.append({name: batch[name].cpu() for name in names})

    def collected(self, otherwise: str) -> Features:
        """Returns what all ranks have added, in the order class, then index; every rank must call it.

        Raises:
            InputError: If there are fewer images than a covariance needs, or none, and ``otherwise`` says why.
        """
        counts = all_ranks(self._count)
        gaussian = None
        if self.with_moments:
            sizes = all_ranks(0 if self._moments is None else len(self._moments.sum))
            if max(sizes) == 0:
                raise InputError(f"there are no images to measure: {otherwise}")
            # A rank may have had no image.
            moments = FeatureMoments(max(sizes), self.device) if self._moments is None else self._moments
            moments.all_reduce()
            gaussian = moments.gaussian()
        values = by_class(gather(self._values, otherwise)) if self.kept else {}
        return Features(sum(counts), gaussian, values.get("features"), values.get("logits"))


def check_metrics(metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    """Returns the metrics once each, in a fixed order.

    Raises:
        InputError: If there are none, or one is unknown.
    """
    if not metrics or set(metrics) - set(METRICS):
        raise InputError(f"metrics must be some of {list(METRICS)}, got {list(metrics)}")
    return tuple(metric for metric in METRICS if metric in metrics)


def check_sizes(
    metrics: Sequence[Metric], settings: FidelitySettings, num_samples: int, num_reference: int | None
) -> None:
    """Checks that there are enough images, before hours are spent on their features.

    Args:
        metrics: What is to be measured.
        settings: Subsets, splits and neighbours.
        num_samples: Number of samples.
        num_reference: Number of reference images; ``None`` if only their statistics are known, or nothing.

    Raises:
        InputError: If there are too few images, or only statistics where features are needed.
    """
    least = {
        "fid": (2, "FID needs a covariance"),
        "kid": (settings.kid_subset_size, f"kid_subset_size={settings.kid_subset_size}"),
        "isc": (settings.isc_splits, f"isc_splits={settings.isc_splits}"),
        "prc": (settings.prc_neighborhood + 1, f"prc_neighborhood={settings.prc_neighborhood}"),
    }
    for metric in metrics:
        minimum, reason = least[metric]
        if num_samples < minimum:
            raise InputError(f"{reason}: there must be at least {minimum} samples, got {num_samples}")
        if metric not in ("kid", "prc"):
            continue
        if num_reference is None:
            raise InputError(f"the metric {metric!r} needs reference images; statistics (mu, sigma) serve 'fid' alone")
        if num_reference < minimum:
            raise InputError(f"{reason}: there must be at least {minimum} reference images, got {num_reference}")


def check_values(
    metrics: Sequence[Metric], settings: FidelitySettings, samples: Features, reference: Reference
) -> None:
    """Checks what has been read from samples and reference.

    Raises:
        InputError: If a value is NaN or infinite, or the reference has other features or too few images.
    """
    known = reference.features
    check_sizes(metrics, settings, samples.num_images, None if known is None else len(known))
    for value in (samples.features, samples.logits, known):
        if value is not None and not bool(value.isfinite().all()):
            raise InputError("features must be finite: the images or the extractor produced NaN or infinity")
    sizes = _num_features(samples), _num_features(reference)
    if None not in sizes and sizes[0] != sizes[1]:
        raise InputError(
            f"samples have {sizes[0]} features and the reference {reference.name} has {sizes[1]}; both need the same"
            " extractor and layer"
        )


def _num_features(known: Features) -> int | None:
    if known.features is not None:
        return known.features.shape[1]
    return None if known.gaussian is None else len(known.gaussian.mean)


def fidelity_scores(
    metrics: Sequence[Metric], settings: FidelitySettings, samples: Features, reference: Reference
) -> dict[str, float]:
    """Returns ``fid``, ``kid``, ``inception_score``, ``precision`` and ``recall``, as far as they are asked for.

    ``kid_std`` and ``inception_score_std`` are standard deviations over subsets and splits. KID's subsets and the
    score's splits are drawn by position: the same images in another order give slightly other figures.

    Args:
        metrics: What to measure.
        settings: How.
        samples: Moments for FID, features for KID, precision and recall, logits for the Inception score.
        reference: What to compare with: moments and features alike.

    Raises:
        InputError: If a value is NaN or infinite, or the reference has other features or too few images.

    Source: Heusel et al. 2017 (arXiv 1706.08500), Eq. 6; Bińkowski et al. 2018 (arXiv 1801.01401), Eq. 3 and 4;
        Salimans et al. 2016 (arXiv 1606.03498); Kynkäänniemi et al. 2019 (arXiv 1904.06991), Eq. 1 and 2.
    """
    check_values(metrics, settings, samples, reference)
    scores: dict[str, float] = {}
    if "fid" in metrics:
        if reference.gaussian is None or samples.gaussian is None:
            raise InputError("FID needs the moments of features of samples and reference, got none")
        scores["fid"] = frechet_distance(reference.gaussian, samples.gaussian)
    if "kid" in metrics:
        found = kid_features_to_metric(
            samples.features,
            reference.features,
            kid_subsets=settings.kid_subsets,
            kid_subset_size=settings.kid_subset_size,
            rng_seed=settings.seed,
            verbose=False,
        )
        scores["kid"] = found["kernel_inception_distance_mean"]
        scores["kid_std"] = found["kernel_inception_distance_std"]
    if "isc" in metrics:
        found = isc_features_to_metric(samples.logits, splits=settings.isc_splits, rng_seed=settings.seed)
        scores["inception_score"] = found["inception_score_mean"]
        scores["inception_score_std"] = found["inception_score_std"]
    if "prc" in metrics:
        # By parts: 50 000 against 50 000 distances at once would take 10 GB, thrice.
        found = prc_features_to_metric(
            samples.features,
            _some_of(reference.features, settings),
            prc_neighborhood=settings.prc_neighborhood,
            save_cpu_ram=True,
            verbose=False,
        )
        scores["precision"], scores["recall"] = found["precision"], found["recall"]
    for name, score in scores.items():
        if math.isnan(score):
            raise InputError(f"{name} is NaN: features or logits are beyond what a float can hold")
    return scores


def _some_of(features: Tensor | None, settings: FidelitySettings) -> Tensor | None:
    """Returns those of the reference that precision and recall look at."""
    if features is None or settings.prc_num_reference is None or settings.prc_num_reference >= len(features):
        return features
    generator = torch.Generator().manual_seed(settings.seed)
    return features[torch.randperm(len(features), generator=generator)[: settings.prc_num_reference]]


def measurements(
    scores: Mapping[str, float],
    settings: FidelitySettings,
    layers: tuple[Mapping[str, Any], Mapping[str, Any]],
    reference: Reference,
    num_samples: int,
    samples: Mapping[str, Any],
) -> list[Measurement]:
    """Returns a measurement for each score of :func:`fidelity_scores`; deviations go into the details.

    Args:
        scores: What it gave.
        settings: Its settings.
        layers: Settings on which features and logits depend, of :meth:`LayerReader.settings`.
        reference: What was compared with.
        num_samples: Number of samples.
        samples: Settings by which the samples came about.
    """
    of_features, of_logits = layers
    against = {**of_features, "reference": identity("", reference.digest)}
    known = {"reference": reference.name, "num_reference": reference.num_images}
    found: list[Measurement] = []
    for name, value in scores.items():
        if name.endswith("_std"):
            continue
        given = {key: getattr(settings, key) for key in _SETTINGS[name]}
        given |= of_logits if name == "inception_score" else against
        details: dict[str, Any] = {} if name == "inception_score" else dict(known)
        details |= {"std": scores[f"{name}_std"]} if f"{name}_std" in scores else {}
        words, better = _DEFINITIONS[name]
        # Where a reference lies is no setting, what is in it is.
        words = words.format(reference=reference.name)
        found.append(Measurement(name, value, words, num_samples, details, better, {**given, **samples}))
    return found


def by_class(values: Values) -> Values:
    """Returns values in the order class (``label``), then index: that of files in one folder per class."""
    if "label" not in values:
        return values
    order = torch.argsort(values["label"], stable=True)
    return {name: value[order] for name, value in values.items()}
