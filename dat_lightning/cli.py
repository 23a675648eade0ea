"""The command line: a LightningCLI whose errors are one sentence and whose explicit configuration always wins."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import torch
import yaml
from jsonargparse import ActionConfigFile, Namespace, set_parsing_settings  # type: ignore[attr-defined]
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

import dat_lightning
from dat_lightning.core.errors import InputError
from dat_lightning.explore import explore
from dat_lightning.explore.serving import logger as explore_logger
from dat_lightning.modules import EnergyModule
from dat_lightning.pages.drawing import require_matplotlib
from dat_lightning.pages.evaluation_report import EvaluationReport
from dat_lightning.runs.configurations import with_bases, with_changed_callbacks
from dat_lightning.runs.error_sentences import argument_sentence, constructor_error, error_sentence
from dat_lightning.runs.exporting import ExportingTrainer
from dat_lightning.runs.lightning_internals import replaces_files
from dat_lightning.runs.nulls import check_nulls
from dat_lightning.runs.paths import at_home, with_home
from dat_lightning.runs.resume import begin_with_exported, find_checkpoint, protect
from dat_lightning.runs.run_settings import SaveRunSettings
from dat_lightning.runs.signal_checkpoint import StoppedBySignal
from dat_lightning.threads import NUMBER, usable_cores
from dat_lightning.weights.export import logger as export_logger

DEBUG_VARIABLE = "DAT_LIGHTNING_DEBUG"


# ${trainer.default_root_dir} in a file means that of the subcommand that the file is for.
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class DATArgumentParser(LightningArgumentParser):
    """Reports a wrong argument in a sentence, without the pages of usage before it, and completes no abbreviations.

    ``${trainer.default_root_dir}`` in a configuration stands for the value of that name once all files and arguments
    are read, and a file may go on top of another, its ``base``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "parser_mode": "omegaconf+", **kwargs})

    @override
    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parses arguments; a ``${name}`` that leads nowhere is a wrong argument like others."""
        try:
            parsed: Namespace = with_home(super().parse_args(*args, **kwargs))
        except OmegaConfBaseException as error:
            self.error(f"{error.full_key}: {str(error).splitlines()[0]}", error)
        except UnicodeDecodeError as error:  # in a file that jsonargparse reads, as the value of a setting
            lines = error.object[: error.start].decode("utf-8", "replace").split("\n")
            self.error(f"a file of settings is no text in UTF-8, in line {len(lines)} after {lines[-1]!r}", error)
        return parsed

    @override
    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parses a configuration; one that has a ``base`` as if the base had been given before it."""
        files = with_bases(Path(at_home(path)))
        if len(files) == 1:
            with_changed_callbacks(files[0][1], Namespace(), files[0][0])  # type: ignore[no-untyped-call]
            parsed: Namespace = super().parse_path(path, *args, **kwargs)
            return parsed
        config = Namespace()  # type: ignore[no-untyped-call]
        for file, contents in files:
            text = yaml.safe_dump(with_changed_callbacks(contents, config, file), sort_keys=False)
            ActionConfigFile.apply_config(self, config, "config", text)
        config.pop("config")
        return config

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message and exits with status 2; inner parsers raise instead."""
        if not self.exit_on_error or os.environ.get(DEBUG_VARIABLE):
            super().error(message, ex)
        sys.stderr.write(f"dat-lightning: error: {argument_sentence(message)}\n")
        sys.exit(2)


def _read_whole_numbers_first(parser: LightningArgumentParser) -> None:
    """Makes ``trainer.limit_*_batches: 1`` one batch again.

    ``typing`` keeps equal unions once, in the order of who wrote it first; where that is float before int, jsonargparse
    makes of 1 the float 1.0, which stands for all batches.
    """
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        members = get_args(hint) if get_origin(hint) is Union else ()
        if int in members and float in members:
            ordered = (int, *(member for member in members if member is not int))
            action._typehint = Union[ordered]  # type: ignore[attr-defined]  # noqa: UP007 - | takes no tuple


class DATCLI(LightningCLI):
    """Runs ``fit``, ``validate``, ``test``, ``predict`` and ``export`` of a configuration; lists ``explore``."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """Returns the methods of the Trainer that can be called, with the arguments that the configuration gives."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}

    @override
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        # For the list in --help; main runs it, because it needs neither a Trainer nor a configuration.
        page = explore_parser()
        parser._subcommands_action.add_subcommand("explore", page, help=page.description)  # type: ignore[union-attr]

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what torch keeps for the whole process; evaluation must allow gradients with respect to images."""
        parser.add_argument(
            "--float32_matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="high",
            help="torch's setting of that name; high allows TF32 on GPUs, as torch does for convolutions in any case",
        )
        parser.set_defaults({"trainer.inference_mode": False})
        _read_whole_numbers_first(parser)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DATCLI":
        """Returns itself: optimisers' settings remember who read them, and averaging copies the module with those."""
        return self

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning would put the hyperparameters in the checkpoint above those on the command line.
        return

    def before_fit(self) -> None:
        """Checks the checkpoint to go on from; without one, warns if those of an earlier run will be replaced."""
        # A trial run writes no checkpoints.
        if self._find_checkpoint() is not None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        savers = [c for c in callbacks if isinstance(c, ModelCheckpoint) and replaces_files(c)]
        folders = {Path(c.dirpath) for c in savers if c.dirpath is not None}
        found = sorted(str(path) for folder in folders for path in folder.glob("*.ckpt"))
        if found:
            rank_zero_warn(
                f"checkpoints of an earlier run, {found[0]} and {len(found) - 1} more, will be replaced by this one's:"
                " to go on with that run stop and give --ckpt_path, to keep them choose another dirpath"
            )

    def before_validate(self) -> None:
        """Warns if nothing says where the weights come from."""
        self._warn_of_random_weights()

    def before_test(self) -> None:
        """Warns if nothing says where the weights come from, and sees to it that figures are written down."""
        self._warn_of_random_weights()
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        # A trial run of one batch must not replace the evaluation of a checkpoint.
        if self.trainer.fast_dev_run or any(isinstance(callback, EvaluationReport) for callback in callbacks):  # type: ignore[attr-defined]
            return
        page = True
        try:
            require_matplotlib()
        except InputError as error:
            page = False
            rank_zero_warn(f"evaluation.json will have no page beside it: {error}")
        callbacks.append(EvaluationReport(page=page))

    def before_predict(self) -> None:
        """Warns if nothing says where the weights come from."""
        self._warn_of_random_weights()

    def before_export(self) -> None:
        """Lets the export say on standard output where it wrote."""
        export_logger.setLevel(logging.INFO)
        export_logger.handlers = [logging.StreamHandler(sys.stdout)]

    def _find_checkpoint(self) -> str | None:
        """Puts the checkpoint that ``--ckpt_path`` means in its place, and returns it."""
        arguments = self.config_init[self.subcommand]
        to_train = self.subcommand == "fit"
        if begin_with_exported(arguments["ckpt_path"], self.model, to_train):
            arguments["ckpt_path"] = None
        elif arguments["weights_only"] is not False:
            arguments["ckpt_path"] = find_checkpoint(arguments["ckpt_path"], self.trainer, self.model, to_train)
        path: str | None = arguments["ckpt_path"]
        return path

    def _warn_of_random_weights(self) -> None:
        if self._find_checkpoint() is None and getattr(self.model, "init_from", None) is None:
            rank_zero_warn(
                "neither --ckpt_path nor model.init_from is set: the weights are random, and so are all figures"
            )

    @override
    def before_instantiate_classes(self) -> None:
        """Keeps a checkpoint from running code, unless ``--weights_only false`` asks for that; exports on the CPU."""
        # LightningCLI(run=False) has no subcommand.
        arguments = self.config if self.subcommand is None else self.config[self.subcommand]
        if not isinstance(arguments["trainer"], Namespace):
            raise InputError(f"trainer must be settings with names, got {arguments['trainer']!r}")
        check_nulls(arguments)
        torch.set_float32_matmul_precision(arguments["float32_matmul_precision"])
        if "weights_only" in arguments and arguments["weights_only"] is None:
            arguments["weights_only"] = True
        if self.subcommand == "export":
            # The data may be elsewhere, and so may the cluster.
            nothing = Namespace(class_path="lightning.pytorch.LightningDataModule")  # type: ignore[no-untyped-call]
            arguments["data"] = nothing
            here = Namespace(accelerator="cpu", devices=1, logger=False, callbacks=[])  # type: ignore[no-untyped-call]
            arguments["trainer"] = here

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Returns the Trainer; its values are all the configuration's, and a ValueError is how it refuses one."""
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the Trainer cannot be made as configured: {error}") from error

    @override
    def instantiate_classes(self) -> None:
        """Instantiates everything, and gives the model its configuration as hyperparameters."""
        try:
            super().instantiate_classes()
        except Exception as error:
            raise constructor_error(error) from None
        if isinstance(getattr(self.trainer.strategy, "cluster_environment", None), LightningEnvironment):
            # Processes that Lightning is about to start, on the cores of this one.
            limit_threads(self.trainer.num_devices)
        protect(self.trainer)
        self._dump_config()
        model = self.config_dump["model"]
        # The form that load_from_checkpoint reads.
        self.model.save_hyperparameters(
            {
                "_class_path": model["class_path"],
                **model.get("init_args", {}),
                "_instantiator": "lightning.pytorch.cli.instantiate_module",
            },
            logger=False,  # SaveRunSettings logs them, with those of the data and the Trainer
        )


def main(args: ArgsType = None) -> None:
    """Runs the command line.

    Args:
        args: Arguments instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: With status 2 for a wrong argument and 1 for input that a run cannot use; 143 after SIGTERM, 130
            after Ctrl-C and 138 after Slurm's signal, because the run is not done then.
    """
    try:
        limit_threads()
        arguments = sys.argv[1:] if args is None else args
        if isinstance(arguments, list) and arguments[:1] == ["explore"]:
            run_explore(arguments[1:])
            return
        if arguments == ["--version"]:
            sys.stdout.write(f"dat-lightning {dat_lightning.__version__}\n")
            return
        # A class path without dots is looked for among the classes that are loaded.
        for name in dat_lightning.__all__:
            getattr(dat_lightning, name)
        DATCLI(
            EnergyModule,
            LightningDataModule,
            trainer_class=ExportingTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunSettings,
            parser_class=DATArgumentParser,
            parser_kwargs={"prog": "dat-lightning", "description": (dat_lightning.__doc__ or "").splitlines()[0]},
            args=args,
        )
    except StoppedBySignal as stop:
        if stop.code:  # the process of rank zero
            sys.stderr.write(f"dat-lightning: {stop}\n")
        raise
    except SIGTERMException as stop:  # before the first step
        raise SystemExit(128 + signal.SIGTERM) from stop
    except SystemExit as stop:
        # Lightning makes a status of 1 from Ctrl-C, as from an error.
        raise (SystemExit(128 + signal.SIGINT) if isinstance(stop.__context__, KeyboardInterrupt) else stop) from None
    except Exception as error:
        sentence = error_sentence(error)
        if os.environ.get(DEBUG_VARIABLE) or sentence is None:
            raise
        sys.stderr.write(f"dat-lightning: error: {sentence}\n")
        sys.exit(1)


def limit_threads(processes: int = 1) -> None:
    """Sees to it that torch starts no more threads than this process may use cores, unless the user has set a number.

    Args:
        processes: Processes that share those cores; they inherit the number.
    """
    if NUMBER in os.environ:
        return
    threads = min(torch.get_num_threads(), max(1, usable_cores() // processes))
    torch.set_num_threads(threads)
    if processes > 1:
        # Lightning would share the machine's cores, whatever the quota.
        os.environ[NUMBER] = str(threads)


def explore_parser() -> DATArgumentParser:
    """Returns the parser of ``explore``, whose arguments are those of the function."""
    parser = DATArgumentParser(prog="dat-lightning explore", description=(explore.__doc__ or "").split("\n")[0])
    help_text = "configuration of the run, for its network and data; of several, later ones win (optional)"
    parser.add_argument("--config", action="append", default=[], metavar="PATH", help=help_text)
    parser.add_function_arguments(explore, skip={"config"})
    return parser


def run_explore(args: list[str]) -> None:
    """Serves the page until it is interrupted.

    Args:
        args: What follows ``explore`` on the command line.
    """
    explore_logger.setLevel(logging.INFO)
    explore_logger.handlers = [logging.StreamHandler(sys.stdout)]
    explore(**vars(explore_parser().parse_args(args)))
