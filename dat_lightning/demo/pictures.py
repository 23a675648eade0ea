"""Images as they go into the report: grids of samples, PNG data URIs, and the picture of both stages."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from dat_lightning.demo.evaluation import Evaluation
from dat_lightning.demo.plots import COLORS, NAMES
from dat_lightning.demo.training import STAGES, Stage
from dat_lightning.pages.drawing import LIGHT

GRID_ROWS = 10
_DOTS = 100
_SCALE = 4


def png_uri(image: Tensor) -> str:
    """Returns a data URI of a uint8 image (3, H, W), stored as grey if its channels are equal."""
    grey = bool((image == image[:1]).all())
    pixels = image[0] if grey else image.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def sample_grid(evaluation: Evaluation, num_classes: int = 10) -> Tensor:
    """Returns a uint8 picture (3, H, W) of the first samples at the best number of steps, one column per class."""
    images = evaluation.samples.images[evaluation.best_steps][: GRID_ROWS * num_classes]
    return tiled(images, num_classes)


def tiled(images: Tensor, columns: int) -> Tensor:
    """Returns uint8 images (N, 3, H, W) in one picture (3, H', W'), with white lines between them."""
    picture: Tensor = make_grid(images, nrow=columns, padding=1, pad_value=255)
    return picture


def write_comparison(path: Path, evaluations: Mapping[Stage, Evaluation]) -> None:
    """Writes one PNG with the grids of both stages side by side, their pixels enlarged by a whole number."""
    grids = {stage: sample_grid(evaluations[stage]) for stage in STAGES}
    height, width = (_SCALE * side for side in grids["stage2"].shape[-2:])
    margin, gap, top = 24, 48, 84
    total_width, total_height = 2 * width + 2 * margin + gap, height + top + margin
    with plt.style.context(list(LIGHT)):
        figure = plt.figure(figsize=(total_width / _DOTS, total_height / _DOTS), dpi=_DOTS)
        for place, (stage, grid) in enumerate(grids.items()):
            left = margin + place * (width + gap)
            box = (left / total_width, margin / total_height, width / total_width, height / total_height)
            axes = figure.add_axes(box)
            axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            evaluation = evaluations[stage]
            heading = f"Fréchet distance {evaluation.best.fid:.1f} after {evaluation.best_steps} steps"
            x, y = left / total_width, 1 - 34 / total_height
            figure.text(x, y, NAMES[stage], size=19, weight="bold", color=COLORS[stage])
            figure.text(x, 1 - 64 / total_height, heading, size=14, color="#475569")
        figure.savefig(path, dpi=_DOTS, metadata={"Software": None})
        plt.close(figure)
