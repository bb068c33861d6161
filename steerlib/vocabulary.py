"""Words as a language model has them: which tokens are a word, and which change of the logits makes it likelier."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import UnknownConcept, UnsupportedTarget

DEPTH = 0.5
"""The site of a word, as a share of the blocks. Of seven layers of SmolLM2-135M, each at the amount that changes ordinary text
by 0.3 nats per token, this one moved answers most towards six random words without repeating these; layer 22 repeated them."""
NEAR = 20
"""A plural counts as a form of a word if the word's row in the unembedding has it among so many nearest."""


def forms(tokenizer: Any, word: str, rows: Float[Tensor, "V D"]) -> list[int]:
    """Tokens that are a word: as it is given, capitalised, and its plurals; empty where it is several tokens.

    Each with a space before it; without one where none has one. A token counts if decoding gives the form back, and a plural if
    the word's row in the unembedding has it among the `NEAR` nearest: "news" is none of "new".
    """
    word = word.strip()
    for space in (" ", ""):
        own = [i for form in dict.fromkeys((word, _capital(word))) if (i := _token(tokenizer, space, form)) is not None]
        if own:
            many = [form for plural in _plurals(word) for form in (plural, _capital(plural))]
            others = [i for form in dict.fromkeys(many) if (i := _token(tokenizer, space, form)) is not None]
            return list(dict.fromkeys(own + [i for i in others if _is_near(rows, own[0], i)]))
    return []


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def _plurals(word: str) -> list[str]:
    ending = [f"{word[:-1]}ies"] if word.endswith("y") else []
    return [*ending, f"{word}s", f"{word}es"] if len(word) > 2 and word.isalpha() else []


def _token(tokenizer: Any, space: str, form: str) -> int | None:
    """The one token of a form; None where it has several, or decoding gives another one."""
    ids = tokenizer(space + form, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 and form and tokenizer.decode(ids).strip() == form else None


@torch.no_grad()
def _is_near(rows: Float[Tensor, "V D"], word: int, other: int) -> bool:
    centred = rows.float() - rows.float().mean(0)
    closeness = centred @ centred[word] / centred.norm(dim=-1).clamp(min=1e-12)
    return int((closeness > closeness[other]).sum()) <= NEAR  # the word itself is one of them


@torch.no_grad()
def aim_of(tokenizer: Any, rows: Float[Tensor, "V D"], word: str) -> Float[Tensor, " D"]:
    """The change of the unembedding's input that makes a word likelier: the mean row of its forms less that of all tokens.

    Of several words with spaces between them, the mean of theirs. Raises `UnknownConcept` for a word of several tokens.
    """
    parts = word.split()
    tokens = [forms(tokenizer, part, rows) for part in parts]
    if not parts or not all(tokens):
        part = next((part for part, own in zip(parts, tokens, strict=True) if not own), word)
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(f" {part}", add_special_tokens=False)["input_ids"])
        raise UnknownConcept(
            f"expected a word that is one token of this model, got {part!r:.80}, which it reads as "
            f"{' '.join(map(repr, pieces)) or 'nothing'!s:.200}; take another word, or make the concept from examples"
        )
    return torch.stack([rows[own].float().mean(0) for own in tokens]).mean(0) - rows.float().mean(0)


def unembedding(model: Any) -> tuple[str, Any]:
    """The path of the module that makes logits of `y`, and the module; raises `UnsupportedTarget` where there is none."""
    get = getattr(model, "get_output_embeddings", lambda: None)
    head: Any = None if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else get()
    path = next((name for name, module in model.named_modules() if module is head), None)
    if path is None or not isinstance(getattr(head, "weight", None), Tensor) or head.weight.ndim != 2:
        raise UnsupportedTarget(
            f"expected a causal language model with one unembedding, got {type(model).__name__}; words are directions of a "
            "decoder that reads text alone"
        )
    if model.training:
        raise UnsupportedTarget("expected a model in evaluation mode, since dropout would change the gradients: model.eval()")
    return path, head


def site_for(host: Any) -> str:
    """Where words are moved: `DEPTH` of the way through the model."""
    return f"layers.{round(DEPTH * sum(name.removeprefix('layers.').isdigit() for name in host.sites()))}"
