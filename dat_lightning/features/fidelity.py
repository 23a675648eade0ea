"""Fréchet and kernel distance, Inception score, precision and recall of features, by torch-fidelity's definitions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dat_lightning.core.errors import InputError
from dat_lightning.features.gaussian_stats import FeatureMoments, Gaussian, frechet_distance
from dat_lightning.features.layers import LayerReader
from dat_lightning.results.digests import identity
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import Measurement

Metric = Literal["fid", "kid", "isc", "prc"]
METRICS: tuple[Metric, ...] = ("fid", "kid", "isc", "prc")

# The settings that a score depends on.
_SETTINGS = {
    "fid": (),
    "kid": ("kid_subsets", "kid_subset_size", "seed"),
    "inception_score": ("isc_splits", "seed"),
    "precision": ("prc_neighborhood",),
    "recall": ("prc_neighborhood",),
}


@dataclass(frozen=True)
class FidelitySettings:
    """What the definitions leave open; the defaults are torch-fidelity's.

    Attributes:
        isc_splits: Parts of the shuffled samples, over whose scores the Inception score is the mean.
        kid_subsets: Random pairs of subsets, over whose distances KID is the mean.
        kid_subset_size: Images in each of them.
        prc_neighborhood: Number of the neighbour whose distance is the radius of an image's ball.
        seed: Of the shuffling and of the subsets.

    Raises:
        InputError: If a number is outside its range.
    """

    isc_splits: int = 10
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    prc_neighborhood: int = 3
    seed: int = 2020

    def __post_init__(self) -> None:
        least = {"isc_splits": 1, "kid_subsets": 1, "kid_subset_size": 2, "prc_neighborhood": 1, "seed": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise InputError(f"{name} must be at least {minimum}, got {getattr(self, name)}")


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
class Reference:
    """What samples are compared with.

    Attributes:
        name: For people: which images, or which file.
        num_images: How many; 0 where a file of statistics does not say.
        gaussian: For FID; ``None`` for that of the features.
        features: (N, D) in a fixed order, for KID, precision and recall; ``None`` where only statistics are known.
        digest: Tells it from others of the same name.
    """

    name: str
    num_images: int = 0
    gaussian: Gaussian | None = None
    features: Tensor | None = None
    digest: str = ""


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
    metrics: Sequence[Metric], settings: FidelitySettings, values: Mapping[str, Tensor], reference: Reference
) -> None:
    """Checks what has been read from samples and reference.

    Args:
        metrics: What is to be measured.
        settings: How.
        values: ``features`` (N, D), and ``logits`` (N, K) for the Inception score.
        reference: What to compare with.

    Raises:
        InputError: If a feature is NaN or infinite, or the reference has other features or too few images.
    """
    features, known = values["features"], reference.features
    check_sizes(metrics, settings, len(features), None if known is None else len(known))
    for value in (*values.values(), *(() if known is None else (known,))):
        if not bool(value.isfinite().all()):
            raise InputError("features must be finite: the images or the extractor produced NaN or infinity")
    shapes = [] if known is None else [known.shape[1]]
    shapes += [] if reference.gaussian is None else [len(reference.gaussian.mean)]
    if any(size != features.shape[1] for size in shapes):
        raise InputError(
            f"samples have {features.shape[1]} features and the reference {reference.name} has {shapes[-1]}; both need"
            " the same extractor and layer"
        )


def fidelity_scores(
    metrics: Sequence[Metric], settings: FidelitySettings, values: Mapping[str, Tensor], reference: Reference
) -> dict[str, float]:
    """Returns ``fid``, ``kid``, ``inception_score``, ``precision`` and ``recall``, as far as they are asked for.

    ``kid_std`` and ``inception_score_std`` are standard deviations over subsets and splits. KID's subsets and the
    score's splits are drawn by position: the same images in another order give slightly other figures.

    Args:
        metrics: What to measure.
        settings: How.
        values: ``features`` (N, D), and ``logits`` (N, K) for the Inception score.
        reference: What to compare with.

    Raises:
        InputError: If a feature is NaN or infinite, or the reference has other features or too few images.

    Source: Heusel et al. 2017 (arXiv 1706.08500), Eq. 6; Bińkowski et al. 2018 (arXiv 1801.01401), Eq. 3 and 4;
        Salimans et al. 2016 (arXiv 1606.03498); Kynkäänniemi et al. 2019 (arXiv 1904.06991), Eq. 1 and 2.
    """
    check_values(metrics, settings, values, reference)
    features, known = values["features"], reference.features
    scores: dict[str, float] = {}
    if "fid" in metrics:
        gaussian = reference.gaussian if reference.gaussian is not None or known is None else gaussian_of(known)
        if gaussian is None:
            raise InputError(f"FID needs a reference, got no features nor statistics of {reference.name}")
        scores["fid"] = frechet_distance(gaussian, gaussian_of(features))
    if "kid" in metrics:
        found = kid_features_to_metric(
            features,
            known,
            kid_subsets=settings.kid_subsets,
            kid_subset_size=settings.kid_subset_size,
            rng_seed=settings.seed,
            verbose=False,
        )
        scores["kid"] = found["kernel_inception_distance_mean"]
        scores["kid_std"] = found["kernel_inception_distance_std"]
    if "isc" in metrics:
        found = isc_features_to_metric(values["logits"], splits=settings.isc_splits, rng_seed=settings.seed)
        scores["inception_score"] = found["inception_score_mean"]
        scores["inception_score_std"] = found["inception_score_std"]
    if "prc" in metrics:
        # By parts: 50 000 against 50 000 distances at once would take 10 GB, thrice.
        found = prc_features_to_metric(
            features, known, prc_neighborhood=settings.prc_neighborhood, save_cpu_ram=True, verbose=False
        )
        scores["precision"], scores["recall"] = found["precision"], found["recall"]
    return scores


def gaussian_of(features: Tensor) -> Gaussian:
    """Returns mean and covariance of features (N, D), in float64."""
    moments = FeatureMoments(features.shape[1])
    moments.update(features)
    return moments.gaussian()


def measurements(
    scores: Mapping[str, float],
    settings: FidelitySettings,
    reader: LayerReader,
    reference: Reference,
    num_samples: int,
    samples: Mapping[str, Any],
) -> list[Measurement]:
    """Returns a measurement for each score of :func:`fidelity_scores`; deviations go into the details.

    Args:
        scores: What it gave.
        settings: Its settings.
        reader: Knows what features and logits are.
        reference: What was compared with.
        num_samples: Number of samples.
        samples: Settings by which the samples came about.
    """
    of_features, of_logits = reader.settings()
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
