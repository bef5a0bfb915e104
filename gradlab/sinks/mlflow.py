"""MLflow: numbers, settings, pictures and files of embeddings in a tracking store."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from gradlab.extras import require
from gradlab.sinks.sink import About
from gradlab.sinks.tool import Tool

EXPERIMENT = "gradlab"
_ID = "gradlab.id"
_MOST_METRICS, _MOST_PARAMS = 1000, 100  # of one request; the store's limits
_STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow(Tool):
    """Logs to the store that MLFLOW_TRACKING_URI names, or to `mlflow.db` beside the run's folder.

    The experiment is MLFLOW_EXPERIMENT_NAME, or "gradlab". A training that is resumed goes on with
    the same run.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Log nothing yet.

        Args:
            folder: Where `mlflow.db` and its files are to be, whatever the environment says.
        """
        require("mlflow", "mlflow", "sqlalchemy", "alembic", needs="MLflow needs")
        super().__init__()
        self._folder = folder
        self._client: Any = None
        self._run = ""

    def open(self, about: About) -> None:
        """Begin, or go on with, the run.

        Args:
            about: The run.
        """
        # A service that is gone is given up after seconds, not minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):  # tell of every table that a new store gets
            logging.getLogger(name).setLevel(logging.WARNING)
        uri, files = self._store(about)
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(files)
        known = self._client.search_runs([experiment], f"tags.`{_ID}` = '{about.id}'")
        if known:
            self._run = known[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return  # settings that are logged can't be changed
        tags = {_ID: about.id, "gradlab.folder": str(about.folder.resolve())}
        self._run = self._client.create_run(experiment, run_name=about.name, tags=tags).info.run_id
        params = [Param(name, str(value)) for name, value in about.settings.items()]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run, params=params[start : start + _MOST_PARAMS])

    def _store(self, about: About) -> tuple[str | None, str | None]:
        """The store, and where files go; None for the tool's own choice."""
        if self._folder is None and os.environ.get("MLFLOW_TRACKING_URI"):
            return None, None
        folder = (self._folder or about.folder.parent).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlflow-files").as_uri()

    def _experiment(self, files: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        known = self._client.get_experiment_by_name(name)
        if known is not None:
            return str(known.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=files))

    def _numbers(self, update: int, scalars: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(tag, number, now, update) for tag, number in scalars.items()]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._run, metrics=metrics[start : start + _MOST_METRICS])

    def _picture(self, update: int, tag: str, rgb: np.ndarray) -> None:
        self._client.log_image(self._run, rgb, key=f"matrix/{tag}", step=update)

    def _embedding(self, update: int, network: str, rows: xr.DataArray) -> None:
        table = rows.to_pandas().to_csv()
        self._client.log_text(self._run, table, f"embedding/{network}/{update:08d}.csv")

    def _finish(self, state: str) -> None:
        self._client.set_terminated(self._run, _STATUS[state])
