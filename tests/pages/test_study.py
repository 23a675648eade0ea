"""What a study's page, table and plots say of the runs' files."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary as Proto
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from dat_lightning.pages.study import cell, main, markdown, table, write_study
from dat_lightning.pages.study_file import Column, Study, read_study
from dat_lightning.pages.study_plots import draw, lines
from dat_lightning.pages.study_results import Result, Summary, collect, figures_of, summaries, summary, sweeps_of
from dat_lightning.results import Evaluation, Measurement, write_evaluation


def contents() -> dict[str, Any]:
    """A study of two variants of one base that starts from another, and two seeds."""
    return {
        "title": "A study",
        "question": "Does it run?",
        "seeds": [0, 1],
        "bases": {
            "first": {"configs": ["first.yaml"]},
            "second": {"configs": ["sub/second.yaml"], "arguments": {"model.width": 8}, "init_from": "first"},
        },
        "variants": [
            {"name": "short", "base": "second", "value": 1, "arguments": {"model.steps": 1}},
            {"name": "long one", "base": "second", "value": 4, "arguments": {"model.steps": 4}},
        ],
        "evaluation": {"configs": ["evaluation.yaml"]},
        "columns": [{"figure": "fid", "words": "distance"}, {"figure": "accuracy", "words": "hits", "percent": True}],
        "plots": [{"name": "both", "kind": "scatter", "figure": "accuracy", "x": "fid"}],
        "curves": ["train/r1"],
    }


def write(folder: Path, study: Any, **configs: Any) -> Path:
    """Writes a study with its configurations; returns its file."""
    (folder / "sub").mkdir(exist_ok=True)
    second = {"base": "../first.yaml", "b": 2}
    for name, config in {"first": {"a": 1}, "sub/second": second, "evaluation": {"c": 3}, **configs}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def study(folder: Path, changes: dict[str, Any] | None = None, **configs: Any) -> Study:
    return read_study(write(folder, {**contents(), **(changes or {})}, **configs))


def result(variant: str, seed: int, **kwargs: Any) -> Result:
    return Result(variant, seed, **{"value": None, "folder": f"{variant}/seed{seed}", "done": True, **kwargs})


# What is run.


def test_a_training_gets_files_arguments_seeds_and_what_it_starts_from(tmp_path: Path) -> None:
    found = study(tmp_path)
    assert found.fit_arguments("first", 1, "out") == (
        f"--config={tmp_path}/first.yaml --seed_everything=1 --data.seed=1 --model.seed=1"
        " --trainer.default_root_dir=out/first/seed1"
    )
    assert found.fit_arguments("long_one", 0, "out") == (
        f"--config={tmp_path}/sub/second.yaml --model.init_from=out/first/seed0/checkpoints/last.ckpt"
        " --seed_everything=0 --data.seed=0 --model.seed=0 --model.width=8 --model.steps=4"
        " --trainer.default_root_dir=out/long_one/seed0"
    )
    assert found.test_arguments("long_one", 0, "out") == (
        f"{found.fit_arguments('long_one', 0, 'out')} --config={tmp_path}/evaluation.yaml"
        " --trainer.default_root_dir=out/long_one/seed0"  # whatever the file of the evaluation says
        " --ckpt_path=out/long_one/seed0/checkpoints/last.ckpt"
    )
    assert (found.parent("long_one", 1), found.parent("first", 1)) == ("first/seed1", None)


def test_a_base_with_a_seed_of_its_own_is_trained_once(tmp_path: Path) -> None:
    bases = contents()["bases"]
    bases["first"]["seed"] = 5
    found = study(tmp_path, {"bases": bases})
    assert {found.parent("short", seed) for seed in (0, 1)} == {"first/seed5"}


def test_values_are_what_they_are_in_the_file(tmp_path: Path) -> None:
    ood = {"class_path": "a.Noise", "init_args": {"shape": [3, 8]}}
    variant = {"name": "it's", "base": "first", "arguments": {"data.ood": ood, "a": "1e-3", "b": True, "c": None}}
    given = study(tmp_path, {"variants": [variant]}).fit_arguments("it_s", 0, "out")
    assert """'--data.ood={"class_path": "a.Noise", "init_args": {"shape": [3, 8]}}'""" in given
    assert "--a=1e-3 --b=true --c=null" in given


def test_a_digest_follows_all_that_a_training_depends_on(tmp_path: Path) -> None:
    def digests(changes: dict[str, Any] | None = None, **configs: Any) -> dict[tuple[str, int], str]:
        found = study(tmp_path, changes, **configs)
        return {(name, seed): found.digest(name, seed) for name in ("first", "short", "long_one") for seed in (0, 1)}

    before = digests()
    assert len(set(before.values())) == 6
    assert digests({"title": "other", "columns": []}) == before
    # A file that another one is on top of, and that the training that it starts from is made of.
    other = digests(first={"a": 2})
    assert all(other[run] != before[run] for run in before)
    longer = [*contents()["variants"][:1], {**contents()["variants"][1], "arguments": {"model.steps": 5}}]
    assert {run for run, digest in digests({"variants": longer}).items() if digest != before[run]} == {
        ("long_one", 0),
        ("long_one", 1),
    }
    changed = study(tmp_path, evaluation={"c": 4}).evaluation_digest("first")
    assert changed != study(tmp_path).evaluation_digest("first")


def test_a_base_may_have_a_test_of_its_own(tmp_path: Path) -> None:
    common = study(tmp_path)
    own = study(tmp_path, base(evaluation=["first.yaml"]))
    assert own.test_arguments("first", 0, "out") == common.test_arguments("first", 0, "out")
    for name in ("second", "short"):
        given = own.test_arguments(name, 0, "out")
        folder = f"out/{name}/seed0"
        said = f"--trainer.default_root_dir={folder} --ckpt_path={folder}/checkpoints/last.ckpt"
        assert given.endswith(f"first.yaml {said}")
        assert "evaluation.yaml" not in given
        assert own.evaluation_digest(name) != common.evaluation_digest(name) == common.evaluation_digest("first")


def base(**changes: Any) -> dict[str, Any]:
    bases = contents()["bases"]
    return {**contents(), "bases": {**bases, "second": {**bases["second"], **changes}}}


def variants(*given: dict[str, Any]) -> dict[str, Any]:
    return {**contents(), "variants": list(given)}


def plot(**changes: Any) -> dict[str, Any]:
    return {**contents(), "plots": [{"name": "p", "kind": "steps", "figure": "fid", **changes}]}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([1], "the study must be a mapping, got [1]"),
        ({k: v for k, v in contents().items() if k != "title"}, "the study lacks 'title'"),
        ({**contents(), "seed": [0]}, "the study has 'seed', expected some of ['title', 'question', "),
        ({**contents(), "title": None}, "title must be a text, got None"),
        ({**contents(), "columns": [{"figure": "fid", "words": 3}]}, "columns[0].words must be a text, got 3"),
        ({**contents(), "bases": {3: {"configs": []}}}, "a name in bases must be a text, got 3"),
        ({**contents(), "evaluation": {"configs": [None]}}, "evaluation.configs[0] must be a text, got None"),
        (
            {**contents(), "evaluation": {"configs": [], "afterwards": []}},
            "evaluation has 'afterwards', expected some of",
        ),
        ({**contents(), "seeds": ["a"]}, "seeds[0] must be a whole number, got 'a'"),
        ({**contents(), "seeds": [True]}, "seeds[0] must be a whole number, got True"),
        ({**contents(), "seeds": [0, -1]}, "seeds must be different numbers of at least 0, got [0, -1]"),
        ({**contents(), "seeds": [1, 1]}, "seeds must be different numbers of at least 0, got [1, 1]"),
        ({**contents(), "seeds": 3}, "seeds must be a list, got 3"),
        (variants(), "variants must have different names, and be at least one, got []"),
        (variants({"name": "a", "base": "third"}), "variant 'a' has base 'third', expected one of ['first', 'second']"),
        (variants({"name": "first", "base": "first", "arguments": {"a": 1}}), "different names of folders, got"),
        (
            variants({"name": "a", "base": "first", "arguments": [1]}),
            "variants[0].arguments must be a mapping, got [1]",
        ),
        (variants({"name": 3, "base": "first"}), "variants[0].name must be a text, got 3"),
        (variants({"name": "a", "base": ["b"]}), "variants[0].base must be a text, got ['b']"),
        (variants({"name": "a", "base": "first", "value": "x"}), "variants[0].value must be a number, got 'x'"),
        (variants({"name": "a"}), "variants[0] lacks 'base'"),
        (variants("a"), "variants[0] must be a mapping, got 'a'"),  # type: ignore[arg-type]
        (base(init_from=["b"]), "bases.second.init_from must be a text, got ['b']"),
        (base(seed="x"), "bases.second.seed must be a whole number, got 'x'"),
        (base(configs=["first.yaml", 3]), "bases.second.configs[1] must be a text, got 3"),
        (base(arguments={3: 4}), "a name in bases.second.arguments must be a text, got 3"),
        (plot(name=1), "plots[0].name must be a text, got 1"),
        (plot(log="yes"), "plots[0].log must be true or false, got 'yes'"),
        (plot(variants="short"), "plots[0].variants must be a list, got 'short'"),
        (base(init_from="third"), "base 'second' comes after 'third', expected one of ['first', 'second']"),
        (base(init_from="second"), "base 'second' starts from itself: second from second"),
        (base(configs="second.yaml"), "bases.second.configs must be a list, got 'second.yaml'"),
        (base(configs=["nowhere.yaml"]), "no configuration at"),
        (plot(name="a/b"), "plot name 'a/b' must be letters, digits, _ and - alone, as it names a file"),
        (plot(kind="bars"), "plots[0].kind must be one of ('steps', "),
        (plot(kind="scatter"), "plot 'p' of kind scatter must have 'x'"),
        (plot(kind="curve", figure="train/auc"), "plot 'p' shows curve 'train/auc', expected one of curves"),
        (plot(variants=["longer"]), "plot 'p' shows variant 'longer', expected some of ['short', 'long one']"),
    ],
)
def test_a_wrong_study_is_a_sentence_that_names_the_file(wrong: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_study(write(tmp_path, wrong))
    assert said in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("study.yaml", b"title: a\ntitle: b\n", ", line 2 is no YAML: the key 'title' stands in line 1 already"),
        ("study.yaml", "title: a\n".encode("utf-16"), " is no text in UTF-8"),
        ("study.yaml", b"title: 2001-99-99\n", " is no YAML: month must be in 1..12"),
        ("first.yaml", b"a: 1  # caf\xe9\n", " is no text in UTF-8"),
        ("first.yaml", b"a: 1\na: 2\n", ", line 2 is no YAML: the key 'a' stands in line 1 already"),
        ("first.yaml", b"base: sub/second.yaml\n", " is its own base: "),
    ],
)
def test_files_that_are_no_yaml_are_a_sentence(name: str, wrong: bytes, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, contents())
    (tmp_path / name).write_bytes(wrong)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}{said}")) as error:
        read_study(path)
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


# What is read.


@pytest.mark.parametrize("values", [[1.5, 2.25, 7.0], [0.1, 0.1], [-3.0, 4.0, 0.0, 1e6]])
def test_mean_and_deviation_are_those_of_a_sample(values: list[float]) -> None:
    found = summary(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.sd == pytest.approx(np.std(values, ddof=1), rel=1e-12, abs=1e-15)
    assert found.values == tuple(values)


def test_one_seed_has_no_deviation_and_what_is_not_finite_no_mean() -> None:
    assert summary([3.0]).sd is None
    exploded = summary([1.0, math.inf])
    assert math.isnan(exploded.mean)
    assert exploded.values == (1.0, math.inf)


def test_figures_of_single_step_counts_are_left_to_the_sweep() -> None:
    details = {"num_steps": 10, "sweep_steps": [5, 10], "sweep": [4.0, 3.0]}
    entries = [
        Measurement("fid", 3.0, "p", 8, details),
        Measurement("fid_5_steps", 4.0, "p", 8, {"num_steps": 5}),
        Measurement("accuracy", 0.5, "p", 8),
    ]
    evaluation = Evaluation("e", entries)
    assert figures_of(evaluation) == {"fid": 3.0, "fid num_steps": 10.0, "accuracy": 0.5}
    assert sweeps_of(evaluation) == {"fid": {"steps": [5, 10], "values": [4.0, 3.0]}}


def test_what_an_edit_has_after_each_step_is_a_sweep_from_none_on() -> None:
    details: dict[str, Any] = {"after_each_step": [17.5, 19.0, 18.0]}
    edited = Measurement("edit_psnr_known", 18.0, "p", 8, details)
    plain = Measurement("edit_psnr_simple", 17.5, "p", 8, {"after_each_step": []})
    assert sweeps_of(Evaluation("e", [edited, plain])) == {
        "edit_psnr_known": {"steps": [0, 1, 2], "values": [17.5, 19.0, 18.0]}
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Files of a study: seeds differ, one run has not been tested."""
    numbers = {("short", 0): 1.0, ("short", 1): 2.0, ("long_one", 0): 4.0, ("long_one", 1): math.inf}
    for (name, seed), fid in numbers.items():
        folder = tmp_path / "out" / name / f"seed{seed}"
        writer = EventFileWriter(str(folder / "logs" / "version_0"))
        for step, value in {1: 2.0, 2: 12.0, 3: 1.0}.items():
            scalar = Proto(value=[Proto.Value(tag="train/r1", simple_value=value)])
            writer.add_event(Event(step=step, wall_time=5.0 * step, summary=scalar))
        writer.close()
        if math.isfinite(fid):
            entries = [
                Measurement("fid", fid, "by hand", 8, better="lower"),
                Measurement("accuracy", fid / 10, "by hand", 8),
            ]
            write_evaluation(folder / "evaluation.json", Evaluation("t", entries, {"device": "cpu"}))
    return tmp_path / "out"


def test_runs_are_collected_with_figures_and_curves(out: Path, tmp_path: Path) -> None:
    rows = collect(study(tmp_path), out)
    assert [(r.variant, r.seed, r.value, r.done) for r in rows] == [
        ("short", 0, 1, True),
        ("short", 1, 1, True),
        ("long one", 0, 4, True),
        ("long one", 1, 4, False),
    ]
    trained = {"train/r1": 1.0, "max train/r1": 12.0, "train/seconds": 10.0}
    assert rows[2].figures == {"fid": 4.0, "accuracy": 0.4, **trained}
    assert rows[2].folder == "long_one/seed0"
    assert rows[2].provenance == {"device": "cpu"}
    assert rows[2].better == {"fid": "lower"}
    # The mean of a table is not to mix what ended with what did not; its curve is there.
    assert rows[3].figures == {}
    assert rows[3].curves == {"train/r1": {"steps": [1.0, 2.0, 3.0], "values": [2.0, 12.0, 1.0]}}
    fid = summaries(rows, "short")["fid"]
    assert (fid.mean, fid.values) == (1.5, (1.0, 2.0))
    assert fid.sd == pytest.approx(math.sqrt(0.5))


def test_a_test_that_failed_counts_as_none(out: Path, tmp_path: Path) -> None:
    failed = Evaluation("t", [Measurement("fid", 99.0, "by hand", 8)], failure="ValueError: no")
    write_evaluation(out / "short" / "seed1" / "evaluation.json", failed)
    rows = collect(study(tmp_path), out)
    assert [row.done for row in rows] == [True, False, True, False]
    assert summaries(rows, "short")["fid"].values == (1.0,)


def test_one_command_writes_all_from_the_files_that_are_there(out: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(out / "short" / "seed0" / "grid.png")
    plots = [*contents()["plots"], {"name": "missing", "kind": "steps", "figure": "kid"}]
    changes = {"plots": plots, "pictures": ["grid"], "title": "A <study>"}
    study(tmp_path, changes)
    main([str(tmp_path / "study.yaml"), "--out", str(out)])
    page = (out / "study.html").read_text()
    assert "<h1>A &lt;study&gt;</h1>" in page
    assert "<td>15.0 ± 7.1 %</td>" in page
    assert "long one, seed 1 is missing" in page
    assert "plot missing is missing: no run has kid" in page
    assert "--trainer.default_root_dir=" in page
    assert page.count("data:image/png") == 1
    assert page.count("data:image/svg+xml") == 2
    assert not re.search(r'(src|href|srcset)="(?!data:)', page)
    assert (out / "table.md").read_text() == (
        "|  | distance | hits |\n| --- | --- | --- |\n"
        "| short | 1.50 ± 0.71 | 15.0 ± 7.1 % |\n| long one (1 of 2 seeds) | 4 | 40.0 % |\n"
    )
    read = json.loads((out / "study.json").read_text())
    assert read["variants"][0]["figures"]["fid"] == {"mean": 1.5, "sd": pytest.approx(0.5**0.5), "values": [1.0, 2.0]}
    assert [run["seed"] for run in read["runs"]] == [0, 1, 0, 1]
    with Image.open(out / "both.png") as drawn:
        assert drawn.size[0] > 500


@pytest.mark.parametrize(("name", "said"), [("nowhere.yaml", "no study at"), ("study.yaml", "no run of")])
def test_nothing_to_tell_is_a_sentence(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert stop.value.code == 1
    assert said in capsys.readouterr().err


# What is shown.


def shown(tmp_path: Path, given: dict[str, Any]) -> Any:
    found = study(tmp_path, {"plots": [{"name": "p", **given}]})
    return found, found.plots[0]


def test_a_sweep_is_the_mean_over_seeds_with_its_deviation(tmp_path: Path) -> None:
    found, each = shown(tmp_path, {"kind": "steps", "figure": "fid"})
    sweeps = [{"fid": {"steps": [5.0, 10.0], "values": values}} for values in ([1.0, 4.0], [3.0, 4.0])]
    rows = [result("long one", seed, sweeps=sweep) for seed, sweep in enumerate(sweeps)]
    (line,) = lines(found, each, rows)
    assert (line.name, line.x, line.y) == ("long one", (5.0, 10.0), (2.0, 4.0))
    assert line.low == pytest.approx((2 - 2**0.5, 4.0))
    assert line.high == pytest.approx((2 + 2**0.5, 4.0))


def test_on_a_logarithmic_axis_means_are_those_of_logarithms(tmp_path: Path) -> None:
    found, each = shown(tmp_path, {"kind": "curve", "figure": "train/r1", "log": True})
    rows = [result("short", s, curves={"train/r1": {"steps": [1.0], "values": [v]}}) for s, v in enumerate((1, 100))]
    (line,) = lines(found, each, rows)
    factor = 10 ** (2**0.5)  # the deviation of 0 and 2
    assert (*line.y, *line.low, *line.high) == pytest.approx((10.0, 10 / factor, 10 * factor))
    # What has no logarithm has no place on the axis.
    rows.append(result("short", 2, curves={"train/r1": {"steps": [1.0], "values": [0.0]}}))
    (line,) = lines(found, each, rows)
    assert [math.isnan(v) for v in (*line.y, *line.low, *line.high)] == [True] * 3


def test_curves_keep_each_seed(tmp_path: Path) -> None:
    found, each = shown(tmp_path, {"kind": "curve", "figure": "train/r1"})
    rows = [result("short", s, curves={"train/r1": {"steps": [1.0], "values": [2.0 + s]}}) for s in range(2)]
    seeds = (((1.0,), (2.0,)), ((1.0,), (3.0,)))
    (line,) = lines(found, each, rows)
    assert (line.y, line.single) == ((2.5,), seeds)
    # A seed that has not been run is no curve.
    (line,) = lines(found, each, [*rows, result("short", 2, done=False)])
    assert (line.y, line.single) == ((2.5,), seeds)


@pytest.mark.parametrize("steps", [[50.0, 100.0], [50.0, 100.0, 200.0]])
def test_each_seed_is_drawn_where_it_has_logged(steps: list[float], tmp_path: Path) -> None:
    """One was interrupted: equally many points at other steps, or more of them."""
    found, each = shown(tmp_path, {"kind": "curve", "figure": "train/r1"})
    curves = [{"steps": [50.0, 150.0], "values": [2.0, 6.0]}, {"steps": steps, "values": [4.0, 5.0, 8.0][: len(steps)]}]
    rows = [result("short", seed, curves={"train/r1": curve}) for seed, curve in enumerate(curves)]
    mean, *seeds = [tuple(map(list, line.get_data())) for line in draw(found, each, rows).axes[0].lines]
    assert mean == (sorted({*steps, 150.0}), [3.0, 5.0, 6.0, 8.0][: len(steps) + 1])
    assert seeds == [(curve["steps"], curve["values"]) for curve in curves]


def test_radii_are_read_from_names(tmp_path: Path) -> None:
    found, each = shown(tmp_path, {"kind": "radii", "figure": "success"})
    figures = {"success_eps4": 0.75, "success_eps0.5": 0.25, "success_eps4_steps": 9.0, "other_success_eps1": 9.0}
    (line,) = lines(found, each, [result("short", 0, figures=figures)])
    assert (line.x, line.y) == ((0.5, 4.0), (0.25, 0.75))


def test_values_and_figures_give_points(tmp_path: Path) -> None:
    rows = [
        result("short", 0, figures={"fid": 3.0, "hits": 0.5}),
        result("long one", 0, figures={"fid": 2.0, "hits": 0.25}),
    ]
    found, each = shown(tmp_path, {"kind": "values", "figure": "fid"})
    assert [(line.x, line.y) for line in lines(found, each, rows)] == [((1.0, 4.0), (3.0, 2.0))]
    found, each = shown(tmp_path, {"kind": "scatter", "figure": "hits", "x": "fid"})
    assert [(line.x, line.y) for line in lines(found, each, rows)] == [((3.0, 2.0), (0.5, 0.25))]


@pytest.mark.parametrize("log", [False, True])
def test_bars_of_points_reach_from_the_least_seed_to_the_largest(log: bool, tmp_path: Path) -> None:
    """A deviation of 12.6 around 13.7 would reach below any of them; of equal numbers, 0.1 thrice, the mean is more."""
    numbers = {"fid": (5.4, 7.4, 28.2), "hits": (0.1, 0.1, 0.1)}
    rows = [result("short", k, figures={name: each[k] for name, each in numbers.items()}) for k in range(3)]
    for settings in ({"kind": "values", "figure": "fid"}, {"kind": "scatter", "figure": "hits", "x": "fid"}):
        found, each = shown(tmp_path, {**settings, "log": log, "log_x": log})
        axes = draw(found, each, rows).axes[0]
        bars = [segment for bar in axes.collections for segment in np.asarray(bar.get_segments())]
        reach = [(*bar.min(0), *bar.max(0)) for bar in bars]
        mean = pytest.approx(41 / 3)
        if settings["kind"] == "values":
            assert reach == [pytest.approx((1.0, 5.4, 1.0, 28.2))]
            assert axes.lines[0].get_ydata()[0] == mean
        else:
            assert reach == [pytest.approx((5.4, 0.1, 28.2, 0.1)), pytest.approx((41 / 3, 0.1, 41 / 3, 0.1))]
            assert axes.lines[0].get_data() == (mean, pytest.approx(0.1))


@pytest.mark.parametrize("kind", ["steps", "curve", "scatter"])
def test_no_two_of_many_variants_look_alike(kind: str, tmp_path: Path) -> None:
    names = [f"v{k}" for k in range(22)]
    plots = [{"name": "p", "kind": kind, "figure": "r1", "x": "cost"}]
    variants = [{"name": name, "base": "first"} for name in names]
    found = study(tmp_path, {"variants": variants, "plots": plots, "curves": ["r1"]})
    points = {"r1": {"steps": [1.0, 2.0], "values": [1.0, 2.0]}}
    figures = {"cost": 1.0, "r1": 2.0}
    rows = [result(name, 0, sweeps=points, curves=points, figures=figures) for name in names]
    drawn = draw(found, found.plots[0], rows).axes[0].lines
    # No single seed, and no cap of a bar, which has a marker as well.
    drawn = [
        line for line in drawn if (line.get_marker() in "os^D" if kind == "scatter" else line.get_label() in names)
    ]
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn]
    assert len(looks) == len(set(looks)) == len(names)


def test_a_plot_shows_the_variants_that_it_names(tmp_path: Path) -> None:
    found, each = shown(tmp_path, {"kind": "steps", "figure": "fid", "variants": ["long one"]})
    sweep = {"fid": {"steps": [1.0], "values": [1.0]}}
    rows = [result(name, 0, sweeps=sweep) for name in ("short", "long one")]
    assert [line.name for line in lines(found, each, rows)] == ["long one"]


def test_an_axis_says_what_the_evaluator_calls_better(tmp_path: Path) -> None:
    better = {"fid": "lower", "success_eps0.5": "higher", "success_eps2": "higher"}
    figures = {"fid": 3.0, "success_eps0.5": 0.25, "success_eps2": 0.5, "r1": 2.0}
    rows = [result("short", 0, figures=figures, better=better, value=1.0)]
    shapes = [
        ({"kind": "values", "figure": "fid"}, "fid (lower is better)"),
        ({"kind": "radii", "figure": "success", "words": "share"}, "share (higher is better)"),
        ({"kind": "values", "figure": "r1"}, "r1"),
    ]
    for settings, expected in shapes:
        found, each = shown(tmp_path, settings)
        assert draw(found, each, rows).axes[0].get_ylabel() == expected


def test_what_is_drawn_is_what_the_lines_say(tmp_path: Path) -> None:
    found, each = shown(
        tmp_path,
        {"kind": "scatter", "figure": "hits", "x": "fid", "log_x": True, "words": "share", "x_words": "distance"},
    )
    rows = [
        result("short", 0, figures={"fid": 3.0, "hits": 0.5}),
        result("long one", 0, figures={"fid": 20.0, "hits": 0.2}),
    ]
    axes = draw(found, each, rows).axes[0]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert points == [(3.0, 0.5), (20.0, 0.2)]
    assert {text.get_text() for text in axes.texts} == {"short", "long one"}
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("distance", "share", "log")
    with pytest.raises(ValueError, match=r"plot 'p': no run has 'hits'"):
        draw(found, each, [result("short", 0)])


def test_variants_of_a_group_are_a_curve(tmp_path: Path) -> None:
    """In the order of the other figure, which is not that of the file; those without a group keep their names."""
    given = [("a", "plain", 3.0, 0.5), ("b", None, 2.0, 0.4), ("c", "plain", 1.0, 0.9), ("d", "plain", 2.0, 0.7)]
    variants = [{"name": name, "base": "first", "group": group} for name, group, _, _ in given]
    plots = [{"name": "p", "kind": "scatter", "figure": "hits", "x": "cost"}]
    found = study(tmp_path, {"variants": variants, "plots": plots})
    rows = [result(name, 0, figures={"cost": cost, "hits": hits}) for name, _, cost, hits in given]
    axes = draw(found, found.plots[0], rows).axes[0]
    curves = {str(line.get_label()): line for line in axes.lines if len(line.get_xdata()) > 1}
    assert list(curves) == ["plain"]
    assert list(zip(*curves["plain"].get_data(), strict=True)) == [(1.0, 0.9), (2.0, 0.7), (3.0, 0.5)]
    assert {text.get_text() for text in axes.texts} == {"b"}
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"}
    assert points == {(cost, hits) for _, _, cost, hits in given}


@pytest.mark.parametrize(
    ("mean", "sd", "percent", "text"),
    [
        (0.6512, None, True, "65.1 %"),
        (0.6512, 0.0123, True, "65.1 ± 1.2 %"),
        (20.456, 1.234, False, "20.5 ± 1.2"),
        (20.456, 12.34, False, "20 ± 12"),
        (0.8512, 0.0123, False, "0.851 ± 0.012"),
        (15.0, 0.0, False, "15"),
        (20.456, None, False, "20.46"),
        (float("nan"), None, False, "not finite"),
    ],
)
def test_cells_have_as_many_digits_as_mean_something(mean: float, sd: float | None, percent: bool, text: str) -> None:
    assert cell(Column("fid", "distance", percent), {"fid": Summary(mean, sd, (mean,))}) == text
    assert cell(Column("other", "o"), {"fid": Summary(mean, sd, (mean,))}) == "–"


def test_the_table_escapes_what_would_end_a_cell(tmp_path: Path) -> None:
    found = study(tmp_path, {"columns": [{"figure": "fid", "words": "a|b"}]})
    rows = table(found, [result("short", 0, figures={"fid": 3.0})])
    assert markdown(found, rows).splitlines()[0] == "|  | a\\|b |"
    assert write_study(tmp_path, found, [])[0].name == "study.json"
