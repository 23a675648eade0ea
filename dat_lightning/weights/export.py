"""From a training run's checkpoint to a model that stands alone: averaged weights, network and normalisation."""

import logging
from pathlib import Path

from dat_lightning.weights import load_weights
from dat_lightning.weights.hub import CONFIG_FILE, WEIGHTS_FILE, EnergyModel

logger = logging.getLogger(__name__)


def export_model(model: EnergyModel, ckpt_path: str | Path, output: str | Path, half: bool = False) -> None:
    """Loads a checkpoint's averaged weights into a model and saves it for :meth:`EnergyModel.from_pretrained`.

    Args:
        model: Of the network that the checkpoint was trained with; its weights are replaced.
        ckpt_path: Checkpoint or state dict, or the name of a model that ships.
        output: Folder to write; one that exists must be empty or an earlier export, which is replaced.
        half: Whether weights are stored in half precision, see :meth:`EnergyModel.save_pretrained`.

    Raises:
        FileExistsError: If the folder holds something else.
        FileNotFoundError: If there is no checkpoint.
        InputError: If the checkpoint does not fit the model, the network is not registered, or half precision does not
            reach as far as its weights.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output must be a folder, but {output} is a file")
    present = {path.name for path in output.iterdir()} if output.exists() else set()
    if present and not present >= {CONFIG_FILE, WEIGHTS_FILE}:
        raise FileExistsError(
            f"output must be a new or empty folder or an earlier export, but {output} has {sorted(present)[:5]}"
        )
    load_weights(model, ckpt_path)
    model.save_pretrained(output, half=half)
    logger.info("wrote %s, the weights of %s; EnergyModel.from_pretrained(%r) reads it", output, ckpt_path, str(output))
