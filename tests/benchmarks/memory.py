"""Peak memory of real Stage-2 steps of the ImageNet recipes, and what a GPU would need.

    python -m tests.benchmarks.memory --images DIR [--nets resnet50 convnext_l] [--batch_sizes 2 4] [--json FILE]

``--images`` is a folder ``<class>/*`` of photographs. Every case runs in a process of its own: the recipe's module
takes two Stage-2 steps at 256×256 with T contrastive steps through the Trainer, with the recipe's optimiser and
average. Reported are the largest resident memory of the process, less what it had before the network was made, and the
bytes that autograd keeps for the training pass and for one attack pass, counted tensor by tensor, per image of the
batch: the difference between B images and one, so that weights cast to bfloat16 do not count for every image. The
estimate for a GPU adds weights, gradients, optimiser state, average and those casts to the larger of the two passes, at
the recipe's share of the batch.
"""

import argparse
import json
import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from dat_lightning import DualAdversarialModule, ExponentialMovingAverage, ImageDataModule, ImageFolder, LabelledFolder
from dat_lightning.core import cross_entropy, no_trace
from tests.frozen.record import printed

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"resnet50": "resnet50_T15", "wrn50_4": "wrn50_4_T30", "convnext_l": "convnext_l_T110"}
GPU_SHARE = 64  # images of the batch of 512 on each of 8 devices
MIB, GIB = 2**20, 2**30


class FixedSteps(Callback):
    """Holds the number of contrastive steps."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if isinstance(pl_module, DualAdversarialModule):
            pl_module.curriculum.num_steps.fill_(self.num_steps)


class Losses(Callback):
    """Notes the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def recipe_module(net: str, merge_forwards: bool, grad_checkpointing: bool) -> DualAdversarialModule:
    """Returns the module of a recipe, with random weights."""
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(DualAdversarialModule, "model", required=True)
    config = parser.parse_object({"model": _model_section(net)})
    settings = config.model.init_args
    settings.init_from = None
    settings.merge_forwards = merge_forwards
    settings.energy_model.init_args.backbone.init_args.grad_checkpointing = grad_checkpointing
    module: DualAdversarialModule = parser.instantiate_classes(config).model
    return module


def _model_section(net: str) -> Any:
    return printed(ROOT / "configs" / "imagenet" / f"{RECIPES[net]}.yaml")["model"]


def kept_bytes(forward: Callable[[], Any], module: torch.nn.Module) -> int:
    """Returns how many bytes autograd keeps of a forward pass, the parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(seen.values())
    del result
    alive.clear()
    return total


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of one case; runs in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    batch_size = case["batch_size"]
    module = recipe_module(case["net"], case["merge_forwards"], case["grad_checkpointing"])
    images = case["images"]
    data = ImageDataModule(
        LabelledFolder(images),
        LabelledFolder(images),
        ImageFolder(images),
        num_held_out=10,
        augmentation="imagenet",
        image_size=256,
        batch_size=batch_size,
        streams=("gen", "clf", "ood"),
    )
    losses = Losses()
    # The seeds are other crops of the training images: enough for memory, so the check for that is left out.
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExponentialMovingAverage(), FixedSteps(case["contrastive_steps"]), losses],
    )
    trainer.fit(module, train_dataloaders=data.train_dataloader())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    batch = next(iter(data.train_dataloader()))
    x_gen, x_clf, y = batch["x_gen"], batch["x_clf"], batch["y_clf"]
    module.train()

    def training(n: int) -> int:
        return kept_bytes(lambda: module.joint_logits(x_gen[:n], x_gen[:n], x_clf[:n]), module)

    def attack(n: int) -> int:
        leaf = x_clf[:n].clone().requires_grad_(True)
        with no_trace(module.energy_model):
            return kept_bytes(lambda: cross_entropy(module(leaf), y[:n]), module)

    kept: dict[str, float] = {}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        for kind, kept_of in (("training", training), ("attack", attack)):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                one, all_of_them = kept_of(1), kept_of(batch_size)
            kept[f"{kind}_pass_{name}"] = (all_of_them - one) / (batch_size - 1)
            kept[f"{kind}_fixed_{name}"] = one - kept[f"{kind}_pass_{name}"]
    parameters = sum(p.numel() for p in module.parameters())
    # Weights, gradients and average in float32, and one (SGD) or two (AdamW) numbers of state.
    state = 2 if "AdamW" in str(module.configure_optimizers()) else 1
    return {
        **{key: case[key] for key in ("net", "batch_size", "merge_forwards", "grad_checkpointing")},
        "losses": losses.values,
        "parameters": parameters,
        "peak_bytes": peak,
        "fixed_bytes": parameters * 4 * (3 + state),
        **kept,
    }


def gpu_estimate(figures: dict[str, Any], precision: str, share: int = GPU_SHARE) -> float:
    """Returns the bytes that a device needs for its share of the batch."""
    passes = [
        figures[f"{kind}_pass_{precision}"] * share + figures[f"{kind}_fixed_{precision}"]
        for kind in ("training", "attack")
    ]
    total: float = figures["fixed_bytes"] + max(passes)
    return total


def report(figures: dict[str, Any]) -> str:
    """Returns a row of the table."""
    estimates = [gpu_estimate(figures, precision) / GIB for precision in ("float32", "bfloat16")]
    how = "one forward" if figures["merge_forwards"] else "three forwards"
    how += ", checkpointing" if figures["grad_checkpointing"] else ""
    return (
        f"{figures['net']:11} {figures['batch_size']:3}  {how:29} {figures['peak_bytes'] / MIB:8.0f} MiB"
        f" {figures['training_pass_float32'] / MIB:7.0f} {figures['attack_pass_float32'] / MIB:7.0f} MiB"
        f" {figures['training_pass_bfloat16'] / MIB:7.0f} {figures['attack_pass_bfloat16'] / MIB:7.0f} MiB"
        f" {estimates[0]:6.0f} {estimates[1]:6.0f} GiB   losses {figures['losses'][0]:.3f} {figures['losses'][1]:.3f}"
    )


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", choices=list(RECIPES), default=["resnet50", "convnext_l"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--contrastive_steps", type=int, default=2)
    parser.add_argument("--grad_checkpointing", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)
    if min(options.batch_sizes) < 2:
        parser.error("batch sizes must be at least 2, since figures per image are differences")
    sys.stdout.write(
        f"{'net':11} {'B':>3}  {'how':29} {'peak':>12} {'kept per image, float32':>19} {'bfloat16':>19}"
        f" {f'GPU, {GPU_SHARE} images: fp32, bf16':>16}\n"
    )
    results = []
    for net in options.nets:
        for batch_size in options.batch_sizes:
            case = {
                "net": net,
                "batch_size": batch_size,
                "merge_forwards": True,
                "grad_checkpointing": options.grad_checkpointing,
                "contrastive_steps": options.contrastive_steps,
                "images": str(options.images),
            }
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(measure, (case,)))
            sys.stdout.write(report(results[-1]) + "\n")
            sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
