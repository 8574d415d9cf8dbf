"""Accuracy and true bits of UDFC on two small networks trained on scikit-learn's digits; no data is used after training.

    python benchmarks/udfc_digits.py [results/weights/udfc.json]

A plain and a residual convolutional network with batch normalization, trained on 1297 of the 1797 images and tested on the
other 500, three times each; every row is the mean over the networks' seeds.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fewbits.layers.linear import stored_bits
from fewbits.methods.weights.udfc import Udfc

SHARES = (0.0, 0.2, 0.3, 0.5)
BITS = (None, 6, 4, 3)
METHODS = {repair: {"repair": repair} for repair in ("none", "merging", "pruned", "full")}
METHODS["full, activations"] = {"repair": "full", "space": "activations"}


class Block(nn.Module):
    """Two convolutions and what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm2(self.second(self.norm1(self.first(inputs)).relu()))
        return (hidden + inputs).relu()


def plain() -> nn.Sequential:
    """Three convolutions, the last one flattened into a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if outputs == 64 else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 10))


def residual() -> nn.Sequential:
    """Three residual blocks between a convolution and a linear layer."""
    stem = (nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    return nn.Sequential(*stem, Block(32), Block(32), nn.MaxPool2d(2), Block(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images `[n, 1, 8, 8]` in 0..1 with their labels."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return (images[order[:1297]], labels[order[:1297]]), (images[order[1297:]], labels[order[1297:]])


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int = 12, seed: int = 0) -> nn.Module:
    """The model, trained with weight decay by stochastic gradient descent, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = data
    steps = epochs * (len(labels) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((model(data[0]).argmax(1) == data[1]).float().mean())


def measure(models: list[nn.Module], test: tuple[Tensor, Tensor], method: Udfc) -> dict:
    """One row: mean accuracy, all stored bits over the dense weights, mean seconds."""
    accuracies, bits, began = [], 0.0, time.perf_counter()
    for model in models:
        made = copy.deepcopy(model)
        method.rewrite(made)
        layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        weights = sum(layer.weight.numel() for layer in layers)
        dense = 32 * sum(parameter.numel() for parameter in made.parameters())
        bits = (dense if method.bits is None else stored_bits(made)) / weights
        accuracies.append(accuracy(made, test))
    seconds = (time.perf_counter() - began) / len(models)
    return {"accuracy": sum(accuracies) / len(accuracies), "bits_per_weight": bits, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("results/weights/udfc.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training, test = digits()
    rows = []
    for build in (plain, residual):
        models = []
        for seed in range(3):
            torch.manual_seed(seed)
            models.append(train(build(), training, seed=seed))
        dense = sum(accuracy(model, test) for model in models) / len(models)
        print(f"{build.__name__}: dense {dense:.4f}")
        for share in SHARES:
            for bits in BITS:
                if share == 0 and bits is None:
                    rows.append({"model": build.__name__, "method": "dense", "share": 0.0, "bits": None, "accuracy": dense})
                    rows[-1] |= {"bits_per_weight": 32.0, "seconds": 0.0}
                    continue
                for name, fields in METHODS.items():
                    if (share == 0 and name in ("merging", "pruned")) or (bits is None and name == "pruned"):
                        continue  # there the same as another row
                    row = measure(models, test, Udfc(share=share, bits=bits, **fields))
                    rows.append({"model": build.__name__, "method": name, "share": share, "bits": bits} | row)
                    print(rows[-1], flush=True)
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps({"test_images": len(test[1]), "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
