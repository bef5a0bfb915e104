import itertools
import math

import numpy as np
import pytest

from analyses.curves import learning_curve, series
from analyses.embeddings import pca, tsne
from dashboards.colours import OKABE_ITO, UNDEFINED, agent_marks, run_marks
from dashboards.curve_panels import SPACES, cursor_part, learning_panel, quantity_panel
from dashboards.embedding_panels import TAIL, pca_panel, tsne_panel
from dashboards.heatmap_panel import heatmap_panel
from dashboards.overview import cursor, learning_curves, overview_panels
from dashboards.panel import Panel, empty_figure, padded_range, shown
from dashboards.run_panels import run_panels

NOW = cursor_part({0: {6000}, 10: {66000}})


@pytest.fixture(scope="module")
def run(write_run, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def nops(write_run, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "nops", method="nops")


def heatmap(run, space, **kwargs):
    names = run.info["agent_names"]
    cosine = run.quantity("cosine").sel(space=space)
    return heatmap_panel(cosine, names, title="", reading="", definition="", **kwargs)


def annotations(figure):
    return [note.text.replace("<br>", " ") for note in figure.layout.annotations]


def test_learning_panel_draws_the_table(run):
    table = learning_curve(run)
    figure = shown(learning_panel([(run_marks(["a"])[0], table)], NOW), update=10)
    assert list(figure.data[0].x) == table["frames"].tolist()
    np.testing.assert_allclose(figure.data[0].y, table["episode_return"], rtol=1e-3)
    assert [shape.x0 for shape in figure.layout.shapes] == [66000]


def test_learning_panel_without_an_episode_says_so(run):
    table = learning_curve(run).iloc[:0]
    figure = shown(learning_panel([(run_marks(["a"])[0], table)], NOW), update=0)
    assert annotations(figure) == ["no episode has ended yet"]


def test_quantity_panel_draws_every_run_network_and_layer(run, nops):
    tables = [series(r, "conflict_rate") for r in (run, nops)]
    panel = quantity_panel(
        list(zip(run_marks(["a", "b"]), tables, strict=True)),
        SPACES,
        NOW,
        title="",
        reading="",
        definition="",
        axis={},
        reference=0.5,
    )
    for network, layer in itertools.product(["actor", "critic"], ["all", "layer1"]):
        figure = shown(panel, network=network, layer=layer, update=0)
        expected = [
            table[(table[["network", "layer", "space"]] == [network, layer, space]).all(axis=1)]
            for table in tables
            for space in ("psi", "theta")
        ]
        for trace, rows in zip(figure.data, expected, strict=False):
            assert list(trace.x) == rows["frames"].tolist()
            assert list(trace.customdata) == rows["update"].tolist()
            np.testing.assert_allclose(trace.y, rows["value"], atol=1e-3)
        assert [trace.line.dash for trace in figure.data[:4]] == ["solid", "dash"] * 2
        assert [trace.name for trace in figure.data if trace.showlegend is not False][:2] == [
            "a",
            "b",
        ]


def test_variance_panel_shows_parts_and_names_runs_without_them(write_run, run, tmp_path):
    plain = write_run(tmp_path / "plain", variance=False)
    runs = [run, plain]
    panels = overview_panels(
        runs, run_marks(["full", "plain"]), learning_curves(runs), cursor(runs, [[0], [0]])
    )
    variance = panels[3]
    figure = shown(variance, network="critic", layer="head", update=0)
    expected = run.quantity("variance_between").sel(network="critic", layer="head")
    np.testing.assert_allclose(figure.data[1].y, expected, rtol=1e-3)
    assert figure.layout.yaxis.type == "log"
    assert "Not recorded by: plain." in variance.definition


def test_a_layer_that_no_run_has_is_said_to_be_undefined(write_run, tmp_path):
    alone = [write_run(tmp_path / "alone", agents=1)]
    panels = overview_panels(
        alone, run_marks(["alone"]), learning_curves(alone), cursor(alone, [[0]])
    )
    figure = shown(panels[1], network="actor", layer="all", update=0)
    assert annotations(figure) == ["undefined here: no such layer, no two agents, or no verdicts"]


@pytest.mark.parametrize("space", ["psi", "theta"])
def test_heatmap_draws_the_cosines_at_the_update(run, space):
    panel = heatmap(run, space)
    for network, layer, update in itertools.product(["actor", "critic"], ["all", "layer0"], [0, 6]):
        figure = shown(panel, network=network, layer=layer, update=update)
        expected = run.quantity("cosine").sel(
            space=space, network=network, layer=layer, update=update
        )
        np.testing.assert_allclose(figure.data[0].z, expected, atol=5e-4)
        assert (figure.data[0].zmin, figure.data[0].zmax) == (-1, 1)


def test_heatmap_between_updates_shows_the_earlier_one(run):
    panel = heatmap(run, "psi")
    at = shown(panel, network="actor", layer="all", update=7)
    assert at == shown(panel, network="actor", layer="all", update=6)


def test_heatmap_undefined_cells_are_grey_and_say_so(run):
    figure = shown(heatmap(run, "theta"), network="actor", layer="head", update=0)
    assert [row[0] for row in figure.data[0].z] == [None] * 4
    assert annotations(figure).count("undefined") == 7
    assert figure.layout.plot_bgcolor == UNDEFINED


def test_heatmap_of_a_layer_that_the_space_lacks_says_so(run):
    figure = shown(heatmap(run, "theta"), network="actor", layer="embedding", update=0)
    assert all(cell is None for row in figure.data[0].z for cell in row)
    assert annotations(figure)[0].startswith("undefined: this space of this network has no such")


def test_structural_zeros_are_marked_and_explained(nops):
    panel = heatmap(nops, "psi", structural_zeros=True)
    figure = shown(panel, network="critic", layer="all", update=0)
    text = figure.data[0].text
    assert [[cell == "0*" for cell in row] for row in text] == (~np.eye(4, dtype=bool)).tolist()
    assert "structural zero" in panel.definition
    plain = run_panels(nops).panels
    assert "structural zero" in plain[0].definition
    assert "structural zero" not in plain[1].definition


@pytest.mark.parametrize(("agents", "template"), [(1, "%{z:.2f}"), (10, "%{z:.2f}"), (11, None)])
def test_heatmap_writes_numbers_while_there_is_room(write_run, tmp_path, agents, template):
    figure = heatmap(write_run(tmp_path / "run", agents=agents, updates=3), "psi").figure
    assert (figure.data[0].texttemplate or None) == template


def pca_of(run):
    points = run.embeddings
    projections = {network: pca(rows) for network, rows in points.items()}
    updates = {network: rows["update"].values.tolist() for network, rows in points.items()}
    marks = agent_marks(run.info["agent_names"])
    return projections, pca_panel(projections, updates, marks, definition="")


def test_pca_panel_draws_positions_tails_and_explained_variance(run):
    projections, panel = pca_of(run)
    position = projections["critic"]["position"]
    figure = shown(panel, network="critic", update=8)
    *trails, now = figure.data
    np.testing.assert_allclose(now.x, position.sel(update=8, component=1), rtol=1e-3)
    np.testing.assert_allclose(now.y, position.sel(update=8, component=2), rtol=1e-3)
    for agent, trail in enumerate(trails):
        past = position.sel(update=slice(0, 8), agent=agent)
        np.testing.assert_allclose(trail.x, past.sel(component=1), rtol=1e-3)
    ratio = projections["critic"]["explained_variance_ratio"].values
    assert figure.layout.xaxis.title.text == f"component 1 ({ratio[0]:.1%} of variance)"
    assert figure.layout.yaxis.title.text == f"component 2 ({ratio[1]:.1%} of variance)"


def test_pca_axes_stay_while_the_slider_moves_and_hold_all_points(run):
    projections, panel = pca_of(run)
    figures = [shown(panel, network="actor", update=update) for update in range(0, 20, 2)]
    assert len({figure.layout.xaxis.range for figure in figures}) == 1
    low, high = figures[0].layout.xaxis.range
    x = projections["actor"]["position"].sel(component=1)
    assert low < x.min()
    assert x.max() < high
    assert max(len(trace.x) for trace in figures[-1].data) <= TAIL


def test_agents_have_one_colour_in_all_panels(run):
    _, panel = pca_of(run)
    *trails, now = panel.figure.data
    marks = agent_marks(run.info["agent_names"])
    tsne_now = tsne_panel({}, marks, definition="").figure.data[0]
    assert [trail.line.color for trail in trails] == list(OKABE_ITO[:4])
    assert list(now.marker.color) == list(tsne_now.marker.color) == list(OKABE_ITO[:4])


@pytest.mark.parametrize("agents", [1, 8, 9, 30, 48])
def test_agents_are_told_apart(agents):
    marks = agent_marks([str(number) for number in range(agents)])
    assert len({mark.colour for mark in marks}) == agents
    assert len({mark.shape for mark in marks[:8]}) == 1


def test_identical_agents_share_one_label_and_the_panel_says_so(write_run, tmp_path):
    run = write_run(tmp_path / "run", embeddings="equal")
    _, panel = pca_of(run)
    figure = shown(panel, network="actor", update=0)
    assert list(figure.data[-1].text) == ["0, 1, 2, 3", "", "", ""]
    assert annotations(figure) == ["all agents are identical at every update"]
    assert figure.layout.xaxis.title.text == "component 1 (no variance)"


def test_tsne_panel_draws_the_arrangement_at_unit_size(run):
    projection = tsne(run.embeddings["actor"])
    panel = tsne_panel({"actor": projection}, agent_marks(run.info["agent_names"]), definition="")
    figure = shown(panel, network="actor", update=6)
    drawn = np.array([figure.data[0].x, figure.data[0].y]).T
    assert np.sqrt((drawn**2).sum(axis=1).mean()) == pytest.approx(1, rel=1e-3)
    position = projection["position"].sel(update=6).to_numpy()
    centred = position - position.mean(axis=0)
    ratio = drawn / centred
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-2)
    frames = panel.parts[0].frames
    assert frames["actor|6"].note == "perplexity 1"


def test_tsne_panel_gives_the_reason_instead_of_points(write_run, tmp_path):
    run = write_run(tmp_path / "run", agents=3)
    panel = run_panels(run).panels[3]
    figure = shown(panel, network="actor", update=0)
    assert list(figure.data[0].x) == [None] * 3
    assert annotations(figure) == ["3 agents: t-SNE needs at least 4"]


def test_a_run_without_diagnostics_says_so_in_every_place(write_run, tmp_path):
    run = write_run(tmp_path / "run", diagnostics=False)
    section = run_panels(run)
    overview = overview_panels([run], run_marks(["run"]), learning_curves([run]), cursor([run], []))
    for panel in [*section.panels, *overview[1:]]:
        assert annotations(panel.figure)[0].startswith("not recorded: ")
    assert section.drawn == []


def test_many_agents_are_thinned_evenly_and_counted(write_run, tmp_path):
    section = run_panels(write_run(tmp_path / "run", agents=30, updates=60, every=1))
    assert section.recorded == 60
    assert len(section.drawn) < 40
    assert (section.drawn[0], section.drawn[-1]) == (0, 59)


@pytest.mark.parametrize("agents", [1, 2, 30])
def test_every_number_of_agents_is_laid_out(write_run, tmp_path, agents):
    run = write_run(tmp_path / "run", agents=agents, updates=4)
    for panel in run_panels(run).panels:
        assert isinstance(panel, Panel)
        assert shown(panel, network="actor", layer="all", update=2).data


def test_hover_text_shows_names_as_text(write_run, tmp_path):
    names = ["<b>bold</b>", "&lt;", "%{x}", "ok"]
    run = write_run(tmp_path / "run", names=names, updates=3)
    heat, _, components, _ = run_panels(run).panels
    assert heat.figure.data[0].hovertext[0][1] == "&lt;b&gt;bold&lt;/b&gt; and &amp;lt;"
    assert components.figure.data[-1].hovertext[0] == "0: &lt;b&gt;bold&lt;/b&gt;"


def test_figures_carry_no_default_template():
    template = empty_figure().layout.template
    assert template.layout.colorway is None


def test_padded_range_of_nothing_and_of_one_value():
    assert padded_range(np.array([math.nan])) == [-1.0, 1.0]
    low, high = padded_range(np.array([3.0]))
    assert low < 3 < high
