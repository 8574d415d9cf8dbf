import pytest
import torch
from sklearn.cluster import KMeans

from fewbits.core.errors import InputError
from fewbits.solvers import vector_kmeans
from fewbits.solvers.vector_kmeans import cluster_vectors, nearest


def vectors(count=2000, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator), torch.rand(count, generator=generator).pow(6)


def error(values, weights, centroids):
    return float((weights * nearest(values, centroids)[1]).sum())


def test_more_iterations_never_lose_and_the_codes_are_the_nearest():
    values, weights = vectors()
    errors = [error(values, weights, cluster_vectors(values, 32, weights=weights, iterations=i, tolerance=0)[0]) for i in (0, 1, 2, 5, 20)]
    assert errors == sorted(errors, reverse=True)
    centroids, codes = cluster_vectors(values, 32, weights=weights)
    assert torch.equal(codes, torch.cdist(values.double(), centroids.double()).argmin(1))


def test_it_ends_as_near_as_scikit_learn_and_weights_matter():
    values, weights = vectors()
    ours = [error(values, weights, cluster_vectors(values, 32, weights=weights, seed=seed)[0]) for seed in range(5)]
    peer = KMeans(32, n_init=5, random_state=0).fit(values.numpy(), sample_weight=weights.numpy())
    assert min(ours) < 1.05 * peer.inertia_ and max(ours) < 1.15 * peer.inertia_
    assert max(ours) < 0.95 * error(values, weights, cluster_vectors(values, 32)[0])


def test_few_different_vectors_are_kept_as_they_are():
    values = vectors(10)[0].repeat(3, 1)
    for count in (10, 16):
        centroids, codes = cluster_vectors(values, count)
        assert centroids.shape == (count, 4) and torch.equal(centroids[codes], values)


def test_faiss_finds_what_torch_finds(monkeypatch):
    pytest.importorskip("faiss", reason="the extra `vectors` is not installed")
    values, weights = vectors(20000)
    with_faiss = cluster_vectors(values, 64, weights=weights)
    monkeypatch.setattr(vector_kmeans, "faiss_library", lambda: None)
    with_torch = cluster_vectors(values, 64, weights=weights)
    for count in (7, 64):  # one step: the same vectors go to the same centroids, but for ties
        centroids = with_torch[0][:count]
        ours = nearest(values, centroids)
        monkeypatch.undo()
        theirs = nearest(values, centroids)
        monkeypatch.setattr(vector_kmeans, "faiss_library", lambda: None)
        assert float((ours[0] != theirs[0]).float().mean()) < 1e-3
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)
    # A tie decided otherwise can lead k-means elsewhere, not to a worse end.
    assert error(values, weights, with_faiss[0]) == pytest.approx(error(values, weights, with_torch[0]), rel=1e-2)


def test_no_centroid_stays_empty():
    values = torch.cat([torch.zeros(500, 2), 10 + vectors(500, 2)[0]])  # half of the start falls on one point
    codes = cluster_vectors(values, 20)[1]
    assert len(codes.unique()) == 20


def test_it_is_the_same_every_time_and_vectors_of_no_weight_do_not_count():
    values, weights = vectors(400)
    first, second = (cluster_vectors(values, 8, weights=weights, seed=3) for _ in range(2))
    assert torch.equal(first[0], second[0])
    weights[200:] = 0
    values[200:] = 1e3
    assert float(cluster_vectors(values, 8, weights=weights)[0].abs().max()) < 10


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match="0 centroids"):
        cluster_vectors(vectors(5)[0], 0)
    with pytest.raises(InputError, match="do not fit 5 vectors"):
        cluster_vectors(vectors(5)[0], 2, weights=torch.ones(4))
