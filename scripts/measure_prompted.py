"""Measure concepts that were made from captions alone, as judges see them, beside levers made from the truth:

python scripts/measure_prompted.py BANK [--value blue …]. Amounts are the bank's own; no judge chose them. `--pairs FOLDER`
writes the pairs of captions for a recipe instead.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from scenes import judges, prompts
from scenes.experiment import Experiment, every, randomised
from scenes.measures import Cause, Effect, effect

from steerlib import ConceptBank, load
from steerlib.evaluation.pictures import edit_of
from steerlib.training.store import remembered

CONDITIONS = ("captions alone", "rewritten prompt", "random direction", "another concept", "truth-made lever")


def measured(experiment: Experiment, made: ConceptBank, cause: Cause, n: int) -> dict[str, list[float]]:
    """Effect and share kept of one value under every condition, on captions that say another value."""
    case, own = experiment.case(cause, n, 2), made[cause.value]
    edits = {own.name: edit_of(own.effects["edit"], own.effects["amount"])}
    levers = [c for c in made.concepts.values() if c.present is None and c.name != own.name]
    other = next((c for c in levers if c.effects["edit"] == own.effects["edit"]), None)
    found = {
        "captions alone": experiment.effect(case, edits, made),
        "rewritten prompt": effect(
            cause, case.asked, case.before, experiment.draw(experiment.saying(case, 2)), experiment.judge
        ),
        "random direction": experiment.effect(case, edits, randomised(made, own, 0)),
    }
    if other is not None:
        stranger = {other.name: edit_of(other.effects["edit"], other.effects["amount"])}
        found["another concept"] = experiment.effect(case, stranger, made)
    found["truth-made lever"] = experiment.effect(case, experiment.lever(cause))
    return {name: _figures(one) for name, one in found.items()}


def _figures(one: Effect) -> list[float]:
    return [round(one.effectiveness, 3), round(one.preservation, 3)]


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """One line a value: effect / kept under every condition."""
    lines = [f"| value | {' | '.join(CONDITIONS)} |", "|---" * (len(CONDITIONS) + 1) + "|"]
    for value, own in found.items():
        cells = [" / ".join(f"{figure:.2f}" for figure in own[name]) if name in own else "" for name in CONDITIONS]
        lines.append(f"| {value} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    bank: Annotated[Path, typer.Argument(help="a bank made from captions; with --pairs, not read")],
    value: Annotated[list[str], typer.Option(help="only these; may be repeated")] = [],  # noqa: B006
    count: Annotated[int, typer.Option(help="captions, or pairs of them, for a value")] = 32,
    pairs: Annotated[Path | None, typer.Option(help="write pairs of captions there, and measure nothing")] = None,
    work: Annotated[Path, typer.Option(help="keeps what was measured")] = Path("out/prompted"),
    steps: Annotated[int, typer.Option(help="scheduler steps of a picture")] = 10,
) -> None:
    """Print the table."""
    causes = [cause for cause in every() if not value or cause.value in value]
    if pairs is not None:
        prompts.write(pairs, causes, count)
        return
    torch.set_num_threads(1)
    made, shipped = ConceptBank.from_pretrained(bank), ConceptBank.from_pretrained("scenes-32")
    pipe = load(str(shipped.file("pipeline")))[0].to(torch.bfloat16)
    experiment, found = Experiment(pipe, shipped, judges.load("scenes"), steps=steps), {}
    for cause in [cause for cause in causes if cause.value in made.concepts]:
        run: Any = lambda cause=cause: measured(experiment, made, cause, count)  # noqa: E731
        found[cause.value] = remembered(work / f"{cause.value}.json", run)
        print(json.dumps({cause.value: found[cause.value]}), flush=True)
    print(table(found))


if __name__ == "__main__":
    typer.run(main)
