"""Pictures for the eye, given to every logger that takes some, and written as PNG."""

from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image


def takes_pictures(logger: Logger) -> bool:
    """Returns whether a logger shows images: TensorBoard's, MLflow's, and those with ``log_image``, such as W&B's."""
    # Asked of the class: the logger of a trial run answers to any name.
    return isinstance(logger, TensorBoardLogger | MLFlowLogger) or callable(getattr(type(logger), "log_image", None))


def pictures_wanted(trainer: Trainer, path: Path | None) -> bool:
    """Returns whether this process is to draw a picture: that of rank zero, if it is for a file or a logger."""
    return trainer.is_global_zero and (path is not None or any(map(takes_pictures, trainer.loggers)))


def show_picture(trainer: Trainer, name: str, picture: Image.Image, path: Path | None = None) -> None:
    """Gives a picture to each logger that takes images, at the Trainer's global step; for the process of rank zero.

    TensorBoard and W&B show it under ``name``, MLflow among the images of the run. Other loggers are left alone.

    Args:
        trainer: Its loggers, of which there may be none.
        name: Such as ``val/samples/20_steps``.
        picture: RGB.
        path: A PNG file to write as well; its folder is made.
    """
    step = trainer.global_step
    for logger in filter(takes_pictures, trainer.loggers):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, picture, key=name, step=step)
        else:
            logger.log_image(key=name, images=[picture], step=step)  # type: ignore[attr-defined]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
