"""Statistics gathered once must be those that every run would gather for itself, bit for bit."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.methods.weights.awq import Awq
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.lord import Lord
from fewbits.methods.weights.rtn import Rtn
from fewbits.methods.weights.squeezellm import Squeezellm
from fewbits.models.adapter import Adapter
from fewbits.models.source import open_model
from fewbits.pipeline.dense_pass import DensePass, reads_text
from fewbits.pipeline.feed import Feed, StreamOptions
from fewbits.pipeline.gather import gather_inputs
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.moments import Moments
from fewbits.statistics.ranges import Ranges
from fewbits.statistics.sample import Sample
from fewbits.statistics.sequence_norms import SequenceNorms

WINDOWS = torch.randint(64, (10, 32), generator=torch.Generator().manual_seed(3))
ALL = (Hessian, Moments, Ranges, Sample, SequenceNorms)


def stored(summary):
    return {f"{name}/{key}": tensor for name, layer in summary.layers() for key, tensor in layer.tensors().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_every_statistic_comes_back_as_it_was_gathered(learned, tmp_path):
    source = open_model(learned)
    dense = DensePass(source, WINDOWS, None, tmp_path)
    dense.gather(ALL)
    shell = source.shell()
    feed = Feed(source, shell, WINDOWS, None, StreamOptions())
    hidden = torch.cat(list(feed.first_inputs()))
    for index, name in enumerate(dense.blocks):
        source.load_module(shell, name)
        linears = Adapter(shell).linears(name)
        with torch.no_grad():
            outputs, expected = gather_inputs(feed, [name], linears, ALL, hidden, True)
        found = dense.statistics(index, ALL, linears)
        assert list(found) == list(expected) and len(found) == 4
        for group, one in expected.items():
            assert found[group].tokens == one.tokens == WINDOWS.numel()
            for kind in ALL:
                ours, theirs = vars(found[group][kind]), vars(one[kind])
                assert ours.keys() == theirs.keys()
                assert all(
                    torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value
                    for key, value in theirs.items()
                )
        hidden = torch.cat(outputs)
    with pytest.raises(InputError, match="lacks the last hidden states"):
        dense.final()


@pytest.mark.parametrize("method", [Gptq(bits=3, group_size=16), Awq(bits=3, group_size=16), Lord(share=0.6), Squeezellm(bits=3)])
@pytest.mark.parametrize("inputs", ["original", "propagated"])
def test_a_run_on_kept_statistics_stores_what_a_run_of_its_own_stores(learned, tmp_path, method, inputs):
    source, options = open_model(learned), StreamOptions(inputs=inputs)
    dense = DensePass(source, WINDOWS, None, tmp_path / "shared")
    dense.gather(method.needs, blocks=None if inputs == "original" else 1)
    own = compress_model(source, Plan(method), WINDOWS, tmp_path / "own", options)
    shared = compress_model(source, Plan(method), WINDOWS, tmp_path / "shared-run", options, None, dense)
    assert same(stored(own), stored(shared)) and same(own.replaced(), shared.replaced())


def test_padding_and_layers_that_stay_dense_are_left_out(learned, tmp_path):
    source, method = open_model(learned), Gptq(bits=3, group_size=16)
    mask = torch.arange(32) < torch.randint(8, 33, (10, 1), generator=torch.Generator().manual_seed(0))
    plan, options = Plan(method, keep=("*.0.self_attn.q_proj",)), StreamOptions(inputs="original")
    dense = DensePass(source, WINDOWS, mask, tmp_path / "shared")
    dense.gather([Hessian])
    own = compress_model(source, plan, WINDOWS, tmp_path / "own", options, mask)
    assert same(stored(own), stored(compress_model(source, plan, WINDOWS, tmp_path / "again", options, mask, dense)))


def test_what_is_missing_is_added_and_nothing_else(learned, tmp_path):
    source = open_model(learned)
    dense = DensePass(source, WINDOWS, None, tmp_path)
    dense.gather([Hessian], final=True)
    files = {path: path.stat().st_mtime_ns for path in dense.store.folder.glob("state-hessian*")}
    DensePass(source, WINDOWS, None, tmp_path).gather([Hessian, Moments], final=True)
    assert len(files) == 2 and all(path.stat().st_mtime_ns == then for path, then in files.items())
    assert len(list(dense.store.folder.glob("state-moments*"))) == 2
    assert dense.final()[0].shape == (10, 32, 64)
    other = DensePass(source, WINDOWS.flip(0), None, tmp_path)
    assert other.key != dense.key and other.store.folder != dense.store.folder


def test_the_second_moment_judges_any_layer(learned, tmp_path):
    dense = DensePass(open_model(learned), WINDOWS, None, tmp_path)
    dense.gather([Hessian])
    group = next(iter(dense.statistics(1, [Hessian], Adapter(dense.shell).linears(dense.blocks[1])).items()))
    assert torch.equal(dense.moment(group[0][0]), group[1][Hessian].matrix)


def test_who_looks_at_text():
    assert not reads_text(Plan(Rtn())) and reads_text(Plan(Gptq())) and reads_text(Plan(Rtn(), overrides=(("*", Gptq()),)))


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from fewbits.models.source import open_model
    from fewbits.pipeline.dense_pass import DensePass
    from fewbits.pipeline.feed import StreamOptions
    from fewbits.statistics.hessian import Hessian

    def stop(block, *_):
        if block == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    windows = torch.load(sys.argv[3])
    DensePass(open_model(sys.argv[1]), windows, None, Path(sys.argv[2]), StreamOptions(progress=stop)).gather([Hessian], final=True)
"""


@pytest.mark.slow
def test_a_killed_pass_goes_on_behind_its_finished_blocks(learned, tmp_path):
    torch.save(WINDOWS, tmp_path / "windows.pt")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(learned), str(tmp_path / "killed"), str(tmp_path / "windows.pt")]
    threads = str(torch.get_num_threads())
    assert subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}, capture_output=True).returncode == -9
    seen, source = [], open_model(learned)
    again = DensePass(source, WINDOWS, None, tmp_path / "killed", StreamOptions(progress=lambda block, *_: seen.append(block)))
    again.gather([Hessian], final=True)
    whole = DensePass(source, WINDOWS, None, tmp_path / "whole")
    whole.gather([Hessian], final=True)
    assert seen == [1] and torch.equal(again.final()[0], whole.final()[0])
    files = sorted(path.name for path in whole.store.folder.iterdir())
    assert files == sorted(path.name for path in again.store.folder.iterdir())
    assert all((whole.store.folder / name).read_bytes() == (again.store.folder / name).read_bytes() for name in files)
