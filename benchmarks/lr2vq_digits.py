"""Accuracy and true bits of LR2VQ on a small convolutional network trained on scikit-learn's digits.

    python benchmarks/lr2vq_digits.py [results/weights/lr2vq.json] [--seeds 3]

Trained on 1297 images with noise that is drawn anew each time, tested on the other 500 with five draws each. Rows start from
the same trained network and take the same steps, unless their name says otherwise; bits are those of the whole state dict,
first convolution, batch normalizations and head too, over all weights. Runs that the result holds already are not repeated.
"""

import argparse
import copy
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fewbits.layers.linear import whole_bits
from fewbits.methods.weights.lr2vq import Lr2vq
from fewbits.pipeline.stages import train_stages
from fewbits.pipeline.train import Schedule, train

WIDTH, NOISE, STEPS = 16, 0.4, 400
BASE = {"share": 4 / 18, "kernels": 2, "entries": 8, "least": 2000, "rate": 5e-3}  # m = 18: three bits for 18 weights
BASE |= {"pretrain_steps": 3 * STEPS, "finetune_steps": STEPS, "norm_steps": 12}
PLAIN = {"share": 1.0, "train_decoder": False}
ROWS = {
    "plain VQ": PLAIN,
    "plain VQ, decoder trained": {"share": 1.0},
    "d = 9": {"share": 9 / 18},
    "d = 4": {},
    "d = 2": {"share": 2 / 18},
    "d = 1": {"share": 1 / 18},
    "d = 4, no low-rank training": {"pretrain_steps": 0},
    "d = 4, all steps after clustering": {"pretrain_steps": 0, "finetune_steps": 4 * STEPS},
    "plain VQ, all steps after clustering": {**PLAIN, "pretrain_steps": 0, "finetune_steps": 4 * STEPS},
    "plain VQ, four times the fine-tuning": {**PLAIN, "finetune_steps": 4 * STEPS},
    "d = 4, four times the fine-tuning": {"finetune_steps": 4 * STEPS},
    "d = 4, decoder frozen": {"train_decoder": False},
    "d = 4, random codebook": {"codebook": "random"},
    "d = 4, soft codes": {"assignments": "soft"},
}


def network(width: int = WIDTH) -> nn.Sequential:
    """Four convolutions with batch normalization, averaged into a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, width, 2), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def digits(noise: float = NOISE) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training images `[n, 1, 8, 8]` in 0..1 and their labels; test images with Gaussian noise, each five times, and theirs."""
    data, generator = load_digits(), torch.Generator().manual_seed(0)
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=generator)
    test = images[order[1297:]].repeat(5, 1, 1, 1)
    test = test + noise * torch.randn(test.shape, generator=generator)
    return (images[order[:1297]], labels[order[:1297]]), (test, labels[order[1297:]].repeat(5))


class Batches:
    """Batches of 32 in an order and with noise drawn anew each time that they are gone through."""

    def __init__(self, data: tuple[Tensor, Tensor], noise: float = NOISE) -> None:
        (self.images, self.labels), self.noise = data, noise

    def __iter__(self):
        for part in torch.randperm(len(self.labels)).split(32):
            yield self.images[part] + self.noise * torch.randn(len(part), 1, 8, 8), self.labels[part]


def trained(data: tuple[Tensor, Tensor], steps: int = STEPS, seed: int = 0) -> nn.Module:
    """The dense network that all rows start from, in eval mode."""
    torch.manual_seed(seed)
    model, batches = network(), iter(())

    def loss(step: int) -> Tensor:
        nonlocal batches
        batch = next(batches, None)
        if batch is None:
            batches = iter(Batches(data))
            batch = next(batches)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    train([{"params": list(model.parameters()), "lr": 5e-3}], loss, steps, schedule=Schedule(), seed=seed)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Share of right answers, and mean cross-entropy in nats."""
    outputs = model.eval()(data[0])
    return float((outputs.argmax(1) == data[1]).float().mean()), float(nn.functional.cross_entropy(outputs, data[1]))


def compressed(dense: nn.Module, data: tuple[Tensor, Tensor], seed: int = 0, **fields) -> tuple[nn.Module, list[dict]]:
    """The network trained and compressed with the base's fields and these."""
    return train_stages(copy.deepcopy(dense), Lr2vq(**{**BASE, "seed": seed, **fields}), Batches(data), seed=seed)


def measure(name: str, seed: int, dense: nn.Module) -> dict:
    """One run of a row: what the network loses, and what is stored of it."""
    torch.set_num_threads(1)
    (training, test), began = digits(), time.perf_counter()
    weights = sum(parameter.numel() for parameter in dense.parameters() if parameter.ndim > 1)
    made, record = (dense, []) if name == "dense" else compressed(dense, training, seed, **ROWS[name])
    right, loss = accuracy(made, test)
    said = {key: value for stage in record for key, value in stage["notes"].items()}
    trained_loss = next((stage["last_loss"] for stage in record if stage["stage"] == "low rank" and stage["steps"]), 0.0)
    row = {"seed": seed, "accuracy": right, "loss": loss, "bits": whole_bits(made) / weights, "seconds": time.perf_counter() - began}
    row |= {"cluster_error": statistics.mean(said.get("cluster_error", {"none": 0.0}).values()), "low_rank_training_loss": trained_loss}
    return row | {"layers": said.get("layers", {}), "cluster_errors": said.get("cluster_error", {})}


def summary(name: str, runs: list[dict]) -> dict:
    """Means, and standard deviations between seeds."""
    mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0] if isinstance(runs[0][key], float)}
    spread = {key: statistics.stdev(run[key] for run in runs) if len(runs) > 1 else 0.0 for key in ("accuracy", "loss")}
    row = {"method": name, "accuracy": mean["accuracy"], "accuracy_deviation": spread["accuracy"], "loss": mean["loss"]}
    row |= {"loss_deviation": spread["loss"], "low_rank_training_loss": mean["low_rank_training_loss"]}
    row |= {"cluster_error": mean["cluster_error"], "whole_model_bits_per_weight": mean["bits"]}
    return row | {"runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("results/weights/lr2vq.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, list[dict]] = {name: [] for name in ("dense", *ROWS)}
    if arguments.result.is_file() and (kept := json.loads(arguments.result.read_text()))["base"] == BASE:
        runs |= {row["method"]: row["runs"] for row in kept["rows"] if row["method"] in runs}
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        for seed in range(arguments.seeds):
            dense = trained(digits()[0], seed=seed)
            missing = [name for name, found in runs.items() if seed not in {run["seed"] for run in found}]
            waiting = {name: pool.submit(measure, name, seed, dense) for name in missing}
            for name, one in waiting.items():
                runs[name].append(one.result())
                print(seed, name, {key: value for key, value in runs[name][-1].items() if isinstance(value, float)}, flush=True)
            rows = [summary(name, found) for name, found in runs.items() if found]
            result = {"test_images": 2500, "seeds": len(runs["dense"]), "base": BASE, "torch": torch.__version__, "rows": rows}
            arguments.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
