"""Models as folders and on the Hub: what is written reads back, and what cannot be read says why."""

import copy
import json
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.hub_mixin
import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dat_lightning.weights.hub
from dat_lightning import EnergyModel, SmallResNet, register_architecture, resnet50, timm_model
from dat_lightning.core.errors import InputError


def small_model(seed: int = 0, **kwargs: Any) -> EnergyModel:
    torch.manual_seed(seed)
    model = EnergyModel(SmallResNet(3, 2, widths=(4, 8)), **{"mean": [0.1, 0.2], "std": (0.5, 0.4), **kwargs})
    model(torch.rand(4, 2, 8, 8))  # moves the running statistics
    return model


def images(channels: int = 2) -> Tensor:
    return torch.rand(3, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def saved(folder: Path, **kwargs: Any) -> Path:
    small_model(**kwargs).save_pretrained(folder)
    return folder


def test_a_saved_model_gives_the_same_logits_in_eval_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    model.save_pretrained(tmp_path / "new" / "model")
    again = EnergyModel.from_pretrained(tmp_path / "new" / "model")
    assert not any(module.training for module in again.modules())
    assert torch.equal(again(images()), model.eval()(images()))
    assert str(again) == str(model)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert {path.name for path in (tmp_path / "new" / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert capsys.readouterr() == ("", "")


def test_the_configuration_holds_the_arguments(tmp_path: Path) -> None:
    config = json.loads((saved(tmp_path) / "config.json").read_text())
    arguments = {
        "num_classes": 3,
        "in_channels": 2,
        "widths": [4, 8],
        "activation": "silu",
        "stem_pool": 1,
        "norm": "batch",
    }
    backbone = {"name": "SmallResNet", "arguments": arguments}
    assert config == {"backbone": backbone, "mean": [0.1, 0.2], "std": [0.5, 0.4]}


def test_a_model_without_normalisation_stays_one(tmp_path: Path) -> None:
    model = small_model(mean=None, std=None)
    model.save_pretrained(tmp_path)
    again = EnergyModel.from_pretrained(str(tmp_path))
    assert again.mean is None
    assert torch.equal(again(images()), model.eval()(images()))


def test_weights_in_channels_last_order_are_kept(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path / "contiguous")
    model.to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path / "channels_last")
    files = [tmp_path / name / "model.safetensors" for name in ("contiguous", "channels_last")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not model.backbone.get_submodule("blocks.0.conv1").weight.is_contiguous()  # type: ignore[operator]


def test_weights_that_share_memory_are_kept(tmp_path: Path) -> None:
    @register_architecture("test tied")
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x)).mean((1, 2))
            return y

    model = EnergyModel(Tied())
    model.save_pretrained(tmp_path)
    again = EnergyModel.from_pretrained(tmp_path)
    assert torch.equal(again(images()), model(images()))


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    saved(tmp_path)
    state = torch.get_rng_state()
    EnergyModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_saving_again_replaces_weights_and_configuration_and_keeps_an_edited_card(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    model = small_model(seed=1, mean=[0.0, 0.0])
    model.save_pretrained(tmp_path)
    assert torch.equal(EnergyModel.from_pretrained(tmp_path)(images()), model.eval()(images()))
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_what_they_copy(copied: Callable[[EnergyModel], EnergyModel], tmp_path: Path) -> None:
    model = small_model()
    copied(model).save_pretrained(tmp_path)
    assert torch.equal(EnergyModel.from_pretrained(tmp_path)(images()), model.eval()(images()))


def test_a_replaced_backbone_is_the_one_that_is_saved(tmp_path: Path) -> None:
    model = small_model()
    model.backbone = SmallResNet(5, 2, widths=[4])
    model.save_pretrained(tmp_path)
    assert torch.equal(EnergyModel.from_pretrained(tmp_path)(images()), model.eval()(images()))


class Tempered(EnergyModel):
    """Adds an argument, as a user's model might."""

    def __init__(self, backbone: nn.Module, mean: Sequence[float] | None = None, temperature: float = 1.0) -> None:
        super().__init__(backbone, mean, None if mean is None else [1.0] * len(mean))
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.temperature


def test_a_subclass_saves_its_own_arguments(tmp_path: Path) -> None:
    model = Tempered(SmallResNet(3, 2, (4,)), [0.5, 0.25], temperature=2.0)
    model.save_pretrained(tmp_path)
    again = Tempered.from_pretrained(tmp_path)
    assert again.temperature == 2.0
    assert torch.equal(again(images()), model.eval()(images()))
    with pytest.raises(ValueError, match=r"does not describe a EnergyModel: its entries must be .*temperature"):
        EnergyModel.from_pretrained(tmp_path)


def test_an_unregistered_backbone_works_but_is_not_saved(tmp_path: Path) -> None:
    model = EnergyModel(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)))
    assert model(images()).shape == (3, 3)
    message = "backbone is a Sequential that no registered architecture made .* put @register_architecture"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_changed_network_is_not_saved_under_the_old_description(tmp_path: Path) -> None:
    model = small_model()
    assert isinstance(model.backbone, SmallResNet)
    model.backbone.fc = nn.Linear(8, 7)
    message = r"do not fit .* \(backbone.fc.weight has shape \(7, 8\) instead of \(3, 8\), .*register a function"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "model")
    model = EnergyModel(SmallResNet(3, 2, (4,)), np.array([0.1, 0.2]), [1.0, 1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="could not be made again"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_network_of_timm_saves_without_its_checkpointing(tmp_path: Path) -> None:
    model = EnergyModel(timm_model("resnet10t", 4, grad_checkpointing=True))
    model.save_pretrained(tmp_path)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(EnergyModel.from_pretrained(tmp_path)(x), model.eval()(x))
    assert '"resnet10t"' in (tmp_path / "config.json").read_text()


def break_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("backbone.fc.bias"), "does not fit .*: missing backbone.fc.bias$"),
        (lambda w: w.update(other=torch.zeros(1)), "does not fit .*: unexpected other$"),
        (
            lambda w: w.update({"backbone.fc.bias": torch.zeros(4)}),
            r"backbone.fc.bias has shape \(4,\) instead of \(3,\)$",
        ),
        (lambda w: (w.pop("mean"), w.pop("std")), "missing mean, missing std$"),
        (lambda w: w.clear(), "missing mean, .* and [0-9]+ more$"),
    ],
)
def test_weights_have_to_fit_the_network(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    break_weights(saved(tmp_path), change)
    with pytest.raises(ValueError, match=message):
        EnergyModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json is not JSON: "),
        ("\xff", "config.json is not JSON: "),
        ("[1]", r"config.json must hold the arguments of a model, got \[1\]"),
        ("{}", "config.json does not describe a EnergyModel: .*'backbone'"),
        ('{"backbone": null}', "an architecture must be"),
        (
            '{"backbone": {"name": "os.system", "arguments": {"command": "true"}}}',
            "'os.system' is not registered; known",
        ),
        ('{"backbone": {"name": "SmallResNet", "arguments": {"wide": 3}}}', "'SmallResNet' has the arguments .*wide"),
        ('{"backbone": {"name": "SmallResNet", "arguments": {"widths": 3}}}', "'SmallResNet' refuses"),
        ('{"backbone": {"name": "SmallResNet", "arguments": {}}, "mean": [0.1]}', "mean and std go together"),
        ('{"backbone": {"name": "SmallResNet", "arguments": {}}, "mean": "a", "std": "b"}', "does not describe"),
        ('{"backbone": {"name": "SmallResNet", "arguments": {}}, "class": 1}', "its entries must be among .*class"),
    ],
)
def test_a_wrong_configuration_is_refused(config: str, message: str, tmp_path: Path) -> None:
    (saved(tmp_path) / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        EnergyModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: torch.full_like(value, float("nan")), r"stem\.weight holds NaN or infinite numbers"),
        (lambda value: value / 0, r"stem\.weight holds NaN or infinite numbers"),
        (lambda value: value.int(), r"stem\.weight holds torch\.int32 instead of torch\.float32"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(
    change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    weights = load_file(saved(tmp_path) / "model.safetensors")
    weights["backbone.stem.weight"] = change(weights["backbone.stem.weight"])
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors does not fit the network of config\.json: .*{message}"):
        EnergyModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"backbone": "' + "x" * 200_000 + '"}'])
def test_an_absurd_configuration_is_refused_in_few_words(text: str, tmp_path: Path) -> None:
    (saved(tmp_path) / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json (is not JSON|has \d+ bytes)") as refusal:
        EnergyModel.from_pretrained(tmp_path)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_is_named(name: str, tmp_path: Path) -> None:
    (saved(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path))} has no {name}; "):
        EnergyModel.from_pretrained(tmp_path)


class Hostile:
    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return (Path.touch, (Path("ran"),))  # type: ignore[return-value]


def test_a_pickle_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"evil": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="weights in other formats are not read"):
        EnergyModel.from_pretrained(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is no readable safetensors file"):
        EnergyModel.from_pretrained(folder)
    assert not Path("ran").exists()


def test_the_card_says_what_it_is_and_leaves_nothing_to_fill_in(tmp_path: Path) -> None:
    card = (saved(tmp_path / "digits") / "README.md").read_text(encoding="utf-8")
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "library_name: dat-lightning" in header
    assert "license: mit" in header
    assert "- energy-based-model" in header
    assert body.startswith("\n# digits\n")
    assert 'EnergyModel.from_pretrained(".")' in body
    assert "https://arxiv.org/abs/2510.13872" in body
    assert (
        "SmallResNet(num_classes=3, in_channels=2, widths=[4, 8], activation='silu', stem_pool=1, norm='batch')" in body
    )
    for placeholder in ("More Information Needed", "{{", "{%", "None"):
        assert placeholder not in card


def test_the_card_s_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (saved(tmp_path) / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"images": images()}
    exec(example, names)
    assert torch.equal(names["energies"], -names["logits"].logsumexp(1))


# The Hub itself.


class Upload(NamedTuple):
    repo_id: str
    files: dict[str, bytes]
    arguments: dict[str, Any]


class FakeHub:
    """What the mixin asks of huggingface_hub's HfApi."""

    def __init__(self) -> None:
        self.tokens: list[str | None] = []
        self.created: list[dict[str, Any]] = []
        self.uploads: list[Upload] = []

    def __call__(self, token: str | None = None) -> "FakeHub":
        self.tokens.append(token)
        return self

    def create_repo(self, repo_id: str, **arguments: Any) -> Any:
        self.created.append({"repo_id": repo_id, **arguments})
        return type("Url", (), {"repo_id": repo_id})()

    def upload_folder(self, repo_id: str, folder_path: Path, **arguments: Any) -> str:
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.uploads.append(Upload(repo_id, files, arguments))
        return "https://hub/commit"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", fake)
    return fake


def test_pushing_uploads_what_saving_writes(hub: FakeHub, tmp_path: Path) -> None:
    model = small_model()
    address = model.push_to_hub("someone/digits", private=True, token="t", branch="b", commit_message="first")
    assert address == "https://hub/commit"
    assert hub.tokens == ["t"]
    assert hub.created == [{"repo_id": "someone/digits", "private": True, "exist_ok": True}]
    ((repo, files, arguments),) = hub.uploads
    assert (repo, arguments["commit_message"], arguments["revision"]) == ("someone/digits", "first", "b")
    assert b'EnergyModel.from_pretrained("someone/digits")' in files["README.md"]
    assert b"# digits\n" in files["README.md"]
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    assert torch.equal(EnergyModel.from_pretrained(tmp_path)(images()), model.eval()(images()))


def test_nothing_is_made_on_the_hub_for_an_unregistered_backbone(hub: FakeHub) -> None:
    with pytest.raises(ValueError, match="backbone is a Flatten that no registered architecture made"):
        EnergyModel(nn.Flatten()).push_to_hub("someone/digits")
    assert not hub.created
    assert not hub.uploads


def test_a_model_of_the_hub_is_downloaded_with_all_that_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    asked = []

    def download(repo_id: str, name: str, **arguments: Any) -> str:
        asked.append((repo_id, name, arguments["revision"], arguments["token"], arguments["local_files_only"]))
        return str(tmp_path / name)

    monkeypatch.setattr(dat_lightning.weights.hub, "hf_hub_download", download)
    model = EnergyModel.from_pretrained("someone/digits", revision="r", token="t", local_files_only=True)
    assert asked == [("someone/digits", name, "r", "t", True) for name in ("config.json", "model.safetensors")]
    assert torch.equal(model(images()), small_model().eval()(images()))


def test_an_id_that_the_hub_does_not_have_is_named_without_pages_of_network_internals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    Exception.__init__(missing, "401 Client Error.\nand\nmuch more")
    for cause in (missing, LocalEntryNotFoundError("offline\nand more"), ConnectionError()):

        def download(*args: object, cause: Exception = cause, **kwargs: object) -> str:
            raise cause

        monkeypatch.setattr(dat_lightning.weights.hub, "hf_hub_download", download)
        with pytest.raises(FileNotFoundError, match="'someone/digits' is no folder here, and the Hub did") as caught:
            EnergyModel.from_pretrained("someone/digits")
        assert "more" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


def test_the_name_of_a_model_that_ships_is_not_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dat_lightning.weights.hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(InputError, match=r"'digits' ships with the package: dat_lightning.pretrained\('digits'\)"):
        EnergyModel.from_pretrained("digits")


def test_the_real_client_without_network_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'someone/digits' is no folder here"):
        EnergyModel.from_pretrained("someone/digits", local_files_only=True, cache_dir=tmp_path)
    for path in ("runs/no/model", str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match=f"'{path}' is neither a folder nor the id"):
            EnergyModel.from_pretrained(path)


# What other libraries' evaluators ask of a model.


def test_an_energy_model_is_a_classifier_as_evaluators_expect() -> None:
    model = small_model().eval()
    assert isinstance(model, nn.Module)
    assert isinstance(model, PyTorchModelHubMixin)
    x = images().requires_grad_()
    logits = model(x)
    assert logits.shape == (3, 3)
    assert logits.dtype == torch.float32
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])), x)
    assert gradient.abs().amax((1, 2, 3)).min() > 0
    with torch.no_grad():
        assert torch.equal(model(x), logits)


def test_a_model_moves_to_a_device_as_a_whole(tmp_path: Path) -> None:
    with torch.device("meta"):
        assert EnergyModel(resnet50(), [0.5] * 3, [0.2] * 3)(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
    model = EnergyModel.from_pretrained(saved(tmp_path), map_location="meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model(images().to("meta")).device.type == "meta"
