"""Text that every Python carries: the sources of its standard library, and its reference manual.

The built-in language model is trained on these documents and measured on a fixed list of modules that training never sees.
No text is shipped; it is read from the interpreter that runs, so its bytes differ a little between Python versions.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from fewbits.core.errors import InputError

# Modules kept out of training, by name: they exist, as a file or as a package, in every Python that fewbits supports.
HELDOUT_MODULES = (
    "argparse", "calendar", "configparser", "csv", "dataclasses", "difflib", "fractions", "heapq", "ipaddress",
    "mailbox", "optparse", "shutil", "smtplib", "statistics", "tarfile", "textwrap",
)  # fmt: skip
# Modules that training saw; the default calibration text.
CALIBRATION_MODULES = (
    "ast", "bdb", "cmd", "codecs", "copy", "datetime", "decimal", "doctest", "enum", "filecmp", "ftplib", "getopt", "glob",
    "gzip", "imaplib", "inspect", "locale", "mimetypes", "ntpath", "pdb", "pickle", "platform", "poplib", "posixpath",
    "pprint", "profile", "queue", "random", "sched", "selectors", "shelve", "shlex", "socket", "socketserver", "ssl",
    "string", "subprocess", "tempfile", "threading", "timeit", "trace", "traceback", "types", "typing", "uuid", "warnings",
    "weakref", "webbrowser", "zipfile",
)  # fmt: skip
# Character tables and generated data: much text that says little.
_SKIPPED_FOLDERS = frozenset({"site-packages", "encodings", "__pycache__", "lib2to3", "idlelib", "pydoc_data", "cjkencodings"})


def _library_root() -> Path:
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "argparse.py").is_file():
        raise InputError(f"the sources of the standard library are not at {root}; pass a text file with --data instead")
    return root


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def _module_text(name: str) -> str:
    """The source of one top-level module, or of all files of a package, in name order; empty where this Python lacks it."""
    root = _library_root()
    if (root / f"{name}.py").is_file():
        return _read(root / f"{name}.py")
    return "\n".join(_read(path) for path in sorted((root / name).rglob("*.py")))


def heldout_documents() -> list[str]:
    """Source texts of the modules that the built-in model was not trained on."""
    return [_module_text(name) for name in HELDOUT_MODULES]


def calibration_documents() -> list[str]:
    """Source texts that the built-in model was trained on, spread over many modules."""
    return [text for name in CALIBRATION_MODULES if (text := _module_text(name))]


def training_documents() -> Iterator[str]:
    """Every other source file of the standard library, its tests included, and the language reference as plain text."""
    root = _library_root()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and parts[0].removesuffix(".py") not in HELDOUT_MODULES:
            yield _read(path)
    from pydoc_data.topics import topics  # one large dictionary of reference texts; costly to import, wanted here only

    yield from topics.values()
