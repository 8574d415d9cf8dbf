"""A comparison that is killed at any moment: it goes on, makes no finished run again, and ends in the same result files."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.models.source import open_model

# As in tests/pipeline/test_killed.py: one import, a fork for each run, and a kill at the k-th event of the file system.
PROGRAM = """
    import json, os, signal, sys
    from pathlib import Path
    import fewbits
    from fewbits.comparison.samples import Samples

    EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
    root = Path(sys.argv[1])
    seen, held = (fewbits.TextSample(str(root / f"{name}.txt"), 3, 16) for name in ("seen", "held"))
    settings = fewbits.CompareSettings(repeats=2, samples=Samples(("def f",), 2), noise_windows=2)

    def compare(name, kill_at):
        count = 0

        def watch(event, arguments):
            nonlocal count
            if event in EVENTS and str(root / name) in str(arguments[0]):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        methods = ["rtn:bits=3,group_size=16", "gptq:bits=3,group_size=16"]
        fewbits.compare(root / "model", methods, root / name, calibration=seen, text=held, settings=settings)
        return count

    def run(name, kill_at=0):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, str(compare(name, kill_at)).encode())
            os._exit(0)
        os.close(writing)
        _, status = os.waitpid(child, 0)
        runs = [path for path in (root / name).glob("runs/*") if not path.name.endswith(".partial")]
        return os.waitstatus_to_exitcode(status), os.read(reading, 20).decode(), {path.name: path.stat().st_ino for path in runs}

    status, events, runs = run("whole")
    report = {"events": int(events), "whole": status, "runs": sorted(runs), "killed": []}
    for kill_at in range(int(sys.argv[2]), int(events) + 1, int(sys.argv[3])):
        first, again = run(f"killed{kill_at}", kill_at), run(f"killed{kill_at}")
        report["killed"].append([kill_at, first[0], again[0], first[2], again[2]])
    print(json.dumps(report))
"""


@pytest.fixture
def root(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_hidden_layers=2, **sizes)).save_pretrained(tmp_path / "model")
    open_model("builtin:tiny-lm").tokenizer().save_pretrained(tmp_path / "model")
    for name, first in (("seen", 0), ("held", 40)):
        (tmp_path / f"{name}.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(first, first + 40)))
    return tmp_path


def contents(folder):
    """Every file but those that say how long a run took."""
    timed = ("timing.json", "report.html", "table.md", "table.csv")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in timed]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_a_comparison_killed_at_any_moment_ends_in_the_same_files(root):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(root), "4", "41"]
    output = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True).stdout
    report = json.loads(output.splitlines()[-1])
    assert report["whole"] == 0 and report["events"] > 60 and len(report["killed"]) > 3 and len(report["runs"]) == 4
    expected = contents(root / "whole")
    assert "compare.json" in expected and any(name.startswith("shared/") for name in expected)
    for kill_at, killed, status, first, again in report["killed"]:
        assert killed == -9 and status == 0, kill_at
        assert first.items() <= again.items() and sorted(again) == report["runs"], kill_at  # a finished run is left as it is
        assert contents(root / f"killed{kill_at}") == expected, kill_at
    assert any(first for *_, first, _ in report["killed"])
