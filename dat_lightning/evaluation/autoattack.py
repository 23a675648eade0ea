"""Robust accuracy under AutoAttack."""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from dat_lightning.core.ascent import Logits, input_gradient, no_trace
from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.core.objectives import cross_entropy
from dat_lightning.core.random_streams import stream_seed
from dat_lightning.core.threat_model import Norm, per_example_norm, vanishes
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.evaluation.masking import share_of, square_signs, vanished_signs, wilson_interval
from dat_lightning.evaluation.robustness import float_logits
from dat_lightning.results.gathering import Values, all_ranks
from dat_lightning.results.measurement import Measurement
from dat_lightning.results.progress import is_silent

AttackName = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]


class AutoAttack(Evaluator):
    """Measures robust accuracy under AutoAttack, through the package ``pyautoattack`` (extra ``eval``).

    The attacks come one after the other, each on the images that are still classified correctly. Their noise depends on
    which images share a batch; so images are gathered over the ranks, sorted by index, cut in chunks of ``batch_size``
    and dealt to the ranks in turn, and each chunk is attacked with the same seed, as the package does it. Therefore the
    figure depends on ``batch_size`` but not on loaders and ranks, and up to ``batch_size`` images it is the package's.
    Ranks wait for each other's last chunk: the timeout of the process group must be longer than one takes.

    Networks of fewer than 10 classes get fewer targets. With three classes untargeted DLR takes the place of
    targeted DLR, which needs four; with two, DLR is left out.

    A warning, also in the figure's ``details["warnings"]``, says so if Square, which needs no gradient, breaks images
    that no gradient attack breaks. torch's global generators, gradients, modes and tracing are left as they were.

    Logged: ``test/{name}``, see :attr:`name`.

    Args:
        norm: Geometry of the ball.
        eps: Radius, in units of [0, 1] pixels.
        version: ``standard``; ``plus`` adds attacks and restarts; ``rand`` is for networks with random parts.
        max_images: Attack only as many, chosen by a hash of (seed, index), whatever order the data have; ``None`` all.
        batch_size: Images per chunk.
        dirpath: Folder that keeps the values of each chunk, see :class:`Evaluator`.
        attacks: Which attacks, in this order, instead of the version's; their parameters stay the version's.
        individual: Whether each attack runs on all correctly classified images: the robust accuracy is the same up to
            noise, at several times the cost, and shows what each attack can do by itself.
        seed: Seed of each attack.

    Attributes:
        results: After a test, per image in the order of ``index``: ``correct``, ``vanished`` (whether the gradient
            vanishes), ``broken_{attack}`` for each attack, and ``distance`` from the image to what broke it, 0 if
            nothing did.

    Raises:
        InputError: If a number is outside its range or a choice is unknown; in a test, if the network has too few
            classes or images are too small for the attacks.
        InputError: In a test, if the package is not installed.

    Source: Croce & Hein 2020 (arXiv 2003.01690).
    """

    def __init__(
        self,
        norm: Norm = "L2",
        eps: float = 0.5,
        version: Literal["standard", "plus", "rand"] = "standard",
        max_images: int | None = None,
        batch_size: int = 250,
        dirpath: str | None = None,
        attacks: Sequence[AttackName] | None = None,
        individual: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(dirpath)
        if norm not in get_args(Norm):
            raise InputError(f"norm must be 'L2' or 'Linf', got {norm!r}")
        if not 0 < eps < math.inf:
            raise InputError(f"eps must be a positive finite radius, got {eps}")
        if version not in ("standard", "plus", "rand"):
            raise InputError(f"version must be 'standard', 'plus' or 'rand', got {version!r}")
        require_at_least(1, batch_size=batch_size, max_images=1 if max_images is None else max_images)
        known = get_args(AttackName)
        if attacks is not None and (not attacks or set(attacks) - set(known) or len(set(attacks)) < len(attacks)):
            raise InputError(f"attacks must be different ones of {known}, got {list(attacks)}")
        self.norm: Norm = norm
        self.eps = eps
        self.version = version
        self.max_images = max_images
        self.batch_size = batch_size
        self.attacks = None if attacks is None else tuple(attacks)
        self.individual = individual
        self.seed = seed
        self.results: Values = {}
        self._images: dict[int, tuple[Tensor, Tensor]] = {}
        self._bar: Any = None

    @property
    def name(self) -> str:
        """Name of the figure, such as ``autoattack_L2_0.5``; ``autoattack_plus_…`` if the version is not standard."""
        kind = self.version if self.attacks is None else "custom"
        return f"autoattack{'' if kind == 'standard' else '_' + kind}_{self.norm}_{self.eps:g}"

    @override
    def settings(self) -> dict[str, Any]:
        """Returns the attack, its seed and the version of the package."""
        choice = {"version": self.version, "attacks": self.attacks, "individual": self.individual}
        package = metadata.version("pyautoattack")
        return {"norm": self.norm, "eps": self.eps, **choice, "seed": self.seed, "pyautoattack": package}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks for the package before a test begins."""
        if stage == "test":
            _pyautoattack()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the last evaluation."""
        super().on_test_start(trainer, pl_module)
        self._images = {}

    @override
    def add_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> None:
        """Keeps the images; they are attacked after the last batch."""
        for index, image, label in zip(batch["index"].tolist(), batch["x"].cpu(), batch["y"].cpu(), strict=True):
            # Copies, for a view would keep the whole batch.
            self._images[index] = (image.clone(), label.clone())
        if self.max_images is not None:
            self._images = {index: self._images[index] for index in self._chosen(self._images)}

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attacks this rank's chunks, gathers the results, and logs the figure."""
        chunks = self._chunks(trainer)
        with tqdm(chunks, desc=f"AutoAttack {self.norm} {self.eps:g}", leave=False, disable=is_silent(trainer)) as bar:
            self._bar = bar
            for chunk in bar:
                super().add_batch(pl_module, {name: value.to(pl_module.device) for name, value in chunk.items()})
        self._bar, self._images = None, {}
        super().on_test_epoch_end(trainer, pl_module)

    @override
    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        """Returns the values of :attr:`results` for a chunk."""
        logits = float_logits(pl_module, type(self).__name__)
        with torch.inference_mode(False), torch.no_grad(), no_trace(pl_module), _package_contained():
            torch.manual_seed(self.seed)
            x, y = batch["x"].detach().clone(memory_format=torch.contiguous_format).float(), batch["y"].clone()
            output = logits(x)
            adversary = self._adversary(logits, x, output.shape[1])
            self.check_logits(output, y)
            correct = output.argmax(1) == y
            with torch.enable_grad():
                vanished = vanishes(input_gradient(logits, x, y, cross_entropy))
            broken, distance = {}, torch.zeros(len(x), device=x.device)
            left = correct.clone()
            for attack in adversary.attacks_to_run:
                if self._bar is not None:
                    self._bar.set_postfix(attack=attack, left=f"{int(left.sum())}/{len(left)}")
                attacked = (correct if self.individual else left).nonzero().squeeze(1)
                hit = torch.zeros_like(correct)
                if len(attacked):
                    adversary.attacks_to_run = [attack]
                    x_adv, y_adv = adversary.run_standard_evaluation(x[attacked], y[attacked], batch_size=len(attacked))
                    hit[attacked] = y_adv != y[attacked]
                    moved = _distance(x_adv - x[attacked], self.norm)
                    distance[attacked] = torch.where((hit & left)[attacked], moved, distance[attacked])
                broken[f"broken_{attack}"] = hit
                left &= ~hit
        return {"correct": correct, "distance": distance, "vanished": vanished, **broken}

    @override
    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        """Returns the robust accuracy, and warns if Square alone breaks images."""
        self.results = values
        left, total = values["correct"].clone(), len(values["correct"])
        hits = {name.removeprefix("broken_"): hit for name, hit in values.items() if name.startswith("broken_")}
        after = {}
        for attack, hit in hits.items():
            left &= ~hit
            after[attack] = share_of(left)
        warnings = square_signs(hits) + vanished_signs(values["correct"], values["vanished"])
        for warning in warnings:
            rank_zero_warn(f"AutoAttack: {warning} This is a sign of gradient masking: the figure may be too high.")
        whom = "all correct images" if self.individual else "what the ones before left"
        settings = {
            **self.settings(),
            "attacks": list(hits),
            "batch_size": self.batch_size,
            "max_images": self.max_images,
            # Noise is no setting, the choice of images is.
            "seed": None if self.max_images is None else self.seed,
        }
        details = {
            "seed": self.seed,
            "clean_accuracy": share_of(values["correct"]),
            "confidence_interval": wilson_interval(int(left.sum()), total),
            "accuracy_after": after,
            "accuracy_alone": {a: share_of(values["correct"] & ~h) for a, h in hits.items()} if self.individual else {},
            "largest_distance": float(values["distance"].max()),
            "misclassified": values["index"][~values["correct"]].tolist(),
            "broken": {attack: values["index"][hit].tolist() for attack, hit in hits.items()},
            "warnings": warnings,
        }
        words = f"share of images classified correctly, also after AutoAttack, each attack on {whom}"
        return [Measurement(self.name, share_of(left), words, total, details, "higher", settings)]

    def _chosen(self, indices: Iterable[int]) -> list[int]:
        """The sorted indices that are attacked."""
        ranked = sorted(indices, key=lambda index: stream_seed(self.seed, "AutoAttack's images", index))
        return sorted(ranked[: self.max_images])

    def _chunks(self, trainer: Trainer) -> list[dict[str, Tensor]]:
        """This rank's chunks, put together from the images of all ranks."""
        owned = all_ranks(sorted(self._images))
        chosen = self._chosen({index for indices in owned for index in indices})
        chunks = []
        for number, first in enumerate(range(0, len(chosen), self.batch_size)):
            indices, owner = chosen[first : first + self.batch_size], number % trainer.world_size
            mine = {index: self._images[index] for index in indices if index in self._images}
            parts: list[dict[int, tuple[Tensor, Tensor]] | None] = [mine]
            if trainer.world_size > 1:
                # Only the owner receives, so that no rank holds all images.
                is_owner = trainer.global_rank == owner
                parts = [None] * trainer.world_size
                torch.distributed.gather_object(mine, parts if is_owner else None, dst=owner)
            if trainer.global_rank == owner:
                images = {index: image for part in parts if part for index, image in part.items()}
                x, y = (torch.stack([images[index][k] for index in indices]) for k in (0, 1))
                chunks.append({"x": x, "y": y, "index": torch.tensor(indices)})
        return chunks

    def _adversary(self, logits: Logits, x: Tensor, num_classes: int) -> Any:
        """The package's object, with attacks that so many classes allow."""
        adversary = _pyautoattack().AutoAttack(
            logits, norm=self.norm, eps=self.eps, version=self.version, seed=self.seed, device=x.device
        )
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(9, num_classes - 1)
        attacks = list(adversary.attacks_to_run if self.attacks is None else self.attacks)
        least = {"apgd-dlr": 3, "apgd-t": 4}
        impossible = [attack for attack in attacks if num_classes < least.get(attack, 2)]
        if num_classes < 2 or (impossible and self.attacks is not None):
            raise InputError(f"the attacks {impossible or attacks} need more classes, the network has {num_classes}")
        if "apgd-t" in impossible and num_classes == 3 and "apgd-dlr" not in attacks:
            attacks[attacks.index("apgd-t")] = "apgd-dlr"
        if "square" in attacks and self.norm == "L2" and min(x.shape[2:]) < 5:
            raise InputError(f"square in L2 needs images of at least 5×5 pixels, got {tuple(x.shape[2:])}")
        adversary.attacks_to_run = [attack for attack in attacks if num_classes >= least.get(attack, 2)]
        return adversary


def _distance(delta: Tensor, norm: Norm) -> Tensor:
    return per_example_norm(delta).flatten() if norm == "L2" else delta.flatten(1).abs().amax(1)


@contextmanager
def _package_contained() -> Iterator[None]:
    """Restores what the package changes: torch's generators, which it seeds, and Python's trace function."""
    trace = sys.gettrace()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            sys.settrace(trace)


def _pyautoattack() -> Any:
    try:
        import pyautoattack
    except ModuleNotFoundError as error:
        raise InputError("AutoAttack needs pyautoattack: pip install 'dat-lightning[eval]'") from error
    return pyautoattack
