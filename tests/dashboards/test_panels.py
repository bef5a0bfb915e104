"""Panels as data: what is drawn equals what was recorded."""

import json

import numpy as np
import plotly.graph_objects as go
import pytest

from analyses.embeddings import classical_mds, pca, tsne, tsne_of_seed
from dashboards.choices import Choices
from dashboards.colours import OKABE_ITO, UNDEFINED, agent_marks
from dashboards.frames import SEPARATOR, packed, unpacked
from dashboards.panel import Panel, Part, compose
from dashboards.style import padded_range, template
from dashboards.tables import Limits
from dashboards.view import View
from gradlab.axes import AXES
from gradlab.checks import UsageError
from gradlab.run import open_run
from gradlab.verdicts import UNDECIDED
from trainers.config import TrainConfig
from trainers.train import train_run


@pytest.fixture(scope="module")
def view(trained):
    return View(list(trained.values()))


@pytest.fixture(scope="module")
def run(trained):
    return trained["hypermarl"]


def drawn(view, panel, **changes):
    return view.panels[panel].draw(view.defaults().with_(**changes))


def notes(figure):
    return [note["text"].replace("<br>", " ") for note in figure["layout"].get("annotations", ())]


def test_every_panel_of_every_run_is_a_plotly_figure(view):
    for name in view.runs:
        choices = view.defaults().with_(run=name)
        for panel in view.panels.values():
            figure = panel.figure(choices)
            assert isinstance(figure, go.Figure)
            assert figure.layout.meta["alt"], panel.name
            json.dumps(panel.draw(choices), allow_nan=False)


def test_what_an_aggregator_did_is_drawn_and_else_said_to_be_none(view, tmp_path):
    pytest.importorskip("torchjd")
    settings = {"method": "fups", "aggregate": "pcgrad", "copies": 8, "steps": 8, "frames": 192}
    train_run(TrainConfig.model_validate(settings), tmp_path / "run")
    run = open_run(tmp_path / "run")
    figure = drawn(View([run]), "aggregation", network="critic")
    recorded = run.metrics.sel(network="critic")
    opposed = recorded["opposed_agents"]
    for trace, values in zip(
        figure["data"],
        [
            *(recorded[name] for name in ("aggregated_cosine", "aggregated_length")),
            *(opposed.sel(direction=direction) for direction in ("plain", "applied")),
        ],
        strict=True,
    ):
        assert trace["y"] == pytest.approx(values.values, rel=1e-3, abs=1e-6)
    (note,) = notes(drawn(view, "aggregation"))
    assert "gradlab train --aggregate" in note


def test_panels_have_names_of_their_own_and_say_what_they_depend_on(view):
    panels = [panel for tab in view.tabs for panel in tab.panels]
    assert len({panel.name for panel in panels}) == len(panels) >= 25
    known = set(Choices.__dataclass_fields__)
    for tab in view.tabs:
        assert tab.controls <= known


def test_a_panel_reads_only_the_choices_that_it_names(view):
    """Otherwise the page, which draws one figure for each of their values, would be wrong."""

    class Spy(Choices):
        def __getattribute__(self, name):
            if name in Choices.__dataclass_fields__:
                assert name in allowed, f"reads {name}"
            return super().__getattribute__(name)

    choices = vars(view.defaults())
    for panel in view.panels.values():
        for part in panel.parts:
            allowed = set(Choices.__dataclass_fields__)
            at = part.at(view.defaults())
            spy = Spy(**(choices | {"update": at.update}))
            allowed = set(part.depends)
            part.draw(spy)


def test_learning_curves_are_the_recorded_returns(view, run):
    figure = drawn(view, "returns", update=1)
    recorded = run.quantity("episode_return").dropna("update")
    trace = figure["data"][0]
    assert trace["x"] == run.quantity("frames").sel(update=recorded["update"]).values.tolist()
    np.testing.assert_allclose(trace["y"], recorded, rtol=1e-3)
    assert [s["x0"] for s in figure["layout"]["shapes"]] == [run.quantity("frames").values[1]]


@pytest.mark.parametrize("space", ["psi", "theta"])
@pytest.mark.parametrize("estimate", ["plug-in", "debiased"])
def test_cosines_are_those_recorded_and_undecided_pairs_are_faded(view, run, space, estimate):
    panel = {"psi": "cosine-g", "theta": "cosine-z"}[space]
    for network, layer, update in (("actor", "all", 0), ("critic", "layer1", 2)):
        where = {"space": space, "network": network, "layer": layer, "update": update}
        figure = drawn(view, panel, network=network, layer=layer, update=update, estimate=estimate)
        quantity = "cosine" if estimate == "plug-in" else "cosine_debiased"
        expected = run.quantity(quantity).sel(where).to_numpy().copy()
        if estimate == "debiased":
            np.fill_diagonal(expected, np.where(np.isnan(np.diag(expected)), np.nan, 1))
        matrix, mask = figure["data"]
        np.testing.assert_allclose(np.array(matrix["z"], float), expected, atol=5e-4)
        undecided = run.quantity("verdict").sel(where).to_numpy() == UNDECIDED
        assert [[cell == 1 for cell in row] for row in mask["z"]] == undecided.tolist()
        written = undecided & np.isfinite(expected)  # over the others' own text it would blur it
        assert [[text != "" for text in row] for row in mask["text"]] == written.tolist()
        assert (matrix["zmin"], matrix["zmax"]) == (-1, 1)
        assert figure["layout"]["plot_bgcolor"] == UNDEFINED


def test_coupling_and_transference_are_those_recorded(view, run):
    where = {"network": "actor", "update": 1}
    coupling = drawn(view, "coupling", update=1, layer="layer1")["data"][0]["z"]
    np.testing.assert_allclose(
        np.array(coupling, float),
        run.quantity("coupling").sel(where | {"layer": "layer1"}),
        atol=5e-4,
    )
    fall = drawn(view, "transference", update=1)["data"][0]["z"]
    expected = -run.quantity("transference").sel(where).to_numpy()
    np.testing.assert_allclose(np.array(fall, float), expected, rtol=1e-3)


def test_the_chosen_pair_is_framed_in_every_order(view):
    for order in ("number", "similarity"):
        figure = drawn(view, "cosine-g", agent=3, other=1, order=order)
        sorted_agents = figure["layout"]["xaxis"]["categoryarray"]
        assert sorted(sorted_agents) == ["0", "1", "2", "3"]
        (frame,) = figure["layout"]["shapes"]
        place = (sorted_agents.index("1"), sorted_agents.index("3"))
        assert (frame["x0"] + 0.5, frame["y0"] + 0.5) == place


def test_a_pairs_history_has_its_intervals_whichever_comes_first(view, run):
    figure = drawn(view, "pair-history", agent=2, other=0)
    assert figure == drawn(view, "pair-history", agent=0, other=2)
    where = {"network": "actor", "layer": "all", "space": "psi", "agent": 0, "agent_other": 2}
    for trace, quantity in zip(
        figure["data"], ("cosine_low", "cosine_high", "cosine_debiased"), strict=False
    ):
        recorded = run.quantity(quantity).sel(where)
        np.testing.assert_allclose(np.array(trace["y"], float), recorded, rtol=1e-3)


def test_structural_zeros_are_marked(view):
    figure = drawn(view, "cosine-g", run="nops", network="critic")
    text = figure["data"][0]["text"]
    assert [[cell == "0*" for cell in row] for row in text] == (~np.eye(3, dtype=bool)).tolist()
    assert "text" not in drawn(view, "cosine-g")["data"][0]


def test_principal_components_are_scikit_learns(view, run):
    from sklearn.decomposition import PCA

    rows = run.embeddings["critic"].to_numpy().astype(float)
    fitted = PCA(3, svd_solver="full").fit(rows.reshape(-1, rows.shape[-1]))
    figure = drawn(view, "pca", network="critic", update=1)
    points = figure["data"][-1]
    expected = fitted.transform(rows[1])
    found = np.array([points["x"], points["y"]]).T
    signs = np.sign((found * expected[:, :2]).sum(0))
    np.testing.assert_allclose(found * signs, expected[:, :2], rtol=2e-3, atol=1e-4)
    share = fitted.explained_variance_ratio_
    assert f"({share[0]:.1%} of variance)" in figure["layout"]["xaxis"]["title"]["text"]
    scree = drawn(view, "scree", network="critic")["data"][0]["y"]
    np.testing.assert_allclose(scree[:3], share, atol=1e-3)
    solid = drawn(view, "pca-3d", network="critic", update=1)["data"][0]
    np.testing.assert_allclose(np.abs(solid["z"]), np.abs(expected[:, 2]), rtol=5e-3, atol=1e-4)


def test_tsne_of_a_seed_is_scikit_learns():
    from sklearn.manifold import TSNE

    rows = np.random.default_rng(0).normal(size=(9, 5))
    found, trusted = tsne_of_seed(rows, seed=3)
    # The rows as `tsne_of_seed` takes them: sorted and scaled, which t-SNE does not see.
    scaled = rows / np.abs(rows).max()
    scaled -= scaled.mean(0)
    order = np.lexsort((scaled / np.abs(scaled).max()).T[::-1])
    expected = TSNE(
        perplexity=8 / 3, init="random", method="exact", max_iter=500, random_state=3
    ).fit_transform((scaled / np.abs(scaled).max())[order])
    np.testing.assert_allclose(found[order], expected, rtol=1e-3, atol=1e-3)
    assert 0 < trusted <= 1


def test_tsne_panel_draws_the_arrangement_at_unit_size(view, run):
    position = tsne(run.embeddings["actor"])["position"].sel(update=1).to_numpy()
    figure = drawn(view, "tsne", update=1)
    points = np.array([figure["data"][0]["x"], figure["data"][0]["y"]]).T
    centred = position - position.mean(0)
    size = np.sqrt((centred**2).sum(1).mean())
    np.testing.assert_allclose(points, centred / size, rtol=1e-2, atol=1e-3)
    assert "perplexity 1" in figure["layout"]["meta"]["note"]


def test_classical_scaling_keeps_distances_and_is_scikit_learns():
    from sklearn.manifold import ClassicalMDS

    rows = np.random.default_rng(1).normal(size=(7, 2))
    distance = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    position, share = classical_mds(distance)
    again = np.linalg.norm(position[:, None] - position[None], axis=-1)
    np.testing.assert_allclose(again, distance, atol=1e-9)
    np.testing.assert_allclose(share.sum(), 1)
    expected = ClassicalMDS(2, metric="precomputed").fit_transform(distance)
    np.testing.assert_allclose(np.abs(position), np.abs(expected), atol=1e-9)


def test_distances_and_neighbours_are_those_of_the_rows(view, run):
    rows = run.embeddings["actor"].sel(update=2).to_numpy().astype(float)
    distance = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    matrix = drawn(view, "embedding-distance", update=2)["data"][0]["z"]
    np.testing.assert_allclose(np.array(matrix, float), distance, rtol=1e-3)
    bars = drawn(view, "neighbours", update=2, agent=2)["data"][0]
    np.testing.assert_allclose(bars["x"], np.sort(distance[2])[1:], rtol=1e-3)
    assert [*bars["customdata"]] == np.argsort(distance[2])[1:].tolist()


def test_embeddings_against_behaviour_are_the_recorded_pairs(view, run):
    figure = drawn(view, "embedding-behaviour", update=1)
    pairs = np.triu_indices(4, 1)
    distance = run.quantity("embedding_distance").sel(network="actor", update=1).to_numpy()
    behaviour = run.quantity("behavioural_distance").sel(update=1).to_numpy()
    np.testing.assert_allclose(figure["data"][0]["x"], distance[pairs], rtol=1e-3)
    np.testing.assert_allclose(figure["data"][0]["y"], behaviour[pairs], atol=5e-4)
    where = {"network": "actor", "update": 1, "compared_with": "behavioural_distance"}
    r = float(run.quantity("mantel").sel(where | {"correlation": "pearson"}))
    assert f"r {r:+.2f}" in figure["layout"]["meta"]["note"] or np.isnan(r)


def test_identical_agents_share_one_label_and_the_panel_says_so(write_run, tmp_path):
    view = View([write_run(tmp_path / "run", embeddings="equal")])
    figure = drawn(view, "pca", update=0)
    assert figure["data"][-1]["text"] == ["0, 1, 2, 3", "", "", ""]
    assert notes(figure) == ["all agents are identical at every update"]
    assert "1 distinct point of 4 agents" in notes(drawn(view, "tsne", update=0))[0]


def test_agents_have_one_colour_in_all_panels(view):
    colours = list(OKABE_ITO[:4])
    for panel in ("pca", "tsne", "mds", "embeddings-runs"):
        assert drawn(view, panel)["data"][-1]["marker"]["color"] == colours, panel
    grouped = drawn(view, "pca", colour="behaviour cluster")["data"][-1]["marker"]["color"]
    assert len(set(grouped)) < 4


@pytest.mark.parametrize("agents", [1, 8, 9, 30, 48])
def test_agents_are_told_apart(agents):
    marks = agent_marks([str(number) for number in range(agents)])
    assert len({mark.colour for mark in marks}) == agents
    assert len({mark.shape for mark in marks[:8]}) == 1


def test_a_run_without_diagnostics_says_so_in_every_place(write_run, tmp_path):
    view = View([write_run(tmp_path / "run", diagnostics=False)])
    for tab in view.tabs[1:-1]:
        for panel in tab.panels:
            assert notes(panel.draw(view.defaults())), panel.name
    assert view.stops() == []


@pytest.mark.parametrize("agents", [1, 2, 30])
def test_every_number_of_agents_is_laid_out(write_run, tmp_path, agents):
    view = View([write_run(tmp_path / "run", agents=agents, updates=4)])
    for panel in view.panels.values():
        figure = panel.draw(view.defaults())
        assert figure["data"] or notes(figure), panel.name


def test_names_are_text_in_hover_and_legend(write_run, tmp_path):
    names = ["<b>bold</b>", "&lt;", "%{x}", "ok"]
    view = View([write_run(tmp_path / "<i>run", names=names, updates=3)])
    assert drawn(view, "cosine-g")["data"][0]["hovertext"][0][1].startswith("&lt;b&gt;bold")
    assert drawn(view, "pca")["data"][-1]["hovertext"][0] == "0: &lt;b&gt;bold&lt;/b&gt;"
    assert drawn(view, "returns")["data"][0]["name"] == "&lt;i&gt;run"


def test_a_long_run_is_thinned_for_drawing_alone(write_run, tmp_path):
    run = write_run(tmp_path / "run", agents=30, updates=60, every=1)
    view = View([run], Limits(updates=20, cells=10**6))
    stops = view.stops()
    assert (len(stops), stops[0], stops[-1]) == (20, 0, 59)
    assert len(view.panels["cosine-g"].parts[0].updates(view.defaults())) == 20
    assert len(View([run]).stops()) == run.quantity("cosine").sizes["update"] == 60


def test_between_updates_the_earlier_is_drawn_and_named(view, write_run, tmp_path):
    view = View([write_run(tmp_path / "run", every=5)])
    at = drawn(view, "cosine-g", update=7)
    assert at["layout"]["meta"]["update"] == 5
    assert at["data"] == drawn(view, "cosine-g", update=5)["data"]


def test_packed_frames_give_back_every_figure(view):
    """What the page's script does with them, done here, is what the panel draws."""
    options = view.options("hypermarl")
    for name in ("cosine-g", "pca", "pair-history", "conflict-rate"):
        panel = view.panels[name]
        chunks = {
            number: unpacked(text)
            for number, run, text in packed(view, panel)
            if run in {"hypermarl", ""}
        }
        for changes in ({}, {"network": "critic", "layer": "layer1", "update": 1}, {"other": 3}):
            choices = view.defaults().with_(**changes)
            assert all(str(getattr(choices, n)) in options[n] for n in ("network", "layer"))
            patches = []
            for number, part in enumerate(panel.parts):
                at = part.at(choices)
                key = SEPARATOR.join(str(getattr(at, n)) for n in part.depends if n != "run")
                chunk = chunks[number]
                frame = chunk["frames"][chunk["at"][key]]
                patches.append(_applied(chunk["base"], frame) if number == 0 else frame)
            expected = panel.draw(choices)
            expected["layout"]["meta"].pop("update", None)
            assert compose(patches) == json.loads(json.dumps(expected))


def _applied(base, frame):
    if "whole" in frame:
        return frame["whole"]

    def merged(old, new):
        return {k: v for k, v in {**old, **new}.items() if v is not None}

    data = [
        merged(old, new)
        for old, new in zip(base["data"], frame.get("data", [{}] * len(base["data"])), strict=True)
    ]
    return {"data": data, "layout": merged(base["layout"], frame["layout"])}


def test_choices_survive_an_address_and_ignore_what_is_not_offered(view):
    choices = view.defaults().with_(run="fups", network="critic", agent=2, update=1)
    assert view.choices("?" + choices.query()) == choices
    for evil in ("run=nope", "agent=99", "update=-1", "update=9e9", "layer=<b>", "tab=", "x=1"):
        assert view.choices(evil) == view.defaults()


def test_parts_are_laid_over_each_other():
    base = {"data": [{"y": [1]}], "layout": {"shapes": [1], "xaxis": {"title": "t", "range": 1}}}
    patch = {"data": [{"y": [2]}], "layout": {"shapes": [2], "xaxis": {"range": 2}}}
    panel = Panel(
        name="p",
        title="",
        reading="",
        definition="",
        parts=[
            Part(depends=(), draw=lambda _: base),
            Part(depends=(), draw=lambda _: patch),
        ],
    )
    assert panel.draw(Choices()) == {
        "data": [{"y": [2]}],
        "layout": {"shapes": [1, 2], "xaxis": {"title": "t", "range": 2}},
    }
    assert base["data"] == [{"y": [1]}]


def test_themes_differ_and_carry_no_default_colours():
    light, dark = template("light"), template("dark")
    assert light["layout"]["font"]["color"] != dark["layout"]["font"]["color"]
    assert "colorway" not in light["layout"]


def test_padded_range_of_nothing_and_of_one_value():
    assert padded_range(np.array([np.nan])) == [-1.0, 1.0]
    low, high = padded_range(np.array([3.0]))
    assert low < 3 < high


def test_no_run_is_refused():
    with pytest.raises(UsageError, match="`runs` must name at least one run"):
        View([])


def test_the_axes_of_all_that_is_recorded_are_known(trained):
    found = {name: run.axes(name) for run in trained.values() for name in run.quantities}
    assert {name: tuple(axes) for name, axes in found.items()} == {n: AXES[n] for n in found}


def test_a_damaged_run_still_has_panels(trained, tmp_path):
    import shutil

    shutil.copytree(trained["fups"].path, tmp_path / "run")
    (tmp_path / "run" / "records.sqlite").unlink()
    (tmp_path / "run" / "run.json").write_text("{")
    view = View([open_run(tmp_path / "run")])
    for panel in view.panels.values():
        panel.draw(view.defaults())
    assert pca(trained["fups"].embeddings["actor"]).sizes["agent"] == 3
