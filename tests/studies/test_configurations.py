from pathlib import Path

import pytest
import yaml

from dat_lightning.studies.configurations import differences, digest, fill, merge, merged, strings, with_arguments


def test_mappings_merge_and_everything_else_is_replaced() -> None:
    below = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    above = {"a": {"c": [4], "e": 5}, "d": {"f": 6}}
    assert merge(below, above) == {"a": {"b": 1, "c": [4], "e": 5}, "d": {"f": 6}}
    assert below == {"a": {"b": 1, "c": [1, 2]}, "d": 3}


def test_a_class_of_another_name_takes_no_arguments_over() -> None:
    below = {"class_path": "A", "init_args": {"x": 1}}
    assert merge(below, {"class_path": "B", "init_args": {"y": 2}}) == {"class_path": "B", "init_args": {"y": 2}}
    assert merge(below, {"class_path": "A", "init_args": {"y": 2}})["init_args"] == {"x": 1, "y": 2}
    assert merge(below, {"init_args": {"y": 2}})["init_args"] == {"x": 1, "y": 2}


def test_arguments_are_named_as_on_the_command_line() -> None:
    config = {
        "seed_everything": 0,
        "model": {"class_path": "M", "init_args": {"curriculum": {"class_path": "C"}, "attack": {"eps": 1}}},
        "trainer": {"callbacks": [{"class_path": "p.One"}, {"class_path": "p.Two", "init_args": {"n": 1}}]},
    }
    changed = with_arguments(
        config,
        {
            "seed_everything": 7,
            "model.curriculum.max_steps": 3,
            "model.init_args.attack.eps": 0.5,
            "model.class_path": "N",
            "trainer.callbacks.Two.n": 2,
            "trainer.callbacks.One.name": "x",
            "data.seed": 1,
        },
    )
    assert changed == {
        "seed_everything": 7,
        "model": {
            "class_path": "N",
            "init_args": {"curriculum": {"class_path": "C", "init_args": {"max_steps": 3}}, "attack": {"eps": 0.5}},
        },
        "trainer": {
            "callbacks": [
                {"class_path": "p.One", "init_args": {"name": "x"}},
                {"class_path": "p.Two", "init_args": {"n": 2}},
            ]
        },
        "data": {"seed": 1},
    }
    assert config["seed_everything"] == 0
    assert config["trainer"]["callbacks"][1]["init_args"] == {"n": 1}  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.width.x", "argument model.width.x leads through 8, expected a mapping"),
        ("callbacks.Three.n", "expected one Three in the list, got 0 among ['p.One', 'p.One', '']"),
        ("callbacks.One.n", "expected one One in the list, got 2"),
    ],
)
def test_an_argument_that_leads_nowhere_is_a_sentence(name: str, said: str) -> None:
    config = {"model": {"width": 8}, "callbacks": [{"class_path": "p.One"}, {"class_path": "p.One"}, 3]}
    with pytest.raises(ValueError, match="argument") as error:
        with_arguments(config, {name: 1})
    assert said in str(error.value)


def test_files_merge_from_left_to_right(tmp_path: Path) -> None:
    for name, value in (("a", {"x": 1, "y": 1}), ("b", {"y": 2})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(value))
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    assert merged(files, {"z.w": 3}) == {"x": 1, "y": 2, "z": {"w": 3}}
    assert merged(files[::-1], {}) == {"x": 1, "y": 1}


@pytest.mark.parametrize(("text", "said"), [("a: [", "is no YAML"), ("- 1", "must be a mapping of settings, got list")])
def test_a_file_that_is_no_configuration_is_a_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        merged([tmp_path / "a.yaml"], {})
    assert str(tmp_path / "a.yaml") in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no configuration at "):
        merged([tmp_path / "b.yaml"], {})


def test_a_hash_depends_on_contents_and_not_on_their_order() -> None:
    assert digest({"a": 1, "b": {"c": [1, 2]}}) == digest({"b": {"c": [1, 2]}, "a": 1})
    others: list[dict[str, object]] = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": None}]
    assert len({digest(other) for other in others}) == len(others)
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})


def test_all_texts_are_found_and_filled() -> None:
    config = {"a": "x", "b": [1, "y", {"c": "x"}], "d": 2}
    assert sorted(strings(config)) == ["x", "x", "y"]
    assert fill(config, lambda text: text.replace("x", "z")) == {"a": "z", "b": [1, "y", {"c": "z"}], "d": 2}


def test_differences_name_what_changed() -> None:
    old = {"a": 1, "b": {"c": [1, {"d": 2}], "e": 3}}
    new = {"a": 1, "b": {"c": [1, {"d": 4}], "f": 5}}
    assert list(differences(old, new)) == ["b.c.1.d: 2 → 4", "b.e: 3 → null", "b.f: null → 5"]
    assert list(differences(old, old)) == []
    assert list(differences({"a": [1]}, {"a": [1, 2]})) == ["a: [1] → [1, 2]"]
