"""What tests of several folders are run on."""

import json
import os
import subprocess
import sys
import textwrap

os.environ["TRITON_INTERPRET"] = "1"  # kernels for a GPU run on the CPU; before anything, torch among it, imports triton

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.data.text import TextSample
from fewbits.models.source import open_model


@pytest.fixture(scope="session")
def first_blocks(tmp_path_factory):
    """A folder with the first two of the built-in model's eight blocks, its norm, its head and its tokenizer.

    Its weights and its inputs are those of a trained model; what a method loses shows as KL to the same two blocks.
    """
    path, source = tmp_path_factory.mktemp("first") / "blocks", open_model("builtin:tiny-lm")
    whole = source.load()
    model = LlamaForCausalLM(LlamaConfig(**(whole.config.to_dict() | {"num_hidden_layers": 2})))
    model.load_state_dict(whole.state_dict(), strict=False)
    model.save_pretrained(path)
    source.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Calibration text and text to measure on, different ones."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"def function_{i}(x, y={i}):\n    '''Return x plus {i}.'''\n    return x + y * {i % 7}\n\n\n" for i in range(160)]
    (folder / "seen.txt").write_text("".join(lines[:80]))
    (folder / "held.txt").write_text("".join(lines[80:]))
    return TextSample(str(folder / "seen.txt"), 6, 48), TextSample(str(folder / "held.txt"), 12, 48)


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """A folder with a small model that knows 24 x 32 drawn tokens by heart: its logits are far from even."""
    windows = torch.randint(64, (24, 32), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("learned") / "llama"
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    return path


# Defines `work(name)`, which writes beside and at `root / name`, and `seen(name)`, what is noted of each run. The program imports
# once and forks a child for each run, before any computation; a child is killed at its k-th event of the file system there.
KILLED = """
import json, os, signal, sys
from pathlib import Path

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
root, first, step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def seen(name):
    return None

{body}

def child(name, kill_at):
    count = 0

    def watch(event, arguments):
        nonlocal count
        if event in EVENTS and str(root / name) in str(arguments[0]):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    work(name)
    return count

def run(name, kill_at=0):
    reading, writing = os.pipe()
    forked = os.fork()
    if not forked:
        os.write(writing, str(child(name, kill_at)).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(forked, 0)
    return os.waitstatus_to_exitcode(status), os.read(reading, 20).decode(), seen(name)

status, events, whole = run("whole")
report = {{"events": int(events), "whole": status, "seen": whole, "killed": []}}
for kill_at in range(first, int(events) + 1, step):
    one, again = run(f"killed{{kill_at}}", kill_at), run(f"killed{{kill_at}}")
    report["killed"].append([kill_at, one[0], again[0], one[2], again[2]])
print(json.dumps(report))
"""


@pytest.fixture
def killed():
    """Runs the text of a program's `work(name)` whole, then killed at every `step`-th event from the `first` on, each time again.

    Returns the number of events, what was seen of the whole run, and of each kill its place and what was seen before and after.
    """

    def killed(root, body, first, step):
        program = KILLED.format(body=textwrap.dedent(body))
        command = [sys.executable, "-c", program, str(root), str(first), str(step)]
        output = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True).stdout
        report = json.loads(output.splitlines()[-1])
        assert report["whole"] == 0 and len(report["killed"]) > 3
        assert all((killed, status) == (-9, 0) for _, killed, status, _, _ in report["killed"])
        return report["events"], report["seen"], [(place, before, after) for place, _, _, before, after in report["killed"]]

    return killed


@pytest.fixture
def small_model(tmp_path):
    """A folder that holds a model of a few blocks with a tokenizer, and a text for it."""

    def make(blocks):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_hidden_layers=blocks, **sizes)).save_pretrained(tmp_path / "model")
        open_model("builtin:tiny-lm").tokenizer().save_pretrained(tmp_path / "model")
        for name, first in (("text", 0), ("held", 40)):
            (tmp_path / f"{name}.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(first, first + 40)))
        return tmp_path

    return make


@pytest.fixture
def on_threads():
    """Runs something with each of some numbers of threads, one number after another: what came out of each."""
    before = torch.get_num_threads()

    def run(compute, numbers=(1, 2, 3)):
        found = []
        for number in numbers:
            torch.set_num_threads(number)
            found.append(compute())
        return found

    yield run
    torch.set_num_threads(before)
