"""A picture of generated samples, for the eye: one column per class, logged and written as PNG."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from typing_extensions import override

from dat_lightning.core.errors import require_at_least
from dat_lightning.data.pixels import to_uint8_rgb
from dat_lightning.results.pictures import show_picture
from dat_lightning.sampling.pgd_sampler import SampleConsumer
from dat_lightning.sampling.plan import SampleBatch, SamplingPlan


class SampleGrid(SampleConsumer):
    """Shows the first samples as a grid, a column per class, for each step count of the sweep.

    Loggers that take images get the pictures as ``{stage}/samples/{steps}_steps``; ``dirpath`` gets PNG files.

    Args:
        num_rows: Samples per class.
        dirpath: Folder for ``{stage}_step{global_step}_{steps}_steps.png``; ``None`` writes no files.
        max_columns: Classes shown, at most; the first ones.

    Raises:
        InputError: If a number is not positive.
    """

    def __init__(self, num_rows: int = 8, dirpath: str | None = None, max_columns: int = 20) -> None:
        require_at_least(1, num_rows=num_rows, max_columns=max_columns)
        self.num_rows = num_rows
        self.dirpath = dirpath
        self.max_columns = max_columns
        self._tiles: dict[int, Tensor] = {}

    @property
    @override
    def logged_names(self) -> set[str]:
        """None at all."""
        return set()

    @override
    def on_samples_start(self, trainer: Trainer, pl_module: LightningModule, plan: SamplingPlan) -> None:
        """Makes room for the pictures."""
        self._tiles = {}

    @override
    def on_samples_batch(self, trainer: Trainer, pl_module: LightningModule, batch: SampleBatch) -> None:
        """Keeps those samples of the batch that are shown."""
        for place, index in enumerate(batch.indices.tolist()):
            row, column = divmod(index, self.plan.num_classes)
            if row < self.num_rows and column < self.max_columns:
                for steps, images in batch.images.items():
                    self._tile(steps, images)[row, column] = images[place]

    @override
    def on_samples_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the ranks' tiles together and shows them."""
        # Rank zero has the first batch, and so a tile.
        mine = [*self._tiles[self.plan.num_steps[0]].shape] if self._tiles else []
        shape: list[int] = trainer.strategy.broadcast(mine)
        for steps in self.plan.num_steps:
            tiles = self._tiles.get(steps, torch.zeros(shape, device=pl_module.device))
            # Every tile was filled by one rank and is zero on the others.
            tiles = trainer.strategy.reduce(tiles, reduce_op="sum")
            if trainer.is_global_zero:
                self._show(trainer, tiles, steps)
        self._tiles = {}

    def _show(self, trainer: Trainer, tiles: Tensor, steps: int) -> None:
        grid = make_grid(tiles.flatten(0, 1).float().cpu(), nrow=tiles.shape[1], padding=1, pad_value=0.5)
        picture = Image.fromarray(to_uint8_rgb(grid.unsqueeze(0))[0].permute(1, 2, 0).contiguous().numpy())
        file = f"{self.plan.stage}_step{trainer.global_step:07d}_{steps}_steps.png"
        path = None if self.dirpath is None else Path(self.dirpath, file)
        show_picture(trainer, f"{self.plan.stage}/samples/{steps}_steps", picture, path)

    def _tile(self, steps: int, images: Tensor) -> Tensor:
        if steps not in self._tiles:
            columns = min(self.plan.num_classes, self.max_columns)
            # In float32, as a rank without tiles reduces it, whatever the precision of the samples.
            self._tiles[steps] = torch.zeros(self.num_rows, columns, *images.shape[1:], device=images.device)
        return self._tiles[steps]
