"""The tab that fills in a part of an image: a brush for what is to be made up, and the ascent that does it."""

import hashlib

import streamlit as st
import torch
from torch import Tensor

from dat_lightning.explore import markup
from dat_lightning.explore.brush import draw_brush
from dat_lightning.explore.explorer import MAX_STEPS, Explorer, Walk
from dat_lightning.explore.opening import Opened
from dat_lightning.explore.parts import plain, with_bar

# What is hidden is nearer to what belongs there than a seed is to a sample: a share of the samples' step.
_SHARE = 4
_UNKNOWN = "unknown"


def draw_filling(opened: Opened, image: Tensor | None) -> None:
    """Draws the tab.

    Args:
        opened: Whose network fills.
        image: The image that was chosen on the page, (C, H, W) in [0, 1], if there is one.
    """
    st.write(
        "Paint over a part of the image: the walk begins at its smoothest filling, and climbs f(x)[y], or, where no"
        " class is given, logsumexp f(x). All other pixels stay as they are, bit for bit."
    )
    if image is None:
        st.write("Choose an image in the first tab.")
        return
    explorer = opened.explorer
    height, width = explorer.image_shape[1:]
    key = hashlib.sha256(image.numpy().tobytes()).hexdigest()
    left, right = st.columns([2, 3], gap="large")
    with left:
        radius = st.slider("Size of the brush, in pixels", 0.5, max(height, width) / 4, max(height, width) / 12)
        mask = draw_brush(markup.picture(image), height, width, radius, f"brush {key[:16]}", _center(height, width))
        with st.form("filling form"):
            columns = st.columns([4, 3, 3])
            names = [_UNKNOWN, *explorer.class_names]
            chosen = columns[0].selectbox(
                "Class, if known", range(len(names)), 0, format_func=names.__getitem__, key="filling class"
            )
            steps = columns[1].number_input("Steps", 1, MAX_STEPS, opened.num_steps, key="filling steps")
            size = columns[2].number_input(
                "Step size", 0.0, 1000.0, _two_digits(opened.step_size / _SHARE), 0.1, "%g", "filling size"
            )
            asked = st.form_submit_button("Fill in", type="primary")
    if asked or (opened.at_once and "filling" not in st.session_state):
        target = chosen - 1 if chosen else None
        found = with_bar(
            "Filling", lambda watch: explorer.fill(image, mask, target, int(steps), size, watch, opened.rule)
        )
        st.session_state["filling"] = (key, mask, target, found)
        st.session_state.pop("filling step", None)
    at, hidden, target, walk = st.session_state.get("filling", ("", mask, None, None))
    with right:
        if walk is not None and at == key:
            _show_filling(explorer, image, hidden, target, walk)


def _show_filling(explorer: Explorer, image: Tensor, hidden: Tensor, target: int | None, walk: Walk) -> None:
    names = explorer.class_names
    step = st.slider("Step of the filling", 0, len(walk), len(walk), key="filling step")
    now = walk.reading(step)
    entries = [
        (markup.picture(image), "Original", ""),
        (markup.picture(torch.where(hidden, 0.5, image)), "What is kept", f"{int(hidden.sum())} pixels are not"),
        (markup.picture(walk.images[step]), f"Step {step} of {len(walk)}", f"E(x) {markup.number(now.energy)}"),
    ]
    st.html(markup.figures(entries, 240, stretch=True))
    asked = "no class was given" if target is None else f"it climbs to **{plain(names[target])}**"
    st.markdown(f"Filled in {step} steps, read as **{plain(names[now.prediction])}**; {asked}.")
    st.html(markup.class_table(now, names, () if target is None else (target,)))


def _two_digits(value: float) -> float:
    """Two significant ones, so that no step becomes 0."""
    return float(f"{value:.2g}")


def _center(height: int, width: int) -> list[int]:
    """Places of the central quarter."""
    rows = range(height // 4, height - height // 4)
    return [row * width + column for row in rows for column in range(width // 4, width - width // 4)]
