"""Each stage on 1, 2 and 4 ranks, with what each step did; ``python -m tests.ddp.run_training folder few``."""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from dat_lightning import (
    AUCCurriculum,
    DATBalancedModule,
    DATLikelihoodModule,
    DATNoiseContrastiveModule,
    DATRatioModule,
    EnergyModule,
    ExponentialMovingAverage,
    RATIOModule,
    ThreatModel,
)
from dat_lightning.modules import TradesModule
from tests import tiny
from tests.ddp.ranks import launch, strategy

NUM_STEPS, STOP = 10, 5
Precision = Literal["64-true", "32-true"]

RANDOM_START = ThreatModel(eps=1.0, step_size=0.5, num_steps=2, random_start=True)
DAT: dict[str, Any] = {"optimizer": tiny.SGD, "threat_model": tiny.ATTACK, "contrastive_step_size": 0.4}
STAGES: dict[str, Callable[..., EnergyModule]] = {
    "stage1": partial(tiny.stage1, threat_model=RANDOM_START),
    # Statistics of the whole batch inside the attack as well.
    "stage1_train_mode": partial(tiny.stage1, attack_mode="train"),
    "trades": partial(TradesModule, optimizer=tiny.SGD, threat_model=tiny.ATTACK),
    "ratio": partial(RATIOModule, optimizer=tiny.SGD, threat_model=tiny.ATTACK, ood_threat_model=tiny.ATTACK),
    "stage2": partial(tiny.stage2, threat_model=RANDOM_START, r1_weight=0.1),
    "dat_ratio": partial(DATRatioModule, **DAT, ood_threat_model=RANDOM_START),
    "dat_nce": partial(
        DATNoiseContrastiveModule,
        **DAT,
        proposal="gaussians",
        data_noise=0.2,
        nce_scale=10.0,
    ),
    "dat_likelihood": partial(DATLikelihoodModule, **DAT, likelihood_steps=2, likelihood_step_size=0.1),
    "dat_balanced": partial(DATBalancedModule, **DAT),
}


class StepRecorder(Callback):
    """Keeps what each step did; the loss and the images' numbers of all ranks."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.end: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.world_size > 1:
            assert isinstance(trainer.strategy.model, DistributedDataParallel)
            assert not trainer.strategy.model.find_unused_parameters
        # DistributedDataParallel has averaged them by now.
        self._gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        draws = trainer.strategy.all_gather(batch["draw"]).flatten()
        state = {n: b.clone() for n, b in pl_module.named_buffers() if n.startswith("curriculum.")}
        self.steps.append({"loss": loss, "draws": draws, "gradients": self._gradients, "curriculum": state})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before the average takes the weights' place.
        self.end = {name: value.clone() for name, value in pl_module.state_dict().items()}


class BatchNormOfAllRanks(nn.BatchNorm2d):
    """What SyncBatchNorm computes, on CPUs, where torch refuses it; gradients flow over the ranks as well."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = torch.full_like(x[0, :, 0, 0], x[:, 0].numel())
        sums = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count])
        total, squares, count = all_reduce(sums)
        mean, variance = total / count, squares / count - (total / count) ** 2
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        # Not through batch_norm in eval mode, for which mean and variance would be constants.
        weight = self.weight / (variance + self.eps).sqrt()
        normal: Tensor = x * weight.view(1, -1, 1, 1) + (self.bias - mean * weight).view(1, -1, 1, 1)
        return normal


class SynchronizedOnCPU(TorchSyncBatchNorm):
    """What ``sync_batchnorm: true`` does, with layers that work on a CPU in the end."""

    def apply(self, model: nn.Module) -> nn.Module:
        converted = super().apply(model)
        for layer in converted.modules():
            if isinstance(layer, nn.SyncBatchNorm):
                layer.__class__ = BatchNormOfAllRanks  # type: ignore[assignment]
        return converted


@dataclass(frozen=True)
class Case:
    """One training."""

    stage: str
    precision: Precision
    num_ranks: int
    resumed_from: int | None = None

    @property
    def name(self) -> str:
        origin = "" if self.resumed_from is None else f"-from-{self.resumed_from}"
        return f"{self.stage}-{self.precision}-{self.num_ranks}{origin}"


def fit(case: Case, folder: Path) -> None:
    """Fits on this rank's share: ten steps, or those after the checkpoint of another case."""
    here = folder / case.name
    here.mkdir(parents=True, exist_ok=True)
    fresh = case.resumed_from is None
    origin = replace(case, num_ranks=case.resumed_from or 1, resumed_from=None)
    curriculum = AUCCurriculum(max_steps=4, auc_threshold=0.3, window_samples=64)
    more = {"curriculum": curriculum} if case.stage == "stage2" or case.stage.startswith("dat_") else {}
    module = STAGES[case.stage](energy_model=tiny.energy_model(seed=0 if fresh else 1), **more)
    recorder = StepRecorder()
    saver = ModelCheckpoint(dirpath=here, filename="{step}", every_n_train_steps=STOP, save_top_k=-1)
    trainer = tiny.trainer(
        folder,
        [ExponentialMovingAverage(), recorder, saver],
        devices=case.num_ranks,
        strategy=strategy(case.num_ranks),
        precision=case.precision,
        plugins=[SynchronizedOnCPU()] if case.num_ranks > 1 else [],
        limit_train_batches=7,  # the second epoch begins in between
        max_epochs=2,
        max_steps=NUM_STEPS,
        enable_checkpointing=True,
    )
    ckpt = None if fresh else folder / origin.name / f"step={STOP}.ckpt"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=tiny.digits(), ckpt_path=ckpt, weights_only=True)
    messages = [str(w.message) for w in said if "the checkpoint was written by" in str(w.message)]
    found = {"steps": recorder.steps, "end": recorder.end, "average": module.state_dict(), "messages": messages}
    torch.save(found, here / f"rank{trainer.global_rank}.pt")


def fit_all(cases: Sequence[Case], folder: Path) -> None:
    for case in cases:
        fit(case, folder)


def cases(every: bool) -> list[list[Case]]:
    """What is trained, by groups that have the same number of ranks; a group resumes what those before it wrote."""
    trained: list[tuple[str, Precision]] = [
        ("stage1", "64-true"),
        ("stage2", "64-true"),
        ("stage1", "32-true"),
        ("stage2", "32-true"),
    ]
    trained += [(stage, "64-true") for stage in STAGES if stage not in ("stage1", "stage2")] if every else []
    resumed = ["stage1", "stage2"] if every else ["stage2"]
    fresh = {n: [Case(stage, precision, n) for stage, precision in trained] for n in (1, 2, 4)}
    to_two = [Case(stage, "32-true", 2, origin) for stage in resumed for origin in (1, 4)]
    to_one = [Case(stage, "32-true", 1, 2) for stage in resumed]
    return [fresh[4], fresh[1], fresh[2] + to_two, to_one]


def main(folder: Path, every: bool) -> None:
    for group in cases(every):
        launch(fit_all, group[0].num_ranks, group, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), every=sys.argv[2] == "every")
