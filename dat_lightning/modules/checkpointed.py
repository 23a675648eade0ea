"""How a module's weights come in and go out: initial weights, checkpoints, and what is checked of either."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import Self, override

from dat_lightning.modules.checks import check_restored
from dat_lightning.weights import (
    check_hyperparameters,
    check_stamp,
    check_states,
    load_weights,
    read_checkpoint,
    run_of,
    settings_of_module,
    stamp,
)
from dat_lightning.weights.classes import check_classes, settings_in, without_downloads
from dat_lightning.weights.described import described_network
from dat_lightning.weights.extents import storages_in
from dat_lightning.weights.files import as_local_file
from dat_lightning.weights.hub import EnergyModel
from dat_lightning.weights.stamp import settings_in_yaml


class CheckpointedModule(LightningModule):
    """Holds a network whose weights come from a file, and goes into checkpoints and comes back from them.

    A subclass sets the attributes, which :class:`~dat_lightning.modules.trained.TrainedModule` describes.
    """

    energy_model: EnergyModel
    init_from: str | None
    new_head: bool
    network_evaluations: int
    _initialized: bool = False
    _run_name: str | None = None

    @classmethod
    @override
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        allowed_classes: Sequence[str] = (),
        **kwargs: Any,
    ) -> Self:
        """Returns a module as Lightning does, with the weights of a checkpoint and the settings that it has, or a file.

        A file decides on little of what is made: classes of this package that compute, registered networks, torch's
        optimisers, and ``cls`` itself. A network that it describes downloads nothing, and is as large as its weights.

        Args:
            checkpoint_path: A file, an address that fsspec knows, or an open binary file.
            map_location: Where the weights go, as for ``torch.load``.
            hparams_file: ``hparams.yaml`` of a run, whose settings of the module are taken.
            allowed_classes: Further classes that the file may name, or packages of such; they are imported, and how
                large a network becomes is theirs to decide.
            kwargs: Settings that come before those of the file, and Lightning's ``strict`` and ``weights_only``; with
                ``weights_only=False`` nothing of this is checked, and the file may run any code.

        Raises:
            InputError: If the file is damaged, too large a thing for its size, or names another class.
        """
        if hparams_file is not None and (settings := settings_of_module(hparams_file)):
            hparams_file, kwargs = None, {**settings, **kwargs}
        if kwargs.get("weights_only") is False:
            return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, **kwargs)
        with as_local_file(checkpoint_path) as path:
            contents = read_checkpoint(path)
            settings = {**settings_in(contents), **settings_in_yaml(hparams_file)}
            check_classes({**settings, **kwargs}, allowed_classes, cls)
            network = settings.get("energy_model")
            if isinstance(network, Mapping) and "energy_model" not in kwargs:
                if not allowed_classes:
                    described_network(settings, storages_in(contents))  # no larger than the file has weights for
                kwargs["energy_model"] = without_downloads(network)
            return super().load_from_checkpoint(path, map_location, hparams_file, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes that the weights come from a checkpoint, so that :attr:`init_from` is not needed.

        Raises:
            InputError: If a newer version of this package wrote it, or, where training is to go on, another module; or
                if it holds what no run can have saved, such as weights that are not finite.
        """
        check_restored(self, checkpoint, self._is_fitting())
        if self._is_fitting():
            check_stamp(checkpoint, _class_path(self))
            self._run_name = run_of(checkpoint) or self._run_name
            self.network_evaluations = int(checkpoint.get("network_evaluations", 0))
        else:
            check_stamp(checkpoint)
        self._initialized = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes the number of the checkpoint's format into it, the module's class, and the name of the run.

        A file of weights alone gets averaged ones, where :class:`~dat_lightning.ExponentialMovingAverage` has some.

        Raises:
            InputError: If a hyperparameter, or the state of a callback, is an object, which nobody could read back.
        """
        check_hyperparameters(checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}))
        check_hyperparameters(checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {}), "of the data ")
        check_states(checkpoint.get("callbacks", {}))
        if not self._initialized and self._is_fitting():
            # LearningRateFinder saves before on_fit_start what it goes back to.
            self._load_initial_weights()
            checkpoint["state_dict"] = self.trainer.strategy.lightning_module_state_dict()
        if self._is_fitting() and "callbacks" not in checkpoint:  # weights alone
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                getattr(callback, "save_average", lambda saved: None)(checkpoint)
        stamp(checkpoint, _class_path(self), self._run_name)
        checkpoint["network_evaluations"] = self.network_evaluations

    # Parts.

    def _is_fitting(self) -> bool:
        try:
            return self.trainer.state.fn is TrainerFn.FITTING
        except RuntimeError:  # as in load_from_checkpoint there is no Trainer
            return False

    def _load_initial_weights(self) -> None:
        if not self._initialized and self.init_from is not None:
            loaded = load_weights(self.energy_model, self.init_from, new_head=self.new_head)
            rank_zero_info(f"weights from {self.init_from}: {loaded}")
        self._initialized = True


def _class_path(module: LightningModule) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
