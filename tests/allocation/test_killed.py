"""An allocation that is killed at any moment: run again, it ends in the same recipe and the same weights."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.models.source import open_model

# The program imports once and forks a child for each run, before any computation; a child is killed at its k-th event of the
# file system beside the output.
PROGRAM = """
    import json, os, signal, sys
    from pathlib import Path
    import fewbits
    from fewbits.mixed_precision import Request

    EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
    root = Path(sys.argv[1])
    text = fewbits.TextSample(str(root / "text.txt"), 3, 16)

    def allocate(name, kill_at):
        count = 0

        def watch(event, arguments):
            nonlocal count
            if event in EVENTS and str(root / name) in str(arguments[0]):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        request = Request("4.6bpw", ("rtn:group_size=16",))
        fewbits.allocate(root / "model", request, root / name, calibration=text, heldout=text)
        return count

    def run(name, kill_at=0):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, str(allocate(name, kill_at)).encode())
            os._exit(0)
        os.close(writing)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), os.read(reading, 20).decode()

    status, events = run("whole")
    report = {"events": int(events), "whole": status, "killed": []}
    for kill_at in range(int(sys.argv[2]), int(events) + 1, int(events) // int(sys.argv[3])):
        report["killed"].append([kill_at, run(f"killed{kill_at}", kill_at)[0], run(f"killed{kill_at}")[0]])
    print(json.dumps(report))
"""


@pytest.mark.slow
def test_an_allocation_killed_at_any_moment_ends_in_the_same_files(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_hidden_layers=2, **sizes)).save_pretrained(tmp_path / "model")
    open_model("builtin:tiny-lm").tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(40)))
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path), "7", "4"]
    output = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True).stdout
    report = json.loads(output.splitlines()[-1])
    assert report["whole"] == 0 and report["events"] > 60 and len(report["killed"]) > 3
    for kill_at, killed, status in report["killed"]:
        assert killed == -9 and status == 0, kill_at
        for name in ("recipe.toml", "model.safetensors", "config.json"):
            assert (tmp_path / f"killed{kill_at}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (kill_at, name)
        assert not (tmp_path / f"killed{kill_at}.work").exists(), kill_at
