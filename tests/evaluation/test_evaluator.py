"""Values per example become figures of the whole data set, also after a crash."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dat_lightning.core import ThreatModel
from dat_lightning.core.errors import InputError
from dat_lightning.evaluation.evaluator import Evaluator
from dat_lightning.results.gathering import Values, gather
from dat_lightning.results.kept_values import read_values, write_values
from dat_lightning.results.measurement import Measurement
from tests import tiny

Batch = dict[str, Tensor]


class Plain(LightningModule):
    """A module of another project: a linear network, with weights that are a function of the seed."""

    def __init__(self, seed: int = 0, later: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3, bias=False)
        self.later = later
        with torch.no_grad():
            self.net.weight.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.flatten(1))
        return logits

    def on_test_start(self) -> None:
        with torch.no_grad():
            self.net.weight += self.later

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Leaves everything to the callbacks."""


class Probe(Evaluator):
    """Mean first logit; notes which examples it was asked for, and fails at one if told so."""

    def __init__(self, dirpath: Path | None = None, fails_at: int = -1, **settings: Any) -> None:
        super().__init__(None if dirpath is None else str(dirpath))
        self.fails_at, self.chosen = fails_at, settings
        self.asked: list[int] = []
        self.order: list[int] = []

    def settings(self) -> dict[str, Any]:
        return self.chosen

    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        if self.fails_at in batch["index"].tolist():
            raise InterruptedError("the power is gone")
        self.asked += batch["index"].tolist()
        return {"logit": pl_module(batch["x"])[:, 0], "pair": batch["x"].flatten(1)[:, :2]}

    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        self.order = values["index"].tolist()
        assert values["pair"].shape == (len(values["logit"]), 2)
        return [Measurement("mean", float(values["logit"].double().mean()), "mean logit", len(values["logit"]))]


IMAGES = torch.rand(10, 1, 2, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10) % 3


def batches(*indices: Sequence[int], images: Tensor = IMAGES, labels: Tensor = LABELS) -> list[Batch]:
    return [{"x": images[list(i)], "y": labels[list(i)], "index": torch.tensor(i)} for i in indices]


ALL = batches([0, 1, 2], [3, 4, 5], [6, 7, 8], [9])


def run(path: Path, probe: Evaluator, data: Sequence[Any] = ALL, module: LightningModule | None = None) -> Trainer:
    trainer = tiny.trainer(path, [probe])
    loader: DataLoader[Any] = DataLoader(list(data), batch_size=None)  # type: ignore[arg-type]
    trainer.test(module or Plain(), dataloaders=loader, verbose=False)
    return trainer


def mean_logit(module: Plain) -> float:
    return float((IMAGES.flatten(1).double().numpy() @ module.net.weight.detach().double().numpy()[0]).mean())


def test_figures_are_those_of_all_examples_in_order(tmp_path: Path) -> None:
    probe = Probe()
    trainer = run(tmp_path, probe, batches([7, 2], [9, 0, 1, 3, 4], [5, 6, 8]))
    assert probe.order == list(range(10))
    assert [(f.name, f.num_samples) for f in probe.figures] == [("mean", 10)]
    assert probe.figures[0].value == pytest.approx(mean_logit(Plain()), rel=1e-6)
    assert float(trainer.callback_metrics["test/mean"]) == pytest.approx(probe.figures[0].value)
    assert not list(tmp_path.rglob("*.values"))


def test_examples_that_a_sampler_repeats_count_once(tmp_path: Path) -> None:
    probe = Probe()
    run(tmp_path, probe, [*ALL, *batches([0, 1], [9, 4])])
    assert probe.order == list(range(10))
    assert probe.figures[0].value == pytest.approx(mean_logit(Plain()), rel=1e-6)


def test_an_interrupted_test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        run(tmp_path, Probe(tmp_path / "kept", fails_at=7))
    resumed, whole = Probe(tmp_path / "kept"), Probe()
    run(tmp_path, resumed)
    run(tmp_path, whole)
    assert resumed.asked == [6, 7, 8, 9]
    assert resumed.figures == whole.figures
    again = Probe(tmp_path / "kept")
    run(tmp_path, again)
    assert again.asked == []
    assert again.figures == whole.figures


def other_images() -> list[Batch]:
    images = IMAGES.clone()
    images[4, 0, 1, 1] += 1e-3
    return batches([0, 1, 2], [3, 4, 5], [6, 7, 8], [9], images=images)


def other_labels() -> list[Batch]:
    return batches([0, 1, 2], [3, 4, 5], [6, 7, 8], [9], labels=(LABELS + (torch.arange(10) == 4)) % 3)


def other_numbers() -> list[Batch]:
    """The same images, of which two have each other's place."""
    return [ALL[0], {**ALL[1], "index": torch.tensor([4, 3, 5])}, *ALL[2:]]


@pytest.mark.parametrize("change", [other_images, other_labels, other_numbers])
def test_other_data_are_not_mistaken(change: Any, tmp_path: Path) -> None:
    run(tmp_path, Probe(tmp_path / "kept"))
    probe = Probe(tmp_path / "kept")
    run(tmp_path, probe, change())
    assert sorted(probe.asked) == [3, 4, 5]


@pytest.mark.parametrize(
    "module",
    [Plain(seed=1), Plain(later=0.5), Plain().bfloat16()],
    ids=["other weights", "weights that the module loads when the test starts", "other precision"],
)
def test_other_weights_are_not_mistaken(module: Plain, tmp_path: Path) -> None:
    run(tmp_path, Probe(tmp_path / "kept"))
    probe = Probe(tmp_path / "kept")
    data = [{**batch, "x": batch["x"].to(module.net.weight.dtype)} for batch in ALL]
    run(tmp_path, probe, data, module)
    assert probe.asked == list(range(10))
    if module.net.weight.dtype == torch.float32:
        assert probe.figures[0].value == pytest.approx(mean_logit(module), rel=1e-6)


class Scaled(Plain):
    """Has a number that no weight and no structure shows, and a buffer outside its state dict."""

    mean: Tensor

    def __init__(self, scale: float, mean: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("mean", torch.tensor(mean), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x - self.mean)


def test_what_no_weight_shows_is_not_mistaken(tmp_path: Path) -> None:
    found = {}
    for scale, mean in ((1.0, 0.0), (2.0, 0.0), (1.0, 0.5)):
        module = Scaled(scale, mean)
        probe = Probe(tmp_path / "kept")
        run(tmp_path, probe, module=module)
        assert probe.asked == list(range(10))
        found[scale, mean] = probe.figures[0].value
        again = Probe(tmp_path / "kept")
        run(tmp_path, again, module=Scaled(scale, mean))
        assert again.asked == []
        assert again.figures == probe.figures
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("kind", [tuple, list])
def test_pairs_of_images_and_labels_are_numbered_by_their_place(kind: Any, tmp_path: Path) -> None:
    expected, probe = Probe(), Probe()
    run(tmp_path, expected)
    run(tmp_path, probe, [kind((batch["x"], batch["y"])) for batch in ALL])
    assert probe.order == list(range(10))
    assert probe.figures[0].value == expected.figures[0].value


def test_figures_tell_test_images_apart_and_not_their_batches(tmp_path: Path) -> None:
    def images(data: Any) -> str:
        probe = Probe()
        run(tmp_path, probe, data)
        return str(probe.figures[0].settings["test_images"])

    whole = {name: torch.cat([batch[name] for batch in ALL]) for name in ALL[0]}
    assert images(ALL) == images([whole])
    assert len({images(ALL), images(other_images()), images(other_labels())}) == 3


def test_different_examples_with_one_index_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 examples have the index 3: index must number the examples of the whole"):
        run(tmp_path, Probe(), [*ALL, {**ALL[0], "index": torch.tensor([3, 11, 12])}])


def test_different_examples_of_two_ranks_with_one_index_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of loaders that give each rank its part and number that from 0."""
    mine = {"index": torch.arange(4), "digest": torch.arange(4)}
    theirs = {"index": torch.arange(4), "digest": torch.tensor([0, 1, 9, 3])}
    monkeypatch.setattr("dat_lightning.results.gathering.all_ranks", lambda part: [part, theirs])
    with pytest.raises(InputError, match="2 examples have the index 2: index must number the examples of the whole"):
        gather([mine], same_on_ranks=True)
    assert gather([mine])["digest"].tolist() == [0, 1, 2, 3]
    assert gather([theirs], same_on_ranks=True)["digest"].tolist() == [0, 1, 9, 3]


def test_other_settings_and_evaluators_are_not_mistaken(tmp_path: Path) -> None:
    class Other(Probe):
        """Another evaluator with the same settings."""

    Other.__name__ = "Probe"

    def asked(probe: Probe) -> int:
        run(tmp_path, probe)
        return len(probe.asked)

    kept = tmp_path / "kept"
    for probe in (
        Probe(kept, attack=ThreatModel(eps=1.0)),
        Probe(kept, attack=ThreatModel(eps=0.5)),
        Probe(kept, attack=None),
        Other(kept, attack=None),
        Probe(kept, path=Path("a")),
    ):
        assert asked(probe) == 10
    assert asked(Probe(kept, attack=ThreatModel(eps=0.5))) == 0


def test_settings_must_be_primitives(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"settings must be primitives, got Tensor"):
        run(tmp_path, Probe(tmp_path / "kept", weights=torch.zeros(3)))


def test_any_damage_to_a_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "values.values"
    values = {"a": torch.arange(3.0), "b": torch.tensor([[1, 2], [3, 4], [5, 6]])}
    write_values(path, values)
    assert [p.name for p in tmp_path.iterdir()] == ["values.values"]
    whole = path.read_bytes()

    found = read_values(path, 3)
    assert found is not None
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], values[name]) for name in values)
    assert read_values(path, 4) is None
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert read_values(path, 3) is None
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert read_values(path, 3) is None
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(path)
    assert read_values(path, 3) is None


def test_damaged_files_are_computed_anew(tmp_path: Path) -> None:
    first = Probe(tmp_path / "kept")
    run(tmp_path, first)
    files = sorted((tmp_path / "kept").rglob("*.values"))
    assert len(files) == 4
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-30])
    for probe, count in ((Probe(tmp_path / "kept"), 6), (Probe(tmp_path / "kept"), 0)):
        run(tmp_path, probe)
        assert len(probe.asked) == count
        assert probe.figures == first.figures


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A file on a full disk."""

        def __init__(self, dir: Path, **_: Any) -> None:
            self.name = str(dir / "half.tmp")
            Path(self.name).write_bytes(b"P")

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            """Closes."""

        def write(self, content: bytes) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            """Closes."""

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", Full)
    with pytest.raises(OSError, match="No space left"):
        write_values(tmp_path / "v.values", {"a": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []


class Odd(Probe):
    """Returns what it is given."""

    def __init__(self, values: Values, dirpath: Path | None = None) -> None:
        super().__init__(dirpath)
        self.values = values

    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
        return self.values

    def summarize(self, trainer: Trainer, pl_module: LightningModule, values: Values) -> list[Measurement]:
        return [Measurement("sum", float(values["v"].sum()), "sum", len(values["v"]))]


def test_values_of_half_precision_are_kept_exactly(tmp_path: Path) -> None:
    value = torch.tensor([0.5, 1.0, 0.099609375], dtype=torch.bfloat16)
    for _ in range(2):
        probe = Odd({"v": value}, tmp_path / "kept")
        run(tmp_path, probe, ALL[:1])
        assert probe.figures[0].value == 1.599609375


@pytest.mark.parametrize("values", [{"v": torch.zeros(2)}, {"v": torch.tensor(0.0)}, {"index": torch.zeros(3)}])
def test_values_must_be_per_example(values: Values, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Odd: the values of a batch of 3 examples must have that first dimension"):
        run(tmp_path, Odd(values), ALL[:1])


def test_a_batch_needs_its_parts(tmp_path: Path) -> None:
    for batch in ({"x": IMAGES}, [IMAGES], IMAGES):
        with pytest.raises(ValueError, match=r"Probe needs 'y' in its batch, got \['x'\]; an evaluation loader"):
            run(tmp_path, Probe(), [batch])
    with pytest.raises(ValueError, match="Probe needs 'x' in its batch, got list"):
        run(tmp_path, Probe(), [["images", "labels"]])


def test_one_loader_at_a_time(tmp_path: Path) -> None:
    class Two(Plain):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            """Leaves everything to the callbacks."""

    loaders: list[Any] = [DataLoader(ALL, batch_size=None)] * 2  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Probe evaluates one loader, got 2"):
        tiny.trainer(tmp_path, [Probe()]).test(Two(), dataloaders=loaders, verbose=False)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize(("count", "found"), [(2, "2"), (0, "none")])
@pytest.mark.parametrize("with_probe", [True, False])
def test_several_loaders_and_none_are_sentences_with_our_modules(
    count: int, found: str, with_probe: bool, tmp_path: Path
) -> None:
    """Lightning refuses several before its hooks, and returns an empty list for none."""
    data = TensorDataset(torch.rand(4, 1, 16, 16), torch.arange(4))
    loaders = [DataLoader(data, batch_size=2)] * count
    who = "Probe" if with_probe else "RobustClassifierModule"
    trainer = tiny.trainer(tmp_path, [Probe()] if with_probe else [])
    with pytest.raises(InputError, match=f"{who} evaluates one loader, got {found}"):
        trainer.test(tiny.stage1(), dataloaders=loaders, verbose=False)
    with pytest.raises(InputError, match=f"RobustClassifierModule evaluates one loader, got {found}"):
        tiny.trainer(tmp_path, limit_val_batches=1).validate(tiny.stage1(), dataloaders=loaders, verbose=False)


def test_without_batches_on_purpose_nothing_is_said(tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(4, 1, 16, 16), torch.arange(4))
    trainer = tiny.trainer(tmp_path, [Probe()], limit_test_batches=0)
    assert trainer.test(tiny.stage1(), dataloaders=DataLoader(data), verbose=False) == []


def test_nothing_to_evaluate() -> None:
    with pytest.raises(ValueError, match="there are no examples to evaluate: the test loader gave no batch"):
        gather([])


def test_a_second_test_forgets_the_first(tmp_path: Path) -> None:
    probe = Probe(tmp_path / "kept")
    run(tmp_path, probe)
    first = probe.figures
    run(tmp_path, probe, ALL[:2], Plain(seed=1))
    assert probe.order == list(range(6))
    assert probe.figures != first
    assert len(list((tmp_path / "kept").iterdir())) == 2
