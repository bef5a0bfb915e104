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
    from gradlab.checks import UsageError
    from gradlab.decomposition import Decomposition, decompose
    from gradlab.metrics.interference import interference
    from gradlab.metrics.variance import variance
    from gradlab.run import Run, open_run

__all__ = [
    "Decomposition",
    "Run",
    "UsageError",
    "decompose",
    "interference",
    "open_run",
    "variance",
]

# Loaded on first use: torch takes over a second, and `gradlab --help` needs none of it.
_HOME = {
    "Decomposition": "gradlab.decomposition",
    "Run": "gradlab.run",
    "UsageError": "gradlab.checks",
    "decompose": "gradlab.decomposition",
    "interference": "gradlab.metrics.interference",
    "open_run": "gradlab.run",
    "variance": "gradlab.metrics.variance",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'gradlab' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
