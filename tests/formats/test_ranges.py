import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.formats.ranges import fit_uniform, round_codes


def error(weight, search, power=2.0, **options):
    scale, zero = fit_uniform(weight, 3, search=search, **options)
    return ((round_codes(weight, scale, zero, 3) - zero) * scale - weight).abs().pow(power).sum(1)


def test_each_search_wins_at_what_it_searches_for():
    weight = torch.distributions.StudentT(3.0).sample((16, 256))
    assert bool((error(weight, "mse") <= error(weight, "minmax")).all())
    assert bool((error(weight, "mse") <= error(weight, "shrink") + 1e-4).all())
    assert bool((error(weight, "shrink", 2.4) <= error(weight, "mse", 2.4) + 1e-4).all())
    assert error(weight, "mse").sum() < 0.8 * error(weight, "minmax").sum()


def test_a_percentile_cuts_the_tails():
    weight = torch.linspace(-1, 1, 1001)[None]
    scale, zero = fit_uniform(weight, 4, search="percentile", percentile=0.9)
    assert scale.item() == pytest.approx(1.6 / 15) and zero.item() == 8
    torch.testing.assert_close(fit_uniform(weight, 4, search="percentile", percentile=1.0), fit_uniform(weight, 4))
    with pytest.raises(InputError, match=r"percentile=0\.2 is out of range"):
        fit_uniform(weight, 4, search="percentile", percentile=0.2)
