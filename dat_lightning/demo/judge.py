"""Judges generated digits: how real they look, how varied they are, and whether they show the digit asked for."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric

from dat_lightning.data import to_uint8_rgb
from dat_lightning.data.digits import DigitsDataModule, load_images, split_indices
from dat_lightning.features import DigitsFeatures, DigitsJudge, FeatureMoments, Gaussian, frechet_distance

_BATCH_SIZE = 250


@dataclass(frozen=True)
class Quality:
    """Figures of one set of samples.

    Attributes:
        fid: Fréchet distance to the training digits; 0 is best.
        precision: Share of the samples that lie among real digits.
        recall: Share of the real digits that lie among the samples.
        label_agreement: Share of the samples that an independent classifier reads as the class asked for.
        diversity: Mean distance between samples of a class, relative to real digits; 1 is as varied as these.
    """

    fid: float
    precision: float
    recall: float
    label_agreement: float
    diversity: float

    def as_dict(self) -> dict[str, float]:
        """Returns the figures by name."""
        return asdict(self)


class Judge:
    """Knows the 1 437 training digits, and compares samples with them.

    The Fréchet distance is that of :class:`~dat_lightning.sampling.FrechetDistance`: features of
    :class:`~dat_lightning.features.DigitsFeatures` on pixels rounded to eight bits. Precision and recall are
    torch-fidelity's, with 3 neighbours in the same features. The independent classifier is
    :class:`~dat_lightning.features.DigitsJudge`.

    Source: Heusel et al. 2017 (arXiv 1706.08500); Kynkäänniemi et al. 2019 (arXiv 1904.06991).
    """

    def __init__(self) -> None:
        reference = DigitsDataModule().reference_data()
        batch = reference[range(len(reference.dataset))]
        self.extractor = DigitsFeatures()
        self.real_images = to_uint8_rgb(batch["x"])
        self.real_labels = batch["y"]
        self.real_features = self.features(self.real_images)
        self.real_moments = _gaussian(self.real_features)
        self.real_spread = spread(self.real_images, self.real_labels)
        self.reader = DigitsJudge()

    def features(self, images: Tensor) -> Tensor:
        """Returns the features (N, D) of uint8 images (N, 3, H, W)."""
        with torch.no_grad():
            return torch.cat([self.extractor(part) for part in torch.split(images, _BATCH_SIZE)])

    def read(self, images: Tensor) -> Tensor:
        """Returns the digits (N,) that the independent classifier reads in uint8 images (N, 3, H, W)."""
        logits: Tensor = self.reader(images.float() / 255)
        return logits.argmax(1)

    def label_agreement(self, images: Tensor, labels: Tensor) -> float:
        """Returns the share of uint8 images (N, 3, H, W) that are read as their labels (N,)."""
        return float((self.read(images) == labels).double().mean())

    def score(self, images: Tensor, labels: Tensor) -> Quality:
        """Returns all figures of uint8 images (N, 3, H, W) with their labels (N,)."""
        features = self.features(images)
        manifolds = prc_features_to_metric(features, self.real_features, verbose=False)
        return Quality(
            fid=frechet_distance(self.real_moments, _gaussian(features)),
            precision=float(manifolds["precision"]),
            recall=float(manifolds["recall"]),
            label_agreement=self.label_agreement(images, labels),
            diversity=spread(images, labels) / self.real_spread,
        )


def digits_for_testing() -> tuple[Tensor, Tensor]:
    """Returns the 360 test digits, images (N, 1, 16, 16) in [0, 1] and labels (N,)."""
    images, labels = load_images()
    test = torch.as_tensor(split_indices(0)["test"])
    return images[test], labels[test]


def spread(images: Tensor, labels: Tensor) -> float:
    """Returns the mean L2 distance between two different images of a class, mean over the classes.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: Shape (N,); a class with a single image is left out.
    """
    distances = []
    for label in range(int(labels.max()) + 1):
        members = (images[labels == label].double() / 255).flatten(1)
        if len(members) > 1:
            distances.append(torch.pdist(members).mean())
    return float(torch.stack(distances).mean()) if distances else 0.0


def _gaussian(features: Tensor) -> Gaussian:
    moments = FeatureMoments(features.shape[1])
    for part in torch.split(features, _BATCH_SIZE):
        moments.update(part)
    return moments.gaussian()
