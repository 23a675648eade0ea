"""Accuracy under attack against closed forms, plain loops and the package itself; masked networks are noticed."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dat_lightning import ThreatModel
from dat_lightning.core import ascend, cross_entropy
from dat_lightning.core.random_streams import stream_seed
from dat_lightning.data.digits import load_images
from dat_lightning.evaluation import AutoAttack, RobustAccuracy
from dat_lightning.evaluation.masking import masking_signs, square_signs, wilson_interval
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
SIDE, COUNT = 6, 80


class Images(Dataset[dict[str, Any]]):
    """Images with their labels and indices."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "y": self.y[index], "index": index}


class Foreign(LightningModule):
    """A module of another project: images to logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Measures nothing of its own."""


class Margin(nn.Module):
    """Two classes, told apart by a function of w·x + b."""

    def __init__(self, curve: Callable[[Tensor], Tensor] = lambda margin: margin) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(SIDE * SIDE, generator=torch.Generator().manual_seed(3)))
        self.b = nn.Parameter(-0.5 * self.w.sum().detach())
        self.curve = curve

    def margin(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.w + self.b

    def forward(self, x: Tensor) -> Tensor:
        margin = self.curve(self.margin(x))
        return torch.stack([-margin, margin], 1)


def linear_data() -> Images:
    """Images so far inside of [0, 1] that small balls around them are too; every tenth label is wrong."""
    x = 0.5 + 0.2 * (2 * torch.rand(COUNT, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) - 1)
    y = (Margin().margin(x) > 0).long()
    y[::10] = 1 - y[::10]
    return Images(x, y)


def robust_in_closed_form(data: Images, norm: str, eps: float) -> list[bool]:
    """An image is robust if its margin exceeds ε times the dual norm of w."""
    network = Margin()
    dual = network.w.double().norm(2 if norm == "L2" else 1)
    margin = network.margin(data.x).double() * (2 * data.y - 1)
    answer: list[bool] = (margin > eps * dual).tolist()
    return answer


class DigitsNetwork(nn.Sequential):
    """Reads digits without training: random features, and a layer from least squares."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
        hidden, last = self[1], self[3]
        assert isinstance(hidden, nn.Linear)
        assert isinstance(last, nn.Linear)
        x, y = load_images()
        with torch.no_grad():
            hidden.weight.mul_(8)
            features = self[2](hidden(x.flatten(1)))
            inner = features.T @ features + 0.1 * torch.eye(64)
            last.weight.copy_(8 * torch.linalg.solve(inner, features.T @ (nn.functional.one_hot(y, 10) - 0.1)).T)
            last.bias.zero_()


def digits_data(count: int) -> Images:
    return Images(*(values[:count].clone() for values in load_images()))


def evaluate(
    path: Path, network: nn.Module, data: Images, *callbacks: Callback, batch_size: int = 16, **kwargs: Any
) -> dict[str, float]:
    """Tests a network in Lightning's inference mode, which is the default of other projects."""
    trainer = tiny.trainer(path, callbacks, **{"inference_mode": True, **kwargs})
    (logged,) = trainer.test(Foreign(network), DataLoader(data, batch_size=batch_size), verbose=False)
    return dict(logged)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the package's attacks, for its own runs and for ours."""
    import pyautoattack

    full = pyautoattack.AutoAttack._set_version

    def shortened(self: Any, version: str) -> None:
        full(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 8
        self.square.n_queries = 300

    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", shortened)


# PGD.


@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.1), ("Linf", 0.02)])
def test_pgd_on_a_linear_network_gives_the_closed_form_and_no_warning(norm: Any, eps: float, tmp_path: Path) -> None:
    data = linear_data()
    steps = ThreatModel(norm, eps, eps / 4, 10)
    attacks = [
        replace(steps, step_size=eps, num_steps=1),
        steps,
        replace(steps, eps=eps / 2),
        replace(steps, eps=math.inf, step_size=0.5, num_steps=20),
    ]
    evaluator = RobustAccuracy(attacks)
    logged = evaluate(tmp_path, Margin(), data, evaluator)
    for attack in attacks:
        expected = robust_in_closed_form(data, norm, min(attack.eps, 1e3))
        assert evaluator.results[evaluator.name(attack)][:, -1].tolist() == expected
        assert logged[f"test/{evaluator.name(attack)}"] == pytest.approx(sum(expected) / COUNT)
    assert 0.2 < logged[f"test/{evaluator.name(steps)}"] < 0.8
    assert logged["test/accuracy"] == pytest.approx(0.9)
    json.dumps([dict(figure.details) for figure in evaluator.figures], allow_nan=False)


def test_the_name_tells_threat_models_apart() -> None:
    assert RobustAccuracy.name(ThreatModel("Linf", 0.03, 0.01, 7)) == "robust_accuracy_Linf_0.03_7x0.01"
    assert RobustAccuracy.name(ThreatModel(random_start=True)) == "robust_accuracy_L2_0.5_10x0.1_random"


def test_restarts_are_a_plain_loop_over_all_images_whatever_the_batches(tmp_path: Path) -> None:
    data, network = linear_data(), Margin(ridged)
    attack = ThreatModel("L2", 0.2, 0.01, 20)
    evaluator = RobustAccuracy(attack, restarts=3, seed=5)
    evaluate(tmp_path, network, data, evaluator, batch_size=7)
    index, robust, columns = torch.arange(COUNT), torch.ones(COUNT, dtype=torch.bool), []
    for seed in (5, stream_seed(5, "restart", 1), stream_seed(5, "restart", 2)):
        walk = replace(attack, random_start=seed != 5)
        x_adv = ascend(network, data.x, data.y, cross_entropy, walk, draws=index, seed=seed)
        with torch.no_grad():
            robust = robust & (network(x_adv).argmax(1) == data.y)
        columns.append(robust)
    found = evaluator.results[evaluator.name(attack)]
    assert found.tolist() == torch.stack(columns, 1).tolist()
    shares = [float(column.double().mean()) for column in columns]
    assert shares[0] > shares[1] > shares[2] > 0
    figure = evaluator.figures[1]
    assert figure.details["accuracy_after_restarts"] == shares
    assert figure.value == shares[-1]
    assert figure.settings["restarts"] == 3
    assert (
        "threat model (norm L2, eps 0.2, step size 0.01, num steps 20, random start no), restarts 3" in figure.protocol
    )


@pytest.mark.parametrize("evaluator", [RobustAccuracy(), AutoAttack("Linf", 0.2)])
def test_a_network_without_numbers_has_no_accuracy(evaluator: Any, tmp_path: Path) -> None:
    network = Margin(lambda margin: margin * math.nan)
    with pytest.raises(ValueError, match="needs finite logits, got NaN or infinite ones for"):
        evaluate(tmp_path, network, linear_data(), evaluator)


def test_an_unbounded_walk_has_no_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        walks.append(len(args[1]))
        return ascend(*args, **kwargs)

    monkeypatch.setattr("dat_lightning.evaluation.robustness.ascend", counting)
    evaluator = RobustAccuracy(ThreatModel(eps=math.inf, step_size=0.01, num_steps=2), restarts=3)
    evaluate(tmp_path, Margin(), linear_data(), evaluator, batch_size=COUNT)
    assert walks == [72]  # those that are classified correctly, once
    (figure,) = evaluator.figures[1:]
    assert figure.settings["threat_model"]["eps"] == math.inf
    assert figure.settings["restarts"] == 1


def test_the_interval_ends_where_the_share_is_two_deviations_away() -> None:
    for successes, trials in ((30, 40), (1, 1000), (7, 7)):
        for end in wilson_interval(successes, trials):
            if 0 < end < 1:
                deviation = math.sqrt(end * (1 - end) / trials)
                assert abs(successes / trials - end) == pytest.approx(1.959964 * deviation)
    low, high = wilson_interval(30, 40)
    assert low < 0.75 < high
    assert wilson_interval(0, 5)[0] == 0
    assert wilson_interval(7, 7)[1] == 1


# Signs of gradient masking.


def rounded(margin: Tensor) -> Tensor:
    return margin.mul(4).round().div(4)


def ridged(margin: Tensor) -> Tensor:
    """Rises with the margin on the whole, but has ridges that short steps cannot pass."""
    return margin + 0.15 * torch.sin(30 * margin)


def test_a_network_without_gradients_is_noticed(tmp_path: Path) -> None:
    attacks = [ThreatModel("L2", eps, eps / 4, 10) for eps in (0.1, 0.4)]
    anywhere = ThreatModel("L2", math.inf, 0.5, 20)
    evaluator = RobustAccuracy([*attacks, anywhere])
    with pytest.warns(UserWarning, match="gradient masking: the figure may be too high") as caught:
        evaluate(tmp_path, Margin(rounded), linear_data(), evaluator)
    small, large, unbounded = (figure.details["warnings"] for figure in evaluator.figures[1:])
    assert [w.split(": ", 1)[1] for w in small] == [
        "the gradient vanishes (its length is below 1e-10) at 100.0% of the correct images."
    ]
    assert "breaks no image that the weaker robust_accuracy_L2_0.1_10x0.025 does not break" in large[0]
    assert any("can turn any image into any other, and leaves" in w for w in unbounded)
    told = [str(w.message) for w in caught]
    assert all(any(sign in message for message in told) for sign in [*small, *large, *unbounded])


def test_one_long_step_that_beats_many_short_ones_is_noticed(tmp_path: Path) -> None:
    leap, walk = ThreatModel("L2", 0.2, 0.2, 1), ThreatModel("L2", 0.2, 0.004, 60)
    evaluator = RobustAccuracy([leap, walk])
    with pytest.warns(UserWarning, match="the weaker robust_accuracy_L2_0.2_1x0.2 only"):
        evaluate(tmp_path, Margin(ridged), linear_data(), evaluator)
    assert not evaluator.figures[1].details["warnings"]
    assert len(evaluator.figures[2].details["warnings"]) == 1


def flags(robust: int, total: int = 100) -> Tensor:
    return torch.arange(total) < robust


@pytest.mark.parametrize(
    ("weak", "strong", "left_weak", "left_strong", "sign"),
    [
        # A weaker attack breaks more, beyond what chance explains.
        (ThreatModel(num_steps=1, step_size=0.5), ThreatModel(), 50, 55, "leaves 55.0% correct"),
        (ThreatModel(num_steps=1, step_size=0.5), ThreatModel(), 50, 54, None),
        (ThreatModel(num_steps=1, step_size=0.5), ThreatModel(), 50, 40, None),
        # Ten steps that do not get as far as one are not stronger.
        (ThreatModel(num_steps=1, step_size=0.5), ThreatModel(step_size=0.01), 50, 70, None),
        # Norms are not compared.
        (ThreatModel("Linf", 0.1), ThreatModel("L2", 0.5), 50, 70, None),
        # A random point of the ball breaks more than the ascent.
        (ThreatModel(num_steps=0, random_start=True), ThreatModel(), 50, 70, "leaves 70.0% correct"),
        # Twice the radius breaks nothing more.
        (ThreatModel(eps=0.2), ThreatModel(eps=0.4), 70, 70, "breaks no image"),
        (ThreatModel(eps=0.3), ThreatModel(eps=0.4), 70, 70, None),
        (ThreatModel(eps=0.2), ThreatModel(eps=0.4), 70, 69, None),
        (ThreatModel(eps=0.2), ThreatModel(eps=0.4), 50, 50, None),
        # More steps break nothing more: strange only if few broke nothing either.
        (ThreatModel(num_steps=10), ThreatModel(num_steps=20), 90, 90, "breaks no image"),
        (ThreatModel(num_steps=10), ThreatModel(num_steps=20), 89, 89, None),
        # From anywhere to plain grey.
        (ThreatModel(), ThreatModel(eps=5.0, step_size=0.5), 50, 6, "can turn any image into any other"),
        (ThreatModel(), ThreatModel(eps=5.0, step_size=0.5), 50, 5, None),
        (ThreatModel(), ThreatModel(eps=4.9, step_size=0.5), 50, 6, None),
        (ThreatModel(), ThreatModel(eps=5.0, step_size=0.4), 50, 6, None),
        (ThreatModel("Linf", 0.1, 0.1), ThreatModel("Linf", 0.5, 0.1), 50, 6, "can turn any image into any other"),
    ],
)
def test_signs(weak: ThreatModel, strong: ThreatModel, left_weak: int, left_strong: int, sign: str | None) -> None:
    robust = {strong: flags(left_strong), weak: flags(left_weak)}
    signs = masking_signs(flags(90), robust, flags(0), dimensions=100)
    assert signs[weak] == []
    assert [sign in found for found in signs[strong]] == [True] if sign else signs[strong] == []


def test_vanishing_gradients_count_at_correct_images_only() -> None:
    attack = ThreatModel()
    wrong = ~flags(90)
    assert masking_signs(flags(90), {attack: flags(50)}, wrong | flags(4), 100) == {attack: []}
    (found,) = masking_signs(flags(90), {attack: flags(50)}, wrong | flags(5), 100)[attack]
    assert found == "the gradient vanishes (its length is below 1e-10) at 5.6% of the correct images."


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_large_logits_make_no_network_robust(norm: Any, tmp_path: Path) -> None:
    """Their gradients are small, many below the step's constant of 1e-10, and point where those of the others do."""
    large = DigitsNetwork()
    large[3].get_parameter("weight").data.mul_(5)
    data, eps = digits_data(200), 0.2 if norm == "L2" else 0.02
    attack = ThreatModel(norm, eps, eps / 4, 10)
    usual, scaled = RobustAccuracy(attack), RobustAccuracy(attack)
    name = usual.name(attack)
    expected = evaluate(tmp_path, DigitsNetwork(), data, usual)[f"test/{name}"]
    with pytest.warns(UserWarning, match="gradient vanishes .* of the correct images"):
        found = evaluate(tmp_path, large, data, scaled)[f"test/{name}"]
    assert 0.2 < expected < 0.8
    assert abs(found - expected) < 0.02
    x = data.x.double().requires_grad_(True)
    loss = nn.functional.cross_entropy(large.double()(x), data.y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    length = gradient.flatten(1).square().sum(1).sqrt()
    assert (length > 0).all()
    # Float32 loses what is left of p(y) − 1 at some.
    assert int((scaled.results["vanished"] != (length < 1e-10)).sum()) <= 4
    assert 20 < int(scaled.results["vanished"].sum()) < 180
    assert not usual.results["vanished"].any()


@pytest.mark.usefixtures("quick")
def test_autoattack_notices_that_square_beats_the_gradient(tmp_path: Path) -> None:
    evaluator = AutoAttack("L2", 0.2, attacks=["apgd-ce", "square"])
    with pytest.warns(UserWarning, match="gradient masking"):
        evaluate(tmp_path, Margin(rounded), linear_data(), evaluator)
    square, zero = evaluator.figures[0].details["warnings"]
    assert square.startswith("Square, which needs no gradient, breaks ")
    assert zero == "the gradient vanishes (its length is below 1e-10) at 100.0% of the correct images."
    assert bool(evaluator.results["vanished"].all())


def test_square_alone_counts_from_two_per_mille_and_a_tenth_of_the_others() -> None:
    pgd = flags(10, 2000)
    assert square_signs({"apgd-ce": pgd, "square": flags(14, 2000)}) == []
    assert "breaks 0.2% of the images" in square_signs({"square": flags(15, 2000), "apgd-ce": pgd})[0]
    assert square_signs({"apgd-ce": flags(20, 50), "square": flags(22, 50)}) == []
    assert square_signs({"apgd-ce": flags(20, 50), "square": flags(23, 50)})
    # Gradients find nothing, and no gradient is needed.
    assert square_signs({"apgd-ce": flags(0, 50), "square": flags(1, 50)})
    assert square_signs({"square": flags(50, 50)}) == []


# AutoAttack.


def test_the_name_tells_versions_apart() -> None:
    assert AutoAttack(eps=0.5).name == "autoattack_L2_0.5"
    assert AutoAttack("Linf", 0.03, version="plus").name == "autoattack_plus_Linf_0.03"
    assert AutoAttack(attacks=["square"]).name == "autoattack_custom_L2_0.5"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.1), ("Linf", 0.02)])
def test_autoattack_on_a_linear_network_gives_the_closed_form(norm: Any, eps: float, tmp_path: Path) -> None:
    data = linear_data()
    evaluator = AutoAttack(norm, eps, batch_size=25)
    logged = evaluate(tmp_path, Margin(), data, evaluator)
    expected = robust_in_closed_form(data, norm, eps)
    results = evaluator.results
    # With two classes there is no DLR.
    names = ["broken_apgd-ce", "broken_fab-t", "broken_square"]
    assert [name for name in results if name.startswith("broken")] == names
    broken = torch.stack([results[name] for name in names])
    assert (results["correct"] & ~broken.any(0)).tolist() == expected
    assert logged[f"test/autoattack_{norm}_{eps:g}"] == pytest.approx(sum(expected) / COUNT)
    assert broken.sum(0).max() == 1  # each is broken by the first that can
    assert (results["distance"] > 0).tolist() == broken.any(0).tolist()
    details = evaluator.figures[0].details
    assert 0.5 * eps < details["largest_distance"] <= eps * (1 + 1e-4)
    lost = {index for indices in details["broken"].values() for index in indices}
    assert sorted(lost | set(details["misclassified"])) == [i for i, robust in enumerate(expected) if not robust]
    assert details["clean_accuracy"] == pytest.approx(0.9)
    assert details["accuracy_after"]["square"] == pytest.approx(sum(expected) / COUNT)
    json.dumps(dict(details), allow_nan=False)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_autoattack_is_the_package(norm: Any, tmp_path: Path) -> None:
    import pyautoattack

    data, eps = digits_data(12), {"L2": 0.3, "Linf": 0.02}[norm]
    data.y[3] = (data.y[3] + 1) % 10
    evaluator = AutoAttack(norm, eps, seed=4)
    evaluate(tmp_path, DigitsNetwork(), data, evaluator, batch_size=5)
    network = DigitsNetwork().requires_grad_(False)
    package = pyautoattack.AutoAttack(network, norm=norm, eps=eps, seed=4)
    with torch.random.fork_rng():
        x_adv, y_adv = package.run_standard_evaluation(data.x, data.y, batch_size=250)
    broken = torch.stack([v for name, v in evaluator.results.items() if name.startswith("broken")])
    assert (evaluator.results["correct"] & ~broken.any(0)).tolist() == (y_adv == data.y).tolist()
    assert 0 < broken.sum() < 11
    assert len(broken) == 4
    delta = x_adv - data.x
    distance = torch.linalg.vector_norm(delta.flatten(1), ord=2 if norm == "L2" else math.inf, dim=1)
    torch.testing.assert_close(evaluator.results["distance"], distance)


@pytest.mark.usefixtures("quick")
def test_individual_attacks_overlap_and_their_union_is_the_cascade(tmp_path: Path) -> None:
    kinds: list[Any] = ["apgd-ce", "fab-t"]
    cascade = AutoAttack("L2", 0.15, attacks=kinds)
    individual = AutoAttack("L2", 0.15, attacks=kinds, individual=True)
    evaluate(tmp_path, Margin(), linear_data(), cascade, individual)
    assert individual.figures[0].value == cascade.figures[0].value
    alone = individual.figures[0].details["accuracy_alone"]
    assert alone == {"apgd-ce": cascade.figures[0].value, "fab-t": cascade.figures[0].value}
    assert not cascade.results["broken_fab-t"].any()


class Classes(nn.Module):
    """A linear network of some classes."""

    def __init__(self, classes: int, side: int = SIDE) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1))
        return logits


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("classes", "version", "attacks", "targets"),
    [
        (2, "standard", ["apgd-ce", "fab-t", "square"], 1),
        (3, "standard", ["apgd-ce", "apgd-dlr", "fab-t", "square"], 2),
        (4, "standard", ["apgd-ce", "apgd-t", "fab-t", "square"], 3),
        (3, "plus", ["apgd-ce", "apgd-dlr", "fab", "square", "fab-t"], 2),
        (2, "rand", ["apgd-ce"], 1),
        (12, "rand", ["apgd-ce", "apgd-dlr"], 9),
    ],
)
def test_fewer_classes_get_fewer_targets_and_attacks(
    classes: int, version: Any, attacks: list[str], targets: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyautoattack

    seen = set()
    run = pyautoattack.AutoAttack.run_standard_evaluation

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add((self.apgd_targeted.n_target_classes, self.fab.n_target_classes, self.version))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", watched)
    network, x = Classes(classes), linear_data().x[:4]
    evaluator = AutoAttack("Linf", 0.2, version=version)
    evaluate(tmp_path, network, Images(x, network(x).argmax(1)), evaluator)
    assert evaluator.figures[0].settings["attacks"] == attacks
    assert seen == {(targets, targets, version)}
    assert evaluator.figures[0].value < 1


def test_impossible_attacks_are_refused(tmp_path: Path) -> None:
    data = linear_data()
    with pytest.raises(ValueError, match=r"the attacks \['apgd-t'\] need more classes, the network has 3"):
        evaluate(tmp_path, Classes(3), data, AutoAttack(attacks=["apgd-ce", "apgd-t"]))
    with pytest.raises(ValueError, match=r"need more classes, the network has 1"):
        evaluate(tmp_path, Classes(1), data, AutoAttack())
    with pytest.raises(ValueError, match=r"square in L2 needs images of at least 5×5 pixels, got \(4, 4\)"):
        evaluate(tmp_path, Classes(4, side=4), Images(data.x[..., :4, :4], data.y), AutoAttack())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("evaluator", [RobustAccuracy(restarts=2), AutoAttack(attacks=["apgd-ce", "fab-t", "square"])])
def test_the_network_and_torch_are_left_as_they_were(evaluator: Callback, tmp_path: Path) -> None:
    network = tiny.energy_model()
    first, *others = network.parameters()
    first.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    seen: list[list[bool]] = []
    gradient, gradients = torch.full_like(others[0], 2.0), list[Tensor | None]()

    class Watch(Callback):
        """Notes the modes around the evaluation."""

        def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            network.backbone.train()
            others[0].grad = gradient
            torch.manual_seed(11)
            sys.settrace(trace)

        def on_test_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append([sys.gettrace() is trace, network.backbone.training, network.training])
            gradients.extend(p.grad for p in network.parameters())
            sys.settrace(old)

    def trace(*args: Any) -> None:
        """Follows nothing."""

    old = sys.gettrace()
    try:
        evaluate(tmp_path, network, digits_data(6), evaluator, Watch())
    finally:
        sys.settrace(old)
    assert seen == [[True, True, False]]
    after = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(after, torch.rand(3))
    assert [p.requires_grad for p in network.parameters()] == [False] + [True] * len(others)
    kept = gradients.pop(1)
    assert kept is not None
    assert kept.unique().tolist() == [2.0]
    assert gradients == [None] * len(gradients)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    loss = network.train()(digits_data(6).x).sum()
    loss.backward()  # nothing was poisoned by inference mode


def test_half_precision_weights_are_attacked_in_whole_pixels(tmp_path: Path) -> None:
    """An ε of one thousandth is less than the spacing of bfloat16."""
    evaluator = RobustAccuracy(ThreatModel("Linf", 0.001, 0.001, 1))
    seen = []

    class Recorder(Margin):
        def margin(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return super().margin(x)

    evaluate(tmp_path, Recorder(), linear_data(), evaluator, precision="bf16-true")
    assert set(seen) == {torch.bfloat16}
    assert not evaluator.results["vanished"].any()


# Chunks, files and ranks.


class Interrupted(AutoAttack):
    """Stops before a chunk, and counts those that it attacks."""

    stop_before = -1
    count = 0

    def evaluate_batch(self, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.count == self.stop_before:
            raise RuntimeError("the machine is taken away")
        self.count += 1
        return super().evaluate_batch(pl_module, batch)


@pytest.mark.usefixtures("quick")
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data, network = linear_data(), Margin()

    def attack(folder: str) -> Interrupted:
        return Interrupted("L2", 0.15, batch_size=30, attacks=["apgd-ce", "fab-t"], dirpath=str(tmp_path / folder))

    whole, first, second, third = attack("whole"), attack("parts"), attack("parts"), attack("parts")
    first.stop_before = 2
    third.seed = 1
    evaluate(tmp_path, network, data, whole)
    with pytest.raises(RuntimeError, match="taken away"):
        evaluate(tmp_path, network, data, first)
    # Chunks do not depend on the loader's batches.
    evaluate(tmp_path, network, data, second, batch_size=13)
    assert (whole.count, first.count, second.count) == (3, 2, 1)
    assert second.figures == whole.figures
    assert all(torch.equal(value, whole.results[name]) for name, value in second.results.items())
    evaluate(tmp_path, network, data, third)
    assert third.count == 3


def test_pgd_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    whole = RobustAccuracy.evaluate_batch

    def counting(self: RobustAccuracy, pl_module: LightningModule, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batches.append(len(batch["x"]))
        return whole(self, pl_module, batch)

    monkeypatch.setattr(RobustAccuracy, "evaluate_batch", counting)
    runs = [RobustAccuracy(ThreatModel(eps=0.15), dirpath=str(tmp_path), restarts=r) for r in (2, 2, 3)]
    for run in runs:
        evaluate(tmp_path, Margin(), linear_data(), run, batch_size=40)
    assert runs[0].figures == runs[1].figures
    assert batches == [40, 40] * 2  # the second run found all, the third has other settings


@pytest.mark.usefixtures("quick")
def test_a_subset_is_spread_over_the_data_and_does_not_depend_on_batches(tmp_path: Path) -> None:
    chosen = []
    for batch_size in (7, 80):
        evaluator = AutoAttack("L2", 0.15, max_images=12, batch_size=5, attacks=["apgd-ce"])
        evaluate(tmp_path, Margin(), linear_data(), evaluator, batch_size=batch_size)
        chosen.append(evaluator.results["index"].tolist())
        robust = (evaluator.results["correct"] & ~evaluator.results["broken_apgd-ce"]).tolist()
        closed = robust_in_closed_form(linear_data(), "L2", 0.15)
        assert robust == [closed[index] for index in chosen[-1]]
    ranked = sorted(range(COUNT), key=lambda index: stream_seed(0, "AutoAttack's images", index))
    assert chosen[0] == chosen[1] == sorted(ranked[:12])
    assert evaluator.figures[0].num_samples == 12


def run_two_evaluators(devices: int, folder: Path) -> None:
    """What a process of the comparison does: its share of the test, then rank zero writes what it knows."""
    pgd = RobustAccuracy([ThreatModel("L2", eps, 0.05, 3, random_start=True) for eps in (0.05, 0.1)], restarts=2)
    attack = Interrupted("Linf", 0.01, max_images=11, batch_size=4, attacks=["apgd-ce"])
    strategy = "ddp" if devices > 1 else "auto"
    trainer = tiny.trainer(folder, [pgd, attack], devices=devices, strategy=strategy)
    trainer.test(Foreign(DigitsNetwork()), datamodule=tiny.digits(eval_batch_size=61), verbose=False)
    (folder / f"chunks-{devices}-{trainer.global_rank}.txt").write_text(str(attack.count))
    if trainer.is_global_zero:
        values = [{name: value.tolist() for name, value in e.results.items()} for e in (pgd, attack)]
        figures = [{figure.name: figure.value for figure in e.figures} for e in (pgd, attack)]
        (folder / f"{devices}.json").write_text(json.dumps({"values": values, "figures": figures}))


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.evaluation.test_robustness", "2", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    run_two_evaluators(1, tmp_path)
    one, two = (json.loads((tmp_path / f"{devices}.json").read_text()) for devices in (1, 2))
    assert two == one
    # Three chunks, dealt in turn.
    assert [(tmp_path / f"chunks-{name}.txt").read_text() for name in ("1-0", "2-0", "2-1")] == ["3", "2", "1"]
    pgd, attack = one["values"]
    assert pgd["index"] == list(range(360))
    assert len(attack["index"]) == 11
    shares = [share for figures in one["figures"] for share in figures.values()]
    assert len(set(shares)) == len(shares) == 4


# Boundaries.


def test_a_missing_package_is_named_before_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ValueError, match=r"pip install 'dat-lightning\[eval\]'"):
        evaluate(tmp_path, Margin(), linear_data(), AutoAttack())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RobustAccuracy([]), "threat_models must be different ones, at least one, got"),
        (lambda: RobustAccuracy([ThreatModel(), ThreatModel()]), "threat_models must be different ones"),
        (lambda: RobustAccuracy(restarts=0), "restarts must be at least 1, got 0"),
        (lambda: AutoAttack(norm="L1"), "norm must be 'L2' or 'Linf', got 'L1'"),  # type: ignore[arg-type]
        (lambda: AutoAttack(eps=math.inf), "eps must be a positive finite radius, got inf"),
        (lambda: AutoAttack(eps=0), "eps must be a positive finite radius, got 0"),
        (lambda: AutoAttack(version="custom"), "version must be 'standard', 'plus' or 'rand', got 'custom'"),  # type: ignore[arg-type]
        (lambda: AutoAttack(max_images=0), "max_images must be at least 1, got 0"),
        (lambda: AutoAttack(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: AutoAttack(attacks=["pgd"]), r"attacks must be different ones of .*, got \['pgd'\]"),  # type: ignore[list-item]
        (lambda: AutoAttack(attacks=["fab", "fab"]), "attacks must be different ones of"),
        (lambda: AutoAttack(attacks=[]), "attacks must be different ones of"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_yaml_gives_the_constructor_call() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(RobustAccuracy, "pgd")
    parser.add_class_arguments(AutoAttack, "attack")
    config = "{pgd: {threat_models: [{eps: 1.0}, {norm: Linf, eps: 0.1}]}, attack: {attacks: [square], eps: 0.5}}"
    made = parser.instantiate_classes(parser.parse_string(config))
    assert made.pgd.threat_models == (ThreatModel(eps=1.0), ThreatModel("Linf", 0.1))
    assert made.attack.attacks == ("square",)


if __name__ == "__main__":
    run_two_evaluators(int(sys.argv[1]), Path(sys.argv[2]))
