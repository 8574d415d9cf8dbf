"""Accuracy and true bits of LR2VQ on a small convolutional network trained on scikit-learn's digits.

    python benchmarks/lr2vq_digits.py [results/weights/lr2vq.json] [--seeds 3]

Trained on 1297 images with noise that is drawn anew each time, tested on the other 500 with five draws each. Every row takes
the same steps from the same trained network; bits are those of the whole state dict, first convolution, batch normalizations
and head too, over all weights.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fewbits.layers.linear import whole_bits
from fewbits.methods.weights.lr2vq import Lr2vq
from fewbits.pipeline.stages import train_stages
from fewbits.pipeline.train import Schedule, train

WIDTH, NOISE, STEPS = 16, 0.4, 400
BASE = {"share": 0.25, "kernels": 2, "entries": 8, "least": 2000, "pretrain_steps": STEPS, "finetune_steps": STEPS, "norm_steps": 12}
BASE["rate"] = 5e-3
PLAIN = {"share": 1.0, "train_decoder": False}
ROWS = {
    "plain VQ": PLAIN,
    "plain VQ, decoder trained": {"share": 1.0},
    "d = 18": {"share": 0.5},
    "d = 9": {"share": 0.25},
    "d = 4": {"share": 4 / 36},
    "d = 2": {"share": 2 / 36},
    "d chosen": {"share": None},
    "d = 9, no low-rank training": {"pretrain_steps": 0, "finetune_steps": 2 * STEPS},
    "d = 9, frozen decoder": {"train_decoder": False},
    "d = 9, random codebook": {"codebook": "random"},
    "d = 9, soft codes": {"assignments": "soft"},
    "d = 9, factored": {"storage": "factored"},
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("results/weights/lr2vq.json"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training, test = digits()
    found: dict[str, list[dict]] = {name: [] for name in ("dense", *ROWS)}
    for seed in range(arguments.seeds):
        dense = trained(training, seed=seed)
        right, loss = accuracy(dense, test)
        weights = sum(parameter.numel() for parameter in dense.parameters() if parameter.ndim > 1)
        found["dense"].append({"accuracy": right, "loss": loss, "cluster_error": 0.0, "bits": whole_bits(dense) / weights, "seconds": 0.0})
        for name, fields in ROWS.items():
            began = time.perf_counter()
            made, record = compressed(dense, training, seed, **fields)
            right, loss = accuracy(made, test)
            errors = next(stage["notes"]["cluster_error"] for stage in record if "cluster_error" in stage["notes"])
            row = {"accuracy": right, "loss": loss, "cluster_error": statistics.mean(errors.values())}
            found[name].append(row | {"bits": whole_bits(made) / weights, "seconds": time.perf_counter() - began})
            found[name][-1]["layers"] = record[0]["notes"]["layers"]
            print(seed, name, found[name][-1], flush=True)
    rows = []
    for name, runs in found.items():
        mean = {key: statistics.mean(run[key] for run in runs) for key in ("accuracy", "loss", "cluster_error", "bits", "seconds")}
        spread = {f"{key}_deviation": statistics.stdev(run[key] for run in runs) if len(runs) > 1 else 0.0 for key in ("accuracy", "loss")}
        rows.append({"method": name, "accuracy": mean["accuracy"], "accuracy_deviation": spread["accuracy_deviation"]})
        rows[-1] |= {"loss": mean["loss"], "loss_deviation": spread["loss_deviation"], "cluster_error": mean["cluster_error"]}
        rows[-1] |= {"whole_model_bits_per_weight": mean["bits"], "seconds": mean["seconds"], "runs": runs}
    result = {"test_images": len(test[1]), "seeds": arguments.seeds, "base": BASE, "torch": torch.__version__, "rows": rows}
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
