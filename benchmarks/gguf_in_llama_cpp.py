"""GGUF files of the built-in model in llama.cpp: is it the same model there, and is it better than llama.cpp's own quantizer?

    python benchmarks/gguf_in_llama_cpp.py --llama-cpp PYTHON [--windows 64] [--length 256] [--samples 64] [--keep FOLDER]

PYTHON is an interpreter with the package llama-cpp-python. At each block type three files of the same size are run by llama.cpp:
kquant's, llama.cpp's quantizer's on the model's own bfloat16, and the same with an importance matrix, the mean square of every input on the
text that kquant was calibrated on. All blocks' linears are of the type, everything else is as in the model. Perplexities are
llama.cpp's on the same held-out windows; intervals are paired. Beside kquant's stands what fewbits itself computes from the
folder, and how many of 16 greedy continuations of 32 tokens are the same. Writes results/export/gguf.json.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = "builtin:tiny-lm"
FILE_TYPES = {"q2_k": 10, "q3_k": 11, "q4_0": 2, "q4_k": 14, "q6_k": 18}  # by number, those that make all linears of one type
BFLOAT16 = 30
PROMPTS, PROMPT, WRITTEN = 16, 32, 32
OTHERS = ("quantizer", "importance")


def in_llama_cpp(folder: Path) -> None:
    """Runs in the interpreter that has llama_cpp: quantizes dense.gguf twice to every type, then scores every file."""
    import numpy as np

    importance = dict(np.load(folder / "importance.npz"))
    for name, number in FILE_TYPES.items():
        for kind in OTHERS:
            quantize(folder / "dense.gguf", folder / f"{name}-{kind}.gguf", number, importance if kind == "importance" else None)
    windows = np.load(folder / "windows.npy")
    for file in sorted(folder.glob("*.gguf")):
        losses, written = run(file, windows, continuations=0 if file.stem.endswith(OTHERS) else PROMPTS)
        np.savez(file.with_suffix(".npz"), losses=losses, written=written)
        print(file.stem, f"{math.exp(losses.mean()):.3f}", flush=True)


def quantize(source: Path, output: Path, number: int, importance: dict | None) -> None:
    """llama.cpp's own quantizer, every linear of one type."""
    import ctypes

    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.pure, options.nthread, options.token_embedding_type = number, True, 1, BFLOAT16
    if importance is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # the last one, without a name, ends the list
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        options.imatrix = entries
    if llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {output}")


def run(file: Path, windows, continuations: int) -> tuple:
    """Losses in nats `[windows, tokens - 1]`, and the greedy tokens after the beginnings of the first `continuations` windows."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(str(file), n_ctx=windows.shape[1], n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    losses = []
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        logits = model.scores[: len(window) - 1].astype(np.float64)
        total = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        losses.append(total - logits[np.arange(len(window) - 1), window[1:]])
    written = []
    for window in windows[:continuations]:
        tokens = window[:PROMPT].tolist()
        model.reset()
        model.eval(tokens)
        for _ in range(WRITTEN):
            tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(tokens[-1:])
        written.append(tokens[PROMPT:])
    return np.array(losses), np.array(written)


def prepare(folder: Path, sizes: argparse.Namespace) -> None:
    """Write the dense file, kquant's files and folders, the importance matrix and the windows."""
    import numpy as np

    import fewbits
    from fewbits import api
    from fewbits.methods.weights.kquant import Kquant
    from fewbits.models.source import open_model

    source = open_model(MODEL)
    calibration = fewbits.TextSample("builtin:calibration", sizes.samples, sizes.length)
    np.save(folder / "windows.npy", fewbits.TextSample("builtin:heldout", sizes.windows, sizes.length).windows(source.tokenizer()).numpy())
    np.savez(folder / "importance.npz", **importance_matrix(source, calibration))
    write_dense(source, folder)
    for name in FILE_TYPES:
        fewbits.compress(MODEL, Kquant(grid=name), folder / name, calibration=calibration, probe=None)
        api.export(folder / name, "gguf", folder / f"{name}.gguf")


def importance_matrix(source, calibration) -> dict:
    """Mean square of every input of the blocks' linears, by the tensor's name in a GGUF file."""
    import torch

    from fewbits.models.adapter import Adapter
    from fewbits.models.gguf.architecture import ARCHITECTURES
    from fewbits.statistics.moments import Moments

    model = source.load()
    linears = {name: one for block in Adapter(model).blocks for name, one in Adapter(model).linears(block).items()}
    moments = {name: Moments(one.in_features) for name, one in linears.items()}
    for name, one in linears.items():
        one.register_forward_pre_hook(lambda _, given, name=name: moments[name].update(given[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in calibration.windows(source.tokenizer()).split(8):
            model(batch)
    names = {name: ARCHITECTURES["llama"].tensor_name(f"{name}.weight") for name in linears}
    return {names[name]: one.mean_square.float().numpy() for name, one in moments.items()}


def write_dense(source, folder: Path) -> None:
    """dense.gguf in the model's own bfloat16: a folder without compressed layers, exported."""
    from fewbits import api
    from fewbits.export.checkpoint import write_checkpoint

    write_checkpoint(folder / "dense", source, lambda: [], lambda _: ({}, ""))
    api.export(folder / "dense", "gguf", folder / "dense.gguf")


def own(folder: Path, windows) -> tuple:
    """What fewbits computes of a folder: as `run`."""
    import numpy as np
    import torch

    import fewbits
    from fewbits.evaluation.fidelity import score

    model = fewbits.load(folder)
    prompts = torch.from_numpy(windows[:PROMPTS, :PROMPT])
    written = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=WRITTEN, do_sample=False, eos_token_id=-1)
    return score(model, torch.from_numpy(windows)).loss.numpy(), np.asarray(written[:, PROMPT:])


def rows(folder: Path) -> list[dict]:
    """One for each type: kquant's file in llama.cpp and here, and both files of llama.cpp's quantizer; paired differences in nats."""
    import numpy as np
    import torch

    from fewbits.evaluation.fidelity import paired_interval

    found = []
    for name in FILE_TYPES:
        losses = np.load(folder / f"{name}.npz")["losses"]
        row = {"type": name} | beside(folder, name)
        for kind in OTHERS:
            theirs = np.load(folder / f"{name}-{kind}.npz")["losses"]
            low, high = paired_interval(torch.from_numpy(losses), torch.from_numpy(theirs))
            row |= {kind: math.exp(theirs.mean()), f"less_than_{kind}": float((theirs - losses).mean())}
            row |= {f"{kind}_low": -high, f"{kind}_high": -low, f"{kind}_bytes": (folder / f"{name}-{kind}.gguf").stat().st_size}
        found.append(row)
    return found


def beside(folder: Path, name: str) -> dict:
    """A file in llama.cpp beside the folder that it was written from, computed here."""
    import numpy as np

    ran = np.load(folder / f"{name}.npz")
    losses, written = own(folder / name, np.load(folder / "windows.npy"))
    same = ran["written"] == written
    return {
        "file_bytes": (folder / f"{name}.gguf").stat().st_size,
        "in_llama_cpp": math.exp(ran["losses"].mean()),
        "here": math.exp(losses.mean()),
        "same_continuations": int(same.all(1).sum()),
        "same_tokens": float(same.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has llama_cpp", default=sys.executable)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help="a folder for the files, which are removed otherwise")
    for name, count in (("windows", 64), ("length", 256), ("samples", 64)):
        parser.add_argument(f"--{name}", type=int, default=count)
    given = parser.parse_args()
    if given.inside is not None:
        in_llama_cpp(given.inside)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, given)
        subprocess.run([given.llama_cpp, __file__, "--inside", str(folder)], check=True)
        sizes = {name: getattr(given, name) for name in ("windows", "length", "samples")}
        version = subprocess.run([given.llama_cpp, "-c", "import llama_cpp; print(llama_cpp.__version__)"], capture_output=True, text=True)
        result = {"model": MODEL, "text": "builtin:heldout", **sizes, "llama_cpp_python": version.stdout.strip()}
        result |= {"dense": beside(folder, "dense"), "rows": rows(folder)}
    output = Path(__file__).parents[1] / "results" / "export" / "gguf.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
