"""The NEON kernels, compiled for 64-bit ARM and run in an emulator beside the scalar ones: `make check-neon`.

Needs a cross compiler and QEMU's user emulation and installs neither (Debian: g++-aarch64-linux-gnu, qemu-user-static). Builds under
build/neon the program of tests/kernels/comparison, by the same CMakeLists.txt as the extension, and runs it as a processor with dot product
instructions and as one without.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "neon"
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
PROCESSORS = {"max": ["neondot", "neon", "scalar"], "cortex-a53": ["neon", "scalar"]}  # what each of QEMU's has, best first


def missing() -> list[str]:
    """What has to be installed before."""
    found = {"an ARM cross compiler, aarch64-linux-gnu-g++": shutil.which(COMPILER), "cmake": cmake()}
    found["QEMU's user emulation, qemu-aarch64-static"] = emulator()
    return [name for name, path in found.items() if path is None]


def cmake() -> str | None:
    beside = Path(sys.executable).with_name("cmake")
    return str(beside) if beside.exists() else shutil.which("cmake")


def emulator() -> str | None:
    return next(filter(None, map(shutil.which, EMULATORS)), None)


def build() -> Path:
    """The program. Raises CalledProcessError where it cannot be built."""
    system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    subprocess.run([str(cmake()), "-S", str(ROOT), "-B", str(BUILD), "-DFEWBITS_COMPARISON=ON", *system], check=True)
    subprocess.run([str(cmake()), "--build", str(BUILD), "--parallel", "2"], check=True)
    return BUILD / "compare_kernels"


def run(program: Path) -> int:
    """How many of the processors it failed on."""
    libraries = subprocess.run([COMPILER, "-print-sysroot"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    prefix = libraries if Path(libraries, "lib", "ld-linux-aarch64.so.1").exists() else "/usr/aarch64-linux-gnu"
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # emulated threads that watch for work are slow ones in the way of others
    failed = 0
    for processor, expected in PROCESSORS.items():
        print(f"as {processor}", flush=True)
        command = [str(emulator()), "-L", prefix, "-cpu", processor, str(program), *expected]
        failed += subprocess.run(command, env=environment).returncode != 0
    return failed


if __name__ == "__main__":
    if needed := missing():
        sys.exit(f"check_neon needs {' and '.join(needed)}")
    sys.exit(run(build()))
