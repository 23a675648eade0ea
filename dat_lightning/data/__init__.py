"""DataModules that pair in-distribution images with out-of-distribution seeds, in an order that any run can resume."""

from dat_lightning.data.arrays import ArrayImages
from dat_lightning.data.cifar import CIFARImages
from dat_lightning.data.digits import DigitsDataModule
from dat_lightning.data.draws import DrawStream, Transform
from dat_lightning.data.entries import SizedDataset
from dat_lightning.data.fingerprint import shared_images
from dat_lightning.data.folders import ImageFolder, LabelledFolder
from dat_lightning.data.generated import GeneratedImages
from dat_lightning.data.hugging_face import HuggingFaceImages
from dat_lightning.data.image_pairs import ImageDataModule, RandomSlice, StreamTransforms
from dat_lightning.data.images import ImageSubset, Unlabelled, read_image
from dat_lightning.data.mixing import MixedStream
from dat_lightning.data.ood import PhotographCrops, UniformNoise
from dat_lightning.data.paired import PairedDataModule
from dat_lightning.data.pixels import CorruptImageError, to_uint8_rgb
from dat_lightning.data.plane import PlaneDataModule, PlaneDensity, plane_density
from dat_lightning.data.rare import RareDigitsDataModule
from dat_lightning.data.tiny_images import TinyImages

__all__ = [
    "ArrayImages",
    "CIFARImages",
    "CorruptImageError",
    "DigitsDataModule",
    "DrawStream",
    "GeneratedImages",
    "HuggingFaceImages",
    "ImageDataModule",
    "ImageFolder",
    "ImageSubset",
    "LabelledFolder",
    "MixedStream",
    "PairedDataModule",
    "PhotographCrops",
    "PlaneDataModule",
    "PlaneDensity",
    "RandomSlice",
    "RareDigitsDataModule",
    "SizedDataset",
    "StreamTransforms",
    "TinyImages",
    "Transform",
    "UniformNoise",
    "Unlabelled",
    "plane_density",
    "read_image",
    "shared_images",
    "to_uint8_rgb",
]
