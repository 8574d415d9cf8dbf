"""Tables in README and docs, made from results/: python scripts/tables.py [--check]

A region between `<!-- table: FILE -->` and `<!-- end -->` holds the table of that result file. --check changes nothing and
ends with status 1 where a table is stale.
"""

import json
import math
import re
import sys
from itertools import pairwise
from pathlib import Path

from product_tables import many_vectors, products, whole_model

ROOT = Path(__file__).parents[1]
BASELINES = ("gptq", "rtn", "kivi")  # whose curves stand beside the other methods of their folder
REGION = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(path: Path) -> str:
    """A Markdown table of a result's rows: of a language model, or whatever fields an experiment of another kind has.

    A folder is one of reproductions, a row for each.
    """
    if path.is_dir():
        return reproduced(path)
    result = json.loads(path.read_text())
    if "products" in result:
        return _markdown(*many_vectors(result))
    if "models" in result:
        return _markdown(*whole_model(result))
    rows = result["rows"]
    if "vectors" in rows[0] or "bits_of_inputs" in rows[0]:
        return "\n".join(_markdown(*one) for one in products(result))
    if "perplexity" not in rows[0]:
        return _plain(rows)
    curves = {name: _curve(path.parent / f"{name}.json") for name in BASELINES if (path.parent / f"{name}.json").is_file()}
    curves = {name: curve for name, curve in curves.items() if name != result.get("method")}
    heads = ["method", _bits(rows[0]).replace("_", " "), "perplexity", "loss difference to dense, 95% interval", "KL", "same top token"]
    heads += [f"KL of {name} at these bits" for name in curves] + (["seconds", "peak MB"] if "peak_memory_bytes" in rows[0] else [])
    cells = [["dense", "16", f"{rows[0]['reference_perplexity']:.2f}"] + [""] * (len(heads) - 3)]
    for row in rows:
        low, high = row["delta_loss_interval"]
        line = [_name(row, result), f"{row[_bits(row)]:.3f}", f"{row['perplexity']:.2f} ± {row['perplexity_stderr']:.2f}"]
        line += [f"{row['delta_loss']:+.4f} [{low:+.4f}, {high:+.4f}]", f"{row['kl_mean']:.4f}", f"{row['top1_agreement']:.3f}"]
        line += [at_bits(curve, row[_bits(row)]) for curve in curves.values()]
        line += [f"{row['seconds']:.0f}", f"{row['peak_memory_bytes'] / 1e6:.0f}"] if "peak_memory_bytes" in rows[0] else []
        cells.append(line)
    return _markdown(heads, cells)


def reproduced(folder: Path) -> str:
    """The papers' figures beside ours, a row for every method that a paper's is held against or is."""
    measured = ["perplexity", "of the rival's loss removed"]
    heads = ["method", "", "paper: bits", *measured, "here: bits", *measured]
    cells = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())["results"]
        paper, here = results["published"], {row["label"]: row for row in results["rows"]}
        first = [f"[{results['method']}](methods/{_family(results['method'])}/{results['method']}.md)", "dense"]
        cells.append([*first, "16", _number(paper["dense"]), "", "16", _number(results["dense"]), ""])
        shares = results["share_removed"]
        for figure in (paper["own"], *paper["rivals"]):
            row, own = here.get(figure["label"]), figure["label"] == paper["own"]["label"]
            line = ["", figure["label"], _cell(figure["bits"]), _number(figure["perplexity"]), _percent(shares["paper"]) if own else ""]
            ours = ["—", "—", ""] if row is None else [f"{row['bits_per_weight']:.2f}", _number(row["perplexity"])]
            cells.append(line + (ours if row is None else [*ours, _percent(shares["here"]) if own else ""]))
    return _markdown(heads, cells)


def _family(method: str) -> str:
    return next(path.parent.name for path in (ROOT / "docs" / "methods").glob(f"*/{method}.md"))


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{value:.0%}"


def at_bits(curve: list[tuple[float, float]], bits: float) -> str:
    """The KL of a method at `bits`: log-linear between the neighbours of its best (bits, KL) pairs; a dash outside of them."""
    for (left, low), (right, high) in pairwise(curve):
        if left <= bits <= right:
            share = (bits - left) / (right - left)
            return f"{math.exp((1 - share) * math.log(low) + share * math.log(high)):.4f}"
    return "—"


def _curve(path: Path) -> list[tuple[float, float]]:
    """(bits, KL) of the rows that no cheaper row beats, by bits."""
    best: list[tuple[float, float]] = []
    for bits, loss in sorted((row[_bits(row)], row["kl_mean"]) for row in json.loads(path.read_text())["rows"]):
        if not best or loss < best[-1][1]:
            best.append((bits, loss))
    return best


def _bits(row: dict) -> str:
    """The field that says how much is stored: of weights, or of a cache's sealed keys and values."""
    return "bits_per_weight" if "bits_per_weight" in row else "bits_per_element"


def _name(row: dict, result: dict) -> str:
    method = row.get("method", result.get("method"))
    if "settings" not in row:
        return f"{method} {row['bits']} bits"
    return ", ".join([method, *(f"{name}={value}" for name, value in row["settings"].items())])


def _plain(rows: list[dict]) -> str:
    heads = [name for name in rows[0] if all(isinstance(row[name], (str, int, float, type(None))) for row in rows)]
    shown = [[_cell(row[name]) for name in heads] for row in rows]
    return _markdown([name.replace("_", " ") for name in heads], shown)


def _cell(value: str | float | None) -> str:
    return "—" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(heads: list[str], cells: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *cells]
    return "".join("| " + " | ".join(line).replace("|  |", "| |").replace("|  |", "| |") + " |\n" for line in lines)


def refreshed(text: str, root: Path = ROOT) -> str:
    """`text` with every region filled anew."""
    return REGION.sub(lambda region: region[1] + table(root / region[2]) + region[3], text)


def main(check: bool) -> int:
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        before = path.read_text()
        after = refreshed(before)
        if after != before:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(after)
    for path in stale:
        print(f"{path}: table {'stale; run make tables' if check else 'refreshed'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
