"""What was measured of each method on the built-in model: the project's own results, which are shipped with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fewbits.core

_PACKAGE = Path(fewbits.core.__file__).parents[1]
_FOLDERS = (_PACKAGE / "results", _PACKAGE.parents[1] / "results")  # as installed; in a checkout
_FIELDS = {"settings", "bits_per_weight", "bits", "compressed_weights", "perplexity", "reference_perplexity"}
_FIELDS |= {"delta_loss", "delta_loss_interval", "kl_mean", "top1_agreement"}


def measured(family: str, name: str) -> list[dict[str, Any]]:
    """The rows of a method's result file that measure compressed weights; none where nothing was measured."""
    for folder in _FOLDERS:
        path = folder / family / f"{name}.json"
        if path.is_file():
            rows = json.loads(path.read_text())["rows"]
            return [row for row in rows if row.keys() >= _FIELDS]
    return []
