import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dat_lightning.core import EnergyModel, ascend, targeted_logit, unbounded_ascent

from .bench import main
from .cases import MEAN, STD, PackageDAT, calibrated_backbone, compare, largest_difference, random_batch
from .plain_dat import AttackGradient, PlainClassifier, PlainDAT, generate

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Images this small gain nothing from more, and on a busy machine threads that wait for each other lose much.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def backbone() -> nn.Module:
    # Smooth, since at a kink rounding errors would lead to other attacks.
    return calibrated_backbone(10, 1, 16, "silu")


def plain_dat(gradient: AttackGradient = "input") -> PlainDAT:
    model = PlainClassifier(backbone(), MEAN, STD)
    return PlainDAT(model, initial_steps=2, max_steps=2, attack_steps=2, gradient=gradient)


@pytest.mark.parametrize(("merge_forwards", "memory_format"), [(True, "channels_last"), (False, "contiguous")])
def test_three_steps_agree_with_the_plain_implementation(merge_forwards: bool, memory_format: str) -> None:
    plain = plain_dat()
    package = PackageDAT(backbone(), 2, 2, merge_forwards=merge_forwards, memory_format=memory_format)
    start = copy.deepcopy(plain.model)
    for seed in range(3):
        batch = random_batch(8, 16, seed)
        expected, found = plain.step(batch), package.step(batch)
        torch.testing.assert_close(found.auc, expected.auc, rtol=0, atol=TOLERANCE, check_dtype=False)
        assert compare(plain, package, expected, found).largest() <= TOLERANCE
    assert largest_difference(start, plain.model) > 100 * TOLERANCE, "three steps moved nothing: agreement is empty"
    assert largest_difference(plain.average, plain.model) > 10 * TOLERANCE, "the average is the model itself"


def test_a_step_is_deterministic() -> None:
    batch = random_batch(8, 16, seed=0)
    one, other = PackageDAT(backbone(), 2, 2), PackageDAT(backbone(), 2, 2)
    assert one.step(batch) == other.step(batch)
    assert largest_difference(one.module, other.module) == 0


def test_gradients_of_parameters_change_nothing_in_the_plain_attacks() -> None:
    batch = random_batch(8, 16, seed=0)
    one, other = plain_dat("input"), plain_dat("all")
    one.step(batch)
    other.step(batch)
    assert largest_difference(one.model, other.model) <= 1e-7


def test_generation_agrees_with_the_plain_implementation() -> None:
    x, y = random_batch(8, 16, seed=0)["x_ood"], torch.arange(8)
    expected = generate(PlainClassifier(backbone(), MEAN, STD).eval(), x, y, step_size=0.2, num_steps=5)
    found = ascend(EnergyModel(backbone(), MEAN, STD), x, y, targeted_logit, unbounded_ascent(0.2, 5))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert (found - x).flatten(1).norm(dim=1).min() > 0.1


def test_the_curriculum_of_the_plain_implementation_moves_as_the_package_s() -> None:
    plain = PlainDAT(PlainClassifier(backbone(), MEAN, STD), max_steps=2, attack_steps=0, auc_threshold=0.5)
    curriculum = PackageDAT(backbone(), 2, 0).module.curriculum
    curriculum.num_steps.fill_(0)
    curriculum.auc_threshold = 0.5
    seen = []
    for value in torch.rand(40, generator=torch.Generator().manual_seed(0)).double() * 0.4 + 0.35:
        plain.update_curriculum(value, 300)
        curriculum.update(value, 300)
        assert plain.contrastive_steps == int(curriculum.num_steps)
        seen.append(plain.contrastive_steps)
    assert set(seen) == {0, 1, 2}


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    tiny = ["--depth", "10", "--widen-factor", "1", "--size", "16", "--batch-size", "4", "--rounds", "2"]
    steps = ["--contrastive-steps", "1", "--attack-steps", "1", "--generation-steps", "1", "--threads", "1"]
    assert main([*tiny, *steps, "--no-compile", "--json", str(out)]) == 0
    assert "median of ratios" in capsys.readouterr().out
    assert {len(t["wall"]) for t in json.loads(out.read_text())["step"]["seconds"].values()} == {2}
