"""What steering costs in two checkouts of this repository, beside each other: before and after a change.

    git worktree add ../before COMMIT
    python scripts/bench_beside.py ../before [--only steering] [--rounds 7] [--out beside.json]

Each checkout's library runs in a process of its own, measured by this checkout's scripts. The two never run at the same time:
in every round one does each way once, then the other, and the next round begins with the other. For each measurement there are
three tables: the figures before, the figures after, and seconds after over seconds before, formed within a round. In the
third, `plain` and `plain again` run no code of the library: how far they are from 1 is the tolerance.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarks.measurement import SOURCE, Measurement, Table, report, settle, spread, turns
from tqdm.auto import tqdm

import steerlib as sl

Ask = Callable[..., Any]


def measurements(only: list[str]) -> dict[tuple[str, str], Measurement]:
    """By benchmark and name."""
    from benchmarks import diffusion, latents, steering

    known = {
        "steering": lambda: steering.measurements(SOURCE),
        "latents": lambda: latents.measurements(SOURCE),
        "diffusion": lambda: diffusion.measurements(),
    }
    return {(bench, name): m for bench in only or known for name, m in known[bench]().items()}


def work() -> None:
    """Prepare contests and run their ways, as lines of JSON ask for them."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    ways: dict[str, Callable[[], float]] = {}
    answer: Any
    for line in sys.stdin:
        match json.loads(line):
            case ["where"]:
                answer = str(Path(sl.__file__).resolve().parents[1])
            case ["prepare", bench, name, contest]:
                ways = measurements([bench])[bench, name].contests[contest]()
                settle()
                answer = list(ways)
            case ["run", way]:
                answer = ways[way]()
            case unknown:
                raise AssertionError(unknown)
        print(json.dumps(answer), file=answers, flush=True)


@contextmanager
def worker(checkout: Path) -> Iterator[Ask]:
    """A process that measures one checkout; what comes is a function that asks it and waits."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, "--work"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None and answers is not None

        def ask(*what: str) -> Any:
            print(json.dumps(what), file=asked, flush=True)
            if not (line := answers.readline()):
                raise SystemExit(f"the process that measured {checkout} ended; its error stands above")
            return json.loads(line)

        if (found := Path(ask("where"))) != checkout:
            raise SystemExit(f"expected the library of {checkout}, got that of {found}")
        yield ask
        asked.close()


def compared(key: tuple[str, str], contest: str, sides: dict[str, Ask], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by side and way, after one round that does not count."""
    names = [ask("prepare", *key, contest) for ask in sides.values()][0]
    seconds = {side: {name: [] for name in names} for side in sides}
    for name in names:
        for ask in sides.values():
            ask("run", name)
    for r, order in enumerate(tqdm(turns(names, rounds), desc=contest, total=rounds, leave=False)):
        for name in order:
            for side in list(sides)[:: -1 if r % 2 else 1]:
                seconds[side][name].append(sides[side]("run", name))
    return seconds


def tables(key: tuple[str, str], measured: Measurement, sides: dict[str, Ask], rounds: int) -> dict[str, Table]:
    """Before, after, and after over before."""
    found = {contest: compared(key, contest, sides, rounds * measured.times) for contest in measured.contests}
    result = {f"{side}: {measured.title}": measured.figures({c: by[side] for c, by in found.items()}) for side in sides}
    quotient: Table = {
        contest: {
            name: spread(b / a for a, b in zip(by["before"][name], by["after"][name], strict=True)) for name in by["after"]
        }
        for contest, by in found.items()
    }
    return {**result, f"{' '.join(key)}, seconds after / before: median (least–most)": quotient}


def main(
    before: Annotated[Path, typer.Argument(help="the other checkout")],
    after: Annotated[Path, typer.Option(help="the checkout it is compared with")] = Path(__file__).parent.parent,
    only: Annotated[list[str], typer.Option(help="steering, latents or diffusion; may be repeated (default: all)")] = [],  # noqa: B006
    part: Annotated[list[str], typer.Option(help="decoding, own, entering or drawing; may be repeated (default: all)")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="rounds of each comparison")] = 7,
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
) -> None:
    """Print what steering cost before and costs after."""
    figures: dict[str, Table] = {}
    with worker(before.resolve()) as old, worker(after.resolve()) as new:
        for key, measured in measurements(only).items():
            if not part or key[1] in part:
                figures |= tables(key, measured, {"before": old, "after": new}, rounds)
    report(figures, out, rounds=rounds)


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--work"] else typer.run(main)
