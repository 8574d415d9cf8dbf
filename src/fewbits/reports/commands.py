"""The commands that make the numbers of a comparison again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def commands(record: Mapping[str, Any]) -> dict[str, Any]:
    """`all`: the comparison itself; `single`: for each configuration, its own compress and evaluate."""
    settings, rows = record["settings"], record["results"]["configurations"]
    names = [part for row in rows for part in ("-m", row["name"])]
    calibration, text = settings["calibration"], settings["text"]
    sizes = ["--data", calibration["data"], "--samples", calibration["count"], "--seq-len", calibration["length"]]
    inputs = ["--inputs", settings["inputs"]] if settings["inputs"] else []
    measured = ["--text", text["data"], "--windows", text["count"], "--repeats", settings["repeats"], "--baseline", settings["baseline"]]
    prompts = [part for prompt in settings["prompts"] for part in ("--prompt", prompt)]
    every = ["fewbits", "compare", record["model"], *names, *sizes, *measured, *inputs]
    every += [*prompts, "--new-tokens", settings["new_tokens"], "-o", "comparison"]
    single = {row["name"]: _single(record, row, [*sizes, *inputs]) for row in rows}
    return {"all": _line(every), "single": single}


def _single(record: Mapping[str, Any], row: Mapping[str, Any], given: list[Any]) -> list[str]:
    text, output = record["settings"]["text"], "compressed"
    measured = ["--reference", record["model"], "--data", text["data"], "--windows", text["count"], "--seq-len", text["length"]]
    if not row["arguments"]:  # compressed before
        return [_line(["fewbits", "evaluate", row["name"], *measured])]
    compress = ["fewbits", "compress", record["model"], *row["arguments"], *given, "-o", output]
    return [_line(compress), _line(["fewbits", "evaluate", output, *measured])]


def _line(words: list[Any]) -> str:
    return shlex.join(str(word) for word in words)
