"""What the tests of the program share."""

import sys

import pytest

from fewbits.cli.main import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the program as typed: exit status, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fewbits", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code or 0, *capsys.readouterr()

    return run
