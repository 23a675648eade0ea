"""``null`` where a class has no use for it is a sentence that names the argument; elsewhere it passes."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
import yaml
from jsonargparse import Namespace

from dat_lightning.core.errors import InputError
from dat_lightning.runs.nulls import check_nulls
from tests.test_cli import ROOT, refusal

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")


@dataclass
class Part:
    size: int = 1
    name: str | None = "a"


class Base:
    def __init__(self, steps: int = 3, rate: Optional[float] = 0.1, part: Part = Part()) -> None: ...  # noqa: UP045


class Derived(Base):
    def __init__(self, mode: Literal["a", "b"] = "a", free: Any = 1, unset: str = None, **shared: Any) -> None: ...  # type: ignore[assignment]  # noqa: RUF013


def made(kind: type, function: Any = None) -> Namespace:
    return Namespace(class_path=f"{__name__}.{kind.__name__}", init_args=function)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"mode": None}, "mode"),
        ({"steps": None}, "steps"),
        ({"mode": "a", "part": {"size": None}}, "part.size"),
        ({"free": [made(Derived, {"steps": None})]}, "free.0.init_args.steps"),
    ],
)
def test_a_type_without_none_refuses_it(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=rf"^model\.init_args\.{name} must not be null: leave it out for its default$"):
        check_nulls(Namespace(model=made(Derived, arguments)))  # type: ignore[no-untyped-call]


def test_what_may_be_none_or_is_not_known_passes() -> None:
    arguments = {"rate": None, "free": None, "unset": None, "part": {"name": None}, "unknown": None}
    check_nulls({"model": made(Derived, arguments), "ckpt_path": None, "other": made(Part, None)})
    check_nulls({"model": {"class_path": "no.such.module.Class", "init_args": {"steps": None}}})


@pytest.mark.parametrize(
    "name",
    [
        "data.init_args.max_shift_clf",
        "model.init_args.curriculum.init_args.max_steps",
        "model.init_args.threat_model.num_steps",
        "trainer.callbacks.4.init_args.dirpath",
    ],
)
def test_a_configuration_s_null_is_a_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said by the parser, where it looks for itself, or by us."""
    config = yaml.safe_load((ROOT / "configs/digits/dat.yaml").read_text(encoding="utf-8"))
    part: Any = config
    *places, last = name.split(".")
    for place in places:
        part = part[int(place) if place.isdigit() else place]
    part[last] = None
    (tmp_path / "null.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    said = refusal(capsys, "fit", "--config", str(tmp_path / "null.yaml"))
    assert f"{name} must not be null" in said or re.search(rf"{last}: .*None", said)
