"""Measures a set of images in files against another one: ``python -m dat_lightning.features.sample_sets --help``.

A set is a folder of images, or an ``.npz`` of the ADM evaluator's format: ``arr_0`` (uint8, N×H×W×3), and, if the
images have classes, ``arr_1`` (N). Folders are read in the order of their paths, and an ``.npz`` class by class, so
that both forms of what ``SampleWriter`` writes give the same figures. A reference may also be statistics (``mu`` and
``sigma``), for FID alone, or have both. The figures are JSON: on the terminal, or in a file.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from dat_lightning.core.errors import InputError, require_at_least
from dat_lightning.features.fidelity import (
    METRICS,
    FeatureCollector,
    Features,
    FidelitySettings,
    Metric,
    Reference,
    check_metrics,
    check_sizes,
    fidelity_scores,
    measurements,
)
from dat_lightning.features.image_sets import ImageSet, read_images, read_set
from dat_lightning.features.layers import DigitsLayers, LayerReader, TorchFidelityLayers
from dat_lightning.results.digests import file_digest
from dat_lightning.results.measurement import Measurement


def measure_sample_set(
    samples: str | Path,
    reference: str | Path | None,
    extractor: nn.Module,
    metrics: Sequence[Metric] = METRICS,
    settings: FidelitySettings = FidelitySettings(),
    classifier: nn.Module | None = None,
    feature_layer: str | None = None,
    logit_layer: str | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    silent: bool = False,
) -> list[Measurement]:
    """Returns figures of the images in files, as :class:`~dat_lightning.SampleMetrics` has them for generated ones.

    Args:
        samples: Folder of images, or ``.npz`` with ``arr_0``.
        reference: The same, or ``.npz`` with ``mu`` and ``sigma``; ``None`` if only the Inception score is wanted.
        extractor: Maps uint8 images (N, 3, H, W) to features (N, D), or to a tuple or a dictionary of layers.
        metrics: What to measure.
        settings: What the definitions leave open.
        classifier: Maps images in [0, 1] to logits; by default these are a layer of the extractor.
        feature_layer: Name of the layer with the features; by default the first.
        logit_layer: Name of the layer with the logits; by default ``logits_unbiased`` or ``logits``.
        batch_size: Images per pass.
        device: Where extractor and classifier are moved to.
        silent: Whether to show no progress.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        InputError: If a set is empty, damaged or too small, or has only statistics where images are needed, or this
            machine has no such device.
    """
    metrics = check_metrics(metrics)
    require_at_least(1, batch_size=batch_size)
    where = _device(device)
    images, _ = read_set(Path(samples))
    if images is None:
        raise InputError(f"samples={samples} has statistics alone; expected images")
    known, gaussian = (None, None) if reference is None else read_set(Path(reference))
    if reference is None and metrics != ("isc",):
        raise InputError(f"reference must be given for {list(metrics)}: only 'isc' needs none")
    check_sizes(metrics, settings, len(images), None if known is None else len(known))
    for network in (extractor, classifier):
        if network is not None:
            network.to(where).eval()
    reader = LayerReader(extractor, classifier, feature_layer, logit_layer, settings.isc_size)

    def read(chosen: ImageSet, is_reference: bool) -> Features:
        collector = FeatureCollector(metrics, where, is_reference)
        with_logits = "isc" in metrics and not is_reference
        for batch in read_images(chosen, reader, range(len(chosen)), where, batch_size, with_logits, silent):
            collector.add(batch)
        return collector.collected("the set has no images")

    seen = Features(gaussian=gaussian)
    if known is not None and (gaussian is None or {"kid", "prc"} & set(metrics)) and metrics != ("isc",):
        seen = read(known, True)
    against = Reference(
        0 if known is None else len(known),
        gaussian or seen.gaussian,
        seen.features,
        name=str(reference),
        digest="" if reference is None else file_digest(Path(reference)),
    )
    scores = fidelity_scores(metrics, settings, read(images, False), against)
    return measurements(scores, settings, reader.settings(), against, len(images), {})


def main(args: Sequence[str] | None = None) -> None:
    """Measures what the command line names, and writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m dat_lightning.features.sample_sets", description=__doc__)
    parser.add_argument("--samples", required=True, help="folder of images, or .npz with arr_0")
    parser.add_argument("--reference", help="the same, or .npz with mu and sigma; not needed for isc alone")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), help=f"some of {', '.join(METRICS)}")
    extractor_help = "digits, or the name of one of torch-fidelity's extractors"
    parser.add_argument("--extractor", default="inception-v3-compat", help=extractor_help)
    layers_help = "layers of torch-fidelity's extractor, that of the features first; Inception: 2048 logits_unbiased"
    parser.add_argument("--layers", nargs="+", help=layers_help)
    parser.add_argument("--weights-path", help="file with the extractor's weights, where there is no network")
    defaults = asdict(FidelitySettings())
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"by default {value}")
    parser.add_argument("--batch-size", type=int, default=64, help="images per pass")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--out", type=Path, help="JSON file; by default JSON goes to the terminal")
    given = parser.parse_args(args)
    settings = {name: getattr(given, name) for name in defaults}
    if given.out is not None and not given.out.parent.is_dir():
        parser.error(f"--out {given.out}: there is no folder {given.out.parent}")
    if given.extractor == "digits" and (given.layers or given.weights_path):
        parser.error("--layers and --weights-path are for torch-fidelity's extractors, not for digits")
    try:
        figures = measure_sample_set(
            given.samples,
            given.reference,
            _extractor(given.extractor, given.layers, given.weights_path),
            given.metrics,
            FidelitySettings(**settings),
            batch_size=given.batch_size,
            device=given.device,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    told = [{**asdict(figure), "protocol": figure.protocol} for figure in figures]
    text = json.dumps({"figures": told}, indent=2, ensure_ascii=False) + "\n"
    if given.out is None:
        sys.stdout.write(text)
    else:
        given.out.write_text(text, encoding="utf-8")


def _extractor(name: str, layers: Sequence[str] | None, weights: str | None) -> nn.Module:
    if name == "digits":
        return DigitsLayers()
    return TorchFidelityLayers(name, layers, weights) if layers else TorchFidelityLayers(name, weights_path=weights)


def _device(name: str) -> torch.device:
    try:
        # Something has to be put there: a name alone does not show whether the machine has it.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name!r} is not to be used here: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    main()
