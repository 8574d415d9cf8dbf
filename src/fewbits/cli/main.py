"""fewbits: neural networks in few bits, and exactly what was lost."""

from __future__ import annotations

import os
import sys
from typing import Any, cast

import typer
from transformers.utils import logging as transformers_logging

from fewbits.cli.allocate import allocate
from fewbits.cli.bench import bench
from fewbits.cli.calibrate import calibrate
from fewbits.cli.compare import compare
from fewbits.cli.compress import compress
from fewbits.cli.evaluate import evaluate
from fewbits.cli.export import export
from fewbits.cli.generate import generate
from fewbits.cli.methods import methods
from fewbits.cli.reproduce import reproduce
from fewbits.cli.show import show
from fewbits.core.errors import FewbitsError, InputError

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
for command in (methods, show, compress, allocate, evaluate, compare, reproduce, calibrate, generate, export, bench):
    app.command()(command)
_UsageError = cast(type[Exception], typer.BadParameter.__bases__[0])  # typer has its own copy of click, or uses click itself


def main() -> None:
    """The program `fewbits`: status 0 done, 2 wrong input in one line, 1 a failure of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()  # its warnings, and bars, would stand around the one line that is meant for the user
    transformers_logging.disable_progress_bar()
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="fewbits", standalone_mode=False) or 0)
    except FewbitsError as error:
        print(f"fewbits: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except _UsageError as error:
        said = " ".join(cast(Any, error).format_message().split()).rstrip(".")
        command = getattr(getattr(error, "ctx", None), "command_path", "fewbits")
        print(f"fewbits: {said}; {command} --help says what would be right", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


if __name__ == "__main__":
    main()
