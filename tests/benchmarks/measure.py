"""Timing several things side by side, their peak memory, and where it was done."""

import ctypes
import gc
import importlib.metadata
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from trainers.sweeps.local import cores

RESULTS = Path(__file__).parent / "results"


def side_by_side(functions, rounds):
    """Seconds of each function: median over rounds in which all run in turn."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def ratios(functions, rounds, base):
    """Median over rounds of each function's time relative to the base's in the same round."""
    rows = {name: [] for name in functions}
    if rounds > 2:  # else a round is long enough to need no warming up
        for function in functions.values():
            function()
    for _ in range(rounds):
        seconds = {}
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name] = time.perf_counter() - began
        for name in functions:
            rows[name].append((seconds[name], seconds[name] / seconds[base]))
    return {
        name: {
            "ms": 1e3 * statistics.median(s for s, _ in row),
            "ratio": statistics.median(r for _, r in row),
        }
        for name, row in rows.items()
    }


def peak_extra(function):
    """MiB that a call needs at its peak beyond what was resident before (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


def resident(process):
    """MiB that a process holds in memory now (Linux).

    Args:
        process: Its number.
    """
    return _status("VmRSS", process) / 1024


def _status(field, process="self"):
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {field}")


PACKAGES = ("torch", "numpy", "opacus", "backpack-for-pytorch", "vmas")


def write(name, rows, note=None, packages=PACKAGES):
    """Keep results with the versions they were made with."""
    record = {
        "versions": {p: importlib.metadata.version(p) for p in packages}
        | {"python": platform.python_version()},
        "machine": {
            "processor": _processor(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
        },
        "rows": rows,
    } | ({"note": note} if note else {})
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def _processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
