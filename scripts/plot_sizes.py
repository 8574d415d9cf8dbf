"""Draws perplexity against size: python scripts/plot_sizes.py [--check]

Reads results/weights/bitstack.json and, for comparison, gptq.json beside it, and writes docs/methods/weights/bitstack.svg.
--check changes nothing and ends with status 1 where the drawing is stale.
"""

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 420, 64, 48, 20, 20
COLORS = {"bitstack": "#1f5fbf", "bitstack, random order": "#8aa9d6", "gptq": "#c0392b"}


def points(results: Path) -> dict[str, list[tuple[float, float]]]:
    """(bits per weight, perplexity) of each series, by bits."""
    series: dict[str, list[tuple[float, float]]] = {name: [] for name in COLORS}
    for name in ("bitstack", "gptq"):
        for row in json.loads((results / f"{name}.json").read_text())["rows"]:
            drawn = name == "bitstack" and row["settings"].get("order") == "random"
            series["bitstack, random order" if drawn else name].append((row["bits_per_weight"], row["perplexity"]))
    return {name: sorted(found) for name, found in series.items() if found}


def drawing(series: dict[str, list[tuple[float, float]]], dense: float) -> str:
    """An SVG with a logarithmic axis of perplexity; lines join the sizes of the stack, gptq's rows are dots."""
    every = [point for found in series.values() for point in found]
    low, high = math.floor(min(bits for bits, _ in every)), math.ceil(max(bits for bits, _ in every))
    top = max(loss for _, loss in every) * 1.1

    def x(bits: float) -> float:
        return LEFT + (bits - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - math.log(loss / dense * 1.05) / math.log(top / dense * 1.05) * (HEIGHT - BOTTOM - TOP)

    parts = [_text(x(bits), HEIGHT - BOTTOM + 18, str(bits), "middle") for bits in range(low, high + 1)]
    for loss in (tick for tick in (18, 20, 22, 25, 30, 40, 50, 60, 80, 100) if dense * 0.97 < tick < top):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 8, y(loss) + 4, str(loss), "end"))
    parts.append(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(dense):.1f}" y2="{y(dense):.1f}" stroke="#555555" stroke-dasharray="5 4"/>'
    )
    parts.append(_text(WIDTH - RIGHT, y(dense) + 14, f"dense {dense:.2f}", "end"))
    for place, (name, found) in enumerate(series.items()):
        color = COLORS[name]
        if name == "bitstack":
            line = " ".join(f"{x(bits):.1f},{y(loss):.1f}" for bits, loss in found)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(bits):.1f}" cy="{y(loss):.1f}" r="3.5" fill="{color}"/>' for bits, loss in found]
        parts.append(f'<circle cx="{WIDTH - 200}" cy="{TOP + 14 + 20 * place}" r="3.5" fill="{color}"/>')
        parts.append(_text(WIDTH - 190, TOP + 18 + 20 * place, name, "start"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "bits per compressed weight", "middle"))
    parts.append(f'<text x="16" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {HEIGHT / 2})">perplexity</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def main(check: bool) -> int:
    results, path = ROOT / "results" / "weights", ROOT / "docs" / "methods" / "weights" / "bitstack.svg"
    dense = json.loads((results / "bitstack.json").read_text())["rows"][0]["reference_perplexity"]
    made = drawing(points(results), dense)
    if path.is_file() and path.read_text() == made:
        return 0
    print(f"{path.relative_to(ROOT)}: {'stale; run python scripts/plot_sizes.py' if check else 'drawn'}")
    if not check:
        path.write_text(made)
    return 1 if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
