"""gradlab: which agents' gradients interfere, how much of it is real, and where it comes from.

>>> import torch, gradlab
>>> class Shared(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
...     def forward(self, agents):
...         return {"w": self.w[None]}
>>> def loss(theta, sample):
...     return -(theta["w"] * sample["x"]).sum()
>>> x = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]], dtype=torch.float64)
>>> d = gradlab.decompose(Shared(), loss, {"x": x})
>>> float(gradlab.interference(d).cosine.sel(space="psi", layer="all")[0, 1])
-1.0

"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradlab.attach.probe import Probe
    from gradlab.checks import UsageError
    from gradlab.copies import split_copies
    from gradlab.decomposition import Decomposition, decompose
    from gradlab.engine.accumulate import gradient_moments
    from gradlab.engine.gram import SampleGram, sample_gram
    from gradlab.engine.moments import Moments
    from gradlab.factorisation import Factorisation, factorise
    from gradlab.jacobian import Jacobian
    from gradlab.metrics.coupling import coupling
    from gradlab.metrics.diversity import diversity, shared_observations
    from gradlab.metrics.geometry import geometry
    from gradlab.metrics.interference import interference
    from gradlab.metrics.procrustes import procrustes, procrustes_path
    from gradlab.metrics.transference import transference
    from gradlab.metrics.variance import variance
    from gradlab.preconditioner import adam_preconditioner
    from gradlab.run import Run, open_run, open_runs
    from gradlab.sinks.record import Record
    from gradlab.sinks.sink import Sink

__all__ = [
    "Decomposition",
    "Factorisation",
    "Jacobian",
    "Moments",
    "Probe",
    "Record",
    "Run",
    "SampleGram",
    "Sink",
    "UsageError",
    "adam_preconditioner",
    "coupling",
    "decompose",
    "diversity",
    "factorise",
    "geometry",
    "gradient_moments",
    "interference",
    "open_run",
    "open_runs",
    "procrustes",
    "procrustes_path",
    "sample_gram",
    "shared_observations",
    "split_copies",
    "transference",
    "variance",
]

# Loaded on first use: torch takes over a second, and `gradlab --help` needs none of it.
_HOME = {
    "Decomposition": "gradlab.decomposition",
    "Factorisation": "gradlab.factorisation",
    "Jacobian": "gradlab.jacobian",
    "Moments": "gradlab.engine.moments",
    "Probe": "gradlab.attach.probe",
    "Record": "gradlab.sinks.record",
    "Run": "gradlab.run",
    "SampleGram": "gradlab.engine.gram",
    "Sink": "gradlab.sinks.sink",
    "UsageError": "gradlab.checks",
    "decompose": "gradlab.decomposition",
    "adam_preconditioner": "gradlab.preconditioner",
    "coupling": "gradlab.metrics.coupling",
    "diversity": "gradlab.metrics.diversity",
    "factorise": "gradlab.factorisation",
    "geometry": "gradlab.metrics.geometry",
    "gradient_moments": "gradlab.engine.accumulate",
    "interference": "gradlab.metrics.interference",
    "load_policy": "trainers.agent_policy",
    "open_run": "gradlab.run",
    "open_runs": "gradlab.run",
    "procrustes": "gradlab.metrics.procrustes",
    "procrustes_path": "gradlab.metrics.procrustes",
    "sample_gram": "gradlab.engine.gram",
    "shared_observations": "gradlab.metrics.diversity",
    "split_copies": "gradlab.copies",
    "transference": "gradlab.metrics.transference",
    "variance": "gradlab.metrics.variance",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'gradlab' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
