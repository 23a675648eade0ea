"""Checkpoints of a run, changed so that nobody can have saved them: a sentence each, and no run goes on from them."""

import os
import re
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dat_lightning import (
    DATContinuedChainsModule,
    DATWarmAttacksModule,
    DualAdversarialModule,
    EnergyModule,
    ExponentialMovingAverage,
    JEMModule,
)
from dat_lightning.cli import main
from dat_lightning.core.errors import InputError
from dat_lightning.runs.error_sentences import error_sentence
from dat_lightning.runs.resume import find_checkpoint, protect
from tests import tiny
from tests.program import program
from tests.reliability.conditions import STAGE2, TINY
from tests.test_cli import refusal

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning"),
    pytest.mark.filterwarnings("ignore:neither --ckpt_path nor model.init_from:UserWarning"),
    pytest.mark.filterwarnings("ignore:checkpoints of an earlier run:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:--ckpt_path .* was trained with other settings:UserWarning"),
]

ARGUMENTS = ["--config", STAGE2, "--config", TINY, "--model.init_from", "null"]
WEIGHT, VARIANCE = "energy_model.backbone.stem.weight", "energy_model.backbone.norm.running_var"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    before = Path.cwd()
    os.chdir(folder)
    try:
        main(["fit", *ARGUMENTS])
    finally:
        os.chdir(before)
    return folder / "runs" / "checkpoints" / "last.ckpt"


def put(*names: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Replaces an entry of a checkpoint, by its names from the outside in."""

    def change(contents: dict[str, Any]) -> None:
        inner: Any = contents
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value

    return change


def moments_of_another_shape(contents: dict[str, Any]) -> None:
    contents["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(1, 1)


def of_optimiser(*names: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    return put("optimizer_states", 0, *names, value=value)


def one_parameter_less(contents: dict[str, Any]) -> None:
    contents["optimizer_states"][0]["param_groups"][0]["params"].pop()


def integer_weights(contents: dict[str, Any]) -> None:
    for entry in ("state_dict", "current_model_state"):
        contents[entry][WEIGHT] = contents[entry][WEIGHT].int()


def every_callback(state: Any) -> Callable[[dict[str, Any]], None]:
    return lambda contents: contents.update(callbacks=dict.fromkeys(contents["callbacks"], state))


ZEROS = torch.zeros(4, 1, 3, 3)
NAN = torch.full((4, 1, 3, 3), float("nan"))
# (what is changed, what is said of it)
STATES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "loops_empty": (put("loops", value={}), "does not say how far training has come"),
    "fit_loop_empty": (put("loops", "fit_loop", value={}), "does not say how far training has come"),
    "progress_empty": (
        put("loops", "fit_loop", "epoch_loop.batch_progress", value={}),
        "state of loops, .* cannot be restored: ",
    ),
    "step_beyond": (put("global_step", value=10**30), "its global_step is 1000000000"),
    "steps_beyond": (
        put("loops", "fit_loop", "epoch_progress", "total", "ready", value=10**30),
        "its loops.fit_loop.epoch_progress.total.ready is 1000000000",
    ),
    "version": (put("pytorch-lightning_version", value="x"), "its pytorch-lightning_version is 'x'"),
    "stamp": (put("dat_lightning", value="x"), "its entry dat_lightning is a str"),
    "epochs_text": (
        put("loops", "fit_loop", "epoch_progress", "current", "processed", value="x"),
        "its loops.fit_loop.epoch_progress.current.processed is x",
    ),
    "moments": (moments_of_another_shape, r"exp_avg of parameter 0 must have the shape \(4, 1, 3, 3\), got \(1, 1\)"),
    "moments_text": (of_optimiser("state", 0, "exp_avg", value="x"), r"exp_avg of parameter 0 must have .*, got str"),
    "moments_whole": (
        of_optimiser("state", 0, "exp_avg", value=ZEROS.int()),
        r"exp_avg .* torch.int32",
    ),
    "moments_nan": (of_optimiser("state", 0, "exp_avg_sq", value=NAN), "holds NaN"),
    "moments_sparse": (
        of_optimiser("state", 0, "exp_avg", value=ZEROS.to_sparse()),
        "no plain numbers",
    ),
    "moments_missing": (lambda contents: contents["optimizer_states"][0]["state"][0].pop("exp_avg"), "got NoneType"),
    "optimiser_step": (of_optimiser("state", 0, "step", value=torch.tensor(-5.0)), "step of parameter 0 is -5.0"),
    "optimiser_steps": (of_optimiser("state", 0, "step", value=torch.zeros(5)), r"step of parameter 0 must .* \(5,\)"),
    "state_list": (of_optimiser("state", value=[1, 2]), "it holds what no run saves: AttributeError"),
    "state_number": (of_optimiser("state", 0, value=3), "it holds what no run saves: AttributeError"),
    "groups_text": (of_optimiser("param_groups", value="x"), "it holds what no run saves"),
    "rate": (
        of_optimiser("param_groups", 0, "lr", value=-1.0),
        "lr must be a number of at least 0, got -1.0",
    ),
    "rate_nan": (
        of_optimiser("param_groups", 0, "lr", value=float("nan")),
        "lr must be a number .* got nan",
    ),
    "rate_text": (of_optimiser("param_groups", 0, "lr", value="x"), "it holds what no run saves: ValueError"),
    "rate_missing": (lambda contents: contents["optimizer_states"][0]["param_groups"][0].pop("lr"), "has no lr"),
    "betas": (of_optimiser("param_groups", 0, "betas", value=(-2.0, 0.9)), "optimiser's betas must be"),
    "parameters": (one_parameter_less, "cannot be restored: ValueError: loaded state dict contains a parameter group"),
    "optimisers": (put("optimizer_states", value=[{}]), "it holds what no run saves: KeyError: 'param_groups'"),
    "integers": (integer_weights, rf"{WEIGHT} holds torch.int32 instead of torch.float32"),
    "nan": (put("state_dict", WEIGHT, value=NAN), rf"{WEIGHT} holds NaN or infinite numbers"),
    "nan_raw": (put("current_model_state", WEIGHT, value=NAN), rf"{WEIGHT} holds NaN or infinite numbers"),
    "T_large": (
        put("state_dict", "curriculum.num_steps", value=torch.tensor(10**6)),
        "T of .* max_steps, 6; got 10000",
    ),
    "window": (
        put("state_dict", "curriculum.window", value=torch.tensor(-10)),
        "window must be a whole number",
    ),
    "areas": (lambda contents: contents["state_dict"]["curriculum.values"].fill_(7.0), "areas between 0 and 1"),
    "deviation": (
        put("state_dict", "energy_model.std", value=torch.zeros(1, 1, 1, 1)),
        "numbers that are not positive",
    ),
    "variance": (put("state_dict", VARIANCE, value=-torch.ones(8)), f"{VARIANCE} holds negative variances"),
    "beyond_float32": (
        put("state_dict", WEIGHT, value=torch.full((4, 1, 3, 3), 1e300, dtype=torch.float64)),
        "holds NaN or inf",
    ),
    "sparse": (put("state_dict", WEIGHT, value=ZEROS.to_sparse()), "holds no plain numbers"),
    "small_floats": (
        put("state_dict", WEIGHT, value=torch.full((4, 1, 3, 3), torch.nan).to(torch.float8_e5m2)),
        "holds NaN or inf",
    ),
    "averages_count": (
        put("averaging_state", "n_averaged", value=torch.tensor(-7)),
        "n_averaged must be",
    ),
    "sizes": (
        put("DigitsDataModule", "stream_sizes", value={"gen": "x"}),
        "stream_sizes of gen must be",
    ),
    "T_negative": (put("state_dict", "curriculum.num_steps", value=torch.tensor(-1)), "T of .* max_steps, 6; got -1"),
    "draws": (
        put("DigitsDataModule", "draws_consumed", value=-32),
        "draws_consumed must be a whole number of at least 0",
    ),
    "draws_text": (put("DigitsDataModule", "draws_consumed", value="1"), "draws_consumed must be a whole number"),
    "data": (put("DigitsDataModule", value="x"), "state of the data .* cannot be restored: AttributeError"),
    "processes": (put("DigitsDataModule", "num_processes", value=-1), "num_processes must be a whole number"),
    "evaluations": (put("network_evaluations", value=-1), "network_evaluations must be a whole number of at least 0"),
    "callbacks": (put("callbacks", value="x"), "its callbacks is a str"),
    "callbacks_others": (every_callback({"x": 1}), "state of a callback .* cannot be restored|must be a whole number"),
    "callbacks_text": (every_callback("x"), "state of a callback .* cannot be restored"),
    "averages": (put("averaging_state", value="x"), "state of a callback .* cannot be restored"),
    "schedules": (put("lr_schedulers", value=["x"]), "its lr_schedulers hold a str"),
    "format": (
        put("dat_lightning", value={"format": 10**9, "version": "\x1b]0;title\x07"}),
        r"\\x1b\]0;title\\x07; this is",
    ),
}


IMAGES = torch.zeros(64, 1, 16, 16)
# (module, entry of the checkpoint, what it is instead, what is said of it)
KEPT: dict[str, tuple[type[EnergyModule], str, Any, str]] = {
    "buffer_text": (JEMModule, "replay_buffer", "x", "the checkpoint's replay_buffer holds no plain numbers"),
    "buffer_whole": (JEMModule, "replay_buffer", IMAGES.int(), "replay_buffer holds torch.int32 instead of"),
    "buffer_flat": (JEMModule, "replay_buffer", IMAGES[0], r"must have the shape \(N, C, H, W\), got \(1, 16, 16\)"),
    "buffer_small": (
        JEMModule,
        "replay_buffer",
        IMAGES[..., :8],
        r"replay_buffer must have the shape \(64, 1, 16, 16\), got \(64, 1, 16, 8\)",
    ),
    "chains_flat": (DATContinuedChainsModule, "replay_buffer", torch.zeros(40), r"shape \(N, C, H, W\), got \(40,\)"),
    "chains_channels": (
        DATContinuedChainsModule,
        "replay_buffer",
        IMAGES[:40].expand(40, 3, 16, 16).clone(),
        r"replay_buffer must have the shape \(40, 1, 16, 16\), got \(40, 3, 16, 16\)",
    ),
    "perturbations_text": (DATWarmAttacksModule, "perturbations", "x", "the checkpoint's perturbations holds no plain"),
    "perturbations_nan": (
        DATWarmAttacksModule,
        "perturbations",
        torch.full((437, 1, 256), torch.nan),
        "perturbations holds NaN or infinite numbers",
    ),
    "perturbations_images": (
        DATWarmAttacksModule,
        "perturbations",
        IMAGES,
        r"perturbations must have the shape \(images, C, H·W\), got \(64, 1, 16, 16\)",
    ),
    "perturbations_of_others": (
        DATWarmAttacksModule,
        "perturbations",
        torch.zeros(500, 1, 256),
        r"perturbations must have the shape \(437, 1, 256\), got \(500, 1, 256\)",
    ),
}
SETTINGS: dict[type[EnergyModule], dict[str, Any]] = {
    JEMModule: {"num_steps": 1, "buffer_size": 64},
    DATContinuedChainsModule: {"buffer_size": 40},
}


def keeping(kind: type[EnergyModule]) -> EnergyModule:
    """A module that keeps images from step to step."""
    network, optimizer = tiny.energy_model(), partial(torch.optim.Adam, lr=1e-3)
    return kind(network, threat_model=tiny.ATTACK, optimizer=optimizer, **SETTINGS.get(kind, {}))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[EnergyModule]], Path]:
    """Checkpoints of such modules, each made once."""
    folder = tmp_path_factory.mktemp("kept")

    def checkpoint(kind: type[EnergyModule]) -> Path:
        path = folder / f"{kind.__name__}.ckpt"
        if not path.exists():
            trainer = tiny.trainer(folder, limit_train_batches=2)
            trainer.fit(keeping(kind), datamodule=tiny.digits(validation_size=1000))
            trainer.save_checkpoint(path)
        return path

    return checkpoint


@pytest.mark.parametrize("name", KEPT)
def test_training_does_not_go_on_from_images_that_cannot_be_those_of_the_module(
    name: str, kept: Callable[[type[EnergyModule]], Path], tmp_path: Path
) -> None:
    kind, entry, value, expected = KEPT[name]
    path = kept(kind)
    data, trainer = tiny.digits(validation_size=1000), tiny.trainer(tmp_path, max_epochs=2, limit_train_batches=2)
    with pytest.raises(InputError, match=expected):
        trainer.fit(keeping(kind), datamodule=data, ckpt_path=changed(path, put(entry, value=value)), weights_only=True)
    if "holds" in expected:  # seen before a run begins
        module, protected = keeping(kind), tiny.trainer(tmp_path, max_epochs=2)
        with pytest.raises(InputError, match=f"changed.ckpt: .*{expected}"):
            find_checkpoint("changed.ckpt", protected, module, to_train=True)
    # Evaluation takes weights alone.
    tiny.trainer(tmp_path, limit_test_batches=1).test(
        keeping(kind), datamodule=data, ckpt_path="changed.ckpt", weights_only=True, verbose=False
    )


@pytest.mark.parametrize("kind", [JEMModule, DATContinuedChainsModule, DATWarmAttacksModule])
def test_training_goes_on_from_images_as_they_were_saved(
    kind: type[EnergyModule], kept: Callable[[type[EnergyModule]], Path], tmp_path: Path
) -> None:
    trainer = tiny.trainer(tmp_path, max_epochs=2, limit_train_batches=2)
    data = tiny.digits(validation_size=1000)
    trainer.fit(keeping(kind), datamodule=data, ckpt_path=kept(kind), weights_only=True)
    assert trainer.global_step == 4


def changed(whole: Path, change: Callable[[dict[str, Any]], None]) -> str:
    contents = torch.load(whole, weights_only=True)
    change(contents)
    Path("changed.ckpt").unlink(missing_ok=True)
    torch.save(contents, "changed.ckpt")
    return "changed.ckpt"


def test_the_checkpoint_itself_can_be_restored(whole: Path) -> None:
    main(["fit", *ARGUMENTS, "--trainer.max_epochs", "2", "--ckpt_path", changed(whole, lambda contents: None)])


@pytest.fixture(scope="module")
def network() -> tuple[DualAdversarialModule, LightningDataModule]:
    """What the program would make of ARGUMENTS, made once."""
    cli = program(*ARGUMENTS, "--trainer.logger", "false")
    return cli.model, cli.datamodule


@pytest.mark.parametrize("name", STATES)
def test_training_does_not_go_on_from_an_impossible_state(name: str, whole: Path, network: Any, tmp_path: Path) -> None:
    """By the steps of the program, without its parser, which takes most of a second."""
    change, expected = STATES[name]
    path = changed(whole, change)
    module, data = map(deepcopy, network)
    saver = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    trainer = tiny.trainer(tmp_path, [ExponentialMovingAverage(), saver], enable_checkpointing=True, max_epochs=2)
    protect(trainer)
    with pytest.raises(Exception) as stop:  # noqa: PT011, PT012 - which sentence it is, is what counts
        found = find_checkpoint(path, trainer, module, to_train=True)
        trainer.fit(module, datamodule=data, ckpt_path=found, weights_only=True)
    said = error_sentence(stop.value)
    assert said is not None
    assert re.search(expected, said), said
    assert "changed.ckpt" in said


@pytest.mark.parametrize("name", ["loops_empty", "progress_empty", "moments", "state_list", "T_large", "format"])
def test_the_program_says_so(name: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = STATES[name]
    said = refusal(capsys, "fit", *ARGUMENTS, "--trainer.max_epochs", "2", "--ckpt_path", changed(whole, change))
    assert re.search(expected, said), said
    assert "changed.ckpt" in said


@pytest.mark.parametrize("name", ["integers", "nan", "T_large", "sparse", "deviation"])
@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_nothing_impossible_is_evaluated(
    command: str, name: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(whole, STATES[name][0])
    assert re.search(STATES[name][1], refusal(capsys, command, *ARGUMENTS, "--ckpt_path", path))


def test_weights_that_are_no_numbers_are_not_evaluated_wherever_they_come_from(tmp_path: Path) -> None:
    module = tiny.stage1()
    with torch.no_grad():
        next(module.energy_model.parameters()).fill_(float("nan"))
    trainer = tiny.trainer(tmp_path, limit_test_batches=1)
    with pytest.raises(ValueError, match=r"there is nothing to evaluate: .* holds NaN or infinite numbers"):
        trainer.test(module, datamodule=tiny.digits(), verbose=False)


def test_settings_that_cannot_be_compared_are_others(whole: Path) -> None:
    path = changed(whole, put("hyper_parameters", "seed", value=torch.zeros(3)))
    with pytest.warns(UserWarning, match=r"was trained with other settings, .*seed: tensor\(\[0., 0., 0.\]\) → 0"):
        main(["fit", *ARGUMENTS, "--trainer.max_epochs", "2", "--ckpt_path", path])


def test_a_lower_limit_of_steps_is_no_fault(whole: Path) -> None:
    """T may lie beyond the new limit, as far as the run's own had it; evaluation does not look."""
    path = changed(whole, put("state_dict", "curriculum.num_steps", value=torch.tensor(5)))
    main(["test", *ARGUMENTS, "--model.curriculum.max_steps", "3", "--ckpt_path", path])
    main(["fit", *ARGUMENTS, "--trainer.max_epochs", "2", "--model.curriculum.max_steps", "3", "--ckpt_path", path])


@pytest.mark.parametrize("name", ["integers", "nan", "nan_raw", "T_large", "moments", "evaluations"])
def test_a_trainer_of_ones_own_does_not_go_on_from_it_either(name: str, tmp_path: Path) -> None:
    def run() -> Trainer:
        callbacks = [ExponentialMovingAverage(), ModelCheckpoint(tmp_path, "last", enable_version_counter=False)]
        return tiny.trainer(tmp_path, callbacks, enable_checkpointing=True, limit_train_batches=2)

    def module() -> DualAdversarialModule:
        return tiny.stage2(optimizer=partial(torch.optim.Adam, lr=1e-3))

    run().fit(module(), datamodule=tiny.digits())
    change, expected = STATES[name]
    path = changed(tmp_path / "last.ckpt", change)
    with pytest.raises(InputError, match=expected.replace("max_steps, 6", "max_steps, 3")):
        run().fit(module(), datamodule=tiny.digits(), ckpt_path=path, weights_only=True)


def test_last_passes_over_what_cannot_be_gone_on_from(whole: Path) -> None:
    """Newer ones are changed; the run goes on from the whole one, and a sentence is said of each."""
    folder = Path("runs", "checkpoints")
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(whole.read_bytes())
    for number, name in enumerate(("nan", "T_large", "callbacks", "loops_empty", "state_list", "sparse"), start=10):
        changed(whole, STATES[name][0])
        path = Path("changed.ckpt").rename(folder / f"{name}.ckpt")
        os.utime(path, (2e9 + number,) * 2)
    with (
        pytest.warns(UserWarning, match=r"passed over: .*nan\.ckpt: .* holds NaN"),
        pytest.warns(UserWarning, match=r"passed over: .*T_large\.ckpt: .* got 1000000"),
        pytest.warns(UserWarning, match=r"passed over: .*loops_empty\.ckpt: .* does not say how far"),
        pytest.warns(UserWarning, match=r"passed over: .*state_list\.ckpt: it holds what no run saves"),
        pytest.warns(UserWarning, match=r"passed over: .*sparse\.ckpt: .* no plain numbers"),
        pytest.warns(UserWarning, match=r"passed over: .*callbacks\.ckpt .* its callbacks is a str"),
    ):
        main(["fit", *ARGUMENTS, "--trainer.max_epochs", "2", "--ckpt_path", "last"])


@pytest.mark.parametrize("what", ["/dev/null", "/dev/zero", "pipe"])
@pytest.mark.parametrize("argument", ["--ckpt_path", "--model.init_from"])
def test_what_is_no_file_is_not_read(what: str, argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    said = refusal(capsys, "fit", "--config", STAGE2, "--config", TINY, argument, what)
    assert re.search(rf"{what} is a pipe, device or socket, and must be a file", said)
