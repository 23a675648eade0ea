"""Parquet files as the Hugging Face Hub has them, written by what ``datasets`` writes with; it may be absent."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

needs_datasets = "needs the package datasets: pip install 'dat-lightning[hf]'"


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write_parquet(
    path: Path, images: Iterable[np.ndarray], classes: Sequence[str] = (), column: str = "image", **columns: Any
) -> Path:
    """Writes images as the bytes of PNG files, with the types by which ``datasets`` knows images and class names.

    Args:
        path: The file.
        images: uint8, (H, W, 3) each.
        classes: Names of the classes of a column ``label``, if it has them.
        column: Name of the column of the images.
        columns: Others, such as labels.
    """
    datasets = pytest.importorskip("datasets", reason=needs_datasets)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {column: [{"bytes": png(image), "path": None} for image in images], **columns}
    whole = datasets.Dataset.from_dict(values).cast_column(column, datasets.Image())
    if classes:
        whole = whole.cast_column("label", datasets.ClassLabel(names=[*classes]))
    whole.to_parquet(path)
    return path
