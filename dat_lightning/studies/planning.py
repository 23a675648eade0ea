"""What a study has to run: trainings and tests, each once, keyed by a hash of all that they depend on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dat_lightning.studies.configurations import (
    CHECKPOINT,
    FOLDER,
    differences,
    digest,
    fill,
    merge,
    merged,
    with_arguments,
)
from dat_lightning.studies.study_file import Base, Study, checkpoint_names

# What a seed is: of weights, of data order and augmentation, of random starts.
SEEDS = ("seed_everything", "data.seed", "model.seed")


@dataclass(frozen=True)
class Task:
    """A call of the command line.

    Attributes:
        key: Hash of the configuration and of the trainings that it starts from.
        name: For people.
        folder: Where everything goes; named by the key.
        config: The configuration, with places filled in.
        trained: The checkpoint to test; ``None`` for a training.
        needs: Keys of the trainings that must have ended before.
    """

    key: str
    name: str
    folder: Path
    config: Mapping[str, Any]
    trained: Path | None
    needs: tuple[str, ...]

    @property
    def checkpoint(self) -> Path:
        """Where a training leaves its last checkpoint."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def result(self) -> Path:
        """The file that shows that the task has ended."""
        return self.checkpoint if self.trained is None else self.folder / "evaluation.json"


@dataclass(frozen=True)
class Member:
    """A variant with one seed.

    Attributes:
        variant: Its name.
        seed: The seed.
        training: Key of its training.
        test: Key of its test.
    """

    variant: str
    seed: int
    training: str
    test: str


@dataclass(frozen=True)
class Plan:
    """All that a study runs.

    Attributes:
        study: The study.
        members: Variants and seeds.
        tasks: Key → task; each stands after those that it needs.
    """

    study: Study
    members: tuple[Member, ...]
    tasks: Mapping[str, Task]


def plan(study: Study, runs: Path) -> Plan:
    """Returns what a study has to run.

    Args:
        study: The study.
        runs: Folder of all runs, which several studies may share.

    Raises:
        FileNotFoundError: If a configuration is missing.
        InputError: If one is damaged, or an argument leads nowhere.
    """
    planner = _Planner(study, runs)
    members = []
    for variant in study.variants:
        base = study.bases[variant.base]
        for seed in study.seeds if base.seed is None else [base.seed]:
            training = planner.training(variant.base, variant.arguments, seed, variant.name)
            test = planner.test(training, seed, variant.name)
            members.append(Member(variant.name, seed, training.key, test.key))
    return Plan(study, tuple(members), planner.tasks)


class _Planner:
    """Collects tasks while a study is gone through."""

    def __init__(self, study: Study, runs: Path) -> None:
        self.study = study
        self.runs = runs
        self.tasks: dict[str, Task] = {}
        # Key → configuration with its places, so that keys do not depend on where runs lie.
        self._open: dict[str, Mapping[str, Any]] = {}
        self._evaluation = merged(
            [study.path.parent / config for config in study.evaluation.configs], study.evaluation.arguments
        )

    def training(self, name: str, arguments: Mapping[str, Any], seed: int, words: str) -> Task:
        """Returns the training of a base with arguments; those that it starts from come before."""
        base: Base = self.study.bases[name]
        seed = seed if base.seed is None else base.seed
        config = with_arguments(self.study.base_config(name), dict.fromkeys(SEEDS, seed) | dict(arguments))
        return self._task(config, seed, f"{words}, seed {seed}", None)

    def test(self, training: Task, seed: int, words: str) -> Task:
        """Returns the test of what a training leaves."""
        config = merge(self._open[training.key], self._evaluation)
        return self._task(config, seed, f"{words}, seed {seed}: test", training)

    def _task(self, config: Mapping[str, Any], seed: int, words: str, training: Task | None) -> Task:
        parents = {name: self.training(name, {}, seed, name) for name in sorted(checkpoint_names(config))}
        hashed = fill(config, lambda text: CHECKPOINT.sub(lambda m: f"{{checkpoint:{parents[m[1]].key}}}", text))
        key = digest({"config": hashed, "trained": None if training is None else training.key})
        folder = self.runs / key if training is None else training.folder / f"test-{key}"
        if key not in self.tasks:

            def place(text: str) -> str:
                text = CHECKPOINT.sub(lambda match: parents[match[1]].checkpoint.as_posix(), text)
                return text.replace(FOLDER, folder.as_posix())

            trained = None if training is None else training.checkpoint
            self._open[key] = config
            needs = [] if training is None else [training.key]
            needs += [parent.key for parent in parents.values()]
            self.tasks[key] = Task(key, words, folder, fill(config, place), trained, tuple(dict.fromkeys(needs)))
        return self.tasks[key]


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns what differs between a configuration that was run before and one that is to be run, briefly."""
    found = list(differences(before, now))
    shown = "; ".join(found[:3])
    return shown if len(found) <= 3 else f"{shown}; and {len(found) - 3} more"
