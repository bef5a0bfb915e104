"""The engine's result against the loops' for a function of the test's own."""

import torch
from reference import moments as reference_moments
from reference import theta_gradients

from gradlab.engine.accumulate import gradient_moments


def assert_agrees(loss, theta, batch, mask=None, engine="auto", context=None):
    """Compare all sums, also those by copy and those of single samples, and return the moments."""
    agents, samples = next(iter(batch.values())).shape[:2]
    copy = torch.arange(samples) // 2
    gradients = theta_gradients(loss, theta, batch, context, mask)
    found = gradient_moments(
        loss, theta, batch, mask=mask, context=context, coordinates=True, engine=engine, copy=copy
    )
    expected = reference_moments(gradients, found.layout.layer_of, mask, copy)
    assert found.count.tolist() == expected["count"].tolist()
    assert len(found.count) == agents
    in_parts = gradient_moments(
        loss, theta, batch, mask=mask, context=context, coordinates=True, engine=engine, budget=1
    )
    for name in ("sum", "square", "squared_norm"):
        for moments in (found, in_parts):
            ours = getattr(moments, name)
            torch.testing.assert_close(ours, expected[name], rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(found.copy_products(), expected["products"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-9)
    return found
