import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical, Normal
from torchrl.modules import (
    Delta,
    IndependentNormal,
    MaskedCategorical,
    MultiAgentMLP,
    OneHotCategorical,
    ProbabilisticActor,
    TanhDelta,
    TanhNormal,
)
from torchrl.objectives import A2CLoss, ClipPPOLoss, DDPGLoss, ValueEstimators

import gradlab
from gradlab.checks import UsageError
from gradlab.integrations.torchrl import LossProbe

# TorchRL's MaskedCategorical; targets that nobody updates here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:size_average and reduce args"),
    pytest.mark.filterwarnings("ignore:No target network updater has been associated"),
]

AGENTS, COPIES, STEPS, OBSERVED = 3, 8, 5, 4
OBSERVATION = ("agents", "observation")


@pytest.fixture(autouse=True)
def in_double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def net(outputs, inputs=OBSERVED, *, shared, centralised=False):
    return MultiAgentMLP(
        n_agent_inputs=inputs,
        n_agent_outputs=outputs,
        n_agents=AGENTS,
        centralised=centralised,
        share_params=shared,
        depth=1,
        num_cells=6,
    )


def normal(kind, *, shared, **arguments):
    made = nn.Sequential(net(4, shared=shared), NormalParamExtractor())
    keys = [("agents", "loc"), ("agents", "scale")]
    module = TensorDictModule(made, in_keys=[OBSERVATION], out_keys=keys)
    return actor(module, keys, kind, **arguments)


def numbered(kind, *, shared):
    key = ("agents", "logits")
    module = TensorDictModule(net(3, shared=shared), in_keys=[OBSERVATION], out_keys=[key])
    keys = (
        {"logits": key, "mask": ("agents", "action_mask")} if kind is MaskedCategorical else [key]
    )
    return actor(module, keys, kind)


def actor(module, keys, kind, **arguments):
    return ProbabilisticActor(
        module=module,
        in_keys=keys,
        out_keys=[("agents", "action")],
        distribution_class=kind,
        distribution_kwargs=arguments,
        return_log_prob=True,
        log_prob_key=("agents", "log_prob"),
    )


def critic(*, shared, centralised):
    module = net(1, shared=shared, centralised=centralised)
    return TensorDictModule(module, in_keys=[OBSERVATION], out_keys=[("agents", "state_value")])


def ppo(policy, values, **settings):
    loss = ClipPPOLoss(policy, values, **{"clip_epsilon": 0.1} | settings)
    loss.set_keys(
        action=("agents", "action"),
        sample_log_prob=("agents", "log_prob"),
        advantage=("agents", "advantage"),
        value_target=("agents", "value_target"),
        value=("agents", "state_value"),
        reward=("agents", "reward"),
        done=("agents", "done"),
        terminated=("agents", "terminated"),
    )
    loss.make_value_estimator(ValueEstimators.GAE, gamma=0.9, lmbda=0.9)
    return loss


def collected(policy, form=(COPIES, STEPS)):
    """A batch as a collector makes it, by a policy that differs a little from the present one."""
    batch = TensorDict(batch_size=form)
    batch["agents", "observation"] = torch.randn(*form, AGENTS, OBSERVED)
    mask = torch.rand(*form, AGENTS, 3) < 0.7
    mask[..., 0] = True
    batch["agents", "action_mask"] = mask
    with torch.no_grad():
        batch = policy(batch)
    if ("agents", "log_prob") in batch.keys(True):
        batch["agents", "log_prob"] += 0.2 * torch.randn(*form, AGENTS)
    of_next = batch.select(OBSERVATION).clone()
    of_next["agents", "reward"] = torch.randn(*form, AGENTS, 1)
    for name in ("done", "terminated"):
        of_next["agents", name] = torch.zeros(*form, AGENTS, 1, dtype=torch.bool)
    batch["next"] = of_next
    return batch


def with_advantages(loss, batch):
    with torch.no_grad():
        loss.value_estimator(batch, params=loss.critic_network_params.detach())
    value = batch["agents", "state_value"]
    batch["agents", "state_value"] = value + 0.1 * torch.randn_like(value)
    return batch


def gradients(of_agent, params):
    """Each agent's row of gradients, by autograd of the framework's own loss."""
    leaves = [p for p in params.values(True, True) if p.requires_grad]
    rows = []
    for agent in range(AGENTS):
        found = torch.autograd.grad(of_agent(agent), leaves, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([
                (torch.zeros_like(p) if g is None else g).flatten()
                for g, p in zip(found, leaves, strict=True)
            ])
        )
    return torch.stack(rows)


def the_same(found, network, g):
    place = {"network": network, "space": "psi", "layer": "all"}
    np.testing.assert_allclose(found.norm.sel(place), g.norm(dim=1), rtol=1e-8, err_msg=network)
    cosine = torch.nn.functional.cosine_similarity(g[:, None], g, dim=-1)
    off = ~np.eye(AGENTS, dtype=bool)
    of = found.cosine.sel(place).values[off]
    np.testing.assert_allclose(of, cosine[off], rtol=1e-7, atol=1e-9, err_msg=network)
    assert (found.residual < 1e-9).all()


POLICIES = {
    "categorical": lambda shared: numbered(Categorical, shared=shared),
    "masked": lambda shared: numbered(MaskedCategorical, shared=shared),
    "one-hot": lambda shared: numbered(OneHotCategorical, shared=shared),
    "normal": lambda shared: normal(IndependentNormal, shared=shared),
    "tanh-normal": lambda shared: normal(
        TanhNormal, shared=shared, low=torch.tensor([-2.0, -1.0]), high=1.5
    ),
}
SETTINGS = {
    "categorical": {"entropy_coeff": 0.3, "loss_critic_type": "l2"},
    "masked": {"entropy_coeff": 0.3, "critic_coeff": 0.5},
    "one-hot": {"entropy_bonus": False, "loss_critic_type": "l1"},
    "normal": {"entropy_coeff": 0.3, "clip_value": 0.05, "loss_critic_type": "l2"},
    "tanh-normal": {
        "entropy_coeff": 0.3,
        "samples_mc_entropy": 2,
        "normalize_advantage": True,
        "normalize_advantage_exclude_dims": (-2,),
    },
}


@pytest.mark.parametrize("centralised", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", POLICIES)
def test_recorded_numbers_are_those_of_the_loss_module(
    kind, shared, centralised, tmp_path, monkeypatch
):
    draws = torch.randn(2, COPIES, STEPS, AGENTS, 2)
    policy = POLICIES[kind](shared)
    values = critic(shared=shared != centralised, centralised=centralised)
    loss = ppo(policy, values, **SETTINGS[kind])
    batch = with_advantages(loss, collected(policy))
    monkeypatch.setattr(
        torch, "randn", lambda *_, **__: draws.movedim(3, 0).movedim(1, 3).flatten(1, 2)
    )
    with LossProbe(loss, every=1, out=tmp_path / "run") as probe:
        found = probe(batch)
    monkeypatch.undo()
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda *_, **__: draws)
    of = ppo(policy, values, **SETTINGS[kind], reduction="none")(batch.clone(False))

    def actors(agent):
        bonus = of.get("loss_entropy", torch.zeros(AGENTS))[..., agent]
        return of["loss_objective"][..., agent].mean() + bonus.mean()

    the_same(found, "actor", gradients(actors, loss.actor_network_params))
    critics = gradients(lambda i: of["loss_critic"][..., i].mean(), loss.critic_network_params)
    the_same(found, "critic", critics)
    assert 0 < of["clip_fraction"] < 1
    run = gradlab.open_run(tmp_path / "run")
    kinds = {True: "fups", False: "nops"}
    assert run.info["methods"]["actor"] == kinds[shared]
    assert run.config["copies"] == COPIES


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("form", [(COPIES, STEPS), (COPIES * STEPS,)])
def test_recorded_numbers_are_those_of_deterministic_policy_gradients(form, shared, tmp_path):
    policy, judge = deterministic(shared=shared)
    loss = ddpg(policy, judge)
    batch = collected(policy, form)
    copy = torch.arange(COPIES * STEPS) // STEPS
    with LossProbe(loss, every=1, out=tmp_path / "run") as probe:
        found = probe(batch, copy=copy)
    of = ddpg(policy, judge, reduction="none")
    of.load_state_dict(loss.state_dict())
    acted, _ = of.loss_actor(batch.clone(False))
    judged, _ = of.loss_value(batch.clone(False))
    actors = gradients(lambda i: acted[..., i].mean(), of.actor_network_params)
    the_same(found, "actor", actors)
    the_same(found, "critic", gradients(lambda i: judged[..., i].mean(), of.value_network_params))
    assert np.isfinite(found.cosine_debiased).any()
    run = gradlab.open_run(tmp_path / "run")
    assert run.method == ("fups" if shared else "nops")
    assert run.config["frozen"] == []


def deterministic(*, shared, centralised=False, kind=TanhDelta):
    keys = [("agents", "param")]
    module = TensorDictModule(net(2, shared=shared), in_keys=[OBSERVATION], out_keys=keys)
    bounds = {"low": torch.tensor([-2.0, -1.0]), "high": torch.tensor([1.0, 1.5])}
    policy = ProbabilisticActor(
        module=module,
        in_keys=keys,
        out_keys=[("agents", "action")],
        distribution_class=kind,
        distribution_kwargs=bounds if kind is TanhDelta else {},
    )
    judge = TensorDictModule(
        net(1, OBSERVED + 2, shared=shared, centralised=centralised),
        in_keys=[OBSERVATION, ("agents", "action")],
        out_keys=[("agents", "state_action_value")],
    )
    return policy, TensorDictSequential(judge)


def ddpg(policy, judge, **settings):
    loss = DDPGLoss(policy, judge, loss_function="l2", delay_value=True, **settings)
    loss.set_keys(
        state_action_value=("agents", "state_action_value"),
        reward=("agents", "reward"),
        done=("agents", "done"),
        terminated=("agents", "terminated"),
        priority=("agents", "td_error"),
    )
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    return loss


def test_trained_parameters_are_followed_wherever_they_are(tmp_path):
    policy = POLICIES["normal"](False)
    loss = ppo(policy, critic(shared=True, centralised=False))
    batch = with_advantages(loss, collected(policy))
    with LossProbe(loss, every=1, out=tmp_path / "run") as probe:
        first = probe(batch)
        optimiser = torch.optim.SGD(loss.parameters(), 0.5)
        of = loss(batch.clone(False))
        (of["loss_objective"] + of["loss_critic"] + of["loss_entropy"]).backward()
        optimiser.step()
        stepped = probe(batch)
        for parameter in loss.parameters():
            parameter.data = parameter.data.clone() * 0.9
        moved = probe(batch)
    with LossProbe(loss, every=1, out=tmp_path / "other") as probe:
        np.testing.assert_array_equal(probe(batch).norm, moved.norm)
    assert (first.norm.sel(layer="all") != stepped.norm.sel(layer="all")).all()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(OBSERVED, 3)

    def forward(self, observation):
        return self.inner(observation)


def test_loss_modules_that_cannot_be_taken_apart_are_explained(tmp_path):
    values = critic(shared=True, centralised=False)
    policy = POLICIES["categorical"](True)
    key = ("agents", "logits")
    module = TensorDictModule(Net(), in_keys=[OBSERVATION], out_keys=[key])
    for loss, settings, message in (
        (A2CLoss(policy, values), {}, "of ClipPPOLoss, DDPGLoss, whose losses .* Got A2CLoss"),
        (nn.Linear(2, 2), {}, "be a TorchRL loss module with an actor. Got Linear"),
        (ppo(policy, values, reduction="sum"), {}, "have reduction \"mean\". Got loss='sum'"),
        (ppo(actor(module, [key], Categorical), values), {}, "no MultiAgentMLP of the actor"),
        (
            ppo(actor(module, [key], Categorical), values),
            {"agents": AGENTS},
            "must be a MultiAgentMLP .* Got Net",
        ),
        (ppo(normal(Normal, shared=True), values), {}, "one of Categorical, .* Got Normal"),
        (
            ppo(normal(TanhNormal, shared=True, tanh_loc=True), values),
            {},
            r"`TanhNormal` must have no arguments but high, low. Got TanhNormal=\['tanh_loc'\]",
        ),
        (ddpg(*deterministic(shared=True, centralised=True)), {}, "critics that read one agent"),
        (ddpg(*deterministic(shared=True, kind=Delta)), {}, "with a TanhDelta at its end"),
    ):
        with pytest.raises(UsageError, match=message) as raised:
            LossProbe(loss, out=tmp_path / "run", **settings)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_batches_that_do_not_fit_are_explained(tmp_path):
    policy = POLICIES["categorical"](True)
    loss = ppo(policy, critic(shared=True, centralised=False))
    batch = collected(policy)
    whole = with_advantages(loss, batch.clone())
    team = whole.clone().set(("agents", "advantage"), torch.zeros(COPIES, STEPS, 1, 1))
    joint = whole.clone().set(("agents", "log_prob"), torch.zeros(COPIES, STEPS))
    with LossProbe(loss, every=1, out=tmp_path / "run") as probe:
        for of, message in (
            (batch, r"hold \('agents', 'advantage'\). Got agents/action, .*value_estimator"),
            (whole[None], r"of \[copy, time\] or \[sample\] and not empty. Got batch_size=\(1, 8"),
            (team, r"tell agents apart and have shape \[8, 5, 3, 1\]. Got \[8, 5, 1, 1\]"),
            (joint, r"have shape \[8, 5, 3\]. Got \[8, 5\]"),
            (whole.to("meta"), "where the policy is, on cpu. Got it on meta"),
        ):
            with pytest.raises(UsageError, match=message):
                probe(of)
        assert probe(whole) is not None


def test_module_that_mixes_agents_is_noticed(tmp_path):
    class Centred(nn.Module):
        def forward(self, logits):
            return logits - (logits.mean(-2, keepdim=True) if logits.dim() > 1 else 0)

    made = nn.Sequential(net(3, shared=False), Centred())
    key = ("agents", "logits")
    module = TensorDictModule(made, in_keys=[OBSERVATION], out_keys=[key])
    policy = actor(module, [key], Categorical)
    loss = ppo(policy, critic(shared=True, centralised=False))
    probe = LossProbe(loss, every=1, out=tmp_path / "run")
    with pytest.raises(UsageError, match="agent 0's is another when it is alone, by up to"):
        probe(with_advantages(loss, collected(policy)))
    probe.close()
