"""What every part of the page does: errors as sentences, bars of progress, and what need not be computed again."""

from collections.abc import Callable
from typing import TypeVar

import streamlit as st

_T = TypeVar("_T")


def guarded(compute: Callable[[], _T]) -> _T | None:
    """Returns what is computed; an error about the input becomes a sentence on the page, and ``None``."""
    try:
        return compute()
    except ValueError as error:
        st.error(plain(str(error)))
        return None


def with_bar(text: str, compute: Callable[[Callable[[int, int], None]], _T]) -> _T | None:
    """Returns what :func:`guarded` does, and shows meanwhile how far it is."""
    bar = st.progress(0.0, text)
    try:
        return guarded(lambda: compute(lambda done, total: bar.progress(done / total, f"{text}: {done} of {total}")))
    finally:
        bar.empty()


def kept(name: str, key: str, compute: Callable[[], _T]) -> _T:
    """Returns what was computed for the same key last time, or else what is now."""
    known, value = st.session_state.get(name, ("", None))
    if known != key:
        value = compute()
        st.session_state[name] = (key, value)
    result: _T = value
    return result


def plain(text: str) -> str:
    """Returns text that Markdown leaves as it is."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]()<>#+-.!|$~:" else character for character in text)
