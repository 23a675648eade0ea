"""The studies that ship with the package: each plans, and all that it gives the command line is accepted there."""

import copy
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule

import dat_lightning
from dat_lightning import DualAdversarialModule, EnergyModule, ImageDataModule, TinyImages, UniformNoise
from dat_lightning.cli import DATCLI, DATArgumentParser
from dat_lightning.studies import Plan, plan, read_study
from dat_lightning.studies.planning import Task
from tests.recipes import write_all
from tests.test_configs import instantiate

STUDIES = Path(dat_lightning.__file__).parents[1] / "configs" / "studies"
NAMES = ("counterfactuals", "implicit_r1", "ood_sensitivity", "trade_off")
FILES = [STUDIES / folder / f"{name}.yaml" for folder in ("cifar10_small", "digits") for name in NAMES] + [
    STUDIES / "digits" / "soak.yaml",
    STUDIES / "digits" / "speed.yaml",
    STUDIES / "cifar10_small" / "precision.yaml",
]

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")

# Keys of what the parser has taken already: studies share runs.
_TAKEN: set[str] = set()


class Parsing(DATCLI):
    """The command line, up to where it would make anything."""

    def instantiate_classes(self) -> None:
        pass


@lru_cache(maxsize=1)
def parser() -> Any:
    """The command line's parser, which takes seconds to make."""
    cli = Parsing(
        EnergyModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_class=DATArgumentParser,
        parser_kwargs={"exit_on_error": False},
        run=False,
        args=["--config", str(STUDIES.parent / "digits" / "stage1.yaml")],
    )
    return cli.parser


@cache
def planned(file: Path) -> Plan:
    return plan(read_study(file), Path("runs"))


def name_of(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def of_first_seed(found: Plan) -> Iterator[Task]:
    first = found.study.seeds[0]
    for member in found.members:
        if member.seed == first:
            yield found.tasks[member.training]
            yield found.tasks[member.test]


def callbacks_of(task: Task) -> dict[str, Any]:
    entries = task.config["trainer"]["callbacks"]
    return {entry["class_path"].rpartition(".")[2]: entry.get("init_args", {}) for entry in entries}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_study_plans_and_the_command_line_takes_all_of_it(file: Path) -> None:
    found = planned(file)
    assert len(found.members) == len(found.study.variants) * len(found.study.seeds)
    keys = {(member.training, member.test) for member in found.members}
    assert len(keys) == len(found.members), "two variants are the same run"
    for task in of_first_seed(found):
        if task.key not in _TAKEN:
            # A copy: the parser changes what it gets.
            parser().parse_object(copy.deepcopy(dict(task.config)))
            _TAKEN.add(task.key)
        trainer = task.config["trainer"]
        assert trainer["default_root_dir"] == task.folder.as_posix()
        callbacks = callbacks_of(task)
        if task.trained is None:
            saver = callbacks["ModelCheckpoint"]
            assert Path(saver["dirpath"]) / f"{saver['filename']}.ckpt" == task.checkpoint
        else:
            assert callbacks["EvaluationReport"]["path"] == task.result.as_posix()
        assert "{" not in yaml.safe_dump(dict(task.config), default_flow_style=False).replace("{}", "")


def test_the_command_line_would_have_refused_a_wrong_argument() -> None:
    task = next(of_first_seed(planned(FILES[-1])))
    model = {**task.config["model"], "init_args": {**task.config["model"]["init_args"], "r1_wait": 1}}
    with pytest.raises(Exception, match="r1_wait"):
        parser().parse_object(copy.deepcopy({**task.config, "model": model}))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_what_a_study_shows_is_measured(file: Path) -> None:
    study = read_study(file)
    test = next(task for task in of_first_seed(planned(file)) if task.trained is not None)
    callbacks = callbacks_of(test)
    known = {*study.curves, *(f"max {name}" for name in study.curves), "accuracy"}
    if "SampleMetrics" in callbacks:
        known |= {"fid", "fid num_steps", "precision", "recall"}
    if "LabelAgreement" in callbacks:
        known.add("label_agreement")
    for t in callbacks.get("RobustAccuracy", {}).get("threat_models", []):
        known.add(f"robust_accuracy_{t['norm']}_{t['eps']:g}_{t['num_steps']}x{t['step_size']:g}")
    search = callbacks.get("Counterfactuals", {})
    what = ["success", "confidence", "fid", *(["plausibility"] if "judge" in search else [])]
    for eps in search.get("eps", []):
        known |= {f"counterfactual_{name}_uniform{end}" for name in what for end in ("", f"_eps{eps:g}")}
    shown = {column.figure for column in study.columns} | {plot.figure for plot in study.plots}
    shown |= {plot.x for plot in study.plots if plot.x is not None}
    assert shown <= known


def test_studies_on_digits_share_what_is_the_same() -> None:
    trained = {
        name: {key for key, task in planned(STUDIES / "digits" / f"{name}.yaml").tasks.items() if task.trained is None}
        for name in NAMES
    }
    # Stage 1 of seed 0, and a form of Stage 2 with one of the others.
    assert len(set.intersection(*trained.values())) == 1
    for name in NAMES:
        assert any(len(trained[name] & trained[other]) >= 2 for other in NAMES if other != name)


@pytest.mark.parametrize("variant", ["1 %", "noise"])
def test_stage_2_of_the_ood_study_on_cifar_instantiates(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path / "data", monkeypatch)
    found = planned(STUDIES / "cifar10_small" / "ood_sensitivity.yaml")
    member = next(member for member in found.members if member.variant == variant)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(dict(found.tasks[member.training].config)), encoding="utf-8")
    cli = instantiate(
        config,
        *("--trainer.accelerator=cpu", "--trainer.precision=32", "--data.init_args.num_held_out=20"),
        "--data.init_args.max_ood_samples=90",
    )
    assert isinstance(cli.model, DualAdversarialModule)
    assert isinstance(cli.datamodule, ImageDataModule)
    seeds: Any = cli.datamodule.out_of_distribution("train")
    while hasattr(seeds, "dataset"):
        seeds = seeds.dataset
    assert isinstance(seeds, UniformNoise if variant == "noise" else TinyImages)
