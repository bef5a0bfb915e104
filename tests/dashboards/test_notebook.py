import subprocess
import sys

import numpy as np
import plotly.graph_objects as go
import pytest

from gradlab.checks import UsageError


def test_embeddings_are_drawn_by_every_method(trained):
    run = trained["hypermarl"]
    for method in ("pca", "pca-3d", "tsne", "mds", "trajectories"):
        figure = run.plot.embeddings(method=method, update=1)
        assert isinstance(figure, go.Figure)
        assert len(figure.data[-1].x) == 4
    assert run.plot.embeddings(update=1) == run.plot("pca", update=1)


def test_sisters_draw_what_was_recorded(trained):
    run = trained["hypermarl"]
    recorded = run.quantity("cosine").sel(update=1, network="critic", space="theta", layer="layer1")
    figure = run.plot.interference(space="theta", network="critic", layer="layer1", update=1)
    np.testing.assert_allclose(np.array(figure.data[0].z, float), recorded, atol=5e-4)
    assert run.plot.pair(2, 0).data[0].y == run.plot.pair(0, 2).data[0].y
    line = run.plot.over_training("policy_loss").data[0]
    np.testing.assert_allclose(line.y, run.quantity("policy_loss"), rtol=1e-3)
    assert run.plot.coupling(theme="dark") != run.plot.coupling()
    assert run.plot.behaviour().data


def test_what_does_not_exist_is_named(trained):
    plot = trained["fups"].plot
    for draw, said in (
        (lambda: plot("pcx"), "Unknown panel 'pcx'. Did you mean 'pca'"),
        (lambda: plot.embeddings(method="lda"), "Unknown method 'lda'"),
        (lambda: plot("pca", netwrok="actor"), "Unknown choice 'netwrok'. Did you mean 'network'"),
        (lambda: plot("pca", network="actress"), "Unknown network 'actress'"),
        (lambda: plot("pca", agent=9), "Unknown agent"),
    ):
        with pytest.raises(UsageError, match=said):
            draw()


def test_a_run_shows_itself_as_text_that_is_no_markup(trained, write_run, tmp_path):
    assert "specialisation" in trained["fups"]._repr_html_()
    html = write_run(tmp_path / "<b>x", method="<i>", updates=3)._repr_html_()
    assert "&lt;b&gt;x" in html
    assert "<b>x" not in html
    assert "<i>" not in html


def test_the_core_imports_no_plotly(trained):
    code = (
        "import sys, gradlab; gradlab.open_run(sys.argv[1]); "
        "print({'plotly', 'dashboards', 'analyses'} & set(sys.modules))"
    )
    path = trained["fups"].path
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
