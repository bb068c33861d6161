"""Measurements as tables and pictures; every figure comes from records that `steerlib eval` wrote."""

import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from ..errors import MissingExtra
from .score import ratios

Record = Mapping[str, Any]
UNSTEERED, PROMPTED, BASELINE, RANDOM = "unsteered", "prompted", "difference-of-means", "random direction"
SHOWN = {"steered": "chosen per concept", "steered, gated": "chosen, acting in chats only"}
UNDEFINED = "undefined"
"""In place of a ratio to prompting where prompting does not surely help: the scale would have no sure length."""
CONTROLS = ("no-op", "shuffled labels", "wrong concept", RANDOM)


def markdown(head: str, rows: Iterable[Sequence[str]]) -> str:
    """A table, from the names of its columns with `|` between them and from its rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {head} |", "|---" * len(head.split("|")) + "|", *lines])


def table(records: Sequence[Record]) -> str:
    """One line a concept, as Markdown. Greedy answers have columns where they were measured."""
    greedy = all("loops" in record for record in records)
    head = [
        "concept | made by | amount | score: unsteered | prompted | **steered** | best random | ratio to prompting",
        *["greedy | as scored before"] * greedy,
        "prompts moved",
        *["repeated trigrams, greedy: unsteered, prompted, **steered**"] * greedy,
        "nats/token: unsteered, prompted, **steered** | KL on unrelated text, gated | specificity | anti-steerable",
    ]
    return markdown(" | ".join(head), [_concept_line(record, greedy) for record in records])


def _concept_line(r: Record, greedy: bool) -> list[str]:
    t = r["conditions"]
    base, told, steered = (t[name] for name in (UNSTEERED, PROMPTED, "steered"))
    random = max(t[name]["score"] for name in t if name.startswith("random-"))
    gated = t.get("steered, gated", steered)["kl"]
    loops = [f"{r['loops'][name]:.2f}" for name in (UNSTEERED, PROMPTED, "steered")] if greedy else []
    return [
        *(r["concept"], r["method"], f"{r['amount']:+.2f}", f"{base['score']:.2f}", f"{told['score']:.2f}"),
        *(
            f"**{steered['score']:.2f}**",
            f"{random:.2f}",
            f"**{of(r['joint']) if greedy else format(steered['ratio'], '.2f')}**",
        ),
        *([of(r["greedy"]), of(r["before"])] if greedy else []),
        f"{r['moved']:.0%}",
        *(["{}, {}, **{}**".format(*loops)] if greedy else []),
        f"{base['nll']:.2f}, {told['nll']:.2f}, **{steered['nll']:.2f}**",
        *(f"{steered['kl']:.2f}, {gated:.2f}", f"{steered['specificity']:.2f}", f"{r['response']['anti_steerable']:.0%}"),
    ]


def of(totals: Mapping[str, Sequence[float]]) -> str:
    """The ratio of the steered to the prompted answers, from scores by prompt, as a card says it."""
    found = ratios({name: np.array(totals[name]) for name in (UNSTEERED, PROMPTED, "steered")})["steered"]
    return f"{found['ratio']:.2f}" if found else UNDEFINED


def summary(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """By condition, over the concepts that have it: ratio to prompting with its interval, and mean side effects.

    The random directions of a concept count together as one condition. `baseline` is difference of means on the same concepts.
    """
    names = dict.fromkeys(name for record in records for name in _joint(record))
    return {name: _over([record for record in records if name in _joint(record)], name) for name in names}


def _over(records: Sequence[Record], name: str) -> dict[str, float]:
    wanted = [n for n in dict.fromkeys((UNSTEERED, PROMPTED, BASELINE, name)) if all(n in _joint(r) for r in records)]
    found = ratios({n: np.concatenate([_joint(record)[n] for record in records]) for n in wanted})
    line = {**found[name], "concepts": len(records)}
    if found.get(BASELINE):
        line["baseline"] = found[BASELINE]["ratio"]
    for key in ("kl", "agreement", "specificity"):
        values = [_line(record, name)[key] for record in records if key in _line(record, name)]
        if values:
            line[key] = float(np.mean(values))
    return line


def _joint(record: Record) -> dict[str, np.ndarray]:
    """Joint scores by condition, the random directions as one."""
    groups: dict[str, list[Any]] = {}
    for name, values in record["joint"].items():
        groups.setdefault(_pooled(name), []).append(values)
    return {name: np.mean(values, axis=0) for name, values in groups.items()}


def _pooled(name: str) -> str:
    """What a condition counts as."""
    return RANDOM if name.startswith("random-") else name


def _line(record: Record, name: str) -> Mapping[str, float]:
    """Means of a condition, over those of its group for which all was measured."""
    group = [line for other, line in record["conditions"].items() if _pooled(other) == name]
    return {key: float(np.mean([line[key] for line in group if key in line])) for key in group[0]}


def summary_table(records: Sequence[Record]) -> str:
    """One line a condition, as Markdown: controls first, then methods from the weakest to the strongest."""
    found = summary(records)
    last = {UNSTEERED: -3, PROMPTED: -2, "steered, gated": 8, "steered": 9}
    order = sorted(found, key=lambda name: (last.get(name, -1 if name in CONTROLS else 0), found[name].get("ratio", 0)))
    rows = [_summary_line(f"**{SHOWN[name]}**" if name in SHOWN else name, found[name]) for name in order]
    head = "concepts | ratio to prompting (95 %) | difference of means on the same | specificity | KL on unrelated text"
    return markdown(f"| {head} | next-token agreement", rows)


def _summary_line(name: str, line: Mapping[str, float]) -> list[str]:
    interval = "" if name in (UNSTEERED, PROMPTED) else " ({low:.2f} to {high:.2f})"
    ratio = ("{ratio:.2f}" + interval).format(**line) if "ratio" in line else UNDEFINED
    keys = ("baseline", "specificity", "kl", "agreement")
    return [name, str(line["concepts"]), ratio, *(f"{line[key]:.2f}" if key in line else "–" for key in keys)]


def missed(records: Sequence[Mapping[str, Any]]) -> str:
    """Every bar that a concept does not clear, as a Markdown list."""
    lines = [
        f"- **{r['concept']}** misses “{bar}”" + ("" if kind == "also" else ", which a shipped concept has to clear")
        for r in records
        for kind in ("passes", "also")
        for bar, held in r[kind].items()
        if not held
    ]
    return "\n".join(["Bars that were missed:\n", *lines]) if lines else "Every concept clears every bar."


COLUMNS = {
    "kind": "kind",
    "latents": "latents",
    "explained": "explained variance",
    "control": "… of a random dictionary",
    "l0": "L0",
    "dead": "dead",
    "dense": "dense",
    "used": "dictionary in use",
    "recovered": "loss recovered",
    "control_recovered": "… by a random dictionary",
    "kl": "KL, nats/token",
    "stability": "found by another seed",
    "stability_control": "… by random directions",
    "moved": "latents moved",
    "verified": "… verified",
    "verified_random": "… random directions",
    "verified_swapped": "… with another's tokens",
}
"""What is measured of an encoder, as columns."""
KEPT = """Over {tokens} tokens. *Explained variance*: 1 minus the share of variance that the
reconstruction lacks. *L0*: latents that fire on a token. *Dead*: share that fires on none of these tokens; *dense*: on more
than a tenth. *Loss recovered*: of the cross-entropy lost when the site is replaced by its mean, the share that the
reconstruction keeps; *KL*: of next-token distributions with the reconstruction from those without. The control has as many
random directions and keeps as many latents on a token."""
STABLE = """*Found by another seed*: mean |cosine| of decoder rows with those of an encoder trained alike from another seed,
matched one to one, of latents that fire."""
MOVED = """*Verified*: of latents moved by twice as much as they usually fire, those that make the tokens which follow
them in held-out text likelier, by at least twice as many nats as the tokens of other latents on average, and by more than 95 %
of these. Beside it, how many random directions as long would have passed in their place, and how many with another's tokens."""
PROBED = """Texts told apart by logistic regression on the few latents, or channels of the activation, that go best with an
attribute, on texts held out; mean over {attributes}."""
BEST = """Latents that go with an attribute, and the correlation of their mean reading with it over texts with and without."""
PROBES = {"latents": "latents", "channels": "channels", "control": "a random dictionary"}


def latents_table(records: Mapping[str, Record]) -> str:
    """What was measured of encoders, by id, as Markdown: what they keep, and what their latents tell of attributes."""
    records = {id: records[id] for id in sorted(records, key=_in_depth)}
    known = [name for name in COLUMNS if any(name in record for record in records.values())]
    rows = [[id, *(_figure(record.get(name)) for name in known)] for id, record in records.items()]
    said = KEPT.format(tokens=" and ".join(sorted({str(record["tokens"]) for record in records.values()})))
    parts = [markdown(" | ".join(["encoder", *(COLUMNS[name] for name in known)]), rows)]
    parts.append(" ".join([said, *[STABLE] * ("stability" in known), *[MOVED] * ("moved" in known)]))
    probed = {id: record["probes"] for id, record in records.items() if "probes" in record}
    return "\n\n".join(parts + (_probes(probed) if probed else []))


def _in_depth(id: str) -> list[tuple[int, str]]:
    """Sorts `layers.7` before `layers.15`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", id)]


def _probes(probed: Mapping[str, Record]) -> list[str]:
    first = next(iter(probed.values()))
    attributes, sizes = sorted(first), sorted(next(iter(first.values()))["latents"], key=int)
    rows = []
    for id, found in probed.items():
        for side, shown in PROBES.items():
            rows.append([id, shown, *(_figure(np.mean([found[a][side][k] for a in attributes])) for k in sizes), ""])
        rows[-2][-1] = _figure(np.mean([found[a]["dense"] for a in attributes]))
    best = [[a, *(_best(found[a]["best"]) for found in probed.values())] for a in attributes]
    return [
        markdown(" | ".join(["encoder", "probe of", *(f"best {k}" for k in sizes), "all"]), rows),
        PROBED.format(attributes=", ".join(attributes)),
        markdown(" | ".join(["attribute", *probed]), best),
        BEST,
    ]


def _best(latents: Sequence[Sequence[float]]) -> str:
    return ", ".join(f"{i} ({score:.2f})" for i, score in latents)


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def picture(records: Sequence[Record]) -> bytes:
    """Dose–response of every concept, and methods beside prompting and controls, as one PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("pictures need matplotlib: pip install 'steerlib[eval]'") from None
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, record in enumerate(records):
        response, amount = record["response"], record["amount"]
        style = ("-", "--", ":")[k // 10 % 3]
        doses = [dose / amount for dose in response["doses"]]
        left.plot(doses, response["propensity"], style, color=f"C{k % 10}", marker=".", label=record["concept"])
    left.axhline(0, color="0.8", zorder=0)
    left.axvline(0, color="0.8", zorder=0)
    left.set(xlabel="dose (1 = useful amount)", ylabel="propensity, nats", title="Dose and response")
    left.legend(fontsize=8, ncols=2, frameon=False)
    found = {n: line for n, line in summary(records).items() if "ratio" in line and n not in (UNSTEERED, PROMPTED)}
    order = sorted(found, key=lambda name: found[name]["ratio"])
    middle = [found[name]["ratio"] for name in order]
    ends = np.array([[found[name]["low"], found[name]["high"]] for name in order])
    errors = np.abs(ends - np.array(middle)[:, None]).T if order else None
    colours = ["C3" if name in CONTROLS else "C2" if name in SHOWN else "C0" for name in order]
    counts = [f" ({found[n]['concepts']})" if found[n]["concepts"] < len(records) else "" for n in order]
    names = [SHOWN.get(name, name) + count for name, count in zip(order, counts, strict=True)]
    right.barh(names, middle, xerr=errors, color=colours, ecolor="0.3", height=0.7)
    right.axvline(1, color="0.3", linestyle="--")
    right.axvline(0, color="0.3", linewidth=0.8)
    right.set(
        xlabel="ratio to prompting (0: unsteered, 1: prompted), 95 % interval",
        title="Methods and controls (concepts, if not all)",
    )
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()
