"""Numbers at the edges of what floating point can hold: said, never a crash, nothing altered."""

import errno
import warnings

import pytest
import torch
from torch import nn

import gradlab

AGENTS = 3


def policy_loss(policy, sample):
    chosen = nn.functional.one_hot(sample["action"], 2).to(sample["advantage"])
    return -(policy(sample["observation"]).log_softmax(-1) * chosen).sum(-1) * sample["advantage"]


def batch_of(samples, dtype):
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(AGENTS, samples, *shape, generator=random)  # noqa: E731
    return {
        "observation": draw(4).to(dtype),
        "action": (draw() > 0).long(),
        "advantage": draw().to(dtype),
    }


def diagnosed(folder, batch, dtype=torch.float32, level="full"):
    """What is found and said of a batch, by a probe that must leave its policy as it is."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    before = [p.detach().clone() for p in policy.parameters()]
    copy = torch.arange(batch["action"].shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with gradlab.Probe(policy, policy_loss, agents=AGENTS, out=folder, level=level) as probe:
            found = probe(batch, copy=copy)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert all(p.grad is None for p in policy.parameters())
    assert gradlab.open_run(folder).state == "done"
    return found, probe.findings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_policies_of_half_precision_are_measured_exactly(tmp_path, dtype):
    batch = batch_of(12, dtype)
    found, findings = diagnosed(tmp_path / "full", batch, dtype)
    light, _ = diagnosed(tmp_path / "light", batch, dtype, "light")
    single, _ = diagnosed(tmp_path / "single", batch_of(12, torch.float32))
    assert not findings
    assert float(found["residual"].max()) < 1e-12
    assert (found["variance_agent"].sel(layer="all") > 0).all()
    torch.testing.assert_close(found["cosine"].values, light["cosine"].values)
    assert abs(found["mean_cosine"] - single["mean_cosine"]).max() < 0.01


def test_zero_advantages_are_said_to_have_no_direction(tmp_path):
    batch = batch_of(12, torch.float32)
    batch["advantage"][1] = 0
    found, findings = diagnosed(tmp_path / "one", batch)
    said = "the gradient is zero in all samples; it has no direction."
    assert findings == [f"actor, agent 1: {said}"]
    cosine = found["cosine"].sel(layer="all", space="psi", network="actor")
    assert cosine.sel(agent=1, agent_other=0).isnull()
    assert cosine.sel(agent=0, agent_other=2).notnull()
    batch["advantage"].zero_()
    assert diagnosed(tmp_path / "all", batch)[1] == [
        f"actor, agent {agent}: {said}" for agent in range(AGENTS)
    ]


def test_denormal_gradients_are_said_by_agent_and_layer(tmp_path):
    batch = batch_of(12, torch.float32)
    batch["advantage"][2] *= 1e-42
    found, findings = diagnosed(tmp_path / "r", batch)
    assert [sentence.partition(":")[0] for sentence in findings] == [
        "actor, agent 2, layer 0",
        "actor, agent 2, layer 2",
    ]
    assert all("so small" in sentence for sentence in findings)
    assert found["norm"].notnull().all()


def test_overflowing_gradients_are_said_by_agent_and_layer(tmp_path):
    batch = batch_of(12, torch.float32)
    batch["advantage"][0] = 3e38
    _, findings = diagnosed(tmp_path / "r", batch)
    assert [sentence.partition(":")[0] for sentence in findings] == [
        "actor, agent 0, layer 0",
        "actor, agent 0, layer 2",
    ]
    assert all("is not finite in 12 of 12 samples" in sentence for sentence in findings)


def test_constant_observations_are_measured_like_any(tmp_path):
    batch = batch_of(12, torch.float32)
    batch["observation"][:] = 1
    found, findings = diagnosed(tmp_path / "r", batch)
    assert not findings
    assert float(found["residual"].max()) < 1e-6
    assert found["cosine"].notnull().all()


def test_one_sample_has_a_gradient_and_no_interval(tmp_path):
    found, findings = diagnosed(tmp_path / "r", batch_of(1, torch.float32))
    assert not findings
    assert found["cosine"].notnull().all()
    assert found["cosine_low"].isnull().all()
    assert (found["variance_agent"] < 1e-6).all()  # but for rounding


def test_loop_goes_on_though_the_disk_refuses(tmp_path, monkeypatch):
    policy = nn.Linear(4, 2)
    batch = batch_of(12, torch.float32)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    probe = gradlab.Probe(policy, policy_loss, agents=AGENTS, every=1, out=tmp_path / "r")
    with monkeypatch.context() as patched:
        patched.setattr("gradlab.run_writer.write_atomically", refuse)
        with pytest.warns(match=r"run\.json can't be written: No space left on device: what was"):
            assert probe(batch) is not None
        probe._writer._database.execute("PRAGMA max_page_count = 1")  # the database is full
        with pytest.warns(
            match=r"records\.sqlite can't be written: database or disk is full: what"
        ):
            assert probe({**batch, "observation": batch["observation"] + 1}) is not None
        probe._writer._database.execute("PRAGMA max_page_count = 1000000")
        probe(batch)
        with pytest.warns(match="will be shown as died"):
            probe.close()
    run = gradlab.open_run(tmp_path / "r")
    assert run.updates("cosine") == [0, 2]
    assert run.state == "died"
