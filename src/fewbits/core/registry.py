"""Which methods there are: a walk over the files of the package `methods`; a file's stem is its method's name."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TypeVar

from fewbits.core.config import suggest
from fewbits.core.errors import InputError
from fewbits.core.method import Method

_PACKAGE = "fewbits.methods"
T = TypeVar("T")


def list_methods(family: str | None = None) -> list[str]:
    """Names of all methods, or of one family's, sorted; no method is imported. Raises InputError for an unknown family."""
    found = walk(_PACKAGE, "*/*.py")
    families = sorted({module.split(".")[-2] for module in found.values()})
    if family is not None and family not in families:
        raise InputError(f"no family of methods is called {family!r}; {suggest(family, families)}")
    return sorted(name for name, module in found.items() if family in (None, module.split(".")[-2]))


def get_method(name: str) -> type[Method]:
    """The class of the method called `name`, imported now. Raises InputError with a suggestion where there is none."""
    found = walk(_PACKAGE, "*/*.py")
    if name not in found:
        raise InputError(f"no method is called {name!r}; {suggest(name, sorted(found))}")
    return only_class(found[name], Method)


def walk(package: str, pattern: str) -> dict[str, str]:
    """Module names by the stems of the files of `package` that match `pattern`, those with a leading underscore left out."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [(folder, file) for folder in folders for file in folder.glob(pattern) if not file.name.startswith("_")]
    return {file.stem: ".".join([package, *file.relative_to(folder).with_suffix("").parts]) for folder, file in files}


def only_class(module_name: str, base: type[T]) -> type[T]:
    """The one class that a module, imported now, defines below `base`."""
    module = importlib.import_module(module_name)
    classes = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    found = [value for value in classes if issubclass(value, base)]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one {base.__name__.lower()}, not {len(found)}")
    return found[0]
