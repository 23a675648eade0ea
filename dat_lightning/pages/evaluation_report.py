"""One file and one page with everything that a test has measured."""

import os
import time
from collections import Counter
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from typing_extensions import override

from dat_lightning.core.errors import InputError
from dat_lightning.data.batches import EvaluationEntry
from dat_lightning.pages.drawing import require_matplotlib
from dat_lightning.pages.evaluation_page import write_evaluation_page
from dat_lightning.pages.reported_figures import (
    callbacks_of,
    figures_of,
    logged_by_callbacks,
    module_figure,
    results_of,
    sampled,
)
from dat_lightning.results.digests import image_digests, set_identity
from dat_lightning.results.evaluation_file import Evaluation, path_for, primitive, write_evaluation
from dat_lightning.results.gathering import all_ranks
from dat_lightning.results.measurement import Measurement, primitives
from dat_lightning.results.provenance import checkpoint_path, provenance, run_folder
from dat_lightning.sampling.sample_grid import SampleGrid
from dat_lightning.version import __version__


class EvaluationReport(Callback):
    """Writes the figures of all callbacks and of the module at the end of a test, as JSON and as a page to read.

    Figures come from every callback of the Trainer with a list ``figures``, such as
    :class:`~dat_lightning.evaluation.evaluator.Evaluator`, wherever it stands in the list of callbacks;
    and from what the module itself logs. Where two callbacks measure figures of one name,
    the name of their class is appended to it. The PNG files that a figure names in ``details["pictures"]``, and those
    of :class:`SampleGrid`, are shown on the page, which needs no other file.

    A test that an error or a signal stops leaves what callbacks have finished, in a file that says what stopped it.

    A file of the same checkpoint is replaced, unless it is complete and this one is not. A file of another checkpoint,
    or that is no evaluation, stays: then ``-`` and the first eight digits of the checkpoint's hash are put into this
    one's name, and a warning says so. Without a checkpoint file the hash is that of the weights.

    Args:
        path: The JSON file; the page lies beside it, with the suffix ``.html``. By default ``evaluation.json`` in the
            folder of the checkpoint's run, the one above ``checkpoints``; where there is none, or it cannot be written,
            in the Trainer's ``default_root_dir``.
        name: Label of the run in comparisons; by default the name of the run's folder, or else of the JSON file's, and
            that of the checkpoint.
        page: Whether to write the page, which needs matplotlib.

    Attributes:
        written: The JSON file of the last test, on rank zero.

    Raises:
        InputError: If ``path`` does not end in ``.json``; at the end of a test that has measured nothing.
        InputError: Before a test, if matplotlib is not installed and there is to be a page.
    """

    def __init__(self, path: str | None = None, name: str | None = None, page: bool = True) -> None:
        if path is not None and Path(path).suffix != ".json":
            raise InputError(f"EvaluationReport.path must end in .json, got {path!r}")
        self.path = None if path is None else Path(path)
        self.name = name
        self.page = page
        self.written: Path | None = None
        self._start = time.perf_counter()
        self._num_images = 0
        self._images: dict[int, int] | None = {}
        self._batches: EvaluationEntry | None = None
        self._testing = False
        self._before: dict[int, tuple[Any, Any]] = {}
        self._target = Path("evaluation.json")

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts the clock, and makes sure that the page can be drawn in the end."""
        self._testing = False
        if stage == "test":
            if self.page:
                require_matplotlib()
            self._start = time.perf_counter()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting images, and notes which results are of earlier evaluations."""
        self._num_images, self._images, self._batches = 0, {}, None
        self._before = {id(c): (results_of(c), copy(results_of(c))) for c in callbacks_of(trainer)}
        self._target = self._place(trainer, pl_module)
        self._testing = True

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
        """Counts the images, and notes which they are."""
        labels = batch.get("y") if isinstance(batch, Mapping) else None
        self._num_images += extract_batch_size(batch) if labels is None else len(labels)
        if self._images is None:
            return
        try:
            if self._batches is None:
                self._batches = EvaluationEntry("EvaluationReport", trainer.test_dataloaders, trainer, values="none")
            found = self._batches(batch)
        except InputError:
            # A module may test what is no images with labels, and then there is no digest of them.
            self._images = None
            return
        digests = image_digests(found["x"], found["y"]).tolist()
        self._images |= dict(zip(found["index"].tolist(), digests, strict=True))

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes both files on rank zero; all callbacks have their figures by now.

        Raises:
            InputError: If there is no figure.
        """
        images = torch.tensor(float(self._num_images), device=pl_module.device)
        num_images = int(trainer.strategy.reduce(images, reduce_op="sum"))
        seen = self._images_of_all_ranks()
        entries = self._entries(trainer)
        logged = logged_by_callbacks(trainer)
        for key, value in sorted(trainer.callback_metrics.items()):
            if key not in logged:
                figure = module_figure(key, float(value), pl_module, num_images, seen)
                entries.append(self._entry(type(pl_module).__name__, figure))
        if not entries:
            raise InputError(
                "EvaluationReport has nothing to report: add evaluators to trainer.callbacks, or log figures in the"
                " module's test_step"
            )
        if trainer.is_global_zero:
            self._write(trainer, pl_module, entries, None)
        self._testing = False

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes what callbacks have finished in a test that failed, and never hides why it failed."""
        if not (self._testing and trainer.is_global_zero):
            return
        self._testing = False
        try:
            entries = self._entries(trainer, of_this_test=True)
            if entries:
                self._write(trainer, pl_module, entries, _sentence(exception))
        except Exception as error:  # whatever it is, the first error matters more
            rank_zero_warn(f"EvaluationReport could not save what was measured: {_sentence(error)}")

    # The figures.

    def _entries(self, trainer: Trainer, of_this_test: bool = False) -> list[Measurement]:
        """Figures of callbacks, by source and name, whatever their order."""
        callbacks = callbacks_of(trainer)
        if of_this_test:
            # Others may still have figures of an earlier evaluation.
            callbacks = [c for c in callbacks if self._has_new_results(c)]
        sources = [(type(callback).__name__, figures_of(trainer, callback)) for callback in callbacks]
        sources.sort(key=lambda source: (source[0], [(figure.name, figure.protocol) for figure in source[1]]))
        found = [self._entry(source, figure) for source, figures in sources for figure in figures]
        counts = Counter(entry.name for entry in found)
        taken: Counter[str] = Counter()
        unique: list[Measurement] = []
        for entry in found:
            name = entry.name if counts[entry.name] == 1 else f"{entry.name} [{entry.source}]"
            taken[name] += 1
            unique.append(replace(entry, name=name if taken[name] == 1 else f"{name} {taken[name]}"))
        return unique

    def _entry(self, source: str, figure: Measurement) -> Measurement:
        details = dict(primitive(figure.details))
        if "pictures" in details:
            details["pictures"] = [self._located(Path(name)) for name in details["pictures"]]
        value, num_samples, settings = float(figure.value), int(figure.num_samples), primitives(figure.settings)
        return replace(figure, value=value, num_samples=num_samples, source=source, details=details, settings=settings)

    def _located(self, picture: Path) -> str:
        """A picture's path from the folder of the report, if it is below, so that both can move; else in full."""
        folder = self._target.absolute().parent
        beside = folder / picture
        # Callbacks name files as seen from the working directory; others may mean the folder of the report.
        whole = beside if beside.is_file() else picture.absolute()
        return whole.relative_to(folder).as_posix() if whole.is_relative_to(folder) else whole.as_posix()

    def _has_new_results(self, callback: Callback) -> bool:
        """Whether this test has changed a callback's results, by new ones or by adding to the old."""
        then, content = self._before.get(id(callback), (None, None))
        now = results_of(callback)
        return now is not then or bool(now != content)

    def _images_of_all_ranks(self) -> str | None:
        """The identity of the test images, that of evaluators; none if some batch does not say which they are."""
        parts = all_ranks(self._images)
        if any(part is None for part in parts):
            return None
        images = dict(sorted((index, digest) for part in parts for index, digest in part.items()))
        digests = torch.tensor(list(images.values()), dtype=torch.int64)
        return set_identity(digests) if images else None

    def _sample_grids(self, trainer: Trainer) -> dict[str, str]:
        """Pictures of generated samples that this test has drawn → what they show."""
        found: dict[str, str] = {}
        for callback in callbacks_of(trainer):
            if isinstance(callback, SampleGrid) and callback.dirpath is not None and sampled(trainer):
                prefix = f"test_step{trainer.global_step:07d}_"
                for path in sorted(Path(callback.dirpath).glob(f"{prefix}*_steps.png")):
                    steps = path.stem.removeprefix(prefix).removesuffix("_steps")
                    found[str(path.absolute())] = f"Generated samples after {steps} steps, a column per class"
        return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))

    # The files.

    def _place(self, trainer: Trainer, pl_module: LightningModule) -> Path:
        """The JSON file, unless another checkpoint has that name."""
        if self.path is not None:
            return self.path
        run = run_folder(trainer, pl_module)
        folder = run if run is not None and os.access(run, os.W_OK) else Path(trainer.default_root_dir)
        return folder / "evaluation.json"

    def _write(
        self, trainer: Trainer, pl_module: LightningModule, entries: list[Measurement], failure: str | None
    ) -> None:
        known = primitive(provenance(trainer, pl_module, time.perf_counter() - self._start))
        known["versions"] = {"dat_lightning": __version__, **known["versions"]}
        checkpoint = checkpoint_path(trainer, pl_module)
        run = run_folder(trainer, pl_module) or self._target.absolute().parent
        name = self.name or (run.name if checkpoint is None else f"{run.name} {checkpoint.stem}")
        evaluation = Evaluation(name, entries, known, failure)
        path = path_for(self._target, evaluation)
        if path != self._target:
            rank_zero_warn(
                f"{self._target} is the evaluation of another checkpoint, no evaluation, or complete as this one is"
                f" not, and stays: this one is in {path}"
            )
        write_evaluation(path, evaluation)
        self.written = path
        if self.page:
            write_evaluation_page(path.with_suffix(".html"), evaluation, pictures=self._sample_grids(trainer))
        rank_zero_info(f"Evaluation{'' if failure is None else ', incomplete'}: {path}")


def _sentence(error: BaseException) -> str:
    """What an error says, in its first line, and its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
