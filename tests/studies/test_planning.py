from pathlib import Path
from typing import Any

import pytest

from dat_lightning.studies import plan, read_study
from dat_lightning.studies.planning import Task, changed
from tests.studies.small import CONFIGS, contents, study, write


def names(tasks: Any) -> list[str]:
    return [task.name for task in tasks.values()]


def by_name(found: Any, name: str) -> Task:
    (task,) = [task for task in found.tasks.values() if task.name == name]
    return task  # type: ignore[no-any-return]


def test_every_variant_and_seed_is_trained_and_tested_and_what_they_start_from_once(tmp_path: Path) -> None:
    found = plan(study(tmp_path), Path("runs"))
    assert names(found.tasks) == [
        "first, seed 0",
        "short, seed 0",
        "short, seed 0: test",
        "first, seed 1",
        "short, seed 1",
        "short, seed 1: test",
        "long, seed 0",
        "long, seed 0: test",
        "long, seed 1",
        "long, seed 1: test",
    ]
    assert [(m.variant, m.seed) for m in found.members] == [("short", 0), ("short", 1), ("long", 0), ("long", 1)]
    seen: set[str] = set()
    for key, task in found.tasks.items():
        assert key == task.key
        assert set(task.needs) <= seen
        seen.add(key)


def test_configurations_have_seeds_arguments_and_places(tmp_path: Path) -> None:
    found = plan(study(tmp_path), Path("runs"))
    first, long, test = (by_name(found, name) for name in ("first, seed 1", "long, seed 1", "long, seed 1: test"))
    assert first.folder == Path("runs") / first.key
    assert long.config["seed_everything"] == 1
    assert long.config["data"]["init_args"]["seed"] == 1
    arguments = {"width": 8, "seed": 1, "steps": 4, "init_from": f"runs/{first.key}/checkpoints/last.ckpt"}
    assert long.config["model"]["init_args"] == arguments
    assert long.config["trainer"]["default_root_dir"] == f"runs/{long.key}"
    assert first.needs == ()
    assert long.needs == (first.key,)
    assert test.folder == long.folder / f"test-{test.key}"
    assert test.trained == long.checkpoint
    assert set(test.needs) == {long.key, first.key}
    assert test.config["trainer"] == {"max_epochs": 2, "default_root_dir": test.folder.as_posix()}
    assert test.config["model"] == long.config["model"]


def test_keys_follow_all_that_a_run_depends_on_and_not_its_name_or_place(tmp_path: Path) -> None:
    def keys(changes: dict[str, Any] | None = None, runs: str = "runs", **configs: Any) -> dict[tuple[str, int], Any]:
        found = plan(study(tmp_path, changes, **configs), Path(runs))
        return {(m.variant, m.seed): (m.training, m.test) for m in found.members}

    before = keys()
    assert len({key for pair in before.values() for key in pair}) == 8
    assert keys(runs="elsewhere") == before
    renamed = [{**variant, "name": f"{variant['name']}!"} for variant in contents()["variants"]]
    assert list(keys({"variants": renamed}).values()) == list(before.values())
    # A change of Stage 1 is one of what starts from it.
    other = keys(first={**CONFIGS["first"], "extra": 1})
    assert all(other[run][0] != before[run][0] for run in before)
    test_alone = keys(evaluation={**CONFIGS["evaluation"], "extra": 1})
    assert all(test_alone[run][0] == before[run][0] and test_alone[run][1] != before[run][1] for run in before)
    longer = keys({"variants": [contents()["variants"][0], {"name": "long", "base": "second"}]})
    assert longer["short", 0] == before["short", 0]
    assert longer["long", 0][0] != before["long", 0][0]


def test_studies_share_runs_of_equal_configuration(tmp_path: Path) -> None:
    variants = [
        {"name": "Stage 1", "base": "first"},
        {"name": "T 1", "base": "second", "arguments": {"model.steps": 1}},
    ]
    one = plan(study(tmp_path), Path("runs"))
    other = plan(study(tmp_path, {"variants": variants, "plots": []}), Path("runs"))
    assert by_name(other, "T 1, seed 0").key == by_name(one, "short, seed 0").key
    assert by_name(other, "Stage 1, seed 0").key == by_name(one, "first, seed 0").key


def test_a_variant_without_arguments_is_the_base_that_others_start_from(tmp_path: Path) -> None:
    variants = [{"name": "Stage 1", "base": "first"}, {"name": "Stage 2", "base": "second"}]
    found = plan(study(tmp_path, {"variants": variants, "seeds": [0], "plots": []}), Path("runs"))
    assert names(found.tasks) == [
        "Stage 1, seed 0",
        "Stage 1, seed 0: test",
        "Stage 2, seed 0",
        "Stage 2, seed 0: test",
    ]


def test_a_base_with_a_seed_of_its_own_is_trained_once(tmp_path: Path) -> None:
    bases = contents()["bases"]
    bases["first"]["seed"] = 5
    found = plan(study(tmp_path, {"bases": bases}), Path("runs"))
    assert by_name(found, "first, seed 5").config["seed_everything"] == 5
    needs = {by_name(found, f"short, seed {seed}").needs for seed in (0, 1)}
    assert needs == {(by_name(found, "first, seed 5").key,)}


def test_an_evaluation_may_need_a_checkpoint_too(tmp_path: Path) -> None:
    found = plan(
        study(tmp_path, evaluation={**CONFIGS["evaluation"], "judge": "{checkpoint:first}", "to": "{folder}/x"}),
        Path("runs"),
    )
    first, test = by_name(found, "first, seed 0"), by_name(found, "short, seed 0: test")
    assert test.config["judge"] == first.checkpoint.as_posix()
    assert test.config["to"] == f"{test.folder.as_posix()}/x"


def test_a_change_is_told_briefly() -> None:
    assert changed({"a": 1}, {"a": 2}) == "a: 1 → 2"
    assert changed(dict.fromkeys("abcde", 1), dict.fromkeys("abcde", 2)) == "a: 1 → 2; b: 1 → 2; c: 1 → 2; and 2 more"


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in contents().items() if key != name}


def base(**changes: Any) -> dict[str, Any]:
    bases = contents()["bases"]
    return {**contents(), "bases": {**bases, "second": {**bases["second"], **changes}}}


def with_plot(**changes: Any) -> dict[str, Any]:
    plot = {"name": "p", "kind": "scatter", "figure": "fid", "x": "accuracy", **changes}
    return {**contents(), "plots": [{key: value for key, value in plot.items() if value is not None}]}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (without("title"), "required: title"),
        ({**contents(), "seed": [0]}, "Option 'seed' is not accepted"),
        ({**contents(), "seeds": ["a"]}, "seeds: Expected a int. Got value: a"),
        ({**contents(), "seeds": []}, "seeds must be different numbers of at least 0, at least one, got []"),
        ({**contents(), "seeds": [1, 1]}, "seeds must be different numbers of at least 0, at least one, got [1, 1]"),
        ({**contents(), "variants": []}, "variants must have different names, and be at least one, got []"),
        (
            {**contents(), "variants": [{"name": "a", "base": "third"}]},
            "variant 'a' has base 'third', expected one of ['first', 'second']",
        ),
        (
            {**contents(), "variants": [{"name": "a", "base": "first"}, {"name": "a", "base": "second"}]},
            "variants must have different names, and be at least one, got ['a', 'a']",
        ),
        (base(configs=["nowhere.yaml"]), "no configuration at "),
        (base(configs=3), "configs: Expected a list"),
        (base(config=["a"]), "Option 'config' is not accepted"),
        (base(arguments={"model.x": "{checkpoint:third}"}), "uses {checkpoint:third}, expected one of ['first'"),
        (base(arguments={"model.x": "{checkpoint:second}"}), "base 'second' starts from its own checkpoint"),
        (base(arguments={"behave.x": 1}), 'argument behave.x leads through "well", expected a mapping'),
        (with_plot(kind="pie"), "'values']. Got value: pie"),
        (with_plot(x=None), "plot 'p' of kind scatter must have 'x'"),
        (with_plot(name="a/b"), "plot name 'a/b' must be letters, digits, _ and - alone"),
        (with_plot(kind="curve", figure="auc"), "plot 'p' shows curve 'auc', expected one of curves: ['train/r1']"),
        (with_plot(variants=["none"]), "plot 'p' shows variant 'none', expected some of ['short', 'long']"),
    ],
)  # fmt: skip
def test_a_wrong_study_is_a_sentence_that_names_the_file(wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_study(write(tmp_path, wrong))
    assert said in str(error.value)
    assert str(tmp_path) in str(error.value) or "argument" in str(error.value)
    assert "\n" not in str(error.value)


def test_values_against_a_number_need_numbers(tmp_path: Path) -> None:
    variants = [{"name": "a", "base": "first"}]
    plots = [{"name": "p", "kind": "values", "figure": "fid"}]
    with pytest.raises(ValueError, match="plot 'p' is against the variants' value, which none has"):
        study(tmp_path, {"variants": variants, "plots": plots})


def test_texts_of_arguments_stay_texts(tmp_path: Path) -> None:
    bases = contents()["bases"]
    bases["second"]["arguments"] = {"model.a": "1", "model.b": "{checkpoint:first}", "model.c": 1}
    assert study(tmp_path, {"bases": bases}).bases["second"].arguments == bases["second"]["arguments"]
