"""Importing this makes every kind of part known that a folder can hold, in a process that made none of them itself."""

from importlib import import_module
from pkgutil import iter_modules

import fewbits.formats
import fewbits.layers

for _folder in (fewbits.formats, fewbits.layers):
    for _found in iter_modules(_folder.__path__):
        import_module(f"{_folder.__name__}.{_found.name}")
