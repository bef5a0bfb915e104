import copy
import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import gradlab
from gradlab.checks import UsageError

AGENTS, SAMPLES = 3, 32
COPY = torch.arange(SAMPLES) % 16


def network(seed=0, **form):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), **form)


def loss(policy, sample):
    return -sample["advantage"] * policy(sample["obs"]).log_softmax(-1)[sample["action"]]


def batch(seed=1, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return {
        "obs": torch.randn(AGENTS, SAMPLES, 4, generator=random, dtype=dtype),
        "action": torch.randint(2, (AGENTS, SAMPLES), generator=random),
        "advantage": torch.randn(AGENTS, SAMPLES, generator=random, dtype=dtype),
    }


class Hyper(nn.Module):
    """Makes the weights of `network()` from an embedding; its scale is a single number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.shapes = {name: p.shape for name, p in network().named_parameters()}
        self.embedding = nn.Embedding(AGENTS, 3)
        self.heads = nn.ModuleDict({
            name.replace(".", "/"): nn.Linear(3, shape.numel())
            for name, shape in self.shapes.items()
        })
        self.scale = nn.Parameter(torch.tensor(0.5))

    def at(self, rows):
        return {
            name: self.scale * self.heads[name.replace(".", "/")](rows).unflatten(-1, shape)
            for name, shape in self.shapes.items()
        }

    def generate(self, agent):
        return self.at(self.embedding.weight[agent])


class Twins(nn.Module):
    """A trunk and an agent's own head; agents' trunks may be the same object."""

    def __init__(self, trunk, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = trunk
        self.head = nn.Linear(5, 2)
        self.register_buffer("shift", torch.full((4,), 0.1 * seed))

    def forward(self, obs):
        return self.head(self.trunk(obs + self.shift).tanh())


def partly_shared():
    trunk = nn.Linear(4, 5)
    policy = nn.ModuleDict({name: Twins(trunk, seed) for seed, name in enumerate("abc")})
    policy["b"].head.bias.requires_grad_(False)
    return policy


def frozen_trunk():
    policy = network()
    policy[0].requires_grad_(False)
    return policy


def own():
    return nn.ModuleList([network(seed) for seed in range(AGENTS)])


def as_module(policy, agent):
    """What acts for an agent in a list, dictionary or alone, without gradlab."""
    if isinstance(policy, nn.ModuleList):
        return policy[agent]
    if isinstance(policy, nn.ModuleDict):
        return policy[list(policy)[agent]]
    if isinstance(policy, Hyper):
        theta = policy.generate(agent)
        return lambda obs: functional_call(network(), theta, (obs,))
    return policy


def oracle(policy, batch, mask=None):
    """Every agent's gradient in the trained parameters, one backward pass for each sample."""
    policy = copy.deepcopy(policy).double()
    trained = [p for p in policy.parameters() if p.requires_grad]
    rows = []
    for agent in range(AGENTS):
        total, count = torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64), 0
        for sample in range(batch["obs"].shape[1]):
            if mask is not None and not mask[agent, sample]:
                continue
            one = {name: tensor[agent, sample] for name, tensor in batch.items()}
            one = {n: t.double() if t.is_floating_point() else t for n, t in one.items()}
            found = torch.autograd.grad(
                loss(as_module(policy, agent), one), trained, allow_unused=True
            )
            total += torch.cat([
                (torch.zeros_like(p) if g is None else g).flatten()
                for g, p in zip(found, trained, strict=True)
            ])
            count += 1
        rows.append(total / count)
    return torch.stack(rows)


POLICIES = {
    "shared": (network, {"agents": AGENTS}),
    "frozen in part": (frozen_trunk, {"agents": ["x", "y", "z"]}),
    "own": (own, {}),
    "shared in part": (partly_shared, {}),
    "generated": (Hyper, {"agents": AGENTS, "target": network()}),
    "generated at once": (
        Hyper,
        {
            "agents": AGENTS,
            "target": network(),
            "generate": lambda policy, agents: policy.at(policy.embedding(agents)),
        },
    ),
}


def attached(policy, tmp_path, loss=loss, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gradlab.Probe(policy, loss, out=tmp_path / "run", **settings)


@pytest.mark.parametrize("level", ["light", "full"])
@pytest.mark.parametrize("kind", POLICIES)
def test_any_policy_gives_the_oracles_gradients(kind, level, tmp_path):
    make, settings = POLICIES[kind]
    policy, of = make(), batch()
    with attached(policy, tmp_path, every=1, level=level, **settings) as probe:
        found = probe(of, copy=COPY).sel(network="actor", space="psi", layer="all")
    g = oracle(policy, of)
    np.testing.assert_allclose(found.norm, g.norm(dim=1), rtol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(g[:, None], g, dim=-1)
    off = ~np.eye(AGENTS, dtype=bool)
    np.testing.assert_allclose(found.cosine.values[off], cosine[off], rtol=1e-3, atol=1e-5)
    assert found.residual < 1e-9
    if level == "full":
        assert np.isfinite(found.squared_norm_debiased).all()


def test_samples_in_one_row_are_those_of_their_agents(tmp_path):
    policy, of = network(), batch()
    keep = torch.rand(AGENTS, SAMPLES, generator=torch.Generator().manual_seed(3)) < 0.7
    agent = torch.arange(AGENTS)[:, None].expand(-1, SAMPLES)[keep]
    order = torch.randperm(len(agent), generator=torch.Generator().manual_seed(4))
    flat = {name: tensor[keep][order] for name, tensor in of.items()}
    in_row = COPY.expand(AGENTS, -1)[keep][order]
    with attached(policy, tmp_path, agents=AGENTS, every=1) as probe:
        found = probe(flat, agent=agent[order], copy=in_row)
    with attached(policy, tmp_path / "other", agents=AGENTS, every=1) as probe:
        expected = probe(of, mask=keep, copy=COPY)
    for name in ("norm", "cosine", "cosine_debiased", "samples", "variance_within"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    norms = oracle(policy, of, keep).norm(dim=1)
    place = {"network": "actor", "space": "psi", "layer": "all"}
    np.testing.assert_allclose(found.norm.sel(place), norms, rtol=1e-4)


class Noisy(nn.Module):
    """All that a probe might disturb: random numbers, buffers, counters, modes, hooks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3))
        self.head = nn.Linear(5, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, obs):
        self.seen += 1
        flat = obs.reshape(-1, 4)
        return self.head(self.body(flat)).reshape(*obs.shape[:-1], 2)


def trained(probed, tmp_path):
    policy = Noisy()
    optimiser = torch.optim.Adam(policy.parameters(), 1e-2)
    torch.manual_seed(6)
    settings = {"agents": AGENTS, "every": 2}
    probe = attached(policy, tmp_path, **settings) if probed else lambda *_, **__: None
    for update in range(5):
        of = batch(update)
        policy(of["obs"]).square().mean().backward()  # a gradient that stands in between
        probe(of, copy=COPY)
        logits = policy(of["obs"]).log_softmax(-1)
        chosen = logits.gather(-1, of["action"][..., None])[..., 0]
        (-of["advantage"] * chosen).mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=update % 2 == 0)
    modes = [module.training for module in policy.modules()]
    return policy.state_dict(), torch.random.get_rng_state(), modes


def test_a_probed_training_ends_with_bitwise_the_same_state(tmp_path):
    plain, random, modes = trained(False, tmp_path)
    state, probed_random, probed_modes = trained(True, tmp_path)
    for name, tensor in plain.items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(random, probed_random)
    assert modes == probed_modes
    assert gradlab.open_run(tmp_path / "run").updates("cosine") == [0, 2, 4]


def test_run_is_one_that_every_command_reads(tmp_path, capsys):
    from gradlab.cli import run

    with attached(network(), tmp_path, agents=AGENTS, every=1, environment="mine") as probe:
        for seed in range(3):
            probe(batch(seed), copy=COPY, scalars={"episode_return": seed})
    folder, page = str(tmp_path / "run"), tmp_path / "page.html"
    for command in (
        ["conflict", folder],
        ["conflict", folder, "--explain", "0", "1"],
        ["conflict", folder, "--quantity", "cosine"],
        ["runs", str(tmp_path)],
        ["dashboard", folder, "--html", str(page)],
    ):
        assert run(command) == 0, capsys.readouterr().err
    assert "mine" in capsys.readouterr().out
    assert "mine" in page.read_text()
    recorded = gradlab.open_run(folder)
    assert recorded.state == "done"
    assert recorded.quantity("episode_return").values.tolist() == [0, 1, 2]
    assert recorded.info["engines"]["actor"]["0.weight"] == "structured"


def test_resumed_run_goes_on_counting(tmp_path):
    for _ in range(2):
        with attached(network(), tmp_path, agents=AGENTS, every=2, resume=True) as probe:
            for seed in range(3):
                probe(batch(seed), scalars={"loss": seed})
    run = gradlab.open_run(tmp_path / "run")
    assert run.updates("loss") == [0, 1, 2, 3, 4, 5]
    assert run.updates("cosine") == [0, 2, 4]


def test_going_on_with_other_versions_is_told(tmp_path):
    attached(network(), tmp_path, agents=AGENTS).close()
    file = tmp_path / "run" / "run.json"
    info = json.loads(file.read_text())
    assert info["versions"].keys() == {"python", "gradlab", "torch", "numpy"}
    file.write_text(json.dumps(info | {"versions": {**info["versions"], "torch": "2.9.0"}}))
    with pytest.warns(UserWarning, match=r"was begun with torch 2\.9\.0 \(now "):
        gradlab.Probe(network(), loss, out=tmp_path / "run", agents=AGENTS, resume=True).close()


def test_decorated_update_is_diagnosed_before_it_runs(tmp_path):
    policy = network()
    probe = attached(policy, tmp_path, agents=AGENTS, every=1)

    @probe.watch(copy=lambda _, batch: COPY[: batch["obs"].shape[1]])
    def update(rate, batch):
        """Learn."""
        loss = -policy(batch["obs"]).log_softmax(-1)[..., 0].mean()
        loss.backward()
        with torch.no_grad():
            for p in policy.parameters():
                p -= rate * p.grad
        return loss.item()

    before = oracle(policy, batch()).norm(dim=1)
    assert isinstance(update(0.1, batch=batch()), float)
    assert update.__doc__ == "Learn."
    probe.close()
    run = gradlab.open_run(tmp_path / "run")
    place = {"network": "actor", "space": "psi", "layer": "all"}
    np.testing.assert_allclose(run.quantity("norm", where=place)[0], before, rtol=1e-4)
    assert "cosine_debiased" in run.quantities


def test_exception_marks_the_run_as_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), attached(network(), tmp_path, agents=2):
        _ = 1 / 0
    assert gradlab.open_run(tmp_path / "run").state == "failed"


def test_batch_is_only_made_when_it_is_looked_at(tmp_path):
    made = []
    with attached(network(), tmp_path, agents=AGENTS, every=3) as probe:
        for _ in range(4):
            probe(lambda: made.append(0) or batch())
    assert len(made) == 2


def test_what_is_frozen_is_reported(tmp_path):
    with pytest.warns(UserWarning, match=r"left out: head.bias of agents 1\."):
        probe = gradlab.Probe(partly_shared(), loss, out=tmp_path / "run")
    probe.close()
    run = gradlab.open_run(tmp_path / "run")
    assert run.method == "partly-shared"
    assert run.config["frozen"] == ["head.bias of agents 1"]


def test_loss_of_the_whole_batch_is_noticed(tmp_path):
    whole = batch()

    def reduced(policy, sample):
        zero = 0 * sample["advantage"]
        logits = policy(whole["obs"][0].to(zero.dtype)).log_softmax(-1)
        return zero - (whole["advantage"][0] * logits[:, 0]).mean()

    probe = attached(network(), tmp_path, loss=reduced, agents=AGENTS, every=1)
    with pytest.warns(UserWarning, match="does `loss` reduce over the batch"):
        probe(whole)
    probe.close()


def critic():
    torch.manual_seed(9)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def value_loss(policy, sample):
    return (policy(sample["obs"])[0] - sample["advantage"]).square()


def both(seed=1):
    of = batch(seed)
    return {"actor": of, "critic": {name: of[name] for name in ("obs", "advantage")}}


@pytest.mark.parametrize("actor", [own, network])
def test_several_networks_are_found_what_each_is_found_alone(actor, tmp_path):
    policies, losses = {"actor": actor(), "critic": critic()}, {"actor": loss, "critic": value_loss}
    keep = torch.rand(AGENTS, SAMPLES, generator=torch.Generator().manual_seed(3)) < 0.7
    with attached(policies, tmp_path, losses, agents=AGENTS, every=1) as probe:
        found = probe(both(), copy=COPY, mask=keep)
    assert found.network.values.tolist() == ["actor", "critic"]
    for name, policy in policies.items():
        settings = {"agents": AGENTS, "every": 1, "network": name}
        with attached(policy, tmp_path / name, losses[name], **settings) as probe:
            alone = probe(both()[name], copy=COPY, mask=keep)
        for quantity in ("norm", "cosine", "cosine_debiased", "variance_within", "residual"):
            of = found[quantity].sel(network=name)
            here = of.sel(layer=alone.layer) if "layer" in of.dims else of
            np.testing.assert_array_equal(here, alone[quantity].sel(network=name), quantity)
    run = gradlab.open_run(tmp_path / "run")
    kind = "nops" if actor is own else "fups"
    assert (run.method, run.info["methods"]) == (kind, {"actor": kind, "critic": "fups"})


def test_several_networks_of_samples_in_one_row_share_their_places(tmp_path):
    policies, losses = (
        {"actor": network(), "critic": critic()},
        {"actor": loss, "critic": value_loss},
    )
    order = torch.randperm(AGENTS * SAMPLES, generator=torch.Generator().manual_seed(4))
    agent = torch.arange(AGENTS).repeat_interleave(SAMPLES)[order]
    flat = {
        network: {name: tensor.flatten(0, 1)[order] for name, tensor in of.items()}
        for network, of in both().items()
    }
    with attached(policies, tmp_path, losses, agents=AGENTS, every=1) as probe:
        found = probe(flat, agent=agent, copy=COPY.repeat(AGENTS)[order])
    with attached(policies, tmp_path / "other", losses, agents=AGENTS, every=1) as probe:
        expected = probe(both(), copy=COPY)
    for name in ("norm", "cosine", "cosine_debiased", "variance_within"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_several_networks_that_do_not_fit_are_explained(tmp_path):
    policies, losses = (
        {"actor": network(), "critic": critic()},
        {"actor": loss, "critic": value_loss},
    )
    still = {"actor": network(), "critic": critic().requires_grad_(False)}
    for of, with_loss, message in (
        ({"q": network()}, {"q": loss}, "networks named actor, critic"),
        (policies, loss, "`loss` must be a dictionary by network, of actor, critic"),
        (policies, {"actor": loss}, r"of actor, critic\. Got loss=\['actor'\]"),
        (policies, losses | {"critic": 3}, r"`loss\['critic'\]` must be a function"),
        (still, losses, r"`policy\['critic'\]` must have parameters that require"),
        ({"actor": own(), "critic": nn.ModuleList([critic()] * 2)}, losses, r"be 2, as `policy\["),
    ):
        with pytest.raises(UsageError, match=message):
            attached(of, tmp_path, with_loss, agents=None if "own" in message else AGENTS)
    probe = attached(policies, tmp_path, losses, agents=AGENTS, every=1)
    short = both() | {"critic": {name: t[:, 1:] for name, t in both()["critic"].items()}}
    flat = both() | {"critic": {name: t[0] for name, t in both()["critic"].items()}}
    for given, message in (
        (batch(), "`batch` must be a dictionary by network"),
        (flat, r"`batch\['critic'\]` must tell its 3 agents apart"),
        (short, "hold the same samples of every network"),
        (
            both() | {"critic": {"obs": batch()["obs"]}},
            r"`batch` must hold what `loss\['critic'\]`",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            probe(given, copy=COPY)
    probe.close()


GLOBAL = network()
BAD_LOSSES = {
    "not one scalar for one sample": lambda p, s: p(s["obs"]),
    "depend on its first argument": lambda _, s: loss(GLOBAL, s),
    "single sample, without": lambda p, s: p(s["obs"]).gather(1, s["action"][:, None]).mean(),
    "finite for a finite sample": lambda p, s: p(s["obs"])[0] / s["advantage"].std(correction=0),
    "`loss` must not branch": lambda p, s: p(s["obs"])[0] if s["advantage"] > 0 else p(s["obs"])[1],
    "Got no 'reward' among": lambda p, s: p(s["obs"])[0] * s["reward"],
}


@pytest.mark.parametrize("message", BAD_LOSSES)
def test_loss_that_is_none_for_a_sample_is_explained(message, tmp_path):
    with attached(network(), tmp_path, loss=BAD_LOSSES[message], agents=AGENTS, every=1) as probe:
        text = message.replace("not one scalar", "one scalar")
        with pytest.raises(UsageError, match=text.replace(".", r"\.")) as raised:
            probe(batch())
        assert "\n" not in str(raised.value)


def test_policy_that_cannot_be_taken_apart_is_explained(tmp_path):
    lazy = nn.Sequential(nn.LazyLinear(3))
    uneven = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])
    still = network().requires_grad_(False)
    hidden = network()
    hidden.state = hidden(torch.zeros(4))
    for policy, settings, message in (
        (network(), {}, "`agents` must be given"),
        (network(), {"agents": 1}, "be at least 2"),
        (own(), {"agents": 4}, "be 3, as `policy` has modules"),
        (
            torch.compile(network(), backend="eager"),
            {"agents": 2},
            r"pass what it wraps, `\._orig_mod`",
        ),
        (nn.Sequential(nn.DataParallel(network())), {"agents": 2}, r"`policy\.0` .* `\.module`"),
        (lazy, {"agents": 2}, "call the policy once before"),
        (uneven, {}, r"'weight' has shape \(2, 4\) for agent 0 and \(3, 4\) for agent 1"),
        (still, {"agents": 2}, "have parameters that require a gradient"),
        (hidden, {"agents": 2}, "copy.deepcopy can copy"),
        (Hyper(), {"agents": 4, "target": network()}, "make parameters for all 4 agents"),
        (Hyper(), {"agents": 2, "target": nn.Linear(4, 2)}, "have what is generated"),
        (network(), {"agents": 2, "every": 0}, "`every` must be at least 1"),
        (network(), {"agents": 2, "level": "off"}, "`level` must be"),
        (network(), {"agents": 2, "network": "q"}, "`network` must be"),
    ):
        with pytest.raises(UsageError, match=message):
            attached(policy, tmp_path, **settings)
    assert not (tmp_path / "run").exists()


def test_batch_that_cannot_be_told_apart_is_explained(tmp_path):
    flat = {name: tensor.flatten(0, 1) for name, tensor in batch().items()}
    agent = torch.arange(AGENTS).repeat_interleave(SAMPLES)
    elsewhere = batch() | {"obs": batch()["obs"].to("meta")}
    policy = network()
    probe = attached(policy, tmp_path, agents=AGENTS, every=1)
    for of, settings, message in (
        (flat, {}, "must tell its 3 agents apart"),
        (flat, {"agent": agent + 1}, "`agent` must be whole numbers from 0 to 2"),
        (flat, {"agent": agent[1:]}, "one for each of the 96 samples"),
        (flat, {"agent": agent, "copy": COPY}, r"`copy` must have shape \(96,\)"),
        (elsewhere, {}, "where the policy is, on cpu. Got it on meta"),
        (lambda: [1], {}, "hold tensors by name"),
        (lambda: {"obs": np.zeros(3)}, {}, "must be a tensor"),
    ):
        with pytest.raises(UsageError, match=message):
            probe(of, **settings)
    policy[0].requires_grad_(False)
    with pytest.raises(UsageError, match="attach another probe"):
        probe(batch())
    probe.close()
    with pytest.raises(UsageError, match="be open"):
        probe(batch())
    with pytest.raises(UsageError, match="another `out`, or pass resume=True"):
        attached(network(), tmp_path, agents=AGENTS)
