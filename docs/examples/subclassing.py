"""Another contrastive chain in a few lines: it climbs the log odds of the class, not its logit."""

from lightning.pytorch import Trainer
from torch import Tensor

from dat_lightning import AUCCurriculum, DigitsDataModule, DualAdversarialModule, EnergyModel, SmallResNet


class LogOddsModule(DualAdversarialModule):
    """Stage 2 whose contrastive samples climb f(x)[y] − logsumexp of the other classes' logits."""

    def contrastive_objective(self, logits: Tensor, y: Tensor) -> Tensor:
        own = y.unsqueeze(1)
        others = logits.scatter(1, own, float("-inf"))
        return logits.gather(1, own).squeeze(1) - others.logsumexp(1)


if __name__ == "__main__":
    network = EnergyModel(SmallResNet(widths=(8, 16)), mean=[0.3], std=[0.35])
    module = LogOddsModule(network, AUCCurriculum(max_steps=20, initial_steps=5), contrastive_step_size=0.4)
    trainer = Trainer(max_epochs=1, limit_train_batches=10, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, datamodule=DigitsDataModule())
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
