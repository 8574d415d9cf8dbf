import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.evaluation.streamed import ModelFromStates, StreamedModel
from fewbits.methods.weights.awq import Awq
from fewbits.models.source import open_model
from fewbits.pipeline.dense_pass import DensePass
from fewbits.pipeline.last_states import Replacements
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model
from fewbits.statistics.hessian import Hessian

WINDOWS = torch.randint(64, (6, 24), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return torch.cat([model(input_ids=batch, use_cache=False).logits for batch in WINDOWS.split(4)])


def test_the_reference_from_kept_states_is_the_model(learned, tmp_path):
    source = open_model(learned)
    dense = DensePass(source, WINDOWS, None, tmp_path)
    dense.gather([Hessian], final=True)
    whole = logits(source.load())
    assert torch.equal(logits(ModelFromStates.of(source, WINDOWS, dense.final())), logits(StreamedModel(learned, WINDOWS)))
    assert torch.allclose(logits(ModelFromStates.of(source, WINDOWS, dense.final())), whole, atol=1e-4)


def test_replaced_layers_and_norms_are_what_is_measured(learned, tmp_path):
    """A run whose scales were folded into norms, measured from its store, against the model put together by hand."""
    source = open_model(learned)
    made = compress_model(source, Plan(Awq(bits=3, group_size=16)), WINDOWS, tmp_path)
    names = ("model.layers.0", "model.layers.1")
    streamed = StreamedModel(learned, WINDOWS, replaced=Replacements(lambda name: made.store.layers(names.index(name)), made.replaced()))
    whole = source.load()
    assert made.replaced()
    for name, value in made.replaced().items():
        whole.get_parameter(name).data.copy_(value)
    for name, stored in made.layers():
        transforms = stored.weight.input_transforms
        weight = stored.weight.decode()
        whole.get_submodule(name).weight.data.copy_(weight)
        assert weight.shape == whole.get_submodule(name).weight.shape and len(transforms) <= 1
    found = logits(streamed)
    assert torch.allclose(found, logits(whole), atol=1e-3) and not torch.allclose(found, logits(source.load()), atol=1e-1)


def test_a_rewound_model_says_the_same_again(learned):
    streamed = StreamedModel(learned, WINDOWS)
    first = logits(streamed)
    streamed.rewind()
    assert torch.equal(logits(streamed), first)
    with pytest.raises(InputError, match="once unless it is rewound"):
        streamed(input_ids=WINDOWS)
