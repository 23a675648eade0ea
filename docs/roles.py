"""Turns the Sphinx roles of docstrings, such as ``:class:`~a.b.C```, into links for mkdocstrings."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|attr):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites every docstring when it has been read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Replaces the roles in a package, whose names are all known by now."""
        self._visit(pkg)

    def _visit(self, obj: griffe.Object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda match: self._link(obj, match), obj.docstring.value)
        for member in obj.members.values():
            if isinstance(member, griffe.Object):
                self._visit(member)

    @staticmethod
    def _link(obj: griffe.Object, match: re.Match[str]) -> str:
        short, path = bool(match[1]), match[2]
        try:
            target = obj.resolve(path)
        except griffe.NameResolutionError:
            target = path
        shown = path.rpartition(".")[2] if short else path
        # What the reference does not show, such as a plain attribute, stays without a link.
        return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'
