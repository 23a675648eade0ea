"""DAT whose attacks go on: by hand in float64, which data it takes, and resuming."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn

from dat_lightning import AUCCurriculum, CorruptImageError, DATWarmAttacksModule, DigitsDataModule, ThreatModel
from dat_lightning.core.errors import InputError
from dat_lightning.data import SizedDataset
from tests import tiny
from tests.keeper import fitted
from tests.modules import by_hand
from tests.modules.resumed import CONFIGS, TINY, epoch_that_goes_on
from tests.modules.two_steps import with_two_steps


def started(path: Path, data: LightningDataModule | None = None, **kwargs: Any) -> Any:
    """A module in a Trainer with data, without a run."""
    module = with_two_steps(DATWarmAttacksModule, **kwargs)
    module.trainer = tiny.trainer(path)
    module.trainer.datamodule = data
    return module


def shift_between(image: Tensor, moved: Tensor) -> tuple[int, int]:
    """By how many pixels, down and to the right, an image over black was moved."""
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            if torch.equal(shifted(image, down, right), moved):
                return down, right
    raise AssertionError("no shift gives the image")


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    result = torch.zeros_like(image)
    height, width = image.shape[-2:]
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                result[..., i, j] = image[..., i - down, j - right]
    return result


def attack(net: nn.Module, x: Tensor, start: Tensor, y: Tensor, steps: int) -> Tensor:
    """Steps of 0.5 in L2 up the cross-entropy of one image, inside ε 1 around ``x``, by hand."""
    state = start
    for number in range(steps + 1):
        delta = state - x
        state = (x + delta * min(1.0, 1.0 / max(float(delta.norm()), 1e-12))).clamp(0, 1)
        if number == steps:
            return state
        state = state.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(by_hand.negative_log_likelihood(net(state), y), state)
        state = state.detach() + 0.5 * gradient / (gradient.norm() + 1e-10)
    raise AssertionError


def test_warm_attacks_go_on_through_the_shifts_of_both_draws(tmp_path: Path) -> None:
    """In float64, by loops over pixels: three passes over the same images, each with shifts of its own."""
    data = tiny.digits()
    module = started(tmp_path, data, threat_model=ThreatModel(eps=1.0, step_size=0.5, num_steps=1))
    net = copy.deepcopy(module.double().energy_model).eval()
    stream: Any = data.training_stream("clf")
    size, images = stream.size, [3, 700, 1000]
    kept = {index: torch.zeros(1, 16, 16, dtype=torch.float64) for index in images}
    moves = set()
    for number in range(3):
        draw_of = {stream.index(draw): draw for draw in range(number * size, (number + 1) * size)}
        draws = [draw_of[index] for index in images]
        drawn = [stream(draw) for draw in draws]
        x, y = (
            torch.stack([image for image, _ in drawn]).double(),
            torch.tensor([int(label or 0) for _, label in drawn]),
        )
        x_adv = module.adversarial_examples(x, y, torch.tensor(draws))
        for k, index in enumerate(images):
            down, right = shift_between(stream.dataset[index][0].double(), x[k])
            moves.add((down, right))
            expected = attack(net, x[k : k + 1], x[k : k + 1] + shifted(kept[index], down, right), y[k : k + 1], 1)
            torch.testing.assert_close(x_adv[k : k + 1], expected, rtol=0, atol=1e-9)
            back = shifted(expected[0] - x[k], -down, -right)
            seen = shifted(shifted(torch.ones(1, 16, 16), down, right), -down, -right) > 0
            kept[index] = torch.where(seen, back, kept[index])
    assert len(moves) > 2
    assert sum(int((row != 0).any()) for row in module.perturbations) == 3
    assert module.perturbations.shape == (size, 1, 256)


def test_of_an_image_twice_in_a_batch_the_last_perturbation_is_kept() -> None:
    """And nothing that is not finite."""
    table, ends = torch.ones(5, 1, 4), torch.arange(16.0).view(4, 1, 4)
    ends[2, 0, 1:] = torch.tensor([torch.nan, torch.inf, 7.0])
    DATWarmAttacksModule._keep(table, torch.tensor([3, 1, 3, 0]), ends)
    expected = [[12.0, 13.0, 14.0, 15.0], [4.0, 5.0, 6.0, 7.0], [1.0] * 4, [8.0, 0.0, 0.0, 7.0], [1.0] * 4]
    assert table[:, 0].tolist() == expected


class Watched:
    """A data set that counts what is read of it; the first image is corrupt, and another one may be smaller."""

    def __init__(self, dataset: SizedDataset, smaller: int | None) -> None:
        self.dataset, self.smaller = dataset, smaller
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int, /) -> Any:
        self.reads.append(index)
        if index == 0:
            raise CorruptImageError("the first image is not readable")
        image, label = self.dataset[index]
        return (image[:, :8, :8] if index == self.smaller else image), label


class WatchedDigits(DigitsDataModule):
    def __init__(self, smaller: int | None = None) -> None:
        super().__init__(validation_size=20, num_ood=200, num_held_out=50)
        self.train = Watched(super().in_distribution("train"), smaller)

    def in_distribution(self, split: Any) -> SizedDataset:
        return self.train if split == "train" else super().in_distribution(split)


def draws_of(data: DigitsDataModule, *indices: int) -> Tensor:
    """Which draws of the first pass are these images."""
    stream: Any = data.training_stream("clf")
    draw_of = {stream.index(draw): draw for draw in range(stream.size)}
    return torch.tensor([draw_of[index] for index in indices])


def test_images_are_read_in_the_first_step_alone_and_may_be_corrupt(tmp_path: Path) -> None:
    data = WatchedDigits()
    module, draws = started(tmp_path, data), draws_of(data, 0, 5, 9)
    x, y = torch.rand(3, 1, 16, 16), torch.arange(3)
    module.adversarial_examples(x, y, draws)
    first = list(data.train.reads)
    assert first[0] == 0
    assert first[-2:] == [5, 9]
    module.adversarial_examples(x, y, draws)
    assert data.train.reads == first
    assert module.perturbations[[0, 5, 9]].flatten(1).any(1).all()


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    x, y, data = torch.rand(2, 1, 16, 16), torch.arange(2), WatchedDigits(smaller=9)
    with pytest.raises(InputError, match="images of the 'clf' stream must all have one size, got 8×8, 16×16"):
        started(tmp_path, data).adversarial_examples(x, y, draws_of(data, 5, 9))
    module = started(tmp_path, data)
    module.adversarial_examples(x, y, draws_of(data, 5, 6))
    with pytest.raises(InputError, match=r"one size: the first are 16×16, .* 256 pixels, but .* x_clf is 8×8"):
        module.adversarial_examples(x[:1, :, :8, :8], y[:1], draws_of(data, 9))


def run(path: Path, steps: int, resume: Path | None = None) -> tuple[Trainer, Any, Tensor]:
    curriculum = AUCCurriculum(max_steps=4, auc_threshold=0.0, window_samples=64)
    threat_model = ThreatModel(step_size=0.3, num_steps=3)
    module = DATWarmAttacksModule(
        tiny.energy_model(), threat_model=threat_model, optimizer=tiny.SGD, curriculum=curriculum
    )
    trainer, kept = fitted(module, "perturbations", path, steps, resume)
    return trainer, module, kept


def test_a_run_that_goes_on_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """In the middle of the second epoch."""
    _, whole, whole_kept = run(tmp_path, 10)
    trainer, _, kept = run(tmp_path, 8)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(torch.load(tmp_path / "a.ckpt", weights_only=True)["perturbations"], kept)
    assert 0 < int(kept.flatten(1).any(1).sum()) <= 8 * 32
    _, resumed, resumed_kept = run(tmp_path, 10, tmp_path / "a.ckpt")
    assert torch.equal(resumed_kept, whole_kept)
    assert not torch.equal(resumed_kept, kept)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert resumed.network_evaluations == whole.network_evaluations
    assert not any("perturb" in name for name in whole.state_dict())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "perturbations" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)


def test_another_run_begins_at_the_images(tmp_path: Path) -> None:
    _, module, kept = run(tmp_path, 2)
    assert int(kept.flatten(1).any(1).sum()) == 64
    tiny.trainer(tmp_path, max_epochs=-1, max_steps=1).fit(module, tiny.digits())
    assert int(module.perturbations.flatten(1).any(1).sum()) == 32


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"threat_model\.random_start must be false where attacks begin"):
        started(tmp_path, threat_model=ThreatModel(random_start=True))
    batch, module = by_hand.batch(dtype=torch.float32), started(tmp_path)
    with pytest.raises(InputError, match=r"need data whose x_clf are draws of one data set: .*, got NoneType"):
        module.training_step(batch, 0)
    with pytest.raises(InputError, match="warm attacks need numbered draws"):
        module.adversarial_examples(batch["x_clf"], batch["y_clf"])


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_the_configuration_trains_it_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = epoch_that_goes_on(tmp_path, monkeypatch, CONFIGS / "digits" / "stage2.yaml", TINY)
    assert isinstance(trainer.lightning_module, DATWarmAttacksModule)
    assert {"train/energy_loss", "val/robust_accuracy", "val/fid"} <= set(trainer.callback_metrics)
