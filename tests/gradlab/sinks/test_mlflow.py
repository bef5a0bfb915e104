import numpy as np
import pytest
import torch
from torch import nn

import gradlab
from gradlab.cli import run as command
from gradlab.sinks.mlflow import EXPERIMENT

pytest.importorskip("mlflow")
pytest.importorskip("alembic")


def loss(policy, sample):
    return policy(sample["x"]).square().sum()


def watch(out, steps, **settings):
    with gradlab.Probe(
        nn.Linear(3, 2), loss, agents=2, every=1, out=out, sinks=["mlflow"], **settings
    ) as probe:
        for step in steps:
            x = torch.randn(2, 32, 3)
            probe({"x": x}, copy=torch.arange(32) % 16, scalars={"episode_return": step + 0.5})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        path = tmp_path_factory.mktemp("mlflow") / "run"
        torch.manual_seed(0)
        watch(path, range(2))
        watch(path, [2], resume=True)
    return path


def check(store, folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    [logged] = client.search_runs([experiment.experiment_id])
    run = gradlab.open_run(folder)
    number = logged.info.run_id
    assert (logged.info.status, logged.info.run_name) == ("FINISHED", "run")
    assert logged.data.params["diagnostics"] == "full"
    assert logged.data.tags["gradlab.id"] == run.info["id"]
    returns = client.get_metric_history(number, "return/episode_return")
    assert sorted((m.step, m.value) for m in returns) == [(0, 0.5), (1, 1.5), (2, 2.5)]
    where = {"network": "actor", "space": "psi", "layer": "all"}
    cosine = run.quantity("cosine", where=where)[:, 0, 1]
    read = {m.step: m.value for m in client.get_metric_history(number, "cosine/actor/psi/0-1")}
    np.testing.assert_allclose([read[update] for update in range(3)], cosine, rtol=1e-12)
    tables = [file.path for file in client.list_artifacts(number, "embedding/actor")]
    assert "embedding/actor/00000002.csv" in tables
    assert client.list_artifacts(number, "images")


def test_store_holds_one_run_with_numbers_settings_pictures_and_embeddings(folder):
    check(folder.parent, folder)


def test_a_finished_run_is_replayed_alike(folder, tmp_path):
    assert command(["export", str(folder), "--to", "mlflow", str(tmp_path)]) == 0
    check(tmp_path, folder)


def test_a_service_that_is_gone_is_told_of_and_the_run_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(UserWarning, match="MLflow failed"):
        watch(tmp_path / "run", range(2))
    run = gradlab.open_run(tmp_path / "run")
    assert (run.state, run.updates("cosine")) == ("done", [0, 1])
