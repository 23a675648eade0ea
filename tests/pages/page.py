"""What a page refers to and says, for tests."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

_VOID = {"meta", "img", "source", "br", "wbr", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects references, pictures, tags and text of a page; refuses tags that do not close.

    Args:
        path: The page.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.references: list[str] = []
        self.pictures: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == [], self._open

    @property
    def text(self) -> str:
        """Returns what a reader sees, without line breaks."""
        return re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.references += [values[name] or "" for name in ("src", "href", "srcset", "data") if name in values]
        if tag == "img":
            self.pictures.append(values["src"] or "")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "title"):
            self.words.append(data)

    def assert_self_contained(self) -> None:
        """Fails if the page, or a drawing in it, refers to anything outside."""
        assert all(reference.startswith("data:image/") for reference in self.references)
        assert not {"script", "link", "iframe", "object", "image"} & set(self.tags)
        assert not re.search(r"url\(|@import", self.source)
        for uri in self.references:
            if uri.startswith("data:image/svg"):
                drawing = ElementTree.fromstring(base64.b64decode(uri.partition("base64,")[2]))
                pointers = [value for part in drawing.iter() for name, value in part.items() if "href" in name]
                assert all(pointer.startswith(("#", "data:")) for pointer in pointers)
                assert not {part.tag.rpartition("}")[2] for part in drawing.iter()} & {"script", "image"}

    def drawings(self) -> list[str]:
        """Returns the SVG text of all plots, light ones."""
        svg = [uri for uri in self.pictures if uri.startswith("data:image/svg")]
        return [base64.b64decode(uri.partition("base64,")[2]).decode() for uri in svg]
