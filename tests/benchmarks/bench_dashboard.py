"""The page of a big run in a real browser: its size, how soon it answers, a step of its slider.

The run has 30 agents, 2,000 diagnosed updates, actor and critic, four layers and `all`; its numbers
are made up (gradients that wander), its folder is written by the run writer itself.

    python tests/benchmarks/bench_dashboard.py [--updates N] [--keep FOLDER]
"""

import argparse
import shutil
import statistics
import tempfile
import time
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
STEPS = 15  # of the slider
LIMITS = {"megabytes": 15, "seconds to interactive": 3, "slider step, ms": 100}


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


def measure(file):
    """Open the page three times, then move its slider on every tab."""
    opening = []
    steps = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for _ in range(3):
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            began = time.perf_counter()
            page.goto(file.as_uri(), timeout=120_000)
            page.wait_for_selector("html[data-ready=yes]")
            opening.append(time.perf_counter() - began)
            if len(opening) < 3:
                page.close()
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
        browser.close()
    return opening, steps


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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "run").exists():
            write_run(folder / "run", options.updates)
        began = time.perf_counter()
        write_page([open_run(folder / "run")], folder / "page.html")
        making = time.perf_counter() - began
        opening, steps = measure(folder / "page.html")
        found = {
            "agents": AGENTS,
            "updates": options.updates,
            "seconds to write": round(making, 1),
            "megabytes": round((folder / "page.html").stat().st_size / 1e6, 2),
            "seconds to interactive": round(statistics.median(opening), 2),
            "slider step, ms": {
                tab: {
                    "median": round(statistics.median(times), 1),
                    "largest": round(max(times), 1),
                }
                for tab, times in steps.items()
            },
        }
    print(found)
    write("dashboard", {"limits": LIMITS, "html": found})


if __name__ == "__main__":
    main()
