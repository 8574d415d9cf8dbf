import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.formats.additive import Additive, decode_additive


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.sampled_from([1, 2, 5, 256, 300]), st.integers(1, 5), st.integers(0, 4), st.booleans(), st.integers(0, 99))
def test_it_decodes_to_the_sum_and_takes_the_bits_it_says(books, entries, unit, missing, scaled, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, groups = 4, 7
    columns = groups * unit - min(missing, unit - 1)
    codes = torch.randint(entries, (rows, groups, books), generator=generator)
    codebooks = torch.randn(books, entries, unit, generator=generator).half()
    scales = torch.rand(rows, 1, generator=generator).half() if scaled else None
    term = Additive.from_codes(codes, codebooks, scales, columns=columns)
    assert torch.equal(term.unpacked_codes(), codes)
    one_by_one = torch.stack([sum(codebooks[m, codes[:, g, m]].float() for m in range(books)) for g in range(groups)], 1).flatten(1)
    expected = one_by_one[:, :columns] * (1 if scales is None else scales.float())
    torch.testing.assert_close(term.decode(), expected)
    width = {1: 1, 2: 1, 5: 3, 256: 8, 300: 9}[entries]
    bits = rows * 8 * -(-groups * books * width // 8) + 16 * books * entries * unit + (16 * rows if scaled else 0)
    assert sum(term.bits().values()) == bits
    assert torch.equal(from_stored(term.settings(), term.tensors()).decode(), term.decode())


def test_a_value_by_hand():
    codebooks = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]])
    term = Additive.from_codes(torch.tensor([[[1, 0], [0, 1]]]), codebooks, torch.tensor([[2.0]]))
    assert term.decode().tolist() == [[26.0, 48.0, 62.0, 84.0]]


def test_the_gradient_of_a_codebook_is_the_sum_over_its_codes():
    generator = torch.Generator().manual_seed(0)
    codes, codebooks = torch.randint(5, (3, 4, 2), generator=generator), torch.randn(2, 5, 2, generator=generator, requires_grad=True)
    upstream = torch.randn(3, 8, generator=generator)
    decode_additive(codes, codebooks, 8).backward(upstream)
    by_hand = torch.zeros(2, 5, 2)
    for row in range(3):
        for group in range(4):
            for book in range(2):
                by_hand[book, codes[row, group, book]] += upstream[row, 2 * group : 2 * group + 2]
    torch.testing.assert_close(codebooks.grad, by_hand)


def test_what_does_not_fit_is_named():
    codes, codebooks = torch.zeros(2, 3, 1, dtype=torch.int64), torch.zeros(1, 4, 2)
    for change, says in [
        ({"columns": 4}, "do not fit 4 columns"),
        ({"scales": torch.ones(3, 1)}, r"\[2, 1\] would"),
        ({"codebooks": codebooks * torch.inf}, "not finite"),
        ({"codes": codes + 4}, "a code of 4"),
    ]:
        with pytest.raises(InputError, match=says):
            Additive.from_codes(**{"codes": codes, "codebooks": codebooks} | change)
