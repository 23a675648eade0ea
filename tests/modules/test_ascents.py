"""How modules climb: by the rules of their configuration, and with their network evaluations counted."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from dat_lightning import Langevin, Momentum, PGDSampler, PixelAdam, TradesModule, ascend
from dat_lightning.cli import main
from dat_lightning.core import cross_entropy, targeted_logit
from dat_lightning.modules import EnergyModule
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
BATCH, ATTACK_STEPS = 8, tiny.ATTACK.num_steps
NAME = "train/network_evaluations"

# Steps are made without a Trainer, too.
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")


def a_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    batch = {name: torch.rand(BATCH, 1, 16, 16, generator=generator) for name in ("x_gen", "x_clf", "x_ood")}
    batch |= {name: torch.randint(10, (BATCH,), generator=generator) for name in ("y_gen", "y_clf")}
    return batch | {"draw": torch.arange(100, 100 + BATCH)}


def passes_of_one_step(module: EnergyModule) -> int:
    """What hooks on the first layer see, for an image: its forward passes, and what is differentiated there."""
    (first,) = [m for m in module.energy_model.modules() if isinstance(m, nn.Conv2d)][:1]
    seen = 0

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal seen
        (weight,) = [p for name, p in layer.named_parameters() if name == "weight"]
        by_input = 1 if inputs[0].requires_grad else 0
        seen += len(output) * (3 if weight.requires_grad and torch.is_grad_enabled() else 1 + by_input)

    handle = first.register_forward_hook(note)
    module.train().training_step(a_batch(), 0)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("stage1", 2 * ATTACK_STEPS + 3),
        ("trades", 1 + 2 * ATTACK_STEPS + 6),
        ("stage2", 2 * 3 + 2 * ATTACK_STEPS + 9),
        ("stage2 in three passes", 2 * 3 + 2 * ATTACK_STEPS + 9),
    ],
)
def test_a_step_counts_what_the_method_says(kind: str, expected: int) -> None:
    module: EnergyModule
    if kind.startswith("stage2"):
        module = tiny.stage2(merge_forwards=kind == "stage2")
        module.curriculum.num_steps.fill_(3)
    elif kind == "trades":
        module = TradesModule(energy_model=tiny.energy_model(), threat_model=tiny.ATTACK)
    else:
        module = tiny.stage1()
    assert passes_of_one_step(module) == expected * BATCH
    assert module.network_evaluations == expected * BATCH
    # Evaluation costs no training.
    module.eval().evaluation_metrics({"x": torch.rand(4, 1, 16, 16), "y": torch.zeros(4).long()})
    assert module.network_evaluations == expected * BATCH


def test_the_r1_penalty_trains_through_an_input_gradient() -> None:
    module = tiny.stage2(r1_weight=0.1)
    module.train().training_step(a_batch(), 0)
    assert module.network_evaluations == (2 * ATTACK_STEPS + 9 + 6) * BATCH


class Counts(ModelCheckpoint):
    """Keeps what is logged after each step."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, filename="last", every_n_train_steps=2, enable_version_counter=False)
        self.logged: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if NAME in trainer.callback_metrics:
            self.logged.append(float(trainer.callback_metrics[NAME]))


def test_the_count_is_logged_and_goes_on_where_a_run_resumes(tmp_path: Path) -> None:
    per_step = (2 * ATTACK_STEPS + 3) * 32

    def fit(steps: int, module: EnergyModule, checkpoint: str | None = None) -> list[float]:
        counts = Counts(tmp_path)
        options: dict[str, Any] = {"max_steps": steps, "limit_train_batches": 1.0, "enable_checkpointing": True}
        trainer = tiny.trainer(tmp_path, [counts], **options)
        trainer.fit(module, datamodule=tiny.digits(), ckpt_path=checkpoint)
        return counts.logged

    assert fit(5, tiny.stage1()) == [per_step * k for k in (1, 2, 3, 4)]
    last = tmp_path / "last.ckpt"
    assert torch.load(last, weights_only=True)["network_evaluations"] == 4 * per_step
    module = tiny.stage1()
    fit(6, module, str(last))
    assert module.network_evaluations == 6 * per_step
    # A checkpoint from before there was a count loads; another fit begins anew.
    old = torch.load(last, weights_only=True)
    del old["network_evaluations"]
    torch.save(old, last)
    fit(8, module, str(last))
    assert module.network_evaluations == 2 * per_step
    fit(1, module)
    assert module.network_evaluations == per_step


def test_modules_climb_by_their_rules() -> None:
    batch, attack, chain = a_batch(), Momentum(0.4, nesterov=True), PixelAdam()
    module = tiny.stage2(attack_rule=attack, contrastive_rule=chain)
    module.curriculum.num_steps.fill_(3)
    network = module.energy_model
    found = module.adversarial_examples(batch["x_clf"], batch["y_clf"])
    expected = ascend(network, batch["x_clf"], batch["y_clf"], cross_entropy, tiny.ATTACK, rule=attack)
    assert torch.equal(found, expected)
    assert not torch.equal(found, ascend(network, batch["x_clf"], batch["y_clf"], cross_entropy, tiny.ATTACK))
    found = module.contrastive_samples(batch["x_ood"], batch["y_gen"])
    threat = module.contrastive_chain
    expected = ascend(network, batch["x_ood"], batch["y_gen"], targeted_logit, threat, rule=chain, num_steps=3)
    assert torch.equal(found, expected)
    # Evaluation's attack is the same for all.
    x, y = batch["x_clf"], batch["y_clf"]
    plain = tiny.stage2().eval().evaluation_metrics({"x": x, "y": y})["robust_accuracy"]
    assert torch.equal(module.eval().evaluation_metrics({"x": x, "y": y})["robust_accuracy"], plain)


def test_noise_of_contrastive_samples_is_that_of_their_draws() -> None:
    batch, module = a_batch(), tiny.stage2(contrastive_rule=Langevin(0.1))
    module.curriculum.num_steps.fill_(2)
    x, y, draws = batch["x_ood"], batch["y_gen"], batch["draw"]
    whole = module.contrastive_samples(x, y, draws)
    part = module.contrastive_samples(x[[5, 2]], y[[5, 2]], draws[[5, 2]])
    torch.testing.assert_close(part, whole[[5, 2]], rtol=0, atol=1e-5)
    assert (module.contrastive_samples(x, y, draws + BATCH) - whole).abs().amax((1, 2, 3)).min() > 0.1


class Recorded(Callback):
    """Keeps the rules that the command line made."""

    rules: ClassVar[dict[str, object]] = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        (sampler,) = [c for c in trainer.callbacks if isinstance(c, PGDSampler)]  # type: ignore[attr-defined]
        module = (pl_module.attack_rule, pl_module.contrastive_rule)
        Recorded.rules = dict(zip(("attack", "contrastive", "sampler"), (*module, sampler.rule), strict=True))


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_rules_are_named_in_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.yaml").write_text(
        """
        model:
          init_args:
            attack_rule:
              class_path: dat_lightning.Momentum
              init_args: {momentum: 0.5, nesterov: true}
            contrastive_rule:
              class_path: dat_lightning.Langevin
              init_args: {noise: 0.02}
        trainer:
          limit_train_batches: 1
          callbacks:
            - class_path: dat_lightning.PGDSampler
              init_args:
                num_samples: 10
                num_steps: [2]
                rule:
                  class_path: dat_lightning.PixelAdam
                  init_args: {betas: [0.5, 0.9]}
            - class_path: tests.modules.test_ascents.Recorded
        """
    )
    files = ["configs/digits/dat.yaml", "tests/conf/tiny.yaml"]
    configs = [f"--config={ROOT / file}" for file in files] + ["--config=rules.yaml"]
    main(["fit", *configs, "--trainer.limit_val_batches=0"])
    expected = {"attack": Momentum(0.5, nesterov=True), "contrastive": Langevin(0.02), "sampler": PixelAdam((0.5, 0.9))}
    assert Recorded.rules == expected
