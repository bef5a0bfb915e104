import io

import pytest
import torch

import gradlab
from gradlab.checks import UsageError
from trainers.config import TrainConfig
from trainers.evaluation import saved_trainer
from trainers.train import train_run

SHORT = {"agents": 3, "copies": 8, "steps": 4, "frames": 64, "diagnostics": "off"}
FORMS = {
    "discrete": {"method": "hypermarl", "env": "specialisation"},
    "continuous": {
        "method": "fups-id",
        "env": "vmas/dispersion",
        "normalise": {"observations": True},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_loaded_policy_acts_as_the_trained_one_even_as_torchscript(form, tmp_path, recwarn):
    train_run(TrainConfig.model_validate(SHORT | FORMS[form]), tmp_path / "run")
    trainer = saved_trainer(gradlab.open_run(tmp_path / "run"), None, [])
    observation = torch.randn(3, 5, trainer.spec.observation_size)
    trained = trainer.policy.distribution(
        trainer.actor.all_agents(), trainer.collector.scaled(observation)
    )
    policy = gradlab.load_policy(tmp_path / "run", agent=2)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(policy, observation[2]), file)
    file.seek(0)
    for loaded in (policy, torch.jit.load(file)):
        made = loaded(observation[2])
        made = made if isinstance(made, tuple) else (made,)
        assert len(made) == len(trained)
        for own, expected in zip(made, trained.values(), strict=True):
            torch.testing.assert_close(own, expected[2], rtol=1e-5, atol=1e-6)
    recwarn.clear()
    with pytest.raises(UsageError, match="`agent` must be below 3"):
        gradlab.load_policy(tmp_path / "run", agent=3)
