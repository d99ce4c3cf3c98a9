"""Sphinx roles of docstrings as what Markdown has."""

import re

import griffe

ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?([^`]+)`")


class Roles(griffe.Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"( ?)::(?=\s*\n\s*\n)", lambda found: "" if found[1] else ":", text)
