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


def theta_gradients(loss, theta, batch, context=None, mask=None):
    """Gradient of every sample's loss [agent, sample, *shape] by policy parameter.

    Parameters are [agent, ...] or [1, ...]; samples that do not exist have gradient 0.
    """
    agents, samples = next(iter(batch.values())).shape[:2]
    found = {name: [] for name in theta}
    for agent in range(agents):
        for sample in range(samples):
            own = {
                name: t[agent if len(t) > 1 else 0].clone().requires_grad_()
                for name, t in theta.items()
            }
            if mask is not None and not mask[agent, sample]:
                gradients = [None] * len(own)
            else:
                held = {k: v[agent, sample] for k, v in batch.items()}
                held |= {k: v[agent] for k, v in (context or {}).items()}
                gradients = torch.autograd.grad(
                    loss(own, held), list(own.values()), allow_unused=True
                )
            for (name, leaf), gradient in zip(own.items(), gradients, strict=True):
                found[name].append(torch.zeros_like(leaf) if gradient is None else gradient)
    return {name: torch.stack(rows).unflatten(0, (agents, samples)) for name, rows in found.items()}


def moments(gradients, layers, mask=None, copy=None):
    """Sums of per-sample gradients, by loops: what the engine must give.

    `layers` names each parameter's layer. Returns a dict with `sum` and `square` [agent, theta],
    `squared_norm` [agent, layer], and with `copy` also `products` [layer, copy, agent, agent]:
    those within a copy, with the sum over all copies, and with the next copy.
    """
    agents, samples = next(iter(gradients.values())).shape[:2]
    names = list(dict.fromkeys(layers.values()))
    flat = torch.cat([g.reshape(agents, samples, -1) for g in gradients.values()], 2)
    exists = torch.ones(agents, samples, dtype=torch.bool) if mask is None else mask
    result = {
        "count": exists.sum(1),
        "sum": flat.sum(1),
        "square": flat.square().sum(1),
        "squared_norm": torch.stack(
            [
                sum(
                    g.reshape(agents, samples, -1).square().sum((1, 2))
                    for n, g in gradients.items()
                    if layers[n] == layer
                )
                for layer in names
            ],
            1,
        ),
    }
    if copy is None:
        return result
    labels = sorted(set(copy.tolist()))
    within = flat.new_zeros(len(names), len(labels), agents, agents)
    across, following = torch.zeros_like(within), torch.zeros_like(within[:, 1:])
    for row, layer in enumerate(names):
        members = [
            g.reshape(agents, samples, -1) for n, g in gradients.items() if layers[n] == layer
        ]
        part = torch.cat(members, 2)
        for column, label in enumerate(labels):
            for i in range(agents):
                ours = part[i, copy == label].sum(0)
                for k in range(agents):
                    within[row, column, i, k] = ours @ part[k, copy == label].sum(0)
                    across[row, column, i, k] = ours @ part[k].sum(0)
                    if column + 1 < len(labels):
                        after = part[k, copy == labels[column + 1]].sum(0)
                        following[row, column, i, k] = ours @ after
    return result | {"products": (within, across, following)}
