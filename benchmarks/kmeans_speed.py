"""Seconds for weighted k-means of all rows of a matrix, and how far from the best clustering it ends.

    python benchmarks/kmeans_speed.py [results/benchmarks/kmeans_speed.json] [--rows 4096] [--columns 4096] [--bits 3]

Weights are Student's t with 5 degrees of freedom, sensitivities squared normal numbers, as squeezellm has them. scikit-learn's
KMeans (one start from quantiles, to its own convergence) clusters some of the same rows in the same run; the exact dynamic
programme gives the least error that there is for them.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans

from fewbits.solvers.kmeans import cluster_rows, clustering_error, exact_levels


def peer(values: torch.Tensor, weights: torch.Tensor, count: int) -> tuple[float, torch.Tensor]:
    """Seconds and levels of scikit-learn, row by row."""
    began, levels = time.perf_counter(), []
    for row, weight in zip(values.numpy(), weights.numpy(), strict=True):
        start = np.quantile(row, (np.arange(count) + 0.5) / count)[:, None]
        found = KMeans(count, init=start, n_init=1, algorithm="lloyd").fit(row[:, None], sample_weight=weight)
        levels.append(np.sort(found.cluster_centers_[:, 0]))
    return time.perf_counter() - began, torch.tensor(np.stack(levels)).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("results/benchmarks/kmeans_speed.json"))
    for name, default in (("rows", 4096), ("columns", 4096), ("bits", 3), ("sample", 64), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    shape = arguments.rows, arguments.columns
    values = torch.randn(shape, generator=generator) / torch.randn(5, *shape, generator=generator).square().mean(0).sqrt()
    weights, count = torch.randn(shape, generator=generator).square(), 2**arguments.bits
    began, worked = time.perf_counter(), time.process_time()
    levels = cluster_rows(values, weights, count)
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    some = slice(0, arguments.sample)
    peer_seconds, peer_levels = peer(values[some], weights[some], count)
    ordered, order = values[some].sort(dim=1)
    best = clustering_error(values[some], weights[some], exact_levels(ordered, weights[some].gather(1, order), count).float())
    ours, theirs = (clustering_error(values[some], weights[some], one) / best for one in (levels[some], peer_levels))
    result = {
        "shape": list(shape),
        "bits": arguments.bits,
        "threads": arguments.threads,
        "cpus": os.cpu_count(),
        "seconds": seconds,
        "processor_seconds": worked,  # of all threads; on a busy machine the clock says more
        "error_over_the_least": {"median": float(ours.median()), "largest": float(ours.max())},
        "scikit_learn_seconds_for_all_rows": peer_seconds * arguments.rows / arguments.sample,
        "scikit_learn_rows_measured": arguments.sample,
        "scikit_learn_error_over_the_least": {"median": float(theirs.median()), "largest": float(theirs.max())},
        "times_as_fast": peer_seconds * arguments.rows / arguments.sample / seconds,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
