import json
from pathlib import Path

from tests.benchmarks import pipelines
from tests.recipes import write_folders


def test_every_recipe_gets_a_rate(tmp_path: Path) -> None:
    write_folders(tmp_path / "cifar" / "train", 10, 4, (32, 32), seed=0)
    write_folders(tmp_path / "imagenet", 3, 10, (48, 40), seed=1)
    arguments = ["--cifar", str(tmp_path / "cifar"), "--imagenet", str(tmp_path / "imagenet")]
    pipelines.main([*arguments, "--seconds", "0.01", "--rounds", "1", "--json", str(tmp_path / "rates.json")])
    rates = json.loads((tmp_path / "rates.json").read_text(encoding="utf-8"))
    assert len(rates) == 4
    assert all(set(row) == {"x_gen", "x_clf", "x_ood", "Stage 1", "Stage 2"} for row in rates.values())
    assert all(value > 0 for row in rates.values() for value in row.values())
