"""The card of the scenes bank, and its pictures: every figure comes from the bank."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from scenes import measures, places
from scenes.effects import WINDOWS
from scenes.experiment import Experiment, every
from scenes.methods import Comparison
from steerlib.bank.card import front
from steerlib.bank.concept_bank import ConceptBank
from steerlib.bank.concepts import Concept
from steerlib.evaluation.pictures import grid
from steerlib.evaluation.report import latents_table
from steerlib.graph.page import THUMBNAIL

METHODS = ("prompt", "lever", "difference of means, one place", "one latent", "a few latents", "random latents",
           "random directions", "replaced where detected")  # fmt: skip
SHOWN = 3
"""Scenes in each cell of a picture."""
EXAMPLE = """```python
from diffusers import DiffusionPipeline
import steerlib as sl

bank = sl.ConceptBank.from_pretrained("scenes-32")
pipe = DiffusionPipeline.from_pretrained(bank.folder / "pipeline")
prompt = "a medium checked green triangle at the back right by day on sand under an azure sky lit from above"
with sl.steer(pipe, bank, {"blue": sl.Set(3.0), "stone": sl.Set(3.0)}, branch="cond"):
    pipe(prompt, guidance_scale=2.0, num_inference_steps=20).images[0]  # a blue one, on stone
```"""


def scene_card(bank: ConceptBank, description: str) -> str:
    """In Markdown, with model-card metadata."""
    found = bank.provenance
    parts = [
        front(bank.name, bank.base.id, bank.license, [], {"tags": ["sae", "diffusers"]}).strip(),
        f"# {bank.name}\n\n{description.strip()}",
        EXAMPLE,
        f"## The model\n\n{examined_line(bank)}",
        f"## The levers\n\n{LEVERS}\n\n{levers_table(levers(bank))}",
        f"## Beside other methods\n\n{COMPARED}\n\n{methods_table(found['methods'])}\n\n![Methods and factors](methods.png)",
        f"## What follows what\n\n{FOLLOWED}\n\n{followed_table(bank)}" if "graph" in found else "",
        f"{HELD}\n\n{holding_table(found['holding'])}" if found.get("holding") else "",
        f"{GUIDED}\n\n{guided_table(found['guided'])}" if found.get("guided") else "",
        f"{MEDIATED}\n\n{mediation_table(found['mediation'])}",
        f"{OFF}\n\n{off_table(found['off'])}",
        f"{LAWS}\n\n{laws_table(found['laws'])}",
        f"## When\n\n{WHEN}\n\n{windows_table(found['windows'])}\n\n![Strengths and windows](windows.png)",
        f"## Encoders\n\nOn pictures that no encoder was trained on.\n\n{latents_table(found['quality'])}",
        f"## Latents\n\n{LATENTS}\n\n{latents_of(bank)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


LEVERS = """*Effect* is the share of scenes (of objects, where the lever is one of objects) that show the value afterwards, of
scenes that could and did not; *kept* the share of all other factors, but those that follow, that read as before; *follow* the
share of followers that read as in the true counterfactual; *outside* the change of pixels where neither the scene nor its
counterfactual shows the factor, over that where one does; *realism* the sliced Wasserstein distance to true counterfactuals,
over that of the unsteered pictures. Edits were chosen on other scenes, and leave the prompt as it is."""
COMPARED = """One value of each factor, every method at the best of its doses on other scenes; in each cell effect / kept.
One latent is chosen on those scenes too, of the six most correlated with the value, one an encoder; and of their places one for
a difference of means. *Replaced where detected*: activations of a run with the other prompt, at one site."""
MEDIATED = """Through what a prompt acts: of the change of the picture that a caption makes by saying the value (*total*), the
part that is gone where the readings of some levers stay as they are without (total indirect effect; Pearl 2001):"""
FOLLOWED = """`bank.graph`: each lever was moved alone, at its own dose, in the same scenes, on captions that say everything.
Where the share of a value of another factor changes by 0.2 or more, and surely (95 % interval, 5 % false among all that were
tested), it follows the lever. *Right* has a true effect of the same sign; *due* are true effects of 0.2 or more, and
*recall* is the share of them found."""
HELD = """`do="hold"`: of all that follows a lever one factor is free, the others are held. *Cut* is how much of the others'
change is gone, *left* how much of the free factor's change there still is, over the lever alone at its own dose; the dose under
`hold` was chosen on other scenes. Beside it, random directions held in the same places."""
GUIDED = """A type of scene by latents of the flat sparse encoders, by its lever, and by its lever with its followers moved as
the graph foretells; each at its best dose on other scenes. Effect / kept / follow."""
OFF = """Share of activations, where the latent is set, further from the mean than 99.5 % of those that encoders
learned from (Mahalanobis distance):"""
LAWS = """Mean change of a picture's bytes by an edit of nothing (composition), by adding the lever, and by adding it and
taking it away again in a `steer` around (reversibility):"""
WHEN = """The effect of each lever, at its own dose, where it acts in one window of noise alone."""
LATENTS = """Latents that correlate with a cause by 0.25 or more over tokens are named after it. *Overlap* is the intersection
over union of where a latent fires and where the true mask shows the cause."""


def followed_table(bank: ConceptBank) -> str:
    """The graph beside the truth and its controls, and every edge, as Markdown."""
    found = bank.provenance["graph"]
    own, random = found["levers"], found["random directions"]
    lines = [
        "| moved | edges | right | precision | due | recall |\n|---|---|---|---|---|---|",
        f"| levers | {own['edges']} | {own['right']} | {own['precision']:.0%} | {own['due']} | {own['recall']:.0%} |",
        f"| random directions, in place of one lever a factor | {random['edges']} | {random['right']} | | | |",
        f"| as many edges dealt at random | | | {found['chance']:.0%} | | |",
        "",
        "| lever | change of share by one unit |\n|---|---|",
    ]
    by: dict[str, list[str]] = {}
    for edge in bank.graph.edges:
        by.setdefault(edge.src, []).append(f"{edge.dst} {edge.effect:+.2f} ({edge.tau_lo:+.2f} to {edge.tau_hi:+.2f})")
    lines += [f"| {src} | {', '.join(moved)} |" for src, moved in by.items()]
    wrong = ", ".join(own["wrong"]) or "none"
    return "\n".join([*lines, "", f"{found['scenes']} scenes. Not in the truth: {wrong}."])


def levers(bank: ConceptBank) -> list[Concept]:
    """Those of which an effect was measured."""
    return [concept for concept in bank.concepts.values() if "passes" in concept.effects]


def examined_line(bank: ConceptBank) -> str:
    """How often the unsteered model draws what captions ask for."""
    found = bank.provenance.get("examined")
    if not found:
        return "How often it draws what it is asked for was not measured."
    shares = ", ".join(f"{name} {share:.1%}" for name, share in found["as asked"].items())
    return f"Of {found['captions']:,} captions that it was never trained on, drawn as asked, unsteered: {shares}."


def by_factor(bank: ConceptBank) -> str:
    """What levers do, a line a factor, as Markdown."""
    lines = ["| factor | levers | effect: mean, least | kept: mean, least | clear both bars | realism |", "|" + "---|" * 6]
    for factor in places.LEVERS:
        own = [c.effects for c in levers(bank) if c.label.startswith(f"{factor}:")]
        if own:
            effect, kept = ([e[name] for e in own] for name in ("effectiveness", "preservation"))
            clear = sum(all(e["passes"].values()) for e in own)
            lines.append(
                f"| {factor} | {len(own)} | {np.mean(effect):.2f}, {min(effect):.2f} | {np.mean(kept):.3f}, {min(kept):.3f} "
                f"| {clear} | {np.mean([e['realism'] for e in own]):.2f} |"
            )
    return "\n".join(lines)


def off_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Share of activations off their natural range, by way and factor."""
    ways = list(next(iter(found.values())))
    lines = ["| | " + " | ".join(found) + " | mean |", "|" + "---|" * (len(found) + 2)]
    for way in ways:
        shares = [factor[way] for factor in found.values()]
        lines.append(f"| {way} | " + " | ".join(f"{share:.1%}" for share in shares) + f" | **{np.mean(shares):.1%}** |")
    return "\n".join(lines)


def mediation_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Total effect of saying a value, and what goes through levers, by factor."""
    ways = list(next(iter(found.values())))
    lines = ["| | " + " | ".join(found) + " |", "|" + "---|" * (len(found) + 1)]
    lines.append("| total | " + " | ".join(f"{factor[ways[0]]['te']:.2f}" for factor in found.values()) + " |")
    return "\n".join([*lines, *(f"| {w} | " + " | ".join(f"{f[w]['tie']:.2f}" for f in found.values()) + " |" for w in ways)])


def holding_table(found: Sequence[Mapping[str, Any]]) -> str:
    """What holding leaves, a line a lever and free factor."""
    names = ("cut", "kept", "random cut", "random kept")
    lines = [
        "| lever | free | dose | cut | left | random: cut | left | clears both bars |\n|---|---|---|---|---|---|---|---|",
        *(
            f"| {line['lever']} | {line['free']} | {line['dose']:g} | "
            + " | ".join(f"{line[name]:.0%}" for name in names)
            + f" | {'yes' if line['passes'] else 'no'} |"
            for line in found
        ),
        "| **mean** | | | " + " | ".join(f"**{sum(line[n] for line in found) / len(found):.0%}**" for n in names)
        + f" | {sum(line['passes'] for line in found)} of {len(found)} |",
    ]  # fmt: skip
    return "\n".join([*lines, "", f"{found[0]['scenes']} scenes; bars: 80 % cut, 50 % left."])


def guided_table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Types of scenes as columns, ways to reach them as rows."""
    names = ("effectiveness", "preservation", "propagation")
    ways = list(next(iter(found.values())))
    lines = ["| | " + " | ".join(found) + " | mean |", "|" + "---|" * (len(found) + 2)]
    for way in ways:
        rows = [[scene[way][name] for name in names] for scene in found.values()]
        cells = [*rows, [sum(column) / len(column) for column in zip(*rows, strict=True)]]
        lines.append(f"| {way} | " + " | ".join(" / ".join(f"{value:.2f}" for value in cell) for cell in cells) + " |")
    return "\n".join(lines)


def laws_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """What edits of nothing leave, by factor."""
    names = list(next(iter(found.values())))
    lines = ["| | " + " | ".join(found) + " |", "|" + "---|" * (len(found) + 1)]
    return "\n".join([*lines, *(f"| {n} | " + " | ".join(f"{f[n]:.2f}" for f in found.values()) + " |" for n in names)])


def levers_table(found: Sequence[Concept]) -> str:
    """What every lever does, as Markdown."""
    lines = ["| lever | edit | effect | kept | least kept | follow | outside | realism |", "|" + "---|" * 8]
    for concept in found:
        e = concept.effects
        follow = f"{e['propagation']:.2f}" if "propagation" in e else ""
        lines.append(
            f"| {concept.label} | {e['edit']}({e['amount']:g}) | {e['effectiveness']:.2f} | {e['preservation']:.3f} "
            f"| {e['least']} | {follow} | {e['outside']:.2f} | {e['realism']:.2f} |"
        )
    return "\n".join(lines)


def methods_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Effect and what is kept, by method and factor; the last column is the mean effect."""
    names = [name for name in METHODS if any(name in methods for methods in found.values())]
    lines = ["| | " + " | ".join(found) + " | mean effect |", "|" + "---|" * (len(found) + 2)]
    for name in names:
        cells = [methods.get(name) for methods in found.values()]
        mean = np.mean([cell["effectiveness"] for cell in cells if cell])
        shown = [f"{cell['effectiveness']:.2f} / {cell['preservation']:.2f}" if cell else "" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + f" | **{mean:.2f}** |")
    return "\n".join(lines)


def windows_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Effect by factor and window."""
    lines = ["| | " + " | ".join(WINDOWS) + " |", "|" + "---|" * (len(WINDOWS) + 1)]
    for factor, windows in found.items():
        lines.append(f"| {factor} | " + " | ".join(f"{windows[name]['effectiveness']:.2f}" for name in WINDOWS) + " |")
    return "\n".join(lines)


def latents_of(bank: ConceptBank) -> str:
    """For each cause the latent that goes with it most."""
    best: dict[str, Concept] = {}
    for concept in bank.concepts.values():
        known = best.get(concept.label)
        if not concept.label or "correlation" not in concept.effects:
            continue
        if known is None or concept.effects["correlation"] > known.effects["correlation"]:
            best[concept.label] = concept
    lines = ["| cause | latent | correlation | overlap |", "|---|---|---|---|"]
    for label, concept in sorted(best.items()):
        e = concept.effects
        lines.append(f"| {label} | {concept.name} | {e['correlation']:.2f} | {e['overlap']:.2f} |")
    return "\n".join(lines)


# -- pictures ----------------------------------------------------------------------------------------------------


def methods_picture(compared: Mapping[str, Comparison]) -> bytes:
    """Rows of methods, columns of factors, in each cell the same few scenes."""
    rows = ["unsteered", *METHODS]
    blank = np.full((SHOWN, 32, 32, 3), 255, np.uint8)
    cells = {name: {c.label: c.pictures.get(name, blank)[:SHOWN] for c in compared.values()} for name in rows}
    return grid(cells)


def windows_picture(experiment: Experiment, cause: measures.Cause) -> bytes:
    """Rows of strengths, columns of windows."""
    case = experiment.case(cause, SHOWN, 6)
    cells: dict[str, dict[str, Any]] = {"unsteered": dict.fromkeys([*WINDOWS, "always"], case.before)}
    for share in (0.5, 1.0, 1.5):
        (edit,) = experiment.lever(cause, share).values()
        row = {name: {cause.value: replace(edit, when=window)} for name, window in WINDOWS.items()}
        row["always"] = {cause.value: edit}
        amount = share * experiment.bank[cause.value].effects["amount"]
        cells[f"{type(edit).__name__}({amount:g})"] = {name: experiment.draw(case.captions, e) for name, e in row.items()}
    return grid(cells, title=f"{cause.factor}: {cause.value}")


def thumbnails(experiment: Experiment) -> dict[str, bytes]:
    """For the page of the graph, of each lever in it: scenes without it above, with it below."""
    from PIL import Image

    ends = {name for edge in experiment.bank.graph.edges for name in (edge.src, edge.dst)}
    found = {}
    for cause in tqdm([cause for cause in every() if cause.value in ends], desc="thumbnails"):
        case = experiment.case(cause, 4, 11)
        after = experiment.draw(case.captions, experiment.lever(cause))
        rows = [np.concatenate([*pictures], axis=1) for pictures in (case.before, after)]
        file = BytesIO()
        Image.fromarray(np.concatenate(rows)).save(file, "PNG")
        found[THUMBNAIL.format(cause.value)] = file.getvalue()
    return found


def held(bank: ConceptBank) -> list[str]:
    """Factors of which every tested value reaches both bars."""
    by_factor: dict[str, list[Concept]] = {factor: [] for factor in places.LEVERS}
    for concept in levers(bank):
        by_factor[concept.label.partition(":")[0]].append(concept)
    return [factor for factor, own in by_factor.items() if own and all(all(c.effects["passes"].values()) for c in own)]
