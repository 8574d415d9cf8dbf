import torch

from fewbits.statistics.sample import Sample


def test_it_keeps_different_tokens_from_the_whole_text_and_the_same_every_time():
    tokens = torch.arange(4000.0)[:, None].expand(-1, 3)
    first, second = Sample(3), Sample(3)
    for one in (first, second):
        for part in tokens.split(1000):
            one.update(part)
    assert torch.equal(first.inputs, second.inputs) and first.inputs.shape == (512, 3)
    kept = first.inputs[:, 0]
    assert len(kept.unique()) == 512 and all(64 < int(((kept >= low) & (kept < low + 1000)).sum()) < 192 for low in range(0, 4000, 1000))


def test_few_tokens_are_all_kept_and_padding_is_not():
    sample = Sample(2)
    sample.update(torch.arange(20.0).view(10, 2), torch.tensor([1.0, 0] * 5))
    assert sorted(sample.inputs[:, 0].tolist()) == [0, 4, 8, 12, 16]


def test_parts_merge_into_a_sample_of_both():
    left, right = Sample(1), Sample(1)
    left.update(torch.zeros(600, 1)), right.update(torch.ones(600, 1))
    left.merge(right)
    assert len(left.inputs) == 512 and 150 < float(left.inputs.sum()) < 362
