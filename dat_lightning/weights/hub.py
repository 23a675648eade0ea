"""Models as folders and on the Hub: weights as safetensors, the network by its registered name, a model card."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from typing_extensions import Self, override

from dat_lightning.backbones.architectures import architecture_of, build_architecture
from dat_lightning.backbones.sizes import build_within
from dat_lightning.core import energy
from dat_lightning.core.errors import InputError
from dat_lightning.weights.files import written_whole
from dat_lightning.weights.values import fault_of

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

MODELS = Path(__file__).parent / "models"
"""Has a folder of each model that ships: network, weights, model card, and what the web page begins with."""

_LONGEST_CONFIG = 100_000  # bytes

_CARD = """---
{{ card_data }}
---

# {{ title }}

A classifier that is read as an energy-based model: it maps images in [0, 1], of shape (N, C, H, W), to logits f(x),
with the energies E(x, y) = −f(x)[y] and E(x) = −logsumexp f(x). The input normalisation is part of the model.
{% if network %}
Network: `{{ network }}`
{% endif %}
```python
from dat_lightning import EnergyModel

model = EnergyModel.from_pretrained("{{ model_id }}")  # {% if model_id == "." %}this folder; {% endif %}in eval mode
logits = model(images)
energies = model.marginal_energy(images)
```

The method is Dual Adversarial Training: [{{ paper_url }}]({{ paper_url }}).
"""


class HubModel(
    PyTorchModelHubMixin,
    library_name="dat-lightning",
    tags=["energy-based-model", "adversarial-robustness", "dual-adversarial-training"],
    pipeline_tag="image-classification",
    license="mit",
    paper_url="https://arxiv.org/abs/2510.13872",
    model_card_template=_CARD,
):
    """Gives an ``nn.Module`` ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``; stricter than its base.

    Arguments of the constructor that are networks have to be of a registered architecture (see
    ``register_architecture``), the others numbers, strings or sequences of them. Nothing that is read can run code:
    weights are safetensors alone, and networks come from registered names alone.
    """

    def __init_subclass__(cls, **metadata: Any) -> None:
        # The base would forget the coder in subclasses.
        coders = {nn.Module: (architecture_of, build_architecture)}
        super().__init_subclass__(**{"coders": coders, **metadata})

    @classmethod
    @override
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
    ) -> Self:
        """Returns a saved model in eval mode, float32; torch's random numbers stay as they are.

        Args:
            pretrained_model_name_or_path: A folder that :meth:`save_pretrained` wrote, or the id of a model on the Hub.
            force_download: Whether to download what the cache has.
            token: Access to private models; by default the token that ``hf auth login`` stored.
            cache_dir: Folder for downloads.
            local_files_only: Whether to look in the cache alone.
            revision: Branch, tag or commit on the Hub.
            map_location: Device of the model.

        Raises:
            FileNotFoundError: If there is no such folder or model, or a file of it is missing.
            InputError: If a file is damaged, the configuration names an unknown architecture or wrong arguments, or
                weights are missing, unexpected or of another shape.
        """
        source = str(pretrained_model_name_or_path)
        download = partial(
            hf_hub_download,
            source,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            token=token,
            local_files_only=local_files_only,
        )
        config, file = (_file_of(source, name, download) for name in (CONFIG_FILE, WEIGHTS_FILE))
        arguments, weights = _read_config(config), _read_weights(file)
        with torch.random.fork_rng(devices=[]):
            try:
                build = partial(cls._from_config, arguments)
                sizes = [value.numel() for value in weights.values()]
                model = build_within(build, sizes, arguments)  # type: ignore[type-var]  # beside nn.Module
            except (TypeError, ValueError) as error:
                raise InputError(f"{config} does not describe a {cls.__name__}: {error}") from error
        module = _module(model)
        if faults := _faults(module.state_dict(), weights):
            raise InputError(f"{file} does not fit the network of {CONFIG_FILE}: {faults}")
        module.load_state_dict(weights)
        module.to(map_location).eval()
        return model

    @override
    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        config: dict[str, Any] | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        half: bool = False,
    ) -> None:
        """Writes ``model.safetensors``, ``config.json`` and, where there is none, a model card ``README.md``.

        Args:
            save_directory: Folder, made if need be.
            config: What to write in place of this model's own description.
            model_card_kwargs: Values for the card's template: ``title``, ``model_id``, ``network``.
            half: Whether weights of two and more dimensions are stored in half precision, for a file of half the size;
                the rest of the model, such as statistics of batch norm, stays as it is. It is read as float32 again.

        Raises:
            InputError: If a model with these weights could not be made from the configuration, for example because its
                network is not registered, or half precision does not reach as far as a weight; nothing is written then.
        """
        config = self._checked_config(config)
        halved = self._stored_weights(half=True) if half else None
        card = {"title": Path(save_directory).resolve().name, "model_id": ".", "network": _network_names(config)}
        super().save_pretrained(save_directory, config=config, model_card_kwargs=card | (model_card_kwargs or {}))
        if halved is not None:  # the base hands nothing on to what it has written the weights with
            _write(halved, Path(save_directory))

    @override
    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload the model",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Uploads what :meth:`save_pretrained` writes, and returns the address of the commit.

        Args:
            repo_id: Where to, ``"user/name"``.
            commit_message: What the history will say.
            private: Whether a new repository is private; by default what the account's settings say.
            token: Access; by default the token that ``hf auth login`` stored.
            branch: Branch to commit to.
            create_pr: Whether to open a pull request instead.

        Raises:
            InputError: As for :meth:`save_pretrained`; no repository is made then.
        """
        return super().push_to_hub(
            repo_id,
            config=self._checked_config(),
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
            model_card_kwargs={"title": repo_id.split("/")[-1], "model_id": repo_id},
        )

    @override
    def _save_pretrained(self, save_directory: Path) -> None:
        _write(self._stored_weights(), save_directory)

    def _stored_weights(self, half: bool = False) -> dict[str, Tensor]:
        # Copies: the format knows neither shared memory nor strides such as channels_last.
        weights = {
            name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, value in _module(self).state_dict().items()
        }
        buffers = {name for name, _ in _module(self).named_buffers()}
        for name, value in weights.items() if half else ():
            if value.ndim >= 2 and value.is_floating_point() and name not in buffers:
                weights[name] = value.half()
                if bool((weights[name].isinf() & value.isfinite()).any()):
                    raise InputError(
                        f"{name} has weights of {float(value.abs().max()):g}, too large for half precision"
                    )
        return weights

    @classmethod
    def _from_config(cls, config: Mapping[str, Any]) -> Self:
        names = [name for name in cls._hub_mixin_init_parameters if name != "self"]
        if not config.keys() <= set(names):
            raise InputError(f"its entries must be among {names}, got {sorted(config)}")
        parameters = cls._hub_mixin_init_parameters
        return cls(**{name: cls._decode_arg(parameters[name].annotation, value) for name, value in config.items()})

    def _checked_config(self, config: dict[str, Any] | None = None) -> dict[str, Any]:
        """The configuration, if a model made from it would take this one's weights."""
        if config is None:
            config = dict(self._hub_mixin_config or {})  # type: ignore[arg-type]
            for name in type(self)._hub_mixin_init_parameters:
                if isinstance(network := getattr(self, name, None), nn.Module):
                    # Now, not at construction: the network may have been replaced.
                    config[name] = _description(name, network)
        try:
            with torch.device("meta"):
                expected = _module(type(self)._from_config(config)).state_dict()
        except (TypeError, ValueError) as error:
            raise InputError(f"this {type(self).__name__} could not be made again from {config}: {error}") from error
        except (NotImplementedError, RuntimeError):
            return config  # a network that cannot be made without memory is not checked
        faults = _faults(expected, _module(self).state_dict())
        if faults:
            raise InputError(
                f"the weights of this {type(self).__name__} do not fit the network that its arguments describe, so that"
                f" it could not be loaded again ({faults}); if layers were replaced, register a function that does so"
            )
        return config


class EnergyModel(energy.EnergyModel, HubModel):
    """The :class:`~dat_lightning.core.energy.EnergyModel` of a registered architecture, kept in a folder or on the Hub.

    Args:
        backbone: Maps normalised images (N, C, H, W) to logits (N, K).
        mean: Mean of each channel, in units of [0, 1] pixels; ``None`` for a backbone that takes raw pixels.
        std: Standard deviation of each channel, likewise.
    """


def _module(model: HubModel) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"HubModel belongs beside nn.Module in the bases of {type(model).__name__}")
    return model


def _write(weights: dict[str, Tensor], folder: Path) -> None:
    # safetensors' own save_file leaves a file that its owner alone may read.
    with written_whole(folder / WEIGHTS_FILE) as file:
        file.write(save(weights, metadata={"format": "pt"}))


def _description(name: str, network: nn.Module) -> dict[str, Any]:
    # torch.compile wraps a network.
    description = architecture_of(getattr(network, "_orig_mod", network))
    if description is None:
        kind = type(network).__name__
        raise InputError(
            f"{name} is a {kind} that no registered architecture made with plain arguments, so that a file could not"
            f" name it; put @register_architecture({kind!r}) from dat_lightning on the class, or on a function that"
            " returns such a network, and make the network through it"
        )
    return description


def _network_names(config: Mapping[str, Any]) -> str:
    networks = [value for value in config.values() if isinstance(value, Mapping) and "arguments" in value]
    return ", ".join(f"{n['name']}({', '.join(f'{k}={v!r}' for k, v in n['arguments'].items())})" for n in networks)


def _file_of(source: str, name: str, download: Callable[[str], str]) -> Path:
    """A file in a folder, or else one of the Hub."""
    if Path(source).is_dir():
        if not (Path(source) / name).is_file():
            raise FileNotFoundError(
                f"{source} has no {name}; a folder that save_pretrained wrote has {CONFIG_FILE} and {WEIGHTS_FILE}"
                " (weights in other formats are not read)"
            )
        return Path(source) / name
    if (MODELS / source / name).is_file():
        raise InputError(f"{source!r} ships with the package: dat_lightning.pretrained({source!r}) returns it")
    try:
        return Path(download(name))
    except HFValidationError:
        raise FileNotFoundError(f"{source!r} is neither a folder nor the id of a model on the Hub") from None
    except (HfHubHTTPError, EntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        # Without its cause, which is a page of network internals.
        raise FileNotFoundError(
            f"{source!r} is no folder here, and the Hub did not give {name} of a model with that id"
            f" (a private one needs a token): {reason}"
        ) from None


def _read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LONGEST_CONFIG:
        raise InputError(f"{path} has {path.stat().st_size} bytes; the arguments of a model are a few hundred")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold the arguments of a model, got {config!r}")
    return config


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no readable safetensors file: {error}") from error
    return weights


def _faults(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """The first differences of names, shapes and kinds, as a list in words, and what is no number; empty if none."""
    faults = [f"missing {name}" for name in own if name not in weights]
    faults += [f"unexpected {name}" for name in weights if name not in own]
    faults += [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    for name, value in own.items():
        # A network that is made without memory holds nothing that could be compared.
        if name in weights and not weights[name].is_meta and (fault := fault_of(name, weights[name], value)):
            faults.append(fault)
    return ", ".join(faults[:5]) + (f" and {len(faults) - 5} more" if len(faults) > 5 else "")
