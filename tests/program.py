"""The program up to where it would run: its parser, and what a configuration makes."""

from typing import Any

from lightning.pytorch import LightningDataModule

from dat_lightning import EnergyModule
from dat_lightning.cli import DATCLI, DATArgumentParser


def program(*args: str, kind: type[DATCLI] = DATCLI) -> Any:
    """Returns the command line of ``args`` without a subcommand, as the program sets it up."""
    return kind(
        EnergyModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_class=DATArgumentParser,
        run=False,
        args=list(args),
    )
