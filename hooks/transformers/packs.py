"""Texts that lie one after the other in one row: rows packed by `position_ids`, and those of `generate_batch()`."""

from typing import Any

import torch
from torch import Tensor

from steerlib.passes import TextPass

REFUSED = (
    "generate_batch() packs its requests into one row, where only tokens='all', slices of positions and one number for all "
    "requests can be answered; use generate() for the rest"
)


def packed(kwargs: dict[str, Any]) -> Tensor | None:
    """Positions `[rows, tokens]`, counted from where each text begins; None where no texts are packed. As in transformers, they
    may be where positions are given and neither mask nor cache."""
    ids = kwargs.get("position_ids")
    if ids is not None and ids.ndim == 3 and len(ids) == 4:  # of time, height and width too
        ids = ids[0]
    if ids is None or ids.ndim != 2:
        return None
    if _is_batched(kwargs):
        return ids
    if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return None
    columns = torch.arange(ids.shape[1], device=ids.device)
    begins = torch.where(ids[:, 1:] == ids[:, :-1] + 1, 0, columns[1:])
    return columns - torch.cat((torch.zeros_like(ids[:, :1]), begins), dim=1).cummax(dim=1).values


def packed_pass(tokens: Tensor, places: Tensor, kwargs: dict[str, Any]) -> TextPass:
    """A pass over packed texts, all of which is prompt unless `generate_batch()` runs it."""
    state = TextPass(tokens.shape[1], like=tokens)
    state.places = places
    if _is_batched(kwargs):
        state.section, state.refused = "mixed", REFUSED
    return state


def _is_batched(kwargs: dict[str, Any]) -> bool:
    return "write_index" in kwargs  # where its cache puts the tokens of this pass
