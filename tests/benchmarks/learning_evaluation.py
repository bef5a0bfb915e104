"""The one evaluation that both libraries' policies get in compare_learning.py: VMAS alone, no library."""

import torch
import vmas

COPIES, SEED = 256, 10_000


def returns(act, cell):
    """Mean over episodes of the return, itself the mean over agents, and its standard error.

    `act` gives actions [copy, agent, action] for observations [copy, agent, obs]. Every copy plays one
    episode; nothing that comes after its end counts.
    """
    env = vmas.make_env(
        scenario=cell["scenario"],
        num_envs=COPIES,
        device="cpu",
        seed=SEED,
        continuous_actions=True,
        clamp_actions=True,
        max_steps=None,
        n_agents=cell["agents"],
        **cell["args"],
    )
    torch.manual_seed(SEED)
    with torch.no_grad():
        observation = torch.stack(env.reset(), 1)
        total, playing = torch.zeros(COPIES), torch.ones(COPIES, dtype=torch.bool)
        for _ in range(cell["steps"]):
            actions = act(observation)
            observations, rewards, done, _ = env.step(list(actions.unbind(1)))
            total += torch.where(playing, torch.stack(rewards).mean(0), 0.0)
            playing &= ~done
            observation = torch.stack(observations, 1)
    return {"return": total.mean().item(), "error": (total.std() / COPIES**0.5).item()}
