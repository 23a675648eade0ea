"""One file and one page with everything that a test has measured."""

import hashlib
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from typing_extensions import override

from dat_lightning.callbacks.evaluator import Evaluator
from dat_lightning.callbacks.frechet import FrechetDistance
from dat_lightning.callbacks.pgd_sampler import PGDSampler, SampleConsumer
from dat_lightning.callbacks.sample_grid import SampleGrid
from dat_lightning.core.figures import Figure
from dat_lightning.core.fingerprint import module_fingerprint
from dat_lightning.reports.drawing import require_matplotlib
from dat_lightning.reports.evaluation_file import Entry, Evaluation, primitive, write_evaluation
from dat_lightning.reports.evaluation_page import write_evaluation_page
from dat_lightning.version import __version__

_PACKAGES = ("torch", "torchvision", "lightning", "torch-fidelity", "pyautoattack", "numpy")


class EvaluationReport(Callback):
    """Writes the figures of all callbacks and of the module at the end of a test, as JSON and as a page to read.

    Figures come from every callback of the Trainer with a list ``figures``, such as
    :class:`~dat_lightning.callbacks.evaluator.Evaluator`, wherever it stands in the list of callbacks; from
    :class:`FrechetDistance`; and from what the module itself logs. Where two callbacks measure figures of one name,
    the name of their class is appended to it. The PNG files that a figure names in ``details["pictures"]``, and those
    of :class:`SampleGrid`, are shown on the page, which needs no other file.

    Args:
        path: The JSON file; the page lies beside it, with the suffix ``.html``.
        name: Label of the run in comparisons; by default the name of the JSON file's folder.

    Raises:
        ValueError: If ``path`` does not end in ``.json``; at the end of a test that has measured nothing.
        ModuleNotFoundError: Before a test, if matplotlib is not installed.
    """

    def __init__(self, path: str = "evaluation.json", name: str | None = None) -> None:
        if Path(path).suffix != ".json":
            raise ValueError(f"EvaluationReport.path must end in .json, got {path!r}")
        self.path = Path(path)
        self.name = name
        self._start = time.perf_counter()
        self._num_images = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts the clock, and makes sure that the page can be drawn in the end."""
        if stage == "test":
            require_matplotlib()
            self._start = time.perf_counter()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting images."""
        self._num_images = 0

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the images."""
        labels = batch.get("y") if isinstance(batch, Mapping) else None
        self._num_images += extract_batch_size(batch) if labels is None else len(labels)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes both files on rank zero; all callbacks have their figures by now.

        Raises:
            ValueError: If there is no figure.
        """
        images = torch.tensor(float(self._num_images), device=pl_module.device)
        num_images = int(trainer.strategy.reduce(images, reduce_op="sum"))
        entries = self._entries(trainer, pl_module, num_images)
        if not entries:
            raise ValueError(
                "EvaluationReport has nothing to report: add evaluators to trainer.callbacks, or log figures in the"
                " module's test_step"
            )
        if trainer.is_global_zero:
            name = self.name or self.path.absolute().parent.name
            evaluation = Evaluation(name, entries, self._provenance(trainer, pl_module))
            write_evaluation(self.path, evaluation)
            write_evaluation_page(self.path.with_suffix(".html"), evaluation, pictures=self._sample_grids(trainer))

    # The figures.

    def _entries(self, trainer: Trainer, pl_module: LightningModule, num_images: int) -> list[Entry]:
        """All figures, by source and name, whatever the order of the callbacks."""
        sources = [(type(callback).__name__, _figures(trainer, callback)) for callback in _callbacks(trainer)]
        sources.sort(key=lambda source: (source[0], [(figure.name, figure.protocol) for figure in source[1]]))
        found = [self._entry(source, figure) for source, figures in sources for figure in figures]
        counts = Counter(entry.name for entry in found)
        taken: Counter[str] = Counter()
        unique: list[Entry] = []
        for entry in found:
            name = entry.name if counts[entry.name] == 1 else f"{entry.name} [{entry.source}]"
            taken[name] += 1
            name = name if taken[name] == 1 else f"{name} {taken[name]}"
            unique.append(Entry(name, entry.value, entry.protocol, entry.num_samples, entry.source, entry.details))
        logged = {f"test/{name}" for name in counts} | _logged_by_frechet(trainer)
        for key, value in sorted(trainer.callback_metrics.items()):
            if key not in logged:
                unique.append(_module_entry(key, float(value), pl_module, num_images))
        return unique

    def _entry(self, source: str, figure: Figure) -> Entry:
        details = dict(primitive(figure.details))
        if "pictures" in details:
            details["pictures"] = [self._located(Path(name)) for name in details["pictures"]]
        return Entry(figure.name, float(figure.value), figure.protocol, int(figure.num_samples), source, details)

    def _located(self, picture: Path) -> str:
        """A picture's path from the folder of the report, if it is below, so that both can move; else in full."""
        folder = self.path.absolute().parent
        beside = folder / picture
        # Callbacks name files as seen from the working directory; others may mean the folder of the report.
        whole = beside if beside.is_file() else picture.absolute()
        return whole.relative_to(folder).as_posix() if whole.is_relative_to(folder) else whole.as_posix()

    def _sample_grids(self, trainer: Trainer) -> dict[str, str]:
        """Pictures of generated samples that this test has drawn → what they show."""
        found: dict[str, str] = {}
        for callback in _callbacks(trainer):
            if isinstance(callback, SampleGrid) and callback.dirpath is not None and _sampled(trainer):
                prefix = f"test_step{trainer.global_step:07d}_"
                for path in sorted(Path(callback.dirpath).glob(f"{prefix}*_steps.png")):
                    steps = path.stem.removeprefix(prefix).removesuffix("_steps")
                    found[str(path.absolute())] = f"Generated samples after {steps} steps, a column per class"
        return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))

    # Where they come from.

    def _provenance(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        device = pl_module.device
        cuda = device.type == "cuda"
        data = trainer.datamodule  # type: ignore[attr-defined]
        return {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._start, 1),
            "checkpoint": _checkpoint(trainer, pl_module),
            "weights_sha256": module_fingerprint(getattr(pl_module, "energy_model", pl_module)),
            "seeds": _seeds(trainer, pl_module),
            "device": torch.cuda.get_device_name(device) if cuda else device.type,
            "num_processes": trainer.world_size,
            "precision": str(trainer.precision),
            "python": platform.python_version(),
            "versions": {"dat_lightning": __version__, **_versions()},
            "module": _class_and_hyperparameters(pl_module),
            "data": None if data is None else _class_and_hyperparameters(data),
        }


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _sampled(trainer: Trainer) -> bool:
    """Whether this test has generated samples; a consumer may have figures of an earlier evaluation."""
    return any(isinstance(c, PGDSampler) and "test" in c.stages for c in _callbacks(trainer))


def _figures(trainer: Trainer, callback: Callback) -> list[Figure]:
    """The figures of one callback."""
    if isinstance(callback, SampleConsumer) and not isinstance(callback, Evaluator) and not _sampled(trainer):
        return []
    if isinstance(callback, FrechetDistance):
        return [_frechet_figure(trainer, callback)] if callback.scores else []
    figures = getattr(callback, "figures", None)
    return [each for each in figures if isinstance(each, Figure)] if isinstance(figures, list) else []


def _frechet_figure(trainer: Trainer, callback: FrechetDistance) -> Figure:
    sampler = next(c for c in _callbacks(trainer) if isinstance(c, PGDSampler))
    data = type(trainer.datamodule).__name__  # type: ignore[attr-defined]
    reference = callback.reference or f"the training images of {data}"
    best = min(callback.scores, key=callback.scores.__getitem__)
    return Figure(
        "fid",
        callback.scores[best],
        f"Fréchet distance between {sampler.num_samples} class-balanced samples and {reference}, features of"
        f" {type(callback.extractor).__name__}, the smallest over the numbers of sampling steps",
        sampler.num_samples,
        {
            "num_steps": best,
            "step_size": sampler.chain.step_size,
            "sweep_steps": list(callback.scores),
            "sweep": list(callback.scores.values()),
        },
    )


def _logged_by_frechet(trainer: Trainer) -> set[str]:
    """Names under which the figures of the sweep are logged; they are in the details of one."""
    scores = [c.scores for c in _callbacks(trainer) if isinstance(c, FrechetDistance)]
    sweep = {f"test/fid_{steps}_steps" for each in scores for steps in each}
    return {"test/fid", "test/fid_steps", *sweep} if scores else set()


def _module_entry(key: str, value: float, pl_module: LightningModule, num_images: int) -> Entry:
    """A figure that the module logged, with the attack behind it where the module says so."""
    name, source = key.removeprefix("test/"), type(pl_module).__name__
    protocol = f"as {source} logs it, over the test set"
    attack = getattr(pl_module, "eval_threat_model", None)
    if name.partition("/")[0] == "robust_accuracy" and attack is not None:
        start = "a random start" if attack.random_start else "no random start"
        protocol = (
            f"PGD on the cross-entropy, {attack.norm} radius {attack.eps:g}, {attack.num_steps} steps of"
            f" {attack.step_size:g}, {start}, over the test set"
        )
    return Entry(name, value, protocol, num_images, source)


def _checkpoint(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any] | None:
    """The file that the weights come from, and its hash; a folder has none."""
    path = trainer.ckpt_path or getattr(pl_module, "init_from", None)
    if path is None:
        return None
    digest: str | None = None
    if Path(path).is_file():
        sha256 = hashlib.sha256()
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                sha256.update(block)
        digest = sha256.hexdigest()
    return {"path": str(path), "sha256": digest}


def _seeds(trainer: Trainer, pl_module: LightningModule) -> dict[str, int]:
    """The seed of the process, of the module and of the data, as far as they have one."""
    everything = os.environ.get("PL_GLOBAL_SEED", "")
    seeds: dict[str, Any] = {
        "seed_everything": int(everything) if everything.isdecimal() else None,
        "module": getattr(pl_module, "seed", None),
        "data": getattr(trainer.datamodule, "seed", None),  # type: ignore[attr-defined]
    }
    return {name: seed for name, seed in seeds.items() if isinstance(seed, int)}


def _versions() -> dict[str, str]:
    """Versions of the packages that figures depend on, as far as they are installed."""
    installed = {name for distribution in distributions() if (name := distribution.metadata["Name"]) is not None}
    return {package: version(package) for package in _PACKAGES if package in installed}


def _class_and_hyperparameters(part: Any) -> dict[str, Any]:
    """The class of a module or DataModule, and what it saved as hyperparameters."""
    name = f"{type(part).__module__}.{type(part).__qualname__}"
    return {"class": name, "hyperparameters": primitive(dict(getattr(part, "hparams", {})))}
