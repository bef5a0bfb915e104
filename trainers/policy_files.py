"""One agent's policy in files that need neither gradlab nor its run."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from gradlab.checks import UsageError
from gradlab.extras import require
from gradlab.registry import Registry
from gradlab.run import Run
from trainers.agent_policy import AgentPolicy, RecurrentAgentPolicy, load_policy

_EXAMPLE = 2  # observations; an exporter takes a batch of one for a size that never changes


def _torchscript(policy: AgentPolicy, file: Path) -> None:
    with warnings.catch_warnings():
        # torch deprecates TorchScript as a whole; whoever asks for it needs it all the same.
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(policy, policy.example(_EXAMPLE)), file)


def _onnx(policy: AgentPolicy, file: Path) -> None:
    require("onnx", "onnx", "onnxscript", needs="ONNX needs")
    recurrent = isinstance(policy, RecurrentAgentPolicy)
    memory = ["state"] if recurrent else []
    acts = ["mean", "std"] if policy.continuous else ["logits"]
    batch = torch.export.Dim("batch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of the exporter's own parts
        torch.onnx.export(
            policy,
            policy.example(_EXAMPLE),
            file,
            input_names=["observation", *memory],
            output_names=[*acts, *(f"next_{name}" for name in memory)],
            dynamic_shapes=({0: batch},) * (2 if recurrent else 1),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


POLICY_FORMATS: Registry[Callable[[AgentPolicy, Path], None]] = Registry(
    "format of a policy", {"onnx": _onnx, "torchscript": _torchscript}
)


def export_policy(run: Run, agent: int, form: str, file: Path) -> None:
    """Write one agent's policy, as of the newest checkpoint, into one file.

    Inputs and outputs are those of `load_policy(run, agent=agent)`, with one batch axis of any
    size. In ONNX they are called `observation`, and `logits`, or `mean` and `std`; of a recurrent
    policy also `state` and `next_state`.

    Args:
        run: A run that gradlab trained.
        agent: Which agent.
        form: A name in `POLICY_FORMATS`.
        file: The file, which is written over.

    Raises:
        UsageError: If there is no such format, agent or checkpoint, or the file can't be written.
    """
    write = POLICY_FORMATS[form]
    policy = load_policy(run, agent=agent).eval()
    try:
        file.open("ab").close()  # torch's own words for a folder that is not there are no help
        write(policy, file)
    except OSError as error:
        raise UsageError(
            f"{file} can't be written: {error.strerror or error}. Choose another file."
        ) from error
