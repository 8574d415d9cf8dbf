"""The table of a comparison, from its runs: a pure function of what they measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fewbits.comparison.configuration import Configuration
from fewbits.comparison.folder import Run
from fewbits.evaluation.fidelity import paired_interval
from fewbits.evaluation.verdicts import Verdict, frontier, judge

_AVERAGED = ("bits_per_weight", "kl_mean", "kl_median", "kl_p99", "reverse_kl_mean", "top1_agreement", "delta_loss", "loss")


class Row:
    """One configuration with its runs, one for each calibration seed, or a single one where text changes nothing."""

    def __init__(self, configuration: Configuration, runs: Sequence[Run]) -> None:
        self.configuration, self.runs = configuration, runs

    @property
    def name(self) -> str:
        return self.configuration.name

    def losses(self, repeats: int) -> Tensor:
        """`[repeats, windows, tokens]`."""
        stacked = torch.stack([scores.loss for _, scores, _ in self.runs])
        return stacked if len(stacked) == repeats else stacked.expand(repeats, -1, -1)

    def measured(self) -> dict[str, Any]:
        """JSON-able: means over the runs, and what was said of each layer."""
        results = [record["results"] for record, _, _ in self.runs]
        loss, error = fmean(one["loss"] for one in results), fmean(one["loss_stderr"] for one in results)
        layers = {
            name: {"weights": one["weights"], "bits_per_weight": one["bits"] / one["weights"]}
            | {"relative_error": fmean(other["layers"][name]["relative_error"] for other in results)}
            for name, one in results[0]["layers"].items()
        }
        weights = results[0]["compressed_weights"]
        return {
            "name": self.name,
            **self.configuration.labels(),
            "arguments": self.configuration.arguments(),
            **{key: fmean(one[key] for one in results) for key in _AVERAGED},
            "bits": {role: fmean(one["bits"].get(role, 0) for one in results) / weights for role in results[0]["bits"]},
            "perplexity": math.exp(loss),
            "perplexity_interval": [math.exp(loss - 1.96 * error), math.exp(loss + 1.96 * error)],
            "seeds": [(record["calibration"] or {}).get("seed") for record, _, _ in self.runs],
            "perplexities": [one["perplexity"] for one in results],
            "inputs": self.runs[0][0]["settings"]["inputs"],
            "kept": results[0]["kept"],
            "compressed_weights": weights,
            "layers": layers,
            "samples": results[0]["samples"],
        }

    def timing(self) -> dict[str, Any]:
        """As `spent`, of its runs."""
        return spent([timing for _, _, timing in self.runs])


def _said(verdict: Verdict) -> dict[str, Any]:
    return asdict(verdict) | {"interval": list(verdict.interval)}


def spent(timings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean seconds of a run by what they were spent on, the highest memory, tokens a second."""
    speeds = [one["tokens_per_second"] for one in timings if one["tokens_per_second"] is not None]
    return {
        "seconds": {what: fmean(one["seconds"][what] for one in timings) for what in timings[0]["seconds"]},
        "resumed": any(one["resumed"] for one in timings),
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in timings),
        "tokens_per_second": fmean(speeds) if speeds else None,
    }


def summary(rows: Sequence[Row], dense: Run, baseline: str, noise: Mapping[str, Any] | None) -> dict[str, Any]:
    """Rows with verdicts against the baseline, every pair's verdict, the frontier, the dense model, and the noise floor."""
    repeats = max(len(row.runs) for row in rows)
    floor = 0.0 if noise is None else float(noise["floor"])
    losses = {row.name: row.losses(repeats) for row in rows}
    pairs = {one: {other: _said(judge(losses[one], losses[other], floor=floor)) for other in losses if other != one} for one in losses}
    measured = [row.measured() for row in rows]
    best = frontier([one["bits_per_weight"] for one in measured], [one["kl_mean"] for one in measured])
    reference = dense[1].loss[None].expand(repeats, -1, -1)
    for one, is_best in zip(measured, best, strict=True):
        one["delta_loss_interval"] = list(paired_interval(losses[one["name"]], reference))
        one["frontier"] = is_best
        one["verdict"] = None if one["name"] == baseline else pairs[one["name"]][baseline]
    record, _, timing = dense
    return {
        "configurations": measured,
        "pairs": pairs,
        "baseline": baseline,
        "noise": None if noise is None else dict(noise),
        "dense": {key: record["results"][key] for key in ("perplexity", "perplexity_stderr", "loss", "tokens", "samples")},
        "timing": {row.name: row.timing() for row in rows} | {"dense": spent([timing])},
        "machine": timing["machine"],
    }
