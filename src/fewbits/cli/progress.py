"""How far a run is, on standard error."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from fewbits.cli.options import err


class Bar:
    """A line on standard error: the layer that was done last, its error, the share of blocks and the time left."""

    def __enter__(self) -> Bar:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        self.progress = Progress(*columns, console=err)
        self.task: TaskID | None = None  # wrong input is said in one line, without a bar above it
        return self

    def __exit__(self, *what: Any) -> None:
        if self.task is not None:
            self.progress.stop()

    def show(self, block: int, blocks: int, layer: str, error: float, seconds_left: float) -> None:
        self.step(block + 1, blocks, f"{layer} error {error:.1e}", f"{seconds_left:.0f} s left")

    def step(self, done: int, total: int, what: str, left: str = "") -> None:
        if self.task is None:
            self.progress.start()
            self.task = self.progress.add_task("", total=total, left="")
        self.progress.update(self.task, description=what, completed=done, left=left)
