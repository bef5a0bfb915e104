"""Whatever stands in a run folder or a file of settings: read, or refused in a line."""

import ast
import os
import pickle
import shutil
import sqlite3
import warnings
from contextlib import closing, suppress
from pathlib import Path

import hostile
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from analyses.conflict import conflict_table, explain
from dashboards.page import page_html
from gradlab.checks import Failed, UsageError
from gradlab.cli import run as command
from gradlab.quantity import Quantity
from gradlab.run import open_run
from gradlab.run_writer import RunWriter
from trainers.agent_policy import load_policy
from trainers.checkpoints import newest_checkpoint
from trainers.config import TrainConfig
from trainers.documents import parse_document
from trainers.settings import make_config
from trainers.train import train_run

ROOT = Path(__file__).parents[1]
SMALL = {
    "env": "specialisation",
    "agents": 2,
    "copies": 8,
    "steps": 4,
    "frames": 8 * 4 * 2,
    "every": 1,
    "effects_every": 1,
    "diagnostics": "light",
    "network": {"hidden": [4]},
    "hypernetwork": {"hidden": [4]},
    "ppo": {"epochs": 1, "minibatches": 1},
}
UNSAFE = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FUZZ = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def unsafe(source):
    """Lines of a module that could run what a file holds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if UNSAFE & {name.partition(".")[0] for name in names}:
                yield node.lineno
        elif isinstance(node, ast.Call):
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            called = ast.unparse(node.func)
            if (
                called in {"eval", "exec", "np.load", "numpy.load", "pd.read_pickle"}
                or called.split(".")[-1] in {"all_gather_object", "broadcast_object_list"}
                or given.get("allow_pickle")
                or (called == "torch.load" and given.get("weights_only") is not True)
                or (
                    (called.startswith("yaml.") and called.endswith(("load", "load_all", "Loader")))
                    and called not in {"yaml.safe_load", "yaml.SafeLoader"}
                )
            ):
                yield node.lineno


def test_nothing_is_unpickled_anywhere():
    found = [
        f"{file}:{line}"
        for package in ("gradlab", "trainers", "analyses", "dashboards")
        for file in (ROOT / package).rglob("*.py")
        for line in unsafe(file.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from joblib import load", "torch.load(f)", "eval(x)", "np.load(f)"),
        *("torch.load(f, weights_only=False)", "yaml.load(f, yaml.Loader)", "yaml.unsafe_load(f)"),
        "distributed.all_gather_object(found, x)",
    ],
)
def test_what_unpickles_would_be_noticed(line):
    assert list(unsafe(line)) == [1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "run"
    train_run(TrainConfig.model_validate(SMALL), folder)
    return hostile.content(folder)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A run of as few quantities as there are kinds of: reading takes longer than damaging."""
    folder = tmp_path_factory.mktemp("few") / "run"
    axes = {"network": ["actor"], "space": ["psi", "theta"], "layer": ["all"]}
    axes |= {"agent": [0, 1], "agent_other": [0, 1]}
    with RunWriter(folder) as writer:
        writer.describe(method="fups", environment="e", agents=2, seed=0, state="done", config={})
        for update in range(3):
            values = np.full((1, 2, 1, 2, 2), update / 2)
            cosine = Quantity(values=values, dims=tuple(axes), coords=axes, unit="1")
            count = Quantity(values=np.array(update), unit="frames")
            own = Quantity(values=np.ones(3, "f4"), dims=("x",), coords={"x": [0.5, 1, 2]})
            writer.write(update, {"cosine": cosine, "frames": count, "own": own})
    return hostile.content(folder)


@pytest.fixture
def short(tmp_path):
    """A run with one record and no log beside its database."""
    folder = tmp_path / "short"
    with RunWriter(folder) as writer:
        writer.describe(method="fups", environment="e", agents=2, seed=0, state="done", config={})
        writer.write(0, {"own": Quantity.scalar(1)})
    change(folder, "PRAGMA journal_mode = DELETE")
    return folder


def change(folder, *statements):
    with closing(sqlite3.connect(folder / "records.sqlite", isolation_level=None)) as database:
        for statement in statements:
            database.execute(statement)


def test_a_journal_deletes_no_file_that_it_names(short, tmp_path):
    theirs = tmp_path / "thesis.tex"
    theirs.write_text("years of work")
    pages = (short / "records.sqlite").stat().st_size // hostile.PAGE
    journal = short / "records.sqlite-journal"
    journal.write_bytes(hostile.journal_naming(theirs, pages))
    look(short)
    with pytest.raises(UsageError, match="journal names a file for SQLite to delete"):
        RunWriter(short, resume=True)
    assert theirs.exists()
    # What is refused would have deleted it.
    with closing(sqlite3.connect(short / "records.sqlite")) as database:
        database.execute("SELECT * FROM record").fetchall()
    assert not theirs.exists()


def test_a_journal_of_a_write_that_was_cut_off_is_gone_on_with(short, tmp_path):
    pages = (short / "records.sqlite").stat().st_size // hostile.PAGE
    whole = hostile.journal_naming(tmp_path, pages)
    (short / "records.sqlite-journal").write_bytes(whole[:512])
    with RunWriter(short, resume=True) as writer:
        writer.write(1, {"own": Quantity.scalar(2)})
    assert look(short).quantity("own").to_numpy().tolist() == [1, 2]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW more AS SELECT * FROM record",
        "CREATE TRIGGER t AFTER INSERT ON RECORD BEGIN DELETE FROM record; END",
        "CREATE TRIGGER t AFTER INSERT ON quantity BEGIN DELETE FROM record; END",
        "CREATE TABLE more (a)",
        "CREATE INDEX more ON RECORD (array)",
        "DROP TABLE record; CREATE VIEW RECORD AS SELECT 'own' quantity, 0 \"update\", x'00' array",
    ],
)
def test_what_gradlab_does_not_make_is_neither_read_nor_gone_on_with(short, statement):
    change(short, *statement.split("; ", statement.count("DROP")))
    run = open_run(short)
    assert run.quantities == ()
    assert "other tables than gradlab writes" in "".join(run.problems)
    with pytest.raises(UsageError, match="other tables than gradlab writes"):
        RunWriter(short, resume=True)


@pytest.mark.parametrize("name", ["quantity", "record_by_quantity"])
def test_pages_that_refer_to_each_other_are_not_followed_without_end(short, name):
    if name == "quantity":  # rows of nothing, which no limit of what is read would ever meet
        row = ", ".join(f"{column} = ''" for column in ("name", "dims", "coordinates", "dtype"))
        change(short, f"UPDATE quantity SET unit = '', estimator = '', {row}")
    else:
        change(short, 'UPDATE record SET "update" = 0.5')
    hostile.looped(short / "records.sqlite", name)
    run = look(short)
    assert "more rows than its bytes can hold" in "".join(run.problems)
    with suppress(UsageError), RunWriter(short, resume=True) as writer:
        writer.newest_update()


def look(folder):
    run = open_run(folder)
    for name in run.quantities:
        run.updates(name)
        run.quantity(name)
    repr(run)
    return run


def summarise(folder):
    conflict_table([open_run(folder)])


def put_in_words(folder):
    explain(open_run(folder), 0, 1)


def show(folder):
    page_html([open_run(folder)])


def play(folder):
    load_policy(folder, agent=0)


def go_on(folder):
    train_run(TrainConfig.model_validate(SMALL | {"frames": 8 * 4 * 3}), folder, resume=True)


def at_most_refused(use, files, top):
    """A reader's way with a folder, beside which there is something that it must leave alone."""
    for name in ("run", "outside"):
        shutil.rmtree(top / name, ignore_errors=True)
        (top / name).mkdir(parents=True)
    (top / "outside" / "secret").write_bytes(b"{}")
    before = hostile.unchanged(top / "outside")
    hostile.put(files, top / "run")
    said = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use(top / "run")
    except (UsageError, Failed) as error:
        said = str(error)
    assert len(said.splitlines()) <= 1
    assert hostile.unchanged(top / "outside") == before


def fuzz(whole, top, use, ways, count, part=0):
    @seed(part)
    @settings(max_examples=count, **FUZZ)
    @given(hostile.damaged(whole, top / "scratch", ways))
    def once(files):
        at_most_refused(use, files, top)

    once()


FILES = ("bits", "cut", "lost", "swapped", "linked", "field", "row")
CASES = {
    "look": (look, FILES),
    "summary": (summarise, FILES),
    "words": (put_in_words, FILES),
    "checkpoint": (newest_checkpoint, ("bits", "cut", "lost", "swapped", "field", "header")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_run_is_read_or_refused(whole, few, tmp_path, case):
    fuzz(few if case == "look" else whole, tmp_path, *CASES[case], 25)


def test_a_planted_pickle_runs_nowhere(whole, tmp_path):
    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    planted = pickle.dumps(Planted())
    for name in whole:
        for use in (look, play, go_on):
            at_most_refused(use, {**whole, name: planted}, tmp_path / "top")
    assert not (tmp_path / "ran").exists()
    pickle.loads(planted)  # it is one that would
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["run.json", "records.sqlite", "records.sqlite-wal", "lock", "checkpoints", "else"]
)
def test_no_link_in_a_run_is_followed(whole, tmp_path, name):
    files = {known: data for known, data in whole.items() if not known.startswith(name)}
    hostile.put({**files, name: "../outside"}, tmp_path / "run")
    for use in (open_run, go_on):
        with pytest.raises(UsageError, match=f"{name} is a link to elsewhere"):
            use(tmp_path / "run")


def test_a_run_brings_no_code_of_its_own(tmp_path, monkeypatch):
    with RunWriter(tmp_path / "run") as writer:
        writer.describe(state="done")
    (tmp_path / "run" / "payload.py").write_text("raise SystemExit('it ran')\n")
    for here, name in ((tmp_path, "run.payload"), (tmp_path / "run", "payload")):
        monkeypatch.chdir(here)
        for env in (f"{name}:make", f"pettingzoo/{name}"):
            with pytest.raises(UsageError, match="from which no code is taken"):
                train_run(TrainConfig(env=env), tmp_path / "new")


@pytest.mark.parametrize(
    "text",
    [
        hostile.BOMB,
        "[" * 1000,
        "seed: 2001-99-99",
        "seed: !!int x",
        "seed: !!python/object/apply:os.system [true]",
        "x: &x {<<: *x}",
        "\x00",
        "seed: " + "9" * 10_000,
        "a" * 2_000_000,
    ],
    ids=["bomb", "deep", "date", "int", "python", "itself", "nul", "digits", "large"],
)
def test_settings_that_are_more_than_they_say_are_refused_in_a_line(tmp_path, capsys, text):
    (tmp_path / "c.yaml").write_text(text)
    for words in (["train", "--config"], ["sweep"]):
        assert command([*words, str(tmp_path / "c.yaml")]) == 2
        error = capsys.readouterr().err
        assert len(error) < 1000
        assert len(error.splitlines()) == 1


KNOWN = yaml.safe_dump(TrainConfig().model_dump(mode="json"))


@st.composite
def documents(draw):
    """Settings with words or values changed for others."""
    lines = KNOWN.splitlines()
    for _ in range(draw(st.integers(1, 4))):
        number = draw(st.integers(0, len(lines) - 1))
        key, _, _ = lines[number].partition(":")
        value = draw(hostile.VALUES | st.text("!&*[]{}<>:-?|'\"%@`#,. a1\n\t", max_size=12))
        lines[number] = f"{key}: {value}"
    return "\n".join(lines)


def takes_settings(text):
    said = ""
    try:
        make_config(parse_document(text, "it").content or {})
    except UsageError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1


@settings(max_examples=100, **FUZZ)
@given(documents())
def test_damaged_settings_are_taken_or_refused(text):
    takes_settings(text)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 5))
def test_forty_thousand_damaged_settings_are_taken_or_refused(part):
    @seed(part)
    @settings(max_examples=10_000, **FUZZ)
    @given(documents())
    def once(text):
        takes_settings(text)

    once()


MANY = {
    "look": (*CASES["look"], 5_000),
    "checkpoint": (*CASES["checkpoint"], 9_500),
    "summary": (*CASES["summary"], 200),
    "words": (*CASES["words"], 200),
    "policy": (play, (*FILES, "header"), 50),
    "resuming": (go_on, (*FILES, "header"), 38),
    "page": (show, FILES, 12),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 5))
@pytest.mark.parametrize("case", MANY)
def test_sixty_thousand_damaged_runs_are_read_or_refused(whole, few, tmp_path, case, part):
    fuzz(few if case == "look" else whole, tmp_path, *MANY[case], part)
