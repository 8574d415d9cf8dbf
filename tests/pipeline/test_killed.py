"""A run that is killed at any moment: it goes on, computes no finished block again, and ends in the same checkpoint."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.models.source import open_model

BLOCKS = 3
# The program imports once and forks a child for each run, before any computation. The kernel is asked to kill a child at its
# k-th event of the file system inside the folder: opening, renaming, making, removing.
PROGRAM = """
    import json, os, signal, sys
    from pathlib import Path
    import fewbits
    from fewbits.methods.weights.gptq import Gptq

    EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
    root = Path(sys.argv[1])
    text = fewbits.TextSample(str(root / "text.txt"), 3, 16)

    def compress(name, kill_at):
        count, seen = 0, []

        def watch(event, arguments):
            nonlocal count
            if event in EVENTS and str(root / name) in str(arguments[0]):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        def progress(block, *_):
            seen.append(block)
            (root / "seen").write_text(json.dumps(sorted(set(seen))))

        (root / "seen").write_text("[]")
        sys.addaudithook(watch)
        options = fewbits.pipeline.stream.StreamOptions(progress=progress)
        fewbits.compress(root / "model", Gptq(bits=3, group_size=16), root / name, calibration=text, options=options, probe=None)
        return count

    def run(name, kill_at=0):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, str(compress(name, kill_at)).encode())
            os._exit(0)
        os.close(writing)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), os.read(reading, 20).decode(), json.loads((root / "seen").read_text())

    import fewbits.pipeline.stream
    status, events, _ = run("whole")
    report = {"events": int(events), "whole": status, "killed": []}
    for kill_at in range(int(sys.argv[2]), int(events) + 1, int(sys.argv[3])):
        name = f"killed{kill_at}"
        first, again = run(name, kill_at), run(name)
        report["killed"].append([kill_at, first[0], again[0], first[2], again[2]])
    print(json.dumps(report))
"""


@pytest.fixture
def root(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_hidden_layers=BLOCKS, **sizes)).save_pretrained(tmp_path / "model")
    open_model("builtin:tiny-lm").tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(40)))
    return tmp_path


def contents(folder):
    """Every file but the record and the card, which say how long the run took."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("fewbits.json", "README.md")}


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_in_the_same_checkpoint(root):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(root), "5", "13"]
    output = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True).stdout
    report = json.loads(output.splitlines()[-1])
    assert report["whole"] == 0 and report["events"] > 40 and len(report["killed"]) > 3
    expected = contents(root / "whole")
    for kill_at, killed, status, first, again in report["killed"]:
        assert killed == -9 and status == 0, kill_at
        # Nothing that was finished is computed again, and every block was computed by one of the two.
        assert not set(first) & set(again) and set(first) | set(again) >= set(range(BLOCKS)) - {max(first, default=-1) + 1}, kill_at
        assert contents(root / f"killed{kill_at}") == expected, kill_at
        assert not (root / f"killed{kill_at}.work").exists() and not (root / f"killed{kill_at}.partial").exists(), kill_at
