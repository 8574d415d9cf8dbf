import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA

from fewbits.core.errors import InputError
from fewbits.solvers.similarity import canonical_correlations, leading, linear_cka, pwcca, svcca


def gaussian(samples, features, seed):
    return torch.randn(samples, features, generator=torch.Generator().manual_seed(seed))


def related(samples=400):
    """Two views of five hidden features, with noise of their own."""
    hidden = gaussian(samples, 5, 0)
    return hidden @ gaussian(5, 12, 1) + 0.5 * gaussian(samples, 12, 2), hidden @ gaussian(5, 9, 3) + 0.5 * gaussian(samples, 9, 4)


def test_correlations_equal_those_of_scikit_learn():
    first, second = related()
    fitted = CCA(n_components=3, scale=False, max_iter=5000, tol=1e-12)
    with torch.no_grad():
        one, two = fitted.fit_transform(first.numpy(), second.numpy())
    expected = [np.corrcoef(one[:, index], two[:, index])[0, 1] for index in range(3)]
    assert canonical_correlations(first, second)[:3].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_change_of_basis_changes_nothing():
    first, second = related()
    turned = first.double() @ gaussian(12, 12, 5).double() + 3.0
    torch.testing.assert_close(canonical_correlations(turned, second), canonical_correlations(first, second), rtol=1e-8, atol=1e-8)
    rotation = torch.linalg.qr(gaussian(12, 12, 6).double())[0]
    for measure in (svcca, pwcca, linear_cka):
        assert measure(first.double() @ rotation * 2, second) == pytest.approx(measure(first, second), abs=1e-9)
        assert measure(first, first) == pytest.approx(1.0, abs=1e-9) and measure(first, second) < 0.99


@pytest.mark.parametrize(("samples", "features"), [(500, 64), (400, 100)])
def test_unrelated_features_correlate_by_chance_as_theory_says(samples, features):
    share = features / samples
    found = canonical_correlations(gaussian(samples, features, 0), gaussian(samples, features, 1))
    assert float(found[0]) == pytest.approx(2 * (share * (1 - share)) ** 0.5, abs=0.04)


def test_with_no_more_samples_than_features_everything_correlates():
    found = canonical_correlations(gaussian(40, 40, 0), gaussian(40, 40, 1))
    assert found.tolist() == pytest.approx([1.0] * 39, abs=1e-9)


def test_leading_directions_hold_the_variance_asked_for():
    features = gaussian(200, 6, 0) * torch.tensor([10.0, 5.0, 1.0, 0.1, 0.1, 0.1])
    assert leading(features, 20).shape == (200, 6) and leading(features, 2).shape == (200, 2)
    assert leading(features, 20, 0.95).shape == (200, 2)
    assert float(leading(features, 3).square().sum()) == pytest.approx(float((features - features.mean(0)).square().sum()), rel=1e-3)
    with pytest.raises(InputError, match="200 and 199 samples"):
        canonical_correlations(features, features[1:])
