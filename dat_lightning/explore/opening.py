"""From ``--ckpt_path`` to an explorer: the network that a file describes, averaged weights, and data to look at."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from dat_lightning import core
from dat_lightning.backbones.architectures import architecture_of
from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.core.random_streams import RandomPermutation
from dat_lightning.core.update_rules import STEEPEST, UpdateRule
from dat_lightning.data import DigitsDataModule, PairedDataModule
from dat_lightning.data.entries import SizedDataset, image_of, label_of
from dat_lightning.explore.explorer import Explorer
from dat_lightning.modules import DualAdversarialModule, EnergyModule
from dat_lightning.runs.configurations import with_bases
from dat_lightning.runs.paths import with_home
from dat_lightning.sampling import PGDSampler
from dat_lightning.weights import load_weights, read_checkpoint
from dat_lightning.weights.described import described_network
from dat_lightning.weights.extents import storages_in
from dat_lightning.weights.hub import MODELS, EnergyModel
from dat_lightning.weights.shipped import PAGE_FILE, is_exported, located

# Of networks whose files do not say it: those of this package are made for these.
_USUAL_SIZES = {"SmallResNet": 16, "WideResNet": 32}
_USUAL_SIZE = 224
_USUAL_STEPS = 20
_LARGEST_STEP = 1000.0  # that the page offers


class Examples:
    """The test images of a run, as evaluation sees them, in a fixed random order.

    Args:
        data: The run's data.
    """

    def __init__(self, data: PairedDataModule) -> None:
        self._images: SizedDataset = data.in_distribution("test")
        self._transform = data.evaluation_transform()
        self._order = RandomPermutation(len(self._images), "explored examples")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, place: int) -> tuple[Tensor, int | None]:
        """Returns image (C, H, W) in [0, 1] and label, ``None`` where there are no labels.

        Raises:
            CorruptImageError: If it cannot be read.
        """
        entry = self._images[self._order[place]]
        return self._transform(image_of(entry)), label_of(entry)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """What the data call the classes; ``None`` if they do not say."""
        dataset: object = self._images
        while dataset is not None:
            if (names := getattr(dataset, "classes", None)) is not None:
                return tuple(str(name) for name in names)
            dataset = getattr(dataset, "dataset", None)
        return None


@dataclass(frozen=True)
class Opened:
    """A checkpoint, ready for a page.

    Attributes:
        explorer: The network.
        name: Path of the checkpoint, or name of the model that ships.
        network: The network in words.
        examples: Test images of the run's data, if they are known and here.
        notes: What a reader has to know about it, a sentence each.
        eps: A radius to begin with, for counterfactuals.
        step_size: A step to begin with, for samples.
        rule: How their steps are made.
        num_steps: How many of them to begin with.
        at_once: Whether the page shows a counterfactual and samples before it is asked for them.
    """

    explorer: Explorer
    name: str
    network: str
    examples: Examples | None
    notes: tuple[str, ...]
    eps: float
    step_size: float
    rule: UpdateRule
    num_steps: int = _USUAL_STEPS
    at_once: bool = False


def open_checkpoint(
    ckpt_path: str | Path,
    config: Sequence[str | Path] = (),
    image_size: int | None = None,
    device: str = "cpu",
) -> Opened:
    """Loads a checkpoint's averaged weights, and the data that it was trained with where they can be had.

    A file decides on nothing that is run: without a configuration, networks come from registered names alone, and data
    are those of the digits or none.

    Args:
        ckpt_path: Checkpoint of a run, folder that ``export`` wrote, name of a model that ships, or, with a
            configuration, any weights.
        config: Configurations of the run, later ones win; they say which network and which data. A model that ships
            has one of its own.
        image_size: Height and width of the images, where nothing else says it.
        device: Where to compute.

    Raises:
        FileNotFoundError: If a file or the data of a configuration are missing.
        InputError: If the checkpoint is damaged, of another kind, or does not fit; its images have another number of
            channels than 1 or 3; or an argument is wrong.
    """
    path = located(ckpt_path)
    ships = path.parent == MODELS
    chosen = _checked_device(device)
    if image_size is not None:
        require_at_least(1, image_size=image_size)
    configs = [Path(each) for each in config] or [path / PAGE_FILE] * ships
    sections = [section for each in configs for section in _sections(each)]
    if ships:
        sections = _in_folder(sections, path)
    settings: Mapping[str, Any] = {}
    if is_exported(path):
        model, contents = EnergyModel.from_pretrained(path), {}
        settings = _described_module(sections)
    else:
        contents = dict(read_checkpoint(path))
        settings = _mapping(contents.get("hyper_parameters"))
        configured = [section["model"] for section in sections if "model" in section]
        if configured:
            module = _instantiated(EnergyModule, "model", configured)
            model = module.energy_model
            settings = {**settings, **_first_steps(module)}
        else:
            model = _described_network(path, settings, contents)
        load_weights(model, path)
    # The run's own way to generate comes before that of its training, which the recipes for photographs differ in.
    settings = {**settings, **_sampling(sections)}
    data = _data([section["data"] for section in sections if "data" in section], contents, model)
    name = path.name if ships else str(ckpt_path)
    return replace(_put_together(name, model, data, settings, image_size, chosen), at_once=ships)


def _put_together(
    name: str,
    model: EnergyModel,
    data: PairedDataModule | None,
    settings: Mapping[str, Any],
    image_size: int | None,
    device: torch.device,
) -> Opened:
    notes = []
    examples = None if data is None else Examples(data)
    if examples is not None:
        shape = tuple(examples[0][0].shape)
        if image_size not in (None, *shape[1:]):
            raise InputError(f"image_size is {image_size}, but the images of the data are {shape[1]}×{shape[2]}")
    else:
        size = image_size or _usual_size(model)
        shape = (_channels(model), size, size)
        notes.append("No data are known for this checkpoint: --config with the run's configuration adds its images.")
        if image_size is None:
            notes.append(f"Images of {size}×{size} pixels are a guess from the network; --image_size changes it.")
    if shape[0] not in (1, 3):
        raise InputError(f"explore shows images of 1 or 3 channels, and those of {name} have {shape[0]}")
    seeds = None
    if data is not None and (held_out := data.out_of_distribution("held_out")) is not None and len(held_out):
        seeds = data.held_out_seeds()
    explorer = Explorer(model, shape, None, seeds, device)
    names = None if examples is None else examples.class_names
    if names is not None and len(names) != explorer.num_classes:
        notes.append(f"The data name {len(names)} classes, the network has {explorer.num_classes}: numbers are shown.")
    elif names is not None:
        explorer.class_names = names
    attack = _mapping(settings.get("threat_model"))
    radius = _positive(attack.get("eps")) if attack.get("norm") == "L2" else None
    eps = 4.0 if radius is None else 4 * radius
    # Without a hint, a step of one hundredth of the box's diagonal.
    step_size = (
        _positive(settings.get("sampling_step_size"))
        or _positive(settings.get("contrastive_step_size"))
        or round(0.01 * math.sqrt(math.prod(shape)), 2)
    )
    rule = settings.get("sampling_rule") or _described_rule(settings.get("contrastive_rule"))
    trained = _mapping(_mapping(settings.get("curriculum")).get("init_args")).get("max_steps")
    steps = int(_positive(settings.get("sampling_steps")) or _positive(trained) or _USUAL_STEPS)
    return Opened(explorer, name, _in_words(model), examples, tuple(notes), eps, step_size, rule, steps)


def _described_network(path: Path, settings: Mapping[str, Any], contents: Mapping[str, Any]) -> EnergyModel:
    """The network that a checkpoint's hyperparameters describe."""
    try:
        return described_network(settings, storages_in(contents))
    except InputError as error:
        instead = "give the run's configuration as --config, or a folder that dat-lightning export wrote"
        raise InputError(f"{path}: {error}: {instead}") from error


def _data(configured: list[Any], contents: Mapping[str, Any], model: EnergyModel) -> PairedDataModule | None:
    """The data of a configuration; or the digits, where a run has left its position in them in the checkpoint."""
    if configured:
        data: PairedDataModule = _instantiated(PairedDataModule, "data", configured)
        return data
    if "DigitsDataModule" in contents and _channels(model) == 1:
        return DigitsDataModule()
    return None


def _instantiated(base: type[Any], name: str, sections: list[Any]) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, name)
    try:
        parsed = parser.parse_args([part for section in sections for part in (f"--{name}", yaml.safe_dump(section))])
    except ArgumentError as error:
        raise InputError(f"--config: {error}") from error
    # jsonargparse from 4.49 on has instantiate, and warns of the name that it had before.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(with_home(parsed))[name]


def _sections(config: Path) -> list[Mapping[str, Any]]:
    """The sections of a configuration, which may stand below ``fit``, after those of the files that it is on top of."""
    if not config.is_file():
        raise FileNotFoundError(f"--config names {config}, which is no file")
    found: list[Mapping[str, Any]] = []
    for _, contents in with_bases(config):
        below = contents.get("fit")
        sections = {**contents, **below} if isinstance(below, dict) else contents
        found.append({name: section for name, section in sections.items() if isinstance(section, dict)})
    return found


def _in_folder(value: Any, folder: Path) -> Any:
    """A configuration in which ``${folder}`` stands for the folder of the model that it belongs to."""
    if isinstance(value, dict):
        return {name: _in_folder(inner, folder) for name, inner in value.items()}
    if isinstance(value, list):
        return [_in_folder(inner, folder) for inner in value]
    return value.replace("${folder}", str(folder)) if isinstance(value, str) else value


def _described_module(sections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What configurations say about a module, as hyperparameters do; the module itself is not made."""
    described: dict[str, Any] = {}
    for section in sections:
        described = _merged(described, _mapping(_mapping(section.get("model")).get("init_args")))
    return described


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those of a file on top, which may name some of a mapping alone."""
    inner = {
        name: _merged(below[name], value)
        for name, value in above.items()
        if isinstance(value, Mapping) and isinstance(below.get(name), Mapping)
    }
    return {**below, **above, **inner}


def _first_steps(module: EnergyModule) -> dict[str, Any]:
    """What a configured module says about attack and steps, as hyperparameters do."""
    first: dict[str, Any] = {"threat_model": {"norm": module.threat_model.norm, "eps": module.threat_model.eps}}
    if isinstance(module, DualAdversarialModule):
        first["contrastive_step_size"] = module.contrastive_chain.step_size
        first["sampling_rule"] = module.contrastive_rule
    return first


def _described_rule(section: object) -> UpdateRule:
    """The rule that a checkpoint's hyperparameters describe, if it is one of this package; or else the steepest."""
    path = str(_mapping(section).get("class_path", ""))
    known = getattr(core, path.rpartition(".")[2], None) if path.startswith("dat_lightning.") else None
    if not (isinstance(known, type) and issubclass(known, UpdateRule)):
        return STEEPEST
    arguments = _mapping(_mapping(section).get("init_args"))
    inner = {name: _described_rule(value) for name, value in arguments.items() if "class_path" in _mapping(value)}
    if not all(name in inner or isinstance(value, bool | int | float) for name, value in arguments.items()):
        return STEEPEST
    try:
        rule: UpdateRule = known(**{**arguments, **inner})
    except (TypeError, ValueError):  # of another version, or of nobody's
        return STEEPEST
    return rule


def _sampling(sections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Step and rule of the configurations' last PGDSampler, its defaults among them; nothing if they have none.

    Of a sweep the number of steps is the middle one.
    """
    found: dict[str, Any] | None = None
    for section in sections:
        callbacks = _mapping(section.get("trainer")).get("callbacks")
        if isinstance(callbacks, dict) and "PGDSampler" in callbacks:
            found = {**(found or {}), **_mapping(callbacks["PGDSampler"])}
        for callback in callbacks if isinstance(callbacks, list) else []:
            if str(_mapping(callback).get("class_path", "")).rpartition(".")[2] == "PGDSampler":
                found = dict(_mapping(callback.get("init_args")))
    if found is None:
        return {}
    sampler = _instantiated(PGDSampler, "sampler", [{"class_path": "dat_lightning.PGDSampler", "init_args": found}])
    middle = sorted(sampler.num_steps)[len(sampler.num_steps) // 2]
    return {"sampling_step_size": sampler.chain.step_size, "sampling_rule": sampler.rule, "sampling_steps": middle}


def _checked_device(device: str) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).cpu()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device must be one that torch can use here, such as 'cpu', got {device!r}: {reason}"
        ) from error
    return chosen


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _positive(value: object) -> float | None:
    """A number as a file says it, if it is one that can be a radius or a step."""
    usable = isinstance(value, int | float) and 0 < value < _LARGEST_STEP
    return float(value) if usable else None  # type: ignore[arg-type]


def _channels(model: EnergyModel) -> int:
    convolution = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    return 3 if convolution is None else convolution.in_channels


def _usual_size(model: EnergyModel) -> int:
    return _USUAL_SIZES.get(type(model.backbone).__name__, _USUAL_SIZE)


def _in_words(model: EnergyModel) -> str:
    """The network's name and its number of parameters."""
    description = architecture_of(model.backbone) or {}
    name = description.get("name", type(model.backbone).__name__)
    if name == "timm_model":
        name = description["arguments"]["name"]
    count = sum(p.numel() for p in model.parameters())
    return f"{name}, {count / 1e6:.1f} M parameters" if count >= 1e6 else f"{name}, {count:,} parameters"
