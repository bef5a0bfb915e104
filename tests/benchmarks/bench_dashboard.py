"""A big run in a real browser, as a page and served: how soon it answers, a step of its slider.

The run has 30 agents, 2,000 diagnosed updates, actor and critic, four layers and `all`; its numbers
are made up (gradients that wander), its folder is written by the run writer itself. Served also:
how soon a folder of 200 runs is listed, and how soon an update that is recorded is drawn.

    python tests/benchmarks/bench_dashboard.py [--updates N] [--keep FOLDER] [--forms html served]
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from measure import write
from playwright.sync_api import sync_playwright

from dashboards import write_page
from gradlab.quantity import Quantity
from gradlab.run import open_run
from gradlab.run_writer import RunWriter

AGENTS, COPIES = 30, 128
NETWORKS = ["actor", "critic"]
SPACES = ["psi", "theta"]
LAYERS = ["all", "layer0", "layer1", "layer2", "head"]
EFFECTS_EVERY = 10
STEPS = 40  # of the slider
RUNS, GROWING = 200, 10  # runs in the list; updates that are recorded while they are looked at
LIMITS = {
    "html": {"megabytes": 15, "seconds to interactive": 3, "slider step, ms": 100},
    "served": {
        "seconds to first paint": 2,
        "slider step, ms": 100,
        "seconds to list 200 runs": 1,
        "seconds from record to drawn": 2,
    },
}


def write_run(folder, updates):
    """Write a run in which every quantity that the page draws is recorded."""
    rng = np.random.default_rng(0)
    wants = rng.normal(size=(2, 2, len(LAYERS), AGENTS, 12)).astype(np.float32)
    rows = rng.normal(size=(2, AGENTS, 16)).astype(np.float32)
    with RunWriter(folder) as writer:
        writer.describe(
            method="hypermarl",
            environment="navigation",
            agents=AGENTS,
            agent_names=[f"agent_{n}" for n in range(AGENTS)],
            seed=0,
            config={"copies": COPIES},
            state="done",
            updates=updates,
        )
        for update in range(updates):
            wants += 0.15 * rng.normal(size=wants.shape).astype(np.float32)
            rows += 0.05 * rng.normal(size=rows.shape).astype(np.float32)
            values = gradients(rng, wants) | embeddings(rows)
            values["frames"] = Quantity(values=np.int64((update + 1) * 6000), unit="frames")
            values["episode_return"] = Quantity.scalar(-80 * np.exp(-3 * update / updates))
            if update % EFFECTS_EVERY == 0:
                values |= effects(rng, rows)
            writer.write(update, values)


def of(values, *axes, unit="1"):
    labels = {
        "network": NETWORKS,
        "space": SPACES,
        "layer": LAYERS,
        "agent": range(AGENTS),
        "agent_other": range(AGENTS),
        "minibatches": [2, 4],
        "compared_with": ["behavioural_distance", "interference"],
        "correlation": ["pearson", "spearman"],
    }
    return Quantity(
        values=np.asarray(values, np.float32),
        dims=axes,
        coords={axis: list(labels[axis]) for axis in axes},
        unit=unit,
        estimator="made up",
    )


def gradients(rng, wants):
    place = ("network", "space", "layer")
    lengths = np.linalg.norm(wants, axis=-1)
    unit = wants / lengths[..., None]
    cosine = np.einsum("nslap,nslbp->nslab", unit, unit).clip(-1, 1)
    width = 0.3 * rng.random(cosine.shape, dtype=np.float32)
    verdict = np.where(cosine - width > 0, 1, np.where(cosine + width < 0, -1, 0))
    off = ~np.eye(AGENTS, dtype=bool)
    pairs = verdict[..., off]
    found = {
        "cosine": of(cosine * 0.9, *place, "agent", "agent_other"),
        "cosine_debiased": of(cosine, *place, "agent", "agent_other"),
        "cosine_low": of((cosine - width).clip(-1), *place, "agent", "agent_other"),
        "cosine_high": of((cosine + width).clip(None, 1), *place, "agent", "agent_other"),
        "verdict": of(verdict, *place, "agent", "agent_other"),
        "conflict_rate": of((pairs == -1).mean(-1), *place),
        "aligned_rate": of((pairs == 1).mean(-1), *place),
        "mean_cosine": of(cosine[..., off].mean(-1), *place),
        "cancelled_norm": of(rng.random((2, 2, len(LAYERS))), *place),
        "norm": of(lengths, *place, "agent", unit="loss"),
        "squared_norm_debiased": of(lengths**2, *place, "agent", unit="loss^2"),
        "variance_mean": of(lengths**2 * rng.random(lengths.shape), *place, "agent", unit="loss^2"),
        "factorisation_gap": of(np.zeros(2), "network"),
        "residual": of(1e-16 * (1 + rng.random(2)), "network"),
    }
    shape = (2, len(LAYERS))
    for name in ("variance_within", "variance_between"):
        found[name] = of(rng.random(shape), "network", "layer", unit="loss^2")
    found["design_effect"] = of(1 + rng.random((*shape, AGENTS)), "network", "layer", "agent")
    return found


def embeddings(rows):
    return {
        f"embedding_{network}": Quantity(
            values=rows[number].copy(),
            dims=("agent", "feature"),
            coords={"agent": range(AGENTS), "feature": range(rows.shape[-1])},
            unit="1",
            estimator="learned agent embeddings",
        )
        for number, network in enumerate(NETWORKS)
    }


def effects(rng, rows):
    distance = np.linalg.norm(rows[:, :, None] - rows[:, None], axis=-1)
    behaviour = distance[0] / (1 + distance[0])
    pair = ("agent", "agent_other")
    coupling = np.exp(-distance / 4)[:, None].repeat(len(LAYERS), 1)
    return {
        "coupling": of(coupling, "network", "layer", *pair),
        "transference": of(0.01 * rng.normal(size=distance.shape), "network", *pair, unit="loss"),
        "behavioural_distance": of(behaviour, *pair),
        "snd": of(behaviour.mean()),
        "embedding_distance": of(distance, "network", *pair),
        "effective_rank": of(5 + rng.random(2), "network"),
        "participation_ratio": of(4 + rng.random(2), "network"),
        "rank_ceiling": of([16, 16], "network"),
        "mantel": of(rng.random((2, 2, 2)), "network", "compared_with", "correlation"),
        "mantel_p_value": of(rng.random((2, 2, 2)), "network", "compared_with", "correlation"),
    }


@contextmanager
def browsing():
    """A page of a new browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


@contextmanager
def served(*folders):
    """The address of a server, and its process."""
    command = [sys.executable, "-m", "gradlab", "dashboard", *map(str, folders)]
    server = subprocess.Popen([*command, "--serve", "--port", "0"], stdout=subprocess.PIPE)
    yield server.stdout.readline().decode().split()[1], server
    server.terminate()
    server.wait()


def opened(page, address):
    """Seconds until a page's words and controls are seen, and until its figures are as well."""
    page.goto("about:blank")
    began = time.perf_counter()
    page.goto(address)
    page.wait_for_selector("html[data-ready=yes]")
    drawn = time.perf_counter() - began
    return page.evaluate(_PAINTED) / 1000, drawn


def measure(address):
    """Open the page three times, then move its slider on every tab."""
    steps = {}
    with browsing() as page:
        opening = [opened(page, address) for _ in range(3)]
        tabs = page.locator("[role=tab]").evaluate_all("tabs => tabs.map(t => t.dataset.tab)")
        for tab in tabs:
            page.evaluate("t => { location.hash = `tab=${t}`; }", tab)
            page.wait_for_timeout(500)
            page.wait_for_selector("html[data-drawn=yes]")
            # What a reader looks at: the first panels, beneath the bar.
            page.evaluate("document.querySelector('.bar').scrollIntoView()")
            page.wait_for_timeout(1500)
            page.wait_for_selector("html[data-drawn=yes]")
            steps[tab] = page.evaluate(_STEP, STEPS)
    painted, drawn = ([round(seconds, 2) for seconds in of] for of in zip(*opening, strict=True))
    return {
        "seconds to first paint": painted,
        "seconds to interactive": drawn,
        "slider step, ms": {
            tab: {"median": round(statistics.median(times), 1), "largest": round(max(times), 1)}
            for tab, times in steps.items()
        },
    }


def listing(folder):
    """Seconds until 200 runs are listed, by a server that has not seen them, and again."""
    for number in range(RUNS):
        with RunWriter(folder / f"run-{number}") as writer:
            writer.describe(method="fups", environment="e", agents=2, seed=number, state="done")
            for update in range(20):
                numbers = {"frames": 100.0 * update, "episode_return": 1.0 / (1 + update)}
                writer.write(update, {n: Quantity.scalar(v) for n, v in numbers.items()})
    with served(folder) as (address, _), browsing() as page:
        found = [round(opened(page, address)[1], 2) for _ in range(3)]
        assert page.locator("#rows tr").count() == RUNS
    return found


def growing(run, folder):
    """Seconds from the record of an update to its picture, for a reader who follows a small run."""
    source = open_run(run)
    found = []

    def record(writer, update):
        values = {
            name: source.quantity(name, since=update, until=update)[0].drop_vars("update")
            for name in source.quantities
            if update in recorded[name]
        }
        writer.write(update, values)

    recorded = {name: set(source.updates(name)[: GROWING + 1]) for name in source.quantities}
    with RunWriter(folder / "growing") as writer:
        writer.describe(**source.info | {"state": "running"})
        record(writer, 0)
        with served(folder / "growing") as (address, _), browsing() as page:
            opened(page, f"{address}#tab=interference")
            for update in range(1, GROWING + 1):
                time.sleep(0.3 * update % 1)  # at any moment between two questions
                record(writer, update)
                began = time.perf_counter()
                page.wait_for_function(_DRAWN, arg=update, polling=20)
                found.append(time.perf_counter() - began)
    return {"median": round(statistics.median(found), 2), "largest": round(max(found), 2)}


_PAINTED = """async () => {
  const found = () => performance.getEntriesByName("first-contentful-paint")[0];
  while (!found()) await new Promise((done) => setTimeout(done, 20));
  return found().startTime;
}"""

_DRAWN = """update => document.documentElement.dataset.drawn === "yes"
  && document.querySelector("#tabpanel-interference .badge").textContent.startsWith(`update ${update}`)"""


# From the slider's event to the frame after all panels in sight are drawn.
_STEP = """async (steps) => {
  const slider = document.getElementById("update");
  const times = [];
  for (let n = 0; n < steps; n += 1) {
    slider.value = (n * 7) % (Number(slider.max) + 1);
    const began = performance.now();
    slider.dispatchEvent(new Event("input"));
    do await new Promise((done) => requestAnimationFrame(done));
    while (document.documentElement.dataset.drawn !== "yes");
    times.push(performance.now() - began);
  }
  return times;
}"""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--keep", type=Path, help="folder of the run and the page; made if need be")
    parser.add_argument("--forms", nargs="+", default=["html", "served"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "run").exists():
            write_run(folder / "run", options.updates)
        found = {"limits": LIMITS, "agents": AGENTS, "updates": options.updates}
        if "html" in options.forms:
            began = time.perf_counter()
            write_page([open_run(folder / "run")], folder / "page.html")
            found["html"] = {
                "seconds to write": round(time.perf_counter() - began, 1),
                "megabytes": round((folder / "page.html").stat().st_size / 1e6, 2),
                **measure((folder / "page.html").as_uri()),
            }
        if "served" in options.forms:
            with served(folder / "run") as (address, _):
                found["served"] = measure(address)
            with tempfile.TemporaryDirectory() as runs:
                found["served"]["seconds to list 200 runs"] = listing(Path(runs))
                found["served"]["seconds from record to drawn"] = growing(
                    folder / "run", Path(runs)
                )
    print(json.dumps(found, indent=2))
    if len(options.forms) == 2:
        write("dashboard", found)


if __name__ == "__main__":
    main()
