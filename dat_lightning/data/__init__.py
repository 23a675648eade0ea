"""DataModules that pair in-distribution images with out-of-distribution seeds, in an order that any run can resume."""

from dat_lightning.core.fingerprint import SizedDataset
from dat_lightning.data.digits import DigitsDataModule
from dat_lightning.data.draws import DrawStream, Transform
from dat_lightning.data.ood import PhotographCrops, UniformNoise
from dat_lightning.data.paired import PairedDataModule

__all__ = [
    "DigitsDataModule",
    "DrawStream",
    "PairedDataModule",
    "PhotographCrops",
    "SizedDataset",
    "Transform",
    "UniformNoise",
]
