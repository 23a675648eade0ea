"""The report: one HTML file that needs neither a network nor other files."""

import html
from collections.abc import Callable
from pathlib import Path

from dat_lightning.demo.evaluation import ATTACK, CHANGE, Evaluation
from dat_lightning.demo.galleries import chain_gallery, counterfactual_gallery, real_gallery, sample_gallery
from dat_lightning.demo.judge import Judge, Quality
from dat_lightning.demo.plots import NAMES, history_figure, robustness_figure, sweep_figure
from dat_lightning.demo.results import Outcome
from dat_lightning.demo.style import CSS
from dat_lightning.demo.training import STAGES
from dat_lightning.pages.drawing import svg_uri
from dat_lightning.pages.page import html_page

_READ = '<span class="mark"></span>'


def write_report(path: Path, outcome: Outcome, judge: Judge) -> None:
    """Writes the report of a demonstration."""
    sections = [
        _heading(outcome),
        _table(outcome),
        _samples(outcome),
        _chains(outcome, judge),
        _sweep(outcome),
        _robustness(outcome),
        _counterfactuals(outcome),
        _training(outcome),
        _limits(outcome),
        _next_steps(path.parent),
    ]
    page = html_page("Dual Adversarial Training on digits", sections, CSS)
    path.write_text(page, encoding="utf-8")


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def _plot(uri: str, description: str) -> str:
    return f'<img class="plot" alt="{description}" src="{uri}">'


def _heading(outcome: Outcome) -> str:
    first, second = _both(outcome)
    warning = (
        '<p class="note"><b>A quick run.</b> Training was cut short to test the program; none of these figures says'
        " anything about the method.</p>"
        if outcome.quick
        else ""
    )
    return f"""<p class="kicker">Dual Adversarial Training · handwritten digits</p>
<h1>One network that classifies and generates</h1>
<p class="lead">Stage 1 trains a small classifier to withstand attacks. Stage 2 goes on from there and teaches the
same weights which images are likely, by contrast with samples that they make themselves. The Fréchet distance of the
samples to real digits went from {first.best.fid:.0f} to <b>{second.best.fid:.1f}</b>; accuracy under attack went from
{first.robustness.robust_accuracy:.1%} to <b>{second.robustness.robust_accuracy:.1%}</b>.</p>
<p>Both stages are judged by one protocol: the averaged weights, the same 360 test digits, the same attack, and
{len(second.samples.labels):,} samples from the same seeds. Everything here was computed on this machine, from data
that come with scikit-learn.</p>{warning}"""


def _table(outcome: Outcome) -> str:
    real = outcome.real
    rows = [
        _cells("Accuracy", "on the 360 test digits", [f"{e.robustness.accuracy:.1%}" for e in _both(outcome)], "–"),
        _cells(
            "Robust accuracy",
            f"PGD, {ATTACK.num_steps} steps of {ATTACK.step_size:g}, L2 radius {ATTACK.eps:g}",
            [f"{e.robustness.robust_accuracy:.1%}" for e in _both(outcome)],
            "–",
        ),
        _cells(
            "Fréchet distance",
            "features of a small digit classifier; lower is better",
            [f"{e.best.fid:.1f}" for e in _both(outcome)],
            f"{real.fid:.1f}",
        ),
        _cells("Sampling steps", "where that distance is smallest", [str(e.best_steps) for e in _both(outcome)], "–"),
        *_quality_rows(outcome),
        _cells("Contrastive steps T", "at the end of training", ["–", str(outcome.contrastive_steps)], "–"),
        _cells("Training time", "", [_duration(outcome.seconds[stage]) for stage in STAGES], "–"),
    ]
    heads = "".join(f'<th class="{stage}">{NAMES[stage]}</th>' for stage in STAGES)
    return (
        f'<div class="wide"><table><thead><tr><th></th>{heads}<th>Real test digits</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _quality_rows(outcome: Outcome) -> list[str]:
    """Rows of the figures of samples besides the Fréchet distance."""
    rows: dict[str, tuple[str, Callable[[Quality], float], str]] = {
        "Precision": ("samples that lie among real digits", lambda q: q.precision, ".2f"),
        "Recall": ("real digits that lie among the samples", lambda q: q.recall, ".2f"),
        "Label agreement": (
            "samples that a classifier from elsewhere, an SVM, reads as the digit asked for",
            lambda q: q.label_agreement,
            ".1%",
        ),
        "Diversity": ("distances within a class, relative to real digits", lambda q: q.diversity, ".2f"),
    }
    return [
        _cells(
            name,
            note,
            [format(figure(e.best), form) for e in _both(outcome)],
            format(figure(outcome.real), form),
        )
        for name, (note, figure, form) in rows.items()
    ]


def _cells(name: str, note: str, figures: list[str], real: str) -> str:
    shown = "".join(f"<td>{figure}</td>" for figure in figures)
    return f'<tr><td>{name}<small>{note}</small></td>{shown}<td class="real">{real}</td></tr>'


def _both(outcome: Outcome) -> list[Evaluation]:
    return [outcome.evaluations[stage] for stage in STAGES]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _samples(outcome: Outcome) -> str:
    caption = """The first hundred samples of each stage, not selected; a column for each digit asked for. Tiles at
the same place grew from the same seed, a grey crop of a photograph, by climbing the logit of their class. Each stage
is shown at its own best number of steps. Look for strokes that belong to no digit, and for shapes that repeat down a
column."""
    gallery = sample_gallery(outcome.evaluations) + real_gallery(outcome.real_images)
    return "<h2>What the networks draw</h2>" + _figure(gallery, caption)


def _chains(outcome: Outcome, judge: Judge) -> str:
    ends = [(max(e.sweep), e.sweep[max(e.sweep)].diversity) for e in _both(outcome)]
    caption = f"""Six chains; the digit asked for stands on the left. {_READ} marks images that the independent
classifier reads as that digit. Short chains still look like their seed. Long ones go past the digit: the logit keeps
rising where no real image lies, and strokes turn into blobs or fragments, although many are still read as intended.
Diversity should be 1: it is {ends[0][1]:.2f} after {ends[0][0]}
steps of Stage 1 and {ends[1][1]:.2f} after {ends[1][0]} of Stage 2. Far below 1 the chains of a class end up alike, far
above it they fall apart. Stage 2 has only met chains of up to T = {outcome.contrastive_steps} steps in training."""
    return "<h2>From seed to sample</h2>" + _figure(chain_gallery(outcome.evaluations, judge), caption)


def _sweep(outcome: Outcome) -> str:
    uri = svg_uri(lambda: sweep_figure(outcome.evaluations, outcome.real))
    caption = f"""{_key()} Rings: the step count with the smallest Fréchet distance, which the table and the samples
use. Dashed: the 360 real test digits, judged as if they were samples. All points of a curve come from one chain per
sample."""
    return "<h2>How many steps to take</h2>" + _figure(_plot(uri, "quality of samples against sampling steps"), caption)


def _robustness(outcome: Outcome) -> str:
    uri = svg_uri(lambda: robustness_figure(outcome.evaluations))
    caption = """Left: where the curve is flat, more steps find hardly any more errors, so the attack is long enough.
Right: accuracy has to fall towards zero as the radius grows; a curve that did not would be a sign of masked
gradients, not of strength. A digit is about 7 long in this norm, and the nearest digit of another class is about 3
away."""
    return "<h2>Under attack</h2>" + _figure(_plot(uri, "accuracy against attack steps and radius"), caption)


def _counterfactuals(outcome: Outcome) -> str:
    caption = f"""A real test digit per row (<span class="mark frame"></span> the original), turned into the digit of
the column by {CHANGE.num_steps} steps of {CHANGE.step_size:g} up its logit, within an L2 distance of {CHANGE.eps:g}.
{_READ} marks those that the independent classifier reads as the target. What changes is strokes, not noise: gradients
that a person can read are what a robust classifier has in common with a generator. Not every pair succeeds, and a
change this large also leaves marks that no pen makes."""
    return "<h2>What would have to change?</h2>" + _figure(counterfactual_gallery(outcome.evaluations), caption)


def _training(outcome: Outcome) -> str:
    uri = svg_uri(lambda: history_figure(outcome.histories, outcome.auc_threshold))
    caption = f"""{_key()} Top: both stages on one axis, Stage 2 from the vertical line on. Bottom: Stage 2. Faint
lines are single batches, strong ones running means. The loss is the adversarial cross-entropy in Stage 1; Stage 2
adds the energy loss, so it jumps. The contrastive chain gets one step longer whenever the AUC, how well real digits
are told from contrastive samples, has averaged {outcome.auc_threshold:g} (dashed) over about a thousand images; it
ended at T = {outcome.contrastive_steps}. Low energy means likely: real digits should lie below the contrastive
samples, and the distance should stay bounded."""
    return "<h2>How training went</h2>" + _figure(_plot(uri, "training curves of both stages"), caption)


def _limits(outcome: Outcome) -> str:
    steps = " and ".join(str(e.best_steps) for e in _both(outcome))
    return f"""<h2>How far to trust this</h2><ul>
<li>One test digit is 0.28 points of accuracy. With 360 of them, and one seed of training, differences between the
stages of three points or less may be chance.</li>
<li>The Fréchet distance uses a small network trained on these digits. It compares the stages; its scale is not that
of FID on photographs. Even real test digits are not at 0, because they are few.</li>
<li>The number of sampling steps ({steps}) is the best of a sweep on these very samples, which favours both stages a
little.</li>
<li>The attack is PGD with a single start. AutoAttack, which published figures use, finds somewhat more errors.</li>
<li>Precision, recall and the Fréchet distance share their features; label agreement and diversity do without them.
Agreement alone can be fooled: the support vector machine has to name a digit, whatever it is shown.</li></ul>"""


def _next_steps(out: Path) -> str:
    where = html.escape(out.as_posix())
    stage = f"--config {where}/stage2/config-input.yaml --ckpt_path {where}/stage2/checkpoints/last.ckpt"
    return f"""<h2>Going on</h2>
<p>The training curves in full, the same figures from the command line, and samples as PNG and <code>.npz</code>:</p>
<pre>tensorboard --logdir {where}
dat-lightning test {stage}
dat-lightning predict {stage}</pre>
<footer>Method: Yin, Zhang, Steele, Shavit, Wang, <i>Scalable Energy-Based Models via Adversarial Training: Unifying
Discrimination and Generation</i>, ICLR 2026 (arXiv 2510.13872). All figures are in <code>results.json</code>, all
samples in <code>samples_stage1.npz</code> and <code>samples_stage2.npz</code>.</footer>"""


def _key() -> str:
    return " ".join(f'<b class="{stage}">{NAMES[stage]}.</b>' for stage in STAGES)
