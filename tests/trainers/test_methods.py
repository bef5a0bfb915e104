"""Sharing schemes: their sizes, how they start, and what they can be told."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradlab.cli import run as main
from gradlab.metrics.coupling import coupling
from gradlab.run import open_run
from trainers.agent_policy import load_policy
from trainers.checkpoints import newest_checkpoint
from trainers.config import SharingConfig, TrainConfig
from trainers.description import describe_generator, describe_networks
from trainers.envs.vector_env import Box
from trainers.generators import METHODS
from trainers.generators.method import matched
from trainers.loop import Trainer
from trainers.networks import MLP
from trainers.policies import make_policy
from trainers.train import train_run

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
PLAIN = SharingConfig()


def mlp_of(*sizes, log_std=0, activation="tanh", head_gain=0.01):
    return MLP(sizes=sizes, activation=activation, head_gain=head_gain, log_std_size=log_std)


def make(method, mlp, agents=3, config=PLAIN, own_log_std=None, seed=0):
    random = torch.Generator().manual_seed(seed)
    return METHODS[method](mlp, agents, random, config, own_log_std)


def trained(generator):
    return sum(parameter.numel() for parameter in generator.parameters())


@pytest.mark.parametrize("own_log_std", [None, True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hidden": (5, 7), "bias": False},
        {"shared_trunk": True, "embedding": "orthogonal", "embedding_size": 3},
        {"shared_trunk": True, "hidden": (5, 7), "embedding": "one-hot"},
        {"embedding": "learned", "embedding_size": 2, "scaled_init": False},
        {"embedding": "equiangular", "bias": False},
    ],
    ids=lambda settings: " ".join(settings) or "default",
)
@pytest.mark.parametrize("method", METHODS)
def test_count_is_that_of_the_generator(method, settings, own_log_std):
    config = SharingConfig(hypernetwork=settings)
    mlp = mlp_of(6, 4, 5, 2, log_std=2)
    counted = METHODS[method].parameters(mlp, 3, config, own_log_std)
    assert counted == trained(make(method, mlp, config=config, own_log_std=own_log_std))


@pytest.mark.parametrize(
    ("method", "embedding", "algorithm", "expected"),
    [
        ("fups-id", 4, "ippo", 11_398),
        ("nops", 4, "ippo", 43_544),
        ("hypermarl-linear", 4, "ippo", 54_430),
        ("hypermarl", 4, "ippo", 711_446 + 4 * 4),
        ("nops", 8, "mappo", 55_832),
        ("hypermarl-linear", 8, "mappo", 69_790),
        ("hypermarl", 8, "mappo", 914_214 + 4 * 8),
    ],
)
def test_counts_are_those_of_the_official_networks_on_dispersion(
    method, embedding, algorithm, expected
):
    """There actor and critic read one table of embeddings, here each has its own."""
    config = SharingConfig(hypernetwork={"embedding_size": embedding})
    seen = 16 * (4 if algorithm == "mappo" else 1)
    networks = (mlp_of(16, 64, 64, 5), mlp_of(seen, 64, 64, 1))
    assert sum(METHODS[method].parameters(mlp, 4, config) for mlp in networks) == expected
    assert sum(trained(make(method, mlp, 4, config)) for mlp in networks) == expected


@pytest.mark.parametrize(
    ("agents", "nops", "fups", "with_id", "without_state"),
    [
        (2, 452, 450, 578, 322),
        (4, 1360, 1348, 1604, 580),
        (8, 4736, 4680, 5192, 1096),
        (16, 17728, 17488, 18512, 2128),
    ],
)
def test_counts_are_those_of_the_official_networks_on_the_temporal_game(
    agents, nops, fups, with_id, without_state
):
    shared = mlp_of(agents * agents, 64, agents)
    assert (
        METHODS["nops"].parameters(mlp_of(agents**2, 64 // agents, agents), agents, PLAIN) == nops
    )
    for method, expected in (
        ("fups", fups),
        ("fups-id", with_id),
        ("fups-id-nostate", without_state),
    ):
        assert METHODS[method].parameters(shared, agents, PLAIN) == expected


@pytest.mark.parametrize("hidden", [(64, 64), (12,), (32, 16)])
@pytest.mark.parametrize(
    ("method", "like"), [("nops", "fups-id"), ("fups-id", "hypermarl-linear"), ("nops", "fups")]
)
def test_matched_widths_come_nearest_of_all(method, like, hidden):
    mlp = mlp_of(18, *hidden, 5)
    target = METHODS[like].parameters(mlp, 4, PLAIN)
    found = matched(mlp, lambda sized: METHODS[method].parameters(sized, 4, PLAIN), target)
    distances = {}
    for width in range(1, 400):
        widths = [max(1, round(size * width / hidden[0])) for size in hidden]
        generator = METHODS[method].parameters(replace(mlp, sizes=(18, *widths, 5)), 4, PLAIN)
        distances.setdefault(abs(generator - target), (18, *widths, 5))
    assert found.sizes == distances[min(distances)]
    assert found == replace(mlp, sizes=found.sizes)


def test_the_narrowest_network_stands_in_where_none_is_small_enough():
    mlp = mlp_of(18, 64, 5)
    assert matched(mlp, lambda sized: 10 * sized.size, 1).sizes == (18, 1, 5)


def test_a_training_matches_actor_and_critic_each():
    settings = {"method": "nops", "env": "vmas/dispersion", "network": {"match": "fups-id"}}
    trainer = Trainer(TrainConfig.model_validate(settings))
    full = Trainer(TrainConfig.model_validate(settings | {"method": "fups-id", "network": {}}))
    for network in ("actor", "critic"):
        ours, theirs = (trained(getattr(some, network)) for some in (trainer, full))
        assert abs(ours - theirs) < 0.03 * theirs
    assert trainer.policy.network == trainer.actor.mlp != full.actor.mlp
    assert trainer.critic.mlp == trainer.critic.mlp


def gains(generator):
    """Root mean square singular value of every agent's generated weights, by layer."""
    return {
        name.removesuffix(".weight"): weight.detach().flatten(1).norm(dim=1)
        / min(weight.shape[1:]) ** 0.5
        for name, weight in generator.all_agents().items()
        if name.endswith("weight")
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"shared_trunk": True},
        {"embedding": "orthogonal"},
        {"embedding": "random", "shared_trunk": True, "hidden": (32, 32)},
    ],
    ids=["shared trunk", "orthogonal", "random"],
)
def test_every_agents_layers_start_with_ppo_gains(settings):
    mlp = mlp_of(6, 32, 16, 4)
    generator = make("hypermarl", mlp, 5, SharingConfig(hypernetwork=settings))
    for layer, found in gains(generator).items():
        wanted = torch.full_like(found, mlp.gain(layer))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


def test_without_reset_fan_heads_start_as_any_dense_layer():
    mlp = mlp_of(16, 64, 64, 5)
    generator = make("hypermarl-no-rf", mlp, 4)
    for name, parameter in generator.named_parameters():
        if ".head." in name:
            kind = name.split("/")[1].split(".")[0]
            if kind == "weight" and name.endswith("head.weight"):
                assert parameter.shape[1] == 64
                assert parameter.std().item() == pytest.approx(1 / 8, rel=0.05)
                assert abs(parameter.mean().item()) < 0.01
            else:
                assert not parameter.any()
    usual = make("hypermarl", mlp, 4)
    assert gains(generator)["head"].min() > 10 * gains(usual)["head"].max()
    torch.testing.assert_close(generator.embedding, usual.embedding)


@pytest.mark.parametrize("size", [3, 8])
def test_orthogonal_embeddings_are_orthonormal_and_fixed(size):
    config = SharingConfig(hypernetwork={"embedding": "orthogonal", "embedding_size": size})
    generator = make("hypermarl", mlp_of(6, 4, 2), 3, config)
    torch.testing.assert_close(generator.embedding @ generator.embedding.mT, torch.eye(3))
    assert "embedding" not in dict(generator.named_parameters())
    assert "embedding" in generator.state_dict()
    other = make("hypermarl", mlp_of(6, 4, 2), 3, config, seed=1)
    assert not torch.allclose(generator.embedding, other.embedding)


def test_more_agents_than_features_get_rows_of_orthonormal_columns():
    config = SharingConfig(hypernetwork={"embedding": "orthogonal", "embedding_size": 2})
    rows = make("hypermarl", mlp_of(6, 4, 2), 5, config).embedding
    torch.testing.assert_close(rows.mT @ rows, torch.eye(2))


def turned(cosine, agents=3):
    """The linear hypernetwork without bias on embeddings at an angle."""
    settings = {"embedding": "equiangular", "cosine": cosine, "bias": False}
    config = SharingConfig(hypernetwork=settings)
    return make("hypermarl-linear", mlp_of(6, 4, 2), agents, config)


@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.9, 1.0])
def test_equiangular_embeddings_set_the_coupling_of_gradients_and_initial_weights(cosine):
    generator = turned(cosine)
    rows = generator.embedding.double()
    wanted = torch.full((3, 3), cosine, dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(rows @ rows.mT, wanted, rtol=0, atol=1e-7)  # written in float32
    of_table = torch.nn.functional.normalize(rows)
    found = coupling(generator.double(), 3).coupling.to_numpy()
    for layer in found:
        np.testing.assert_allclose(layer, (of_table @ of_table.mT).numpy(), rtol=0, atol=1e-10)
    weights = turned(cosine).all_agents()["layer0.weight"].detach().flatten(1)
    alike = torch.corrcoef(weights)[~torch.eye(3, dtype=torch.bool)]
    assert alike.mean().item() == pytest.approx(cosine, abs=0.1)


@pytest.mark.parametrize(("cosine", "like"), [(0.0, "nops"), (1.0, "fups")])
def test_equiangular_embeddings_train_like_separate_or_shared_networks_at_the_ends(cosine, like):
    generator, plain = turned(cosine), make(like, mlp_of(6, 4, 2))
    towards = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))

    def moved(some):
        before = some.all_agents()["layer0.weight"].detach().clone()
        optimiser = torch.optim.Adam(some.parameters(), lr=1e-2)
        for factor in (1.0, -0.5, 2.0):
            optimiser.zero_grad()
            (factor * towards * some.all_agents()["layer0.weight"]).sum().backward()
            optimiser.step()
        after = some.all_agents()["layer0.weight"].detach()
        return (after - before).expand(3, -1, -1)

    torch.testing.assert_close(moved(generator), moved(plain), rtol=1e-4, atol=1e-6)


def test_equiangular_embeddings_are_kept_and_do_not_move(tmp_path):
    settings = {
        "method": "hypermarl-linear",
        "hypernetwork": {"embedding": "equiangular", "cosine": 0.25, "bias": False},
        "env": "specialisation",
        "agents": 3,
        "frames": 64,
        "copies": 8,
        "steps": 4,
        "diagnostics": "off",
        "network": {"hidden": [4]},
    }
    train_run(TrainConfig.model_validate(settings), tmp_path / "r")
    saved, _ = newest_checkpoint(tmp_path / "r")
    for network in ("actor", "critic"):
        (table,) = (
            t for n, t in saved.tensors.items() if n.startswith(network) and n.endswith("embedding")
        )
        torch.testing.assert_close(table, turned(0.25).embedding, rtol=0, atol=0)
    policies = [load_policy(tmp_path / "r", agent=agent)(torch.ones(1, 1)) for agent in range(3)]
    assert not torch.equal(policies[0], policies[1])


def test_random_embeddings_are_standard_normal_and_fixed():
    config = SharingConfig(hypernetwork={"embedding": "random", "embedding_size": 64})
    generator = make("hypermarl-linear", mlp_of(2, 2, 2), 64, config)
    assert generator.embedding.std() == pytest.approx(1, rel=0.05)
    assert abs(generator.embedding.mean()) < 0.05
    assert "embedding" not in dict(generator.named_parameters())


def test_without_state_a_policy_is_a_network_of_the_id_alone():
    mlp = mlp_of(6, 8, 5, 4)
    generator = make("fups-id-nostate", mlp)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    plain = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4))
    theta = generator.theta
    with torch.no_grad():
        plain[0].weight.copy_(generator.id_columns.mT)
        plain[0].bias.copy_(theta["layer0/bias"])
        for place, layer in ((2, "layer1"), (4, "head")):
            plain[place].weight.copy_(theta[f"{layer}/weight"])
            plain[place].bias.copy_(theta[f"{layer}/bias"])
    assert trained(generator) == trained(plain)
    observation = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(2))
    found = mlp.forward(generator.all_agents(), observation)
    expected = plain(torch.eye(3))[:, None].expand(3, 7, 4)
    torch.testing.assert_close(found, expected)


def test_without_state_ids_start_as_a_layer_that_reads_nothing_else():
    columns = make("fups-id-nostate", mlp_of(6, 8, 4)).id_columns
    torch.testing.assert_close(columns @ columns.mT, 2 * torch.eye(3))


def test_adapters_add_an_agents_product_to_the_shared_weights():
    mlp = mlp_of(6, 8, 3)
    generator = make("adapters", mlp, config=SharingConfig(adapter={"rank": 5}))
    assert [tuple(generator.left[layer].shape) for layer in mlp.layers] == [(3, 8, 5), (3, 3, 3)]
    for layer in mlp.layers:
        shared = generator.theta[f"{layer}/weight"]
        for agent in range(3):
            change = generator.left[layer][agent] @ generator.right[layer][agent]
            found = generator(torch.tensor([agent]))[f"{layer}.weight"][0]
            torch.testing.assert_close(found, shared + change)


def test_adapters_start_as_long_as_the_shared_weights():
    generator = make("adapters", mlp_of(64, 48, 32), agents=64)
    for layer, left in generator.left.items():
        changes = (left @ generator.right[layer]).flatten(1)
        length = generator.theta[f"{layer}/weight"].square().sum().item()
        assert changes.square().sum(1).mean().item() == pytest.approx(length, rel=0.1)


def test_adapters_are_told_apart_by_their_changes():
    generator = make("adapters", mlp_of(6, 8, 3))
    rows, _ = generator.representation()
    assert rows.shape == (3, 6 * 8 + 8 * 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("own", [True, False])
def test_log_std_is_each_agents_own_or_shared(method, own):
    box = Box(low=-torch.ones(2), high=torch.ones(2))
    policy = make_policy(6, box, hidden=(4,), activation="tanh")
    generator = make(method, policy.network, own_log_std=own)
    policy = replace(policy, network=generator.mlp)
    parameter = dict(generator.named_parameters())
    (log_std,) = (p for name, p in parameter.items() if name.endswith("log_std"))
    shared = (2, 2) if method == "seps" else (2,)  # by a group
    assert log_std.shape == ((3, 2) if own else shared)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        log_std += torch.randn(log_std.shape, generator=random)
    if method == "seps":
        generator.group.copy_(torch.tensor([0, 1, 0]))
    of_agents = log_std[[0, 1, 0]] if method == "seps" and not own else log_std
    observation = torch.randn(3, 5, 6, generator=random)
    theta = generator.policy_for(observation)
    action, log_prob = policy.sample(theta, observation, random)
    normal = torch.distributions.Normal(
        policy.network.forward(theta, observation), of_agents.exp().expand(3, 2)[:, None]
    )
    torch.testing.assert_close(log_prob, normal.log_prob(action).sum(-1))
    again, entropy = policy.evaluate(theta, observation, action)
    torch.testing.assert_close(again, log_prob)
    torch.testing.assert_close(entropy, normal.entropy().sum(-1).expand(3, 5))


def test_separate_networks_that_share_log_std_are_clipped_apart_from_it():
    generator = make("nops", mlp_of(2, 3, 2, log_std=2), own_log_std=False)
    for parameter in generator.parameters():
        parameter.grad = torch.full_like(parameter, 5.0)
    generator.clip_gradients(0.5)
    shared = generator.theta["log_std"].grad
    assert shared.norm() == pytest.approx(0.5, rel=1e-4)
    own = [p.grad for name, p in generator.theta.items() if name != "log_std"]
    for agent in range(3):
        norm = torch.cat([gradient[agent].flatten() for gradient in own]).norm()
        assert 3 * norm == pytest.approx(0.5, rel=1e-4)


def small(folder, **settings):
    config = {"frames": 512, "copies": 8, "steps": 16, "agents": 3, "every": 2} | settings
    assert train_run(TrainConfig.model_validate(config), folder)
    return open_run(folder)


def test_actor_and_critic_have_schemes_of_their_own(tmp_path):
    run = small(tmp_path / "r", actor_method="nops", critic_method="fups")
    assert run.method == "nops+fups"
    assert [run.method_of(network) for network in ("actor", "critic")] == ["nops", "fups"]
    kappa = Trainer(TrainConfig.model_validate(run.config))
    assert kappa.actor.coupling_forms().trace[0, 0, 1] == 0
    assert kappa.critic.coupling_forms().trace[0, 0, 1] > 0
    cosine = run.quantity("cosine").sel(space="psi", layer="all", agent=0, agent_other=1)
    assert (cosine.sel(network="actor") == 0).all()
    assert (cosine.sel(network="critic") != 0).all()


def test_one_scheme_named_twice_is_that_scheme(tmp_path):
    run = small(tmp_path / "r", actor_method="fups-id", critic_method="fups-id", diagnostics="off")
    assert run.method == run.method_of("actor") == "fups-id"


@pytest.mark.parametrize("method", METHODS)
def test_a_description_adds_up_to_the_generator(method):
    mlp = mlp_of(6, 8, 5, 2, log_std=2)
    for own, shared in ((True, True), (False, False)):
        config = SharingConfig(hypernetwork={"shared_trunk": shared})
        generator = make(method, mlp, config=config, own_log_std=own)
        found = describe_generator("actor", method, generator)
        assert found.psi == trained(generator)
        networks = 2 if method == "dico" else 1
        assert found.theta == networks * mlp.size + 2
        assert mlp.size == 6 * 8 + 8 + 8 * 5 + 5 + 5 * 2 + 2
        names = [layer.name for layer in found.layers]
        layers = ["layer0", "layer1", "head"]
        if networks == 2:
            layers += [f"deviation_{layer}" for layer in layers]
        assert names[: len(layers) + 1] == [*layers, "log_std"]
        generated = method in {"hypermarl", "hypermarl-no-rf", "hypermarl-coupled"}
        assert ("trunk" in names) == (shared and generated)
        if method == "nops":
            assert ("shared log_std" in found.jacobian) != own
        else:
            assert ("own log_std" in found.jacobian) == own


def test_describe_prints_what_would_be_trained_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chosen = ["--method", "nops", "--critic-method", "hypermarl", "--network.match", "fups-id"]
    assert main(["train", "--describe", *chosen]) == 0
    printed = capsys.readouterr().out
    config = {"method": "nops", "critic_method": "hypermarl", "network": {"match": "fups-id"}}
    trainer = Trainer(TrainConfig.model_validate(config))
    for network in describe_networks(trainer):
        assert f"{network.network}: {network.method}" in printed
        assert f"{network.psi:,}" in printed
        assert f"{network.theta:,}" in printed
        assert f"J_i: {network.jacobian}." in printed
    total = trained(trainer.actor) + trained(trainer.critic)
    assert f"4 agents; {total:,} trained parameters." in printed
    assert not list(tmp_path.iterdir())


def test_table_of_the_docs_is_that_of_the_methods():
    rows = re.findall(
        r"^\| `([\w-]+)` \| ([\d,]+) \| ([\d,]+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE
    )
    expected = []
    for method in METHODS:
        generator = make(method, mlp_of(1, 64, 64, 4), 4)
        found = describe_generator("actor", method, generator)
        expected.append((method, f"{found.psi:,}", f"{found.theta:,}", found.jacobian))
    assert rows == expected


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"method": "fups-id-nostate"}, id="nostate", marks=pytest.mark.slow),
        pytest.param({"method": "hypermarl-no-rf"}, id="no-rf", marks=pytest.mark.slow),
        pytest.param({"method": "adapters"}, id="adapters", marks=pytest.mark.slow),
        pytest.param(
            {"hypernetwork": {"shared_trunk": True, "embedding": "orthogonal"}},
            id="shared trunk",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"actor_method": "hypermarl", "critic_method": "fups", "network": {"match": "fups-id"}},
            id="apart",
        ),
    ],
)
def test_specialisation_is_learned(tmp_path, settings):
    run = small(
        tmp_path / "r",
        **settings,
        agents=2,
        frames=60_000,
        copies=64,
        steps=32,
        diagnostics="off",
    )
    assert np.mean(run.quantity("episode_return")[-3:]) > 0.95
