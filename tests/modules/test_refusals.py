"""What a module refuses or handles at the start of a run: networks, callbacks, schedules, hyperparameters."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn

from dat_lightning import (
    DigitsDataModule,
    DualAdversarialModule,
    EnergyModel,
    EnergyModule,
    ExponentialMovingAverage,
    PGDSampler,
    RobustClassifierModule,
    SmallResNet,
    TradesModule,
)
from dat_lightning.core.errors import InputError
from dat_lightning.speed import Execution
from tests import tiny


class Wrapped(nn.Module):
    """A network whose logits become something else."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network = tiny.energy_model().backbone
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.network(x))


class Framed(nn.Module):
    """A network with a parameter for frames of a film."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Parameter(torch.zeros(1, 1, 1, 16, 16))
        self.fc = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc((x + self.frames[0]).flatten(1))
        return logits


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda logits: (logits, logits), r"network Wrapped needs logits \(N, K\) .* gave a tuple for 2 images"),
        (lambda logits: logits[:, :, None], r"Wrapped needs logits \(N, K\) .* gave shape \(2, 10, 1\) for 2 images"),
        (lambda logits: logits.log_softmax(1), "seems to end in log_softmax, which leaves no energy: let it return"),
        (lambda logits: logits.softmax(1), "seems to end in softmax, which leaves no energy"),
    ],
)
@pytest.mark.parametrize("run", ["fit", "test"])
def test_a_network_that_gives_no_logits_is_a_sentence(
    run: str, change: Callable[[Tensor], Any], said: str, tmp_path: Path
) -> None:
    module = tiny.stage1(energy_model=EnergyModel(Wrapped(change)))
    with pytest.raises(InputError, match=said):
        getattr(tiny.trainer(tmp_path), run)(module, tiny.digits())


@pytest.mark.parametrize("run", ["fit", "test"])
def test_images_of_other_channels_are_a_sentence(run: str, tmp_path: Path) -> None:
    network = EnergyModel(SmallResNet(in_channels=3, widths=(4, 8)))
    with pytest.raises(InputError, match=r"first convolution takes 3 channels, but the data's images are 1×16×16"):
        getattr(tiny.trainer(tmp_path), run)(tiny.stage1(energy_model=network), tiny.digits())


def test_a_bug_of_the_network_is_its_own(tmp_path: Path) -> None:
    """Torch says "size" of it, as it does of images that do not fit."""
    module = tiny.stage1(energy_model=EnergyModel(Wrapped(lambda logits: logits + torch.ones(3))))
    with pytest.raises(RuntimeError, match="size of tensor a") as caught:
        tiny.trainer(tmp_path).fit(module, tiny.digits())
    assert not isinstance(caught.value, InputError)


def test_logits_that_are_all_zero_are_logits(tmp_path: Path) -> None:
    """As those of a new head often are; so may one logit alone be."""
    module = tiny.stage1(energy_model=EnergyModel(Wrapped(lambda logits: logits * 0)))
    trainer = tiny.trainer(tmp_path, limit_train_batches=1)
    trainer.fit(module, tiny.digits())
    assert trainer.global_step == 1


def test_a_parameter_of_five_dimensions_needs_the_plain_layout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"backbone\.frames of the network has five dimensions.*set execution"):
        tiny.stage1(energy_model=EnergyModel(Framed()))
    module = tiny.stage1(energy_model=EnergyModel(Framed()), execution=Execution(memory_format="contiguous"))
    tiny.trainer(tmp_path, limit_train_batches=2).fit(module, tiny.digits())
    assert float(module.energy_model.backbone.get_parameter("frames").detach().abs().max()) > 0


def test_a_schedule_that_watches_a_figure_is_passed_its_monitor(tmp_path: Path) -> None:
    rates = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    # Nothing is ever better than minus infinity: the rate falls by half after each epoch but the first.
    schedule = partial(ReduceLROnPlateau, monitor="val/loss", factor=0.5, patience=0, threshold=1e6)
    trainer = tiny.trainer(tmp_path, [Watch()], max_epochs=4, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(tiny.stage1(lr_scheduler=schedule), tiny.digits())
    assert rates == [0.05, 0.025, 0.0125, 0.00625]
    blind = tiny.stage1(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(InputError, match=r"does not say what it watches: use lightning\.pytorch\.cli\.ReduceLROnPl"):
        tiny.trainer(tmp_path).fit(blind, tiny.digits())


def test_averaging_that_estimates_batch_norm_anew_is_refused_where_it_is_frozen(tmp_path: Path) -> None:
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    with pytest.raises(InputError, match=r"StochasticWeightAveraging.*use dat_lightning\.ExponentialMovingAverage"):
        tiny.trainer(tmp_path, [averaging]).fit(tiny.stage2(), tiny.digits())
    trainer = tiny.trainer(tmp_path, [averaging], max_epochs=2, limit_train_batches=2, limit_val_batches=1)
    trainer.fit(tiny.stage1(), tiny.digits())


class Hyper(RobustClassifierModule):
    def __init__(self, energy_model: EnergyModel, width: int = 3, **shared: Any) -> None:
        super().__init__(energy_model, **shared)
        self.save_hyperparameters(ignore=[] if width == 3 else ["energy_model"])


@pytest.mark.filterwarnings("ignore:Attribute 'energy_model' is an instance of")
def test_a_hyperparameter_that_no_checkpoint_gives_back_is_named_when_it_is_saved(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, limit_train_batches=1)
    trainer.fit(Hyper(tiny.energy_model(), optimizer=tiny.SGD, threat_model=tiny.ATTACK), tiny.digits())
    with pytest.raises(InputError, match=r"hyperparameter energy_model holds a EnergyModel.*ignore=\['energy_model'\]"):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = Hyper(tiny.energy_model(), width=4)
    trainer = tiny.trainer(tmp_path, limit_train_batches=1)
    trainer.fit(module, tiny.digits())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Hyper.load_from_checkpoint(tmp_path / "a.ckpt", energy_model=tiny.energy_model(seed=1))
    assert again.hparams == {"width": 4}
    weights = [m.energy_model.backbone.get_parameter("fc.weight") for m in (again, module)]
    assert torch.equal(*weights)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the search is without callbacks
@pytest.mark.filterwarnings("ignore:Found 5 module.s. in eval mode")
def test_the_rate_finder_sets_the_configured_optimizer(tmp_path: Path) -> None:
    """It searches from the initial weights, and goes back to them."""
    source = tiny.energy_model(seed=5)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    seen: list[tuple[float, bool]] = []

    class Watch(ExponentialMovingAverage):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            found = pl_module.energy_model.state_dict()
            same = all(torch.equal(value, found[name]) for name, value in source.state_dict().items())
            seen.append((trainer.optimizers[0].param_groups[0]["lr"], same))

    finder = LearningRateFinder(min_lr=1e-4, max_lr=1.0, num_training_steps=15, early_stop_threshold=None)
    module = tiny.stage2(init_from=str(tmp_path / "weights.pt"))
    trainer = tiny.trainer(tmp_path, [Watch(), finder], limit_train_batches=18)
    trainer.fit(module, tiny.digits())
    assert finder.optimal_lr is not None
    assert seen == [(finder.optimal_lr.suggestion(), True)]
    assert seen[0][0] not in (None, 0.05)
    assert trainer.global_step == 18
    constant = tiny.stage1(lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1))
    with pytest.raises(InputError, match=r"LearningRateFinder finds a constant rate.*set lr_scheduler to null"):
        tiny.trainer(tmp_path, [LearningRateFinder()]).fit(constant, tiny.digits())


def test_a_compiled_network_has_the_names_of_the_plain_one(tmp_path: Path) -> None:
    plain = tiny.stage2(energy_model=tiny.energy_model(seed=1))
    compiled = tiny.stage2(energy_model=EnergyModel(torch.compile(tiny.energy_model(seed=2).backbone), [0.3], [0.35]))  # type: ignore[arg-type]
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    assert list(compiled.state_dict()) == list(plain.state_dict())
    compiled.load_state_dict(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(compiled.parameters(), plain.parameters(), strict=True))
    compiled.energy_model.load_state_dict(compiled.energy_model.state_dict())
    prefixed = {name.replace("backbone.", "backbone._orig_mod."): v + 1 for name, v in plain.state_dict().items()}
    plain.load_state_dict(prefixed)
    weight = plain.energy_model.backbone.get_parameter("fc.weight")
    assert torch.equal(weight, prefixed["energy_model.backbone._orig_mod.fc.weight"])
    copied = copy.deepcopy(compiled)
    copied.load_state_dict(prefixed)
    assert torch.equal(next(iter(copied.energy_model.backbone.parameters())), next(plain.energy_model.parameters()))
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.weight"):
        compiled.load_state_dict({k: v for k, v in plain.state_dict().items() if "fc.weight" not in k})


def test_shared_arguments_reach_the_parent() -> None:
    module = DualAdversarialModule(
        tiny.energy_model(), r1_weight=0.5, seed=7, execution=Execution(fold_batch_norm=True)
    )
    assert (module.r1_weight, module.seed, module.network_forms.fold_batch_norm) == (0.5, 7, True)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'sead'$"):
        DualAdversarialModule(tiny.energy_model(), sead=7)
    with pytest.raises(TypeError, match=r"^DualAdversarialModule has no argument 'attack_mode': its attack sees eval"):
        DualAdversarialModule(tiny.energy_model(), attack_mode="train")


@pytest.mark.parametrize(
    ("make", "argument", "kind"),
    [
        (tiny.stage1, "threat_model", "ThreatModel"),
        (tiny.stage1, "eval_threat_model", "ThreatModel"),
        (tiny.stage1, "attack_rule", "UpdateRule"),
        (tiny.stage1, "execution", "Execution"),
        (tiny.stage2, "contrastive_rule", "UpdateRule"),
        (tiny.stage2, "curriculum", "AUCCurriculum"),
        (PGDSampler, "rule", "UpdateRule"),
    ],
)
def test_settings_in_the_place_of_an_object_are_a_sentence(make: Callable[..., Any], argument: str, kind: str) -> None:
    with pytest.raises(InputError, match=rf"^{argument} must be of the class {kind}, got \{{'eps': 0.5\}}$"):
        make(**{argument: {"eps": 0.5}})
    if not argument.startswith(("eval", "curr")):  # where null is a value
        with pytest.raises(InputError, match=rf"^{argument} must be of the class {kind}, got None$"):
            make(**{argument: None})


@pytest.mark.parametrize("kind", [RobustClassifierModule, TradesModule])
def test_a_network_that_another_module_has_frozen_is_warned_of(kind: type[EnergyModule], tmp_path: Path) -> None:
    network = tiny.energy_model()
    kind(network)
    DualAdversarialModule(network)
    module = kind(network, optimizer=tiny.SGD, threat_model=tiny.ATTACK)
    with pytest.warns(UserWarning, match=f"batch norm of the network is frozen, which {kind.__name__} trains"):
        tiny.trainer(tmp_path, limit_train_batches=1).fit(module, tiny.digits())


class Remembering(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": [1, {"last": Path("a")}]}


class Described(DigitsDataModule):
    def __init__(self, source: Any) -> None:
        super().__init__(batch_size=32, validation_size=20, num_ood=200, num_held_out=50)
        self.save_hyperparameters()


@pytest.mark.parametrize(
    ("callbacks", "source", "said"),
    [
        ([Remembering()], "a", r"state_dict of the callback Remembering holds a PosixPath.*: let it hold numbers"),
        ([], Path("a"), r"hyperparameter of the data source holds a PosixPath.*ignore=\['source'\]"),
        ([], np.float64(0.5), r"hyperparameter of the data source holds a float64"),
        ([], {"of": ["a", 1, None, Counter("a")]}, None),
    ],
)
def test_what_callbacks_and_data_keep_is_looked_at_when_it_is_saved(
    callbacks: list[Callback], source: Any, said: str | None, tmp_path: Path
) -> None:
    data, trainer = Described(source), tiny.trainer(tmp_path, callbacks, limit_train_batches=1)
    trainer.fit(tiny.stage1(), data)
    if said is None:
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["datamodule_hyper_parameters"]
        assert kept == {"source": source}
        return
    with pytest.raises(InputError, match=said):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    # Torch would have written it, and not read it again.
    torch.save(source if not callbacks else callbacks[0].state_dict(), tmp_path / "raw.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "raw.pt", weights_only=True)
