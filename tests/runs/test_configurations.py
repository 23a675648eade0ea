"""A configuration on top of another: as if both had been given, and what cannot be is a sentence."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from dat_lightning.core.errors import InputError
from dat_lightning.runs.configurations import read_yaml, with_bases
from tests.frozen.record import ROOT, printed
from tests.test_cli import refusal

STAGE1 = ROOT / "configs" / "digits" / "stage1.yaml"

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, contents: Any) -> Path:
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(yaml.safe_dump(contents), encoding="utf-8")
    return place


def test_a_base_is_as_if_it_had_been_given_before() -> None:
    """Two levels in two folders; the higher file wins, and another class keeps the arguments that it takes."""
    adam = {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.95]}}
    middle = {"model": {"init_args": {"optimizer": adam}}, "trainer": {"max_epochs": 7}}
    upper = {"trainer": {"max_epochs": 9, "default_root_dir": "elsewhere"}}
    write("middle.yaml", {"base": str(STAGE1), **middle})
    based = printed(write("sub/upper.yaml", {"base": "../middle.yaml", **upper}))
    assert based == printed(STAGE1, write("plain.yaml", middle), write("top.yaml", upper))
    assert based["trainer"]["max_epochs"] == 9
    optimizer = based["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert optimizer["init_args"]["weight_decay"] == 5e-4
    # Where everything of a run goes is said once.
    assert based["trainer"]["logger"]["init_args"]["save_dir"] == "elsewhere"
    folders = {c["init_args"].get("dirpath") for c in based["trainer"]["callbacks"]} - {None}
    assert folders == {"elsewhere/samples", "elsewhere/checkpoints"}


@pytest.mark.parametrize("how", ["base", "config"])
def test_the_transform_of_one_stream_leaves_those_of_the_others(how: str) -> None:
    """A mapping would be replaced whole, and the other streams have the recipe's augmentations again."""
    below, name = ROOT / "configs" / "cifar10_cpu" / "stage1.yaml", "torchvision.transforms.v2.RandomVerticalFlip"
    clf = {"data": {"init_args": {"transforms": {"clf": {"class_path": name}}}}}
    files = [write("upper.yaml", {"base": str(below), **clf})] if how == "base" else [below, write("upper.yaml", clf)]
    transforms = {stream: found and found["class_path"] for stream, found in of_streams(*files).items()}
    assert transforms == {"gen": "torchvision.transforms.v2.RandomHorizontalFlip", "clf": name, "ood": None}


@pytest.mark.parametrize("name", ["noise", "cifar10_random_images", "cifar10_parquet", "cifar10_folders"])
def test_other_seeds_are_those_of_training_and_of_samples(name: str) -> None:
    settings = printed(ROOT / "configs" / "cifar10_cpu" / "stage2.yaml", ROOT / "configs" / "data" / f"{name}.yaml")
    assert settings["data"]["init_args"]["held_out"] is None


def of_streams(*files: Path) -> dict[str, Any]:
    found: dict[str, Any] = printed(*files)["data"]["init_args"]["transforms"]
    return found


def test_stage_2_of_cifar10_on_two_cores_sees_one_kind_of_real_image() -> None:
    transforms = of_streams(ROOT / "configs" / "cifar10_cpu" / "stage2.yaml")
    assert transforms["gen"] == transforms["clf"] is not None


def test_the_command_line_moves_a_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    from dat_lightning.cli import main

    with pytest.raises(SystemExit):
        main(["fit", "--config", str(STAGE1), "--print_config", "--trainer.default_root_dir", "/other"])
    shown = capsys.readouterr().out
    assert "runs/digits" not in shown
    assert "/other/checkpoints" in shown


def test_a_mapping_changes_callbacks_where_they_stand() -> None:
    changes: dict[str, Any] = {"PGDSampler": {"num_steps": [3]}, "EarlyStopping": {"patience": 2}}
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}
    write("with_stopping.yaml", {"base": str(STAGE1), "trainer": {"callbacks+": [stopping]}})
    before = printed(Path("with_stopping.yaml"))["trainer"]["callbacks"]
    after = printed(write("top.yaml", {"base": "with_stopping.yaml", "trainer": {"callbacks": changes}}))
    assert len(before) == len(printed(STAGE1)["trainer"]["callbacks"]) + 1
    for old, new in zip(before, after["trainer"]["callbacks"], strict=True):
        expected = {**old["init_args"], **changes.get(old["class_path"].rpartition(".")[2], {})}
        assert new == {"class_path": old["class_path"], "init_args": expected}
    # A list still takes the place of the whole list.
    alone = printed(write("list.yaml", {"base": str(STAGE1), "trainer": {"callbacks": [stopping]}}))
    assert [c["class_path"] for c in alone["trainer"]["callbacks"]] == [stopping["class_path"]]


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({"base": "top.yaml"}, "top.yaml is its own base: top.yaml on top of top.yaml"),
        ({"base": "other.yaml"}, "top.yaml is its own base: top.yaml on top of other.yaml on top of top.yaml"),
        ({"base": "sub/nowhere.yaml"}, "top.yaml names a base that is missing: sub/nowhere.yaml"),
        ({"base": "list.yaml"}, "list.yaml must be a mapping of settings, got list"),
        ({"base": ["a.yaml", "b.yaml"]}, "top.yaml: base must be the name of one file, got ['a.yaml', 'b.yaml']"),
    ],
)
def test_bases_that_lead_nowhere_are_a_sentence(contents: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("other.yaml", {"base": "top.yaml"})
    write("list.yaml", [1])
    top = write("top.yaml", contents)
    with pytest.raises((InputError, FileNotFoundError)) as error:
        with_bases(top)
    assert str(error.value) == said
    assert said in refusal(capsys, "fit", "--config", "top.yaml")


def test_callbacks_are_changed_in_a_file_with_a_base_alone(capsys: pytest.CaptureFixture[str]) -> None:
    write("top.yaml", {"trainer": {"callbacks": {"PGDSampler": {"num_steps": [3]}}}})
    said = "changes PGDSampler, of which its base has 0, not one; the files of another --config are no base"
    assert said in refusal(capsys, "fit", "--config", str(STAGE1), "--config", "top.yaml")


BOMB = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghij")
)
WRONG = [
    (
        "trainer:\n  max_epochs: 1\n  max_epochs: 2\n",
        ", line 3 is no YAML: the key 'max_epochs' stands in line 2 already",
    ),
    ("trainer: {max_epochs: 1, max_epochs: 1}\n", ", line 1 is no YAML: the key 'max_epochs' stands in line 1 already"),
    ("trainer: &a [*a]\n", ", line 1 is no YAML: stands for more than 100000 values or 100 levels"),
    (BOMB, ", line 5 is no YAML: stands for more than 100000 values or 100 levels"),
    (f"trainer: {'[' * 500}{']' * 500}\n", ", line 1 is no YAML: stands for more than 100000 values or 100 levels"),
    (f"trainer: {'[' * 9999}{']' * 9999}\n", ", line 1 is no YAML: exceeded maximum nesting depth"),
    (f"trainer: {{max_epochs: {'9' * 5000}}}\n", " is no YAML: Exceeds the limit"),
    ("trainer: {max_epochs: !!int x}\n", " is no YAML: invalid literal for int"),
    ("trainer: {}\n---\ntrainer: {}\n", ", line 2 is no YAML: but found another document"),
]


@pytest.mark.parametrize(("contents", "said"), WRONG)
def test_what_other_readers_let_pass_is_a_sentence(contents: str, said: str) -> None:
    Path("wrong.yaml").write_text(contents, encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_yaml(Path("wrong.yaml"))
    assert str(error.value).startswith(f"wrong.yaml{said}")
    assert "\n" not in str(error.value)


def test_merge_keys_anchors_and_a_byte_order_mark_stay() -> None:
    text = "\ufeffa: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: [*a, *a]\n1: one\n'1': text\n"
    Path("right.yaml").write_text(text, encoding="utf-8")
    a = {"x": 1, "y": [1, 2]}
    assert read_yaml(Path("right.yaml")) == {"a": a, "b": {**a, "x": 2}, "c": [a, a], 1: "one", "1": "text"}
    numbers = {"a": list(range(200_000))}
    assert read_yaml(write("long.yaml", numbers)) == numbers


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"max_epochs: 1\nmax_epochs: 2\n", "'inner.yaml' the key 'max_epochs' stands in line 1 already"),
        (b"max_steps: 1\nmax_epochs: 1  # caf\xe9\n", "no text in UTF-8, in line 2 after 'max_epochs: 1  # caf'"),
        ("max_epochs: 1\n".encode("utf-16"), "no text in UTF-8, in line 1 after ''"),
    ],
)
@pytest.mark.parametrize("form", ["argument", "entry"])
def test_so_are_files_that_are_the_value_of_a_setting(
    contents: bytes, said: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("inner.yaml").write_bytes(contents)
    write("top.yaml", {"trainer": "inner.yaml"})
    given = ["--trainer", "inner.yaml"] if form == "argument" else ["--config", "top.yaml"]
    assert said in refusal(capsys, "fit", "--config", str(STAGE1), *given)


@pytest.mark.parametrize("place", ["wrong.yaml", "top.yaml"])
@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"trainer:\n  max_epochs: [\n", "wrong.yaml, line 3 is no YAML: "),
        (b"trainer:\n\tmax_epochs: 1\n", "wrong.yaml, line 2 is no YAML: "),
        (b"\x00\x01\x02", "wrong.yaml is no YAML: "),
        (b"\x80\x04\x95", "wrong.yaml is no text in UTF-8"),
        ("trainer: {}\n".encode("utf-16"), "wrong.yaml is no text in UTF-8"),
    ],
)
def test_files_that_are_no_yaml_are_a_sentence(
    contents: bytes, said: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a configuration, and as the base of one."""
    Path("wrong.yaml").write_bytes(contents)
    write("top.yaml", {"base": "wrong.yaml"})
    assert said in refusal(capsys, "fit", "--config", place)


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (
            {"trainer": {"callbacks": {"PGDSample": {"num_steps": [3]}}}},
            "top.yaml: trainer.callbacks changes PGDSample, of which its base has 0, not one",
        ),
        (
            {"trainer": {"callbacks": {"PGDSampler": [3]}}},
            "top.yaml: trainer.callbacks.PGDSampler must be a mapping of arguments, got [3]",
        ),
        ({"trainer": {"default_root_dir": "${trainer.nowhere}"}}, "nowhere"),
        ({"trainer": {"default_root_dir": "${trainer.default_root_dir}"}}, "default_root_dir"),
    ],
)
def test_changes_that_cannot_be_are_a_sentence(contents: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("top.yaml", {"base": str(STAGE1), **contents})
    assert said in refusal(capsys, "fit", "--config", "top.yaml")
