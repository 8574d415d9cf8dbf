"""The table of a comparison as Markdown and as comma-separated values."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

_COLUMNS = (
    "configuration", "bits_per_weight", "perplexity", "perplexity_low", "perplexity_high", "kl_mean", "kl_p99", "top1_agreement",
    "delta_loss", "delta_loss_low", "delta_loss_high", "verdict", "difference_to_baseline", "difference_low", "difference_high",
    "pareto", "runs", "seconds", "peak_memory_bytes", "tokens_per_second",
)  # fmt: skip


def verdict_text(row: Mapping[str, Any]) -> str:
    """What is said of a row against the baseline."""
    return "baseline" if row["verdict"] is None else str(row["verdict"]["said"])


def markdown_table(record: Mapping[str, Any]) -> str:
    """A heading line and one line a configuration, the dense model first."""
    results = record["results"]
    dense = results["dense"]
    heads = ["configuration", "bits per weight", "perplexity", "loss difference to dense, nats (95%)", "KL", "same top token"]
    heads += [f"against {results['baseline']}", "seconds", "peak MB"]
    cells = [["dense", "", f"{dense['perplexity']:.3f}", "", "", "", "", "", ""]]
    for row in results["configurations"]:
        timing = results["timing"][row["name"]]
        low, high = row["delta_loss_interval"]
        name = f"**{row['name']}**" if row["frontier"] else row["name"]
        line = [name, f"{row['bits_per_weight']:.3f}", f"{row['perplexity']:.3f}"]
        line += [f"{row['delta_loss']:+.4f} [{low:+.4f}, {high:+.4f}]", f"{row['kl_mean']:.4f}", f"{row['top1_agreement']:.1%}"]
        line += [_against(row), f"{sum(timing['seconds'].values()):.1f}", f"{timing['peak_memory_bytes'] / 1e6:.0f}"]
        cells.append(line)
    lines = [heads, ["---", *["---:"] * 5, "---", "---:", "---:"], *cells]
    text = record["settings"]["text"]
    floor = "" if results["noise"] is None else f"; differences below {results['noise']['floor']:.1e} nats are arithmetic noise"
    said = f"{record['model']} on {text['data']}, {dense['tokens']} tokens; on the Pareto frontier in bold{floor}."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{said}\n"


def _against(row: Mapping[str, Any]) -> str:
    if row["verdict"] is None:
        return "baseline"
    low, high = row["verdict"]["interval"]
    return f"{row['verdict']['said']} ({row['verdict']['difference']:+.4f} [{low:+.4f}, {high:+.4f}])"


def csv_table(record: Mapping[str, Any]) -> str:
    """One line a configuration, numbers in full."""
    results, file = record["results"], io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in results["configurations"]:
        timing, verdict = results["timing"][row["name"]], row["verdict"] or {"difference": "", "interval": ("", "")}
        line = [row["name"], row["bits_per_weight"], row["perplexity"], *row["perplexity_interval"], row["kl_mean"], row["kl_p99"]]
        line += [row["top1_agreement"], row["delta_loss"], *row["delta_loss_interval"], verdict_text(row)]
        line += [verdict["difference"], *verdict["interval"], int(row["frontier"]), len(row["seeds"])]
        writer.writerow([*line, sum(timing["seconds"].values()), timing["peak_memory_bytes"], timing["tokens_per_second"]])
    return file.getvalue()
