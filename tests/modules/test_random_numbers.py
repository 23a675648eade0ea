"""Each random number of a training step: a function of seed and draw, not of the place in the batch or of the step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dat_lightning import (
    DATBalancedModule,
    DATContinuedChainsModule,
    DATLikelihoodModule,
    DATNoiseContrastiveModule,
    DATRatioModule,
    DualAdversarialModule,
    RandomLength,
    RATIOModule,
    ThreatModel,
    TradesModule,
)
from dat_lightning.core import TiedGaussians
from tests import tiny
from tests.modules import by_hand
from tests.modules.test_at_ebm import at_ebm
from tests.modules.two_steps import with_two_steps

RANDOM_START = replace(tiny.ATTACK, random_start=True)
STILL = ThreatModel(norm="L2", eps=1.0, step_size=0.5, num_steps=0)


def gaussians(seed: int) -> Any:
    module = with_two_steps(DATNoiseContrastiveModule, proposal="gaussians", data_noise=0.1, seed=seed)
    images = torch.rand(2000, 1, 16, 16, generator=torch.Generator().manual_seed(5))  # as the batch has them
    module.gaussians = TiedGaussians.fitted(images, torch.arange(2000) % 3, 0.1)
    return module


def ratio(seed: int) -> Any:
    fixed = {"energy_model": tiny.energy_model(), "threat_model": tiny.ATTACK}
    return RATIOModule(**fixed, ood_threat_model=RANDOM_START, seed=seed)  # type: ignore[arg-type]


def one_logit(seed: int) -> Any:
    return at_ebm(contrastive_rule=RandomLength(0.5), seed=seed)


def stage2(kind: type[DualAdversarialModule] = DualAdversarialModule, **kwargs: Any) -> Callable[[int], Any]:
    return lambda seed: with_two_steps(kind, **kwargs, seed=seed)


# Each has one random number alone; where it lies.
MODULES: dict[str, Callable[[int], Any]] = {
    "classification attack of Stage 1": lambda seed: tiny.stage1(threat_model=RANDOM_START, seed=seed),
    "TRADES' start": lambda seed: TradesModule(tiny.energy_model(), threat_model=tiny.ATTACK, seed=seed),
    "classification attack of RATIO": lambda seed: RATIOModule(
        tiny.energy_model(), threat_model=RANDOM_START, ood_threat_model=STILL, seed=seed
    ),
    "OOD attack of RATIO": ratio,
    "classification attack of Stage 2": stage2(threat_model=RANDOM_START),
    "contrastive chain": stage2(contrastive_rule=RandomLength(0.5)),
    "AT-EBM's chain": one_logit,
    "chain that may go on": stage2(DATContinuedChainsModule, contrastive_rule=RandomLength(0.5)),
    "balanced classes": stage2(DATBalancedModule),
    "OOD attack of DAT with RATIO": stage2(DATRatioModule, ood_threat_model=RANDOM_START),
    "likelihood chain": stage2(DATLikelihoodModule, likelihood_steps=2, likelihood_noise=0.1),
    "uniform proposals": stage2(DATNoiseContrastiveModule),
    "Gaussian proposals": gaussians,
}


def loss_of(make: Callable[[int], Any], batch: dict[str, Tensor], seed: int = 0) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make(seed)
    module.log = lambda *args, **kwargs: None
    return float(module.double().train().training_step(batch, 0).detach())


@pytest.mark.parametrize("name", MODULES)
def test_a_random_number_is_one_of_seed_and_draw(name: str) -> None:
    make, batch = MODULES[name], by_hand.batch()
    loss = loss_of(make, batch)
    assert loss_of(make, batch) == loss
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    moved = {key: value[order] for key, value in batch.items()}
    assert loss_of(make, moved) == pytest.approx(loss, rel=1e-9)
    other_draws = loss_of(make, {**batch, "draw": batch["draw"] + 1000})
    other_seed = loss_of(make, batch, seed=1)
    assert abs(other_draws - loss) > 1e-6
    assert abs(other_seed - loss) > 1e-6
    assert abs(other_seed - other_draws) > 1e-6


def test_without_random_numbers_draws_and_seeds_say_nothing() -> None:
    """What the other test compares is more than rounding."""
    batch = by_hand.batch()
    loss = loss_of(stage2(), batch)
    assert loss_of(stage2(), {**batch, "draw": batch["draw"] + 1000}, seed=1) == loss


NONE = {"data_noise": 0.0, "noise": 0.0, "restart_share": 0.0}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({**NONE, "noise": 0.1}, id="noise of the chains"),
        pytest.param({**NONE, "data_noise": 0.1}, id="noise on images"),
        pytest.param({**NONE, "restart_share": 1.0}, id="starts"),
        pytest.param({**NONE, "restart_share": 0.5}, id="restarts"),
        pytest.param({**NONE, "buffer_size": 4000}, id="places"),
    ],
)
def test_random_numbers_of_jem_are_ones_of_seed_and_draw(settings: dict[str, Any], tmp_path: Path) -> None:
    """From a buffer that is the same for both seeds."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(settings.get("buffer_size", 64), 1, 16, 16, generator=generator, dtype=torch.float64)

    def loss(first: int, seed: int) -> float:
        module: Any = tiny.jem(**settings, seed=seed).double().train()
        module.trainer, module.log = tiny.trainer(tmp_path), lambda *args, **kwargs: None
        module.replay_buffer = images.clone()
        return float(module.training_step({**by_hand.batch(), "draw": torch.arange(6) + first}, 0).detach())

    assert loss(40, 0) == loss(40, 0)
    assert len({loss(40, 0), loss(1040, 0), loss(40, 1)}) == 3


def test_jem_adds_other_noise_to_the_images_of_each_stream() -> None:
    module, x = tiny.jem(), torch.zeros(2, 1, 16, 16)
    noise = {name: module.noised(x, [3, 4], name) for name in ("gen", "clf")}
    assert not torch.equal(noise["gen"], noise["clf"])
    assert not torch.equal(tiny.jem(seed=1).noised(x, [3, 4], "gen"), noise["gen"])
