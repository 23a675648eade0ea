"""What a failed training step looks like: the known causes, the most telling first, each with its remedy."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from dat_lightning.core.ascent import no_trace
from dat_lightning.core.curriculum import AUCCurriculum
from dat_lightning.core.energy import EnergyModel, batch_norm_layers, marginal_energy


def failure_signatures(trainer: Trainer, pl_module: LightningModule, images: Mapping[str, Tensor]) -> list[str]:
    """Returns a sentence for each known cause that a step with a loss or gradient that is not finite points to.

    The last one, the learning rate, is always among them: it is what remains when nothing else is found.

    Args:
        trainer: In training.
        pl_module: With the weights before the step.
        images: The batch's images by name, each (N, C, H, W).

    Source: DAT (arXiv 2510.13872), on the roles of batch norm, of the classification attack and of the OOD data.
    """
    curriculum = curriculum_of(pl_module)
    found = [*_weights(pl_module), *_pixels(images), *_precision(trainer, pl_module, images), *_batch_norm(pl_module)]
    if curriculum is not None:
        found += [*_attack(pl_module), *_seeds(curriculum)]
    return [*found, _learning_rate(trainer, is_joint=curriculum is not None)]


def curriculum_of(pl_module: LightningModule) -> AUCCurriculum | None:
    """Returns the module's curriculum, as :class:`~dat_lightning.EnergyModule` has it, or ``None``."""
    curriculum: AUCCurriculum | None = getattr(pl_module, "curriculum", None)
    return curriculum


def classifies(pl_module: LightningModule) -> bool:
    """Returns whether a module's loss has a classification, whose attack holds the energy's gradient down.

    Its training looks at ``x_clf`` then, unlike that of AT-EBM.
    """
    return "x_clf" in getattr(pl_module, "training_parts", ("x_clf",))


def remedy_by_r1(pl_module: LightningModule) -> str | None:
    """Returns what to do about the weight of a module's R1 penalty against a steep energy; ``None`` if it has none."""
    weight = getattr(pl_module, "r1_weight", None)
    if weight is None:
        return None
    return f"raise r1_weight, which is {weight:g}" if weight > 0 else "set r1_weight to 0.01 … 1"


def thawed_batch_norm(pl_module: LightningModule) -> int:
    """Returns how many batch norm layers are in train mode although the module says that it freezes them."""
    freezes = getattr(pl_module, "freezes_batch_norm", False)
    return sum(layer.training for layer in batch_norm_layers(pl_module)) if freezes else 0


def curriculum_auc(curriculum: AUCCurriculum) -> float | None:
    """Returns the mean AUC of the curriculum's window, ``None`` if it is empty."""
    filled = min(int(curriculum.count), int(curriculum.window))
    return float(curriculum.values[:filled].mean()) if filled else None


def circumstances_of(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Returns what is known of the step that a module is about to take: its number, T, learning rates, scalars."""
    curriculum = curriculum_of(pl_module)
    return {
        "step": trainer.global_step + 1,
        "epoch": trainer.current_epoch,
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "contrastive_steps": None if curriculum is None else int(curriculum.num_steps),
        "window_auc": None if curriculum is None else curriculum_auc(curriculum),
        "learning_rates": [group.get("lr") for o in trainer.optimizers for group in o.param_groups],
        "metrics": {name: v for name, v in trainer.callback_metrics.items() if name.startswith("train/")},
    }


def batch_energies(
    trainer: Trainer, pl_module: LightningModule, images: Mapping[str, Tensor], *, full_precision: bool = False
) -> dict[str, Tensor]:
    """Returns E of each image, (N,) by name, as the network sees it in training or without autocast; nothing is traced.

    Modules without an :class:`~dat_lightning.weights.EnergyModel` have none.
    """
    model = getattr(pl_module, "energy_model", None)
    if not isinstance(model, EnergyModel):
        return {}
    device = pl_module.device.type
    precision = torch.autocast(device, enabled=False) if full_precision else trainer.precision_plugin.forward_context()
    with torch.no_grad(), no_trace(model), precision:
        return {name: marginal_energy(model(x)) for name, x in images.items()}


def _weights(pl_module: LightningModule) -> Iterator[str]:
    bad = [name for name, p in pl_module.named_parameters() if not bool(p.detach().isfinite().all())]
    bad += [name for name, b in pl_module.named_buffers() if b.is_floating_point() and not bool(b.isfinite().all())]
    if bad:
        yield (
            f"{len(bad)} weights or running statistics were not finite before this step already, such as {bad[0]}: the"
            " checkpoint or init_from is damaged, or an earlier step was; resume from an earlier checkpoint"
        )


def _pixels(images: Mapping[str, Tensor]) -> Iterator[str]:
    for name, x in images.items():
        flat = x.detach().flatten(1)
        missing = int((~flat.isfinite()).any(1).sum())
        if missing:
            yield f"{missing} of {len(x)} images of {name} have NaN or infinite pixels: mend the data or its transform"
        elif flat.numel() and not (-1e-3 <= float(flat.min()) <= float(flat.max()) <= 1 + 1e-3):
            yield (
                f"{name} has pixels from {float(flat.min()):.3g} to {float(flat.max()):.3g}: attacks clip to [0, 1], so"
                " let the data module give raw pixels in [0, 1] and put mean and std into EnergyModel"
            )


def _precision(trainer: Trainer, pl_module: LightningModule, images: Mapping[str, Tensor]) -> Iterator[str]:
    name = str(trainer.precision)
    if not name.startswith(("16", "bf16")) or any(not bool(x.isfinite().all()) for x in images.values()):
        return
    here = batch_energies(trainer, pl_module, images).values()
    exact = batch_energies(trainer, pl_module, images, full_precision=True).values()
    overflows = any(not bool(a.isfinite().all()) and bool(b.isfinite().all()) for a, b in zip(here, exact, strict=True))
    if overflows:
        yield f"energies overflow in precision {name} and are finite in float32: use bf16-mixed or 32-true"
    elif name.startswith("16"):
        yield f"float16 (precision {name}) overflows beyond 65504: use bf16-mixed or 32-true"


def _batch_norm(pl_module: LightningModule) -> Iterator[str]:
    thawed = thawed_batch_norm(pl_module)
    if thawed:
        yield (
            f"{thawed} batch norm layers are in train mode, so that the energy drifts without bound: call"
            " energy_model.freeze_batch_norm(), as DualAdversarialModule does"
        )


def _attack(pl_module: LightningModule) -> Iterator[str]:
    threat: Any = getattr(pl_module, "threat_model", None)
    weight, by_r1 = getattr(pl_module, "classification_weight", 1.0), remedy_by_r1(pl_module)
    if not classifies(pl_module):
        if getattr(pl_module, "r1_weight", None) == 0:
            yield f"neither an attacked classification nor R1 holds the energy's gradient down: {by_r1}"
    elif threat is not None and (threat.eps == 0 or threat.num_steps == 0 or threat.step_size == 0 or weight == 0):
        yield (
            "the classification term sees no adversarial images, without which the energy's gradient explodes: keep its"
            f" attack (threat_model.eps > 0){'' if by_r1 is None else f', or {by_r1}'}"
        )


def _seeds(curriculum: AUCCurriculum) -> Iterator[str]:
    separation = curriculum_auc(curriculum)
    if separation is not None and int(curriculum.num_steps) == 0 and 0.4 <= separation <= 0.6:
        yield (
            f"OOD seeds cannot be told from training images (AUC {separation:.2f} at T = 0): is the OOD set the"
            " training set itself?"
        )


def _learning_rate(trainer: Trainer, *, is_joint: bool) -> str:
    rates = sorted({float(group["lr"]) for o in trainer.optimizers for group in o.param_groups if "lr" in group})
    shown = f" ({', '.join(f'{rate:g}' for rate in rates)})" if rates else ""
    step = " or contrastive step" if is_joint else ""
    return f"mostly the cause is a learning rate{shown}{step} too large: lower it and resume from an earlier checkpoint"
