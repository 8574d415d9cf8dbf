"""A drawing of how fast layers compute for the bytes that they read, under the roofs of memory and arithmetic."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 440, 76, 52, 24, 24
_COLORS = ("#1f5fbf", "#c0392b", "#1e8449", "#8e44ad", "#b9770e", "#117a8b")


def roofline(layers: Sequence[Mapping[str, Any]], peak_flops: float, bytes_per_second: float) -> str:
    """An SVG with logarithmic axes, operations a byte and operations a second: one line a kind of layer, from few vectors to many.

    `layers` are rows of `evaluation.speed.measure_layers`.
    """
    points = [(one["flops_per_byte"], one["flops"]) for row in layers for one in row["products"]]
    low, high = min(x for x, _ in points) / 1.5, max(max(x for x, _ in points), peak_flops / bytes_per_second) * 1.5
    least, most = min(y for _, y in points) / 2, max(peak_flops, *(y for _, y in points)) * 2

    def at(x: float, y: float) -> str:
        return f"{_place(x, low, high, LEFT, WIDTH - RIGHT):.1f},{_place(y, least, most, HEIGHT - BOTTOM, TOP):.1f}"

    parts = _grid(low, high, least, most)
    corner = peak_flops / bytes_per_second
    start = max(low, least / bytes_per_second)
    roof = f"{at(start, start * bytes_per_second)} {at(corner, peak_flops)} {at(high, peak_flops)}"
    parts.append(f'<polyline points="{roof}" fill="none" stroke="#555555" stroke-width="2" stroke-dasharray="6 4"/>')
    for place, row in enumerate(layers):
        color = _COLORS[place % len(_COLORS)]
        line = [at(one["flops_per_byte"], one["flops"]) for one in row["products"]]
        parts.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        for spot, one in zip(line, row["products"], strict=True):
            x, y = spot.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{color}"><title>{one["vectors"]} vectors</title></circle>')
        name = f"{row['shape'][0]} x {row['shape'][1]}: {' + '.join(row['terms'])}"
        parts.append(f'<circle cx="{WIDTH - 300}" cy="{HEIGHT - BOTTOM - 18 - 20 * place}" r="4" fill="{color}"/>')
        parts.append(_text(WIDTH - 290, HEIGHT - BOTTOM - 14 - 20 * place, name, "start"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "operations for each stored byte", "middle"))
    parts.append(f'<text x="18" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 18 {HEIGHT / 2})">operations a second</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>"]) + "\n"


def _place(value: float, low: float, high: float, first: float, last: float) -> float:
    return first + math.log(value / low) / math.log(high / low) * (last - first)


def _grid(low: float, high: float, least: float, most: float) -> list[str]:
    parts = []
    for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        x = _place(10.0**power, low, high, LEFT, WIDTH - RIGHT)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#e2e2e2"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 18, f"{10.0**power:g}", "middle"))
    for power in range(math.ceil(math.log10(least)), math.floor(math.log10(most)) + 1):
        y = _place(10.0**power, least, most, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e2e2"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{10.0 ** (power - 9):g} G", "end"))
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
