"""The folder of a comparison: one folder for each run, named by what decides its content, whole or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.files import write_text, written_whole
from fewbits.core.remote import fetch_missing, is_url, local_place, put_file, put_folder
from fewbits.evaluation.fidelity import TokenScores
from fewbits.pipeline.dense_pass import DensePass

RECORD, SCORES, TIMING = "record.json", "scores.safetensors", "timing.json"
Run = tuple[dict[str, Any], TokenScores, dict[str, Any]]  # record, scores, timing


class Folder:
    """Where the results of a comparison are. Raises InputError where `place` holds something else.

    Of a URL all is written to this machine's cache first; finished runs that are there are fetched, new ones are put there.
    """

    def __init__(self, place: str | Path) -> None:
        path, self.url = local_place(place), str(place).rstrip("/") if is_url(place) else None
        self.path, self.shared, self.work, self.runs = path, path / "shared", path / "work", path / "runs"
        if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not self.runs.is_dir())):
            raise InputError(f"{path} exists and holds no comparison; another name, or removing it, would be right")
        self.runs.mkdir(parents=True, exist_ok=True)
        for partial in self.runs.glob("*.partial"):
            shutil.rmtree(partial)
        if self.url is not None:
            fetch_missing(f"{self.url}/runs", self.runs, RECORD)
            put_folder(self.runs, f"{self.url}/runs", RECORD)  # what was killed before it was put there

    def share(self, *passes: DensePass) -> None:
        """Let other machines read what was gathered of the dense model: from the URL, where there is one."""
        for one in passes if self.url is not None else ():
            one.store.origin = f"{self.url}/shared/{one.store.folder.name}"
            put_folder(one.store.folder, one.store.origin)

    def run(self, slug: str, key: str) -> Path:
        """The folder of one run: its name, and the beginning of the hash of everything that decides its content."""
        return self.runs / f"{slug}-{key[:12]}"

    def keep_run(self, run: Path, record: Mapping[str, Any], scores: TokenScores, timing: Mapping[str, Any]) -> None:
        """Write a run's files beside its folder, then rename it. What varies from run to run is in the timing alone."""
        with written_whole(run, "run again to go on") as partial:
            partial.mkdir()
            (partial / RECORD).write_text(as_json(record))
            (partial / TIMING).write_text(as_json(timing))
            found = {name: value.contiguous() for name, value in vars(scores).items() if value is not None}
            save_file(cast("dict[str, Tensor]", found), partial / SCORES)
        if self.url is not None:
            put_folder(run, f"{self.url}/runs/{run.name}", RECORD)

    def write(self, name: str, text: str) -> None:
        """A file of the whole comparison, whole or not at all."""
        write_text(self.path / name, text)
        if self.url is not None:
            put_file(self.path / name, f"{self.url}/{name}")


def read_run(run: Path) -> Run:
    """Record, scores and timing. Raises InputError where a file cannot be read."""
    try:
        record, timing = (json.loads((run / name).read_text()) for name in (RECORD, TIMING))
        return record, TokenScores(**load_file(run / SCORES)), timing
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{run} cannot be read ({error}); remove it and run again") from error


def as_json(value: Any) -> str:
    """Text that is the same for equal values."""
    return json.dumps(value, sort_keys=True, indent=1) + "\n"
