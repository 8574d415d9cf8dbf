"""Who is asked for a product of tensors on a GPU, and what is refused before a kernel runs."""

import importlib.util
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.additive import Additive
from fewbits.formats.codebook import Codebook
from fewbits.formats.sparse import Sparse
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, layout
from fewbits.kernels.triton import gpu, structure
from fewbits.layers.linear import CompressedLinear, StoredLinear


def term(columns: int = 64) -> Uniform:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (12, columns), generator=generator)
    scales, zeros = (
        torch.rand(12, columns // 16, generator=generator).half() + 0.1,
        torch.randint(16, (12, columns // 16), generator=generator),
    )
    return Uniform.from_codes(codes, scales, zeros, bits=4, group_size=16)


def ran(compute) -> dict[str, int]:
    """How often each path computed in `compute()`."""
    before = dispatch.counts.copy()
    compute()
    return dict(dispatch.counts - before)


def test_the_operators_are_there_for_tensors_on_a_gpu():
    for name in ("fewbits::multiply", "fewbits::decode"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def test_on_a_gpu_one_operator_is_traced_for_any_number_of_vectors(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    here = term()
    with FakeTensorMode():
        tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda") for name, tensor in here.tensors().items()}
        matrix = Uniform(tensors["codes"], tensors["scales"], tensors["zero_points"], 12, 64, 4, 16)
        for vectors in (1, 500):
            found = matrix.matmul(torch.empty(vectors, 64, device="cuda", dtype=torch.bfloat16))
            assert found.device.type == "cuda" and found.shape == (vectors, 12) and found.dtype == torch.bfloat16
        assert matrix.decode().device.type == "cuda"
        monkeypatch.setattr(gpu, "available", lambda: False)
        before = dispatch.counts["definition"]
        assert dispatch.multiply(matrix.described(), torch.empty(1, 64, device="cuda")) is None
        assert dispatch.counts["definition"] == before + 1


def test_any_number_of_vectors_is_one_kernel(on_gpu):
    matrix = term()
    assert ran(lambda: matrix.matmul(torch.ones(3, 50, 64))) == {"multiply": 1}
    assert ran(matrix.decode) == {"decode": 1}
    assert matrix.matmul(torch.ones(0, 64)).shape == (0, 12)


def test_the_definition_serves_where_no_kernel_does(on_gpu, monkeypatch):
    matrix, one = term(), torch.ones(1, 64)
    books = torch.rand(2, 256, 8, generator=torch.Generator().manual_seed(1)).half()
    codewords = Additive.from_codes(torch.zeros(12, 8, 2, dtype=torch.int64), books, torch.ones(12, 1).half(), columns=64)
    runs = Codebook.from_codes(torch.zeros(12, 64, dtype=torch.int64), torch.ones(2, 1, 4), bits=2, row_ends=(5, 12))
    crowded = Sparse.from_dense(torch.ones(12, 64), torch.ones(12, 64) > 0)
    asked = torch.ones(1, 64, requires_grad=True)
    for compute in (
        lambda: codewords.matmul(one),
        lambda: runs.matmul(one),
        lambda: crowded.matmul(torch.ones(33, 64)),
        lambda: matrix.matmul(one.double()),
        lambda: matrix.matmul(asked),
    ):
        assert ran(compute) == {"definition": 1}
    monkeypatch.setenv("FEWBITS_FORCE_ISA", "none")
    assert ran(lambda: matrix.matmul(one)) == {"definition": 1}


def test_a_compiled_layer_is_one_graph_and_runs_the_kernels(on_gpu):
    torch._dynamo.reset()  # other tests' layers count among the forms that are compiled
    layer = CompressedLinear(StoredLinear(CompressedTensor((term(),))), torch.randn(12))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for vectors in (1, 40):
            inputs = torch.randn(vectors, 64)
            assert ran(lambda inputs=inputs: torch.testing.assert_close(compiled(inputs), layer(inputs))) == {"multiply": 2}


def test_no_triton_and_an_old_one_are_said(monkeypatch):
    gpu.available.cache_clear()
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"without its kernels, slower: pip install 'fewbits\[gpu\]' installs triton"):
        assert not gpu.available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gpu.available()  # said once
    gpu.available.cache_clear()
    if importlib.util.find_spec("triton") is not None:
        monkeypatch.undo()
        monkeypatch.setattr("triton.__version__", "3.2.0")
        with pytest.warns(UserWarning, match=r"they need triton 3\.3 or newer"):
            assert not gpu.available()
        gpu.available.cache_clear()


def test_what_the_dispatcher_imports_imports_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # an import would be an error
    for module in (gpu, structure):
        assert runpy.run_path(module.__file__)["read"] is not None
    with pytest.raises(ImportError):
        runpy.run_path(Path(gpu.__file__).with_name("launch.py"))


def test_sizes_that_do_not_fit_are_refused(on_gpu):
    matrix, inputs, refused = term().described(), torch.randn(1, 64), 0
    generator = torch.Generator().manual_seed(0)
    for turn in range(200):  # every size may be wrong, and every tensor too short
        sizes, tensors = list(matrix.layout), list(matrix.tensors)
        if turn % 3:
            place = int(torch.randint(2, len(sizes), (1,), generator=generator))
            sizes[place] = int(torch.randint(-2, 200, (1,), generator=generator)) * (1, 1, 2**33)[turn % 3]
        else:
            place = turn // 3 % len(tensors)
            tensors[place] = tensors[place][:-1].contiguous() if turn % 2 else tensors[place][:, :-1].contiguous()
        try:
            gpu.multiply(tensors, sizes, inputs)
        except ValueError:
            refused += 1
        else:
            assert structure.read(tuple(sizes)) == structure.read(matrix.layout) or turn % 3
    assert refused > 150


@pytest.mark.parametrize(
    "sizes, said",
    [
        ((12, 64, 4, 16, 0), "a layout ends too early"),
        ((12, 64, 10, 16, 0, 0, 0), "a matrix .12, 64. of 10 bits in groups of 16 cannot be"),
        ((12, 64, 4, 16, 0, layout.DENSE, 12, 5, 0, 0), "a table .12, 5. does not fit 12 rows of 4 groups"),
        ((12, 64, 4, 16, layout.DENSE, 1, 15, 0, 0, 0), "15 levels do not fit 4 groups and codes of 4 bits"),
        ((12, 64, 4, 16, 0, layout.PACKED, 12, 4, 0, 0), "levels and scales are not packed"),
        ((12, 64, 4, 16, 0, 9, 12, 4, 0, 0), "a table of kind 9 is not known"),
        ((12, 64, 2, 16, 0, 0, layout.SIGNS, 0), "signs have one bit, not 2"),
        ((12, 64, 2, 16, 0, 0, layout.MINIMUMS, layout.PACKED, 12, 4, 0), "offsets are not packed"),
        ((12, 64, 2, 16, 0, 0, layout.MINIMUMS, layout.SIGNS, 0), "a table of kind 5 is not known"),
        ((12, 64, layout.BASE_THREE, 16, layout.DENSE, 1, 512, 0, 0, 0), "neither levels nor zero points"),
        ((12, 64, 0, layout.PLAIN, 3), "numbers of kind 3 are not known"),
        ((12, 64, 0, layout.SPARSE, 0, 8, 5), "column indices of 8 bytes are not known"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        structure.read(sizes)


def test_inputs_rows_and_kinds_that_do_not_fit_are_refused(on_gpu):
    matrix, rows = term().described(), Sparse.from_dense(torch.ones(3, 8), torch.eye(3, 8) > 0)
    entries = layout.sparse(rows.values, rows.column_indices, rows.row_pointers, 8)
    with pytest.raises(ValueError, match="inputs of 60 features do not fit a matrix of 64 columns"):
        gpu.multiply(matrix.tensors, matrix.layout, torch.ones(1, 60))
    with pytest.raises(ValueError, match="rows 5 to 13 are not in a matrix of 12"):
        gpu.decode(matrix.tensors, matrix.layout, (5, 13), torch.float32)
    with pytest.raises(ValueError, match="sparse rows are not decoded by a kernel"):
        gpu.decode(entries.tensors, entries.layout, (0, 3), torch.float32)
    with pytest.raises(ValueError, match="no kernel for a GPU reads the layout"):
        gpu.multiply(matrix.tensors, (12, 64, 0, layout.VECTORS), torch.ones(1, 64))
    assert gpu.decode(matrix.tensors, matrix.layout, (4, 4), torch.float32).shape == (0, 64)
    assert torch.equal(gpu.decode(matrix.tensors, matrix.layout, (4, 9), torch.float32), term().define()[4:9])
