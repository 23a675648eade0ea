"""Training on two and four gloo processes is training on one: losses, gradients, parameters, T and its window."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.ddp.ranks import run
from tests.ddp.run_training import NUM_STEPS, STAGES, STOP, Case, cases

# Of the norm of all gradients, or parameters, together. In float64 what remains is the order of sums alone.
TOLERANCE = {"64-true": 1e-10, "32-true": 1e-5}
BATCH_SIZE = 32

Runs = Callable[[Case], list[dict[str, Any]]]

pytestmark = pytest.mark.ddp


def trained(every: bool, tmp_path: Path) -> Runs:
    """Trains, and returns what finds the records of all ranks of a case."""
    run("run_training", tmp_path, "every" if every else "few", timeout=600)

    def records(case: Case) -> list[dict[str, Any]]:
        paths = [tmp_path / case.name / f"rank{rank}.pt" for rank in range(case.num_ranks)]
        return [torch.load(path, weights_only=True) for path in paths]

    return records


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return trained(False, tmp_path_factory.mktemp("few"))


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """‖a − b‖ / ‖a‖ over all entries."""
    assert a.keys() == b.keys()
    first, second = (torch.cat([part[name].double().flatten() for name in sorted(a)]) for part in (a, b))
    return float((first - second).norm() / first.norm())


def check(case: Case, runs: Runs) -> None:
    """Compares every rank with the run of one process that never stopped."""
    (one,) = runs(Case(case.stage, case.precision, 1))
    tolerance, first = TOLERANCE[case.precision], 0 if case.resumed_from is None else STOP
    for rank, record in enumerate(runs(case)):
        where = f"{case.name}, rank {rank}"
        assert len(record["steps"]) == NUM_STEPS - first, where
        for step, (a, b) in enumerate(zip(one["steps"][first:], record["steps"], strict=True), start=first):
            assert b["draws"].sort().values.tolist() == list(range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)), where
            assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=tolerance), where
            assert distance(a["gradients"], b["gradients"]) < tolerance, f"{where}, step {step}"
            assert a["curriculum"].keys() == b["curriculum"].keys()
            for name, value in a["curriculum"].items():
                assert torch.equal(b["curriculum"][name], value), f"{where}, step {step}: {name}"
        for part in ("end", "average"):
            assert distance(one[part], record[part]) < tolerance, f"{where}: {part}"
            for name in one[part]:
                # Norms hide small tensors; running statistics among them.
                torch.testing.assert_close(record[part][name], one[part][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_train_as_one_process_does(num_ranks: int, stage: str, precision: Any, runs: Runs) -> None:
    check(Case(stage, precision, num_ranks), runs)


def test_the_comparison_is_not_empty(runs: Runs) -> None:
    """T grew in between, weights and running statistics moved, and all parameters had gradients."""
    (one,) = runs(Case("stage2", "32-true", 1))
    assert [int(step["curriculum"]["curriculum.num_steps"]) for step in one["steps"]] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 4]
    values = [float(step["curriculum"]["curriculum.values"][0]) for step in one["steps"]]
    assert len({value for value in values if value > 0}) > 3
    (one,) = runs(Case("stage1", "32-true", 1))
    assert distance(one["steps"][0]["gradients"], one["steps"][-1]["gradients"]) > 0.1
    assert distance(one["end"], one["average"]) > 1e-3
    parameters = {name for name in one["end"] if not name.endswith(("running_mean", "running_var", "_tracked"))}
    assert one["steps"][0]["gradients"].keys() == parameters - {"energy_model.mean", "energy_model.std"}
    assert float(one["end"]["energy_model.backbone.norm.running_mean"].abs().max()) > 0.01


@pytest.mark.parametrize("case", [c for c in itertools.chain(*cases(every=False)) if c.resumed_from], ids=str)
def test_a_run_goes_on_with_another_number_of_ranks(case: Case, runs: Runs) -> None:
    """At the same image, with the same T, average and optimiser, and it says what is no longer exact."""
    check(case, runs)
    before, after = case.resumed_from, case.num_ranks
    assert before is not None
    (message,) = runs(case)[0]["messages"]
    assert f"written by {before} process" in message
    assert f"now there {'is' if after == 1 else 'are'} {after}:" in message
    assert "last bits" in message
    assert f"{BATCH_SIZE // before} images before, {BATCH_SIZE // after} now" in message
    assert all(not record["messages"] for record in runs(case)[1:])  # said once


def test_a_run_that_starts_says_nothing(runs: Runs) -> None:
    assert not any(runs(Case("stage2", "32-true", 4))[rank]["messages"] for rank in range(4))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_and_change_of_ranks(tmp_path: Path) -> None:
    """TRADES, RATIO, DAT with other terms, and attacks that see the statistics of the whole batch, too."""
    every = trained(True, tmp_path)
    compared = [case for case in itertools.chain(*cases(every=True)) if case.num_ranks > 1 or case.resumed_from]
    assert {case.stage for case in compared} == set(STAGES)
    for case in compared:
        check(case, every)


@pytest.mark.parametrize(
    ("error", "num_ranks", "is_explained"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:545] Connection reset by peer"), 2, True),
        (RuntimeError("Application timeout caused pair closure"), 2, True),
        (torch.distributed.DistNetworkError("recvValue failed"), 2, True),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:545] Connection reset by peer"), 1, False),
        (RuntimeError("out of memory"), 2, False),
    ],
    ids=str,
)
def test_an_error_says_that_another_process_is_lost(
    error: Exception, num_ranks: int, is_explained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, before = tiny.digits(), str(error)
    monkeypatch.setattr(data, "_rank", lambda: (0, num_ranks))
    data.on_exception(error)
    assert str(error).startswith(before)
    assert ("process 0 of 2 has lost contact with another one" in str(error)) is is_explained
