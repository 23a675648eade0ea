"""Fréchet and kernel distance, Inception score, precision and recall of features, by torch-fidelity's definitions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from dat_lightning.core.gaussian_stats import FeatureMoments, Gaussian, frechet_distance
from dat_lightning.metrics.features import DigitsFeatures, TorchFidelityFeatures

Metric = Literal["fid", "kid", "isc", "prc"]
METRICS: tuple[Metric, ...] = ("fid", "kid", "isc", "prc")


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
        ValueError: If a number is outside its range.
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
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        name: For protocols: which images, or which file.
        num_images: How many; 0 where a file of statistics does not say.
        gaussian: For FID; ``None`` for that of the features.
        features: (N, D) in a fixed order, for KID, precision and recall; ``None`` where only statistics are known.
    """

    name: str
    num_images: int = 0
    gaussian: Gaussian | None = None
    features: Tensor | None = None


def check_metrics(metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    """Returns the metrics once each, in a fixed order.

    Raises:
        ValueError: If there are none, or one is unknown.
    """
    if not metrics or set(metrics) - set(METRICS):
        raise ValueError(f"metrics must be some of {list(METRICS)}, got {list(metrics)}")
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
        ValueError: If there are too few images, or only statistics where features are needed.
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
            raise ValueError(f"{reason}: there must be at least {minimum} samples, got {num_samples}")
        if metric not in ("kid", "prc"):
            continue
        if num_reference is None:
            raise ValueError(f"the metric {metric!r} needs reference images; statistics (mu, sigma) serve 'fid' alone")
        if num_reference < minimum:
            raise ValueError(f"{reason}: there must be at least {minimum} reference images, got {num_reference}")


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
        ValueError: If a feature is NaN or infinite, or the reference has other features or too few images.
    """
    features, known = values["features"], reference.features
    check_sizes(metrics, settings, len(features), None if known is None else len(known))
    for value in (*values.values(), *(() if known is None else (known,))):
        if not bool(value.isfinite().all()):
            raise ValueError("features must be finite: the images or the extractor produced NaN or infinity")
    shapes = [] if known is None else [known.shape[1]]
    shapes += [] if reference.gaussian is None else [len(reference.gaussian.mean)]
    if any(size != features.shape[1] for size in shapes):
        raise ValueError(
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
        ValueError: If a feature is NaN or infinite, or the reference has other features or too few images.

    Source: Heusel et al. 2017 (arXiv 1706.08500), Eq. 6; Bińkowski et al. 2018 (arXiv 1801.01401), Eq. 3 and 4;
        Salimans et al. 2016 (arXiv 1606.03498); Kynkäänniemi et al. 2019 (arXiv 1904.06991), Eq. 1 and 2.
    """
    check_values(metrics, settings, values, reference)
    features, known = values["features"], reference.features
    scores: dict[str, float] = {}
    if "fid" in metrics:
        gaussian = reference.gaussian if reference.gaussian is not None or known is None else gaussian_of(known)
        if gaussian is None:
            raise ValueError(f"FID needs a reference, got no features nor statistics of {reference.name}")
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


def protocol(score: str, settings: FidelitySettings, reference: str, features: str, logits: str) -> str:
    """Returns how a score is measured, in words.

    Args:
        score: One of the names that :func:`fidelity_scores` gives, without ``_std``.
        settings: Its settings.
        reference: Name of the reference.
        features: Which features.
        logits: Which class logits.
    """
    against = f"{features}, against {reference}"
    neighbours = f"k-nearest-neighbour manifold of the {{}}, k = {settings.prc_neighborhood}, {against}"
    subsets = f"{settings.kid_subsets} subsets of {settings.kid_subset_size}"
    words = {
        "fid": f"Fréchet distance, {against}",
        "kid": f"kernel distance (cubic polynomial), mean over {subsets}, {against}",
        "inception_score": f"Inception score, mean over {settings.isc_splits} splits of the shuffled samples, {logits}",
        "precision": f"share of samples inside the {neighbours.format('reference')}",
        "recall": f"share of the reference inside the {neighbours.format('samples')}",
    }
    return words[score]


class TorchFidelityLayers(nn.Module):
    """Several layers of one of torch-fidelity's extractors in one pass, as a dictionary.

    Args:
        name: Name in torch-fidelity's registry.
        layers: Names of layers, that of the features first; by default those that torch-fidelity takes for FID and the
            Inception score, of Inception ``2048`` and ``logits_unbiased``.
        weights_path: As :class:`~dat_lightning.TorchFidelityFeatures` takes it.

    Raises:
        ValueError: If torch-fidelity has no such extractor or layer, or a layer is named twice.
        FileNotFoundError: If the weights are neither in ``weights_path`` nor to be downloaded.

    Source: Obukhov et al. 2020 (torch-fidelity).
    """

    def __init__(
        self,
        name: str = "inception-v3-compat",
        layers: Sequence[str] | None = None,
        weights_path: str | None = None,
    ) -> None:
        super().__init__()
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            raise ValueError(f"torch-fidelity has no extractor {name!r}; it has {sorted(FEATURE_EXTRACTORS_REGISTRY)}")
        kind = FEATURE_EXTRACTORS_REGISTRY[name]
        if layers is None:
            # Without repetition: most extractors have one layer for both.
            layers = list(dict.fromkeys(kind.get_default_feature_layer_for_metric(m) for m in ("fid", "isc")))
        known = kind.get_provided_features_list()
        if not layers or len(set(layers)) < len(layers) or set(layers) - set(known):
            raise ValueError(f"layers must be different names out of {list(known)}, got {list(layers)}")
        self.extractor: FeatureExtractorBase = TorchFidelityFeatures(name, layers[0], weights_path).extractor
        # torch-fidelity's networks hold all layers, and read this list in each pass.
        self.extractor.features_list = list(layers)

    def extra_repr(self) -> str:
        """Returns which extractor and layers these are."""
        return f"{self.extractor.get_name()}, {self.extractor.get_requested_features_list()}"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the layers, (N, D) each, of uint8 images (N, 3, H, W)."""
        return dict(zip(self.extractor.get_requested_features_list(), self.extractor(images), strict=True))


class DigitsLayers(nn.Module):
    """Features (N, 64) and logits (N, 10) of the small digits classifier that ships with the package, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.digits = DigitsFeatures()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns ``features`` and ``logits`` of uint8 images (N, 3, H, W)."""
        features = self.digits.features(images)
        return {"features": features, "logits": self.digits.network[-1](features)}


class LayerReader:
    """Reads features and class logits of eight-bit images from extractors of any kind.

    Args:
        extractor: Maps uint8 images (N, 3, H, W) to features (N, D), or to a tuple or a dictionary of layers.
        classifier: Maps images (N, C, H, W) in [0, 1] to logits (N, K); ``None`` for a layer of the extractor.
        features: Name of the layer with the features, its position in a tuple; by default the first.
        logits: Name of the layer with the logits; by default ``logits_unbiased`` or ``logits``.
    """

    def __init__(
        self,
        extractor: nn.Module,
        classifier: nn.Module | None = None,
        features: str | None = None,
        logits: str | None = None,
    ) -> None:
        self.extractor = extractor
        self.classifier = classifier
        self.feature_layer = features
        self.logit_layer = logits

    def read(self, pixels: Tensor, with_logits: bool = False) -> dict[str, Tensor]:
        """Returns ``features`` (N, D), and ``logits`` (N, K) if asked for, on the CPU.

        Args:
            pixels: uint8 images (N, 1 or 3, H, W); the extractor gets three channels, the classifier those there are.
            with_logits: Whether logits are needed.

        Raises:
            ValueError: If a layer is missing.
        """
        with torch.no_grad():
            layers = named_layers(self.extractor, self.extractor(pixels.expand(-1, 3, -1, -1)))
            found = {"features": self._layer(layers, self.feature_layer or next(iter(layers)), "features")}
            if with_logits and self.classifier is not None:
                found["logits"] = self.classifier(pixels.float() / 255)
            elif with_logits:
                found["logits"] = self._layer(layers, self.logit_layer, "logits")
        return {name: value.detach().flatten(1).float().cpu() for name, value in found.items()}

    def describe(self) -> tuple[str, str]:
        """Returns what features and logits are, for protocols."""
        name = type(self.extractor).__name__
        shown = self.extractor.extra_repr()
        network = f"{name}({shown})" if shown else name
        layer = f", layer {self.feature_layer}" if self.feature_layer else ""
        logits = network if self.classifier is None else f"the classifier {type(self.classifier).__name__}"
        return f"features of {network}{layer}", f"class probabilities of {logits}"

    def _layer(self, layers: Mapping[str, Tensor], name: str | None, part: str) -> Tensor:
        if name is None:
            name = next((known for known in ("logits_unbiased", "logits") if known in layers), None)
        if name is None:
            raise ValueError(
                f"the metric 'isc' needs class logits: {type(self.extractor).__name__} gives the layers {list(layers)};"
                " name one of them as logits, or give a classifier"
            )
        if name not in layers:
            raise ValueError(
                f"{part}={name!r}: {type(self.extractor).__name__} has no such layer; it gives {list(layers)}"
            )
        return layers[name]


def named_layers(extractor: nn.Module, output: object) -> dict[str, Tensor]:
    """Returns an extractor's output as layers by name, a tuple's by torch-fidelity's names or else by position.

    Raises:
        TypeError: If it is no tensor, nor a tuple or a dictionary of tensors.
    """
    named: dict[str, Tensor] = {}
    if isinstance(output, Mapping):
        named = {str(name): layer for name, layer in output.items()}
    elif isinstance(output, (tuple, list)):
        names: Sequence[str] = [str(position) for position in range(len(output))]
        if isinstance(extractor, FeatureExtractorBase):
            names = extractor.get_requested_features_list()
        named = dict(zip(names, output, strict=True))
    else:
        named = {"0": output}  # type: ignore[dict-item]
    if not named or not all(isinstance(layer, Tensor) for layer in named.values()):
        kinds = {name: type(layer).__name__ for name, layer in named.items()}
        raise TypeError(f"{type(extractor).__name__} must give a tensor, or a tuple or dict of tensors, got {kinds}")
    return named
