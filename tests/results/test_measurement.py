"""Measurements are compared by their settings as data; the sentence is made of them for people."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from dat_lightning.results import Figure, Measurement
from dat_lightning.results.measurement import canonical, differing, flat, in_words, primitives, settings_key


@dataclass(frozen=True)
class Attack:
    eps: float
    random_start: bool = False


def test_the_protocol_is_made_of_definition_and_settings() -> None:
    settings = {
        "threat_model": {"norm": "L2", "eps": 0.5, "random_start": True},
        "attacks": ["fab", "square"],
        "seed": None,
        "judge": "Judge(16) sha256:0123456789abcdef",
        "test_images": "sha256:0123456789abcdef",
    }
    measurement = Measurement("a", 0.5, "share of images", 10, settings=settings)
    assert measurement.protocol == (
        "share of images; threat model (norm L2, eps 0.5, random start yes), attacks [fab, square], judge Judge(16)"
    )
    assert Measurement("a", 0.5, "share of images", 10).protocol == "share of images"


def test_the_old_name_still_works() -> None:
    assert Figure is Measurement


def test_settings_are_equal_as_data_whatever_their_order_and_containers() -> None:
    one = {"attack": Attack(0.5), "steps": (1, 2), "path": Path("a")}
    other = {"path": "a", "steps": [1, 2], "attack": {"class": f"{__name__}.Attack", "random_start": False, "eps": 0.5}}
    assert canonical(one) == canonical(other)
    assert primitives(one) == other
    assert settings_key(one) == settings_key(other) != settings_key({**other, "steps": [2, 1]})
    assert primitives({"eps": math.inf}) == {"eps": math.inf}


@dataclass(frozen=True)
class Other(Attack):
    """The same fields."""


@dataclass(frozen=True)
class Outer:
    """A setting with another one in it."""

    inner: Attack


def test_settings_of_two_classes_with_equal_fields_differ() -> None:
    one, other = {"rule": Outer(Attack(0.5))}, {"rule": Outer(Other(0.5))}
    assert canonical(one) != canonical(other)
    assert settings_key(one) != settings_key(other)
    assert differing([one, other]) == ("rule",)
    inner = {"class": f"{__name__}.{Other.__qualname__}", "eps": 0.5, "random_start": False}
    assert primitives(other) == {"rule": {"class": f"{__name__}.{Outer.__qualname__}", "inner": inner}}


def test_what_is_no_primitive_is_refused() -> None:
    with pytest.raises(TypeError, match="settings must be primitives, got object"):
        canonical({"a": [object()]})


def test_differences_have_dotted_names_in_their_order() -> None:
    one = {"n": 10, "attack": {"eps": 0.5, "norm": "L2"}, "judge": "A"}
    other = {"n": 10, "attack": {"eps": 1.0, "norm": "L2"}, "extractor": "B"}
    assert differing([one, other]) == ("attack.eps", "judge", "extractor")
    assert differing([one, one, dict(reversed(one.items()))]) == ()
    assert differing([one, {**one, "attack": None}]) == ("attack.eps", "attack.norm", "attack")
    assert dict(flat({"a": {"b": 1, "c": {}}, "d": [1]})) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_an_equal_number_of_images_is_a_setting_too() -> None:
    one, other = (Measurement("a", 0.5, "share", count, settings={"x": 1}) for count in (10, 20))
    assert differing([one.compared_by, other.compared_by]) == ("number of images",)
    assert in_words({"x": 1.0, "none": None, "empty": {}, "inner": {"a": None}}) == "x 1"
