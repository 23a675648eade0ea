"""The report's galleries of single images, as HTML: chains from seed to sample, and counterfactuals."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from dat_lightning.data import to_uint8_rgb
from dat_lightning.demo.evaluation import Counterfactuals, Evaluation
from dat_lightning.demo.judge import Judge
from dat_lightning.demo.pictures import png_uri, sample_grid, tiled
from dat_lightning.demo.plots import NAMES
from dat_lightning.demo.training import STAGES, Stage

CHAIN_CLASSES = (0, 2, 3, 4, 7, 8)


def pair(panels: Mapping[Stage, tuple[str, str]]) -> str:
    """Returns the two stages side by side, each with a remark beside its name.

    Args:
        panels: Stage → HTML of its panel, and the remark.
    """
    parts = [
        f'<section><h3><span class="{stage}">{NAMES[stage]}</span><small>{remark}</small></h3>{panel}</section>'
        for stage, (panel, remark) in panels.items()
    ]
    return f'<div class="pair">{"".join(parts)}</div>'


def sample_panel(evaluation: Evaluation, stage: Stage) -> str:
    """Returns the grid of samples, with the digits asked for above the columns."""
    digits = "".join(f"<span>{digit}</span>" for digit in range(10))
    uri = png_uri(sample_grid(evaluation))
    return f'<div class="digits">{digits}</div><img class="pixels" id="samples-{stage}" alt="samples" src="{uri}">'


def chain_panel(evaluation: Evaluation, judge: Judge) -> str:
    """Returns a few samples along their chains: a row per sample, a column per number of steps."""
    samples = evaluation.samples
    shown = shown_steps(list(samples.images), evaluation.best_steps)
    columns = {0: to_uint8_rgb(samples.seeds), **{n: samples.images[n] for n in shown}}
    # Sample i has class i mod 10, so these are of the wanted class, and not all from the first row of the grid.
    rows = [11 * label for label in CHAIN_CLASSES if 11 * label < len(samples.labels)]
    readings = {n: judge.read(images[rows]) for n, images in columns.items()}
    cells = ["<span></span>"]
    cells += [f'<span class="{"best" if n == evaluation.best_steps else ""}">{n}</span>' for n in columns]
    for place, row in enumerate(rows):
        label = int(samples.labels[row])
        cells.append(f"<span>{label}</span>")
        cells += [_tile(images[row], read=int(readings[n][place]) == label) for n, images in columns.items()]
    return _tiles(cells, len(columns))


def shown_steps(steps: Sequence[int], best: int, count: int = 8) -> list[int]:
    """Returns those step counts that fit into a picture: all, or ``count`` spread over them, and the best."""
    if len(steps) <= count + 1:
        return sorted(steps)
    places = {round(place * (len(steps) - 1) / (count - 1)) for place in range(count)}
    return sorted({sorted(steps)[place] for place in places} | {best})


def counterfactual_panel(counterfactuals: Counterfactuals) -> str:
    """Returns the counterfactuals: a row per original, a column per class that it was turned into."""
    classes = len(counterfactuals.readings)
    cells = ["<span></span>", *(f"<span>{target}</span>" for target in range(classes))]
    for source in range(classes):
        cells.append(f"<span>{source}</span>")
        for target in range(classes):
            read = int(counterfactuals.readings[source, target]) == target
            cells.append(_tile(counterfactuals.images[source, target], read=read, original=source == target))
    return _tiles(cells, classes)


def chain_gallery(evaluations: Mapping[Stage, Evaluation], judge: Judge) -> str:
    """Returns the chains of both stages."""
    remark = "steps from the seed (0) on; bold: the best"
    return pair({stage: (chain_panel(evaluations[stage], judge), remark) for stage in STAGES})


def counterfactual_gallery(evaluations: Mapping[Stage, Evaluation]) -> str:
    """Returns the counterfactuals of both stages."""
    changed = {stage: evaluations[stage].counterfactuals for stage in STAGES}
    return pair(
        {s: (counterfactual_panel(c), f"{c.success:.0%} of 90 read as their target") for s, c in changed.items()}
    )


def sample_gallery(evaluations: Mapping[Stage, Evaluation]) -> str:
    """Returns the samples of both stages."""
    remarks = {
        stage: f"Fréchet distance {evaluations[stage].best.fid:.1f}, {evaluations[stage].best_steps} steps"
        for stage in STAGES
    }
    return pair({stage: (sample_panel(evaluations[stage], stage), remarks[stage]) for stage in STAGES})


def real_gallery(images: Tensor) -> str:
    """Returns two rows of real digits, uint8 (N, 3, H, W), at the size of the samples."""
    uri = png_uri(tiled(images[:42], 21))
    return (
        f'<section class="strip"><h3>Real test digits</h3><img class="pixels" alt="real digits" src="{uri}"></section>'
    )


def _tiles(cells: list[str], columns: int) -> str:
    return f'<div class="tiles" style="grid-template-columns:18px repeat({columns},1fr)">{"".join(cells)}</div>'


def _tile(image: Tensor, *, read: bool, original: bool = False) -> str:
    names = ["tile", *(["read"] if read and not original else []), *(["original"] if original else [])]
    return f'<div class="{" ".join(names)}"><img class="pixels" alt="" src="{png_uri(image)}"></div>'
