"""The page: controls on one side, what the network says on the other. Everything it shows comes from an explorer."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import altair as alt
import streamlit as st
from torch import Tensor

from dat_lightning.data.images import FORMATS
from dat_lightning.data.pixels import CorruptImageError
from dat_lightning.explore import markup
from dat_lightning.explore.explorer import MAX_IMAGES, MAX_STEPS, Explorer, Reading, Samples, Walk
from dat_lightning.explore.filling import draw_filling
from dat_lightning.explore.opening import Examples, Opened
from dat_lightning.explore.parts import guarded, kept, plain, with_bar
from dat_lightning.explore.uploads import read_upload

_PER_PAGE = 8
_FRAMES = 11
_THUMBNAIL = 128
_MAX_SEED = 10**9
_MODEL = "model"


def draw_page(served: Sequence[Opened]) -> None:
    """Draws the page from top to bottom, as Streamlit does anew after each click.

    Args:
        served: What there is to look at; of several the page shows the chosen one.
    """
    names = [each.name for each in served]
    place = names.index(st.session_state.get(_MODEL, names[0]))
    opened = served[place]
    # An icon of Streamlit's own set would be fetched from another host.
    st.set_page_config(page_title=f"Explore {Path(opened.name).name}", layout="wide")
    st.html(markup.STYLE)
    explorer = opened.explorer
    shape = "×".join(str(n) for n in (*explorer.image_shape[1:], explorer.image_shape[0]))
    st.header("What the network sees, and what it imagines", anchor=False)
    if len(served) > 1:
        st.segmented_control("Model", names, default=names[0], required=True, key=_MODEL, on_change=_forget)
    st.caption(
        f"`{opened.name}`: {opened.network}, {explorer.num_classes} classes, images {shape}, averaged weights"
        f" where the file has them, on {explorer.device}"
    )
    for note in opened.notes:
        st.info(note)
    look, fill, sample = st.tabs(["One image and its counterfactual", "Fill in a part", "Samples of a class"])
    with look:
        chosen = _look(opened)
    with fill:
        draw_filling(opened, chosen)
    with sample:
        _sample(opened)


def _forget() -> None:
    """Leaves nothing of another model on the page: its images, classes and settings are not this one's."""
    for key in list(st.session_state):
        if key != _MODEL:
            del st.session_state[key]


# One image.


def _look(opened: Opened) -> Tensor | None:
    """Draws the tab; returns the image that was chosen in it."""
    left, right = st.columns([2, 3], gap="large")
    with left:
        st.subheader("Image", anchor=False)
        found = _choose_image(opened)
    if found is None:
        with right:
            st.subheader("Reading", anchor=False)
            st.write("Choose an image, and this side says what the network makes of it.")
        return None
    image, caption, small = found
    key = hashlib.sha256(image.numpy().tobytes()).hexdigest()
    with left:
        st.html(markup.figures([(markup.picture(image), caption, small)], 240, stretch=True))
    with right:
        st.subheader("Reading", anchor=False)
        reading = guarded(lambda: kept("reading", key, lambda: opened.explorer.classify(image)))
        if reading is None:
            return None
        names = opened.explorer.class_names
        sure = markup.number(float(reading.probabilities.max()), 4)
        st.markdown(f"Read as **{plain(names[reading.prediction])}**, with p = {sure}. Low energy means likely.")
        st.html(markup.class_table(reading, names))
    st.divider()
    _turn(opened, image, key, reading)
    return image


def _choose_image(opened: Opened) -> tuple[Tensor, str, str] | None:
    """The chosen image, its caption and smaller print; ``None`` as long as there is none."""
    sources = ["Example", "Upload"]
    if opened.examples is None:
        sources = ["Upload"]
    source = st.segmented_control("From", sources, default=sources[0], required=True, key="source")
    if source == "Upload" or opened.examples is None:
        return _uploaded(opened.explorer)
    return _example(opened)


def _example(opened: Opened) -> tuple[Tensor, str, str] | None:
    examples, names = opened.examples, opened.explorer.class_names
    if examples is None:
        return None
    place: int = st.session_state.setdefault("example", 0)
    first = place - place % _PER_PAGE
    st.caption(f"Test images {first + 1} to {min(first + _PER_PAGE, len(examples))} of {len(examples)}, shuffled")
    shown = range(first, min(first + _PER_PAGE, len(examples)))
    thumbnails = kept("thumbnails", str(first), lambda: [_thumbnail(examples, other) for other in shown])
    with st.container(horizontal=True, gap="small"):
        for other, png in zip(shown, thumbnails, strict=True):
            with st.container(width=72, gap=None):
                if png is None:
                    st.caption("damaged")
                    continue
                st.html(markup.figures([(png, "", "")], 64, current=0 if other == place else None))
                kind: Literal["primary", "secondary"] = "primary" if other == place else "secondary"
                words = f"Take test image {other + 1}"
                st.button(str(other + 1), f"example {other}", words, _select, (other,), type=kind, width="stretch")
    with st.container(horizontal=True, gap="small"):
        st.button("Previous", disabled=first == 0, on_click=_select, args=(first - _PER_PAGE,))
        last = first + _PER_PAGE >= len(examples)
        st.button("More examples", disabled=last, on_click=_select, args=(first + _PER_PAGE,))
    try:
        image, label = examples[place]
    except CorruptImageError as error:
        st.error(str(error))
        return None
    return (
        image,
        f"Test image {place + 1}",
        "" if label is None else f"labelled {names[label] if label < len(names) else label}",
    )


def _thumbnail(examples: Examples, place: int) -> bytes | None:
    try:
        return markup.picture(examples[place][0], _THUMBNAIL)
    except CorruptImageError:
        return None


def _select(place: int) -> None:
    st.session_state["example"] = place


def _uploaded(explorer: Explorer) -> tuple[Tensor, str, str] | None:
    file = st.file_uploader(f"An image file: {', '.join(FORMATS)}", key="upload")
    invert = st.checkbox("Swap light and dark", key="invert", help="For dark strokes on light paper")
    if file is None:
        return None
    upload = guarded(lambda: read_upload(file.getvalue(), file.name, explorer.image_shape, invert))
    if upload is None:
        return None
    return upload.image, file.name, "; ".join(upload.notes)


# Its counterfactual.


def _turn(opened: Opened, image: Tensor, key: str, reading: Reading) -> None:
    explorer = opened.explorer
    st.subheader("Counterfactual", anchor=False)
    st.write("What would have to change, within an L2 distance of ε, for the network to see another class?")
    second = reading.logits.clone()
    second[reading.prediction] = -float("inf")
    with st.form("walk form"):
        columns = st.columns(4)
        target = columns[0].selectbox(
            "Target class",
            range(explorer.num_classes),
            int(second.argmax()),
            format_func=explorer.class_names.__getitem__,
        )
        eps = columns[1].number_input("ε, radius of the ball", 0.0, 1000.0, opened.eps, 0.5)
        steps = columns[2].number_input("Steps", 1, MAX_STEPS, 20, key="walk steps")
        size = columns[3].number_input("Step size", 0.0, 1000.0, None, placeholder="2.5 ε / steps", key="walk size")
        asked = st.form_submit_button("Find the counterfactual", type="primary")
    if asked or (opened.at_once and "walk" not in st.session_state):
        walk = with_bar("Climbing", lambda watch: explorer.counterfactual(image, target, eps, int(steps), size, watch))
        st.session_state["walk"] = (key, walk)
        st.session_state.pop("step", None)
    at, walk = st.session_state.get("walk", ("", None))
    if walk is not None and at == key:
        _show_walk(explorer, walk)


def _show_walk(explorer: Explorer, walk: Walk) -> None:
    names, total = explorer.class_names, len(walk)
    target = names[walk.target]
    step = st.slider("Step of the ascent", 0, total, total, key="step")
    left, right = st.columns([3, 2], gap="large")
    now, (l2, linf) = walk.reading(step), walk.distances(step)
    changed, scale = markup.difference(walk.images[step], walk.images[0])
    entries = [
        (markup.picture(walk.images[0]), "Original", _summary(walk.reading(0), walk.target, names)),
        (markup.picture(walk.images[step]), f"Step {step} of {total}", _summary(now, walk.target, names)),
        (
            changed,
            "Difference",
            f"L2 {markup.number(l2)}, L∞ {markup.number(linf)}; white +{scale:.2f}, black −{scale:.2f}",
        ),
    ]
    with left:
        st.html(markup.figures(entries, 240, stretch=True))
        st.caption("The way there")
        steps = sorted({round(k * total / (_FRAMES - 1)) for k in range(_FRAMES)})
        frames = [(markup.picture(walk.images[k], _THUMBNAIL), str(k), "") for k in steps]
        st.html(markup.figures(frames, 40, current=steps.index(step) if step in steps else None))
    with right:
        st.markdown(f"At step {step} read as **{plain(names[now.prediction])}**; the target is **{plain(target)}**.")
        st.html(markup.class_table(now, names, (walk.target,)))
    _show_curves(walk, step, target)


def _summary(reading: Reading, target: int, names: tuple[str, ...]) -> str:
    p = markup.number(float(reading.probabilities[target]), 4)
    return f"p({names[target]}|x) {p}, E(x) {markup.number(reading.energy)}"


def _show_curves(walk: Walk, step: int, target: str) -> None:
    """Draws p(target|x) and the energies against the step, with a rule where the slider stands."""
    joint, marginal = f"E(x, {target})", "E(x)"
    rows = []
    for k in range(len(walk) + 1):
        reading = walk.reading(k)
        energies = {joint: float(reading.joint_energies[walk.target]), marginal: reading.energy}
        rows.append({"step": k, "p": float(reading.probabilities[walk.target]), **energies})
    steps = alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, format="d"))
    base = alt.Chart(alt.Data(values=rows)).encode(x=steps)
    rule = alt.Chart(alt.Data(values=[{"step": step}])).mark_rule(color=markup.MARK, strokeDash=[4, 3]).encode(x=steps)
    probability = base.mark_line(point=alt.OverlayMarkDef(color=markup.MARK), color=markup.MARK).encode(
        y=alt.Y("p:Q", title=f"p({target}|x)", scale=alt.Scale(domain=[0, 1])),
        tooltip=["step:Q", alt.Tooltip("p:Q", format=".4f")],
    )
    colours = alt.Scale(domain=[joint, marginal], range=[markup.MARK, markup.FIRST])
    energy = base.transform_fold([joint, marginal], ["which", "energy"])
    energy = energy.mark_line(point=True).encode(
        y=alt.Y("energy:Q", title="energy", scale=alt.Scale(zero=False)),
        color=alt.Color("which:N", title=None, scale=colours, legend=alt.Legend(orient="top")),
        tooltip=["step:Q", "which:N", alt.Tooltip("energy:Q", format=".3f")],
    )
    left, right = st.columns(2, gap="large")
    left.altair_chart((probability + rule).properties(height=240))
    right.altair_chart((energy + rule).properties(height=280))


# Samples.


def _sample(opened: Opened) -> None:
    explorer = opened.explorer
    where = "the held-out out-of-distribution images of the data" if explorer.seeds else "uniform noise"
    st.write(
        f"Starts from {where} and climbs f(x)[y] of the chosen class, without a ball. The seed says which images"
        " it starts from; the same seed gives the same samples."
    )
    with st.form("samples form"):
        columns = st.columns(5)
        target = columns[0].selectbox(
            "Class", range(explorer.num_classes), format_func=explorer.class_names.__getitem__, key="sample class"
        )
        count = columns[1].number_input("Images", 1, MAX_IMAGES, 12)
        steps = columns[2].number_input("Steps", 1, MAX_STEPS, opened.num_steps, key="sample steps")
        size = columns[3].number_input("Step size", 0.0, 1000.0, opened.step_size, 0.1, key="sample size")
        seed = columns[4].number_input("Seed", 0, _MAX_SEED, 0)
        asked = st.form_submit_button("Generate", type="primary")
    if asked or (opened.at_once and "samples" not in st.session_state):
        st.session_state["samples"] = with_bar(
            "Generating",
            lambda watch: explorer.generate(target, int(count), int(steps), size, int(seed), watch, opened.rule),
        )
    samples = st.session_state.get("samples")
    if samples is not None:
        _show_samples(explorer, samples)


def _show_samples(explorer: Explorer, samples: Samples) -> None:
    name = explorer.class_names[samples.target]
    readings = [Reading(row) for row in samples.logits]
    hits = sum(reading.prediction == samples.target for reading in readings)
    st.markdown(f"Samples of class **{plain(name)}**; the network reads {hits} of {len(readings)} as that.")
    ends = [
        (
            markup.picture(image),
            f"p {markup.number(float(reading.probabilities[samples.target]), 4)}",
            f"E(x) {markup.number(reading.energy)}",
        )
        for image, reading in zip(samples.images, readings, strict=True)
    ]
    st.html(f'<div class="dat-samples">{markup.figures(ends, 150)}</div>')
    with st.expander("Where they started"):
        st.html(
            markup.figures(
                [(markup.picture(image, _THUMBNAIL), str(k + 1), "") for k, image in enumerate(samples.starts)], 72
            )
        )
