"""Two node processes on one machine; the second is killed while it makes a run of a comparison. Arguments: the folder of a small model."""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster

import fewbits
from fewbits.comparison.samples import Samples
from fewbits.core.workers import ThisProcess
from fewbits.methods.weights.gptq import Gptq
from fewbits.mixed_precision import Request
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.on_ray import open_workers

HEALTH = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 300, "health_check_failure_threshold": 3}
MEMORY = {"object_store_memory": 100 * 2**20}
METHODS = ["rtn:bits=3,group_size=16", *(f"gptq:bits={bits},group_size=16" for bits in (2, 3, 4, 8))]


def busy(raylet):
    """The process of a node that does a job just now, or None."""
    for folder in Path("/proc").iterdir():
        try:
            mine = folder.name.isdigit() and f"\nPPid:\t{raylet}\n" in (folder / "status").read_text()
            if mine and (folder / "cmdline").read_text().startswith("ray::_do"):
                return int(folder.name)
        except OSError:
            continue  # it ended meanwhile
    return None


def kill_while_busy(cluster, node, seen):
    """Waits until the node does a job, stops it there, and kills the node."""
    raylet = node.all_processes["raylet"][0].process.pid
    while True:
        worker = busy(raylet)
        if worker is not None:
            os.kill(worker, signal.SIGSTOP)
            if busy(raylet) == worker:  # it did not end before it was stopped
                break
            os.kill(worker, signal.SIGCONT)
        time.sleep(0.02)
    cluster.remove_node(node, allow_graceful=False)
    os.kill(worker, signal.SIGKILL)
    seen.append("killed while it made a run")


def do_all(root, workers, name, before_compare=lambda: None):
    text, held = (fewbits.TextSample(str(root / f"{one}.txt"), 3, 16) for one in ("text", "held"))
    options = StreamOptions(workers=workers)
    fewbits.compress(root / "model", Gptq(bits=3, group_size=16), root / name / "compressed", calibration=text, options=options, probe=None)
    request = Request("3.5bpw", ("rtn:group_size=16",), (2, 4, 8), "kl", windows=2)
    fewbits.allocate(root / "model", request, root / name / "allocated", calibration=text, heldout=held, options=options)
    before_compare()
    settings = fewbits.CompareSettings(samples=Samples(("def f",), 2), noise_windows=0)
    fewbits.compare(root / "model", METHODS, root / name / "compared", calibration=text, text=held, settings=settings, options=options)


def main():
    root = Path(sys.argv[1])
    do_all(root, ThisProcess(), "here")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as logs:
        os.environ["RAY_TMPDIR"] = logs  # where a cluster notes its address, in a folder that it expects to be there
        (Path(logs) / "ray").mkdir()
        head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": logs, "_system_config": HEALTH, **MEMORY}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        node, seen, lost = cluster.add_node(num_cpus=1, **MEMORY), [], []
        watcher = threading.Thread(target=kill_while_busy, args=(cluster, node, seen), daemon=True)
        with open_workers(cluster.address, lost.append) as workers:
            do_all(root, workers, "there", watcher.start)
        watcher.join(60)
        cluster.shutdown()
    print(json.dumps({"seen": seen, "lost": lost}))


if __name__ == "__main__":
    main()
