"""Editing, against closed forms of a linear network and computations in NumPy."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dat_lightning.cli import main
from dat_lightning.core import Langevin
from dat_lightning.core.errors import InputError
from dat_lightning.core.random_streams import normal_noise, stream_seed
from dat_lightning.evaluation import Denoising, Editing, Inpainting, Restoration, SuperResolution, editing
from dat_lightning.results.gathering import Values
from dat_lightning.results.measurement import Measurement
from dat_lightning.sampling.picture_grids import Tile, captioned_grid
from tests import tiny
from tests.frozen.record import printed

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "digits"
SIDE, CLASSES = 16, 4
TASKS: tuple[Restoration, ...] = (
    Inpainting(region="center", step_size=0.05, num_steps=3),
    Inpainting(region="bottom", step_size=0.05, num_steps=2),
    Denoising(sigma=0.02, step_size=0.02, num_steps=4),
    SuperResolution(factor=4, step_size=0.05, num_steps=3),
)


class Linear(LightningModule):
    """A module of another project: f(x) = Wx."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(SIDE * SIDE, CLASSES, bias=False)
        weight = np.random.default_rng(1).normal(size=(CLASSES, SIDE * SIDE))
        self.net.weight.data = torch.from_numpy(weight).float()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.flatten(1))
        return logits

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass


def grey_images(count: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Smooth ones, far from black and white, so that small walks are not clipped."""
    rng = np.random.default_rng(0)
    ramps = np.cumsum(rng.normal(size=(count, 1, SIDE, SIDE)), 2).cumsum(3)
    ramps = 0.35 + 0.3 * (ramps - ramps.min()) / (ramps.max() - ramps.min())
    return ramps.astype(np.float32), rng.integers(0, CLASSES, count)


def loader(x: np.ndarray, y: np.ndarray, batch_size: int, order: np.ndarray) -> DataLoader[dict[str, Tensor]]:
    parts = {"x": torch.from_numpy(x)[order], "y": torch.from_numpy(y)[order], "index": torch.from_numpy(order)}
    batches = [{k: v[first : first + batch_size] for k, v in parts.items()} for first in range(0, len(x), batch_size)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def run(
    path: Path,
    evaluator: Editing,
    module: LightningModule | None = None,
    batch_size: int = 7,
    order: np.ndarray | None = None,
    **kwargs: Any,
) -> dict[str, Measurement]:
    """Figures on the grey images, by their names."""
    x, y = grey_images()
    batches = loader(x, y, batch_size, np.arange(len(x)) if order is None else order)
    tiny.trainer(path, [evaluator], **kwargs).test(module or Linear(), dataloaders=batches, verbose=False)
    return {figure.name.removeprefix("edit_"): figure for figure in evaluator.figures}


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([-10 * math.log10(np.square(p - q).mean()) for p, q in zip(a, b, strict=True)]))


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Of one channel, by the definition: weighted moments of each window of 11×11, reflected at the border."""
    weights = np.exp(-np.square(np.arange(11) - 5) / (2 * 1.5**2))
    w = np.outer(weights, weights) / weights.sum() ** 2
    found = []
    a, b = np.pad(a, 5, mode="reflect"), np.pad(b, 5, mode="reflect")
    for i, j in np.ndindex(a.shape[0] - 10, a.shape[1] - 10):
        p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
        mp, mq = (w * p).sum(), (w * q).sum()
        vp, vq, c = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
        found.append((2 * mp * mq + 1e-4) * (2 * c + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return float(np.mean(found))


@pytest.mark.parametrize("inference_mode", [False, True])
def test_a_linear_network_has_a_closed_form(inference_mode: bool, tmp_path: Path) -> None:
    """Every state is the start moved along the part of w that the task leaves free."""
    module = Linear()
    figures = run(tmp_path, Editing(TASKS, ["known"]), module, inference_mode=inference_mode)
    x, y = grey_images()
    true = x[:, 0].astype(np.float64)
    w = module.net.weight.detach().double().numpy().reshape(CLASSES, SIDE, SIDE)[y]
    blocks = w.reshape(-1, 4, 4, 4, 4).mean((2, 4)).repeat(4, 1).repeat(4, 2)
    center, bottom = np.zeros((SIDE, SIDE)), np.zeros((SIDE, SIDE))
    center[4:12, 4:12], bottom[8:] = 1, 1
    free = {
        "inpainting_center": (w * center, 0.15),
        "inpainting_bottom": (w * bottom, 0.1),
        "denoising_0.02": (w, 0.08),
        "super_resolution_4": (w - blocks, 0.15),
    }
    for task in TASKS:
        direction, way = free[task.name]
        direction = direction / np.sqrt(np.square(direction).sum((1, 2), keepdims=True))
        degraded = task.degraded(torch.from_numpy(x), range(30), 0)
        start = task.edit(degraded).start[:, 0].double().numpy()
        end = start + way * direction
        assert figures[f"{task.name}_psnr_known"].value == pytest.approx(decibels(end, true), abs=1e-4), task
        expected = np.mean([similarity(p, q) for p, q in zip(end, true, strict=True)])
        assert figures[f"{task.name}_ssim_known"].value == pytest.approx(expected, abs=1e-5), task
        simple, worst = (images[:, 0].double().numpy() for images in (task.simple(degraded), degraded))
        assert figures[f"{task.name}_psnr_degraded"].value == pytest.approx(decibels(worst, true), abs=1e-4)
        assert figures[f"{task.name}_psnr_simple"].value == pytest.approx(decibels(simple, true), abs=1e-4)
        details = figures[f"{task.name}_psnr_known"].details
        halfway = [decibels(start + way * direction * k / task.num_steps, true) for k in range(task.num_steps + 1)]
        assert details["after_each_step"] == pytest.approx(halfway, abs=1e-4)
    assert len(figures) == 4 * 2 * 3
    assert {figure.num_samples for figure in figures.values()} == {30}


def test_without_labels_the_marginal_energy_is_climbed(tmp_path: Path) -> None:
    module, task = Linear(), Inpainting(step_size=0.05, num_steps=1)
    evaluator = Editing([task])
    x = torch.from_numpy(grey_images()[0])
    figures = run(tmp_path, evaluator, module)
    start = task.edit(task.degraded(x, range(30), 0)).start.double()
    w = module.net.weight.detach().double()
    gradient = (start.flatten(1) @ w.T).softmax(1) @ w
    gradient = gradient.view_as(start) * task.mask(SIDE, SIDE)
    end = start + 0.05 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert figures["inpainting_center_psnr_unknown"].value == pytest.approx(
        decibels(end.numpy(), x.double().numpy()), abs=1e-4
    )
    assert "climbs logsumexp f(x)" in figures["inpainting_center_psnr_unknown"].protocol
    assert figures["inpainting_center_psnr_unknown"].compared_by != figures["inpainting_center_psnr_known"].compared_by


def test_an_energy_without_classes_restores_as_the_same_energy_of_many(tmp_path: Path) -> None:
    """Of one logit logsumexp is that logit, and of K equal ones log K more, which moves nothing."""
    one, many = Linear(), Linear()
    one.net.weight.data = one.net.weight.data[:1]
    many.net.weight.data = one.net.weight.data.expand(CLASSES, -1).clone()
    found = [run(tmp_path, Editing(TASKS, labels=["unknown"]), module) for module in (one, many)]
    values = [{name: figure.value for name, figure in each.items()} for each in found]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    for task in TASKS:
        assert abs(values[0][f"{task.name}_psnr_unknown"] - values[0][f"{task.name}_psnr_degraded"]) > 0.01
    with pytest.raises(InputError, match=r"Editing needs logits \(N, K\) of at least 2 classes, got shape \(\d+, 1\)"):
        run(tmp_path, Editing(TASKS), one)
    one.net.weight.data.fill_(math.nan)
    with pytest.raises(InputError, match="Editing needs finite logits"):
        run(tmp_path, Editing(TASKS, labels=["unknown"]), one)


def test_images_that_rounding_has_brought_out_of_the_box_are_edited(tmp_path: Path) -> None:
    """What the evaluator has accepted with each batch, no edit refuses after the last one."""
    x, y = grey_images(4)
    x[:, :, :, :2] = 1 + 1e-6
    evaluator = Editing(TASKS, labels=["known"])
    batches = loader(x, y, 2, np.arange(4))
    tiny.trainer(tmp_path, [evaluator]).test(Linear(), dataloaders=batches, verbose=False)
    assert len(evaluator.figures) == len(TASKS) * 2 * 3


def test_what_is_left_of_an_image_is_all_that_an_edit_sees() -> None:
    """Other originals with the same remains are restored alike."""
    x = torch.from_numpy(grey_images(4)[0])
    mask = Inpainting(region="right").mask(SIDE, SIDE)
    assert int(mask.sum()) == SIDE * SIDE // 2
    assert bool(mask[:, 8:].all())
    hidden = Inpainting(region="right").degraded(x, range(4), 0)
    assert torch.equal(hidden[..., 8:], torch.full((4, 1, 16, 8), 0.5))
    assert torch.equal(hidden[..., :8], x[..., :8])
    blocks = SuperResolution(factor=2).degraded(x, range(4), 0)
    assert blocks[0, 0, 2:4, 4:6].flatten().tolist() == pytest.approx([float(x[0, 0, 2:4, 4:6].mean())] * 4)
    start = SuperResolution(factor=2).edit(blocks).start
    torch.testing.assert_close(SuperResolution(factor=2).degraded(start, range(4), 0), blocks, rtol=0, atol=5e-7)


def test_noise_is_of_the_images_own_streams_and_of_its_size() -> None:
    x = torch.full((200, 3, 8, 8), 0.5)
    task = Denoising(sigma=0.1)
    noisy = task.degraded(x, range(200), 3)
    assert float((noisy - x).std()) == pytest.approx(0.1, rel=0.02)
    assert torch.equal(task.degraded(x[:2], [41, 7], 3), noisy[[41, 7]])
    assert not torch.equal(task.degraded(x[:1], [0], 4), noisy[:1])
    assert task.edit(noisy).eps == pytest.approx(0.1 * math.sqrt(192))
    bright = task.degraded(x * 2, range(200), 3)
    assert float(bright.max()) == 1


@pytest.mark.parametrize("max_images", [12, 1000])
def test_figures_depend_neither_on_batches_nor_on_the_order_of_images(max_images: int, tmp_path: Path) -> None:
    """With noise in the walk as well, which has a stream of each image's own."""
    shared: dict[str, Any] = {"tasks": TASKS, "rule": Langevin(0.01), "max_images": max_images, "judge": Reads()}
    one = run(tmp_path, Editing(batch_size=100, **shared), batch_size=30)
    two = run(tmp_path, Editing(batch_size=5, **shared), batch_size=4, order=np.random.default_rng(3).permutation(30))
    assert one.keys() == two.keys()
    assert len(one) == 4 * 3 * 4
    for name, figure in one.items():
        assert figure.num_samples == min(max_images, 30)
        assert two[name].value == pytest.approx(figure.value, abs=1e-5), name
        assert two[name].settings == figure.settings
    other = run(tmp_path, Editing(seed=1, **shared))
    assert (other["inpainting_center_psnr_simple"].value == one["inpainting_center_psnr_simple"].value) == (
        max_images == 1000
    )


@pytest.mark.parametrize("seed", [0, 7])
def test_images_and_both_noises_are_those_of_the_seed(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures and pictures: without a step along the gradient, an end is a start with noise of a stream of its own."""
    drawn: list[list[list[Tile]]] = []

    def drawing(tiles: list[list[Tile]], title: str, names: list[str]) -> Image.Image:
        drawn.append(tiles)
        return captioned_grid(tiles, title, names)

    monkeypatch.setattr(editing, "captioned_grid", drawing)
    task = Denoising(sigma=0.02, step_size=0.0, num_steps=1)
    given: dict[str, Any] = {"rule": Langevin(0.01), "max_images": 5, "picture_dirpath": str(tmp_path), "seed": seed}
    figures = run(tmp_path, Editing([task], ["known"], **given))
    indices = sorted(range(30), key=lambda index: stream_seed(seed, "edited image", index))[:5]
    x = torch.from_numpy(grey_images()[0][indices])
    degraded = x + 0.02 * normal_noise(seed, "noise of denoising_0.02", indices, (1, SIDE, SIDE))
    end = degraded + 0.01 * normal_noise(seed, "noise of step 0", indices, (1, SIDE, SIDE))
    for kind, images in (("degraded", degraded), ("known", end)):
        found = figures[f"denoising_0.02_psnr_{kind}"].value
        assert found == pytest.approx(decibels(images.numpy(), x.numpy()), abs=1e-4), kind
    ((originals, noisy, _, walked),) = drawn
    for row, images in ((originals, x), (noisy, degraded), (walked, end)):
        for tile, image in zip(row, images, strict=True):
            torch.testing.assert_close(tile.image[:1] / 255, image, rtol=0, atol=0.51 / 255)


class Reads(nn.Module):
    """Reads the class from the mean brightness of the upper left corner."""

    def forward(self, images: Tensor) -> Tensor:
        corner = images[:, 0, :4, :4].mean((1, 2))
        return -(corner.unsqueeze(1) - torch.linspace(0.4, 0.6, CLASSES)).abs()


def test_agreement_is_what_the_judge_says(tmp_path: Path) -> None:
    """Pixels outside of the mask are the original's, and the judge looks at no others."""
    figures = run(tmp_path, Editing(TASKS[:1], judge=Reads()))
    x, y = grey_images()
    share = (Reads()(torch.from_numpy(x)).argmax(1).numpy() == y).mean()
    assert 0 < share < 1
    for kind in ("degraded", "simple", "known", "unknown"):
        figure = figures[f"inpainting_center_agreement_{kind}"]
        assert figure.value == pytest.approx(share)
        assert figure.details["of_originals"] == pytest.approx(share)
        assert figure.settings["judge"].startswith("Reads sha256:")


class Broken(Reads):
    """Reads nothing; the largest of NaN would be class 0."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * math.nan


def test_a_judge_that_gives_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Editing.judge needs finite logits, got NaN or infinite ones for 30 of 30"):
        run(tmp_path, Editing(TASKS[:1], judge=Broken()))


class Coarse(Reads):
    """Lacks the last class."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[:, :-1]


def test_a_judge_with_fewer_classes_than_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=rf"Editing\.judge: labels must lie in 0 … {CLASSES - 2}, got 0 … {CLASSES - 1}"
    ):
        run(tmp_path, Editing(TASKS[:1], judge=Coarse()))


def test_an_image_that_comes_back_exactly_leaves_means_finite(tmp_path: Path) -> None:
    """An even image is its own average: without a bound the ratio is infinite."""
    task, rest = SuperResolution(factor=4), torch.from_numpy(grey_images(3)[0])
    x = torch.cat([torch.full((1, 1, SIDE, SIDE), 0.25), rest])
    batch = {"x": x, "y": torch.zeros(4, dtype=torch.long), "index": torch.arange(4)}
    evaluator = Editing([task])
    loader: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    tiny.trainer(tmp_path, [evaluator]).test(Linear(), dataloaders=loader, verbose=False)
    found = {figure.name: figure.value for figure in evaluator.figures}
    others = decibels(task.degraded(rest, range(3), 0)[:, 0].numpy(), rest[:, 0].numpy())
    assert found["edit_super_resolution_4_psnr_degraded"] == pytest.approx((60 + 3 * others) / 4, abs=1e-4)


def test_a_wide_filter_ends_at_the_border() -> None:
    x = torch.rand(2, 3, 6, 9)
    torch.testing.assert_close(Denoising(blur=50.0).simple(x).std((2, 3)), torch.zeros(2, 3), rtol=0, atol=0.05)


def test_red_frames_are_where_the_judge_reads_another_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[list[Tile]]] = []

    def drawing(tiles: list[list[Tile]], title: str, names: list[str]) -> Image.Image:
        drawn.append(tiles)
        return captioned_grid(tiles, title, names)

    monkeypatch.setattr(editing, "captioned_grid", drawing)
    figures = run(tmp_path, Editing(TASKS[:1], judge=Reads(), num_pictures=30, picture_dirpath=str(tmp_path)))
    (rows,) = drawn
    assert [len(row) for row in rows] == [30] * 5
    for row, kind in zip(rows[1:], ("degraded", "simple", "known", "unknown"), strict=True):
        agreement = figures[f"inpainting_center_agreement_{kind}"].value
        assert sum(not tile.marked for tile in row) == round(30 * agreement)
        ratios = [float(tile.caption.split(" dB\n")[0]) for tile in row]
        assert np.mean(ratios) == pytest.approx(figures[f"inpainting_center_psnr_{kind}"].value, abs=0.05)
    assert all(tile.caption.startswith("class ") for tile in rows[0])
    for tile in rows[0]:
        label, read = tile.caption.removeprefix("class ").split("\njudge: ")
        assert tile.marked == (label != read)


def test_pictures_show_the_chosen_images_whatever_comes_first(tmp_path: Path) -> None:
    for name, order in (("a", np.arange(30)), ("b", np.arange(30)[::-1].copy())):
        run(tmp_path, Editing(TASKS, judge=Reads(), num_pictures=3, picture_dirpath=str(tmp_path / name)), order=order)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(f"edit_{task.name}.png" for task in TASKS)
    for name in names:
        with Image.open(tmp_path / "a" / name) as one, Image.open(tmp_path / "b" / name) as two:
            assert np.array_equal(np.asarray(one), np.asarray(two))
            assert len(np.unique(np.asarray(one))) > 20


def test_figures_are_logged_and_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    module = tiny.stage1()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    evaluator = Editing(TASKS[2:], max_images=9)
    trainer = tiny.trainer(tmp_path, [evaluator])
    (logged,) = trainer.test(module, datamodule=tiny.digits(), verbose=False)
    assert {f"test/{figure.name}": figure.value for figure in evaluator.figures}.items() <= {
        name: pytest.approx(value, rel=1e-5) for name, value in logged.items()
    }.items()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_an_interrupted_test_goes_on_with_what_is_kept(tmp_path: Path) -> None:
    walks: list[int] = []

    class Counting(Editing):
        def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> Values:
            walks.append(len(batch["x"]))
            if len(walks) == 3:
                raise KeyboardInterrupt
            return super().evaluate_batch(pl_module, batch)

    def once(folder: str) -> dict[str, Measurement]:
        return run(tmp_path, Counting(TASKS[:2], max_images=20, batch_size=6, dirpath=str(tmp_path / folder)))

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        once("kept")
    assert walks == [6, 6, 6]
    resumed = once("kept")
    assert walks[3:] == [6, 2]
    whole = once("fresh")
    assert {name: figure.value for name, figure in resumed.items()} == {n: f.value for n, f in whole.items()}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Editing([]), "tasks must be different ones, at least one"),
        (lambda: Editing([Denoising(), Denoising(step_size=0.3)]), "got .'denoising_0.2', 'denoising_0.2'"),
        (lambda: Editing(["denoising"]), r"tasks\[0\] must be of the class Restoration"),  # type: ignore[list-item]
        (lambda: Editing(labels=["guessed"]), "labels must be some of"),  # type: ignore[list-item]
        (lambda: Editing(labels=[]), "labels must be some of"),
        (lambda: Editing(rule=None), "rule must be of the class UpdateRule"),  # type: ignore[arg-type]
        (lambda: Editing(max_images=0), "max_images must be a whole number of at least 1, got 0"),
        (lambda: Inpainting(region="top"), "region must be one of .*, got 'top'"),  # type: ignore[arg-type]
        (lambda: Inpainting(num_steps=0), "num_steps must be a whole number of at least 1, got 0"),
        (lambda: Inpainting(num_steps=2.5), "num_steps must be a whole number of at least 1, got 2.5"),  # type: ignore[arg-type]
        (lambda: Denoising(sigma=0), r"sigma must lie in \(0, 1\], in units of \[0, 1\] pixels, got 0"),
        (lambda: Denoising(sigma=25), r"sigma must lie in \(0, 1\], in units of \[0, 1\] pixels, got 25"),
        (lambda: Denoising(blur=math.inf), "blur must be a finite deviation above 0, got inf"),
        (lambda: Denoising(step_size=math.nan), "step_size must be a finite length of at least 0, got nan"),
        (lambda: SuperResolution(factor=1), "factor must be a whole number of at least 2, got 1"),
    ],
)
def test_mistakes_cost_a_sentence(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()


def test_images_that_do_not_fit_a_task_are_refused(tmp_path: Path) -> None:
    """With the first batch, not after a module's own long test."""
    seen: list[int] = []

    class Slow(Linear):
        def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            seen.append(batch_idx)

    with pytest.raises(InputError, match="factor must divide the images' sides 16 and 16, got 3"):
        run(tmp_path, Editing([SuperResolution(factor=3)]), Slow())
    assert seen == [0]
    small = {"x": torch.rand(4, 1, 5, 8), "y": torch.zeros(4, dtype=torch.long), "index": torch.arange(4)}
    with pytest.raises(InputError, match=r"at least 6×6 pixels, got \(4, 1, 5, 8\)"):
        tiny.trainer(tmp_path, [Editing(TASKS)]).test(Linear(), DataLoader([small], batch_size=None), verbose=False)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_the_model_that_ships_restores_digits_by_the_shipped_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = [argument for name in ("stage2", "editing") for argument in ("--config", str(CONFIGS / f"{name}.yaml"))]
    small = ["--data.init_args.eval_batch_size=40", "--trainer.limit_test_batches=1"]
    main(["test", *configs, "--ckpt_path", "digits", *small])
    folder = Path("runs/digits/editing")
    figures = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["figures"]
    found = {each["name"].removeprefix("edit_"): each["value"] for each in figures}
    for task in ("inpainting_center", "inpainting_bottom", "super_resolution_4"):
        for measure, least in (("psnr", 1.5), ("ssim", 0.05), ("agreement", 0.05)):
            assert found[f"{task}_{measure}_known"] > found[f"{task}_{measure}_simple"] + least, (task, measure)
    assert found["denoising_0.4_agreement_known"] > found["denoising_0.4_agreement_simple"]
    assert len(list((folder / "evaluation" / "editing").iterdir())) == 5


def test_the_configuration_for_cifar10_resolves() -> None:
    folder = CONFIGS.parent
    names = ("cifar10_cpu/stage2", "data/cifar10_folders", "cifar10_cpu/editing")
    config = printed(*(folder / f"{name}.yaml" for name in names))
    (evaluator,) = (c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(".Editing"))
    assert len(evaluator["init_args"]["tasks"]) == 6
    assert evaluator["init_args"]["tasks"][3]["init_args"]["blur"] == 1


def test_a_part_of_the_network_is_no_judge(tmp_path: Path) -> None:
    module = Linear()
    with pytest.raises(InputError, match="judge must be independent of the network under test"):
        run(tmp_path, Editing(TASKS, judge=module.net), module)
