"""A real study, small: two runs of digits through the command line, and one that is stopped in the middle."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dat_lightning
from dat_lightning.studies import execution, plan, read_study
from dat_lightning.studies.__main__ import main
from dat_lightning.studies.collection import read_results
from dat_lightning.studies.study_file import to_yaml

CONFIGS = Path(dat_lightning.__file__).parents[1] / "configs"
SMALL: dict[str, Any] = {
    "model": {"init_args": {"energy_model": {"init_args": {"backbone": {"init_args": {"widths": [4, 8]}}}}}},
    "data": {"init_args": {"batch_size": 32, "num_ood": 100, "num_held_out": 40}},
    "trainer": {"max_epochs": 2, "limit_train_batches": 20, "limit_test_batches": 1},
}


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Set by Lightning in this process once anything was trained.
    for name in [name for name in os.environ if name.startswith("PL_")]:
        monkeypatch.delenv(name)


def small(seeds: list[int], arguments: dict[str, Any]) -> Path:
    """The study of the implicit R1 on digits, with its own files, at a size that a test can run."""
    shipped = CONFIGS / "studies" / "digits"
    contents = yaml.safe_load((shipped / "implicit_r1.yaml").read_text(encoding="utf-8"))
    for base in contents["bases"].values():
        base["configs"] = [str(shipped / config) for config in base["configs"]] + ["small.yaml"]
        base.setdefault("arguments", {}).update(arguments)
    contents["evaluation"] = {
        "configs": [str(shipped / "evaluation.yaml")],
        "arguments": {
            "trainer.callbacks.PGDSampler.num_samples": 20,
            "trainer.callbacks.PGDSampler.num_steps": [1, 2],
            "trainer.callbacks.SampleMetrics.metrics": ["fid"],
        },
    }
    path = Path("study.yaml")
    path.write_text(to_yaml({**contents, "seeds": seeds}), encoding="utf-8")
    Path("small.yaml").write_text(to_yaml(SMALL), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_study_of_digits_runs_through_the_command_line() -> None:
    path = small([0], {})
    main([str(path), "--out", "out/study", "--jobs", "2"])
    read = read_results(Path("out/study/study.json"))
    assert [(run["variant"], run["done"]) for run in read["runs"]] == [("with the attack", True), ("without", True)]
    for run in read["runs"]:
        assert 0 <= run["figures"]["accuracy"] <= 1
        assert run["figures"]["fid"] > 0
        assert run["figures"]["fid num_steps"] in (1, 2)
        assert run["sweeps"]["label_agreement"]["steps"] == [1, 2]
        # A look every ten steps, of two epochs of twenty.
        assert len(run["curves"]["train/r1"]["steps"]) == 4
        assert run["provenance"]["versions"]["torch"] == torch.__version__.split("+")[0]
        assert Path(run["folders"]["test"], "evaluation.html").is_file()
    gradients = [run["curves"]["train/r1"]["values"] for run in read["runs"]]
    assert gradients[0] != gradients[1]
    assert {path.name for path in Path("out/study").iterdir()} == {
        *("study.json", "study.html", "table.md", "gradient.png", "separation.png")
    }


@pytest.mark.slow
def test_a_training_that_was_killed_ends_as_one_that_was_not() -> None:
    path = small([0], {"trainer.max_epochs": 10})
    study = read_study(path)
    whole, killed = plan(study, Path("whole")), plan(study, Path("killed"))
    (first, *_), (other, *_) = whole.tasks.values(), killed.tasks.values()
    assert first.key == other.key
    program = (
        "import sys; from pathlib import Path; from dat_lightning.studies import plan, read_study\n"
        "from dat_lightning.studies import execution\n"
        "execution.execute(plan(read_study(Path('study.yaml')), Path('killed')), 1, print)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    while not other.checkpoint.is_file():
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    epoch = torch.load(other.checkpoint, weights_only=True)["epoch"]
    said: list[str] = []
    for task, found in ((first, whole), (other, killed)):
        alone = type(found)(found.study, (), {task.key: task})
        assert execution.execute(alone, 1, said.append)[task.key].status == "finished"
    assert any("goes on from its last checkpoint" in line for line in said) == (epoch < 9)
    one, two = (torch.load(task.checkpoint, weights_only=True) for task in (first, other))
    assert one["global_step"] == two["global_step"] == 200
    for name, weight in one["state_dict"].items():
        assert torch.equal(weight, two["state_dict"][name]), name
