"""Models that ship: each loads by its name, is as good as its card says, and was made by commands that are there."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor

from dat_lightning import DigitsDataModule, EnergyModel, SmallResNet, pretrained
from dat_lightning.cli import main
from dat_lightning.core.errors import InputError
from dat_lightning.explore import open_checkpoint
from dat_lightning.features import DigitsJudge
from dat_lightning.results.evaluation_file import read_evaluation
from dat_lightning.weights import load_weights, shipped_models
from dat_lightning.weights.hub import MODELS
from dat_lightning.weights.shipped import located
from tests.test_cli import STAGE2, TINY, refusal

ROOT = Path(__file__).resolve().parents[2]
MEGABYTES = 3  # of all models together

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")


def accuracy(model: EnergyModel, examples: list[tuple[Tensor, int]]) -> tuple[float, int]:
    """Of labelled images; and how many they are."""
    images, labels = torch.stack([x for x, _ in examples]), torch.tensor([y for _, y in examples])
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean()), len(examples)


def accuracy_on_digits(model: EnergyModel) -> tuple[float, int]:
    """Of the test digits, which come with scikit-learn."""
    test = DigitsDataModule().in_distribution("test")
    return accuracy(model, [(x, int(y)) for x, y in (test[i] for i in range(len(test)))])


def accuracy_on_examples(name: str) -> Callable[[EnergyModel], tuple[float, int]]:
    """Of the test images that ship with a model for the web page."""

    def measure(model: EnergyModel) -> tuple[float, int]:
        shown = open_checkpoint(name).examples
        assert shown is not None
        return accuracy(model, [(x, int(y)) for x, y in (shown[i] for i in range(len(shown))) if y is not None])

    return measure


# One figure of each model's card: the metric's type there, and how it is measured.
FIGURES: dict[str, tuple[str, Callable[[EnergyModel], tuple[float, int]]]] = {
    "cifar10_cpu": ("accuracy_on_examples", accuracy_on_examples("cifar10_cpu")),
    "digits": ("accuracy", accuracy_on_digits),
    "fashion_mnist": ("accuracy_on_examples", accuracy_on_examples("fashion_mnist")),
}


def test_every_model_has_a_figure_here() -> None:
    assert FIGURES.keys() == set(shipped_models())


@pytest.mark.parametrize("name", shipped_models())
def test_a_model_is_as_good_as_its_card_says(name: str) -> None:
    metric, measure = FIGURES[name]
    card = ModelCard.load(MODELS / name / "README.md")
    (stated,) = [result.metric_value for result in card.data.eval_results if result.metric_type == metric]
    value, count = measure(pretrained(name))
    # Half precision rounds the same weights everywhere; other machines add in another order. The card has four digits.
    assert value == pytest.approx(stated, abs=1 / count + 5e-5)


@pytest.mark.parametrize("name", shipped_models())
def test_a_model_is_float32_in_eval_mode_from_a_file_in_half_precision(name: str) -> None:
    model = pretrained(name)
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for key, value in load_file(MODELS / name / "model.safetensors").items():
        if value.ndim >= 2 and key not in ("mean", "std"):
            assert value.dtype == torch.float16, key


@pytest.mark.parametrize("name", shipped_models())
def test_a_card_says_what_a_reader_has_to_know_and_its_commands_are_there(name: str) -> None:
    text = (MODELS / name / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["Data", "How it was made", "Figures", "What it is not good for"]
    assert "**Half precision.**" in text
    assert re.search(r"\bSeed \d", text)
    assert f'pretrained("{name}")' in text
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    made = [words for words in map(shlex.split, lines) if words[:2] == ["dat-lightning", "export"]]
    assert [words[words.index("--output") + 1] for words in made] == [f"dat_lightning/weights/models/{name}"]
    assert made[0][-2:] == ["--half", "true"]
    named = [Path(word) for line in lines for word in shlex.split(line) if word.endswith(".yaml")]
    assert len(named) >= 3
    assert all((ROOT / path).is_file() for path in named)


def test_all_models_are_small() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= MEGABYTES * 1_000_000


def test_another_name_is_a_sentence_that_lists_the_names() -> None:
    for name in ("digit", "", "..", "digits/", "../models/digits"):
        with pytest.raises(InputError, match=r"no model '.*' ships with dat_lightning; those that do are .*'digits'"):
            pretrained(name)


# A name where paths stand.


def test_a_name_is_a_folder_and_a_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert located("digits") == MODELS / "digits"
    assert located("./digits") == located(Path("digits")) == Path("digits")
    assert located("digits.ckpt") == Path("digits.ckpt")
    for make in (Path.mkdir, Path.touch):
        make(tmp_path / "digits")
        with pytest.raises(InputError, match=r"'digits' is a model that ships .* write \./digits for what is here, /"):
            located("digits")
        assert located("./digits") == Path("digits")
        assert located(str(MODELS / "digits")) == MODELS / "digits"
        (tmp_path / "digits").rename(tmp_path / make.__name__)


def test_training_can_begin_with_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    model = EnergyModel(SmallResNet(), mean=[0.3], std=[0.35]).eval()
    report = load_weights(model, "digits")
    x = torch.rand(3, 1, 16, 16)
    assert torch.equal(model(x), pretrained("digits")(x))
    assert report.ignored == report.initialised == ()
    said = refusal(capsys, "fit", "--config", STAGE2, "--config", TINY, "--model.init_from", "digits")
    assert said.startswith("digits does not fit the network: ")


@pytest.mark.usefixtures("_in_an_empty_folder")
def test_the_command_line_tests_a_model(tmp_path: Path) -> None:
    short = ["--trainer.callbacks=[]", "--trainer.logger=false", "--model.eval_threat_model.num_steps=1"]
    # The configuration's own initial weights are not those that are tested.
    main(["test", "--config", STAGE2, *short, "--model.init_from", "nowhere.ckpt", "--ckpt_path", "digits"])
    evaluation = read_evaluation(tmp_path / "runs" / "digits" / "dat" / "evaluation.json")
    assert evaluation.provenance["checkpoint"] == {"path": "digits", "sha256": None}
    accuracy = evaluation.entry("accuracy")
    assert accuracy is not None
    assert accuracy.value == pytest.approx(accuracy_on_digits(pretrained("digits"))[0], abs=1e-6)


@pytest.mark.usefixtures("_in_an_empty_folder")
def test_the_command_line_samples_from_a_model(tmp_path: Path) -> None:
    page = yaml.safe_load((MODELS / "digits" / "explore.yaml").read_text(encoding="utf-8"))
    (sampler,) = page["trainer"]["callbacks"]
    sampler["init_args"]["num_samples"] = 20
    writer = {"class_path": "dat_lightning.SampleWriter", "init_args": {"dirpath": "samples", "num_steps": 6}}
    Path("own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [sampler, writer], "logger": False}}))
    # What can run no code is read as ever where a checkpoint might.
    main(["predict", "--config", STAGE2, "--config", "own.yaml", "--weights_only", "false", "--ckpt_path", "digits"])
    with np.load(tmp_path / "samples" / "samples.npz") as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)[:, :1] / 255
        labels = torch.from_numpy(file["arr_1"]).long()
    assert int((DigitsJudge()(images).argmax(1) == labels).sum()) >= 16


@pytest.mark.usefixtures("_in_an_empty_folder")
def test_mistakes_cost_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "fit", "--config", STAGE2, "--ckpt_path", "digits")
    assert said == (
        "--ckpt_path digits has weights alone, and training goes on from an optimiser's state; for its weights alone"
        " use --model.init_from"
    )
    said = refusal(capsys, "test", "--config", STAGE2, "--config", TINY, "--ckpt_path", "digits")
    assert said.startswith("digits does not fit the network: ")
    (tmp_path / "digits").mkdir()
    assert "write ./digits for what is here" in refusal(capsys, "test", "--config", STAGE2, "--ckpt_path", "digits")
    with pytest.raises(InputError, match=r"write \./digits for what is here"):
        open_checkpoint("digits")


@pytest.fixture
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_names_are_those_of_the_folders() -> None:
    assert shipped_models() == tuple(sorted(path.name for path in MODELS.iterdir()))
