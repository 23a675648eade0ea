"""Records what the program computes, so that moving its parts about can be shown to change nothing.

``python -m tests.frozen.record`` writes ``values.json`` and ``resolved.json`` anew, which is right where a value is
meant to change alone; with ``--resolved`` the latter alone, and with a file's name the values into that file.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
VALUES = FOLDER / "values.json"
RESOLVED = FOLDER / "resolved.json"
# Names of configurations that are added after one that trains.
ADDED = ("evaluate", "editing")


def environment() -> dict[str, str]:
    """Returns what decides about the last bit of a result."""
    return {
        "torch": torch.__version__.split("+")[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        # Kernels are chosen by what a processor can do, and cut their work by its caches.
        "processor": _processor(),
    }


def _processor() -> str:
    """Family, model and stepping, as Linux tells them of x86; nothing elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return "-".join(told.get(name, "") for name in ("cpu family", "model", "stepping"))


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns a hash of names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.numpy().tobytes())
    return sha.hexdigest()


def one_step() -> dict[str, Any]:
    """Returns the float64 loss and a hash of the gradients of one step of each module."""
    from dat_lightning import TradesModule
    from tests import tiny

    modules: dict[str, Any] = {
        "stage1": tiny.stage1(),
        "stage1_train_mode": tiny.stage1(attack_mode="train"),
        "trades": TradesModule(energy_model=tiny.energy_model(), optimizer=tiny.SGD, threat_model=tiny.ATTACK),
        "stage2": tiny.stage2(),
        "stage2_r1": tiny.stage2(r1_weight=0.1),
    }
    generator = torch.Generator().manual_seed(3)
    batch: dict[str, torch.Tensor] = {
        name: torch.rand(8, 1, 16, 16, generator=generator, dtype=torch.float64) for name in ("x_gen", "x_clf", "x_ood")
    }
    batch |= {name: torch.randint(10, (8,), generator=generator) for name in ("y_gen", "y_clf")}
    batch["draw"] = torch.arange(8)
    values = {}
    for name, module in modules.items():
        module.double().train()
        if module.curriculum is not None:
            module.curriculum.num_steps.fill_(3)
        loss = module.training_step(batch, 0)
        loss.backward()
        gradients = {n: p.grad for n, p in module.energy_model.named_parameters() if p.grad is not None}
        values[name] = {"loss": loss.item(), "gradients": digest(gradients)}
    return values


def runs() -> dict[str, Any]:
    """Returns fingerprints of both digits stages after 20 steps, of a resumed run, of figures and of samples."""
    from dat_lightning.cli import main

    def state(path: str) -> dict[str, Any]:
        contents = torch.load(path, weights_only=True)
        average, raw = contents["state_dict"], contents["current_model_state"]
        moments = contents["optimizer_states"][0]["state"]
        return {
            "average": digest(average),
            "weights": digest(raw),
            "optimizer": digest(
                {f"{key}.{name}": value for key, entry in moments.items() for name, value in entry.items()}
            ),
            "steps": contents["global_step"],
            "T": int(average["curriculum.num_steps"]) if "curriculum.num_steps" in average else None,
        }

    one, two = (["--config", str(FOLDER / f"{stage}.yaml")] for stage in ("stage1", "stage2"))
    last = {stage: f"{stage}/checkpoints/last.ckpt" for stage in ("stage1", "stage2")}
    two += ["--model.init_from", last["stage1"]]
    main(["fit", *one])
    main(["fit", *two])
    values: dict[str, Any] = {stage: state(path) for stage, path in last.items()}
    whole = Path("whole.ckpt")
    Path(last["stage2"]).rename(whole)
    main(["fit", *two, "--trainer.max_epochs=1"])
    main(["fit", *two, "--ckpt_path", last["stage2"]])
    values["stage2_resumed"] = state(last["stage2"])
    main(["test", *two, "--config", str(FOLDER / "evaluate.yaml"), "--ckpt_path", str(whole)])
    evaluation = json.loads(Path("evaluation/evaluation.json").read_text(encoding="utf-8"))
    values["figures"] = figures(evaluation)
    main(["predict", *two, "--ckpt_path", str(whole)])
    with zipfile.ZipFile("stage2/samples/samples.npz") as archive:
        values["samples"] = {
            name: hashlib.sha256(archive.read(name)).hexdigest() for name in sorted(archive.namelist())
        }
    return values


def figures(evaluation: Any) -> dict[str, float | None]:
    """Returns the numbers of an evaluation file, by the names of their figures and settings."""
    found: dict[str, float | None] = {}

    def collect(node: Any) -> None:
        if isinstance(node, dict):
            if "name" in node and "value" in node:
                found[node["name"]] = node["value"]
            for value in node.values():
                collect(value)
        elif isinstance(node, list):
            for value in node:
                collect(value)

    collect(evaluation)
    return found


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Returns a nested configuration as dotted names and plain values."""
    if isinstance(node, dict) and node:
        return {k: v for name, value in node.items() for k, v in flat(value, f"{prefix}{name}.").items()}
    if isinstance(node, list) and any(isinstance(value, dict) for value in node):
        return {k: v for i, value in enumerate(node) for k, v in flat(value, f"{prefix}{i}.").items()}
    return {prefix[:-1]: node}


def printed(*configs: Path) -> Any:
    """Returns what ``--print_config`` shows for some configuration files together."""
    from dat_lightning.cli import main

    shown = io.StringIO()
    arguments = [argument for path in configs for argument in ("--config", str(path))]
    with warnings.catch_warnings(), contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        warnings.simplefilter("ignore")  # that the command line is called from Python is the point here
        main(["fit", *arguments, "--print_config"])
    return yaml.safe_load(shown.getvalue())


def resolved(configs: list[Path]) -> dict[str, Any]:
    """Returns the same as dotted names and plain values."""
    return flat(printed(*configs))


def recipes() -> dict[str, list[Path]]:
    """Returns the configurations that a user gives to ``fit``, each with the files that make it."""
    folders = ("cifar10", "cifar100", "cifar10_small", "cifar10_cpu", "imagenet", "digits", "density", "fashion_mnist")
    paths = [path for folder in folders for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))]
    return {f"{path.parent.name}/{path.stem}": [path] for path in paths if path.stem not in ADDED}


def values() -> dict[str, Any]:
    """Returns everything that is frozen but the configurations, computed in a folder that goes away."""
    torch.set_num_threads(1)  # sums do not depend on the machine's cores
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            return {"environment": environment(), "one_step": one_step(), **runs()}
        finally:
            os.chdir(here)


def write_resolved() -> None:
    """Writes the configurations anew, a line each."""
    found = {name: resolved(paths) for name, paths in recipes().items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(config)}" for name, config in found.items())
    RESOLVED.write_text("{\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--resolved"]:
        text = json.dumps(values(), indent=1) + "\n"
        Path(sys.argv[1] if sys.argv[1:] else VALUES).write_text(text, encoding="utf-8")
    if sys.argv[1:] in ([], ["--resolved"]):
        write_resolved()
