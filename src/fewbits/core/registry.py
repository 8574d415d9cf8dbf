"""Which methods there are: a walk over the files of the package `methods`; a file's stem is its method's name."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from fewbits.core.config import suggest
from fewbits.core.errors import InputError
from fewbits.core.method import Method

_PACKAGE = "fewbits.methods"


def list_methods(family: str | None = None) -> list[str]:
    """Names of all methods, or of one family's, sorted; no method is imported. Raises InputError for an unknown family."""
    found = _walk()
    families = sorted({module.split(".")[-2] for module in found.values()})
    if family is not None and family not in families:
        raise InputError(f"no family of methods is called {family!r}; {suggest(family, families)}")
    return sorted(name for name, module in found.items() if family in (None, module.split(".")[-2]))


def get_method(name: str) -> type[Method]:
    """The class of the method called `name`, imported now. Raises InputError with a suggestion where there is none."""
    found = _walk()
    if name not in found:
        raise InputError(f"no method is called {name!r}; {suggest(name, sorted(found))}")
    module = importlib.import_module(found[name])
    classes = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    methods = [value for value in classes if issubclass(value, Method)]
    if len(methods) != 1:
        raise TypeError(f"{module.__name__} must define exactly one method, not {len(methods)}")
    return methods[0]


def _walk() -> dict[str, str]:
    """Method name to module name."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in folder.glob("*/*.py") if not file.name.startswith("_")]
    return {file.stem: f"{_PACKAGE}.{file.parent.name}.{file.stem}" for file in files}
