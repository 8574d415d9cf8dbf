"""The kernels' tests with the address and undefined-behaviour sanitizers: `make check-native`.

Builds the extension anew under build/sanitized and hands it to the tests in the place of the installed one.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitized"


def build() -> Path:
    """The module, compiled. Raises CalledProcessError where it cannot be."""
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DFEWBITS_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    cmake = str(Path(sys.executable).with_name("cmake"))
    subprocess.run([cmake, "-S", str(ROOT), "-B", str(BUILD), *options], check=True)
    subprocess.run([cmake, "--build", str(BUILD), "--parallel", "2"], check=True)
    return next(BUILD.glob("_native*.so"))


def run(module: Path) -> int:
    """The exit status of the tests; torch is no sanitized program, so that the sanitizers' libraries come before it."""
    names = ("libasan.so", "libubsan.so")
    compiler = os.environ.get("CXX", "g++")
    found = [subprocess.run([compiler, f"-print-file-name={name}"], check=True, stdout=subprocess.PIPE, text=True).stdout for name in names]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(path.strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has until it ends
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "FEWBITS_TESTED_MODULE": str(module),
        "FEWBITS_EXAMPLES": os.environ.get("FEWBITS_EXAMPLES", "200"),
        "PYTHONPATH": str(ROOT / "scripts"),
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tested_module", "tests/kernels"], cwd=ROOT, env=environment
    ).returncode


if __name__ == "__main__":
    sys.exit(run(build()))
