"""The card of a bank as the Hub reads it: metadata with what was measured, an example to copy, a table of concepts.

A card that its maker wrote keeps its words and its own metadata; a bank without one gets one made of what it holds.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CorruptBank
from .concepts import Concept, printable, signed

FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
THUMBNAIL = "thumbnails/{}.png"
"""Where a bank keeps the picture of a concept: what steering by it does."""
METRICS = {
    "score": "score of the concept",
    "ratio": "ratio to prompting",
    "specificity": "specificity",
    "kl": "KL on other text",
}


def front(name: str, base: str, license: str, concepts: Sequence[Concept], own: Mapping[str, Any] | None = None) -> str:
    """Model-card metadata, every measured effect in its `model-index`; `own` fields of the maker are kept beside ours."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="requests",
            dataset_name="requests used for nothing else",
            metric_type=f"{concept.name}: {key}",
            metric_name=f"{concept.name}, steered by its useful amount: {METRICS[key]}",
            metric_value=value,
        )
        for concept in concepts
        for key, value in _figures(concept).items()
    ]
    known = {"library_name": "steerlib", "base_model": base, "license": license, "model_name": name, "eval_results": results}
    ours = {key: value for key, value in known.items() if value}
    theirs = {key: value for key, value in (own or {}).items() if key not in (*ours, "tags", "model-index")}
    tags = ["steerlib", "steering", "concepts"]
    tags += [tag for tag in (own or {}).get("tags") or [] if tag not in tags]
    data = ModelCardData(**theirs, **ours, tags=tags)
    return f"---\n{data.to_yaml(line_break=chr(10)).strip()}\n---\n"


def _figures(concept: Concept) -> dict[str, float]:
    """What steering by the useful amount was measured to do, if it was."""
    found = concept.effects.get("conditions")
    steered = found.get("steered") if isinstance(found, dict) else None
    return {key: steered[key] for key in METRICS if type(steered.get(key)) is float} if isinstance(steered, dict) else {}


def example(name: str, base: str, edit: str) -> str:
    """Code that runs as it is, on a language model."""
    return (
        f'```python\nimport steerlib as sl\n\nmodel, tokenizer = sl.load("{base}")\n'
        f'bank = sl.ConceptBank.from_pretrained("{name}")\n'
        'inputs = tokenizer("Tell me about the place where you live.", return_tensors="pt")\n'
        f"with sl.steer(model, bank, {edit}):\n    output = model.generate(**inputs, max_new_tokens=60)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))\n```"
    )


def example_of_pictures(name: str, base: str, edit: str, prompt: Any) -> str:
    """The same on a pipeline that draws prompts, or labels of classes; without a `base` the bank carries it."""
    where = f'"{base}"' if base else 'str(bank.file("pipeline"))'
    said = json.dumps(prompt, ensure_ascii=False)
    return (
        f'```python\nimport steerlib as sl\n\nbank = sl.ConceptBank.from_pretrained("{name}")\npipe, _ = sl.load({where})\n'
        f'with sl.steer(pipe, bank, {edit}, branch="cond"):\n    picture = pipe({said}).images[0]\n```'
    )


def shown(levers: Sequence[Concept]) -> Concept | None:
    """The concept of a card's example: the first that adds the same on every token. What grows with a token's length is capped
    on the longest ones, with a notice."""
    return next((concept for concept in levers if not concept.match_norm), next(iter(levers), None))


def for_hub(card: str, name: str, repo: str, base: str, license: str, concepts: Sequence[Concept]) -> str:
    """A card with true metadata, whose example opens the bank by its name on the Hub."""
    found = FRONT.match(card)
    head = front(repo.rpartition("/")[2], base, license, concepts, _metadata(found[1]) if found else None)
    body = card[found.end() :] if found else card
    if body.strip():
        return head + body.replace(f'from_pretrained("{name}")', f'from_pretrained("{repo}")')
    levers = [concept for concept in concepts if concept.present is None]
    lines = [f"| {cell(c.name)} | {cell(c.label)} | {signed(c.useful)} | {signed(*c.range or ())} |" for c in levers[:100]]
    table = ["| concept | meaning | useful amount | safe range |\n|---|---|---|---|", *lines] if lines else []
    if unmeasured := [concept for concept in levers[:100] if concept.unmeasured]:
        table.append(
            f"\nWithout a range: not measured. `sl.calibrate(model, bank, [{unmeasured[0].name!r}], judge=…)` measures it."
        )
    edit = f"{{{first.name!r}: {first.useful or 1.0:+.2f}}}" if (first := shown(levers)) else '{"<encoder>/17": sl.Set(1.0)}'
    parts = [head, f"# {name}", example(repo, base or "<the model>", edit), "\n".join(table)]
    return "\n".join(f"{part}\n" for part in parts if part)


def _metadata(text: str) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CorruptBank(f"the metadata of the card is not YAML: {error}; mend the lines between --- in README.md") from None
    return found if isinstance(found, dict) else {}


def cell(text: str) -> str:
    """A text as it stands in the cell of a table."""
    return " ".join(printable(text).replace("|", "\\|").split())
