"""Tables of timed products: of what native_matvec.py, products_in_one_call.py, products_beside_peers.py and prompt_products.py write,
all of benchmarks/.
"""

from collections.abc import Callable


def products(result: dict) -> list[tuple[list[str], list[list[str]]]]:
    """Heads and cells of each table that a result of timed products makes."""
    rows = result["rows"]
    if "product" in rows[0]:
        return [_beside_peers(rows)]
    if "bits_of_inputs" in rows[0]:
        widths = sorted({row["bits_of_inputs"] for row in rows}, reverse=True)
        return [_spread([row for row in rows if row["bits_of_inputs"] == bits], f"{bits}-bit inputs", _part) for bits in widths]
    counts = sorted({row["vectors"] for row in rows})
    heads = [f"{count} vector{'s' * (count > 1)}" for count in counts]
    cells = [_part if count == 1 else _against_dense for count in counts]
    return [
        _spread([row for row in rows if row["vectors"] == count], head, cell)
        for count, head, cell in zip(counts, heads, cells, strict=True)
    ]


def _spread(here: list[dict], head: str, cell: Callable[[dict], str]) -> tuple[list[str], list[list[str]]]:
    """Weights down, shapes and threads across."""
    places = list(dict.fromkeys((row["threads"], *row["shape"]) for row in sorted(here, key=lambda row: row["threads"])))
    found = {(row["weights"], row["threads"], *row["shape"]): cell(row) for row in here}
    heads = [
        head,
        *(f"{threads} thread{'s' * (threads > 1)}: {rows}x{columns}" for threads, rows, columns in places),
    ]
    return heads, [[name, *(found.get((name, *place), "-") for place in places)] for name in dict.fromkeys(row["weights"] for row in here)]


def _part(row: dict) -> str:
    """Of a read-only pass, and how many times as fast as torch in bfloat16 where that was timed."""
    if "of_read_pass" not in row:
        return "-"
    times = row.get("times_as_fast_as_bfloat16")
    return _quartiles(row["of_read_pass"]) + ("" if times is None else f" / {times:.1f}")


def _against_dense(row: dict) -> str:
    if "milliseconds" not in row:
        return "-"
    times = [row.get(f"times_as_fast_as_{name}") for name in ("float32", "bfloat16")]
    return " / ".join([f"{row['milliseconds'][0]:.2f}", *("-" if one is None else f"{one:.1f}" for one in times)])


def _beside_peers(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Ours down, numbers of vectors across: milliseconds, and how many times as fast as each peer of its width."""
    mine = [row for row in rows if row["product"].startswith("fewbits") and "milliseconds" in row]
    counts = sorted({row["vectors"] for row in mine})
    places = dict.fromkeys((row["threads"], tuple(row["shape"]), row["product"]) for row in mine)
    found = {(row["threads"], tuple(row["shape"]), row["product"], row["vectors"]): _against_peers(row) for row in mine}
    heads = ["threads", "matrix", "weights", *(f"{count} vector{'s' * (count > 1)}" for count in counts)]
    cells = []
    for place in places:
        threads, shape, name = place
        values = [found.get((*place, count), "-") for count in counts]
        cells.append([str(threads), "x".join(map(str, shape)), name.removeprefix("fewbits "), *values])
    return heads, cells


def _against_peers(row: dict) -> str:
    width = row["product"].removeprefix("fewbits ").removesuffix(", 8-bit inputs")
    ratios = [row["times_as_fast_as"].get(peer) for peer in (f"torch int4 {width}", f"onnxruntime {width}", "torch bfloat16")]
    return " / ".join([f"{row['milliseconds'][0]:.2f}", *("-" if ratio is None else f"{ratio[0]:.2f}" for ratio in ratios)])


def many_vectors(result: dict) -> tuple[list[str], list[list[str]]]:
    """Of benchmarks/prompt_products.py: weights down, vectors across, for the first shape and as many threads as there were."""
    shape, threads = result["products"][0]["shape"], max(one["threads"] for one in result["products"])
    here = {one["vectors"]: one["table"] for one in result["products"] if (one["shape"], one["threads"]) == (shape, threads)}
    heads = [f"{shape}, {threads} threads", *(f"{vectors} vectors" for vectors in here)]
    names = dict.fromkeys(name for rows in here.values() for name in rows)
    return heads, [[name, *(_speed(rows.get(name, {})) for rows in here.values())] for name in names]


def whole_model(result: dict) -> tuple[list[str], list[list[str]]]:
    """Of benchmarks/whole_model.py."""
    heads = ["", "MB a token", "tokens a second", "prompt tokens a second", "fewbits times as fast: new tokens", "prompt"]
    cells = []
    for name, row in result["models"].items():
        speeds = [row[f"{key}_tokens_per_second"]["median"] for key in ("decode", "prefill")]
        ratios = [f"{row['fewbits_times_as_fast'][key]:.2f}" for key in ("decode", "prefill")]
        cells.append([name, f"{row['bytes_read'] / 1e6:.0f}", f"{speeds[0]:.1f}", f"{speeds[1]:.0f}", *ratios])
    return heads, cells


def _speed(row: dict) -> str:
    if "giga_operations" not in row:
        return "-"
    return f"{row['giga_operations']['median']:.0f} ({row['times_torch_bfloat16']['median']:.2f})"


def _quartiles(values: list[float]) -> str:
    middle, low, high = values
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
