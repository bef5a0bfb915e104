"""Slow independent oracles: loops over agents and samples, nothing from gradlab."""

import torch


def per_sample_gradients(forward, loss, psi, batch, agents, samples):
    """Gradient in psi of every sample's loss [agent, sample, psi], one backward pass each."""
    leaves = [p.clone().requires_grad_() for p in psi.values()]
    rows = []
    for agent in range(agents):
        for sample in range(samples):
            theta = forward(dict(zip(psi, leaves, strict=True)), agent)
            value = loss(theta, {k: v[agent, sample] for k, v in batch.items()})
            grads = torch.autograd.grad(value, leaves, allow_unused=True)
            flat = [
                (torch.zeros_like(p) if g is None else g).flatten()
                for g, p in zip(grads, leaves, strict=True)
            ]
            rows.append(torch.cat(flat))
    return torch.stack(rows).view(agents, samples, -1)
