"""Who does the independent jobs of a run: this process, or others that the jobs are sent to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Common = TypeVar("Common")
Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers(Protocol):
    """Does jobs that do not depend on each other; what comes out does not depend on who did them."""

    def map(self, function: Callable[[Common, Job], Result], jobs: Iterable[tuple[Common, Job]]) -> Iterator[Result]:
        """`function(common, job)` of each pair, in the order of `jobs`, which are asked for no sooner than there is somebody to do them.

        `function` is a pure function of its arguments, which can be pickled. A `common` that is the very object of the pair
        before is sent once. Raises what `function` raises.
        """


class ThisProcess:
    """One job after the other, each when its result is asked for."""

    def map(self, function: Callable[[Common, Job], Result], jobs: Iterable[tuple[Common, Job]]) -> Iterator[Result]:
        for common, job in jobs:
            result = function(common, job)
            del common, job  # what a job needed is gone before the next one is made
            yield result
