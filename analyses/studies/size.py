"""How many parameters a run trains."""

import json
from functools import cache

from gradlab.run import Run
from trainers.config import TrainConfig
from trainers.description import describe_networks
from trainers.loop import Trainer


def trained_parameters(run: Run, network: str = "actor") -> int:
    """Count the parameters that are trained for one network of all agents together.

    Args:
        run: A run.
        network: "actor", or "critic".

    Returns:
        Their number; the actor's is how many coordinates the coordinate variance is over.
    """
    # The seed makes no difference, and runs of other seeds need not be made anew.
    return _trained(json.dumps(run.config | {"seed": 0, "log": []}, sort_keys=True))[network]


@cache
def _trained(config: str) -> dict[str, int]:
    trainer = Trainer(TrainConfig.model_validate_json(config))
    return {network.network: network.psi for network in describe_networks(trainer)}
