"""Products by cluster in both spaces against dense per-sample gradients, and their pooling."""

import numpy as np
import pytest
import torch
from cases import AGENTS, DECOUPLED, case
from selection import slow_but
from synthetic import products_of
from test_factorisation import oracle

from gradlab.checks import UsageError
from gradlab.cluster_products import pooled
from gradlab.decomposition import decompose
from gradlab.factorisation import factorise

SAMPLES = 10
COPY = torch.tensor([4, 0, 1, 1, 7, 4, 0, 0, 7, 1])


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def agrees(found, per_sample, layout, exist=None):
    """Against per-sample gradients [agent, sample, param] of the whole network."""
    cluster = np.unique(COPY.numpy(), return_inverse=True)[1]
    exist = np.ones((AGENTS, SAMPLES), bool) if exist is None else exist
    count = np.stack([(exist & (cluster == e)).sum(1) for e in range(cluster.max() + 1)], 1)
    assert found.count.tolist() == count.tolist()
    assert found.layers == layout.layers
    for number, (_, part) in enumerate(layout.split_by_layer(per_sample)):
        rows = np.where(exist[..., None], part.numpy(), 0)
        sums = np.stack([rows[:, cluster == e].sum(1) for e in range(cluster.max() + 1)], 1)
        expected = products_of(sums)
        for name in ("within", "across", "following"):
            close(getattr(found, name)[number], getattr(expected, name)[0])


@pytest.mark.parametrize(
    "budget", [1, pytest.param(2**22, marks=pytest.mark.slow)], ids=["stretches", "whole"]
)
@pytest.mark.parametrize(
    ("method", "surrogate"),
    slow_but(
        [(method, "ppo-discrete") for method in DECOUPLED]
        + [(method, "value-recurrent") for method in ("hypermarl", "fups-id", "nops")],
        ("hypermarl", "ppo-discrete"),
        ("nops", "ppo-discrete"),
        ("adapters", "ppo-discrete"),
        ("fups-id", "value-recurrent"),
    ),
)
def test_products_equal_dense_ones(method, surrogate, budget):
    c = case(method, surrogate)
    d = decompose(c.generator, c.surrogate, c.batch, copy=COPY, budget=budget)
    _, _, z = oracle(c)
    agrees(d.products["theta"], z, d.theta_layout)
    jacobian = dense_jacobians(c)
    agrees(d.products["psi"], z @ jacobian, d.psi_layout)
    assert d.copies == 4


def test_samples_that_do_not_exist_are_left_out():
    c = case("hypermarl", "value")
    mask = torch.rand(AGENTS, SAMPLES, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1] = False  # absent from the batch
    d = decompose(c.generator, c.surrogate, c.batch, copy=COPY, mask=mask)
    _, _, z = oracle(c)
    agrees(d.products["theta"], z, d.theta_layout, mask.numpy())
    agrees(d.products["psi"], z @ dense_jacobians(c), d.psi_layout, mask.numpy())


def dense_jacobians(c):
    rows = []
    for agent in range(AGENTS):
        theta = c.generator(torch.tensor([agent]))
        values = torch.cat([t[0].flatten() for t in theta.values()])
        parameters = list(c.generator.parameters())
        gradients = [
            torch.autograd.grad(v, parameters, retain_graph=True, materialize_grads=True)
            for v in values
        ]
        rows.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients]))
    return torch.stack(rows)


def test_a_generator_that_reads_the_observation():
    c = case("hypermarl-coupled", "ppo-continuous")
    d = decompose(c.generator, c.surrogate, c.batch, copy=COPY)
    psi = dict(c.generator.named_parameters())
    g, of_jacobian = [], []
    _, _, z = oracle(c)
    for agent in range(AGENTS):
        for t in range(SAMPLES):
            observation = c.batch["observation"][agent, t]
            theta = c.generator(torch.tensor([agent]), observation[None])
            sample = {name: tensor[agent, t] for name, tensor in c.batch.items()}
            loss = c.surrogate({n: v[0] for n, v in theta.items()}, sample)
            values = torch.cat([v[0].flatten() for v in theta.values()])
            for into, scalar in ((g, loss), (of_jacobian, values @ z[agent].mean(0))):
                parts = torch.autograd.grad(
                    scalar, list(psi.values()), retain_graph=True, materialize_grads=True
                )
                into.append(torch.cat([part.flatten() for part in parts]))
    shape = (AGENTS, SAMPLES, -1)
    agrees(d.products["theta"], z, d.theta_layout)
    agrees(d.products["psi"], torch.stack(g).view(shape), d.psi_layout)
    agrees(d.products["jacobian"], torch.stack(of_jacobian).view(shape), d.psi_layout)


def test_a_decoupled_generators_jacobian_has_no_noise_of_its_own():
    c = case("hypermarl", "value")
    found = factorise(c.generator, c.surrogate, c.batch, copy=COPY).products
    count = found["jacobian"].count[0]
    for e, within in enumerate(found["jacobian"].within[0]):  # count_e J^T Z in every cluster
        close(within / count[e] ** 2, found["jacobian"].within[0][0] / count[0] ** 2)
    spread = found["psi"].within[0] / count[:, None, None] ** 2
    assert not np.allclose(spread, spread[0])


def test_copies_are_pooled_into_neighbouring_clusters_of_nearly_equal_size():
    copy = torch.tensor([9, 3, 3, 100, 7, 9, 50])  # five copies
    assert pooled(copy, 2).tolist() == [0, 0, 0, 1, 0, 0, 1]
    assert pooled(copy, 5).tolist() == pooled(copy, 9).tolist() == [2, 0, 0, 4, 1, 2, 3]
    sizes = np.bincount(pooled(torch.arange(100), 32))
    assert len(sizes) == 32
    assert set(sizes) == {3, 4}
    with pytest.raises(UsageError, match="`most` must be at least 1"):
        pooled(copy, 0)
