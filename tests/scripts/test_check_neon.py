"""The check of the ARM kernels says what it lacks, and asks for the instruction sets that FEWBITS_FORCE_ISA knows."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from fewbits.kernels import native

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_neon.py"


def test_it_says_what_is_missing_and_ends(tmp_path):
    ended = subprocess.run([sys.executable, str(SCRIPT)], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("check_neon needs an ARM cross compiler, aarch64-linux-gnu-g++")
    assert ended.stderr.endswith("and QEMU's user emulation, qemu-aarch64-static\n")


def test_it_expects_instruction_sets_that_there_are():
    spec = importlib.util.spec_from_file_location("check_neon", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PROCESSORS == {"max": ["neondot", "neon", "scalar"], "cortex-a53": ["neon", "scalar"]}
    sources = {folder.name for folder in (SCRIPT.parents[1] / "csrc").iterdir() if folder.is_dir()}
    assert sources == {*native.INSTRUCTION_SETS, "avx512bf16"}  # what avx512vnni multiplies many vectors with, where the processor can
