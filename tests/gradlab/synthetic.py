"""Agents' gradients with known truth: Gaussian cluster sums of chosen means, noise and sharing."""

import numpy as np

from gradlab.cluster_products import ClusterProducts


def products_of(sums, count=None):
    """Products by cluster, as loops, of sums [agent, cluster, param] as a single layer."""
    agents, clusters, _ = sums.shape
    count = np.ones((agents, clusters), int) if count is None else count
    within, across = np.zeros((2, clusters, agents, agents))
    following = np.zeros((clusters - 1, agents, agents))
    for e in range(clusters):
        for i in range(agents):
            for k in range(agents):
                within[e, i, k] = sums[i, e] @ sums[k, e]
                across[e, i, k] = sums[i, e] @ sums[k].sum(0)
                if e + 1 < clusters:
                    following[e, i, k] = sums[i, e] @ sums[k, e + 1]
    return ClusterProducts(
        layers=("layer",),
        count=count,
        within=within[None],
        across=across[None],
        following=following[None],
    )


def fast_products(sums):
    """The same by einsum, of one gradient in each cluster."""
    agents, clusters, _ = sums.shape
    total = sums.sum(1)
    return ClusterProducts(
        layers=("layer",),
        count=np.ones((agents, clusters), int),
        within=np.einsum("iep,kep->eik", sums, sums)[None],
        across=np.einsum("iep,kp->eik", sums, total)[None],
        following=np.einsum("iep,kep->eik", sums[:, :-1], sums[:, 1:])[None],
    )


def mean_gradients(agents, cosine, params):
    """Unit vectors of which each two have the same cosine."""
    gram = np.full((agents, agents), cosine) + (1 - cosine) * np.eye(agents)
    values, vectors = np.linalg.eigh(gram)
    means = np.zeros((agents, params))
    means[:, :agents] = vectors * np.sqrt(values.clip(0))
    return means


def draw(random, means, clusters, snr, shared=0.0, spectrum=0.0):
    """Clusters' gradients [agent, cluster, param].

    `snr` is |mean|^2 over the trace of the noise's covariance in one cluster (of unit means),
    `shared` the correlation of two agents' noise within a cluster, `spectrum` makes the noise's
    coordinates differ: variances fall as 1 / rank^spectrum.
    """
    agents, params = means.shape
    scale = np.arange(1, params + 1.0) ** -spectrum
    scale = np.sqrt(scale / scale.sum() / snr)
    common = random.standard_normal((1, clusters, params))
    own = random.standard_normal((agents, clusters, params))
    noise = np.sqrt(shared) * common + np.sqrt(1 - shared) * own
    return means[:, None] + scale * noise
