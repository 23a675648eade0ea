"""Batches of another form or range, as they reach the modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dat_lightning import DigitsDataModule
from dat_lightning.core.errors import InputError
from tests import tiny

IMAGES = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 10


def mappings(**parts: Tensor) -> DataLoader[Any]:
    batches = [{name: part[k : k + 7] for name, part in parts.items()} for k in (0, 7, 14)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def pairs(x: Tensor = IMAGES, y: Tensor = LABELS) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=7)


@pytest.mark.parametrize("loop", ["validate", "test"])
def test_pairs_do_for_evaluation(loop: str, tmp_path: Path) -> None:
    def figures(loader: Any) -> Any:
        trainer = tiny.trainer(tmp_path, limit_val_batches=1.0)
        return getattr(trainer, loop)(tiny.stage1(), loader, verbose=False)

    expected = figures(mappings(x=IMAGES, y=LABELS, index=torch.arange(20)))
    assert expected[0]
    for form in (pairs(), [pairs(y=LABELS.int().view(20, 1))], pairs(y=LABELS.double())):
        assert figures(form) == expected


def test_predictions_are_numbered_through(tmp_path: Path) -> None:
    forms = [mappings(x=IMAGES), pairs(), DataLoader(TensorDataset(IMAGES), batch_size=7), [pairs()]]
    with torch.no_grad():
        expected = tiny.stage1().eval()(IMAGES).argmax(1)
    for form in forms:
        found: Any = tiny.trainer(tmp_path).predict(tiny.stage1(), form)
        assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(20))
        assert torch.equal(torch.cat([batch["prediction"] for batch in found]), expected)


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_each_loop_looks_at_its_first_batch(loop: str, tmp_path: Path) -> None:
    trainer, module = tiny.trainer(tmp_path, limit_val_batches=1.0), tiny.stage1()
    run: Any = getattr(trainer, loop)
    run(module, pairs())
    with pytest.raises(InputError, match=r"x of RobustClassifierModule must be images in \[0, 1\], got .*, 255"):
        run(module, pairs(IMAGES * 255))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loop", ["fit", "validate", "test", "predict"])
def test_images_of_another_precision_are_named(loop: str, dtype: torch.dtype, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, limit_val_batches=1.0)
    loader = mappings(x_clf=IMAGES.to(dtype), y_clf=LABELS) if loop == "fit" else pairs(IMAGES.to(dtype))
    said = rf"x\w* of RobustClassifierModule must be images of torch.float32, .*, got {dtype}"
    with pytest.raises(InputError, match=said):
        getattr(trainer, loop)(tiny.stage1(), loader)


class Changed(DigitsDataModule):
    """Digits that something changes on the way to the module, from a batch on."""

    def __init__(self, change: Any, first: int = 0) -> None:
        super().__init__(batch_size=32, validation_size=20, num_ood=200, num_held_out=50)
        self.change, self.first, self.seen = change, first, 0

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        self.seen += 1
        return {key: self.change(key, part) if self.seen > self.first else part for key, part in batch.items()}


def trained(path: Path, data: DigitsDataModule, module: Any = None) -> list[Tensor]:
    module = module or tiny.stage2()
    tiny.trainer(path, limit_train_batches=3).fit(module, datamodule=data)
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize(
    "convert",
    [lambda y: y.int(), lambda y: y.byte(), lambda y: y.view(-1, 1), lambda y: y.double()],
    ids=["int32", "uint8", "(N, 1)", "float64"],
)
def test_labels_of_any_type_train_alike(convert: Any, tmp_path: Path) -> None:
    expected = trained(tmp_path, tiny.digits())
    found = trained(tmp_path, Changed(lambda key, part: convert(part) if key.startswith("y") else part))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key, part: part * 255 if key[0] == "x" else part, r"x_gen of .* in \[0, 1\], got values in \[0, 255\]"),
        (
            lambda key, part: (part - 0.1) / 0.3 if key == "x_clf" else part,
            r"x_clf of .* in \[0, 1\], got .*\[-0.333",
        ),
        (lambda key, part: part * 2 - 1 if key == "x_ood" else part, r"x_ood of .* in \[0, 1\], got .*\[-0.99"),
        (lambda key, part: (part * 255).byte() if key == "x_gen" else part, "x_gen of .* must be float .* torch.uint8"),
        (
            lambda key, part: part + 0.5 if key == "y_gen" else part,
            r"y_gen of .* class indices, .* got \d.5 among",
        ),
        (lambda key, part: torch.eye(10)[part] if key == "y_clf" else part, r"y_clf of .* of shape \(32, 10\)"),
        (lambda key, part: part + 10 if key == "y_gen" else part, r"has 10 logits, but y_gen has labels 1\d … 19"),
    ],
)
def test_training_refuses_other_batches(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        trained(tmp_path, Changed(change))


@pytest.mark.parametrize(
    ("module", "unused"), [(tiny.stage1, ("x_gen", "y_gen", "x_ood")), (tiny.jem, ("y_gen", "x_ood"))]
)
def test_what_a_module_does_not_use_may_be_anything(module: Any, unused: tuple[str, ...], tmp_path: Path) -> None:
    found = trained(tmp_path, Changed(lambda key, part: part + 100 if key in unused else part), module())
    assert all(map(torch.equal, found, trained(tmp_path, tiny.digits(), module())))


def test_shapes_are_looked_at_in_every_step_and_values_in_the_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"y_clf of .* of shape \(32, 10\)"):
        trained(tmp_path, Changed(lambda key, part: torch.eye(10)[part] if key == "y_clf" else part, first=2))
    trained(tmp_path, Changed(lambda key, part: part * 1.5 if key == "x_gen" else part, first=1))


def test_a_second_run_is_looked_at_anew(tmp_path: Path) -> None:
    module = tiny.stage2()
    trained(tmp_path, tiny.digits(), module)
    with pytest.raises(InputError, match=r"x_gen of .* in \[0, 1\]"):
        trained(tmp_path, Changed(lambda key, part: part * 255 if key == "x_gen" else part), module)
