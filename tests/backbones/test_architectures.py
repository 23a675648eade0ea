import copy
import json
import pickle
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dat_lightning import SmallResNet, WideResNet, architecture_of, build_architecture, register_architecture


@register_architecture("test linear")
class Linear(nn.Linear):
    """At the top of the module, so that it pickles."""

    def __init__(self, inputs: int, outputs: int = 3, names: Sequence[str] = ("a", "b"), scale: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        self.scale = scale
        self.names = names


class Narrow(Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)


@register_architecture("test flat", omit=("noise",))
def flat(inputs: int, outputs: int = 2, *, noise: float = 0.0) -> nn.Module:
    head = Linear(inputs, outputs)
    nn.init.constant_(head.weight, noise)
    return nn.Sequential(nn.Flatten(), head)


def described(inputs: int, outputs: int = 3, scale: float = 1.0) -> dict[str, Any]:
    arguments = {"inputs": inputs, "outputs": outputs, "names": ["a", "b"], "scale": scale}
    return {"name": "test linear", "arguments": arguments}


def test_a_class_remembers_all_arguments_defaults_among_them() -> None:
    assert architecture_of(Linear(2)) == described(2)
    assert architecture_of(Linear(2, 5, scale=0.5)) == described(2, 5, 0.5)
    assert architecture_of(Linear(outputs=5, inputs=2)) == described(2, 5)


def test_a_function_s_module_carries_the_function_s_description_and_parts_their_own() -> None:
    network = flat(4, noise=0.5)
    assert architecture_of(network) == {"name": "test flat", "arguments": {"inputs": 4, "outputs": 2}}
    assert isinstance(network, nn.Sequential)
    assert architecture_of(network[1]) == described(4, 2)


def test_other_modules_have_no_description() -> None:
    assert architecture_of(nn.Linear(1, 1)) is None
    assert architecture_of("test linear") is None


def test_a_subclass_is_another_architecture() -> None:
    assert architecture_of(Narrow()) is None

    @register_architecture("test narrower")
    class Narrower(Linear):
        def __init__(self, outputs: int) -> None:
            super().__init__(1, outputs)

    assert architecture_of(Narrower(2)) == {"name": "test narrower", "arguments": {"outputs": 2}}
    assert architecture_of(Linear(1)) == described(1)


def test_lists_and_tuples_give_the_same_description_which_json_keeps() -> None:
    descriptions = [architecture_of(SmallResNet(widths=widths)) for widths in ((4, 8), [4, 8])]
    assert descriptions[0] == descriptions[1] == json.loads(json.dumps(descriptions[0]))
    assert descriptions[0] is not None
    assert descriptions[0]["arguments"]["widths"] == [4, 8]


def test_the_description_is_of_the_arguments_as_they_were() -> None:
    widths = [4, 8]
    network = SmallResNet(widths=widths)
    widths.append(16)
    description = architecture_of(network)
    assert description is not None
    assert description["arguments"]["widths"] == [4, 8]
    description["arguments"]["widths"].append(32)
    assert architecture_of(network) != description


@pytest.mark.parametrize("value", [nn.ReLU, torch.zeros(2), {1: "a"}, [object()]])
def test_arguments_beyond_numbers_strings_and_sequences_leave_no_description(value: object) -> None:
    @register_architecture("test anything")
    class Anything(nn.Identity):
        def __init__(self, value: object) -> None:
            super().__init__()

    assert architecture_of(Anything(value)) is None
    assert architecture_of(Anything({"a": [1, None, True]})) is not None


def test_copies_and_pickles_keep_the_description() -> None:
    for network in (Linear(2, scale=2.0), flat(3)):
        for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert architecture_of(copied) == architecture_of(network) is not None
            assert type(copied) is type(network)


@pytest.mark.parametrize(
    "network",
    [SmallResNet(7, 3, (2, 4), "gelu"), WideResNet(10, 1, 5, activation="silu"), flat(6, 3)],
    ids=lambda network: type(network).__name__,
)
def test_a_description_builds_the_same_network(network: nn.Module) -> None:
    description = json.loads(json.dumps(architecture_of(network)))
    again = build_architecture(description)
    assert type(again) is type(network)
    assert architecture_of(again) == description
    # Loads only where names and shapes agree.
    again.load_state_dict(network.state_dict())
    assert str(again) == str(network)


def test_what_is_omitted_takes_its_default_and_cannot_be_set() -> None:
    network = build_architecture(architecture_of(flat(2, noise=0.5)))
    assert isinstance(network, nn.Sequential)
    assert isinstance(network[1], Linear)
    assert network[1].weight.abs().max() == 0
    with pytest.raises(ValueError, match=r"has the arguments \['inputs', 'outputs'\], got .*noise"):
        build_architecture({"name": "test flat", "arguments": {"inputs": 2, "noise": 0.5}})


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"name": "torch.nn.Linear", "arguments": {}}, "'torch.nn.Linear' is not registered; known are .*SmallResNet"),
        ({"name": ["SmallResNet"], "arguments": {}}, "is not registered"),
        ({"name": "os.system", "arguments": {"command": "true"}}, "'os.system' is not registered"),
        ({"name": "SmallResNet"}, "an architecture must be .* got {'name': 'SmallResNet'}"),
        ({"name": "SmallResNet", "arguments": {}, "class_path": "x"}, "an architecture must be"),
        (None, "an architecture must be .* got None"),
        ("SmallResNet", "an architecture must be .* got 'SmallResNet'"),
        ({"name": "SmallResNet", "arguments": [1]}, "'SmallResNet' has the arguments .*, got .1."),
        ({"name": "SmallResNet", "arguments": {"width": 3}}, "has the arguments .*'widths'.*, got {'width': 3}"),
        ({"name": "SmallResNet", "arguments": {"widths": 3}}, "'SmallResNet' refuses {'widths': 3}"),
        ({"name": "SmallResNet", "arguments": {"widths": []}}, "refuses .*: sizes must be positive"),
        ({"name": "test flat", "arguments": {}}, "'test flat' refuses {}: .*'inputs'"),
    ],
)
def test_a_wrong_description_is_refused(description: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_architecture(description)


def test_a_name_belongs_to_one_class() -> None:
    with pytest.raises(ValueError, match=re.escape("'SmallResNet' is already dat_lightning.backbones.small")):

        @register_architecture("SmallResNet")
        class Other(nn.Module):
            def __init__(self) -> None:
                super().__init__()

    assert type(build_architecture({"name": "SmallResNet", "arguments": {}})) is SmallResNet


def test_the_same_class_may_be_defined_twice_as_a_notebook_does() -> None:
    for _ in range(2):

        @register_architecture("test cell")
        class Cell(nn.Identity):
            def __init__(self, size: int) -> None:
                super().__init__()

        assert type(build_architecture({"name": "test cell", "arguments": {"size": 1}})) is Cell


def test_variable_parameters_are_refused() -> None:
    def variable(**kwargs: int) -> nn.Module:
        return nn.Identity(**kwargs)

    with pytest.raises(ValueError, match=r"'test variable' must name its parameters, got .*kwargs"):
        register_architecture("test variable")(variable)


def test_omitting_a_parameter_that_is_not_there_is_refused() -> None:
    def plain(size: int) -> nn.Module:
        return nn.Linear(size, size)

    with pytest.raises(ValueError, match=r"omit must hold parameters of 'test plain', got \['sizes'\]"):
        register_architecture("test plain", omit=["sizes"])(plain)


class Settings(Sequence[int]):
    """A sequence that is no list, as OmegaConf's is."""

    def __init__(self, *values: int) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]


def test_sequences_and_numbers_of_others_are_described_as_json_has_them() -> None:
    network = SmallResNet(num_classes=int(np.int64(3)), widths=Settings(4, 8))
    assert architecture_of(network) == architecture_of(SmallResNet(num_classes=3, widths=[4, 8]))
    linear = Linear(np.int64(2), names=Settings(1), scale=np.float32(0.5))  # type: ignore[arg-type]
    description = architecture_of(linear)
    assert json.loads(json.dumps(description)) == description
    assert description == {
        "name": "test linear",
        "arguments": {"inputs": 2, "outputs": 3, "names": [1], "scale": 0.5},
    }
