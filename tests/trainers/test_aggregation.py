"""One gradient made of the agents' own, against torchjd on rows from a plain loop over agents."""

import math
import warnings

import numpy as np
import pytest
import torch
from leaving_game import AGENTS, LeavingGame
from test_resume import same_end, train

from gradlab.checks import UsageError
from gradlab.run import open_run
from trainers.aggregation import Aggregation
from trainers.aggregators import AGGREGATORS, Aggregator, CantAggregate, make_aggregator
from trainers.config import TrainConfig
from trainers.critic_input import critic_source
from trainers.loop import Trainer
from trainers.parameters import Parameters
from trainers.samples import Weights, exist, of_network
from trainers.train import train_run

aggregation = pytest.importorskip("torchjd.aggregation")

COPIES, STEPS = 4, 6
SETTINGS = {
    "env": "specialisation-temporal",
    "env_args": {"horizon": 4},
    "agents": 4,
    "copies": COPIES,
    "steps": STEPS,
    "frames": COPIES * STEPS * 4,
    "network": {"hidden": [5]},
    "hypernetwork": {"hidden": [6]},
    "ppo": {"minibatches": 2, "epochs": 1, "max_gradient_norm": 1e9, "clip": 0.05},
    "every": 2,
    "effects_every": 2,
}
GRU = {"network": {"hidden": [5], "memory": "gru", "memory_size": 4}}
SOURCES = {
    "fups": {"method": "fups"},
    "fups-id, mappo": {"method": "fups-id", "algorithm": "mappo"},
    "fups, mappo, continuous": {
        "method": "fups",
        "algorithm": "mappo",
        "env": "vmas/navigation",
        "env_args": {},
    },
    "nops": {"method": "nops"},
    "hypermarl": {"method": "hypermarl"},
    "hypermarl-linear, mappo": {"method": "hypermarl-linear", "algorithm": "mappo"},
    "coupled": {"method": "hypermarl-coupled"},
    "coupled, continuous": {
        "method": "hypermarl-coupled",
        "env": "vmas/navigation",
        "env_args": {},
        "network": {"hidden": [5], "log_std": "agent"},
    },
    "fups, gru": {"method": "fups", **GRU},
    "hypermarl, gru, mappo": {"method": "hypermarl", "algorithm": "mappo", **GRU},
    "coupled, gru": {"method": "hypermarl-coupled", **GRU},
    "coupled, gru, leaving": {"method": "hypermarl-coupled", "leaving": True, **GRU},
    "fups-id, leaving": {"method": "fups-id", "leaving": True},
    "hypermarl, leaving": {"method": "hypermarl", "leaving": True},
}
CLOSE = {"rtol": 1e-9, "atol": 1e-13}
ARGUMENTS = {"nash-mtl": {"update_weights_every": 2}, "excess-mtl": {"n_warmup_steps": 1}}


@pytest.fixture
def trainer_of(monkeypatch):
    """Makes trainers in float64, with what they are about to train on."""

    def make(settings, **more):
        given = SETTINGS | settings | more
        if given.pop("leaving", False):
            given |= {"agents": AGENTS, "env_args": {}, "steps": 20}
            monkeypatch.setattr(
                "trainers.loop.make_env",
                lambda _name, *, copies, seed, **_: LeavingGame(copies, seed=seed),
            )
        trainer = Trainer(TrainConfig.model_validate(given))
        samples = trainer._collect().samples
        random = torch.Generator().manual_seed(1)
        for network in (trainer.actor.double(), trainer.critic.double()):
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter += 0.2 * torch.randn(parameter.shape, generator=random)
        for name in ("advantage", "target"):  # agents that want different things
            samples[name] = torch.randn(samples[name].shape, generator=random)
            wants = torch.randn(len(samples[name]), generator=random)
            samples[name] += wants.view(-1, *[1] * (samples[name].dim() - 1))
        return trainer, {n: t.double() if t.is_floating_point() else t for n, t in samples.items()}

    return make


def plain_rows(trainer, samples):
    """Each agent's gradient of both networks by a loop over agents, with what the losses are of."""
    batch = dict(samples)
    there = torch.ones(1) if "active" not in batch else batch["active"]
    advantage = batch["advantage"]
    known = advantage[there.bool().expand_as(advantage)]
    deviation = ((known - known.mean()).square().sum() / (len(known) - 1)).sqrt()
    batch["advantage"] = (advantage - known.mean()) / (deviation + 1e-8) * there
    read = trainer.learner._critic_input(batch[critic_source(batch)])
    found = {}
    for network, generator, loss, seen in (
        ("actor", trainer.actor, trainer.learner.policy_loss, batch["observation"]),
        ("critic", trainer.critic, trainer.learner.value_loss, read),
    ):
        rows = []
        for agent in range(trainer.spec.agents):
            losses = loss(
                generator.policy_for(seen), of_network(batch | {"observation": seen}, network)
            )[agent]
            own = exist(samples)
            mean = losses.mean() if own is None else losses[own[agent]].mean()
            gradients = torch.autograd.grad(
                mean / trainer.spec.agents, [*generator.parameters()], allow_unused=True
            )
            rows.append(
                torch.cat([
                    torch.zeros(p.numel()).double() if g is None else g.flatten()
                    for p, g in zip(generator.parameters(), gradients, strict=True)
                ])
            )
        found[network] = torch.stack(rows)
    return found


def one_step(trainer, samples):
    """Gradients by network after one step on all samples; the clip leaves them alone."""
    places = torch.arange(samples["advantage"].shape[1])
    weights = Weights.of(exist(samples))
    trainer.learner.updater._step(samples, samples, places, weights, trainer.random)
    return {
        network: torch.cat([p.grad.flatten() for p in getattr(trainer, network).parameters()])
        for network in ("actor", "critic")
    }


IN_CHUNKS = {"nops", "hypermarl", "coupled, continuous", "hypermarl, gru, mappo", "coupled, gru"}
IN_CHUNKS |= {"fups-id, leaving", "coupled, gru, leaving"}


@pytest.mark.parametrize(
    ("source", "rows"),
    [
        *(pytest.param(source, 4096, id=f"{source}-whole") for source in SOURCES),
        *(
            pytest.param(
                source,
                7,
                id=f"{source}-chunks",
                marks=() if source in IN_CHUNKS else pytest.mark.slow,
            )
            for source in SOURCES
        ),
    ],
)
def test_rows_are_those_of_a_loop_over_agents(monkeypatch, trainer_of, source, rows):
    monkeypatch.setattr("trainers.update.ROWS", rows)
    trainer, samples = trainer_of(SOURCES[source], aggregate="mean")
    expected, seen = plain_rows(trainer, samples), {}
    for network, made in trainer.learner.aggregations.items():
        made.aggregator._rows.register_forward_pre_hook(
            lambda _, given, network=network: seen.update({network: given[0]})
        )
    gradients = one_step(trainer, samples)
    for network in ("actor", "critic"):
        torch.testing.assert_close(seen[network], expected[network], **CLOSE)
        torch.testing.assert_close(gradients[network], expected[network].sum(0), **CLOSE)
        assert expected[network].norm(dim=1).min() > 1e-6


@pytest.mark.parametrize("source", SOURCES)
def test_mean_of_the_rows_is_the_plain_gradient(trainer_of, source):
    trainer, samples = trainer_of(SOURCES[source])
    other, _ = trainer_of(SOURCES[source], aggregate="mean")
    assert (
        type(trainer.learner.updater._parameters("actor", trainer.actor, trainer.random))
        is Parameters
    )
    plain, mean = one_step(trainer, samples), one_step(other, samples)
    for network in ("actor", "critic"):
        torch.testing.assert_close(mean[network], plain[network], **CLOSE)


def torchjd_of(name, agents):
    """What a user of torchjd would write, and the factor that makes a sum of it."""
    return {
        "mean": (aggregation.Mean(), agents),
        "upgrad": (aggregation.UPGrad(), agents),
        "dualproj": (aggregation.DualProj(), agents),
        "pcgrad": (aggregation.PCGrad(), 1),
        "gradvac": (aggregation.GradVac(), 1),
        "graddrop": (aggregation.GradDrop(), 1),
        "cagrad": (aggregation.CAGrad(c=0.5), agents),
        "mgda": (aggregation.MGDA(), agents),
        "imtl-g": (aggregation.IMTLG(), agents),
        "aligned-mtl": (aggregation.AlignedMTL(), agents),
        "config": (aggregation.ConFIG(), 1),
        "nash-mtl": (aggregation.NashMTL(n_tasks=agents), 1),
        "fairgrad": (aggregation.FairGrad(alpha=1.0), 1),
        "excess-mtl": (aggregation.ExcessMTL(), agents),
        "trimmed-mean": (aggregation.TrimmedMean(trim_number=1), agents),
        "krum": (aggregation.Krum(n_byzantine=1), agents),
        "random": (aggregation.Random(), agents),
    }[name]


@pytest.mark.parametrize("method", ["fups", "hypermarl"])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_gradient_is_what_torchjd_makes_of_the_rows(trainer_of, name, method):
    trainer, samples = trainer_of({"method": method}, aggregate=name)
    rows = plain_rows(trainer, samples)
    drawn = trainer.random.get_state()
    before = torch.get_rng_state()
    found = one_step(trainer, samples)
    assert torch.equal(torch.get_rng_state(), before)  # others' randomness stays theirs
    assert trainer.learner.updater._accounts()["aggregations_failed"].values.tolist() == [0, 0]
    torch.set_rng_state(drawn)
    changed = []
    for network in ("actor", "critic"):
        aggregator, factor = torchjd_of(name, trainer.spec.agents)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the solver
            expected = factor * aggregator(rows[network])
        # The solvers stop at a tolerance: what differs in the last bits may take another step.
        torch.testing.assert_close(found[network], expected, rtol=1e-6, atol=1e-7)
        changed.append(torch.dist(expected, rows[network].sum(0)) > 1e-6)
    # Nobody is against the sum of these, so that there is nothing to project it away from.
    assert any(changed) == (name not in {"mean", "dualproj"})
    assert torch.equal(torch.get_rng_state(), trainer.random.get_state())


EQUAL = torch.tensor([[1.0, 2.0, 0.5, -1.0]]).double().expand(4, -1).contiguous()
ORTHOGONAL = torch.diag(torch.tensor([2.0, 2.0, 2.0, 2.0])).double()
UNEQUAL = torch.diag(torch.tensor([1.0, 0.2, 3.0, -2.0])).double()
PROJECT = ["mean", "upgrad", "dualproj", "pcgrad", "gradvac", "graddrop"]
REWEIGH = ["mgda", "imtl-g", "aligned-mtl", "config"]


def aggregated(name, rows, **arguments):
    return Aggregator(name, arguments, tuple(rows.shape))(rows, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", [*PROJECT, *REWEIGH, "excess-mtl", "trimmed-mean", "krum", "random"]
)
def test_agents_that_agree_keep_the_plain_gradient(name):
    torch.testing.assert_close(aggregated(name, EQUAL), EQUAL.sum(0), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", [*PROJECT, *REWEIGH])
def test_orthogonal_gradients_of_one_length_keep_the_plain_gradient(name):
    found = aggregated(name, ORTHOGONAL)
    torch.testing.assert_close(found, ORTHOGONAL.sum(0), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", PROJECT)
def test_projections_leave_orthogonal_gradients_alone_whatever_their_lengths(name):
    torch.testing.assert_close(aggregated(name, UNEQUAL), UNEQUAL.sum(0), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rows", [EQUAL, ORTHOGONAL], ids=["equal", "orthogonal"])
def test_cagrad_is_longer_by_its_c_without_conflict(rows):
    found = aggregated("cagrad", rows, c=0.25)
    torch.testing.assert_close(found, 1.25 * rows.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PROJECT)
def test_projections_do_nothing_to_agents_that_share_nothing(trainer_of, name):
    trainer, samples = trainer_of({"method": "nops"}, aggregate=name)
    plain, _ = trainer_of({"method": "nops"})
    found, expected = one_step(trainer, samples), one_step(plain, samples)
    accounts = trainer.learner.updater._accounts()
    for network in ("actor", "critic"):
        torch.testing.assert_close(found[network], expected[network], **CLOSE)
    assert accounts["aggregated_cosine"].values == pytest.approx([1, 1])
    assert accounts["aggregated_length"].values == pytest.approx([1, 1])
    assert accounts["opposed_pairs"].values.tolist() == [0, 0]


def test_pcgrad_takes_opposed_agents_parts_against_each_other_away():
    rows = torch.tensor([[1.0, 0.0], [-2.0, 1.0]]).double()
    aggregation = Aggregation(make_aggregator("pcgrad", {}, (2, 2)))
    found = aggregation(rows, torch.Generator())
    # (1, 0) less its part along (-2, 1) is (0.2, 0.4); (-2, 1) less its part along (1, 0), (0, 1).
    torch.testing.assert_close(found, torch.tensor([0.2, 1.4]).double())
    quantities, failed = aggregation.account()
    numbers = {name: q.values.tolist() for name, q in quantities.items()}
    assert failed == ""
    plain, length = math.sqrt(2), math.sqrt(2.0)
    assert numbers == {
        "aggregated_cosine": pytest.approx(1.2 / (plain * length)),
        "aggregated_length": pytest.approx(length / plain),
        "worst_cosine": pytest.approx([-1 / plain, 0.2 / length]),
        "opposed_agents": [0.5, 0.0],
        "opposed_pairs": 1.0,
        "aggregations_failed": 0.0,
    }
    assert quantities["opposed_agents"].coords == {"direction": ["plain", "applied"]}


def test_account_is_the_mean_over_minibatches_and_starts_anew():
    aggregation = Aggregation(make_aggregator("mean", {}, (3, 3)))
    one = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0]]).double()  # a pair of three opposed
    nothing = torch.tensor([[1.0, 0, 0], [0, 0, 0], [-1, 0, 0]]).double()  # nowhere to go
    for rows in (one, one.abs(), nothing):
        aggregation(rows, torch.Generator())
    numbers = {name: q.values.tolist() for name, q in aggregation.account()[0].items()}
    assert numbers["opposed_pairs"] == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert numbers["opposed_agents"] == [0, 0]
    assert numbers["aggregated_cosine"] == pytest.approx(1)  # of the two that have a direction
    assert {*aggregation.account()[0]} == {"aggregations_failed"}


class Fake(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        self.forward = make


def test_rows_that_are_too_much_for_an_aggregator_are_a_finding_and_take_the_plain_gradient():
    aggregation = Aggregation(make_aggregator("nash-mtl", {}, (2, 2)))
    rows = torch.tensor([[0.0, 0.0], [0.0, 1.0]]).double()
    aggregation.aggregator._rows = Fake(lambda _: torch.tensor([math.nan, 0.0]))
    assert aggregation(rows, torch.Generator()).tolist() == [0, 1]
    aggregation.aggregator._rows = Fake(lambda _: int("no number"))
    assert aggregation(rows, torch.Generator()).tolist() == [0, 1]
    aggregation.aggregator._rows = Fake(lambda given: given.sum(0))
    assert aggregation(rows, torch.Generator()).tolist() == [0, 1]
    quantities, said = aggregation.account()
    assert quantities["aggregations_failed"].values == 2
    assert said == (
        "nash-mtl made nothing of the agents' gradients in 2 of 3 minibatches, which took the "
        "plain gradient (what it gave is not finite)"
    )
    assert math.isnan(aggregation(rows * math.nan, torch.Generator())[0])  # the training's to end


@pytest.mark.parametrize("name", AGGREGATORS)
def test_rows_of_zeros_are_no_crash(name):
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for zeros in ([2], [0, 1, 2, 3]):
        given = rows.clone()
        given[zeros] = 0
        aggregation = Aggregation(make_aggregator(name, {}, (4, 9)))
        assert aggregation(given, torch.Generator().manual_seed(0)).isfinite().all()
        aggregation.account()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        pytest.param(name, given, marks=pytest.mark.slow if name == "nash-mtl" else ())
        for name, given in [*((name, {}) for name in AGGREGATORS), *ARGUMENTS.items()]
    ],
    ids=str,
)
def test_memory_and_chance_go_on_from_what_was_saved(name, given):
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 4, 9, generator=random, dtype=torch.float64)
    for done in (0, 1, 3):
        first = Aggregator(name, given, (4, 9))
        for of_step in rows[:done]:
            first(of_step, random)
        state, drawn = first.state(), random.get_state()
        kept = {n: t.clone() for n, t in state.items()}
        expected = [first(of_step, random) for of_step in rows[3:]]
        second = Aggregator(name, given, (4, 9))
        second.load_state(kept)
        random.set_state(drawn)
        for of_step, wanted in zip(rows[3:], expected, strict=True):
            assert torch.equal(second(of_step, random), wanted)
        third = Aggregator(name, given, (4, 9))  # loading leaves what it is given alone
        third.load_state(kept)
        random.set_state(drawn)
        assert torch.equal(third(rows[3], random), expected[0])


RESUMED = {
    "gradvac": {"method": "fups"},
    "pcgrad": {"method": "hypermarl", "algorithm": "mappo"},
    "nash-mtl": {"method": "fups-id", "aggregate_args": {"update_weights_every": 3}},
    "excess-mtl": {"method": "hypermarl-coupled", "hypernetwork": {"hidden": [4]}},
}


@pytest.mark.parametrize(
    "name", [n if n == "gradvac" else pytest.param(n, marks=pytest.mark.slow) for n in RESUMED]
)
def test_stopped_and_resumed_run_ends_as_the_uninterrupted_one(tmp_path, name):
    settings = {
        "env": "specialisation",
        "agents": 3,
        "network": {"hidden": [6]},
        "ppo": {"epochs": 1},
        "diagnostics": "off",
        "aggregate": name,
        **RESUMED[name],
    }
    train(tmp_path / "whole", settings)
    train(tmp_path / "parts", settings, stop_after=3)
    train(tmp_path / "parts", settings)
    same_end(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(UsageError, match=rf"aggregate='{name}', not 'mgda'"):
        train(tmp_path / "parts", settings | {"aggregate": "mgda", "aggregate_args": {}})


def test_run_says_what_came_of_it_by_network_and_diagnoses_as_ever(tmp_path):
    settings = SETTINGS | {"method": "fups", "env": "specialisation", "env_args": {}}
    train_run(TrainConfig.model_validate(settings), tmp_path / "plain")
    train_run(TrainConfig.model_validate(settings | {"aggregate": "upgrad"}), tmp_path / "upgrad")
    plain, run = open_run(tmp_path / "plain"), open_run(tmp_path / "upgrad")
    assert (plain.method, run.method, run.method_of("actor")) == ("fups", "fups+upgrad", "fups")
    added = {*run.quantities} - {*plain.quantities}
    assert added == {
        *("aggregated_cosine", "aggregated_length", "worst_cosine", "opposed_agents"),
        *("opposed_pairs", "aggregations_failed"),
    }
    opposed = run.quantity("opposed_agents")
    assert opposed.dims == ("update", "network", "direction")
    assert opposed.sizes["update"] == 4
    of_actor = opposed.sel(network="actor")
    assert of_actor.sel(direction="plain").max() > 0
    assert (of_actor.sel(direction="applied") == 0).all()
    for name in ("cosine", "norm"):  # of the first update nothing differs yet
        np.testing.assert_array_equal(plain.quantity(name)[0], run.quantity(name)[0])
    assert run.metrics["aggregated_cosine"].sel(network="actor").notnull().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"aggregate": "pcgrd"}, "Unknown aggregator 'pcgrd'. Did you mean 'pcgrad'? Known: none,"),
        (
            {"aggregate": "cagrad", "aggregate_args": {"k": 1}},
            "Unknown argument of the aggregator cagrad 'k'. Known: c, norm_eps.",
        ),
        (
            {"aggregate": "cagrad", "aggregate_args": {"c": -1}},
            "`aggregate` can't be cagrad with 4 agents and arguments c=-1: ",
        ),
        (
            {"aggregate": "nash-mtl", "aggregate_args": {"n_tasks": 3}},
            "Unknown argument of the aggregator nash-mtl 'n_tasks'. Known: max_norm,",
        ),
        (
            {"aggregate": "upgrad", "aggregate_args": {"pref_vector": [1.0, 2.0]}},
            "`aggregate` can't be upgrad with 4 agents and arguments pref_vector=[1.0, 2.0]: ",
        ),
        (
            {"aggregate": "krum", "agents": 2},
            "`aggregate` can't be krum with 2 agents and arguments n_byzantine=1: ",
        ),
        (
            {"aggregate_args": {"c": 1}},
            "`aggregate_args` must be empty without an --aggregate. Got aggregate_args={'c': 1}.",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)),
)
def test_what_can_not_be_aggregated_is_said_before_anything_is_trained(settings, said):
    with pytest.raises(UsageError) as error:
        Trainer(TrainConfig.model_validate(SETTINGS | {"method": "fups"} | settings))
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_projections_can_be_told_how_far_to_trust_small_gradients():
    rows = torch.tensor([[1.0, 0.0], [-0.01, 0.002]]).double()
    least = [
        (rows @ aggregated("upgrad", rows, **given)).min().item()
        for given in ({}, {"reg_eps": 1e-9, "norm_eps": 1e-9})
    ]
    assert least[0] < -1e-4 < -1e-6 < least[1]  # the default's slack is larger than the agent


def test_a_weight_for_each_agent_is_a_list():
    rows = torch.eye(3).double()
    found = aggregated("upgrad", rows, pref_vector=[1.0, 0.0, 2.0])
    torch.testing.assert_close(found, 3 * torch.tensor([1.0, 0, 2]).double())


def test_missing_library_is_said_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr("gradlab.extras.installed", lambda module: module != "clarabel")
    with pytest.raises(UsageError) as error:
        make_aggregator("cagrad", {}, (2, 2))
    assert str(error.value) == (
        "the aggregator cagrad needs clarabel, which is not installed. Install it: pip install "
        "'gradlab[aggregate]'"
    )


def test_failure_of_a_solver_is_named():
    aggregator = make_aggregator("mean", {}, (2, 2))
    aggregator._rows = Fake(lambda _: int("no\nnumber."))
    with pytest.raises(CantAggregate, match=r"^invalid literal .* 'no\\nnumber\.'$"):
        aggregator(torch.eye(2).double(), torch.Generator())
