"""The page of a comparison: one file of HTML that asks the network for nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fewbits.reports.commands import commands

_SCRIPTS = ("base.js", "plot.js", "parts.js", "start.js")


def page(record: Mapping[str, Any]) -> str:
    """report.html of the record of `fewbits compare`."""
    # Inside a script element nothing is a mark-up but "</script>" and "<!--", so no "<" is left in the data.
    data = json.dumps({**record, "commands": commands(record)}).replace("<", "\\u003c")
    filled = {
        "title": html.escape(f"{record['model']}: fewbits compare"),
        "style": _template("page.css"),
        "data": data,
        "script": "\n".join(_template(name) for name in _SCRIPTS),
    }
    parts = _template("page.html").split("{{")
    return parts[0] + "".join(filled[name] + rest for name, _, rest in (part.partition("}}") for part in parts[1:]))


def _template(name: str) -> str:
    return files("fewbits.reports").joinpath("templates", name).read_text(encoding="utf-8")
