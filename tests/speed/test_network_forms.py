"""Compiled and folded forms are the same function, for the sizes that come again, whatever becomes of old results."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dat_lightning import Ascent, EnergyModel, WideResNet, unbounded_ascent
from dat_lightning.core import targeted_logit
from dat_lightning.speed import CompiledNetwork, CompileMode, FoldedNetwork, NetworkForms
from tests.replayed import Compiler


def network(seed: int = 0) -> EnergyModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EnergyModel(WideResNet(10, 1)).double()


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


def climb(form: nn.Module, x: Tensor, steps: int) -> dict[int, Tensor]:
    walk = Ascent(targeted_logit, unbounded_ascent(0.3, steps))
    return walk.snapshots(form, x, torch.arange(len(x)) % 10, (1, steps))


def test_expected_sizes_have_a_graph_each_and_others_run_the_networks_own_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network().eval()
    with Compiler().installed(monkeypatch) as compiler:
        forms = NetworkForms(True, fold_batch_norm=False)
        form = forms.for_passes(model)
        assert form is forms.for_passes(model)
        with torch.no_grad():
            form(images(4))
            assert compiler.graphs == []
            forms.expect(4)
            forms.expect(6, ("passes",))
            forms.expect(5, ("ascents",))
            for size in (4, 6, 4, 5, 6, 1, 4):
                torch.testing.assert_close(form(images(size)), model(images(size)), rtol=1e-10, atol=1e-12)
    assert compiler.graphs == [(None, (4, 3, 16, 16), False), (None, (6, 3, 16, 16), False)]


def test_in_training_every_size_has_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ascents of a training step too, although they climb in eval mode."""
    model = network()
    with Compiler().installed(monkeypatch) as compiler:
        forms = NetworkForms(True, fold_batch_norm=True)
        climb(forms.for_ascents(model), images(3), 2)
        assert len(compiler.graphs) == 1
        forms.for_passes(model)(images(5))
        assert len(compiler.graphs) == 2
        climb(forms.for_ascents(model.eval()), images(4), 2)
        forms.for_passes(model)(images(4))
        assert len(compiler.graphs) == 2


@pytest.mark.slow
def test_networks_do_not_share_the_limit_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch makes eight for one piece of code, and says so only in its log."""
    with Compiler().installed(monkeypatch) as compiler:
        for seed in range(3):
            forms = NetworkForms(True, fold_batch_norm=False)
            for size in range(1, 6):
                forms.for_passes(network(seed))(images(size))
    assert len(compiler.graphs) == 15


@pytest.mark.parametrize(
    ("mode", "fold"), [(True, False), ("reduce-overhead", False), ("reduce-overhead", True), ("max-autotune", True)]
)
def test_one_graph_serves_ascents_of_any_length(mode: CompileMode, fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of CUDA graphs are gone with the next step: neither the walk nor its snapshots may need them."""
    model = network()
    x = images(4)
    with Compiler().installed(monkeypatch) as compiler:
        forms = NetworkForms(mode, fold)
        forms.expect(4)
        for steps in (2, 3, 5):
            expected = climb(model, x, steps)
            found = climb(forms.for_ascents(model), x, steps)
            for count, state in expected.items():
                torch.testing.assert_close(found[count], state, rtol=0, atol=1e-10)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
    assert compiler.graphs == [(None if mode is True else mode, (4, 3, 16, 16), True)]


def test_passes_replay_no_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of two passes, and gradients that add up over passes, are needed at the same time."""
    model = network()
    expected = copy.deepcopy(model)
    with Compiler().installed(monkeypatch) as compiler:
        forms = NetworkForms("reduce-overhead", fold_batch_norm=False)
        forms.expect(4)
        for form, owner in ((forms.for_passes(model), model), (expected, expected)):
            one, other = form(images(4)), form(1 - images(4))
            (one - other).square().mean().backward()
            form(images(4)).square().mean().backward()
            assert owner.backbone.get_parameter("conv1.weight").grad is not None
    for found, parameter in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.grad, parameter.grad, rtol=1e-8, atol=1e-10)
    assert [graph[0] for graph in compiler.graphs] == [None]


def test_both_purposes_share_a_network_that_need_not_be_compiled() -> None:
    model = network()
    forms = NetworkForms(False, fold_batch_norm=False)
    assert forms.for_passes(model) is model
    assert forms.for_ascents(model) is model


@pytest.mark.parametrize("mode", [False, True])
def test_another_network_gets_forms_of_its_own(mode: CompileMode, monkeypatch: pytest.MonkeyPatch) -> None:
    with Compiler().installed(monkeypatch):
        forms = NetworkForms(mode, fold_batch_norm=True)
        forms.expect(3)
        for seed in (0, 1):
            model = network(seed).eval()
            for form in (forms.for_passes(model), forms.for_ascents(model)):
                torch.testing.assert_close(form(images(3)), model(images(3)), rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True])
def test_parts_that_are_replaced_are_noticed(fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with Compiler().installed(monkeypatch):
        for compile in (False, True):
            forms, model = NetworkForms(compile, fold), network().eval()
            forms.expect(3)
            forms.for_ascents(model)(images(3)), forms.for_passes(model)(images(3))
            model.backbone.fc = nn.Linear(64, 4).double()
            for form in (forms.for_ascents(model), forms.for_passes(model)):
                torch.testing.assert_close(form(images(3)), model(images(3)), rtol=1e-8, atol=1e-8)
            weight = nn.Parameter(torch.ones(4, 64, dtype=torch.float64))
            model.backbone.fc.weight = weight
            for form in (forms.for_ascents(model), forms.for_passes(model)):
                torch.testing.assert_close(form(images(3)), model(images(3)), rtol=1e-8, atol=1e-8)


def test_hooks_belong_to_the_network_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().eval()
    model.register_forward_pre_hook(lambda _, args: (0.5 * args[0],))
    with Compiler().installed(monkeypatch) as compiler:
        forms = NetworkForms(True, fold_batch_norm=False)
        forms.expect(4)
        for size in (3, 4):
            form = forms.for_passes(model)
            torch.testing.assert_close(form(images(size)), model(images(size)), rtol=1e-8, atol=1e-8)
    assert len(compiler.graphs) == 1


def test_a_copy_follows_its_own_weights_and_has_its_own_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    with Compiler().installed(monkeypatch) as compiler:
        forms = NetworkForms(True, fold_batch_norm=True)
        forms.expect(3)
        model = network().eval()
        before = forms.for_ascents(model)(images(3))
        other_forms, other = copy.deepcopy((forms, model))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.2)
        changed = other_forms.for_ascents(other)
        assert isinstance(changed, CompiledNetwork)
        assert isinstance(changed.network, FoldedNetwork)
        torch.testing.assert_close(changed(images(3)), other(images(3)), rtol=1e-8, atol=1e-8)
        assert not torch.allclose(changed(images(3)), before)
        torch.testing.assert_close(forms.for_ascents(model)(images(3)), before)
        assert len(compiler.graphs) == 2


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="compile must be true, false, 'reduce-overhead' or 'max-autotune', got 'fast'"
    ):
        NetworkForms("fast", fold_batch_norm=False)  # type: ignore[arg-type]
