"""What is said of a compressed linear's error is what whole products say."""

import pytest
import torch

from fewbits.core.method import Statistics
from fewbits.layers.linear import StoredLinear
from fewbits.methods.weights.rtn import Rtn
from fewbits.pipeline.entries import layer_entry


@pytest.mark.parametrize("columns", [16, 128, 200, 2100])
def test_the_error_is_that_of_the_outputs(columns):
    torch.manual_seed(columns)
    weight, inputs = torch.randn(12, columns), torch.randn(300, columns) @ torch.randn(columns, columns) + 1
    stored = StoredLinear(Rtn(bits=3, group_size=None).compress(weight, Statistics()))
    said = layer_entry("linear", weight, stored, inputs.T @ inputs, 300)
    lost = (weight - stored.weight.decode()).double()
    exact = (inputs.double() @ lost.T).square().sum() / (inputs.double() @ weight.double().T).square().sum()
    assert said["error_of"] == "outputs"
    assert said["relative_error"] == pytest.approx(float(exact), rel=1e-4)
    plain = layer_entry("linear", weight, stored, None, None)["relative_error"]
    assert plain == pytest.approx(float(lost.square().sum() / weight.double().square().sum()), rel=1e-4)
