"""A measured number with its settings: what was measured is compared by these, as data, and told in words."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dat_lightning.results.digests import digest

Settings = Mapping[str, Any]
"""Name → primitive, or a list or mapping of primitives; what :func:`identity` gives has a digest in it."""

_DIGEST = re.compile(r" ?sha256:[0-9a-f]+")


@dataclass(frozen=True)
class Measurement:
    """One number of an evaluation, with what it takes to understand and repeat it.

    Attributes:
        name: What it is, such as ``accuracy`` or ``fid``; logged as ``{stage}/{name}``.
        value: The number; it may be NaN or infinite.
        definition: What the number is, in words.
        num_samples: Number of images that entered.
        details: Further primitives: seeds, confidence intervals, curves as lists. ``pictures`` lists PNG files,
            ``captions`` says what is on them, ``warnings`` lists sentences.
        better: Which of two values is the better one; ``None`` if that is a question of taste.
        settings: What decides the number besides the model: attack, bins, and the identity of test images, reference,
            extractor or judge. Two measurements of a name compare if these and the number of images are equal.
        source: Class of the callback or module that measured it.
    """

    name: str
    value: float
    definition: str
    num_samples: int
    details: Mapping[str, Any] = field(default_factory=dict)
    better: Literal["higher", "lower"] | None = None
    settings: Settings = field(default_factory=dict)
    source: str = ""

    @property
    def protocol(self) -> str:
        """How it was measured, for people to read."""
        return "; ".join(filter(None, (self.definition, in_words(self.settings))))

    @property
    def compared_by(self) -> Settings:
        """All that must be equal in two measurements of this name, or their values do not compare."""
        return {"number of images": self.num_samples, **self.settings}


def canonical(settings: Settings) -> str:
    """Returns settings as JSON, the same for equal ones.

    Raises:
        TypeError: If a setting is no primitive.
    """
    return json.dumps(settings, sort_keys=True, ensure_ascii=False, default=_as_primitive)


def primitives(settings: Settings) -> dict[str, Any]:
    """Returns settings as a file gives them back: dataclasses as mappings with their class, sequences as lists.

    Raises:
        TypeError: If a setting is no primitive.
    """
    found: dict[str, Any] = json.loads(canonical(settings))
    return found


def settings_key(settings: Settings) -> str:
    """Returns a digest of settings, for names of files."""
    return digest([canonical(settings)])


def flat(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the settings of nested mappings under dotted names."""
    if isinstance(settings, Mapping) and (settings or not name):
        for key, value in settings.items():
            yield from flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, settings


def differing(several: Sequence[Settings]) -> tuple[str, ...]:
    """Returns the dotted names of the settings that are not equal in all of several, in their order."""
    parts = [{name: canonical({"": value}) for name, value in flat(settings)} for settings in several]
    names = dict.fromkeys(name for each in parts for name in each)
    return tuple(name for name in names if len({each.get(name) for each in parts}) > 1)


def in_words(settings: Settings) -> str:
    """Returns settings for people to read: digests are left out, and so is what is not set."""
    return ", ".join(f"{key.replace('_', ' ')} {told}" for key, value in settings.items() if (told := _told(value)))


def _told(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return f"({inside})" if (inside := in_words(value)) else ""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_told, value))}]"
    return _DIGEST.sub("", str(value))


def _as_primitive(value: Any) -> Any:
    """A setting as JSON takes it; the text of other objects may differ between processes, or hide what differs."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Of two classes with the same fields one means another thing; fields may be such objects again.
        parts = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **parts}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"settings must be primitives, got {type(value).__name__}: {value!r}")
