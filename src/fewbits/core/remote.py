"""Files in object storage (s3://, gs://, and whatever fsspec opens): fetched to this machine to be read, put there once they are whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fewbits.core.errors import InputError, reason_of

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # what a model's folder is read for


def is_url(place: str | Path) -> bool:
    """Whether `place` is in object storage and no folder here."""
    return isinstance(place, str) and "://" in place


def local_place(place: str | Path) -> Path:
    """The folder `place`, or the one in this machine's cache that stands for a URL."""
    if not isinstance(place, str) or not is_url(place):
        return Path(place)
    return _cache() / "places" / hashlib.sha256(place.encode()).hexdigest()[:16] / _last(place)


@contextlib.contextmanager
def placed(output: str | Path, last: str) -> Iterator[Path]:
    """Where `output` is to be written here; of a URL, what was written is put there when the context ends well, `last` as its last file.

    Raises InputError where there are files at the URL already, or it cannot be written.
    """
    place = local_place(output)
    if not isinstance(output, str) or not is_url(output):
        yield place
        return
    if _files(output, ("*",)):
        raise InputError(f"{output!r} holds files already; another name, or removing them, would be right")
    yield place
    try:
        if place.is_dir():
            put_folder(place, output, last)
        else:
            put_file(place, output)
    except InputError as error:
        raise InputError(f"{error}; what was written lies in {place}: copy it there, or remove it and run again") from error
    shutil.rmtree(place.parent)


def fetch_folder(url: str) -> Path:
    """A folder with the model's files below `url`, kept in this machine's cache for as long as they stay as they are.

    Raises InputError where there are none or they cannot be read.
    """
    files = _files(url, MODEL_FILES)
    if not files:
        raise InputError(f"{url!r} holds no files of a model; the URL of its folder would be right")
    system, _ = _opened(url)
    versions = json.dumps({name: system.ukey(path) for name, path in sorted(files.items())})
    target = _cache() / "models" / f"{_last(url)}-{hashlib.sha256(versions.encode()).hexdigest()[:16]}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as partial:
            for name in files:
                fetch_file(f"{url.rstrip('/')}/{name}", Path(partial) / "whole" / name)
            if not target.is_dir():  # another process of this machine may have been faster
                os.replace(Path(partial) / "whole", target)
    return target


def fetch_missing(url: str, folder: Path, last: str) -> None:
    """Fetch the folders below `url` that are not in `folder` and are whole, as those with a file called `last` are."""
    files = _files(url, ("*",))
    for name in sorted({name.split("/")[0] for name in files if name.endswith(f"/{last}")}):
        if not (folder / name).is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
                for one in files:
                    if one.startswith(f"{name}/"):
                        fetch_file(f"{url}/{one}", Path(partial) / one)
                os.replace(Path(partial) / name, folder / name)


def fetch_file(url: str, path: Path) -> bool:
    """Fetch one file to `path`, whole or not at all; False where there is none. Raises InputError where it cannot be read."""
    system, remote = _opened(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".fetched")
    os.close(handle)
    try:
        system.get_file(remote, partial)
        os.replace(partial, path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InputError(f"{url!r} cannot be read ({reason_of(error)})") from error
    finally:
        Path(partial).unlink(missing_ok=True)
    return True


def put_folder(folder: Path, url: str, last: str | None = None) -> None:
    """Put all files of `folder` below `url`, but those that are there in the same size; the one called `last` makes it whole.

    Raises InputError where they cannot be written.
    """
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    system, _ = _opened(url)
    there = {name: system.size(path) for name, path in _files(url, ("*",)).items()}
    for name in sorted(names, key=lambda name: (Path(name).name == last, name)):
        if name == last or there.get(name) != (folder / name).stat().st_size:
            put_file(folder / name, f"{url.rstrip('/')}/{name}")


def put_file(path: Path, url: str) -> None:
    """Raises InputError where it cannot be written."""
    system, remote = _opened(url)
    try:
        system.makedirs(remote.rpartition("/")[0], exist_ok=True)
        system.put_file(str(path), remote)
    except OSError as error:
        raise InputError(f"{url!r} cannot be written ({reason_of(error)})") from error


def _files(url: str, patterns: Sequence[str]) -> dict[str, str]:
    """Path in its system by name below `url`."""
    system, root = _opened(url)
    try:
        system.invalidate_cache()
        found = [str(path) for path in system.find(root)]
    except OSError as error:
        raise InputError(f"{url!r} cannot be read ({reason_of(error)})") from error
    names = {path[len(root) :].lstrip("/"): path for path in found if path.startswith(root.rstrip("/") + "/")}
    return {name: path for name, path in names.items() if any(fnmatch(name, pattern) for pattern in patterns)}


def _opened(url: str) -> tuple[Any, str]:
    """The file system of `url`, and its path there."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise InputError(f"{url!r} is opened by the package fsspec; pip install 'fewbits[ray]' would be right") from error
    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise InputError(f"{url!r} cannot be opened ({reason_of(error)})") from error
    return system, str(path)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbits"


def _last(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2]
