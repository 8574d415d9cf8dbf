"""Tables in README and docs, made from results/: python scripts/tables.py [--check]

A region between `<!-- table: FILE -->` and `<!-- end -->` holds the table of that result file. --check changes nothing and
ends with status 1 where a table is stale.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
REGION = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(path: Path) -> str:
    """A Markdown table of a result's rows."""
    result = json.loads(path.read_text())
    lines = [
        "| method | bits per weight | perplexity | loss difference to dense, 95% interval | KL | same top token |",
        "|---|---|---|---|---|---|",
    ]
    dense = result["rows"][0]["reference_perplexity"]
    lines.append(f"| dense | 16 | {dense:.2f} | | | |")
    for row in result["rows"]:
        low, high = row["delta_loss_interval"]
        name = f"{row.get('method', result.get('method'))} {row['bits']} bits"
        loss = f"{row['delta_loss']:+.4f} [{low:+.4f}, {high:+.4f}]"
        measured = f"{row['perplexity']:.2f} ± {row['perplexity_stderr']:.2f} | {loss} | {row['kl_mean']:.4f} | {row['top1_agreement']:.3f}"
        lines.append(f"| {name} | {row['bits_per_weight']:.3f} | {measured} |")
    return "\n".join(lines) + "\n"


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
