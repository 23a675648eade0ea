"""Small runs of both stages through the command line, and what two of them must have in common."""

from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
STEPS = 18
# So that T moves, and its resumption is tested.
_CURRICULUM = ["max_steps=5", "auc_threshold=0.2", "window_samples=64"]


def command(stage: int, workers: int = 0, *more: str) -> list[str]:
    """Returns the arguments of ``fit``; a run that has checkpoints goes on from the newest."""
    config = ROOT / "configs" / "digits" / f"stage{stage}.yaml"
    args = ["fit", "--config", str(config), "--config", str(Path(__file__).parent / "run.yaml")]
    if stage == 2:
        args += [f"--model.init_args.curriculum.init_args.{setting}" for setting in _CURRICULUM]
    return [*args, f"--data.init_args.num_workers={workers}", "--ckpt_path=last", *more]


def last(folder: Path) -> dict[str, Any]:
    contents: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return contents


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Returns where two checkpoints are not bitwise the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"] * (a.keys() != b.keys())
        return found + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        found = [f"{where}: {len(a)} and {len(b)} entries"] * (len(a) != len(b))
        return found + [
            d for k, (x, y) in enumerate(zip(a, b, strict=False)) for d in differences(x, y, f"{where}/{k}")
        ]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    return [] if a == b and type(a) is type(b) else [f"{where}: {a} and {b}"]


def state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns all of a checkpoint but for its run's name, where it lies, and how the loops count what they did."""
    left_out = {"callbacks", "dat_lightning", "hyper_parameters", "loops"}
    kept = {name: value for name, value in checkpoint.items() if name not in left_out}
    loop = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return {**kept, "logged steps": loop["_batches_that_stepped"], "batches": progress["total"]["completed"]}


def best_fid(checkpoint: dict[str, Any]) -> float:
    """Returns the smallest Fréchet distance that the run knows of."""
    (found,) = (entry for entry in checkpoint["callbacks"].values() if entry.get("monitor") == "val/fid")
    return float(found["best_model_score"])


def scalars(folder: Path) -> dict[tuple[str, int], list[float]]:
    """Returns all that TensorBoard shows of a folder of events: (tag, step) → values."""
    events = EventAccumulator(str(folder)).Reload()
    shown: dict[tuple[str, int], list[float]] = {}
    for tag in set(events.Tags()["scalars"]) - {"hp_metric", "epoch"}:
        for event in events.Scalars(tag):
            shown.setdefault((tag, event.step), []).append(event.value)
    return shown


def logs(folder: Path) -> list[Path]:
    """Returns the folders of events of all lives of a run, in their order."""
    return sorted(
        (folder / "root" / "logs").glob("version_*"), key=lambda path: int(path.name.removeprefix("version_"))
    )
