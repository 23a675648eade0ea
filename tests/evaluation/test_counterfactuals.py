"""Counterfactuals, against closed forms of a linear network and computations in float64."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dat_lightning import DigitsFeatures
from dat_lightning.core.errors import InputError
from dat_lightning.data.digits import load_images, split_indices
from dat_lightning.evaluation import Counterfactuals
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import Measurement
from tests import tiny

NUM_CLASSES = 4


def weights(num_classes: int = NUM_CLASSES, size: int = 16) -> np.ndarray:
    """Of a linear network that has no opinion about plain grey."""
    matrix = np.random.default_rng(1).normal(size=(num_classes, size))
    matrix -= matrix.mean(1, keepdims=True)
    return matrix


class Linear(LightningModule):
    """A module of another project: f(x) = Wx."""

    def __init__(self, num_classes: int = NUM_CLASSES, size: int = 16) -> None:
        super().__init__()
        self.net = nn.Linear(size, num_classes, bias=False)
        self.net.weight.data = torch.from_numpy(weights(num_classes, size)).float()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.flatten(1))
        return logits

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    @property
    def matrix(self) -> np.ndarray:
        return self.net.weight.detach().double().numpy()


def grey_images(count: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Images far from black and white, so that small walks are not clipped, and labels, most of them right."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0.35, 0.65, (count, 1, 4, 4)).astype(np.float32)
    y = (x.reshape(count, 16) @ weights().T).argmax(1)
    y[::4] = rng.integers(0, NUM_CLASSES, len(y[::4]))
    return x, y


def loader(x: np.ndarray, y: np.ndarray, batch_size: int = 7) -> DataLoader[dict[str, Tensor]]:
    parts = {"x": torch.from_numpy(x), "y": torch.from_numpy(y), "index": torch.arange(len(x))}
    batches = [{k: v[first : first + batch_size] for k, v in parts.items()} for first in range(0, len(x), batch_size)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def run(
    path: Path, evaluator: Counterfactuals, module: LightningModule | None = None, batch_size: int = 7, **kwargs: Any
) -> dict[str, Measurement]:
    """Figures on the grey images, by their names."""
    batches = loader(*grey_images(), batch_size=batch_size)
    tiny.trainer(path, [evaluator], **kwargs).test(module or Linear(), dataloaders=batches, verbose=False)
    return {figure.name.removeprefix("counterfactual_"): figure for figure in evaluator.figures}


def run_digits(path: Path, evaluator: Counterfactuals, **kwargs: Any) -> dict[str, Measurement]:
    trainer = tiny.trainer(path, [evaluator], **kwargs)
    trainer.test(tiny.stage1(), datamodule=tiny.digits(), verbose=False)
    return {figure.name.removeprefix("counterfactual_"): figure for figure in evaluator.figures}


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    shares: np.ndarray = exponents / exponents.sum(1, keepdims=True)
    return shares


@pytest.mark.parametrize("inference_mode", [False, True])
def test_a_linear_network_has_a_closed_form(inference_mode: bool, tmp_path: Path) -> None:
    """Every counterfactual is x + ε w/‖w‖, so its logit of the target is larger by ε‖w‖."""
    module, radii = Linear(), (0.05, 0.3)
    evaluator = Counterfactuals(radii, targets=["next"], changed_level=10)
    figures = run(tmp_path, evaluator, module, inference_mode=inference_mode)
    x, y = grey_images()
    flat, w = x.reshape(30, 16).astype(np.float64), module.matrix
    logits = flat @ w.T
    others = logits.copy()
    others[np.arange(30), y] = -np.inf
    targets = others.argmax(1)
    for eps in radii:
        direction = w[targets] / np.linalg.norm(w[targets], axis=1, keepdims=True)
        changed = flat + eps * direction
        after = changed @ w.T
        walked = evaluator.change(module, torch.from_numpy(x), torch.from_numpy(targets), eps)
        rise = (walked.double().numpy().reshape(30, 16) @ w.T - logits)[np.arange(30), targets]
        np.testing.assert_allclose(rise, eps * np.linalg.norm(w[targets], axis=1), atol=1e-6)
        confidence = softmax(after)[np.arange(30), targets]
        expected = {
            "success": (after.argmax(1) == targets).mean(),
            "confidence": confidence.mean(),
            "l2": eps,
            "linf": np.abs(eps * direction).max(1).mean(),
            "changed_pixels": (np.abs(eps * direction) > 10.5 / 255).mean(),
        }
        found = {name: figures[f"{name}_next_eps{eps:g}"] for name in expected}
        for name, value in expected.items():
            assert found[name].value == pytest.approx(value, abs=2e-6), name
            assert found[name].num_samples == 30
        levels = found["confidence"].details["quantile_levels"]
        assert levels[0] == 0
        assert levels[-1] == 1
        assert found["confidence"].details["quantiles"] == pytest.approx(
            list(np.quantile(confidence, levels)), abs=2e-6
        )
        assert found["success"].details["share_before"] == pytest.approx((logits.argmax(1) == targets).mean())
    assert 0.1 < figures["success_next_eps0.05"].value < figures["success_next_eps0.3"].value
    assert 0 < figures["changed_pixels_next_eps0.3"].value < 1


def test_figures_are_logged_and_say_how_they_were_measured(tmp_path: Path) -> None:
    evaluator = Counterfactuals([0.2], targets=["next"], num_steps=8, seed=5)
    trainer = tiny.trainer(tmp_path, [evaluator])
    (logged,) = trainer.test(Linear(), dataloaders=loader(*grey_images()), verbose=False)
    assert logged == pytest.approx({f"test/{figure.name}": figure.value for figure in evaluator.figures}, rel=1e-6)
    assert len(logged) == 5
    figure = evaluator.figures[0]
    assert figure.protocol == (
        "share that the network classifies as the target; targeted ascent on f(x)[target] from real test images inside"
        " an L2 ball; target the most likely class other than the label, eps 0.2, num steps 8, step size 0.0625"
    )
    assert {"eps": 0.2, "num_steps": 8, "step_size": 0.0625}.items() <= figure.settings.items()


def test_counterfactuals_stay_in_ball_and_box(tmp_path: Path) -> None:
    """Of a trained kind of network, on images with black and white pixels."""
    seen: list[tuple[float, float, float]] = []

    class Watching(Counterfactuals):
        def change(self, pl_module: LightningModule, x: Tensor, targets: Tensor, eps: float) -> Tensor:
            changed = super().change(pl_module, x, targets, eps)
            assert changed.min() >= 0
            assert changed.max() <= 1
            length = (changed.double() - x.double()).flatten(1).norm(dim=1)
            seen.append((eps, float(length.min()), float(length.max())))
            return changed

    module = tiny.stage1()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    evaluator = Watching([0.5, 3.0], num_steps=5, targets=["uniform"])
    tiny.trainer(tmp_path, [evaluator]).test(module, datamodule=tiny.digits(), verbose=False)
    assert {eps for eps, _, _ in seen} == {0.5, 3.0}
    for eps, shortest, longest in seen:
        assert longest <= eps * (1 + 1e-5)
        assert shortest > 0.5 * eps
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_targets_are_what_their_names_say() -> None:
    evaluator = Counterfactuals(seed=3)
    torch.manual_seed(0)
    y, index = torch.arange(5).repeat(400), torch.arange(2000)
    logits = torch.randn(2000, 5)
    following = evaluator.choose_targets("next", logits, y, index).squeeze(1)
    order = logits.argsort(1, descending=True)
    expected = torch.where(order[:, 0] == y, order[:, 1], order[:, 0])
    assert torch.equal(following, expected)
    uniform = evaluator.choose_targets("uniform", logits, y, index).squeeze(1)
    for label in range(5):
        counts = torch.bincount(uniform[y == label], minlength=5)
        assert counts[label] == 0
        assert int(counts.sum()) == 400
        assert all(60 < int(counts[other]) < 140 for other in range(5) if other != label)
    every = evaluator.choose_targets("all", logits, y, index)
    assert [set(row) for row in every.tolist()] == [set(range(5)) - {label} for label in y.tolist()]


def test_uniform_targets_depend_on_seed_and_index_alone() -> None:
    y, index, logits = torch.arange(5).repeat(10), torch.arange(50), torch.randn(50, 5)

    def chosen(seed: int, rows: Tensor) -> Tensor:
        return Counterfactuals(seed=seed).choose_targets("uniform", logits[rows], y[rows], index[rows])

    everything = chosen(0, index)
    rows = torch.tensor([41, 7, 30])
    torch.manual_seed(9)
    assert torch.equal(chosen(0, rows), everything[rows])
    assert not torch.equal(chosen(1, index), everything)


def test_a_pixel_has_changed_if_any_channel_moved_by_more_than_the_level() -> None:
    x = torch.full((1, 3, 2, 3), 0.5)
    changed = x.clone()
    changed[0, 0, 0, 0] += 9 / 255
    changed[0, 2, 0, 0] -= 9 / 255
    changed[0, 1, 1, 2] -= 9 / 255
    changed[0, :, 1, 1] += 8 / 255  # not more than the level
    values = Counterfactuals(changed_level=8).measure(torch.zeros(1, 4), x, changed, torch.tensor([2]))
    assert values["changed_pixels"].tolist() == pytest.approx([2 / 6])
    assert values["confidence"].tolist() == [0.25]
    assert values["linf"].tolist() == pytest.approx([9 / 255], rel=1e-5)


def test_all_targets_count_each_image_for_each_other_class(tmp_path: Path) -> None:
    figures = run(tmp_path, Counterfactuals([0.02, 0.2], targets=["all"], num_steps=4))
    assert figures["l2_all_eps0.02"].value == pytest.approx(0.02, rel=1e-4)
    assert figures["l2_all_eps0.2"].value == pytest.approx(0.2, rel=1e-4)
    x, y = grey_images()
    w = Linear().matrix
    steps = 0.2 * w / np.linalg.norm(w, axis=1, keepdims=True)
    hits = [
        (w @ (image + steps[target])).argmax() == target
        for image, label in zip(x.reshape(30, 16).astype(np.float64), y, strict=True)
        for target in set(range(NUM_CLASSES)) - {int(label)}
    ]
    assert figures["success_all_eps0.2"].value == pytest.approx(np.mean(hits))
    assert figures["success_all_eps0.2"].num_samples == 30 * 3


def test_figures_do_not_depend_on_batches(tmp_path: Path) -> None:
    one, two = (run(tmp_path, Counterfactuals([0.2]), batch_size=size) for size in (30, 4))
    assert one.keys() == two.keys()
    assert {name.split("_")[-2] for name in one} == {"next", "uniform"}
    for name, figure in one.items():
        assert two[name].value == pytest.approx(figure.value, abs=1e-6), name


# The independent classifier.


class Reads(nn.Module):
    """Says that every image is of one class, and remembers what it was given."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return torch.eye(NUM_CLASSES)[self.label].expand(len(images), -1)


def test_plausibility_is_what_the_judge_says(tmp_path: Path) -> None:
    x, y = grey_images()
    judge = Reads(2)
    figures = run(tmp_path, Counterfactuals([0.2], targets=["all"], num_steps=4, judge=judge))
    plausible = figures["plausibility_all_eps0.2"]
    # An image that is no 2 has one target of three that is 2.
    assert plausible.value == pytest.approx((y != 2).mean() / 3)
    assert plausible.details["judge_accuracy_on_originals"] == pytest.approx((y == 2).mean())
    assert plausible.settings["judge"].startswith("Reads sha256:")
    assert all(seen.dtype == torch.float32 and seen.shape[1] == 1 for seen in judge.seen)
    assert torch.equal(judge.seen[0], torch.from_numpy(x[:7]))


def test_a_judge_that_is_the_network_agrees_with_it(tmp_path: Path) -> None:
    figures = run(tmp_path, Counterfactuals([0.2], num_steps=4, judge=Linear()))
    for kind in ("next", "uniform"):
        assert figures[f"plausibility_{kind}_eps0.2"].value == figures[f"success_{kind}_eps0.2"].value


class Coarse(Reads):
    """Lacks the last class."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[:, :-1]


def test_a_judge_with_fewer_classes_than_targets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Counterfactuals\.judge: labels must lie in 0 … 2, got \d … 3"):
        run(tmp_path, Counterfactuals([0.2], num_steps=4, judge=Coarse(1)))


def test_a_part_of_the_network_is_no_judge(tmp_path: Path) -> None:
    module = Linear()
    with pytest.raises(ValueError, match="judge must be independent of the network under test"):
        run(tmp_path, Counterfactuals([0.2], judge=module.net), module)


# The Fréchet distance by class.


class Quadrants(nn.Module):
    """Means of the four quarters of an image."""

    def forward(self, images: Tensor) -> Tensor:
        means: Tensor = nn.functional.adaptive_avg_pool2d(images[:, :1].float(), 2).flatten(1)
        return means


def quadrants(images: np.ndarray) -> np.ndarray:
    """Likewise, of images (N, 16, 16) in [0, 1]."""
    levels = np.rint(images * 255)
    means: np.ndarray = levels.reshape(-1, 2, 8, 2, 8).mean((2, 4)).reshape(-1, 4)
    return means


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Through the eigenvalues of Σ₁Σ₂, in float64."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def test_fid_by_class_is_that_of_numpy(tmp_path: Path) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    class Keeping(Counterfactuals):
        def change(self, pl_module: LightningModule, x: Tensor, targets: Tensor, eps: float) -> Tensor:
            changed = super().change(pl_module, x, targets, eps)
            kept.append((changed, targets))
            return changed

    evaluator = Keeping([2.0], num_steps=3, targets=["uniform"], extractor=Quadrants(), min_class_images=36)
    with pytest.warns(UserWarning, match=r"target classes \(uniform\) have fewer than min_class_images=36 images"):
        figures = run_digits(tmp_path, evaluator)
    changed = torch.cat([images for images, _ in kept]).squeeze(1).numpy()
    targets = torch.cat([labels for _, labels in kept]).numpy()
    images, labels = load_images()
    train = np.sort(np.concatenate([split_indices(20)[split] for split in ("train", "val")]))
    real, real_labels = images[train].squeeze(1).numpy(), labels[train].numpy()
    counts = np.bincount(targets, minlength=10)
    expected = {
        c: frechet(quadrants(changed[targets == c]), quadrants(real[real_labels == c]))
        for c in range(10)
        if counts[c] >= 36
    }
    assert 0 < len(expected) < 10
    fid = figures["fid_uniform_eps2"]
    rows = fid.details["classes"]
    assert [row["class"] for row in rows] == list(expected)
    assert [row["fid"] for row in rows] == pytest.approx(list(expected.values()), rel=1e-4)
    assert [row["num_counterfactuals"] for row in rows] == [counts[c] for c in expected]
    assert [row["num_training_images"] for row in rows] == [(real_labels == c).sum() for c in expected]
    assert fid.details["left_out"] == [c for c in range(10) if counts[c] < 36]
    assert fid.value == pytest.approx(np.mean(list(expected.values())), rel=1e-4)
    assert fid.num_samples == sum(counts[c] for c in expected)
    assert fid.settings["target_classes"] == list(expected)


def test_without_enough_images_there_is_no_fid(tmp_path: Path) -> None:
    evaluator = Counterfactuals([2.0], 3, targets=["uniform"], extractor=Quadrants(), min_class_images=300)
    with pytest.warns(UserWarning, match=r"10 of 10 target classes \(uniform\)"):
        figures = run_digits(tmp_path, evaluator)
    assert not any(name.startswith("fid") for name in figures)


def test_fid_needs_training_images(tmp_path: Path) -> None:
    evaluator = Counterfactuals([0.2], extractor=DigitsFeatures(), min_class_images=2)
    with pytest.raises(ValueError, match=r"Counterfactuals compares with training images: use a DataModule with"):
        run(tmp_path, evaluator)


# Going on, and pictures.


def test_an_interrupted_test_goes_on(tmp_path: Path) -> None:
    calls: list[int] = []

    class Breaking(Counterfactuals):
        def __init__(self, breaks_at: int) -> None:
            values, pictures = str(tmp_path / "values"), str(tmp_path / "pictures")
            super().__init__([0.2], num_steps=4, num_pictures=3, picture_dirpath=pictures, dirpath=values)
            self.breaks_at = breaks_at

        def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
            calls.append(len(batch["x"]))
            if len(calls) == self.breaks_at:
                raise RuntimeError("power cut")
            return super().evaluate_batch(pl_module, batch)

    whole = Counterfactuals([0.2], num_steps=4, num_pictures=3, picture_dirpath=str(tmp_path / "whole"))
    expected = run(tmp_path, whole)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, Breaking(4))
    found = run(tmp_path, Breaking(0))
    assert calls == [7, 7, 7, 7, 7, 2]
    assert {n: f.value for n, f in found.items()} == {n: f.value for n, f in expected.items()}
    # Images from before the interruption are shown all the same.
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "pictures" / path.name).read_bytes()
    calls.clear()
    run(tmp_path, Breaking(0))
    assert calls == []


def shown_by(path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, batch_size: int) -> list[Tensor]:
    """Originals, labels, counterfactuals and targets that are drawn."""
    drawn: list[Tensor] = []

    def draw(search: Any, x: Tensor, y: Tensor, changed: Tensor, targets: Tensor, *rest: Tensor | None) -> Image.Image:
        drawn.extend([x, y, changed, targets])
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("dat_lightning.evaluation.counterfactuals.drawn_counterfactuals", draw)
    evaluator = Counterfactuals([0.2], targets=["next"], num_pictures=5, picture_dirpath=str(path), seed=seed)
    run(path, evaluator, batch_size=batch_size)
    return drawn


def test_the_images_shown_are_chosen_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, other = (shown_by(tmp_path, monkeypatch, *run) for run in ((0, 30), (0, 4), (1, 30)))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])
    x, y = grey_images()
    w = Linear().matrix
    assert len(one[0]) == 5
    for image, label, changed, target in zip(*one, strict=True):
        place = int(np.abs(x - image.numpy()).sum((1, 2, 3)).argmin())
        assert np.array_equal(x[place], image.numpy())
        assert y[place] == int(label) != int(target)
        step = 0.2 * w[int(target)] / np.linalg.norm(w[int(target)])
        np.testing.assert_allclose(changed.numpy().ravel(), x[place].ravel() + step, atol=1e-5)


def test_pictures_are_files_that_the_figures_name(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    evaluator = Counterfactuals([0.1, 0.25], num_pictures=10, judge=Reads(1), picture_dirpath=str(folder))
    figures = run(tmp_path, evaluator)
    names = {f"counterfactuals_{kind}_eps{eps}.png" for kind in ("next", "uniform") for eps in ("0.1", "0.25")}
    assert {path.name for path in folder.iterdir()} == names
    assert figures["success_uniform_eps0.25"].details["pictures"] == [
        str(folder / "counterfactuals_uniform_eps0.25.png")
    ]
    with Image.open(folder / "counterfactuals_uniform_eps0.25.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[1] > 8 * 96
    # Two blocks, of eight images and of two, with three rows each; all tiles are grey, and some get a red frame.
    assert 6 * 96 < pixels.shape[0] < 6 * 96 + 6 * 70
    assert (pixels[..., 0] > pixels[..., 1].astype(int) + 100).sum() > 100


# Errors.


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eps": []}, r"eps must be different finite radii above 0, got \[\]"),
        ({"eps": [1.0, 0.0]}, r"eps must be .*, got \[1.0, 0.0\]"),
        ({"eps": [float("inf")]}, r"eps must be .*, got \[inf\]"),
        ({"eps": [2.0, 2.0]}, r"eps must be different"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_pictures": 0}, "num_pictures must be at least 1, got 0"),
        ({"step_size": 0.1}, r"step_size must be at least max\(eps\) / num_steps = 0.4, .* got 0.1"),
        ({"targets": ["nearest"]}, r"targets must be some of .*, got \['nearest'\]"),
        ({"targets": []}, r"targets must be some of .*, got \[\]"),
        ({"min_class_images": 1}, "min_class_images must be at least 2, as a covariance needs, got 1"),
        ({"changed_level": 255}, "changed_level must be in 0 … 254, got 255"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Counterfactuals(**kwargs)


def batch_with(x: float, labels: Sequence[int]) -> DataLoader[dict[str, Tensor]]:
    return loader(np.full((2, 1, 4, 4), x, np.float32), np.array(labels))


@pytest.mark.parametrize(
    ("batches", "module", "message"),
    [
        (
            batch_with(-1.5, [0, 1]),
            Linear(),
            r"x of Counterfactuals .* in \[0, 1\], got values in \[-1.5, -1.5\]",
        ),
        (batch_with(0.5, [0, 4]), Linear(), r"Counterfactuals: labels must lie in 0 … 3, got 0 … 4"),
        (
            batch_with(0.5, [0, 0]),
            Linear(num_classes=1),
            r"logits \(N, K\) of at least 2 classes, and .* gave shape \(2, 1\)",
        ),
    ],
)
def test_wrong_images_and_labels(
    batches: DataLoader[dict[str, Tensor]], module: Linear, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, [Counterfactuals([0.2])]).test(module, dataloaders=batches, verbose=False)
