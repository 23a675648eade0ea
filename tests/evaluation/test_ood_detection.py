"""Scores tell test images from others, before and after an attack on the others."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader

from dat_lightning import CorruptImageError, ThreatModel, ascend
from dat_lightning.data import UniformNoise
from dat_lightning.evaluation import EnergyStatistics, OODDetection
from dat_lightning.evaluation.ood_images import choose
from dat_lightning.evaluation.ood_scores import OBJECTIVES
from dat_lightning.results import Figure
from tests import tiny
from tests.evaluation.test_calibration import split
from tests.evaluation.test_evaluator import ALL, IMAGES, Plain

ATTACK = ThreatModel(eps=0.5, step_size=0.2, num_steps=3)
SCORES = ("logsumexp", "max_logit", "max_softmax")


class Others(Sequence[Any]):
    """Grey images near the middle of the range, some of which are corrupt."""

    def __init__(self, size: int = 8, corrupt: Sequence[int] = ()) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = 0.45 + 0.1 * torch.rand(size, 1, 2, 2, generator=generator)
        self.corrupt = corrupt

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        if index in self.corrupt:
            raise CorruptImageError(f"{index}.jpg", "it is truncated")
        return self.images[index]


def run(path: Path, evaluator: OODDetection, module: LightningModule | None = None, **data: Any) -> dict[str, Figure]:
    trainer = tiny.trainer(path, [evaluator], inference_mode=True)
    batches: DataLoader[Any] = DataLoader(ALL, batch_size=None)  # type: ignore[arg-type]
    trainer.test(module or Plain(), verbose=False, **(data or {"dataloaders": batches}))
    found = {figure.name: figure for figure in evaluator.figures}
    for name, figure in found.items():
        assert float(trainer.callback_metrics[f"test/{name}"]) == pytest.approx(figure.value, rel=1e-5)
    return found


def score(logits: Tensor, name: str) -> Tensor:
    logits = logits.detach().double()
    return {"logsumexp": logits.exp().sum(1).log(), "max_logit": logits.max(1)[0]}.get(
        name, logits.softmax(1).max(1)[0]
    )


@pytest.mark.parametrize("name", SCORES)
def test_figures_of_digits_are_those_of_scikit_learn(name: Any, tmp_path: Path) -> None:
    module, data = tiny.stage1(), tiny.digits()
    found = run(tmp_path, OODDetection(scores=[name], attack=ATTACK, num_ood=1000), module, datamodule=data)
    assert set(found) == {
        f"ood_{what}_held_out_{name}{how}" for what in ("auroc", "fpr95") for how in ("", "_attacked")
    }
    others = data.out_of_distribution("held_out")
    assert others is not None
    x = torch.stack([others[k][0] for k in range(len(others))])
    attacked = ascend(module, x, torch.zeros(len(x), dtype=torch.long), OBJECTIVES[name], ATTACK)
    inside = score(split(module, "test")[0], name)
    for images, how in ((x, ""), (attacked, "_attacked")):
        outside = score(module(images), name)
        expected = roc_auc_score([1] * 360 + [0] * len(x), torch.cat([inside, outside]))
        auroc, fpr = found[f"ood_auroc_held_out_{name}{how}"], found[f"ood_fpr95_held_out_{name}{how}"]
        # The last bits depend on how batches are composed, and may order two images the other way.
        assert auroc.value == pytest.approx(expected, abs=1e-4)
        threshold = inside.sort().values[360 - 342]  # 0.95 · 360 images lie there or above
        assert fpr.value == pytest.approx(float((outside >= threshold).double().mean()), abs=1.1 / len(x))
        assert fpr.details["threshold"] == pytest.approx(float(threshold), rel=1e-5)
        assert fpr.details["roc"]["fpr"][94] == fpr.value
        assert fpr.details["roc"]["tpr"][94] == 0.95
        assert auroc.details["mean_score_ood"] == pytest.approx(float(outside.mean()), rel=1e-4)
        assert auroc.num_samples == 360 + len(x)


def test_the_attack_raises_the_logit_of_a_linear_network_by_its_closed_form(tmp_path: Path) -> None:
    """Straight along the weights of the largest logit, max f(x) grows by ε‖w‖, as long as no pixel is clipped."""
    module, others = Plain(), Others()
    attack = ThreatModel(eps=0.05, step_size=0.02, num_steps=5)
    found = run(tmp_path, OODDetection({"grey": others}, ["max_logit"], attack=attack), module)
    logits = module(others.images).detach().double()
    norms = module.net.weight.detach().double().norm(dim=1)
    expected = (logits.max(1).values + 0.05 * norms[logits.argmax(1)]).mean()
    clean, attacked = (found[f"ood_auroc_grey_max_logit{how}"] for how in ("", "_attacked"))
    assert clean.details["mean_score_ood"] == pytest.approx(float(logits.max(1).values.mean()), rel=1e-6)
    assert attacked.details["mean_score_ood"] == pytest.approx(float(expected), rel=1e-5)
    assert attacked.details["mean_score_test"] == clean.details["mean_score_test"]
    assert attacked.value <= clean.value
    assert attacked.settings["attack"] == asdict(attack)
    assert "attack" not in {name for name, value in clean.settings.items() if value is not None}


def test_the_default_attack_is_that_of_the_method() -> None:
    assert OODDetection().attack == ThreatModel(norm="L2", eps=1.0, step_size=0.1, num_steps=20)
    assert OODDetection().num_ood == 1024


def test_the_choice_of_images_is_seeded_and_without_repetition(tmp_path: Path) -> None:
    assert sorted(choose(50, 1024, 0, "a")) == list(range(50))
    few = choose(1000, 30, 0, "a")
    assert len(set(few)) == 30
    assert few == choose(1000, 40, 0, "a")[:30]
    assert few not in (choose(1000, 30, 1, "a"), choose(1000, 30, 0, "b"), list(range(30)))
    others = Others(40)
    found = run(tmp_path, OODDetection({"grey": others}, ["max_logit"], num_ood=5, attack=None, seed=3))
    expected = Plain()(others.images[choose(40, 5, 3, "grey")]).detach().max(1).values.mean()
    assert found["ood_auroc_grey_max_logit"].details["mean_score_ood"] == pytest.approx(float(expected), rel=1e-5)
    assert found["ood_auroc_grey_max_logit"].settings["num_ood"] == 5


def test_random_starts_and_batches_do_not_matter(tmp_path: Path) -> None:
    attack = ThreatModel(eps=0.5, step_size=0.1, num_steps=2, random_start=True)
    runs = [run(tmp_path, OODDetection({"grey": Others(20)}, attack=attack, batch_size=size)) for size in (20, 3)]
    assert len(runs[0]) == 12
    for name, figure in runs[0].items():
        assert figure.value == pytest.approx(runs[1][name].value)
        assert figure.details["mean_score_ood"] == pytest.approx(runs[1][name].details["mean_score_ood"], rel=1e-5)


def test_corrupt_images_are_left_out_and_counted(tmp_path: Path) -> None:
    evaluator = OODDetection({"grey": Others(8, corrupt=[1, 2, 6])}, ["max_logit"], attack=None, batch_size=2)
    figure = run(tmp_path, evaluator)["ood_auroc_grey_max_logit"]
    assert (figure.settings["num_ood"], figure.details["num_skipped"]) == (5, 3)
    expected = Plain()(Others().images[[0, 3, 4, 5, 7]]).detach().max(1).values.mean()
    assert figure.details["mean_score_ood"] == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(
        ValueError, match=r"no image of 'grey' could be read: 0.jpg is not a readable image: it is trunc"
    ):
        run(tmp_path, OODDetection({"grey": Others(2, corrupt=[0, 1])}))


def test_an_interrupted_test_attacks_no_image_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluator(**kwargs: Any) -> OODDetection:
        kwargs = {"attack": ATTACK, "dirpath": str(tmp_path / "kept"), **kwargs}
        return OODDetection({"a": Others(), "b": Others(5)}, **kwargs)

    first = run(tmp_path, evaluator())
    attacked: list[int] = []
    compute = OODDetection._ood_values

    def counting(self: OODDetection, pl_module: LightningModule, batch: Any) -> Any:
        attacked.append(len(batch["index"]))
        return compute(self, pl_module, batch)

    monkeypatch.setattr(OODDetection, "_ood_values", counting)
    assert {n: f.value for n, f in run(tmp_path, evaluator()).items()} == {n: f.value for n, f in first.items()}
    assert attacked == []
    run(tmp_path, evaluator(attack=ThreatModel(eps=0.1)))
    assert attacked == [8, 5]


def test_data_of_any_kind_are_brought_to_the_networks_size(tmp_path: Path) -> None:
    pictures = [(Image.new("L", (2, 2), 50 * k), 7) for k in range(4)]

    def transform(image: Image.Image) -> Tensor:
        return torch.tensor(list(image.tobytes())).float().view(1, 2, 2) / 255

    found = run(tmp_path, OODDetection({"pictures": pictures}, ["max_logit"], attack=None, transform=transform))
    x = torch.stack([torch.full((1, 2, 2), 50 * k / 255) for k in range(4)])
    expected = float(Plain()(x).detach().max(1).values.mean())
    assert found["ood_auroc_pictures_max_logit"].details["mean_score_ood"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"the images of 'pictures' must be float tensors \(C, H, W\).* got Image"):
        run(tmp_path, OODDetection({"pictures": pictures}))
    with pytest.raises(ValueError, match=r"images of 'grey', after their transform, must .* got values in \[\d"):
        run(tmp_path, OODDetection({"grey": Others()}, transform=lambda x: 255 * x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scores": []}, r"scores must be some of .* got \[\]"),
        ({"scores": ["energy"]}, r"scores must be some of .* got \['energy'\]"),
        ({"num_ood": 0}, "num_ood must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"datasets": {}}, "datasets must name at least one data set, got none"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OODDetection(**kwargs)


def test_data_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="letters, digits and underscores, got 'a/b'"):
        run(tmp_path, OODDetection({"a/b": Others()}))
    with pytest.raises(ValueError, match="'none' has no images"):
        run(tmp_path, OODDetection({"none": IMAGES[:0]}))
    with pytest.raises(ValueError, match="OODDetection has no out-of-distribution images: give it datasets"):
        run(tmp_path, OODDetection())
    without = tiny.digits(ood="none", streams=["clf"])
    with pytest.raises(ValueError, match="OODDetection has no out-of-distribution images"):
        run(tmp_path, OODDetection(), tiny.stage1(), datamodule=without)
    found = run(
        tmp_path,
        OODDetection({"noise": UniformNoise(30, (1, 16, 16))}, ["logsumexp"], attack=None),
        tiny.stage1(),
        datamodule=without,
    )
    assert set(found) == {"ood_auroc_noise_logsumexp", "ood_fpr95_noise_logsumexp"}


class SeedsAlone(LightningDataModule):
    """Another project's: test images and seeds for samples, and nothing else."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images

    def test_dataloader(self) -> Any:
        return DataLoader(ALL, batch_size=None)  # type: ignore[arg-type]

    def held_out_seeds(self) -> Any:
        return lambda index: (self.images[index % len(self.images)], None)


def test_held_out_seeds_alone_suffice(tmp_path: Path) -> None:
    data, module = SeedsAlone(Others(5).images), Plain()
    found = run(tmp_path, OODDetection(None, ["max_logit"], num_ood=5, attack=None), module, datamodule=data)
    area = found["ood_auroc_held_out_max_logit"]
    inside, outside = (module(x).detach().double().amax(1) for x in (IMAGES, data.images))
    pairs = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside).double()
    assert area.settings["num_ood"] == 5
    assert area.value == pytest.approx(float(pairs.mean()))
    statistics = EnergyStatistics(num_images=5)
    tiny.trainer(tmp_path, [statistics]).test(module, datamodule=data, verbose=False)
    energies = {figure.name: figure.value for figure in statistics.figures}
    assert energies["energy_ood_held_out"] == pytest.approx(
        -float(module(data.images).detach().logsumexp(1).mean()), rel=1e-5
    )


def test_a_config_can_name_data_attack_and_transform() -> None:
    data = {"class_path": "dat_lightning.data.UniformNoise", "init_args": {"size": 9, "shape": [1, 2, 2]}}
    attack = {"norm": "L2", "eps": 3.0, "step_size": 1.0, "num_steps": 10}
    transform = {"class_path": "torchvision.transforms.v2.Identity"}
    arguments = {"datasets": {"noise": data}, "attack": attack, "transform": transform}
    for evaluator in (OODDetection, EnergyStatistics):
        parser = ArgumentParser()
        parser.add_class_arguments(evaluator, "evaluator")
        found = parser.instantiate_classes(parser.parse_object({"evaluator": arguments})).evaluator
        assert len(found.datasets["noise"]) == 9
        assert found.attack == ThreatModel(eps=3.0, step_size=1.0, num_steps=10)
        assert found.transform(3) == 3
