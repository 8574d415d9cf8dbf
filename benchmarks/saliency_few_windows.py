"""What the saliency term of apiq_saliency is worth where calibration text is scarce: held-out KL over several draws of it.

    python benchmarks/saliency_few_windows.py [--seeds 5] [--windows 8] [--length 32] [--steps 160]

A Llama of two blocks, hidden 64, is trained for 250 steps on a random language. Each seed draws its own calibration windows; all
variants of a seed read the same ones. Writes
results/benchmarks/saliency_few_windows.json: KL by variant, the mean over seeds, and the paired difference to no term at all.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.apiq_saliency import ApiqSaliency
from fewbits.models.source import ModelSource, open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model

VARIANTS = [
    {"weight": 0.0},
    {"weight": 1e-3},
    {"weight": 1e-2},
    {"weight": 1e-1},
    {"weight": 1.0},
    {"weight": 1e-1, "saliency": "none"},
    {"weight": 1e-1, "saliency": "permuted"},
]
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
SUCCESSORS = torch.randint(64, (64, 64, 3), generator=torch.Generator().manual_seed(0))


def text(count: int, length: int, seed: int) -> torch.Tensor:
    """`[count, length]` tokens: one that the last token names follows in five of eight cases, three that the last two name in one each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(64, (count, length), generator=generator)
    for place in range(2, length):
        pick = torch.randint(8, (count,), generator=generator).clamp(max=3)
        likely = SUCCESSORS[tokens[:, place - 1], tokens[:, place - 2] % 4, pick.clamp(max=2)]
        tokens[:, place] = torch.where(pick < 3, likely, SUCCESSORS[tokens[:, place - 1], 0, 0])
    return tokens


def trained(folder: Path) -> ModelSource:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(250):
        tokens = text(32, 32, 1000 + step)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return open_model(folder)


def divergence(source: ModelSource, method: ApiqSaliency, windows: torch.Tensor, work: Path) -> float:
    """KL of the compressed model to the dense one on held-out text."""
    summary, heldout = compress_model(source, Plan(method), windows, work), text(64, 32, 7)
    dense, ours = source.load(), source.load()
    for name, stored in summary.layers():
        ours.set_submodule(name, CompressedLinear(stored))
    with torch.no_grad():
        theirs, found = (torch.log_softmax(one(input_ids=heldout).logits, -1) for one in (dense, ours))
    return float((theirs.exp() * (theirs - found)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seeds", 5), ("windows", 8), ("length", 32), ("steps", 160)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = vars(parser.parse_args())
    lost: list[list[float]] = [[] for _ in VARIANTS]
    with tempfile.TemporaryDirectory() as temporary:
        source = trained(Path(temporary) / "model")
        for seed in range(sizes["seeds"]):
            windows = text(sizes["windows"], sizes["length"], 50 + seed)
            for number, fields in enumerate(VARIANTS):
                method = replace(ApiqSaliency(steps=sizes["steps"], seed=seed), **fields)
                lost[number].append(round(divergence(source, method, windows, Path(temporary) / f"{seed}-{number}"), 5))
            print(seed, [one[-1] for one in lost], flush=True)
    write(lost, sizes)


def write(lost: list[list[float]], sizes: dict[str, int]) -> None:
    rows = []
    for fields, values in zip(VARIANTS, lost, strict=True):
        differences = [100 * (value / plain - 1) for value, plain in zip(values, lost[0], strict=True)]
        row: dict = {"weight": fields["weight"], "saliency": fields.get("saliency", "fisher") if fields["weight"] else "—"}
        row |= {"KL, mean over seeds": statistics.mean(values), "difference to none, %": statistics.mean(differences)}
        row |= {"standard error, %": statistics.stdev(differences) / len(differences) ** 0.5, "by_seed": values}
        rows.append(row)
    path = Path("results/benchmarks/saliency_few_windows.json")
    path.write_text(json.dumps({"method": "apiq_saliency", "settings": sizes, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
