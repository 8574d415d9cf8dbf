"""Jobs on a cluster: in order, lost ones done again, and the same bytes as here though a node is killed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fewbits.core.errors import InputError, NumericsError
from fewbits.core.workers import ThisProcess
from fewbits.pipeline.on_ray import RayWorkers, open_workers

TIMED = ("timing.json", "report.html", "table.md", "table.csv", "README.md")


class WorkerCrashedError(Exception):
    pass


class RayTaskError(Exception):
    def __init__(self, cause):
        self.cause = cause


class Cluster:
    """What RayWorkers asks of ray, in this process: the job that was sent last is done first, and some are lost on the way."""

    def __init__(self, processors=2, losses=0):
        self.processors, self.losses = processors, losses
        lost = type("Lost", (Exception,), {})
        names = ("NodeDiedError", "LocalRayletDiedError", "ObjectLostError", "OutOfMemoryError")
        self.exceptions = SimpleNamespace(WorkerCrashedError=WorkerCrashedError, RayTaskError=RayTaskError, **dict.fromkeys(names, lost))
        self.put_away, self.cancelled, self.most = [], [], 0

    def remote(self, function):
        def send(threads, *parts):
            return (object(), lambda: function(threads, *parts))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=send))

    def put(self, value):
        self.put_away.append(value)
        return value

    def cluster_resources(self):
        return {"CPU": self.processors}

    def wait(self, references, num_returns):
        self.most = max(self.most, len(references))
        return references[-num_returns:], references[:-num_returns]

    def get(self, reference):
        if self.losses:
            self.losses -= 1
            raise WorkerCrashedError
        try:
            return reference[1]()
        except Exception as error:
            raise RayTaskError(error) from error

    def cancel(self, reference, force):
        self.cancelled.append(reference)


def add(common, job):
    if job == 7:
        raise NumericsError("layer: seven")
    if job == 8:
        raise ZeroDivisionError
    return common + job


def jobs(*numbers, common=1000):
    return ((common, number) for number in numbers)


@pytest.mark.parametrize("losses", [0, 1, 3])
def test_results_come_in_the_order_of_the_jobs_though_some_are_lost(losses):
    told, cluster = [], Cluster(losses=losses)
    workers = RayWorkers(cluster, told.append)
    assert list(workers.map(add, jobs(*range(7)))) == [1000 + number for number in range(7)]
    assert workers.lost == losses == len(told) and cluster.most <= 4
    assert all("was lost (WorkerCrashedError) and is done again" in line for line in told)


def test_jobs_are_asked_for_as_there_is_room_and_what_they_share_is_sent_once():
    cluster, asked = Cluster(processors=1), []

    def counted():
        shared = 5000
        for number in range(6):
            asked.append(number)
            yield shared, number

    results = RayWorkers(cluster, print).map(add, counted())
    assert next(results) == 5000 and len(asked) <= 3
    assert list(results) == [5001, 5002, 5003, 5004, 5005]
    assert len(cluster.put_away) == 1 + 6


def test_a_job_that_is_always_lost_ends_the_run():
    with pytest.raises(InputError, match=r"job 0 was lost 4 times .*nodes with more memory would be right"):
        list(RayWorkers(Cluster(processors=1, losses=9), lambda what: None).map(add, jobs(1)))


def test_what_a_job_raises_is_raised_here_and_the_others_are_cancelled():
    cluster = Cluster()
    with pytest.raises(NumericsError, match="layer: seven"):
        list(RayWorkers(cluster, print).map(add, jobs(1, 2, 3, 7)))
    assert len(cluster.cancelled) == 3
    with pytest.raises(RayTaskError):
        list(RayWorkers(Cluster(), print).map(add, jobs(8)))


def test_no_address_is_this_process_and_a_wrong_one_is_named(monkeypatch):
    with open_workers(None) as workers:
        assert isinstance(workers, ThisProcess)
    pytest.importorskip("ray", reason="ray is not installed")
    for address in ("127.0.0.1:1", "nowhere", "127.0.0.1:x", "ray://127.0.0.1:1"):
        with pytest.raises(InputError, match=r"no Ray cluster answers at .*local, auto or HOST:PORT would be right"), open_workers(address):
            pass
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'fewbits\[ray\]'"), open_workers("local"):
        pass


def contents(folder):
    """Every file; of records, what does not tell of time."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in TIMED:
            found[str(path.relative_to(folder))] = path.read_bytes()
            if path.name in ("fewbits.json", "allocation.json"):
                found[str(path.relative_to(folder))] = without_times(json.loads(path.read_text()))
    return found


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key not in ("seconds", "peak_memory_bytes")}
    return value


@pytest.mark.slow
def test_a_node_that_is_killed_in_the_middle_changes_no_byte(small_model):
    pytest.importorskip("ray", reason="ray is not installed")
    root = small_model(2)
    command = [sys.executable, str(Path(__file__).with_name("on_ray_program.py")), str(root)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["seen"] == ["killed while it made a run"] and report["lost"]
    here, there = contents(root / "here"), contents(root / "there")
    assert here == there
    runs = [name for name in there if name.startswith("compared/runs/") and name.endswith("scores.safetensors")]
    assert len(runs) == 6 and {"compressed/model.safetensors", "allocated/recipe.toml", "compared/compare.json"} <= there.keys()
