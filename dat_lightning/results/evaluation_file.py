"""The file ``evaluation.json``: what it holds, how it is written and read back."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dat_lightning.core.errors import InputError
from dat_lightning.results.measurement import Measurement
from dat_lightning.weights.files import written_whole

FORMAT = "dat_lightning evaluation"
SCHEMA_VERSION = 2

# JSON has no numbers for these.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Evaluation:
    """Contents of an evaluation file.

    Attributes:
        name: Label of the run in tables and plots.
        entries: The measurements, no two of a name.
        provenance: Where they come from: checkpoint, weights, versions, seeds, device, date.
        failure: What stopped the test before all figures were measured; ``None`` if nothing did.
    """

    name: str
    entries: Sequence[Measurement]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None

    def entry(self, name: str) -> Measurement | None:
        """Returns the measurement of that name, if there is one."""
        return next((entry for entry in self.entries if entry.name == name), None)


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Writes an evaluation as JSON; a crash leaves the old file or the new one, never half of one."""
    contents = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "note": "NaN, Infinity and -Infinity are written as strings",
        "name": evaluation.name,
        "failure": evaluation.failure,
        "figures": [{**asdict(entry), "protocol": entry.protocol} for entry in evaluation.entries],
        "provenance": evaluation.provenance,
    }
    write_text(path, json.dumps(primitive(contents), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_evaluation(path: Path) -> Evaluation:
    """Returns the evaluation in a file.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is damaged, no evaluation, or of another schema version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no evaluation file at {path}")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON, so it is damaged or no evaluation: {error}") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise InputError(f"{path} is no evaluation file: expected one that EvaluationReport has written")
    version = contents.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(f"{path} has schema version {version!r}, expected {SCHEMA_VERSION}: evaluate anew")
    try:
        entries = [_entry(figure) for figure in contents["figures"]]
        evaluation = Evaluation(contents["name"], entries, contents["provenance"], contents.get("failure"))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is a damaged evaluation file: a figure or an entry lacks {error}") from error
    wrong = [entry.name for entry in entries if not _well_formed(entry)]
    if wrong or not (isinstance(evaluation.name, str) and isinstance(evaluation.failure, str | None)):
        raise InputError(f"{path} is a damaged evaluation file: name or figure {wrong} has an entry of a wrong type")
    return evaluation


def path_for(path: Path, evaluation: Evaluation) -> Path:
    """Returns where an evaluation can be written so that none of other weights is lost: ``path``, or one beside it.

    A file of the same checkpoint is replaced, but not a complete one by one that is incomplete, or that lacks figures
    of it, those of single step counts aside. A file of another checkpoint, or that is no evaluation, stays; then the
    first eight digits of this one's hash are in the name.
    """
    beside = f"{path.stem}-{(identity(evaluation) or 'unknown')[:8]}"
    names = (path.stem, beside, *(f"{beside}-{k}" for k in range(2, 1000)))
    for name in names:
        place = path.with_stem(name)
        if not place.exists():
            return place
        old = _evaluation_or_none(place)
        if old is not None and identity(old) is not None and identity(old) == identity(evaluation):
            if old.failure is not None or (evaluation.failure is None and _names(old) <= _names(evaluation)):
                return place
            less = "incomplete" if evaluation.failure is not None else "fewer"
            return path_for(place.with_stem(f"{name}-{less}"), evaluation)
    raise InputError(f"{path} and a thousand files beside it belong to other checkpoints: name another path")


def _names(evaluation: Evaluation) -> set[str]:
    return {entry.name for entry in evaluation.entries if not is_of_one_step_count(entry.name)}


def identity(evaluation: Evaluation) -> str | None:
    """Returns the hash of the checkpoint's file, or of the weights where there is no file; ``None`` if unknown."""
    checkpoint = evaluation.provenance.get("checkpoint")
    digest = checkpoint.get("sha256") if isinstance(checkpoint, Mapping) else None
    digest = digest or evaluation.provenance.get("weights_sha256")
    return digest if isinstance(digest, str) else None


def _evaluation_or_none(path: Path) -> Evaluation | None:
    try:
        return read_evaluation(path)
    except (ValueError, OSError):
        return None


def is_of_one_step_count(name: str) -> bool:
    """Returns whether a measurement belongs to one number of sampling steps of a sweep, such as ``fid_20_steps``."""
    return re.search(r"_\d+_steps$", name) is not None


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with written_whole(path) as file:
        file.write(text.encode("utf-8"))


def primitive(value: Any) -> Any:
    """Returns a value as JSON takes it: numbers that are not finite, and objects, as text, tensors as lists."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return primitive(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): primitive(each) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [primitive(each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted((primitive(each) for each in value), key=repr)
    return str(value)


def restored(value: Any) -> Any:
    """Returns a value from JSON with its numbers that are not finite."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: restored(each) for key, each in value.items()}
    if isinstance(value, list):
        return [restored(each) for each in value]
    return value


def _entry(figure: Mapping[str, Any]) -> Measurement:
    """A measurement of a file; the protocol there is for people, and made of the rest."""
    return Measurement(**{each.name: restored(figure[each.name]) for each in fields(Measurement)})


def _well_formed(entry: Measurement) -> bool:
    texts = (entry.name, entry.definition, entry.source)
    numbers = (entry.value, entry.num_samples)
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
        and isinstance(entry.details, dict)
        and entry.better in (None, "higher", "lower")
        and isinstance(entry.settings, dict)
    )
