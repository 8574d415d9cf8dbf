"""Tables of timed products: of the files that benchmarks/native_matvec.py and benchmarks/products_beside_peers.py write."""

from collections.abc import Callable


def products(result: dict) -> list[tuple[list[str], list[list[str]]]]:
    """Heads and cells of each table that a result of timed products makes."""
    rows = result["rows"]
    if "product" in rows[0]:
        return [_beside_peers(rows)]
    counts = sorted({row["vectors"] for row in rows})
    return [_spread(rows, count, _part if count == 1 else _against_dense) for count in counts]


def _spread(rows: list[dict], vectors: int, cell: Callable[[dict], str]) -> tuple[list[str], list[list[str]]]:
    """Weights down, shapes and threads across."""
    here = [row for row in rows if row["vectors"] == vectors]
    places = list(dict.fromkeys((row["threads"], *row["shape"]) for row in sorted(here, key=lambda row: row["threads"])))
    found = {(row["weights"], row["threads"], *row["shape"]): cell(row) for row in here}
    heads = [
        f"{vectors} vector{'s' * (vectors > 1)}",
        *(f"{threads} thread{'s' * (threads > 1)}: {rows}x{columns}" for threads, rows, columns in places),
    ]
    return heads, [[name, *(found.get((name, *place), "-") for place in places)] for name in dict.fromkeys(row["weights"] for row in here)]


def _part(row: dict) -> str:
    return _quartiles(row["of_read_pass"]) if "of_read_pass" in row else "-"


def _against_dense(row: dict) -> str:
    if "milliseconds" not in row:
        return "-"
    times = [row.get(f"times_as_fast_as_{name}") for name in ("float32", "bfloat16")]
    return " / ".join([f"{row['milliseconds'][0]:.2f}", *("-" if one is None else f"{one:.1f}" for one in times)])


def _beside_peers(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """One line for each product of ours, shape, number of threads and of vectors: speed, and ratios to the peers of its width."""
    peers = ("torch's int4", "onnxruntime", "torch's bfloat16")
    heads = ["fewbits", "matrix", "threads", "vectors", "ms", "GFLOP/s", *(f"times as fast as {peer}" for peer in peers)]
    cells = []
    for row in rows:
        name = row["product"].removeprefix("fewbits ")
        if name == row["product"] or "milliseconds" not in row:
            continue
        width = name.removesuffix(", 8-bit inputs")
        ratios = [row["times_as_fast_as"].get(peer) for peer in (f"torch int4 {width}", f"onnxruntime {width}", "torch bfloat16")]
        where = ["x".join(map(str, row["shape"])), str(row["threads"]), str(row["vectors"])]
        speed = [f"{row['milliseconds'][0]:.3f}", f"{row['gflops']:.0f}"]
        cells.append([name, *where, *speed, *("-" if ratio is None else _quartiles(ratio) for ratio in ratios)])
    return heads, cells


def _quartiles(values: list[float]) -> str:
    middle, low, high = values
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
