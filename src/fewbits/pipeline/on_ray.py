"""Jobs spread over the nodes of a Ray cluster; what a lost node was doing is done again elsewhere."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from fewbits.core.errors import FewbitsError, InputError, reason_of
from fewbits.core.workers import Common, Job, Result, ThisProcess, Workers

_TRIES = 4  # of one job, where every node that it was sent to was lost
_ANSWER_SECONDS = 20
_QUEUED = 2  # jobs that are sent for each that can be done at once, so that no node waits for its next one


@contextlib.contextmanager
def open_workers(address: str | None, lost: Callable[[str], None] = lambda what: None) -> Iterator[Workers]:
    """The cluster at `address` ("auto", HOST:PORT, ray://HOST:PORT), one on this machine ("local"), or this process for None.

    `lost` is told of every job that was lost with its node and is done again. Raises InputError where ray is not installed or
    does not answer.
    """
    if address is None:
        yield ThisProcess()
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError("jobs are spread by the package ray; pip install 'fewbits[ray]' would be right") from error
    joined = ray.is_initialized()  # a program that has a cluster open already goes on with it
    if not joined:
        _connect(ray, address)
    try:
        yield RayWorkers(ray, lost)
    finally:
        if not joined:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        if address not in ("local", "auto"):  # Ray itself asks for minutes
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level="error", **own)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise InputError(f"no Ray cluster answers at {address!r} ({reason_of(error)}); local, auto or HOST:PORT would be right") from error


@dataclass
class _Sent:
    """A job on its way: its place in the order, its parts in the object store, and how often its node was lost."""

    number: int
    parts: tuple[Any, Any]
    lost: int = 0


class RayWorkers:
    """Jobs as tasks of a cluster that is connected to. Every task computes with as many threads as this process does."""

    def __init__(self, ray: Any, lost: Callable[[str], None]) -> None:
        self.ray, self.report = ray, lost
        self.lost = 0  # jobs that were sent again
        self.threads = torch.get_num_threads()
        exceptions = ray.exceptions
        self._losses = (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.LocalRayletDiedError,
            exceptions.ObjectLostError,
            exceptions.OutOfMemoryError,
        )
        # Lost jobs are counted and sent again here; Ray's own retries would say nothing of them.
        self._task = ray.remote(_do).options(num_cpus=self.threads, max_retries=0, scheduling_strategy="SPREAD")

    def map(self, function: Callable[[Common, Job], Result], jobs: Iterable[tuple[Common, Job]]) -> Iterator[Result]:
        """Raises InputError for a job that is lost again and again, and what `function` raises."""
        sending, running, done = self._parts(function, jobs), dict[Any, _Sent](), dict[int, Any]()
        try:
            for number in count():
                while number not in done:
                    self._fill(running, len(done), sending)
                    if not running:
                        return
                    self._take(running, done)
                yield done.pop(number)
        finally:
            for reference in running:
                self.ray.cancel(reference, force=True)

    def _parts(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, Any]]) -> Iterator[_Sent]:
        """Jobs in the object store, which every node reads its own copies from."""
        before: Any = _Sent  # is no job's
        shared: Any = None
        for number, (common, job) in enumerate(jobs):
            if common is not before:
                before, shared = common, self.ray.put(_pickled(common))
            yield _Sent(number, (shared, self.ray.put(_pickled((function, job)))))

    def _fill(self, running: dict[Any, _Sent], waiting: int, sending: Iterator[_Sent]) -> None:
        """Send jobs while there is somebody to do them; results that wait for an earlier one count, for they take memory too."""
        room = max(2, _QUEUED * int(self.ray.cluster_resources().get("CPU", 0)) // self.threads) - len(running) - waiting
        for _, sent in zip(range(room), sending, strict=False):
            self._send(running, sent)

    def _send(self, running: dict[Any, _Sent], sent: _Sent) -> None:
        running[self._task.remote(self.threads, *sent.parts)] = sent

    def _take(self, running: dict[Any, _Sent], done: dict[int, Any]) -> None:
        """Wait for a job; it is done, or lost and sent again."""
        ((reference, *_), _) = self.ray.wait(list(running), num_returns=1)
        sent = running.pop(reference)
        try:
            done[sent.number] = self.ray.get(reference)
        except self._losses as error:
            self._send_again(running, sent, error)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FewbitsError):
                raise error.cause from None
            raise

    def _send_again(self, running: dict[Any, _Sent], sent: _Sent, error: Exception) -> None:
        sent.lost, self.lost = sent.lost + 1, self.lost + 1
        if sent.lost == _TRIES:
            raise InputError(
                f"job {sent.number} was lost {_TRIES} times ({type(error).__name__}); nodes with more memory would be right"
            ) from error
        self.report(f"job {sent.number} was lost ({type(error).__name__}) and is done again")
        self._send(running, sent)


def _pickled(value: Any) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def _do(threads: int, common: bytes, job: bytes) -> Any:
    """What runs on a node. As many threads as where the run was started: sums in another order would be other bytes."""
    torch.set_num_threads(threads)
    function, what = pickle.loads(job)
    return function(pickle.loads(common), what)
