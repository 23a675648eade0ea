"""The Trainer of the command line, which can also export a model."""

from lightning.pytorch import LightningDataModule, Trainer

from dat_lightning.modules import EnergyModule
from dat_lightning.weights.export import export_model


class ExportingTrainer(Trainer):
    """A Trainer that can also export a model."""

    def export(
        self,
        model: EnergyModule,
        ckpt_path: str,
        output: str,
        half: bool = False,
        datamodule: LightningDataModule | None = None,
    ) -> None:
        """Writes a checkpoint's averaged model to a folder that ``EnergyModel.from_pretrained`` reads.

        Args:
            model: The module of the configuration.
            ckpt_path: Checkpoint or state dict, or the name of a model that ships.
            output: Folder to write; one that exists must be empty or an earlier export, which is replaced.
            half: Whether to store weights in half precision, for a file of half the size.
            datamodule: Not used.

        Raises:
            FileExistsError: If the folder holds something else.
        """
        export_model(model.energy_model, ckpt_path, output, half)
