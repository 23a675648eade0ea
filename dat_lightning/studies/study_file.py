"""The YAML of a study: base configurations, variants of them, seeds, and what is to be shown."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from dat_lightning.core.errors import InputError
from dat_lightning.runs.error_sentences import argument_sentence
from dat_lightning.studies.configurations import CHECKPOINT, merged, read_mapping, strings

PlotKind = Literal["steps", "scatter", "curve", "radii", "values"]

# What a plot of a kind has to name.
_NEEDED: Mapping[PlotKind, tuple[str, ...]] = {
    "steps": ("figure",),
    "scatter": ("x", "figure"),
    "curve": ("figure",),
    "radii": ("figure",),
    "values": ("figure",),
}


@dataclass(frozen=True)
class Base:
    """What runs have in common: configurations, merged from left to right, and arguments on top.

    ``{folder}`` in them stands for the folder of a run, and ``{checkpoint:NAME}`` for the last checkpoint that base
    NAME has left for the same seed.

    Attributes:
        configs: YAML files, relative to the file of the study.
        arguments: Names of arguments, as on the command line, and their values.
        seed: The only seed of this base; by default it is trained for each seed of the study.
    """

    configs: list[str]
    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """How each variant is tested: what is merged on top of the configuration that it was trained with.

    Attributes:
        configs: As for a base.
        arguments: As for a base.
    """

    configs: list[str]
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One row of the result, a run for each seed.

    Attributes:
        name: Label in tables and plots.
        base: Name of its base.
        arguments: Those that differ from the base.
        value: The number that is varied, for plots against it.
    """

    name: str
    base: str
    arguments: dict[str, Any] = field(default_factory=dict)
    value: float | None = None


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        figure: Name of a figure of ``evaluation.json``, or of a curve, whose last value counts; ``max NAME`` is its
            largest.
        words: Its heading.
        percent: Whether it is shown in percent.
    """

    figure: str
    words: str
    percent: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        name: Of its file, without suffix.
        kind: ``steps``: a figure against the number of sampling steps; ``scatter``: against figure ``x``; ``curve``: a
            logged scalar against the training step; ``radii``: the figures ``{figure}_eps{ε}`` against ε; ``values``:
            a figure against the variants' ``value``.
        figure: Name of the figure or of the scalar.
        x: Figure on the horizontal axis.
        words: What stands at the vertical axis; by default the name.
        x_words: Likewise at the horizontal one.
        log: Whether the vertical axis is logarithmic.
        log_x: Likewise the horizontal one.
        variants: Names of the variants shown; by default all that have the figure.
    """

    name: str
    kind: PlotKind
    figure: str
    x: str | None = None
    words: str | None = None
    x_words: str | None = None
    log: bool = False
    log_x: bool = False
    variants: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """Contents of a study's file.

    Attributes:
        title: Heading of the page.
        question: What it asks.
        bases: Name → base.
        variants: The rows.
        evaluation: The test of each.
        seeds: A run of each variant for each of them.
        columns: The table.
        plots: The plots.
        curves: Logged scalars to keep.
        pictures: Names, without suffix, of PNG files of the evaluation to show for each variant's first seed.
        path: The file.
    """

    title: str
    question: str
    bases: dict[str, Base]
    variants: list[Variant]
    evaluation: Evaluation
    seeds: list[int] = field(default_factory=lambda: [0])
    columns: list[Column] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    curves: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    path: Path = Path()

    def base_config(self, name: str) -> dict[str, Any]:
        """Returns the configuration of a base, merged, with its arguments."""
        base = self.bases[name]
        return merged([self.path.parent / config for config in base.configs], base.arguments)

    def checkpoints_of(self, name: str) -> set[str]:
        """Returns the names of the bases whose checkpoints runs of a base start from."""
        further: list[Any] = [variant.arguments for variant in self.variants if variant.base == name]
        return checkpoint_names([self.base_config(name), *further])


def checkpoint_names(value: Any) -> set[str]:
    """Returns the names in all ``{checkpoint:NAME}`` of a configuration."""
    return {name for text in strings(value) for name in CHECKPOINT.findall(text)}


def read_study(path: Path) -> Study:
    """Returns the study in a file.

    Raises:
        FileNotFoundError: If the file, or a configuration that it names, is missing.
        InputError: If something in it is wrong.
    """
    contents = read_mapping(path, "study")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, skip={"path"})
    try:
        parsed = parser.parse_object(_without_values(contents))
        # The name since jsonargparse 4.49.
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        study = Study(**instantiate(parsed).as_dict())
    except Exception as error:  # whatever the parser says of a wrong type, name or value
        raise InputError(f"{path}: {argument_sentence(_short(str(error)))}") from error
    # Values of arguments stay what they are in the file.
    raw: Any = contents
    study = replace(
        study,
        path=path,
        bases={k: replace(base, arguments=_arguments(raw["bases"][k])) for k, base in study.bases.items()},
        variants=[
            replace(v, arguments=_arguments(each)) for v, each in zip(study.variants, raw["variants"], strict=True)
        ],
        evaluation=replace(study.evaluation, arguments=_arguments(raw["evaluation"])),
    )
    for problem in _problems(study):
        raise InputError(f"{path}: {problem}")
    return study


def _without_values(contents: Any) -> Any:
    """The same without the values of arguments: the parser would read numbers in texts, and instantiate classes."""
    if isinstance(contents, dict):
        return {
            key: dict.fromkeys(value) if key == "arguments" and isinstance(value, dict) else _without_values(value)
            for key, value in contents.items()
        }
    return [_without_values(value) for value in contents] if isinstance(contents, list) else contents


def _arguments(entry: Any) -> dict[str, Any]:
    return dict(entry.get("arguments") or {})


def _short(message: str) -> str:
    """The parser's message without the modules of the classes here."""
    return re.sub(r"dat_lightning\.studies\.study_file\.", "", message)


def _problems(study: Study) -> Iterator[str]:
    """What types do not tell, as sentences."""
    if not study.seeds or len(set(study.seeds)) < len(study.seeds) or min(study.seeds) < 0:
        yield f"seeds must be different numbers of at least 0, at least one, got {study.seeds}"
    names = [variant.name for variant in study.variants]
    if not names or len(set(names)) < len(names):
        yield f"variants must have different names, and be at least one, got {names}"
    for variant in study.variants:
        if variant.base not in study.bases:
            yield f"variant {variant.name!r} has base {variant.base!r}, expected one of {sorted(study.bases)}"
    known = set(study.bases)
    for name in study.bases:
        wrong = sorted(study.checkpoints_of(name) - known)
        if wrong:
            yield f"base {name!r} or a variant of it uses {{checkpoint:{wrong[0]}}}, expected one of {sorted(known)}"
        if name in _ancestors(study, name):
            yield f"base {name!r} starts from its own checkpoint"
    evaluation = merged([study.path.parent / config for config in study.evaluation.configs], study.evaluation.arguments)
    wrong = sorted(checkpoint_names(evaluation) - known)
    if wrong:
        yield f"evaluation uses {{checkpoint:{wrong[0]}}}, expected one of {sorted(known)}"
    yield from _problems_of_plots(study, names)


def _problems_of_plots(study: Study, names: list[str]) -> Iterator[str]:
    files = [plot.name for plot in study.plots]
    if len(set(files)) < len(files):
        yield f"plots must have different names, got {files}"
    for plot in study.plots:
        if not re.fullmatch(r"[\w-]+", plot.name):
            yield f"plot name {plot.name!r} must be letters, digits, _ and - alone, as it names a file"
        for needed in _NEEDED[plot.kind]:
            if getattr(plot, needed) is None:
                yield f"plot {plot.name!r} of kind {plot.kind} must have {needed!r}"
        if plot.kind == "curve" and plot.figure not in study.curves:
            yield f"plot {plot.name!r} shows curve {plot.figure!r}, expected one of curves: {study.curves}"
        unknown = [name for name in plot.variants if name not in names]
        if unknown:
            yield f"plot {plot.name!r} shows variant {unknown[0]!r}, expected some of {names}"
        if plot.kind == "values" and not any(variant.value is not None for variant in study.variants):
            yield f"plot {plot.name!r} is against the variants' value, which none has"


def _ancestors(study: Study, name: str) -> set[str]:
    """All bases that must be trained before a base."""
    found: set[str] = set()
    queue = [name]
    while queue:
        for other in study.checkpoints_of(queue.pop()) - found:
            if other in study.bases:
                found.add(other)
                queue.append(other)
    return found


def to_yaml(config: Mapping[str, Any]) -> str:
    """Returns a configuration as YAML, in its own order."""
    text: str = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return text
