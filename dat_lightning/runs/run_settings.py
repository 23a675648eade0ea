"""The configuration of each run, kept in its own folder and given to its loggers as hyperparameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override


class SaveRunSettings(SaveConfigCallback):
    """Writes the configuration into the folder of the run, and logs it as hyperparameters.

    The folder is the logger's for this run. Some loggers, such as W&B's, have one folder for all runs; there it is
    ``<name>/<version>`` in that, where Lightning puts checkpoints too. A file of another configuration is never
    replaced: the next one is ``config-1.yaml``. A job that goes on with the same configuration writes none.

    Hyperparameters are the module's settings by their names, those of the data as ``data/...``, and those of the
    Trainer as ``trainer/...``, without its loggers. Checkpoints keep the module's alone.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes and logs, once, in the process of rank zero; before Lightning logs anything."""
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        text = self.parser.dump(self.config, skip_none=False)
        _write(folder_of_run(trainer), self.config_filename, text)
        settings = hyperparameters(yaml.safe_load(text))
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)


def folder_of_run(trainer: Trainer) -> str:
    """Returns the folder that belongs to this run alone, as far as its first logger has one."""
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None:
        return str(trainer.default_root_dir)
    if logger.log_dir is not None:
        return str(logger.log_dir)
    root = logger.save_dir if logger.save_dir is not None else trainer.default_root_dir
    return str(Path(root, str(logger.name), str(logger.version)))


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration in the form of hyperparameters, with one level less than in YAML.

    Args:
        config: Of a subcommand: ``model``, ``data``, ``trainer`` and single settings.
    """
    trainer = {name: value for name, value in config["trainer"].items() if name != "logger"}
    named = {name: config[name] for name in ("seed_everything", "float32_matmul_precision") if name in config}
    return {**_flat(config["model"]), **named, "data": _flat(config.get("data")), "trainer": trainer}


def _flat(part: Any) -> dict[str, Any]:
    """The arguments of a class beside its name."""
    return {"class_path": part["class_path"], **(part.get("init_args") or {})} if isinstance(part, dict) else {}


def _write(folder: str, name: str, text: str) -> None:
    files = get_filesystem(folder)
    files.makedirs(folder, exist_ok=True)
    stem, _, ending = name.rpartition(".")
    number = 0
    path = f"{folder}/{name}"
    while files.isfile(path):
        with files.open(path, "r") as file:
            if file.read() == text:
                return
        number += 1
        path = f"{folder}/{stem}-{number}.{ending}"
    with files.open(path, "w") as file:
        file.write(text)
