"""The card of a bank: what each concept means, what was measured, how to use it. Every number comes from the bank."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...bank.card import example, front, shown
from ...bank.concept_bank import ConceptBank
from ...bank.concepts import Concept
from ...bank.effects import MeasuredEffects
from ...evaluation.report import latents_table, markdown, missed, summary_table, table
from ..recipe import DirectionRecipe, PipelineEncoderRecipe, Recipe, TextEncoderRecipe

PICTURE = "effects.png"
CONTROLS = """*Ratio to prompting* is a joint score of concept, relevance, fluency, variety and language, 0 for the
unsteered model and 1 for the one of the recipe's prompts that has the best joint score on other requests
(`steerlib/evaluation/score.py` has the formula); *undefined* where asking in words does not surely help, so that the
scale has no sure length. *Greedy*: that of greedy answers. *As scored before*: by the score without variety and language,
by which banks were chosen before; it does not see a sentence that is said over and over. *Best random* is the best of
three random directions as long as the concept's own, at the same sites. *Repeated trigrams*: the share of word trigrams
that an answer has said before. Nats per token are the text's negative log-likelihood under the unsteered model that was
asked the plain request. KL is what steering does to next-token distributions of text that has nothing to do with it;
*gated* the same with `gate=sl.Gate("answering")`. Every method was given the best of its strengths that changes ordinary
text by at most 0.3 nats per token. *Anti-steerable* is the share of prompts on which a higher dose means less of the
concept."""


def card(bank: ConceptBank, recipe: DirectionRecipe, records: Sequence[MeasuredEffects], trust: str) -> str:
    """The card, in Markdown with model-card metadata."""
    kept = [record for record in records if record["concept"] in bank.concepts]
    left_out = [record for record in records if record["concept"] not in bank.concepts]
    levers = [concept for concept in bank.concepts.values() if concept.useful is not None]
    parts = [
        front(recipe.name, recipe.base, recipe.license, list(bank.concepts.values())).strip(),
        f"# {recipe.name}\n\n{described(recipe)}",
        PAGE if bank.provenance.get("chat") is False else "",
        example(recipe.name, recipe.source, f'{{"{first.name}": {first.useful:+.2f}}}') if (first := shown(levers)) else "",
        f"## The {f'{len(levers)} concepts' if len(levers) != 1 else 'concept'}\n\n{UNITS}\n\n{_concepts(levers)}",
        f"## What was measured\n\nOn {recipe.evaluation_prompts} requests used for nothing else, {recipe.seeds} answers to "
        f"each, {recipe.new_tokens} new tokens, each concept at its useful amount. {CONTROLS}\n\n{table(kept)}",
        f"Over all concepts:\n\n{summary_table(kept)}" if kept else "",
        f"![Dose and response of every concept; methods and controls beside prompting]({PICTURE})"
        if PICTURE in bank.pictures
        else "",
        missed(records),
        f"Tried and left out, because they miss a required bar:\n\n{table(left_out)}" if left_out else "",
        trust,
        _gates(bank),
        "## As it comes out\n\n" + "\n\n".join(_example(record) for record in kept),
        LIMITS.format(made=MADE),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


PAGE = """This model has no chat template. Requests were put to it as the last question of a page that it continues, or to its
encoder as they are (`chat` in `steerlib/text.py`; `steerlib steer … --chat` does so). Below, a chat means that."""
UNITS = "Amounts are in units of the concept: one standard deviation of its reading on reference text."
ROUGH = """**A rough bank**, made with `--quick`: few texts, sites and steps, to see whether the recipe works. Its figures are
of few samples; train it without `--quick` before you use it."""


def described(recipe: Recipe) -> str:
    """What the recipe says of the bank, and that it is rough if it is."""
    return "\n\n".join(filter(None, (recipe.description.strip(), ROUGH if recipe.is_quick else "")))


def latents_card(bank: ConceptBank, recipe: TextEncoderRecipe) -> str:
    """The card of a bank of sparse encoders, from what was measured of each."""
    first = next(iter([*_best(bank), *bank.concepts.values()]))
    sources = bank.provenance["corpus"]
    corpus = [(row["source"], row["licence"], f"{row['documents']:,}", f"{row['share']:.1%}") for row in sources]
    parts = [
        front(recipe.name, recipe.base, recipe.license, [], {"tags": ["sae"]}).strip(),
        f"# {recipe.name}\n\n{described(recipe)}",
        example(recipe.name, recipe.source, f'{{"{first.name}": sl.Set(1.0)}}'),
        '`bank.find("music")` finds latents by label and meaning.',
        f"## What was measured\n\nOn documents that no encoder was trained on.\n\n{latents_table(bank.provenance['quality'])}",
        f"## Latents that do what their contexts say\n\nThe {SHOWN} whose tokens gained most in log-probability:\n\n"
        f"{verified(bank, SHOWN)}"
        if _best(bank)
        else "",
        f"## What moves what\n\n{GRAPH}\n\n{graph_table(bank.provenance['graph'])}" if "graph" in bank.provenance else "",
        f"## What it was trained on\n\n{bank.provenance['tokens']:,} tokens, recorded in random order of documents, of:\n\n"
        + markdown("source | licence | documents | share of the text", corpus),
        LABELS,
        MADE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def pictures_card(bank: ConceptBank, recipe: PipelineEncoderRecipe) -> str:
    """The card of a bank of latents by noise level, from what was measured of each encoder."""
    told = [own for own in bank.concepts.values() if "correlation" in own.effects]  # others came with the graph
    best = sorted(told, key=lambda concept: -concept.effects["correlation"])[:SHOWN]
    rows = [(c.name, c.label, f"{c.effects['correlation']:.2f}", f"{c.effects['frequency']:.2%}") for c in best]
    parts = [
        front(bank.name, bank.base.id, bank.license, [], {"tags": ["sae", "diffusers"]}).strip(),
        f"# {bank.name}\n\n{described(recipe)}",
        f"## What was measured\n\nOn pictures that no encoder was trained on.\n\n{latents_table(bank.provenance['quality'])}",
        "## Latents and the words they go with most\n\n"
        + markdown("latent | word | correlation over pictures | fires on", rows),
        parts_section(bank),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


GRAPH = """Edges between latents of one encoder and the next, in `bank.graph`: proposed by ablating many latents at random, then
verified one by one, by ablating the parent alone on texts that nothing was fitted to. Only verified edges are stored. *Carried
on*: the effect lies within 20 % of the product of decoder and encoder row, the residual stream taking a concept along.
Forecasts are `bank.graph.forecast` against what ablating a parent alone does to its children on a third part of the texts;
*R²* is 1 − Σ(d − f)² / Σd² over the mean changes of edges, with its 95 % interval by bootstrap over edges, and over those of
single prompts, in units of the child. Over two levels or more the total effect of a latent is measured and stored; products of
the effects along paths stand beside it. What was not measured is not foretold."""


def graph_table(found: Mapping[str, Any]) -> str:
    """How a graph was found, what it foretells, and the controls, as Markdown."""
    said, control, null = found["recipe"], found["random model"], found["shuffled"]
    edges = {"this model": found, "random weights, encoders trained on them": control}
    rows = [_edges(name, own) for name, own in edges.items()]
    shuffled = f"| first two layers, of different texts | {null['proposed']:,} | | | {null['verified']} | | |"
    whole, apart = "more than carried on", "carried on"
    order = sorted(found["forecast"].items(), key=lambda item: (item[0] == apart, item[0] != whole, item[0]))
    foretold = [
        (name, str(row["edges"]), f"{row['sign']:.0%}", _between(row), f"{row['r2 by prompt']:.2f}")
        for name, row in order
        if row["edges"]
    ]
    parts = f"{said['contexts']:,} texts of {said['length']} tokens: half fitted, a third verifying, a sixth foretold. "
    parts += f"Ablated alone: up to {said['parents']} latents of this model, {said['controls']} of the random one."
    if sets := said.get("environments"):
        parts += (
            f" From {', '.join(sets)} in turn: {found['everywhere']:,} edges are there in each, with effects that differ no "
        )
        parts += f"more than by chance; of {found['differ']:,} they differ; of the others it is not known."
    head = "| proposed | not tested | refused | verified | of these carried on | negative"
    forecasts = markdown("foretold | edges | sign right | R² | R² by prompt", foretold)
    return "\n\n".join([f"{markdown(head, rows)}\n{shuffled}", forecasts, parts])


def _between(row: Mapping[str, Any]) -> str:
    low, high = row.get("r2 interval", (None, None))
    return f"{row['r2']:.2f}" + (f" ({low:.2f} to {high:.2f})" if low is not None else "")


def _edges(name: str, found: Mapping[str, Any]) -> list[str]:
    carried, negative = (sum(own[kind] for own in found["levels"].values()) for kind in ("carried", "negative"))
    counts = [f"{found[kind]:,}" for kind in ("proposed", "untested", "refused", "verified")]
    return [name, *counts, str(carried), str(negative)]


PARTS = """`bank.graph`: latents of one noise level that are parts of latents of the noisier one before (relation
`selection`), the sparsest account of readings of {first} pictures; and, of wholes that were moved alone in {second} others,
those whose parts surely followed (relation `compute`, 95 % interval, 5 % false among all that were tested). A picture's
reading is the mean over its tokens, and counts where it is high (two classes, Otsu). *Dealt*: as many parts of other wholes,
tested alike. *Shuffled*: parts that are found where each level is of other pictures."""


def parts_section(bank: ConceptBank) -> str:
    """Parts and wholes, and what moving wholes showed, as Markdown; nothing without a graph."""
    if (found := bank.provenance.get("graph")) is None:
        return ""
    rows = []
    for name, own in found["levels"].items():
        tests = [f"{some['verified']} of {some['verified'] + some['refused']}" for some in (own, own["dealt"])]
        rows.append(
            (name, *map(str, (own["parts"], own["shuffled"])), tests[0], str(own["positive"]), str(own["few"]), tests[1])
        )
    head = "wholes to parts | parts | shuffled | followed the whole | of these up | too few pictures to test | dealt"
    said = PARTS.format(first=found["first"], second=found["second"])
    return f"## Parts and wholes\n\n{said}\n\n{markdown(head, rows)}"


FOLLOWED = """`bank.graph`: each concept was moved alone, at its own amount, in the same {contexts} pictures, and a linear
reading of what the denoiser makes of a picture, learned from the pairs of each concept, told what it shows before and
after. An edge is a change of the share of pictures that show the other concept, by {least:.0%} or more at that amount, and
surely (95 % interval, 5 % false among all that were tested); below, by one unit. Two concepts that take each other away are
joined by no edge, and of edges in a circle the weakest is left out. *Foretold* are pictures from which no edge was made:
*R²* is 1 − Σ(d − f)² / Σd² over mean changes, with its 95 % interval."""


def followed_section(bank: ConceptBank) -> str:
    """What follows which concept of pictures, as Markdown; nothing without a graph."""
    if (found := bank.provenance.get("graph")) is None:
        return ""
    counts = [("concepts", found), ("random directions as long", found["random"])]
    names = ("moved", "tested", "verified", "circles")
    rows = [(name, *(str(own[what]) for what in names), str(len(own["excluding"]))) for name, own in counts]
    told = [
        (name, str(own["edges"]), f"{own['sign']:.0%}", _between(own))
        for name, own in found["forecast"].items()
        if own["edges"]
    ]
    by: dict[str, list[str]] = {}
    for edge in bank.graph.edges:
        by.setdefault(edge.src, []).append(f"{edge.dst} {edge.effect:+.2f} ({edge.tau_lo:+.2f} to {edge.tau_hi:+.2f})")
    unread = [f"{name} ({share:.0%} told right)" for name, share in found["told"].items() if share < found["least told"]]
    parts = [
        "## What follows what",
        FOLLOWED.format(contexts=found["contexts"], least=found["least"]),
        markdown("moved | how many | tested | edges | left out of circles | pairs that exclude each other", rows),
        markdown("foretold | edges | sign right | R²", told) if told else "",
        markdown("concept | what follows one unit of it", [(src, ", ".join(own)) for src, own in by.items()]) if by else "",
        f"Not read well enough to follow others: {', '.join(unread)}." if unread else "",
    ]
    return "\n\n".join(part for part in parts if part)


SHOWN = 30
"""Verified latents that the card shows."""


def _best(bank: ConceptBank) -> list[Concept]:
    """Verified latents, those first whose tokens gained most."""
    held = [concept for concept in bank.concepts.values() if concept.effects.get("verified", {}).get("holds")]
    return sorted(held, key=lambda concept: -concept.effects["verified"]["gain"])


def verified(bank: ConceptBank, count: int) -> str:
    """What moving the best of its latents did, as Markdown."""
    rows = []
    for concept in _best(bank)[:count]:
        found = concept.effects["verified"]
        tokens = ", ".join(f"“{token.strip() or '␣'}”" for token in found["tokens"])
        cells = [concept.name, tokens, f"{found['gain']:+.2f}", f"{found['others']:+.2f}", (concept.examples or ("",))[0]]
        rows.append([cell.replace("|", "\\|") for cell in cells])
    gains = "their gain when it is moved, nats | gain of other latents' tokens"
    return markdown(f"latent | tokens that follow it | {gains} | seen in", rows)


LABELS = """Labels of verified latents are tokens that follow them in held-out text; of others, tokens of their highest
activations, or those that the model's own head makes of them. No person has checked them."""


def _concepts(levers: Sequence[Concept]) -> str:
    rows = []
    for c in levers:
        low, high = c.range or (0.0, 0.0)
        amounts = f"{c.useful:+.2f}", f"{low:+.2f} to {high:+.2f}"
        rows.append((c.name, c.label, c.source, *amounts, c.beyond or "not seen"))
    return markdown("concept | meaning | made by | useful amount | safe range | beyond it", rows)


def _gates(bank: ConceptBank) -> str:
    found = [concept for concept in bank.concepts.values() if concept.present is not None and "precision" in concept.effects]
    if not found:
        return ""
    rows = [
        (c.name, c.label, f"{c.effects['precision']:.2f}", f"{c.effects['recall']:.2f}", str(c.effects["tokens"]))
        for c in found
    ]
    return (
        "## Gates\n\nReadings that say where something is present, by token: "
        '`Add(2.0, gate=sl.Gate("answering"))` acts in chats, on every turn; `tokens="generated"` acts on new tokens alone. '
        "Precision and recall are those of single tokens, on texts that nothing was made from.\n\n"
        + markdown("gate | opens on | precision | recall | tokens", rows)
    )


def _example(record: MeasuredEffects) -> str:
    """Greedy answers as they are, steered and beside them the plain one, and steered the other way."""
    low, parts = record.get("least"), []
    for e in record["examples"]:
        amounts = {"unsteered": "", "steered": f" {record['amount']:+.2f}", "reversed": f" {low:+.2f}" if low else ""}
        lines = [f"> {name}{amount}: {' '.join(e[name].split())}" for name, amount in amounts.items() if name in e]
        parts.append(f"*{e['prompt']}*\n\n" + "\n>\n".join(lines))
    return f"**{record['concept']}**\n\n" + "\n\n".join(parts)


MADE = """Made by `steerlib train` from the recipe in `recipe.jsonl`, by which `steerlib eval` measures it again."""
LIMITS = """## Limits

Effects belong to the weights they were measured on; a differently quantised copy gives a notice. A strong amount costs fluency
(nats per token in the table). Concepts are correlated: moving one can move others (specificity). No person and no language
model has judged these texts.

{made}"""
