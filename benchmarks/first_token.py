"""From a compressed file of about 1 GB on disk to the first token: seconds, and memory after loading beside the file's size.

    python benchmarks/first_token.py [results/benchmarks/first_token.json] [--folder FOLDER] [--blocks 40] [--rounds 5] [--threads 2]

A random model as in whole_model.py (4 bits, groups of 32, embedding and head bfloat16) is written to FOLDER unless it is there. Every
round is a process of its own: what importing takes, what loading takes, and what a prompt of one token takes to its answer; once with
the file in the system's cache ("warm"), once after it was dropped from there ("cold"). Memory is what the process has more than after
importing, over the file's size: "anonymous", and with pages of mapped files "resident". The bar: loading and first token in 3 seconds.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import whole_model

from fewbits.core.record import versions
from fewbits.evaluation.speed import quartiles

_PROGRAM = """
import json, sys, time
folder, threads = sys.argv[1], int(sys.argv[2])

def memory():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return {name: int(lines[field].split()[0]) * 1024 for name, field in (("resident", "VmRSS"), ("anonymous", "RssAnon"))}

began = time.perf_counter()
import torch
from transformers import LlamaForCausalLM  # transformers imports a kind of model when it is first asked for
from fewbits import api
torch.set_num_threads(threads)
imported, before = time.perf_counter(), memory()
model = api.load(folder, torch.bfloat16)
loaded, after = time.perf_counter(), memory()
with torch.inference_mode():
    token = int(model(torch.tensor([[1]])).logits[0, -1].argmax())
done = time.perf_counter()
seconds = {"import": imported - began, "load": loaded - imported, "first_token": done - loaded, "load_and_first_token": done - imported}
print(json.dumps({"seconds": seconds, "memory": {name: after[name] - before[name] for name in after}, "token": token}))
"""


def run(folder: Path, threads: int, cold: bool) -> dict:
    """One round, in a process of its own."""
    for file in folder.glob("*.safetensors") if cold else ():
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())  # what is not on the disk yet would stay in memory
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-c", _PROGRAM, str(folder), str(threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def summary(cache: str, rounds: list[dict], size: int) -> dict:
    """A row of the table, of medians, and the quartiles of the seconds."""
    seconds = {name: quartiles([one["seconds"][name] for one in rounds]) for name in rounds[0]["seconds"]}
    memory = {f"{name}_over_file": quartiles([one["memory"][name] / size for one in rounds])["median"] for name in rounds[0]["memory"]}
    medians = {f"{name}_seconds": one["median"] for name, one in seconds.items()}
    return {"cache": cache, "file_MB": size / 1e6, **medians, **memory, "quartiles": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("results/benchmarks/first_token.json"))
    parser.add_argument("--folder", type=Path)
    for name, default in (("blocks", 40), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "model"
        if not folder.exists():
            whole_model.write(folder, whole_model.random_model(torch.bfloat16, arguments.blocks))
        rows: dict[str, list[dict]] = {"warm": [], "cold": []}
        for _ in range(arguments.rounds):
            for kind, found in rows.items():
                found.append(run(folder, arguments.threads, kind == "cold"))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if len({one["token"] for found in rows.values() for one in found}) != 1:
        raise SystemExit("the rounds do not give the same token")
    settings = {
        "shape": whole_model.SHAPE | {"num_hidden_layers": arguments.blocks},
        "rounds": arguments.rounds,
        "threads": arguments.threads,
    }
    table = [summary(kind, found, size) for kind, found in rows.items()]
    record = {"settings": settings, "rows": table, "versions": versions(), "machine": platform.machine()}
    print(json.dumps(record, indent=1))
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
