"""`harvest`: activations of many texts at several sites, from text to shards on disk."""

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...errors import BadRecipe, SteeringWarning
from ...hosts import host_for
from ...text import progress
from .activations import Read, reading
from .documents import Piece, Texts, pieces
from .shards import HEADER, LABELS, Shards, Shelf

Precision = Literal["bf16", "fp16", "fp32"]
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FAST = {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith"), "fp32": ()}
"""By precision, capabilities of a CPU, as torch names them, any of which makes it faster than float32."""
SHARD_BYTES = 64 << 20
"""Most bytes of a shard."""


def harvest(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    sites: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    tokens: int,
    context: int = 128,
    batch: int = 2048,
    dtype: Precision = "bf16",
    compute: Precision | None = None,
    seed: int | None = 0,
) -> Shards:
    """Record activations of texts at several sites. A run that was stopped or gets more `tokens` goes on after its last shard.

    Args:
        texts: Files, texts, chats or rows; see `pieces`, which cuts them to `context` tokens, each piece read by itself.
        tokens: How many to record; it warns where the texts have fewer.
        batch: Most tokens of a pass, which ends at the deepest site.
        dtype: On disk; passes compute in `compute`, by default `dtype` where the machine is fast at it, else as the model does.
        seed: Of the order of the documents; None: as they come.

    Raises `BadRecipe` for settings that cannot work, or that are not those that `folder` was recorded with.
    """
    _check(model, sites, {"tokens": tokens, "context": context, "batch": batch})
    compute = compute or (dtype if is_fast(model.device, dtype) else None)
    with reading(model, sites, compute and PRECISIONS[compute]) as read:
        recorder = Recorder(read, sites, model.device, PRECISIONS[dtype], batch)
        rows = recorder.rows_in(SHARD_BYTES, context)
        computed = str(PRECISIONS[compute] if compute else model.dtype)
        settings = {"sites": recorder.widths, "dtype": dtype, "compute": computed, "model": identity(model)}
        shelf = Shelf(Path(folder), settings | {"context": context, "batch": batch, "seed": seed, "rows": rows})
        _fill(shelf, _groups(pieces(tokenizer, texts, context, seed=seed), rows, tokens), recorder, tokens)
    if shelf.rows < tokens:
        warnings.warn(f"recorded {shelf.rows} of {tokens} tokens: the texts ran out", SteeringWarning, stacklevel=2)
    return Shards(folder)


def _check(model: Any, sites: Sequence[str], counts: dict[str, int]) -> None:
    if isinstance(sites, str) or not sites or len(set(sites)) < len(sites):
        raise BadRecipe(f"expected a list of sites, each once, got {sites!r}")
    if bad := {name: count for name, count in counts.items() if count < (2 if name == "context" else 1)}:
        raise BadRecipe(f"expected positive numbers, and a context of two tokens or more, got {bad}")
    if model.training:
        raise BadRecipe("expected a model in evaluation mode, got one that trains; call model.eval() first")


def is_fast(device: torch.device, precision: Precision) -> bool:
    """Whether a device computes faster in a precision than in float32."""
    if device.type == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()
        return any(able.get(name, False) for name in FAST[precision])
    if device.type == "cuda" and precision == "bf16":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return precision != "fp32"


def identity(model: Any) -> dict[str, Any]:
    """Architecture and weights, so that a folder is not continued with another model."""
    host = host_for(model)
    return {**host.fingerprint(), "weights": host.weights_digest()}


def _fill(shelf: Shelf, groups: Iterable[list[Piece]], recorder: "Recorder", tokens: int) -> None:
    """Make the shards that are not there yet."""
    if shelf.rows > tokens:
        raise BadRecipe(f"{shelf.folder.name} holds {shelf.rows} tokens, got tokens={tokens}; ask for as many or more")
    with progress(None, "recording", total=tokens, unit=" tokens", unit_scale=True) as bar:
        for number, group in enumerate(groups):
            labels, source = _labels(group), _digest(group)
            count = len(labels["documents"])
            if shelf.has(number, source):
                bar.update(count)
            else:
                shelf.put(source, {**labels, **recorder.activations(group, count, bar)})
    if not shelf.rows:
        raise BadRecipe(f"expected something to record, got none of {tokens} tokens; give more texts")


def _groups(cut: Iterable[Piece], rows: int, tokens: int) -> Iterator[list[Piece]]:
    """Pieces of one shard each, with at most `rows` tokens to record, `tokens` in all."""
    group: list[Piece] = []
    held = 0
    for piece in cut:
        kept = [k and c <= tokens for k, c in zip(piece.kept, accumulate(piece.kept), strict=True)]
        count = sum(kept)
        if held + count > rows:
            yield group
            group, held = [], 0
        group.append(piece._replace(kept=kept))
        held, tokens = held + count, tokens - count
        if not tokens:
            break
    if group:
        yield group


def _labels(group: Sequence[Piece]) -> dict[str, Tensor]:
    """Document, position in it, and id of every token to record."""
    found = [(p.document, p.start + i, p.ids[i]) for p in group for i, kept in enumerate(p.kept) if kept]
    columns = torch.tensor(found, dtype=torch.int32).unbind(1)
    return dict(zip(LABELS, columns, strict=True))


def _digest(group: Sequence[Piece]) -> str:
    sha = hashlib.sha256()
    for piece in group:
        sha.update(
            np.array([piece.document, piece.start, len(piece.ids), *piece.ids], dtype="<i8").tobytes() + bytes(piece.kept)
        )
    return sha.hexdigest()


def _passes(group: Sequence[Piece], batch: int) -> Iterator[list[int]]:
    """Pieces that are read together, by number: of like length, at most `batch` tokens with pads."""
    together: list[int] = []
    for i in sorted(range(len(group)), key=lambda i: len(group[i].ids)):
        if together and (len(together) + 1) * len(group[i].ids) > batch:
            yield together
            together = []
        together.append(i)
    yield together


class Recorder:
    """Reads pieces and keeps what is to be recorded of them, as `dtype`, in passes of at most `batch` tokens."""

    def __init__(self, read: Read, sites: Sequence[str], device: torch.device, dtype: torch.dtype, batch: int):
        self.read, self.device, self.dtype, self.batch = read, device, dtype, batch
        found = read(torch.zeros(1, 2, dtype=torch.long, device=device), None)
        self.widths = {site: found[site].shape[-1] for site in sites}

    def rows_in(self, shard_bytes: int, context: int) -> int:
        """Tokens that a shard has room for."""
        each = self.dtype.itemsize * sum(self.widths.values()) + 4 * len(LABELS)
        rows = (shard_bytes - HEADER) // each
        if rows < context:
            raise BadRecipe(
                f"expected room for {context} tokens of {each} bytes and a head of {HEADER} in a shard, "
                f"got {shard_bytes} bytes; give a shorter context, or fewer sites"
            )
        return rows

    def activations(self, group: Sequence[Piece], count: int, bar: Any) -> dict[str, Tensor]:
        """`[count, D]` by site, in the order of the pieces."""
        out = {site: torch.empty(count, width, dtype=self.dtype) for site, width in self.widths.items()}
        ends = list(accumulate(sum(piece.kept) for piece in group))
        for together in _passes(group, self.batch):
            ids, mask, kept = self._padded([group[i] for i in together])
            places = torch.cat([torch.arange(ends[i] - sum(group[i].kept), ends[i]) for i in together])
            for site, x in self.read(ids, None if mask.all() else mask.long()).items():
                rows = x[kept].to(self.dtype)
                if not rows.isfinite().all():
                    raise BadRecipe(
                        f"expected finite activations at {site!r}, got others in {rows.dtype}; record and compute in bf16 "
                        "or fp32"
                    )
                out[site][places] = rows.cpu()
            bar.update(len(places))
        return out

    def _padded(self, group: Sequence[Piece]) -> list[Tensor]:
        """Ids, which of them are real, and which to record, `[pieces, longest]` each."""
        ids, kept = [piece.ids for piece in group], [piece.kept for piece in group]
        real = [[True] * len(own) for own in ids]
        return [pad_sequence([*map(torch.tensor, rows)], batch_first=True).to(self.device) for rows in (ids, real, kept)]
