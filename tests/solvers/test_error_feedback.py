import pytest
import torch

from fewbits.core.errors import InputError, NumericsError
from fewbits.formats.ranges import fit_uniform, round_codes
from fewbits.kernels import native
from fewbits.solvers.error_feedback import Run, _inverse_factor, error_feedback, factorize


def problem(rows=6, columns=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator).double() @ torch.randn(columns, columns, generator=generator).double()
    return torch.randn(rows, columns, generator=generator).double(), inputs.T @ inputs / 100


def to_grid(_, column, __):
    return torch.round(column * 2) / 2


@pytest.mark.parametrize("block_size", [1, 32, 128, 40])
@pytest.mark.parametrize("fresh_every", [None, 16])
def test_the_errors_add_up_to_the_output_error(block_size, fresh_every):
    weight, hessian = problem()
    factor = factorize(hessian)
    rounded, errors = error_feedback(weight, factor, to_grid, block_size=block_size, fresh_every=fresh_every)
    difference = weight - rounded
    trace = torch.trace(difference @ factor.hessian @ difference.T)
    assert abs(float((errors**2).sum() - trace)) / float(trace) < 1e-8


@pytest.mark.parametrize("block_size", [1, 32, 128])
def test_the_block_size_changes_nothing(block_size):
    weight, hessian = problem(columns=150)
    factor = factorize(hessian)
    whole, _ = error_feedback(weight, factor, to_grid, block_size=150)
    assert torch.equal(error_feedback(weight, factor, to_grid, block_size=block_size)[0], whole)


def test_it_is_optimal_brain_quantization_in_a_fixed_order():
    """The oracle removes one row and column after another from H^-1 by rank-1 downdates (OBQ, arXiv 2208.11580)."""
    weight, hessian = problem(rows=4, columns=32)
    factor = factorize(hessian)
    expected, inverse = weight.clone(), torch.linalg.inv(factor.hessian)
    for j in range(32):
        error = (expected[:, j] - to_grid(j, expected[:, j], None)) / inverse[j, j]
        expected[:, j:] -= torch.outer(error, inverse[j, j:])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    torch.testing.assert_close(error_feedback(weight, factor, to_grid)[0], expected, rtol=0, atol=1e-9)


def test_uncorrelated_inputs_leave_plain_rounding():
    weight, hessian = problem()
    rounded, _ = error_feedback(weight, factorize(torch.diag(hessian.diagonal())), to_grid)
    assert torch.equal(rounded, to_grid(0, weight, None))


def test_damping_rises_where_the_matrix_is_not_positive(caplog):
    matrix = torch.eye(8).double()
    matrix[0, 1] = matrix[1, 0] = 1.05
    assert factorize(matrix).damping == pytest.approx(0.1)
    assert "trying 0.1" in caplog.text


def test_what_cannot_be_factored_ends_in_one_clear_line():
    with pytest.raises(NumericsError, match="not finite"):
        factorize(torch.full((4, 4), float("nan")))
    with pytest.raises(NumericsError, match="even with damping"):
        factorize(torch.eye(4) - 30 * torch.ones(4, 4) + 30 * torch.eye(4))


def test_dead_columns_are_named_and_do_not_disturb():
    weight, hessian = problem()
    hessian[3], hessian[:, 3] = 0, 0
    factor = factorize(hessian)
    assert factor.dead.nonzero().flatten().tolist() == [3]
    assert torch.isfinite(error_feedback(weight, factor, to_grid)[0]).all()


def test_a_factor_of_another_size_is_refused():
    weight, hessian = problem()
    with pytest.raises(InputError, match="do not fit a weight of 12 columns"):
        error_feedback(weight[:, :12], factorize(hessian), to_grid)


@pytest.mark.parametrize("columns", [1, 2, 40, 256, 257, 700])
def test_the_factor_is_that_of_the_inverse_and_lies_where_the_matrix_lay(columns):
    _, hessian = problem(columns=columns)
    hessian += 1e-3 * hessian.diagonal().mean() * torch.eye(columns)
    matrix = hessian.clone()
    upper = _inverse_factor(matrix)
    assert upper.data_ptr() == matrix.data_ptr() and upper.is_contiguous()
    assert torch.equal(upper, upper.triu()) and bool((upper.diagonal() > 0).all())
    torch.testing.assert_close(upper.T @ upper @ hessian, torch.eye(columns).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(upper, torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True), rtol=1e-7, atol=1e-10)


@pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
def test_a_uniform_grid_is_rounded_by_a_kernel(monkeypatch):
    monkeypatch.delenv("FEWBITS_FORCE_ISA", raising=False)
    monkeypatch.setattr("fewbits.solvers.error_feedback._round_columns", None)
    weight, hessian = problem(columns=64)
    grid = Grid(weight.float(), bits=3, group=16)
    rounded, _ = error_feedback(weight.float(), factorize(hessian, dtype=torch.float32), grid, fresh_every=16)
    assert bool(torch.isfinite(rounded).all())


@pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
@pytest.mark.parametrize("isa", native.available())
@pytest.mark.parametrize(("rows", "columns", "group"), [(5, 40, 40), (70, 96, 16), (33, 200, 64), (32, 130, 7)])
def test_a_kernel_rounds_runs_of_columns_as_the_definition_does(monkeypatch, isa, rows, columns, group):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    factor = factorize(inputs.T @ inputs, dtype=torch.float32)
    found = []
    for choice in (isa, "none"):
        monkeypatch.setenv("FEWBITS_FORCE_ISA", choice)
        grid = Grid(weight, bits=3, group=group)
        rounded, errors = error_feedback(weight, factor, grid, block_size=32, fresh_every=group)
        found.append((rounded, errors, grid.codes))
        # What is stored stands for what the engine returns, whoever rounded.
        decoded = (grid.codes.T.float() - grid.zeros.T.repeat_interleave(group, 1)[:, :columns]) * grid.scales.T.repeat_interleave(
            group, 1
        )[:, :columns]
        assert torch.equal(decoded, rounded)
        lost = (weight - rounded).double()
        assert float(errors.double().square().sum()) == pytest.approx(float(((lost @ factor.hessian) * lost).sum()), rel=1e-4)
    # Sums are rounded in another order: a weight that lies between two levels may fall on the other one.
    same = (found[0][2] == found[1][2]).float().mean()
    assert float(same) > 0.97
    assert float(found[0][1].square().sum()) == pytest.approx(float(found[1][1].square().sum()), rel=0.02)


class Grid:
    """A grid fitted on each group as it stands when its first column comes."""

    def __init__(self, weight, bits, group):
        rows, columns = weight.shape
        self.bits, self.group, groups = bits, group, -(-columns // group)
        self.scales, self.zeros = torch.zeros(groups, rows), torch.zeros(groups, rows)
        self.codes = torch.zeros(columns, rows, dtype=torch.uint8)

    def run(self, j, current):
        place = j // self.group
        if j % self.group == 0:
            scale, zero = fit_uniform(current[:, j : j + self.group], self.bits)
            self.scales[place], self.zeros[place] = scale[:, 0], zero[:, 0]
        return Run((place + 1) * self.group, self.scales[place], self.zeros[place], self.codes, self.bits)

    def __call__(self, j, column, current):
        run = self.run(j, current)
        code = round_codes(column, run.scales, run.zeros, self.bits)
        self.codes[j] = code.to(torch.uint8)
        return (code - run.zeros) * run.scales
