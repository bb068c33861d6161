"""The stages of training, in order. Each writes a file, so a run that stops goes on where it was."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..bank import BaseModel, ConceptBank, SiteFacts
from ..concepts import Concept
from ..encoders import Directions
from ..errors import BadRecipe
from ..evaluation.text import Scorer, effect, progress, scorer_for, table
from ..hosts import host_for, load
from .activations import answers, tokens
from .calibrate import Candidate, Choice, Statistics, search, statistics
from .fit import METHODS, unit
from .recipe import ConceptRecipe, Recipe

EXAMPLES = 3


def train(target: Any, recipe: Recipe, *, tokenizer: Any = None, work: str | os.PathLike[str] | None = None) -> ConceptBank:
    """Make a bank for a model: record, fit, choose by measured effect, calibrate, evaluate.

    `target` is a language model, or None to load `recipe.source`. `work` keeps what each stage made; with the same
    recipe a second run goes on from there. Raises `BadRecipe` before any model is loaded if the recipe cannot work.
    """
    recipe.check()
    if unknown := sorted(set(recipe.methods) - set(METHODS)):
        raise BadRecipe(f"unknown methods {', '.join(unknown)}; known are {', '.join(METHODS)}")
    if target is None or tokenizer is None:
        loaded, tokenizer = load(recipe.source)
        target = loaded.to(best_device()) if target is None else target
    torch.manual_seed(recipe.seed)
    folder = _work_folder(work, recipe)
    scorers = {
        concept.name: scorer_for(concept.name, concept.scorer, recipe.folder / recipe.scoring) for concept in recipe.concepts
    }
    sites = [f"layers.{layer}" for layer in layers_to_try(target, recipe)]
    directions, facts, norms = _directions(target, tokenizer, recipe, sites, folder)
    choices = {
        concept.name: _remembered(
            folder and folder / "search" / f"{concept.name}.json",
            lambda concept=concept: search(
                target, tokenizer, concept, _candidates(concept, directions, norms), scorers[concept.name][0], recipe
            ).to_dict(),
        )
        for concept in progress(recipe.concepts, "choosing sites, methods and strengths")
    }
    chosen = {name: Choice.from_dict(values) for name, values in choices.items()}
    bank = _assemble(target, recipe, chosen, directions, facts, norms)
    effects = evaluate(target, tokenizer, bank, recipe, scorers=scorers, work=folder)
    if recipe.ship == "clearing":
        cleared = {name: chosen[name] for name in chosen if clears(effects, name)}
        bank = _assemble(target, recipe, cleared, directions, facts, norms)
    return with_effects(bank, recipe, effects)


def clears(records: Sequence[dict[str, Any]], name: str) -> bool:
    """Whether a concept clears every bar."""
    return all(next(record["passes"] for record in records if record["concept"] == name).values())


def best_device() -> torch.device:
    """An accelerator where there is one."""
    return (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device("cpu")


def layers_to_try(model: Any, recipe: Recipe) -> tuple[int, ...]:
    """The recipe's layers, or six spread over the middle of the model."""
    depth = sum(name.removeprefix("layers.").isdigit() for name in host_for(model).sites())
    layers = recipe.layers or tuple(sorted({round(depth * (0.2 + 0.1 * i)) for i in range(6)}))
    if not depth or max(layers) >= depth or min(layers) < 0:
        raise BadRecipe(f"expected layers from 0 to {depth - 1}, got {layers}")
    return layers


def evaluate(
    model: Any,
    tokenizer: Any,
    bank: ConceptBank,
    recipe: Recipe,
    *,
    scorers: dict[str, tuple[Scorer, str]] | None = None,
    work: Path | None = None,
    concepts: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Measure concepts of a bank on the recipe's test prompts; one record a concept, with examples."""
    known = {concept.name: concept for concept in recipe.concepts}
    records = []
    for name in progress(list(concepts or known), "measuring effects on prompts never used before"):
        concept, fact = known[name], bank[name]
        scorer = scorers[name] if scorers else scorer_for(name, concept.scorer, recipe.folder / recipe.scoring)

        def measure(concept: ConceptRecipe = concept, fact: Concept = fact, scorer: Any = scorer) -> dict[str, Any]:
            measured, texts = effect(
                model,
                tokenizer,
                bank,
                fact,
                scorer,
                concept.instruction,
                recipe.read_prompts(concept.split),
                new_tokens=recipe.new_tokens,
                seed=recipe.seed,
            )
            shown = [{"prompt": p, "unsteered": before, "steered": after} for p, before, after in texts[:EXAMPLES]]
            return {**measured.to_dict(), "passes": measured.passes, "examples": shown}

        records.append(_remembered(work and work / "effects" / f"{name}.json", measure))
    return records


def with_effects(bank: ConceptBank, recipe: Recipe, records: Sequence[dict[str, Any]]) -> ConceptBank:
    """The bank with measured effects and examples in its concepts and its card."""
    by_name = {record["concept"]: record for record in records}
    concepts = []
    for concept in bank.concepts.values():
        record = by_name[concept.name]
        kept = {k: v for k, v in record.items() if k not in ("examples", "passes", "concept", "site")}
        examples = tuple(f"{e['prompt']} → {e['steered']}" for e in record["examples"])
        concepts.append(Concept(**{**_fields(concept), "examples": examples, "effects": kept}))
    return bank.with_concepts(concepts, card=card(bank, recipe, records))


def _fields(concept: Concept) -> dict[str, Any]:
    return {name: getattr(concept, name) for name in concept.__dataclass_fields__}


# -- stages --------------------------------------------------------------------------------------------------


def _work_folder(work: str | os.PathLike[str] | None, recipe: Recipe) -> Path | None:
    """The folder of this very recipe, so that results of another are never mixed in."""
    if work is None:
        return None
    folder = Path(work) / recipe.digest[:16]
    (folder / "search").mkdir(parents=True, exist_ok=True)
    (folder / "effects").mkdir(exist_ok=True)
    return folder


def _remembered(path: Path | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier run wrote, or what `make` gives, written whole or not at all."""
    if path is not None and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    made = json.dumps(make(), indent=1, sort_keys=True) + "\n"
    if path is not None:
        path.with_suffix(".part").write_text(made, encoding="utf-8")
        path.with_suffix(".part").replace(path)
    return json.loads(made)  # as a run that goes on would read it


def _directions(
    model: Any, tokenizer: Any, recipe: Recipe, sites: Sequence[str], folder: Path | None
) -> tuple[dict[tuple[str, str, str], Tensor], dict[tuple[str, str, str], Statistics], dict[str, float]]:
    """Directions of length 1 by (concept, site, method), how they read on reference text, and each site's norm."""
    path = folder / "directions.safetensors" if folder else None
    if path is not None and path.is_file():
        stored = load_file(path)
    else:
        stored = _fitted(model, tokenizer, recipe, sites)
        if path is not None:
            save_file(stored, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
    directions, facts, norms = {}, {}, {}
    for key, tensor in stored.items():
        what, *rest = key.split("|")
        if what == "norm":
            norms[rest[0]] = float(tensor)
        else:
            concept, site, method = rest
            directions[concept, site, method] = tensor[:-4]
            facts[concept, site, method] = Statistics(*tensor[-4:].tolist())
    return directions, facts, norms


def _fitted(model: Any, tokenizer: Any, recipe: Recipe, sites: Sequence[str]) -> dict[str, Tensor]:
    """Each direction with its four statistics behind it, and the norms, under names that a file can hold."""
    reference = tokens(model, tokenizer, recipe.read_reference(), sites, what="reading reference text")
    stored = {f"norm|{site}": x.norm(dim=-1).median() for site, x in reference.items()}
    for concept in progress(recipe.concepts, "reading contrast pairs"):
        pairs = recipe.read_pairs(concept.name)
        positive = answers(model, tokenizer, [(p.prompt, p.positive) for p in pairs], sites, what=concept.name)
        negative = answers(model, tokenizer, [(p.prompt, p.negative) for p in pairs], sites, what=concept.name)
        for site in sites:
            for method in recipe.methods:
                direction = unit(METHODS[method](positive[site], negative[site]))
                facts = statistics(direction, reference[site])
                stored[f"direction|{concept.name}|{site}|{method}"] = torch.cat((direction, torch.tensor(facts)))
    return stored


def _candidates(
    concept: ConceptRecipe, directions: dict[tuple[str, str, str], Tensor], norms: dict[str, float]
) -> list[Candidate]:
    return [
        Candidate(site, method, direction, norms[site])
        for (name, site, method), direction in directions.items()
        if name == concept.name
    ]


def _assemble(
    model: Any,
    recipe: Recipe,
    choices: dict[str, Choice],
    directions: dict[tuple[str, str, str], Tensor],
    facts: dict[tuple[str, str, str], Statistics],
    norms: dict[str, float],
) -> ConceptBank:
    """The bank of what was chosen: one encoder a site, units and ranges in standard deviations."""
    labels = {concept.name: concept.label for concept in recipe.concepts}
    by_site: dict[str, list[str]] = {}
    for name, choice in choices.items():
        by_site.setdefault(choice.site, []).append(name)
    concepts, encoders = [], {}
    for site, names in sorted(by_site.items(), key=lambda item: int(item[0].partition(".")[2])):
        chosen = [(name, site, choices[name].method) for name in names]
        encoders[site] = Directions(
            torch.stack([directions[key] for key in chosen]), torch.tensor([facts[key].mean for key in chosen])
        )
        for index, key in enumerate(chosen):
            choice, fact = choices[key[0]], facts[key]
            in_units = norms[site] / fact.std
            concepts.append(
                Concept(
                    name=key[0],
                    encoder=site,
                    index=index,
                    unit=fact.std,
                    natural=(fact.low, fact.high),
                    range=(round(choice.low * in_units, 3), round(choice.high * in_units, 3)),
                    useful=round(choice.share * in_units, 3),
                    beyond=choice.beyond,
                    label=labels[key[0]],
                    source=f"contrast pairs, {choice.method}, chosen among {len(choice.trials)} settings",
                )
            )
    sites = {site: SiteFacts(width=encoders[site].decoder.shape[1], norm=round(norms[site], 4)) for site in encoders}
    order = list(choices)
    return ConceptBank(
        recipe.name,
        sorted(concepts, key=lambda concept: order.index(concept.name)),
        encoders,
        base=BaseModel.of(model, id=recipe.base),
        sites=sites,
        license=recipe.license,
        provenance={"recipe": recipe.name, "recipe_sha256": recipe.digest, "seed": recipe.seed},
    )


# -- the card ------------------------------------------------------------------------------------------------


def card(bank: ConceptBank, recipe: Recipe, records: Sequence[dict[str, Any]]) -> str:
    """The model card: what each concept means, what was measured, how to use it. Every number comes from `records`."""
    tried, records = records, [record for record in records if record["concept"] in bank.concepts]
    failing = [f"- **{r['concept']}** misses “{bar}”" for r in records for bar, held in r["passes"].items() if not held]
    again = [concept.name for concept in recipe.concepts if concept.split != "test"]
    left_out = [record for record in tried if record["concept"] not in bank.concepts]
    concepts = "\n".join(
        f"| {c.name} | {c.label} | {c.useful:+.2f} | {c.range[0]:+.2f} to {c.range[1]:+.2f} | {c.beyond} |"
        for c in bank.concepts.values()
        if c.useful is not None and c.range is not None
    )
    trust = "\n".join(f"- {r['concept']}: {r['scorer']}" for r in records)
    shown = "\n\n".join(
        f"**{r['concept']} {r['amount']:+.2f}** — {e['prompt']}\n\n"
        f"> unsteered: {_line(e['unsteered'])}\n>\n> steered: {_line(e['steered'])}"
        for r in records
        for e in r["examples"][:1]
    )
    first = next(iter(bank.concepts.values()))
    return CARD.format(
        license=recipe.license,
        base=recipe.base,
        name=recipe.name,
        description=recipe.description,
        count=len(bank),
        first=first.name,
        amount=first.useful,
        concepts=concepts,
        table=table(records),
        bars=f"{len(records) - len({f.split('**')[1] for f in failing})} of {len(records)} concepts clear all three bars.",
        failing="\n".join(failing),
        again=f" {', '.join(again)}: searched again after a first measurement, and reported on prompts new to it."
        if again
        else "",
        left_out=f"Tried and left out, because they miss a bar:\n\n{table(left_out)}" if left_out else "",
        trust=trust,
        prompts=recipe.test_prompts,
        tokens=recipe.new_tokens,
        shown=shown,
        recipe=f"concept_banks/recipes/{recipe.name}/recipe.toml",
    )


def _line(text: str) -> str:
    return " ".join(text.split())


CARD = """---
library_name: steerlib
base_model: {base}
license: {license}
tags: [steering, concepts]
---
# {name}

{description}

```python
import steerlib as sl

bank = sl.ConceptBank.from_pretrained("{name}")
with sl.steer(model, bank, {{"{first}": {amount:+.2f}}}):
    model.generate(**inputs, max_new_tokens=60)
```

## The {count} concepts

Amounts are in units of the concept: one standard deviation of its reading on reference text.

| concept | meaning | useful amount | safe range | beyond it |
|---|---|---|---|---|
{concepts}

## What was measured

On {prompts} prompts used for nothing else, {tokens} new tokens, greedy, each concept at its useful amount. *Prompted* is the
same model asked for the concept in words; *best random* is the best of five random directions of equal length at the same
site; nats per token are the text's negative log-likelihood under the unsteered model (for prompted text, with its own
prompt). {bars}{again}

{table}

{failing}{left_out}

Scores come from texts that no direction was made from:

{trust}

## As it comes out

{shown}

## Limits

The base weights are a 4-bit file, de-quantised: effects on the original weights were not measured. Directions act on every
token; a strong one costs fluency (last column of the table). Concepts are correlated: moving one can move others.

Made by `python scripts/train_bank.py {recipe}`.
"""
