"""Several evaluations side by side: which figures can be compared, and which run is best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dat_lightning.core.errors import InputError
from dat_lightning.results.evaluation_file import Evaluation, is_of_one_step_count, read_evaluation
from dat_lightning.results.measurement import Measurement, canonical, differing

Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class Column:
    """A figure over all runs.

    Attributes:
        name: The figure.
        entries: Its entry in each run; ``None`` where a run lacks it.
        direction: What is better, if that is known.
        groups: Runs whose settings and number of images are equal have the same number here, from 0 on in the order of
            the runs; ``None`` without an entry.
        examples: An entry of each group. More than one means that the numbers cannot be compared.
        best: Whether a run has the best number; nowhere, if numbers cannot be compared.
    """

    name: str
    entries: tuple[Measurement | None, ...]
    direction: Direction | None
    groups: tuple[int | None, ...]
    examples: tuple[Measurement, ...]
    best: tuple[bool, ...]

    @property
    def comparable(self) -> bool:
        """Whether all runs have measured it in the same way, on the same images."""
        return len(self.examples) <= 1

    @property
    def differing(self) -> tuple[str, ...]:
        """Names of the settings in which the groups differ, such as ``test_images`` or ``threat_model.eps``."""
        return differing([example.compared_by for example in self.examples])


@dataclass(frozen=True)
class Comparison:
    """Runs as rows, figures as columns.

    Attributes:
        runs: Labels of the runs, no two the same.
        columns: Figures that at least two runs have.
        left_out: Names of figures that only one run has.
        failures: What stopped the test of each run before its end; ``None`` if nothing did.
    """

    runs: tuple[str, ...]
    columns: tuple[Column, ...]
    left_out: tuple[str, ...]
    failures: tuple[str | None, ...]

    def column(self, name: str) -> Column | None:
        """Returns the column of a figure, if there is one."""
        return next((column for column in self.columns if column.name == name), None)


def read_runs(paths: Sequence[Path]) -> dict[str, Evaluation]:
    """Returns label → evaluation of several files; equal labels are told apart by the path.

    Raises:
        FileNotFoundError: If a file is missing.
        InputError: If there are fewer than two files, one is given twice, or one is damaged.
    """
    if len(paths) < 2:
        raise InputError(f"a comparison needs at least two evaluation files, got {len(paths)}")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise InputError(f"{path} is given twice")
        seen.add(path.resolve())
    evaluations = [read_evaluation(path) for path in paths]
    names = [evaluation.name for evaluation in evaluations]
    labels = [
        name if names.count(name) == 1 else f"{name} ({path.as_posix()})"
        for name, path in zip(names, paths, strict=True)
    ]
    return dict(zip(labels, evaluations, strict=True))


def compare(
    runs: Mapping[str, Evaluation],
    names: Sequence[str] | None = None,
) -> Comparison:
    """Returns the comparison of several evaluations.

    Numbers are compared only if settings and number of images are equal. What is better
    is in the files; those of earlier versions, and figures whose evaluator does not say it, have no best.

    Args:
        runs: Label → evaluation.
        names: Figures to compare, in this order; by default all that at least two runs have, but for
            those of single step counts of a sweep.

    Raises:
        InputError: If no run has a figure that is asked for, or no two runs share a figure.
    """
    counts: dict[str, int] = {}
    for evaluation in runs.values():
        for entry in evaluation.entries:
            counts[entry.name] = counts.get(entry.name, 0) + 1
    unknown = [name for name in names or () if name not in counts]
    if unknown:
        raise InputError(f"columns: no run has a figure {unknown[0]!r}; there are {', '.join(sorted(counts))}")
    shared = [name for name, count in counts.items() if count > 1]
    # The numbers of a whole sweep are for the page of one run.
    shared = [name for name in shared if not is_of_one_step_count(name)] or shared
    if not shared:
        raise InputError(f"the runs {', '.join(runs)} share no figure: nothing can be compared")
    columns = tuple(
        _column(name, [run.entry(name) for run in runs.values()]) for name in (shared if names is None else names)
    )
    left_out = tuple(name for name in counts if name not in {column.name for column in columns})
    return Comparison(tuple(runs), columns, left_out, tuple(run.failure for run in runs.values()))


def _column(name: str, entries: Sequence[Measurement | None]) -> Column:
    examples: dict[str, Measurement] = {}
    groups: list[int | None] = []
    for entry in entries:
        key = None if entry is None else canonical(entry.compared_by)
        if entry is not None and key is not None:
            examples.setdefault(key, entry)
        groups.append(None if key is None else list(examples).index(key))
    said = {entry.better for entry in entries if entry is not None}
    better = said.pop() if len(said) == 1 else None
    best = [False] * len(entries)
    values = [math.nan if entry is None else entry.value for entry in entries]
    numbers = [value for value in values if not math.isnan(value)]
    if better is not None and len(examples) == 1 and len(numbers) > 1:
        winner = max(numbers) if better == "higher" else min(numbers)
        best = [value == winner for value in values]
    return Column(name, tuple(entries), better, tuple(groups), tuple(examples.values()), tuple(best))
