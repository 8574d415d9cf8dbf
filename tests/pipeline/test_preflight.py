import shutil
import time
from types import SimpleNamespace

import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model
from fewbits.pipeline import preflight
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.preflight import Estimate, check_room, estimate_run, said
from fewbits.pipeline.reconstruct import BlockMethod
from fewbits.pipeline.stream import compress_model

WINDOWS = torch.randint(64, (24, 48), generator=torch.Generator().manual_seed(0))
GB = 10**9


def test_only_the_first_block_is_run(learned, tmp_path):
    made = compress_model(open_model(learned), Plan(Gptq(bits=3, group_size=16)), WINDOWS[:4], tmp_path, StreamOptions(blocks=1))
    whole = compress_model(open_model(learned), Plan(Gptq(bits=3, group_size=16)), WINDOWS[:4], tmp_path / "whole")
    assert made.blocks == 1 and made.store.finished() == 1 and whole.store.finished() == 2
    first, again = dict(made.store.layers(0)), dict(whole.store.layers(0))
    assert first.keys() == again.keys() and all(torch.equal(first[name].weight.decode(), again[name].weight.decode()) for name in first)


def test_disk_is_reckoned_from_what_is_stored(learned, tmp_path):
    source = open_model(learned)
    estimate = estimate_run(source, Plan(Gptq(bits=3, group_size=16)), WINDOWS)
    summary = compress_model(source, Plan(Gptq(bits=3, group_size=16)), WINDOWS, tmp_path)
    stored = sum(sum(entry["bits"].values()) for block in range(2) for entry in summary.store.manifest(block)["layers"].values()) // 8
    hidden = WINDOWS.numel() * 64 * 4
    assert estimate.disk_bytes > 2 * stored + 2 * hidden  # the work and the result, and two blocks' inputs
    assert estimate.disk_bytes < 3 * stored + 2 * hidden + source.file_bytes() + 2 * 40_000  # with headers and manifests
    assert estimate.memory_bytes > 50_000_000 and estimate.seconds > 0 and estimate.without == ()


def test_twice_the_text_and_more_steps_take_longer(monkeypatch, learned):
    """Time is linear in batches and steps: with a clock that only they move, the estimate is exact."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)

    def work(source, plan, windows, folder, options, mask):
        clock.now += 5 + 2 * -(-len(windows) // options.batch_size) + 0.5 * getattr(plan.method, "steps", 0)
        return real(source, Plan(Rtn(bits=3)), windows[:4], folder / "own", options, mask)

    real = preflight.compress_model
    monkeypatch.setattr(preflight, "compress_model", work)
    source = open_model(learned)
    plain = estimate_run(source, Plan(Gptq(bits=3)), WINDOWS, StreamOptions(inputs="original"))
    assert plain.seconds == pytest.approx(2 * (5 + 2 * 6))  # two blocks, six batches
    both = estimate_run(source, Plan(Gptq(bits=3)), WINDOWS)
    assert both.seconds == pytest.approx(2 * (5 + 4 * 6))  # and what the compressed blocks make of them
    few = estimate_run(source, Plan(Rtn(bits=3)), WINDOWS[:4])
    assert estimate_run(source, Plan(Rtn(bits=3)), WINDOWS).seconds == few.seconds  # which sees a batch of any text
    from fewbits.methods.weights.gqsa import Gqsa

    method = Gqsa(steps=40, tune_steps=0)
    assert isinstance(method, BlockMethod)
    learns = estimate_run(source, Plan(method), WINDOWS, StreamOptions(inputs="original"))
    assert learns.seconds == pytest.approx(2 * (5 + 0.5 * 1 + 2 * 6 + 0.5 * 40))


def test_no_room_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10 * GB))
    monkeypatch.setattr(preflight, "available_memory", lambda: 4 * GB)
    check_room([Estimate(1, 3 * GB, 9 * GB)], tmp_path / "not" / "there")
    with pytest.raises(InputError, match=r"has 10.00 GB free, and the run needs about 11.00 GB"):
        check_room([Estimate(1, 3 * GB, 9 * GB), Estimate(1, 1, 11 * GB)], tmp_path)
    with pytest.raises(InputError, match=r"4.00 GB of memory are free, and the run needs about 5.00 GB"):
        check_room([Estimate(1, 5 * GB, 1)], tmp_path)
    monkeypatch.setattr(preflight, "available_memory", lambda: None)
    check_room([Estimate(1, 500 * GB, 1)], tmp_path)


def test_what_the_system_says_is_read():
    found = preflight.available_memory()
    assert found is None or 10**8 < found < 10**14


def test_estimates_are_said_in_units_that_people_use():
    assert said(Estimate(90, 2 * GB, GB // 2)) == "about 90 s, 2.00 GB of memory, 0.50 GB of disk"
    assert said(Estimate(600, GB, GB, ("ranking the terms",))).startswith("about 10 min, without ranking the terms, ")
    assert said(Estimate(9000, GB, GB)).startswith("about 2.5 h, ")


def test_a_batch_is_what_a_longer_run_takes_more_and_never_nothing():
    assert preflight.batch_seconds(2.0, 5.0) == 3.0
    assert preflight.batch_seconds(2.0, 1.0) == 0.5  # other work came between: half of the longer run
