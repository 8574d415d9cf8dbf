"""A plugin of pytest: the kernels' module of FEWBITS_TESTED_MODULE takes the place of the installed one."""

import importlib.util
import os
import sys

_NAME = "fewbits.kernels._native"
_found = importlib.util.spec_from_file_location(_NAME, os.environ["FEWBITS_TESTED_MODULE"])
assert _found is not None and _found.loader is not None
sys.modules[_NAME] = importlib.util.module_from_spec(_found)
_found.loader.exec_module(sys.modules[_NAME])
