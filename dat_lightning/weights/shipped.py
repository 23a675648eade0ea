"""Models that ship with the package: a name stands for a folder that ``dat-lightning export`` wrote."""

from pathlib import Path

from dat_lightning.core.errors import InputError
from dat_lightning.weights.hub import CONFIG_FILE, MODELS, WEIGHTS_FILE, EnergyModel

PAGE_FILE = "explore.yaml"
"""In such a folder, like a run's configuration: the data whose images the web page shows, and how it draws samples."""


def shipped_models() -> tuple[str, ...]:
    """Returns the names of the models that ship with the package, in alphabetical order."""
    return tuple(sorted(path.name for path in MODELS.iterdir() if is_exported(path)))


def pretrained(name: str) -> EnergyModel:
    """Returns a model that ships with the package, in eval mode, float32, on the CPU.

    Its weights are stored in half precision; ``README.md`` in its folder says how it was made, and what it is good for.

    Args:
        name: One of ``dat_lightning.weights.shipped_models()``, such as ``"digits"``.

    Raises:
        InputError: If no model of that name ships; the message lists those that do.
    """
    if name not in shipped_models():
        known = ", ".join(map(repr, shipped_models()))
        raise InputError(f"no model {name!r} ships with dat_lightning; those that do are {known}")
    return EnergyModel.from_pretrained(MODELS / name)


def located(path: str | Path) -> Path:
    """Returns where weights are: the folder of a model that ships, if a string is its name, or else the path itself.

    Whoever takes a file of weights asks this function. What lies in the working directory under the name of a model
    neither hides the model nor is hidden by it: the two are told apart by how they are written.

    Args:
        path: Name or path; a ``Path`` is never a name.

    Raises:
        InputError: If a file or folder here has the name of a model.
    """
    if not isinstance(path, str) or path not in shipped_models():
        return Path(path)
    if Path(path).exists():
        raise InputError(
            f"{path!r} is a model that ships with dat_lightning, and something of that name is here as well: write"
            f" ./{path} for what is here, {MODELS / path} for the model"
        )
    return MODELS / path


def is_exported(path: Path) -> bool:
    """Returns whether a path is a folder that ``export`` or ``save_pretrained`` wrote."""
    return (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()
