"""The operators in torch's own eyes: one graph, the right shapes."""

import pytest
import torch

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.dense import Dense
from fewbits.formats.mixed_groups import MixedGroups
from fewbits.formats.stepped import Stepped
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, native
from fewbits.layers.embedding import CompressedEmbedding
from fewbits.layers.linear import CompressedLinear, StoredLinear

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def term() -> Uniform:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (12, 64), generator=generator)
    scales, zeros = torch.rand(12, 4, generator=generator).half() + 0.1, torch.randint(16, (12, 4), generator=generator)
    return Uniform.from_codes(codes, scales, zeros, bits=4, group_size=16)


def test_a_compiled_layer_is_one_graph_and_runs_the_kernel():
    layer = CompressedLinear(StoredLinear(CompressedTensor((term(),))), torch.randn(12))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for vectors in (1, 5, 40):
            inputs, before = torch.randn(vectors, 64), dispatch.counts.copy()
            torch.testing.assert_close(compiled(inputs), layer(inputs))
            whole = vectors <= dispatch.FEW_VECTORS or native.takes_many(native.chosen(), inputs.dtype)
            name = "multiply" if whole else "decode"
            assert dispatch.counts[name] == before[name] + 2  # once compiled, once not


@pytest.mark.parametrize("two_levels", [False, True])
def test_minimums_keep_one_graph(two_levels):
    torch._dynamo.reset()  # other tests' layers count among the forms that are compiled
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.rand(12, 4, generator=generator).half() for _ in range(2)]
    if two_levels:
        codes = torch.randint(64, (12, 4), generator=generator)
        numbers = [Stepped.from_codes(codes, unit[:, :1].contiguous(), None, bits=6, group_size=4) for unit in numbers]
    table = Stepped.from_codes(torch.randint(16, (12, 64), generator=generator), *numbers, bits=4, group_size=16)
    layer = CompressedLinear(StoredLinear(CompressedTensor((table,))))
    compiled, inputs = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(2, 64, generator=generator)
    with torch.no_grad():
        assert torch.equal(compiled(inputs), layer(inputs))


def test_the_operators_pass_torchs_checks():
    matrix = term().described()
    tensors, layout = list(matrix.tensors), list(matrix.layout)
    checks = ("test_schema", "test_faketensor")
    found = [
        torch.library.opcheck(torch.ops.fewbits.multiply.default, (torch.randn(2, 3, 64), tensors, layout), test_utils=checks),
        torch.library.opcheck(torch.ops.fewbits.decode.default, (tensors, layout, 2, 9, torch.bfloat16), test_utils=checks),
    ]
    assert found == [dict.fromkeys(checks, "SUCCESS")] * 2


def test_groups_of_two_widths_are_described_without_reading_them():
    generator = torch.Generator().manual_seed(0)
    chosen = torch.arange(4).expand(12, 4) < 2
    scales, zeros = (Dense(torch.rand(12, 4, generator=generator).half() + 0.1) for _ in range(2))
    codes = torch.randint(4, (12, 64), generator=generator).to(torch.uint8)
    table = MixedGroups.from_codes(codes, chosen, scales, zeros, widths=(2, 4), group_size=16)
    layer = CompressedLinear(StoredLinear(CompressedTensor((table,))))
    compiled, inputs = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(2, 64, generator=generator)
    with torch.no_grad():
        assert torch.equal(compiled(inputs), layer(inputs))


def test_a_compiled_embedding_is_one_graph_and_decodes_its_rows_natively():
    table = CompressedEmbedding(StoredLinear(CompressedTensor((term(),))))
    compiled, tokens = torch.compile(table, fullgraph=True, backend="aot_eager"), torch.tensor([[3, 11, 3]])
    with torch.no_grad():
        before = dispatch.counts["decode"]
        assert torch.equal(compiled(tokens), table(tokens))
        assert dispatch.counts["decode"] == before + 2  # once compiled, once not
