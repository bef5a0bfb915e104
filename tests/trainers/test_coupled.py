import torch

from trainers.config import HypernetworkConfig, TrainConfig
from trainers.envs.vector_env import Discrete
from trainers.generators import METHODS
from trainers.loop import Trainer
from trainers.policies import make_policy


def test_parameters_of_every_sample_act_as_one_at_a_time():
    random = torch.Generator().manual_seed(0)
    policy = make_policy(5, Discrete(n=3), hidden=(6, 6), activation="tanh")
    make = METHODS["hypermarl-coupled"]
    generator = make(policy.network, 2, random, HypernetworkConfig()).double()
    observation = torch.randn(2, 4, 5, generator=random, dtype=torch.float64)
    action = torch.randint(3, (2, 4), generator=random)
    theta = generator.policy_for(observation)
    together, _ = policy.evaluate(theta, observation, action)
    for agent in range(2):
        for sample in range(4):
            own = generator(torch.tensor([agent]), observation[agent, sample][None])
            own = {name: tensor[0] for name, tensor in own.items()}
            alone, _ = policy.evaluate(own, observation[agent, sample], action[agent, sample])
            torch.testing.assert_close(together[agent, sample], alone)
    assert not torch.equal(theta["layer0.weight"][0, 0], theta["layer0.weight"][0, 1])


def test_policies_for_the_observation_0_start_with_ppo_gains():
    trainer = Trainer(TrainConfig(method="hypermarl-coupled", agents=3))
    nothing = torch.zeros(3, 1, trainer.spec.observation_size)
    for name, weights in trainer.actor.policy_for(nothing).items():
        if name.endswith("weight"):
            gain = weights.detach()[:, 0].flatten(1).norm(dim=1) / min(weights.shape[2:]) ** 0.5
            expected = trainer.policy.network.gain(name.removesuffix(".weight"))
            torch.testing.assert_close(gain, torch.full_like(gain, expected), rtol=1e-3, atol=0)
