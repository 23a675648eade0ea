"""The YAML of a study: what is trained from which configurations, what varies, and what is to be shown."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from dat_lightning.core.errors import InputError
from dat_lightning.runs.configurations import named_by, read_yaml, with_bases

PlotKind = Literal["steps", "scatter", "curve", "radii", "values"]

# The arguments that a run's seed sets.
_SEEDS = ("seed_everything", "data.seed", "model.seed")

T = TypeVar("T")


@dataclass(frozen=True)
class Base:
    """What trainings have in common.

    Attributes:
        configs: YAML files, relative to the file of the study, which merge from left to right.
        arguments: Names of arguments, as on the command line, and their values.
        init_from: Name of the base whose last checkpoint, of the same seed, it starts from.
        seed: Its only seed; by default it is trained for each seed of the study.
        evaluation: Configurations of its test in the place of the study's, for a method that cannot have all of it.
    """

    configs: list[str]
    arguments: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    seed: int | None = None
    evaluation: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Variant:
    """One row of the result, a training for each seed.

    Attributes:
        name: Label in tables and plots.
        base: Name of its base; without arguments of its own it is that base.
        arguments: Those that differ.
        value: The number that is varied, for plots against it.
        group: Name of the curve, if any, that ``scatter`` joins it to others by.
    """

    name: str
    base: str
    arguments: dict[str, Any] = field(default_factory=dict)
    value: float | None = None
    group: str | None = None

    @property
    def folder(self) -> str:
        """Its place in the folder of the study."""
        return re.sub(r"[^\w.-]+", "_", self.name) if self.arguments else self.base


@dataclass(frozen=True)
class Evaluation:
    """How each variant is tested.

    Attributes:
        configs: As for a base; they are given after those of the training.
        after: Names of bases that must be trained before, because the configurations name their checkpoints.
    """

    configs: list[str]
    after: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        figure: Name of a figure of ``evaluation.json``, or of a curve, whose last value counts; ``max NAME`` is its
            largest, ``NAME num_steps`` the number of sampling steps that a figure was best with; ``train/seconds`` is
            how long the training logged, over all its lives.
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
        kind: ``steps``: a figure against the number of sampling steps; ``scatter``: against figure ``x``, variants of a
            ``group`` as a curve; ``curve``: a logged scalar against the training step; ``radii``: the figures
            ``{figure}_eps{ε}`` against ε; ``values``: a figure against the variants' ``value``.
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

    def seeds_of(self, variant: Variant) -> list[int]:
        """Returns the seeds that a variant is trained with."""
        seed = self.bases[variant.base].seed
        return self.seeds if seed is None else [seed]

    def folder(self, name: str, seed: int) -> str:
        """Returns the folder, in that of the study, of a base or of a variant's folder with a seed."""
        base = self.bases.get(name)
        return f"{name}/seed{seed if base is None or base.seed is None else base.seed}"

    def parent(self, name: str, seed: int) -> str | None:
        """Returns the folder of the training that one starts from, if it starts from any."""
        init_from = self.bases[self._training(name).base].init_from
        return None if init_from is None else self.folder(init_from, seed)

    def fit_arguments(self, name: str, seed: int, out: str) -> str:
        """Returns the arguments of ``fit`` for the training with this name and seed, for a shell.

        Args:
            name: Of a base, or a variant's folder.
            seed: The seed.
            out: Folder of the study.
        """
        variant = self._training(name)
        base = self.bases[variant.base]
        parent = self.parent(name, seed)
        arguments = {} if parent is None else {"model.init_from": f"{out}/{parent}/checkpoints/last.ckpt"}
        arguments |= dict.fromkeys(_SEEDS, seed) | base.arguments | variant.arguments
        arguments["trainer.default_root_dir"] = f"{out}/{self.folder(name, seed)}"
        return shlex.join([*self._given(base.configs), *_options(arguments)])

    def test_arguments(self, name: str, seed: int, out: str) -> str:
        """Returns the arguments of ``test`` for what a training has left, as :meth:`fit_arguments` does.

        The folder is said once more after the evaluation's files, of which one may name its own.
        """
        folder = f"{out}/{self.folder(name, seed)}"
        own = {"trainer.default_root_dir": folder, "ckpt_path": f"{folder}/checkpoints/last.ckpt"}
        given = shlex.join([*self._given(self.evaluation_configs(name)), *_options(own)])
        return f"{self.fit_arguments(name, seed, out)} {given}"

    def digest(self, name: str, seed: int) -> str:
        """Returns a hash of all that decides about a training: contents of files, arguments, and its parents'."""
        variant = self._training(name)
        base = self.bases[variant.base]
        before = None if base.init_from is None else self.digest(base.init_from, seed)
        return self._digest(base.configs, base.arguments, variant.arguments, seed, before)

    def evaluation_configs(self, name: str) -> list[str]:
        """Returns the configurations that a training with this name, of a base or a variant's folder, is tested by."""
        return self.bases[self._training(name).base].evaluation or self.evaluation.configs

    def evaluation_digest(self, name: str) -> str:
        """Returns a hash of how a training is tested."""
        return self._digest(self.evaluation_configs(name))

    def _digest(self, configs: list[str], *further: Any) -> str:
        contents = [*(_contents(named_by(self.path, config)) for config in configs), *further]
        return hashlib.sha256(json.dumps(contents, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _training(self, name: str) -> Variant:
        """The variant in a folder; a base is a variant without arguments."""
        found = (variant for variant in self.variants if variant.folder == name and variant.arguments)
        return next(found, Variant(name, name))

    def _given(self, configs: list[str]) -> list[str]:
        return [f"--config={os.path.normpath(named_by(self.path, config))}" for config in configs]


def read_study(path: Path) -> Study:
    """Returns the study in a file.

    Raises:
        FileNotFoundError: If the file, or a configuration that it names, is missing.
        InputError: If something in it is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no study at {path}")
    raw = read_yaml(path, yaml.safe_load)
    try:
        study = _built(Study, raw, "", {"path": path})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    for problem in _problems(study):
        raise InputError(f"{path}: {problem}")
    bases = study.bases.values()
    for configs in (study.evaluation.configs, *(c for base in bases for c in (base.configs, base.evaluation))):
        for config in configs:
            _contents(named_by(path, config))
    return study


def _built(kind: type[T], entry: Any, what: str, further: Mapping[str, Any] | None = None) -> T:
    """The dataclass that a mapping describes, with those inside it; ``further`` are fields that no file has."""
    if not isinstance(entry, dict):
        raise InputError(f"{what or 'the study'} must be a mapping, got {entry!r}")
    known = {each.name: each for each in fields(kind) if each.name not in (further or {})}  # type: ignore[arg-type]
    for name in entry:
        if name not in known:
            raise InputError(f"{what or 'the study'} has {name!r}, expected some of {list(known)}")
    for name, each in known.items():
        if name not in entry and each.default is MISSING and each.default_factory is MISSING:
            raise InputError(f"{what or 'the study'} lacks {name!r}")
    hints = get_type_hints(kind)
    values = {name: _checked(hints[name], value, f"{what}.{name}".lstrip(".")) for name, value in entry.items()}
    return kind(**values, **(further or {}))


def _checked(hint: Any, value: Any, what: str) -> Any:
    """A value of the type of a field, with the dataclasses inside it."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or (value is None and NoneType in inner):
        return value
    if isinstance(hint, type) and is_dataclass(hint):
        return _built(hint, value, what)
    if origin is UnionType:
        return _checked(inner[0], value, what)
    if origin is Literal:
        if value not in inner:
            raise InputError(f"{what} must be one of {inner}, got {value!r}")
        return value
    wanted = origin or hint
    # A yes is no number, though Python counts with it.
    if not (type(value) is wanted or (wanted is float and type(value) is int)):
        raise InputError(f"{what} must be {_WORDS[wanted]}, got {value!r}")
    if wanted is list:
        return [_checked(inner[0], each, f"{what}[{place}]") for place, each in enumerate(value)]
    if wanted is dict:
        names = [_checked(str, name, f"a name in {what}") for name in value]
        return {name: _checked(inner[1], value[name], f"{what}.{name}") for name in names}
    return value


_WORDS: Mapping[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


def _options(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments of the command line; what is no text is JSON, which is YAML."""
    return [f"--{k}={v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}" for k, v in arguments.items()]


def _contents(path: Path) -> list[Any]:
    """What a configuration says, and those that it is on top of."""
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    with_bases(path)  # says what is wrong with those
    contents = read_yaml(path, yaml.safe_load)
    return [contents, *(_contents(named_by(path, base)) if (base := contents.get("base")) else [])]


def _problems(study: Study) -> Iterator[str]:
    """What is wrong beyond names and types, as sentences."""
    seeds = study.seeds
    if not all(s >= 0 for s in seeds) or len(set(seeds)) < len(seeds):
        yield f"seeds must be different numbers of at least 0, got {seeds}"
    folders = [*study.bases, *(v.folder for v in study.variants if v.arguments)]
    if not study.variants or len({v.name for v in study.variants}) < len(study.variants):
        yield f"variants must have different names, and be at least one, got {[v.name for v in study.variants]}"
    if len(set(folders)) < len(folders):
        yield f"bases and variants must have different names of folders, got {folders}"
    for variant in study.variants:
        if variant.base not in study.bases:
            yield f"variant {variant.name!r} has base {variant.base!r}, expected one of {list(study.bases)}"
    named = [(f"base {name!r}", base.init_from) for name, base in study.bases.items() if base.init_from is not None]
    for what, name in [*named, *(("evaluation", name) for name in study.evaluation.after)]:
        if name not in study.bases:
            yield f"{what} comes after {name!r}, expected one of {list(study.bases)}"
    for name in study.bases:
        before = [name]
        while (start := study.bases[before[-1]].init_from) is not None:
            if start in before:
                yield f"base {name!r} starts from itself: {' from '.join([*before, start])}"
                break
            before.append(start)
    yield from _problems_of_plots(study)


def _problems_of_plots(study: Study) -> Iterator[str]:
    names = [variant.name for variant in study.variants]
    files = [plot.name for plot in study.plots]
    if len(set(files)) < len(files):
        yield f"plots must have different names, got {files}"
    for plot in study.plots:
        if not re.fullmatch(r"[\w-]+", plot.name):
            yield f"plot name {plot.name!r} must be letters, digits, _ and - alone, as it names a file"
        if plot.kind == "scatter" and plot.x is None:
            yield f"plot {plot.name!r} of kind scatter must have 'x'"
        if plot.kind == "curve" and plot.figure not in study.curves:
            yield f"plot {plot.name!r} shows curve {plot.figure!r}, expected one of curves: {study.curves}"
        if unknown := [name for name in plot.variants if name not in names]:
            yield f"plot {plot.name!r} shows variant {unknown[0]!r}, expected some of {names}"
        if plot.kind == "values" and not any(variant.value is not None for variant in study.variants):
            yield f"plot {plot.name!r} is against the variants' value, which none has"
