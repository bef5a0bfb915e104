"""Writes docs/performance.md from the committed results of the benchmarks."""

import json
from pathlib import Path
from statistics import median, quantiles

from measure import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"

HEAD = """# Performance: what taking gradients apart costs

Made by `make bench`; every table is what the command measured, on the machine and with the versions named
below it. Times are ratios to **one gradient evaluation of the same batch**: forward and backward pass of
the same loss in plain PyTorch, all agents together. What a row compares ran in turn in one process; the
figure is the median over rounds of the ratio within the round. Memory is the peak of what is resident
beyond what was before the call. Machines like this one repeat to about 15 %.

"""


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def provenance(record):
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    note = f" {record['note']}" if "note" in record else ""
    return f"\n{record['machine']['processor']}; {versions}.{note}\n\n"


def engine():
    record = load("engine")
    names = ("moments", "by cluster", "opacus ghost norms", "backpack BatchL2", "vmap(grad)")
    rows = []
    for row in record["rows"]:
        cells = [row["threads"], row["net"], row["agents"], f"{row['samples']:,}"]
        cells.append(f"{row['times']['gradient']['ms']:,.0f}")
        for name in names:
            found = row["times"].get(name)
            cells.append(f"{found['ratio']:.2f}" if found else "-")
        memory = row["MiB"]
        cells += [f"{memory[name]:,.0f}" for name in ("gradient", "moments", "by cluster")]
        rows.append(cells)
    columns = (
        "threads",
        "network",
        "agents",
        "samples per agent",
        "gradient, ms",
        "all moments",
        "and by cluster",
        "Opacus ghost norms",
        "BackPACK BatchL2",
        "`vmap(grad)`",
        "MiB gradient",
        "MiB moments",
        "MiB by cluster",
    )
    return (
        "## The engine\n\n"
        "PPO's loss, agents that share one network, float32, copies of 32 steps. *All moments*: every "
        "agent's mean gradient, and sums of squared norms by layer. *And by cluster*: also the "
        "sums by cluster of copies, at most 32, and their inner products between agents, which intervals "
        "are made of. Opacus and BackPACK "
        "give the samples' norms alone, in one pass over all agents. `vmap(grad)` forms every sample's "
        "gradient, then means and norms; it is left out where that takes more than 3 GiB.\n\n"
        + table(columns, rows)
        + provenance(record)
    )


def psi():
    record = load("psi")
    rows = [
        (
            row["net"],
            row["agents"],
            f"{row['samples']:,}",
            f"{row['psi']:,}",
            f"{row['times']['reference']['ms']:,.0f}",
            f"{row['times']['decompose']['ratio']:.2f}",
            f"{row['MiB']['decompose']:,.0f}",
        )
        for row in record["rows"]
    ]
    columns = (
        "network",
        "agents",
        "samples per agent",
        "size of psi",
        "reference, ms",
        "ratio",
        "MiB",
    )
    return (
        "## HyperMARL's trained parameters\n\n"
        "All agents' $g_i = J_i^\\top Z_i$ and their Gram matrix by layer, theta-space moments included, "
        "against the engine plus one vector-Jacobian product through the hypernetwork for each agent "
        "(the reference). One thread.\n\n" + table(columns, rows) + provenance(record)
    )


def scale():
    record = load("scale")
    rows = [
        (
            row["agents"],
            f"{row['samples']:,}",
            f"{row['ms']:,.0f}",
            f"{row['ns per sample']:,.0f}",
            f"{row['MiB']:,.0f}",
        )
        for row in record["rows"]
    ]
    columns = ("agents", "samples per agent", "ms", "ns for each sample of an agent", "MiB")
    return (
        "## Growth\n\nAll moments, network 18-64-64-5, one thread; the batch itself is not counted.\n\n"
        + table(columns, rows)
        + provenance(record)
    )


def statistics():
    record = load("statistics")
    rows = [
        (
            row["method"],
            row["agents"],
            f"{row['ms per update']:,.0f}",
            f"{row['ms']:,.0f}",
            f"{100 * row['share']:.1f} %",
        )
        for row in record["rows"]
    ]
    columns = ("method", "agents", "update, ms", "statistics, ms", "share")
    return (
        "## Statistics\n\nWhat intervals, verdicts, variance and coupling of actor and critic cost beside the "
        "engine's own passes, against the whole time of an update without diagnostics: `vmas/navigation`, "
        "128 copies in 32 clusters, 512 samples of each agent, one "
        "thread. `decompose` with clusters told apart, `interference`, `variance` and `coupling`, less "
        "`decompose` without clusters.\n\n" + table(columns, rows) + provenance(record)
    )


def training():
    record = load("training")
    rows = []
    for row in record["rows"]:
        cells = [row["method"], row["steps"], f"{row['ms per update']:,.0f}"]
        for level in ("light", "full"):
            middle, low, high = (100 * share for share in row[f"{level}, whole"])
            cells += [f"{100 * row[level]:+.1f} %", f"{middle:+.0f} % ({low:+.0f} to {high:+.0f})"]
        rows.append(cells)
    columns = ("method", "steps", "off, ms per update")
    columns += ("light", "light, whole", "full", "full, whole")
    return (
        "## Diagnostics in training\n\nWall time of whole trainings with every update diagnosed "
        "(`--every 1`; the default is every tenth) against `--diagnostics off`: independent PPO, 4 epochs "
        "of 4 minibatches, `vmas/navigation`, 4 agents, 128 copies, rollouts of so many steps, recorded as "
        "`gradlab train` does, one thread. Full diagnoses hold the statistics; transference, behaviour and "
        "geometry have a schedule of their own (`--effects-every`) and are left out.\n\n"
        "The three trainings of a row go on side by side, an update of each in turn. `light` and `full`: "
        "seconds of diagnosing and recording relative to the rest of the same update, less those of "
        "recording with `off`. `whole`: an update relative to that with `off` of the same turn, median and "
        "quartiles; as wide as they are, so much does the machine's speed differ from one second to the "
        "next.\n\n" + table(columns, rows) + provenance(record)
    )


def schemes():
    record = load("schemes")
    rows = [
        (
            f"`{row['training']}`",
            f"{row['ms']:,.0f}",
            f"{1000 * row['frames'] / row['ms']:,.0f}",
            f"{row['ratio']:.2f}",
        )
        for row in record["rows"]
    ]
    first = record["rows"][0]
    return (
        "## Sharing schemes\n\nWhole updates, rollout and all, without diagnostics: `vmas/navigation`, "
        f"{first['agents']} agents, {first['frames']:,} frames in each update, PPO with 4 epochs of 4 minibatches, A2C "
        "with its one step, MAPPO and HAPPO with policies of each agent's own and one central value function, or MATD3 with "
        "32 steps on 1,000 samples of each agent, one thread. An update of each in turn; "
        "the ratio is the time beside that of `fups` with PPO in the same turn, for MATD3 beside that of `fups-id` with "
        "it, median over turns. `dico` is scaled to a diversity of 1, `seps` is in groups.\n\n"
        + table(("training", "ms per update", "frames/s", "ratio of times"), rows)
        + provenance(record)
    )


def benchmarl():
    record = load("benchmarl")
    rows = [
        (
            row["side"],
            f"{row['wall']['seconds']:.1f}",
            f"{row['cpu']['collection']:.2f}",
            *(
                "-"
                if row["side"] == "without"
                else f"{of['ratio'] - 1:+.1%} ({of['least'] - 1:+.1%} to {of['most'] - 1:+.1%})"
                for of in (row["wall"], row["cpu"])
            ),
        )
        for row in record["rows"]
    ]
    columns = (
        "callback",
        "s per iteration",
        "CPU s of it until it trains",
        "wall time",
        "CPU time",
    )
    return (
        "## The callback in BenchMARL\n\n"
        "`GradlabCallback(every=1)` in an experiment of BenchMARL's against none: IPPO, `vmas/navigation`, "
        "4 agents, 128 copies, shared parameters, and for all else BenchMARL's own defaults: at least 6,000 frames "
        "collected, 45 passes of minibatches of 400, networks 256-256. A process each, one thread, in turns of one "
        f"iteration; the median of {record['rows'][0]['rounds']} ratios within a turn, and the least and most. Until it "
        "trains an iteration collects and, with the callback, diagnoses: that difference is what diagnosing takes itself; "
        "the rest of the ratios is how two processes' trainings differ.\n\n"
        + table(columns, rows)
        + provenance(record)
    )


def throughput():
    record = load("throughput")
    cells = {}
    for row in record["rows"]:
        place = tuple(row[k] for k in ("allocator", "scenario", "algorithm", "copies"))
        cells.setdefault(place, {})[row["side"]] = row["cpu"]
    rows, parts = [], []
    for (allocator, scenario, algorithm, copies), sides in cells.items():
        place = [allocator, scenario, algorithm, copies]
        total = {side: cost["total"] for side, cost in sides.items()}
        peer = {m: total[f"benchmarl {m}"] for m in ("fups", "nops")}
        own = {m: total[f"gradlab {m}"] for m in ("fups", "nops", "hypermarl")}
        rows.append([
            *place,
            *(f"{peer[m]:,.0f}" for m in peer),
            *(f"{own[m]:,.0f} ({own[m] / peer.get(m, peer['fups']):.2f})" for m in own),
            f"{own['fups'] / own['hypermarl']:.2f}",
        ])
        raw = total["raw"]
        fast = [sides[f"{library} fups"] for library in ("benchmarl", "gradlab")]
        parts.append([
            *place,
            f"{raw:,.0f}",
            *(f"{side['collection']:,.0f} ({side['collection'] / raw:.0%})" for side in fast),
            *(f"{side['training']:,.0f}" for side in fast),
        ])
    places = ("allocator", "scenario", "algorithm", "copies")
    columns = (
        *places,
        "BenchMARL FuPS",
        "NoPS",
        "gradlab FuPS",
        "NoPS",
        "HyperMARL",
        "HyperMARL's time / FuPS's",
    )
    of_parts = (
        *places,
        "stepping alone",
        "BenchMARL collects",
        "gradlab collects",
        "BenchMARL updates",
        "gradlab updates",
    )
    return (
        "## Whole trainings beside BenchMARL\n\n"
        "Frames per CPU second; a frame is a step of all 4 agents in one copy. Rollouts of 100 steps, "
        "episodes of 100, 4 epochs of 4 minibatches, tanh networks 64-64 for actor and critic, Adam's, the "
        "clip ranges and the discounts alike, the same arguments of the scenario, one torch thread each; "
        "gradlab with light diagnostics in every update, of as many samples as a tenth of them would be at "
        "the default `--every 10`, and with its records and checkpoints; BenchMARL without evaluation, "
        "loggers or checkpoints. What differs: BenchMARL's policy also makes its standard deviation from the "
        "observation and squashes actions by a tanh, and it does not normalise advantages. Each side is a process of its "
        "own; they take turns, one rollout and update at a time; medians over turns. In brackets: the ratio "
        "to BenchMARL with the same sharing (HyperMARL: to its FuPS). Allocator *default*: glibc's; "
        "*keeping*: both sides' freed memory is kept for reuse (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_, "
        "MALLOC_TOP_PAD_).\n\n"
        + table(columns, rows)
        + "\nThe parts, with FuPS. *Stepping alone*: VMAS with actions drawn beforehand, all copies reset in one "
        "batch at the end of an episode, the limit for collection as VMAS is usually called. gradlab steps it "
        "in torch's inference mode.\n\n" + table(of_parts, parts) + provenance(record)
    )


def growth():
    record = load("growth")
    found = record["rows"]
    tables = []
    for axis in ("agents", "copies"):
        cells = [
            [
                row[axis],
                row["method"],
                f"{row['us per frame']['collection']:,.1f}",
                f"{row['us per frame']['training']:,.1f}",
                f"{row['of fups']['training']:.2f}",
                f"{row['of fups']['total']:.2f}",
                f"{row['MiB']:,.0f}",
            ]
            for row in found[axis]
        ]
        columns = (axis, "method", "collection, us per frame", "training, us per frame")
        columns += ("training, of FuPS's", "whole, of FuPS's", "MiB")
        tables.append(table(columns, cells))
    grouped = [
        [
            row["agents"],
            f"{1e3 * row['seconds']['grouped']:,.2f}",
            f"{1e3 * row['seconds']['all on all']:,.1f}",
            f"{row['seconds']['all on all'] / row['seconds']['grouped']:.1f}",
        ]
        for row in found["grouping"]
    ]
    (compiled,), (profile,) = found["compile"], found["profile"]
    eager, faster = (compiled["seconds"][k] for k in ("eager", "compiled"))
    shares = [[kind, f"{share:.0%}"] for kind, share in profile["shares"].items()]
    shares.append(["all else", f"{1 - sum(profile['shares'].values()):.0%}"])
    floor = profile["matrix products alone"]
    return (
        "## How trainings grow\n\n"
        "CPU time for each frame (a step of all agents in one copy) of independent PPO without diagnostics on "
        "`vmas/dispersion`, rollouts of 32 steps, default settings, one thread; the methods took turns. "
        "HyperMARL makes the same policy networks as FuPS has. Memory: the peak of a rollout and its update "
        "beyond what was resident before.\n\n64 copies:\n\n"
        + tables[0]
        + "\n4 agents:\n\n"
        + tables[1]
        + "\nEach agent's samples through its own network only, in one batched product, against every "
        "agent's network on all samples and then a choice, as the official code does; forward and backward "
        f"pass of the policies, {found['grouping'][0]['samples']:,} samples of each agent:\n\n"
        + table(("agents", "grouped, ms", "all on all, ms", "ratio"), grouped)
        + f"\n`torch.compile` of both losses of a chunk of {compiled['rows']:,} rows, forward and backward: "
        f"{1e3 * eager:.1f} ms as they are, {1e3 * faster:.1f} ms compiled "
        f"({eager / faster:.2f} times as fast), after {compiled['seconds to compile']:.0f} s of compiling. "
        "It is not used.\n\n"
        f"Where an update of FuPS with 400 copies goes ({profile['seconds']:.2f} s for "
        f"{profile['rows']:,} rows), by torch's profiler:\n\n"
        + table(("kind", "share"), shares)
        + "\nThe same matrix products by themselves, with their results' memory at hand, take "
        f"{floor:.2f} s: {floor / profile['seconds']:.0%} of it, the limit for any update in this "
        "precision.\n" + provenance(record)
    )


def learning():
    record = load("learning")
    cells = {}
    for row in record["rows"]:
        cells.setdefault((row["task"], row["method"]), []).append(row)
    rows = []
    for (task, method), runs in cells.items():
        cell = [task, method, len({run["seed"] for run in runs})]
        for kind in ("mean", "sampled"):
            for library in ("benchmarl", "gradlab"):
                found = [run[kind]["return"] for run in runs if run["library"] == library]
                cell.append(f"{sum(found) / len(found):.3f} ({min(found):.3f} to {max(found):.3f})")
        rows.append(cell)
    columns = ("scenario", "sharing", "seeds", "BenchMARL, mean action", "gradlab, mean action")
    columns += ("BenchMARL, sampled", "gradlab, sampled")
    frames = {run["frames"] for run in record["rows"]}
    return (
        "## Returns beside BenchMARL at equal frames\n\n"
        f"Independent PPO of both libraries with the same settings, {max(frames):,} frames, 4 agents, 128 "
        "copies, rollouts of 100 steps, 4 epochs of 4 minibatches; mean over "
        "seeds (smallest to largest) of the return of 256 episodes of 100 steps, itself the "
        "mean over agents. Both libraries' final policies are evaluated by the same lines on plain VMAS, "
        "acting by the distribution's mean and by sampled actions. `python "
        "tests/benchmarks/compare_learning.py` measures it anew (about an hour).\n\n"
        + table(columns, rows)
        + provenance(record)
    )


def environments():
    record = load("environments")
    rows = [
        [
            row["environment"],
            row["copies"],
            f"{row['per second']['raw']:,.0f}",
            f"{row['per second']['gradlab']:,.0f}",
            f"{row['ratio']:.2f}",
        ]
        for row in record["rows"]
    ]
    columns = ("environment", "copies", "its own stepping", "through gradlab", "ratio")
    return (
        "## Environments\n\n"
        "Steps per second of one copy (each moves all agents) with random actions, drawn beforehand, one torch "
        "thread: the simulator as its own documentation steps it, with finished episodes reset, against the "
        "adapter that trainings use. They took turns in one process; medians.\n\n"
        + table(columns, rows)
        + provenance(record)
    )


def dashboard():
    record = load("dashboard")
    found = record["rows"]
    rows = []

    def seconds(numbers):
        return ", ".join(f"{number:.2f} s" for number in numbers)

    for form, words in (("html", "as a page"), ("served", "served")):
        of, limits = found[form], found["limits"][form]
        if "megabytes" in of:
            rows.append((words, "size", f"{of['megabytes']:.1f} MB", f"{limits['megabytes']} MB"))
            rows.append((words, "to be written", seconds([of["seconds to write"]]), ""))
        for name in ("first paint", "interactive"):
            limit = limits.get(f"seconds to {name}")
            shown = seconds(of[f"seconds to {name}"])
            what = "words and controls seen" if name == "first paint" else "figures drawn"
            rows.append((words, what, shown, f"{limit} s" if limit else ""))
        for tab, times in of["slider step, ms"].items():
            cell = f"{times['median']:.0f} ms (at most {times['largest']:.0f})"
            limit = f"{limits['slider step, ms']} ms"
            rows.append((words, f"a step of the slider, {tab}", cell, limit))
    of, limits = found["served"], found["limits"]["served"]
    rows.append((
        "served",
        "200 runs listed",
        seconds(of["seconds to list 200 runs"]),
        f"{limits['seconds to list 200 runs']} s",
    ))
    drawn = of["seconds from record to drawn"]
    rows.append((
        "served",
        "from record to figure",
        f"{drawn['median']:.2f} s (at most {drawn['largest']:.2f})",
        f"{limits['seconds from record to drawn']} s",
    ))
    columns = ("form", "what", "measured", "aim")
    return (
        f"## Dashboard\n\nA run of {found['agents']} agents, {found['updates']:,} diagnosed updates, "
        "actor and critic, four layers, in headless Chromium without a graphics card. Openings one "
        "after the other, of which the first finds no compiled scripts; a step of the slider lasts "
        "until all panels in sight are drawn, medians of 40 steps.\n\n"
        + table(columns, rows)
        + provenance(record)
    )


def soak():
    record = load("soak")
    found, limits = record["rows"], record["rows"]["limits"]
    rows = []
    for name in ("trainer", "server"):
        memory = found["resident MiB"][name]
        words = f"{memory['halfway']:.0f} MiB halfway, {memory['end']:.0f} MiB at the end"
        rows.append((f"resident memory of the {name}", words, ""))
        slope = f"{memory['per 100,000 updates']:+.0f} MiB per 100,000 updates"
        limit = f"{limits['MiB per 100,000 updates']} MiB"
        rows.append((f"its slope over the second half, {name}", slope, limit))
    size = found["bytes per update"]
    for half in ("first", "second"):
        cell = f"{size[f'arrays, {half} half']:,.0f} bytes"
        rows.append((f"numbers of an update, {half} half of the updates", cell, "the same"))
    rows.append(("records.sqlite for each update", f"{size['file']:,.0f} bytes", ""))
    opened = {"open_run": "`open_run`", "dashboard's first answer": "the dashboard's first answer"}
    further = {
        "gradlab conflict": "`gradlab conflict`, whole process",
        "dashboard drawn in a browser": "the dashboard drawn in a browser that is started",
    }
    anew = found.get("opened anew")
    for when, seconds in {"then": found["seconds"], "anew": anew and anew["seconds"]}.items():
        for name, what in (opened | further).items() if seconds else ():
            limit = f"{limits['seconds to open']} s" if name in opened else ""
            rows.append((f"{when}: {what}", f"{seconds[name]:.2f} s", limit))
    repeated = anew and (
        f" *Anew*: opened later, a run of {anew['recorded']:,} recorded updates that were repeated "
        f"until there were {anew['updates']:,}."
    )
    return (
        f"## A long run\n\n{found['updates']:,} updates of a small game in {found['minutes']:.0f} "
        "minutes, each diagnosed in full, its served dashboard followed from beginning to end by what "
        "asks as an open page does: it was told of something new "
        f"{found['followed']['pages']:,} times, waited {found['followed']['slowest answer, s']:.2f} s "
        f"at most, and had the last update when the training had stopped.{repeated or ''}\n\n"
        + table(("what", "measured", "aim"), rows)
        + provenance(record)
    )


def browsers():
    record = load("browsers")
    found = record["rows"]
    slowed, answered = found["slowed by, %"], found["answered"]
    watched, alone = (
        [turn for turn in found["turns"] if turn["readers"] is looked_at]
        for looked_at in (True, False)
    )
    low, high = slowed["interval"]

    def quartiles(name):
        cuts = quantiles(slowed[name], n=4)
        return cuts[0], cuts[2]

    rows = [
        (
            "a training is slowed by, median of the pairs",
            f"{slowed['median']:+.1f} % ({low:+.1f} to {high:+.1f})",
            f"{found['limits']['slowed by, %']} %",
        ),
        *(
            (f"half of the pairs, {what}", "{:+.1f} to {:+.1f} %".format(*quartiles(name)), "")
            for what, name in (
                ("time of an update", "pairs"),
                ("the trainer's CPU for an update", "CPU of the trainer, pairs"),
            )
        ),
        ("requests, all answered", f"{answered['requests']:,}", ""),
    ]
    for name, turns, of in (
        ("trainer, alone", alone, "trainer"),
        ("trainer, watched", watched, "trainer"),
        ("server, watched", watched, "server"),
        ("the readers themselves", watched, "readers"),
    ):
        used = median(turn["CPU"][of] for turn in turns)
        rows.append((f"cores in use: {name}", f"{used:.2f}", ""))
    return (
        f"## Many readers\n\nA training of {found['updates']} updates on one thread, one update in "
        f"ten diagnosed, and the server of its run: with {found['readers']} readers and without, by "
        f"turns, {len(watched)} of each. A reader asks what an open page asks. They, the server and "
        "the trainer share two cores.\n\n"
        + table(("what", "measured", "aim"), rows)
        + provenance(record)
    )


def sweeps():
    record = load("sweeps")
    found = record["rows"]
    rows = [
        (
            found["cores"],
            found["runs"],
            f"{found['seconds, one after the other']:.0f}",
            f"{found['throughput']:.2f} (at least {found['throughput, lowest']:.2f})",
            "1.8",
        )
    ]
    columns = ("cores", "runs", "one after the other, s", "throughput with all cores", "aim")
    return (
        "## Sweeps\n\n`gradlab sweep` of HyperMARL on the Specialisation game with full diagnostics, "
        "one thread a run: as many runs at once as there are cores, against one after the other, "
        "each in a process of its own, by turns; ratio of the times of whole sweeps, median of "
        f"{found['rounds']} rounds.\n\n" + table(columns, rows) + provenance(record)
    )


def nights():
    record = load("nights")
    found = record["rows"]
    rows = [
        (
            f"`{of['study']}`",
            of["runs"],
            f"{of['frames'] / 1e6:,.1f}",
            f"{of['hours']:.1f} ({of['hours of']['updates']:.1f} of them updates)",
            found["limits"]["hours"],
        )
        for of in found["studies"]
    ]
    columns = ("study", "runs", "million frames", "hours", "a night")
    return (
        "## Studies overnight\n\nWhat `gradlab study NAME --budget standard` is to take, of studies that the "
        "repository has no such report of: each design cell was trained for a few updates, one seed, "
        f"{found['cores']} runs at once; the seconds of an update, diagnosed or not, times their number and that "
        "of the seeds, and what processes take beside updates.\n\n"
        + table(columns, rows)
        + provenance(record)
    )


def main():
    PAGE.write_text(
        (
            HEAD
            + engine()
            + psi()
            + scale()
            + statistics()
            + training()
            + schemes()
            + benchmarl()
            + throughput()
            + sweeps()
            + nights()
            + growth()
            + learning()
            + environments()
            + dashboard()
            + soak()
            + (
                browsers() if (RESULTS / "browsers.json").exists() else ""
            )  # it wants a quiet machine
        ).rstrip("\n")
        + "\n"
    )


if __name__ == "__main__":
    main()
