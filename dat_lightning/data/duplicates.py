"""Near-duplicates of in-distribution images among OOD images, and the list that excludes them.

    python -m dat_lightning.data.duplicates --config CONFIG --output exclude.txt --sheet pairs.png

makes the DataModule in a configuration's ``data`` section, and nothing else of the configuration, and writes the names
that its OOD sources take in ``exclude``. Look at the sheet before you use the list.
"""

import argparse
import json
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from torchvision.transforms.v2.functional import to_pil_image

from dat_lightning.core.errors import InputError
from dat_lightning.data.fingerprint import SizedDataset
from dat_lightning.data.hash_search import DuplicatePair, near_duplicates
from dat_lightning.data.image_hashes import FeatureHasher, ImageHashes, mirrored_hashes, perceptual_hashes
from dat_lightning.data.images import exclusion_entry
from dat_lightning.data.paired import OODSplit, PairedDataModule, Split


def contact_sheet(
    pairs: Sequence[DuplicatePair], ood: SizedDataset, reference: SizedDataset, per_distance: int = 6, side: int = 96
) -> Image.Image:
    """Returns a picture with a row of pairs for each distance: the OOD image left, the other one right.

    Args:
        pairs: What :func:`near_duplicates` found.
        ood: The OOD images.
        reference: The in-distribution images.
        per_distance: Pairs in a row, evenly spaced among those of its distance.
        side: Height and width of an image on the sheet.
    """
    rows = [(d, list(group)) for d, group in groupby(sorted(pairs, key=lambda p: p.distance), lambda p: p.distance)]
    gap, margin = side // 8, 2 * side // 3
    width, height = 2 * side + gap, side + gap
    sheet = Image.new("RGB", (margin + per_distance * width, max(1, len(rows)) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (distance, group) in enumerate(rows):
        draw.text((gap // 2, row * height), f"{distance} bits\n{len(group)} pairs", fill="black")
        shown = min(per_distance, len(group))
        for column, pair in enumerate(group[k * len(group) // shown] for k in range(shown)):
            place = margin + column * width
            sheet.paste(_thumbnail(ood[pair.ood], side), (place, row * height))
            sheet.paste(_thumbnail(reference[pair.reference], side), (place + side, row * height))
    return sheet


def _thumbnail(entry: Any, side: int) -> Image.Image:
    image = entry[0] if isinstance(entry, tuple) else entry
    image = to_pil_image(image) if isinstance(image, Tensor) else image
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def _member(joined: ConcatDataset[Any], index: int) -> tuple[int, int]:
    """Which of the joined data sets an entry is in, and where."""
    k = bisect_right(joined.cumulative_sizes, index)
    return k, index - (joined.cumulative_sizes[k - 1] if k else 0)


# The program.


def exclude_duplicates(
    data: PairedDataModule,
    output: str,
    max_distance: int = 8,
    method: Literal["perceptual", "features"] = "perceptual",
    ood_splits: Sequence[OODSplit] = ("train", "held_out"),
    reference_splits: Sequence[Split] = ("train",),
    mirrored: bool = True,
    extractor: nn.Module | None = None,
    bits: int = 256,
    image_size: int | None = None,
    sheet: str | None = None,
    num_workers: int = 0,
) -> list[str]:
    """Writes the exclusion list of a DataModule's near-duplicates, says how many they are, and returns the list.

    Args:
        data: The data. What its OOD sources exclude already is not looked at again, and not in the list.
        output: The list to write, one entry per line; it must not exist yet.
        max_distance: Bits in which hashes of near-duplicates may differ. Of features, try ``bits`` / 8.
        method: Hashes of what the images look like, or of their features.
        ood_splits: Which OOD images are compared.
        reference_splits: With which in-distribution images.
        mirrored: Whether an image reflected left to right is a near-duplicate too; perceptual hashes only.
        extractor: The network that gives the features, uint8 images (N, 3, H, W) to (N, D).
        bits: Length of a feature hash.
        image_size: Height and width of the images that the extractor gets; by default their own.
        sheet: PNG to write with pairs of each distance side by side.
        num_workers: Processes that load and hash images.

    Raises:
        FileExistsError: If there is a file ``output``.
        InputError: If ``method`` is ``features`` without an extractor, or there are no OOD images.
    """
    largest = bits if method == "features" else 64
    if not 0 <= max_distance < largest:
        raise InputError(f"max_distance must lie in 0 … {largest - 1}, the bits of a hash less one, got {max_distance}")
    if sheet is not None and Path(sheet).is_dir():
        raise IsADirectoryError(f"sheet names {sheet}, which is a folder; expected a file to write")
    if Path(output).exists():
        raise FileExistsError(f"output names {output}, which exists; it may be in use, so name another file")
    if method == "features" and extractor is None:
        raise InputError("method 'features' needs an extractor, such as dat_lightning.TorchFidelityFeatures")
    sources = {split: data.out_of_distribution(split) for split in ood_splits}
    present = {split: source for split, source in sources.items() if source is not None and len(source)}
    if not present:
        raise InputError(f"{type(data).__name__} has no out-of-distribution images in the splits {list(ood_splits)}")
    # What would fail at the end is tried out before hours of hashing.
    for source in present.values():
        exclusion_entry(source, 0)
    for path in filter(None, (output, sheet)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    ood: ConcatDataset[Any] = ConcatDataset(present.values())  # type: ignore[arg-type]
    reference: ConcatDataset[Any] = ConcatDataset([data.in_distribution(s) for s in reference_splits])  # type: ignore[misc]
    hasher: Callable[[SizedDataset], ImageHashes] = partial(perceptual_hashes, num_workers=num_workers)
    if method == "features" and extractor is not None:
        hasher = FeatureHasher(extractor, reference, bits, image_size, num_workers=num_workers)
    ood_hashes, reference_hashes = hasher(ood), hasher(reference)
    pairs = near_duplicates(ood_hashes, reference_hashes, max_distance)
    if mirrored and method == "perceptual":
        pairs += near_duplicates(mirrored_hashes(ood_hashes), reference_hashes, max_distance)
    found = [_member(ood, index) for index in sorted({pair.ood for pair in pairs})]
    for member, (split, source) in enumerate(present.items()):
        count = sum(k == member for k, _ in found)
        sys.stdout.write(f"OOD {split}: {count} of {len(source)} images are near-duplicates\n")
    skipped = ood_hashes.num_skipped + reference_hashes.num_skipped
    sys.stdout.write(f"skipped because they are corrupt: {skipped} images\n" if skipped else "")
    entries = list(dict.fromkeys(exclusion_entry(ood.datasets[k], index) for k, index in found))  # type: ignore[arg-type]
    header = f"# {len(entries)} near-duplicates of {type(data).__name__}: {method} hashes, at most {max_distance} bits"
    with Path(output).open("x", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(f"{line}\n" for line in (header, *entries))
    if sheet is not None:
        contact_sheet(pairs, ood, reference).save(sheet, format="PNG")
    return entries


def data_section(config: Path) -> dict[str, Any]:
    """Returns the ``data`` section of a configuration for the command line, which may stand below ``fit``.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it has no such section.
    """
    if not config.is_file():
        raise FileNotFoundError(f"config names {config}, which is no file")
    contents = yaml.safe_load(config.read_text(encoding="utf-8"))
    sections = contents if isinstance(contents, dict) else {}
    section = sections.get("data") or (sections.get("fit") or {}).get("data")
    if not isinstance(section, dict):
        raise InputError(f"{config} has no section data with a class_path, as configurations of dat-lightning have it")
    return section


def main(args: Sequence[str] | None = None) -> None:
    """Runs the program.

    Args:
        args: Arguments instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: With status 2 for a wrong argument.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    parser = ArgumentParser(prog="python -m dat_lightning.data.duplicates", description=(__doc__ or "").split("\n")[0])
    help_text = "configuration whose data section says which data; of several, later ones win"
    parser.add_argument("--config", required=True, action="append", help=help_text)
    parser.add_function_arguments(exclude_duplicates)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, action="append", default=[])
    try:
        sections = [data_section(config) for config in first.parse_known_args(arguments)[0].config]
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    arguments = [*chain.from_iterable(("--data", json.dumps(section)) for section in sections), *arguments]
    # jsonargparse from 4.49 on has instantiate, and warns of the name that it had before.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    made = instantiate(parser.parse_args(arguments))
    exclude_duplicates(**{name: value for name, value in vars(made).items() if name != "config"})


def _program() -> None:
    try:
        main()
    except (ValueError, TypeError, OSError) as error:
        sys.stderr.write(f"python -m dat_lightning.data.duplicates: error: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    _program()
