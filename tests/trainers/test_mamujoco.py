import ast
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from resuming import same_end

from gradlab.checks import UsageError
from gradlab.cli import run as main
from gradlab.run import open_run
from trainers.checkpoints import newest_checkpoint
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.envs.mamujoco import ROBOTS, copy_seed, mamujoco_names
from trainers.envs.vector_env import Box, EnvironmentFailed, RenderingFailed
from trainers.train import train_run

NAMES = [*mamujoco_names(), "manyagent_ant-3x1", "manyagent_swimmer-2x1"]
FAST = ("halfcheetah-2x3", "humanoid-9|8")
EVERY = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES]
COUPLED = "coupled_half_cheetah"


def make(name, *, copies=3, seed=0, info=False, agents=None, **args):
    args = {"max_episode_steps": 7, "workers": 2, **args}
    return make_env(
        f"mamujoco/{name}", copies=copies, seed=seed, args=args, info=info, agents=agents
    )


def actions(env, steps, seed=0):
    random = torch.Generator().manual_seed(seed)
    space = env.spec.action_space
    assert isinstance(space, Box)
    shape = (steps, env.spec.agents, env.copies, space.size)
    return space.low + (space.high - space.low) * torch.rand(shape, generator=random)


def play(env, steps=10, seed=0):
    """All that an environment says."""
    said = [env.reset()]
    for action in actions(env, steps, seed):
        step = env.step(action)
        said += [
            env.world_state(),
            step.final_world_state,
            step.observation,
            step.reward,
            step.terminated,
            step.truncated,
        ]
        said += [step.final_observation, *step.info.values()]
    return said


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def the_library(name, obsk):
    """gymnasium-robotics' own environment."""
    import mujoco
    from gymnasium_robotics import mamujoco_v1
    from gymnasium_robotics.envs.multiagent_mujoco.obsk import get_parts_and_edges

    mujoco.set_mju_user_warning(lambda _: None)  # it would write a file
    robot_name, _, partition = name.partition("-")
    robot = ROBOTS[robot_name]
    arguments = {"agent_obsk": obsk}
    conf = partition
    if partition == f"1x{robot.joints}":
        conf = None
    elif robot.joints is not None:
        conf = partition if partition in robot.partitions else robot.partitions[0]
        parts, edges, shared = get_parts_and_edges(robot.label, conf)
        for joint in (joint for part in parts for joint in part):
            joint.label += f" {joint.act_ids}" if robot_name == "pusher" else ""
        if conf != partition:
            joints = sorted((x for part in parts for x in part), key=lambda joint: joint.act_ids)
            parts = [(joint,) for joint in joints]
        arguments["agent_factorization"] = {"partition": parts, "edges": edges, "globals": shared}
    return mamujoco_v1.parallel_env(robot.label, conf, **arguments)


def padded(parts, size):
    rows = [np.pad(part, (0, size - len(part))) for part in parts]
    return torch.from_numpy(np.stack(rows)).float()


@pytest.mark.parametrize("name", [x for x in EVERY if COUPLED not in x.values[0]])
def test_steps_are_those_of_gymnasium_robotics(name):
    env = make(name, info=True)
    peers = [the_library(name, 1) for _ in range(env.copies)]
    agents = peers[0].possible_agents
    assert env.spec.agent_names == tuple(agents)
    sizes = [peers[0].action_space(agent).shape[0] for agent in agents]
    seen = [peers[0].observation_space(agent).shape[0] for agent in agents]
    assert env.spec.action_space.size == max(sizes)
    assert env.spec.observation_size == max(seen)
    assert env.spec.action_sizes == (tuple(sizes) if len(set(sizes)) > 1 else None)
    assert env.spec.observation_sizes == (tuple(seen) if len(set(seen)) > 1 else None)
    space = peers[0].action_space(agents[0])
    assert (env.spec.action_space.low == space.low[0]).all()
    assert (env.spec.action_space.high == space.high[0]).all()

    def observed(parts):
        return padded([parts[agent] for agent in agents], env.spec.observation_size)

    first = env.reset()
    for copy, peer in enumerate(peers):
        assert torch.equal(first[:, copy], observed(peer.reset(seed=copy_seed(0, copy))[0]))
    ended = 0
    lengths = [0] * env.copies
    for action in actions(env, 20):
        step = env.step(action)
        for copy, peer in enumerate(peers):
            own = {
                agent: action[i, copy, : sizes[i]].double().numpy()
                for i, agent in enumerate(agents)
            }
            found, reward, terminated, _, info = peer.step(own)
            lengths[copy] += 1
            assert torch.equal(step.final_observation[:, copy], observed(found))
            assert step.reward[:, copy].tolist() == [np.float32(reward[a]) for a in agents]
            assert step.terminated[copy] == terminated[agents[0]]
            assert step.truncated[copy] == (lengths[copy] == 7 and not terminated[agents[0]])
            for measure, values in step.info.items():
                assert values[0, copy] == np.float32(info[agents[0]][measure])
            if step.ended[copy]:
                lengths[copy] = 0
                ended += 1
                found, _ = peer.reset()
            assert torch.equal(step.observation[:, copy], observed(found))
    assert ended >= 2 * env.copies


@pytest.mark.slow
def test_coupled_cheetahs_are_those_of_their_model():
    """gymnasium-robotics itself can't step them: it takes MuJoCo's Jacobians for dense."""
    import gymnasium_robotics
    import mujoco

    mujoco.set_mju_user_warning(lambda _: None)
    assets = Path(gymnasium_robotics.__file__).parent / "envs" / "multiagent_mujoco" / "assets"
    model = mujoco.MjModel.from_xml_path(str(assets / "coupled_half_cheetah.xml"))
    data = mujoco.MjData(model)
    env = make("coupled_half_cheetah-1p1", max_episode_steps=30)
    env.reset()
    start = env.state()[0]["/physics"][1].numpy()
    mujoco.mj_setState(model, data, start, mujoco.mjtState.mjSTATE_INTEGRATION)
    jacobian = np.zeros((1, model.nv))
    for action in actions(env, 20):
        step = env.step(action)
        before = data.qpos[[0, 9]].copy()
        data.ctrl[:] = action[:, 1].flatten()
        mujoco.mj_step(model, data, nstep=5)
        pattern = model.ten_J_rownnz, model.ten_J_rowadr, model.ten_J_colind
        mujoco.mju_sparse2dense(jacobian, data.ten_J, *pattern)
        tendon = [*jacobian[0, [0, 1, 9, 10]], data.ten_length[0], data.ten_velocity[0]]
        state = [*data.qpos[1:9], *data.qpos[10:18], *data.qvel, *tendon]
        np.testing.assert_array_equal(env.world_state()[1], np.float32(state))
        speed = (data.qpos[[0, 9]] - before).mean() / (5 * model.opt.timestep)
        reward = speed - 0.1 * np.square(data.ctrl).sum() / 2
        np.testing.assert_allclose(step.reward[:, 1], reward, rtol=1e-5)
    # joints (as there, both agents' are read off the second), then the tendon at the thigh
    own = [x for i in (-4, -5, -6) for x in (data.qpos[i], data.qvel[i])]
    rest = [x for i in (-1, -2, -3) for x in (data.qpos[i], data.qvel[i])]
    roots = [data.qpos[i] for i in (2, 1, 11, 10)] + [data.qvel[i] for i in (0, 2, 1, 9, 11, 10)]
    seen = [*own[:2], *own[2:4], *own[4:], *tendon, *rest, *roots]
    np.testing.assert_array_equal(step.observation[0, 1].sort().values, np.sort(np.float32(seen)))


@pytest.mark.parametrize("name", ["walker2d-2x3", "humanoid-17x1"])
def test_without_limits_on_what_they_see_all_agents_see_the_state(name):
    env = make(name, agent_obsk=None)
    plain, scaled = play(env), play(make(name, agent_obsk=None, standardise=True))
    peer = the_library(name, 1)
    peer.reset(seed=copy_seed(0, 2))
    assert plain[0].shape == (env.spec.agents, 3, len(peer.state()))
    assert env.spec.observation_sizes is None
    assert (plain[0][:, 2] == torch.from_numpy(peer.state()).float()).all()
    for one, other in zip(plain, scaled, strict=True):
        if one.shape[-1] == len(peer.state()):  # each is shifted and scaled by itself
            mean, std = one.mean(-1, keepdim=True), one.std(-1, correction=0, keepdim=True)
            torch.testing.assert_close(other, (one - mean) / std, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(one, other)


def test_what_is_padded_stays_zero_when_standardised():
    env = make("humanoid-9|8", standardise=True)
    assert env.spec.observation_sizes == (242, 170)
    assert env.spec.action_sizes == (9, 8)
    seen = env.reset()
    assert seen[1, :, 170:].eq(0).all()
    own = seen[1, :, :170]
    torch.testing.assert_close(own.mean(-1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(own.std(-1, correction=0), torch.ones(3), rtol=1e-5, atol=0)
    # a component that the agent does not have has no effect
    one, other = make("humanoid-9|8"), make("humanoid-9|8")
    one.reset()
    other.reset()
    action = actions(one, 1)[0]
    changed = action.clone()
    changed[1, :, 8] = 0.3
    assert torch.equal(one.step(action).observation, other.step(changed).observation)


def test_seeds_reproduce_whatever_the_number_of_workers_and_leave_torch_alone():
    state = torch.random.get_rng_state()
    one = play(make("hopper-3x1", copies=4, seed=5, max_episode_steps=1000), 60)
    assert any(x.any() for x in one[5::7])  # robots fell
    other = make("hopper-3x1", copies=4, seed=5, workers=1, max_episode_steps=1000)
    assert same(one, play(other, 60))
    assert not same(one, play(make("hopper-3x1", copies=4, seed=6, max_episode_steps=1000), 60))
    starts = one[0].transpose(0, 1).flatten(1)
    assert len(starts.unique(dim=0)) == 4
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", EVERY)
def test_state_is_all_that_the_future_depends_on(name):
    env, other = make(name), make(name, seed=5, workers=1)
    for played, steps in ((env, 10), (other, 5)):
        played.reset()
        for action in actions(played, steps):
            played.step(action)
    other.load_state(*env.state())
    assert torch.equal(env.world_state(), other.world_state())
    for action in actions(env, 17, seed=1):
        one, two = env.step(action), other.step(action)
        for field in ("observation", "final_observation", "reward", "terminated", "truncated"):
            assert torch.equal(getattr(one, field), getattr(two, field)), field
        assert torch.equal(env.world_state(), other.world_state())


def test_partitions_are_all_that_gymnasium_robotics_has():
    from gymnasium_robotics.envs.multiagent_mujoco import obsk

    source = ast.parse(inspect.getsource(obsk.get_parts_and_edges))
    known = {}
    for node in ast.walk(source):
        if isinstance(node, ast.If) and "label in" in ast.unparse(node.test):
            body = "\n".join(map(ast.unparse, node.body))
            for label in ast.literal_eval(node.test.comparators[0]):
                known[label] = re.findall(r"partitioning == '(.+?)'", body)
    for robot in ROBOTS.values():
        if robot.joints is not None:
            assert list(robot.partitions) == known.pop(robot.label, []), robot.label
            for partition in robot.partitions:
                parts, _, _ = obsk.get_parts_and_edges(robot.label, partition)
                assert sum(map(len, parts)) == robot.joints
        else:
            assert known.pop(robot.label) == []
    assert not known


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("antt-4x2", {}, "Unknown MAMuJoCo robot 'antt'. Did you mean 'ant'. Known: ant, half"),
        ("ant-3x2", {}, "Unknown partition of ant '3x2'.* Known: 2x4, 2x4d, 4x2, 8x1, 1x8"),
        ("ant", {}, "Unknown partition of ant ''"),
        ("manyagent_swimmer-0x2", {}, "Unknown partition of manyagent_swimmer '0x2'. .* e.g. 10x2"),
        ("manyagent_swimmer-1x1", {}, "at least 2 in all"),
        ("ant-4x2", {"agents": 3}, "`agents` must be 4 in this partition. Got agents=3"),
        ("ant-4x2", {"agent_obskk": 3}, "of mamujoco/ant-4x2 'agent_obskk'. Did you mean 'agent_o"),
        ("ant-4x2", {"agent_obsk": -1}, "`agent_obsk` must be a whole number of at least 0, or n"),
        ("ant-4x2", {"workers": 0}, "`workers` must be a whole number of at least 1"),
        ("ant-4x2", {"patience": 0.5}, "`patience` must be a whole number of at least 1"),
        ("ant-4x2", {"standardise": 1}, "`standardise` must be true or false"),
        ("hopper-3x1", {"ctrl_cost_weigth": 1}, "Did you mean 'ctrl_cost_weight'"),
        ("hopper-3x1", {"ctrl_cost_weight": "x"}, "mamujoco/hopper-3x1 can't be made with"),
    ],
)
def test_bad_input_is_one_line(name, options, message):
    with pytest.raises(UsageError, match=message) as error:
        make(name, **options)
    assert len(str(error.value).splitlines()) == 1


def children(process):
    """The processes that a process has started."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def gone(process):
    """Whether a process has ended; waits for it."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_dead_worker_is_named_with_its_cause_and_the_environment_starts_anew():
    before = set(children(os.getpid()))
    env = make("halfcheetah-2x3", copies=5)
    workers = sorted(set(children(os.getpid())) - before)
    assert len(workers) == 2
    env.reset()
    kept = env.state()
    action = actions(env, 1)[0]
    expected = env.step(action).observation
    os.kill(workers[1], signal.SIGKILL)
    with pytest.raises(EnvironmentFailed) as failure:
        env.step(action)
    assert str(failure.value).startswith(
        "mamujoco/halfcheetah-2x3: worker 1 of 2 (copies 3 to 4) was killed by SIGKILL"
    )
    assert gone(workers[0])
    with pytest.raises(EnvironmentFailed, match="its workers have ended"):
        env.step(action)
    env.load_state(*kept)
    assert torch.equal(env.step(action).observation, expected)
    anew = set(children(os.getpid())) - before
    os.kill(min(anew), signal.SIGSEGV)
    with pytest.raises(EnvironmentFailed, match=r"worker 0 of 2 \(copies 0 to 2\).* SIGSEGV"):
        env.step(action)
    assert env.reset().isfinite().all()


def test_worker_that_hangs_is_named_and_the_environment_starts_anew():
    before = set(children(os.getpid()))
    env = make("inverted_pendulum-1x1", patience=60)
    workers = sorted(set(children(os.getpid())) - before)
    env.reset()
    env._workers._patience = 0.2  # its start takes longer
    os.kill(workers[1], signal.SIGSTOP)
    with pytest.raises(EnvironmentFailed) as failure:
        env.step(actions(env, 1)[0])
    assert str(failure.value).startswith(
        "mamujoco/inverted_pendulum-1x1: worker 1 of 2 (copy 2) has not answered for 0.2 s"
    )
    assert all(gone(worker) for worker in workers)
    env._workers._patience = 60
    assert env.reset().isfinite().all()


def test_workers_end_with_their_environment():
    before = set(children(os.getpid()))
    env = make("halfcheetah-2x3")
    workers = set(children(os.getpid())) - before
    assert len(workers) == 2
    del env
    assert all(gone(worker) for worker in workers)


def test_exception_in_a_worker_is_its_cause():
    env = make("halfcheetah-2x3")
    env.reset()
    with pytest.raises(EnvironmentFailed, match=r"worker 0 of 2 .* failed: AttributeError: .*jump"):
        env._workers.ask("jump")


def test_drawing_follows_the_robot():
    env = make("hopper-3x1", copies=2)
    env.reset()
    before = env.render(1)
    for action in actions(env, 5):
        env.step(action)
    after = env.render(1)
    assert before.shape == (480, 480, 3)
    assert len(np.unique(before)) > 50
    assert (before != after).any()
    assert (after == env.render(1)).all()


def test_without_opengl_what_to_install_is_said(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")  # another than is asked for, as if not there
    env = make("hopper-3x1", copies=1)
    env.reset()
    with pytest.raises(RenderingFailed, match=r"can't be drawn here \(.+apt-get install libegl1"):
        env.render(0)
    assert env.step(actions(env, 1)[0]).reward.isfinite().all()


UPDATES = 40
SETTINGS = {
    "method": "fups-id",
    "env": "mamujoco/halfcheetah-2x3",
    "env_args": {"max_episode_steps": 20, "workers": 2},
    "copies": 4,
    "steps": 4,
    "frames": 4 * 4 * UPDATES,
    "ppo": {"epochs": 1, "minibatches": 1},
    "network": {"hidden": [8]},
    "diagnostics": "off",
}
OPTIONS = [
    *("--method", "fups-id", "--env", "mamujoco/halfcheetah-2x3", "--copies", "4"),
    *("--env-arg", "max_episode_steps=20", "--env-arg", "workers=2", "--diagnostics", "off"),
    *("--steps", "4", "--frames", str(4 * 4 * UPDATES), "--network.hidden", "8"),
    *("--ppo.epochs", "1", "--ppo.minibatches", "1"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mamujoco") / "whole"
    assert train_run(TrainConfig.model_validate(SETTINGS), folder)
    return folder


def interrupted(folder, interrupt):
    """A training in a process of its own to which something happens after some updates."""
    command = [sys.executable, "-m", "gradlab", "train", *OPTIONS, "--out", "r"]
    with subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        records = folder / "r" / "records.sqlite-wal"
        while process.poll() is None and not (records.exists() and records.stat().st_size > 80_000):
            time.sleep(0.01)
        workers = children(process.pid)
        assert len(workers) == 2
        interrupt(process.pid, workers)
        _, error = process.communicate(timeout=60)
    assert all(gone(worker) for worker in workers)
    return process.returncode, error


def ends_as_the_whole(folder, whole):
    assert len(open_run(folder / "r").quantity("frames")) < UPDATES
    assert train_run(TrainConfig.model_validate(SETTINGS), folder / "r", resume=True)
    same_end(whole, folder / "r")


@pytest.mark.slow
def test_training_whose_worker_is_killed_is_saved_and_ends_with_status_1(tmp_path, whole):
    status, error = interrupted(tmp_path, lambda _, workers: os.kill(workers[1], signal.SIGKILL))
    assert status == 1
    assert len(error.splitlines()) == 1
    pattern = (
        r"gradlab: training failed: update (\d+): mamujoco/halfcheetah-2x3: worker \d of 2 "
        r"\(copies . to .\) was killed by SIGKILL .*\. Saved is the state after update (\d+); "
        r"to go on from there: gradlab train --resume --out r"
    )
    found = re.match(pattern, error)
    assert found, error
    assert int(found[2]) == int(found[1]) - 1
    saved, _ = newest_checkpoint(tmp_path / "r")
    assert saved is not None
    assert saved.update == int(found[2])
    assert open_run(tmp_path / "r").state == "failed"
    ends_as_the_whole(tmp_path, whole)


@pytest.mark.slow
def test_workers_of_a_killed_training_end_and_it_resumes_to_the_same_bits(tmp_path, whole):
    status, _ = interrupted(tmp_path, lambda trainer, _: os.kill(trainer, signal.SIGKILL))
    assert status == -signal.SIGKILL
    ends_as_the_whole(tmp_path, whole)


@pytest.mark.slow
def test_ctrl_c_reaches_the_trainer_alone(tmp_path):
    status, error = interrupted(tmp_path, lambda trainer, _: os.killpg(trainer, signal.SIGINT))
    assert status == 130
    assert error == "gradlab: stopped and saved. To go on: gradlab train --resume --out r\n"
    assert open_run(tmp_path / "r").state == "stopped"


@pytest.mark.slow
def test_animation_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    settings = SETTINGS | {"frames": 64, "env_args": {"max_episode_steps": 6}}
    assert train_run(TrainConfig.model_validate(settings), tmp_path / "r")
    assert main(["evaluate", "r", "--episodes", "2", "--animate", "film.gif"]) == 0
    printed = capsys.readouterr().out
    assert "Animation: film.gif, 6 frames" in printed
    assert "reward_forward" in printed
    with Image.open("film.gif") as film:
        assert film.n_frames == 6


@pytest.mark.slow
def test_cheetah_learns_to_run_with_full_diagnostics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--method", "hypermarl", "--env", "mamujoco/halfcheetah-2x3", "--frames", "160000"]
    options += ["--copies", "16", "--steps", "64", "--diagnostics", "full", "--out", "r"]
    options += ["--env-arg", "max_episode_steps=200", "--normalise.observations", "true"]
    options += ["--normalise.rewards", "true", "--ppo.minibatches", "8", "--reward", "team"]
    assert main(["train", *options]) == 0
    run = open_run(tmp_path / "r")
    returns = run.quantity("episode_return").dropna("update")
    assert float(returns[-len(returns) // 10 :].mean()) > float(returns[0]) + 50
    assert float(run.quantity("residual").max()) < 1e-4
    assert main(["dashboard", "r", "--html", "page.html"]) == 0
    assert "mamujoco/halfcheetah-2x3" in (tmp_path / "page.html").read_text()
