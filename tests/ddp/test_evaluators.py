"""Two and four gloo processes are one process: the figures of the evaluators, from shares of unequal size."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ddp.ranks import run
from tests.ddp.uneven import NUM_TEST

pytestmark = pytest.mark.ddp


def figures(folder: Path, time: int, rank: int, kind: str = "figures") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{kind}-{time}-{rank}.json").read_text())
    return found


@pytest.mark.slow
def test_the_figures_of_several_processes_are_those_of_one(tmp_path: Path) -> None:
    run("run_evaluators", tmp_path)
    expected = figures(tmp_path / "1", 0, 0)
    assert len(expected) == 7 + 2 * 3 * 2 * 2 + 2 * 6 + 2 * 2 * 4
    assert expected["edit_denoising_0.2_psnr_unknown"][1] == 50
    assert expected["ood_auroc_one_logsumexp"][1] == NUM_TEST + 1
    assert expected["ood_auroc_one_logsumexp"][2]["num_skipped"] == 2
    assert figures(tmp_path / "1", 1, 0) == expected
    for num_ranks in (4,):
        folder = tmp_path / str(num_ranks)
        for rank in range(num_ranks):
            found = figures(folder, 0, rank)
            assert found.keys() == expected.keys()
            for name, (value, num_samples, details) in expected.items():
                # An AUROC moves by 1/(2·359·31) if the last bits of two scores change their order.
                assert found[name][0] == pytest.approx(value, rel=1e-4, abs=1e-4 if name.startswith("ood") else 0), name
                assert found[name][1] == num_samples, name
                assert found[name][2].keys() == details.keys(), name
                assert found[name][2].get("num_skipped") == details.get("num_skipped"), name
            assert figures(folder, 1, rank) == found == figures(folder, 0, 0)
            assert figures(folder, 0, rank, "logged") == figures(folder, 0, 0, "logged")
