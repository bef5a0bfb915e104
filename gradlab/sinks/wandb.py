"""Weights & Biases: numbers, pictures and tables of embeddings."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from gradlab.extras import require
from gradlab.sinks.sink import About
from gradlab.sinks.tool import Tool

PROJECT = "gradlab"


class WeightsAndBiases(Tool):
    """Logs to the service, or offline where there is no key for it.

    The tool's own variables decide (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ...). A training that
    is resumed goes on with the same run.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Log nothing yet.

        Args:
            folder: Where the tool's folder `wandb` is to be; by default in the run's folder.
        """
        require("wandb", "wandb", needs="Weights & Biases needs")
        super().__init__()
        self._folder = folder
        self._run: Any = None

    def open(self, about: About) -> None:
        """Begin, or go on with, the run.

        Args:
            about: The run.
        """
        import wandb

        folder = self._folder or about.folder
        folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        # Beside a run that the caller's own code may have begun. Its output is not ours to take.
        quiet = wandb.Settings(console="off", silent=True, reinit="create_new")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=about.id,
            name=about.name,
            dir=str(folder),
            config=about.settings,
            tags=[
                str(about.info[name]) for name in ("method", "environment") if name in about.info
            ],
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            settings=quiet,
        )
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def _numbers(self, update: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars | {"update": update})

    def _picture(self, update: int, tag: str, rgb: np.ndarray) -> None:
        import wandb

        self._run.log({f"matrix/{tag}": wandb.Image(rgb), "update": update})

    def _embedding(self, update: int, network: str, rows: xr.DataArray) -> None:
        import wandb

        features = [f"feature {number}" for number in rows["feature"].values]
        table = wandb.Table(
            columns=["agent", *features],
            data=[
                [int(agent), *row]
                for agent, row in zip(rows["agent"].values, rows.values.tolist(), strict=True)
            ],
        )
        self._run.log({f"embedding/{network}": table, "update": update})

    def _finish(self, state: str) -> None:
        self._run.finish(exit_code=1 if state == "failed" else 0)
