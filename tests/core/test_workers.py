"""Jobs that are sent away as bytes and done in another order give the same files as those done here."""

import pickle

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from fewbits.allocation.trials import TrialSettings, try_options
from fewbits.comparison.compare import CompareSettings, compare
from fewbits.comparison.samples import Samples
from fewbits.core.errors import InputError
from fewbits.core.workers import ThisProcess
from fewbits.data.text import TextSample
from fewbits.methods.activations.smoothquant import Smoothquant
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.mixllm import Mixllm
from fewbits.methods.weights.rtn import Rtn
from fewbits.methods.weights.squeezellm import Squeezellm
from fewbits.models.source import open_model
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.store import Store
from fewbits.pipeline.stream import compress_model

TOKENS = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))


class Elsewhere:
    """Gets everything as bytes, does the last job first, and gives bytes back."""

    def __init__(self):
        self.sizes = []

    def map(self, function, jobs):
        sent = [pickle.dumps((function, common, job)) for common, job in jobs]
        self.sizes += map(len, sent)
        done = [pickle.dumps(self.do(one)) for one in reversed(sent)]
        yield from (pickle.loads(one) for one in reversed(done))

    def do(self, sent):
        function, common, job = pickle.loads(sent)
        return function(common, job)


def contents(folder, without=()):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in without]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def compressed(model, plan, work, workers, **options):
    compress_model(open_model(model), plan, TOKENS, work, StreamOptions(workers=workers, **options))
    return contents(work)


PLANS = {
    "propagated": Plan(Gptq(bits=3, group_size=16)),
    "two methods": Plan(Rtn(bits=4, group_size=16), ("*.1.*v_proj",), (("*q_proj", Gptq(bits=2, group_size=16)),)),
    "gradients": Plan(Squeezellm(bits=3)),
    "planned over the model": Plan(Mixllm(group_size=16)),
    "scales and activations": Plan(Smoothquant(bits=8)),
    "embeddings": Plan(Gptq(bits=3, group_size=16), embeddings=Rtn(bits=4, group_size=16)),
}


@pytest.mark.parametrize("name", PLANS)
def test_layers_solved_elsewhere_are_the_same_bytes(learned, tmp_path, name):
    here = compressed(learned, PLANS[name], tmp_path / "here", ThisProcess())
    assert "block-00001.safetensors" in here
    assert compressed(learned, PLANS[name], tmp_path / "there", workers := Elsewhere()) == here
    assert len(workers.sizes) >= 8


def test_experts_in_bfloat16_solved_elsewhere_are_the_same_bytes(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=4, **sizes)).save_pretrained(tmp_path / "model")
    plan, options = Plan(Gptq(bits=3, group_size=8)), {"dtype": torch.bfloat16, "inputs": "original"}
    here = compressed(tmp_path / "model", plan, tmp_path / "here", ThisProcess(), **options)
    assert compressed(tmp_path / "model", plan, tmp_path / "there", workers := Elsewhere(), **options) == here
    assert len(workers.sizes) == 2 * (2 + 2 * 4)  # attention in and out, then two for each expert


def test_weights_travel_by_name(learned, tmp_path):
    compressed(learned, Plan(Rtn(bits=3, group_size=16)), tmp_path / "work", workers := Elsewhere())
    assert max(workers.sizes) < 4 * 64 * 64 < 4 * 96 * 64  # bytes of the smallest layers that are sent alone


@pytest.mark.parametrize("kind", ["output", "hessian", "fisher", "kl"])
def test_options_tried_elsewhere_lose_the_same(learned, tmp_path, kind):
    options = [Gptq(bits=3, group_size=16), Squeezellm(bits=3), Smoothquant(bits=8)]

    def tried(work, workers):
        stream = StreamOptions(workers=workers)
        return try_options(open_model(learned), options, (TOKENS, None), work, TrialSettings(kind, 6), stream)

    here = tried(tmp_path / "here", ThisProcess())
    assert tried(tmp_path / "there", workers := Elsewhere()) == here
    assert len(workers.sizes) == 2 * 4 * len(options)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.slow
def test_runs_made_elsewhere_are_the_same_files(small_model, tmp_path, monkeypatch):
    root = small_model(2)
    texts = {"calibration": TextSample(str(root / "text.txt"), 3, 16), "text": TextSample(str(root / "held.txt"), 3, 16)}
    settings = CompareSettings(repeats=2, samples=Samples(("def f",), 2), noise_windows=2)
    monkeypatch.chdir(root)
    for name, workers in {"here": ThisProcess(), "there": (elsewhere := Elsewhere())}.items():
        methods = ["rtn:bits=3,group_size=16", "gptq:bits=3,group_size=16", "cbq:steps=2"]
        compare("model", methods, name, **texts, settings=settings, options=StreamOptions(workers=workers))
    timed = ("timing.json", "report.html", "table.md", "table.csv")
    here, there = contents(root / "here", timed), contents(root / "there", timed)
    assert here == there and "compare.json" in here and len(elsewhere.sizes) == 5
    assert not list((root / "there" / "work").glob("*"))
    compare("model", ["rtn:bits=3,group_size=16"], "there", **texts, settings=settings, options=StreamOptions(workers=elsewhere))
    assert len(elsewhere.sizes) == 5  # nothing that is there is sent again


def test_a_job_is_asked_for_when_its_result_is():
    asked = []

    def jobs():
        for number in range(3):
            asked.append(number)
            yield 10, number

    done = ThisProcess().map(lambda common, job: common + job, jobs())
    assert next(done) == 10 and asked == [0] and list(done) == [11, 12]


def test_another_model_and_a_folder_that_is_not_shared_are_named(small_model, learned, tmp_path):
    root = small_model(2)
    source = pickle.dumps(open_model(root / "model"))
    (root / "model").rename(root / "old")
    (root / "model").symlink_to(learned)
    with pytest.raises(InputError, match="the same model at the same place on every node"):
        pickle.loads(source)
    store = Store(root / "store", {})
    sent = pickle.dumps(store)
    assert pickle.loads(sent).folder == store.folder.resolve()
    (root / "store").rename(root / "moved")
    with pytest.raises(InputError, match="a folder that all nodes share"):
        pickle.loads(sent)
