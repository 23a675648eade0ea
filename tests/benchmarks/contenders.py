"""What the benchmark times: networks, tasks, sizes for a device, and the ways to compute each."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dat_lightning.backbones import WideResNet, convnext_convstem, resnet50
from dat_lightning.core import ascend, batch_norm_layers, targeted_logit, unbounded_ascent
from dat_lightning.speed import CompileMode, Execution, NetworkForms
from dat_lightning.weights import EnergyModel

from .cases import MEAN, STD, PackageDAT, calibrated, random_batch
from .plain_dat import AttackGradient, PlainClassifier, PlainDAT, generate

Task = Literal["stage1", "stage2", "generation"]
STAGES: tuple[Literal["stage1", "stage2"], ...] = ("stage1", "stage2")
TASKS: tuple[Task, ...] = ("stage1", "stage2", "generation")
GENERATION_STEP_SIZE = 0.2
_NUM_BATCHES = 4

Call = Callable[[int], Tensor]
"""Does once what is timed, and returns what came of it; the argument is the number of the round."""


@dataclass(frozen=True)
class Variant:
    """A way to compute a task; without a name of a mode it is the plain implementation.

    Attributes:
        package: Whether the package computes, or the plain implementation.
        compile: As the modules take it.
        bfloat16: Whether everything but weights, images and losses is bfloat16.
    """

    package: bool = True
    compile: CompileMode = False
    bfloat16: bool = False


VARIANTS: dict[str, Variant] = {
    "plain": Variant(package=False),
    "eager": Variant(),
    "eager, bf16": Variant(bfloat16=True),
    "compiled": Variant(compile=True),
    "compiled, bf16": Variant(compile=True, bfloat16=True),
    "compiled, bf16, CUDA graphs": Variant(compile="reduce-overhead", bfloat16=True),
}


@dataclass(frozen=True)
class Size:
    """How much of a task is timed.

    Attributes:
        image: Height and width.
        batch: B.
        contrastive: T.
        attack: K.
        generation: Steps of a generation chain.
    """

    image: int
    batch: int
    contrastive: int
    attack: int
    generation: int

    def forwards(self, task: Task) -> int:
        """Returns the forward passes per image that a task is worth; a backward pass to one side counts as one more.

        A step of an ascent is a forward pass and a backward pass to the image; a training pass has three, since its
        backward pass goes to weights and features.
        """
        ascent = {"stage1": 2 * self.attack, "generation": 2 * self.generation}
        ascent["stage2"] = 2 * self.contrastive + 2 * self.attack
        return ascent[task] + {"stage1": 3, "stage2": 9, "generation": 0}[task]


# What fits the memory of one large GPU, and what two cores do in minutes.
SIZES: dict[str, dict[str, Size]] = {
    "cuda": {
        "wrn_16_2": Size(32, 128, 40, 10, 35),
        "wrn_34_10": Size(32, 128, 40, 10, 35),
        "resnet50": Size(256, 64, 15, 3, 14),
        "convnext_l": Size(256, 32, 15, 3, 14),
    },
    "cpu": {
        "wrn_16_2": Size(32, 32, 10, 10, 20),
        "wrn_34_10": Size(32, 4, 2, 2, 4),
        "resnet50": Size(256, 2, 2, 2, 4),
        "convnext_l": Size(256, 1, 1, 1, 2),
        "wrn_10_1": Size(16, 4, 1, 1, 1),
    },
}


@dataclass(frozen=True)
class Workload:
    """A network and how much it has to do.

    Attributes:
        net: One of those in :data:`SIZES`.
        size: How much.
        activation: Of WideResNets. A smooth one lets attacks agree in float32 whatever the order of summation.
        plain_gradient: Whether the plain attacks' backward passes compute what they need, or also the parameters'
            gradients, as those of ``loss.backward()`` do.
        device: Where.
    """

    net: str
    size: Size
    activation: Literal["relu", "silu"] = "silu"
    plain_gradient: AttackGradient = "input"
    device: str = "cpu"

    def backbone(self, image: int | None = None) -> nn.Module:
        """Returns the network with which all contenders start, on the CPU."""
        wide = partial(WideResNet, activation=self.activation)
        nets: dict[str, Callable[[], nn.Module]] = {
            "wrn_10_1": partial(wide, 10, 1),
            "wrn_16_2": partial(wide, 16, 2),
            "wrn_34_10": partial(wide, 34, 10),
            "resnet50": partial(resnet50, num_classes=10),
            "convnext_l": partial(convnext_convstem, "large", num_classes=10),
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            backbone = nets[self.net]()
        image = self.size.image if image is None else image
        return calibrated(backbone, image, count=64 if image <= 64 else 2)

    def batches(self) -> list[dict[str, Tensor]]:
        """Returns the batches that all contenders see, one after the other."""
        found = [random_batch(self.size.batch, self.size.image, seed) for seed in range(_NUM_BATCHES)]
        return [{name: value.to(self.device) for name, value in batch.items()} for batch in found]

    def flops(self, backbone: nn.Module) -> int:
        """Returns the floating-point operations of one image's forward pass; a multiply-add is two."""
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            copy.deepcopy(backbone).cpu().eval()(torch.zeros(1, 3, self.size.image, self.size.image))
        return int(counter.get_total_flops())

    def tiny(self) -> "Workload":
        """Returns the same with as little to do as shows whether two implementations agree."""
        image = min(self.size.image, 64)
        return replace(self, size=Size(image, min(self.size.batch, 4), 1, 1, 1), device="cpu")

    def plain(self, backbone: nn.Module, dtype: torch.dtype = torch.float32) -> PlainDAT:
        """Returns the plain contender of both stages."""
        model = PlainClassifier(copy.deepcopy(backbone), MEAN, STD).to(self.device, dtype)
        steps = self.size.contrastive
        return PlainDAT(model, steps, steps, self.size.attack, self.plain_gradient)

    def package(
        self,
        backbone: nn.Module,
        task: Literal["stage1", "stage2"],
        variant: Variant = Variant(),
        dtype: torch.dtype = torch.float32,
        memory_format: Literal["contiguous", "channels_last"] = "channels_last",
    ) -> PackageDAT:
        """Returns a contender of the package."""
        return PackageDAT(
            backbone.to(self.device),
            self.size.contrastive,
            self.size.attack,
            dtype,
            task,
            torch.bfloat16 if variant.bfloat16 else None,
            execution=Execution(memory_format, variant.compile, bool(batch_norm_layers(backbone))),
        )

    def call(self, task: Task, variant: Variant, backbone: nn.Module) -> Call:
        """Returns what is timed: a training step, or a generation chain; it gives what it has changed.

        That is the change of the classification head, (K, D), since the first step, or of the images.
        """
        if task == "generation":
            chain, start = self.generation(variant, backbone), self.batches()[0]["x_ood"]
            return lambda number: chain() - start
        batches = self.batches()
        run: PlainDAT | PackageDAT
        run = self.package(backbone, task, variant) if variant.package else self.plain(backbone)
        step = run.stage1_step if task == "stage1" and isinstance(run, PlainDAT) else run.step
        head = [p for p in (run.model if isinstance(run, PlainDAT) else run.module).parameters() if p.dim() == 2][-1]
        before = head.detach().clone()

        def train(number: int) -> Tensor:
            step(batches[number % _NUM_BATCHES])
            return head.detach() - before

        return train

    def generation(self, variant: Variant, backbone: nn.Module) -> Callable[[], Tensor]:
        """Returns a function that walks a chain and returns its images."""
        x, y = self.batches()[0]["x_ood"], torch.arange(self.size.batch, device=self.device) % 10
        chain = unbounded_ascent(GENERATION_STEP_SIZE, self.size.generation)
        if not variant.package:
            model = PlainClassifier(copy.deepcopy(backbone), MEAN, STD).to(self.device).eval()
            return partial(generate, model, x, y, chain.step_size, chain.num_steps, self.plain_gradient)
        network = sampling_network(backbone, self.device, variant.compile, len(x))
        context: Callable[[], AbstractContextManager[object]] = nullcontext
        if variant.bfloat16:
            context = partial(torch.autocast, torch.device(self.device).type, torch.bfloat16)

        def walk() -> Tensor:
            with context():
                return ascend(network, x, y, targeted_logit, chain)

        return walk


def sampling_network(
    backbone: nn.Module, device: str, compile: CompileMode = False, batch_size: int | None = None
) -> nn.Module:
    """Returns what the package's modules climb when they generate."""
    energy_model = EnergyModel(copy.deepcopy(backbone), MEAN, STD).to(device).eval()
    energy_model.to(memory_format=torch.channels_last)
    forms = NetworkForms(compile, fold_batch_norm=bool(batch_norm_layers(energy_model)))
    if batch_size is not None:
        forms.expect(batch_size)
    return forms.for_ascents(energy_model)
