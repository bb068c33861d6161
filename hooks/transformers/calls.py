"""Where a pass of a transformers model stands, from the arguments of the modules that are called with its tokens."""

from typing import Any

import torch
from torch import Tensor

from steerlib.passes import TextPass, TracedPass

from ..modules import arguments, beside_text, traced_beside_text
from .generation import ROWS, RUNNING, cached
from .packs import packed, packed_pass

GIVEN = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
"""Arguments with tokens of text, `[rows, tokens, ...]`."""
PAIR = {name: f"decoder_{name}" for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")}
DECODER = (*PAIR, "past_key_values")
"""What a decoder is given, by its own names; the model that has an encoder too takes most of it under others."""


class Calls:
    """Reads where a pass stands off the calls of one model.

    Args:
        model: the model; encoder: path of its encoder, whose input is all prompt, or None.
        ends: what compiled code reads of `generate()`, made before anything is compiled.
    """

    def __init__(self, model: Any, encoder: str | None, ends: Tensor):
        self.model, self.encoder, self.ends = model, encoder, ends
        self.is_pair = bool(getattr(model.config, "is_encoder_decoder", False))
        self._names: dict[str, tuple[str, ...]] = {}

    def arguments(self, clock: str) -> tuple[str, ...]:
        """Names of what a clock's module takes, found before anything is compiled."""
        if (known := self._names.get(clock)) is None:
            names = arguments(self.model.get_submodule(clock))
            known = self._names[clock] = names if {*GIVEN} & {*names} else ()
        return known

    def _given(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        """The tokens in the call of a clock's module, `[B, length, ...]`, and its arguments by name; None where it is given
        none, as a tower is."""
        if not (names := self.arguments(clock)):
            return None, kwargs
        if len(args) > 1 or self.is_pair:  # by place, not by name
            kwargs = {**dict(zip(names[1:], args, strict=False)), **kwargs}
        if not clock and self.is_pair:  # beside encoder and decoder, what is given is the decoder's
            kwargs = {name: kwargs.get(PAIR.get(name, name)) for name in DECODER}
        if (tokens := kwargs.get("input_ids")) is None:
            tokens = next((value for name in GIVEN if (value := kwargs.get(name)) is not None), args[0] if args else None)
        return tokens, kwargs

    def state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> TextPass:
        tokens, kwargs = self._given(clock, args, kwargs)
        if tokens is None:
            return beside_text(args, kwargs)
        length, mask, call = tokens.shape[1], kwargs.get("attention_mask"), RUNNING.call
        if isinstance(mask, Tensor) and len(shape := mask.shape) == 2 and shape[1] >= length:
            start = shape[1] - length
        elif call is None and (places := packed(kwargs)) is not None:
            return packed_pass(tokens, places, kwargs)
        else:
            mask = start = None
        if call is None or call.model is not self.model:
            return TextPass(length, int(cached(kwargs)) if start is None else start, None, mask, like=tokens)
        if clock == self.encoder:
            return TextPass(length, start or 0, None, mask, None, call.encoded, tokens)
        return call.at(clock, tokens, length, start, mask, kwargs)

    def traced_state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> TracedPass:
        tokens, kwargs = self._given(clock, args, kwargs)
        if tokens is None:
            return traced_beside_text(args, kwargs)
        rows, length = tokens.shape[:2]
        mask, given, places = kwargs.get("attention_mask"), kwargs.get("position_ids"), packed(kwargs)
        real = mask[:, -length:].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if isinstance(mask, Tensor) and real is not None:
            positions = (mask.long().cumsum(-1) - 1)[:, -length:]
        elif places is not None:
            positions = places.expand(rows, -1)
        elif given is not None and given.ndim == 2:
            positions = given.expand(rows, -1)
        else:
            positions = (torch.arange(length, device=tokens.device) + cached(kwargs)).expand(rows, -1)
        ends = self.ends
        row = (torch.arange(rows, device=tokens.device) * ends[ROWS]) // rows
        steps = (positions - ends[row][:, None] + 1).clamp(min=0)
        if real is None and places is None and length > 1:  # left pads share a position with the first real token, the last
            real = torch.cat((positions[:, 1:] > positions[:, :-1], torch.ones_like(positions[:, :1]).bool()), dim=1)
        return TracedPass(positions, steps, real)
