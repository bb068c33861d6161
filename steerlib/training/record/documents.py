"""Documents of any origin, cut into pieces of token ids that a model reads one by one."""

import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...errors import BadRecipe

Texts = str | os.PathLike[str] | Iterable[Any]
"""A .txt file, whose paragraphs are documents; a .jsonl file, one document a line; or documents themselves: texts, chats (lists
of messages), or rows of a dataset that hold one or the other. Of paths there may be several."""
COLUMNS = ("text", "messages")
ROOM = 10_000
"""Documents among which a stream is shuffled."""


class Piece(NamedTuple):
    """At most a context's length of one document, read without the rest of it."""

    document: int
    start: int
    """Position in the document of the first id; -1 where that is a token that every piece begins with."""
    ids: list[int]
    kept: list[bool]
    """Which tokens to record."""


def pieces(tokenizer: Any, texts: Texts, context: int, *, seed: int | None = 0) -> Iterator[Piece]:
    """Every document in pieces of at most `context` tokens; a piece with nothing to record is left out.

    Documents never share a piece, so that no text is read after an unrelated one. Where the tokenizer begins texts with a
    special token, every piece begins with it. Not kept are the first token of a piece, to which attention goes whatever it is,
    and special ones: the tokenizer's, and of a chat everything that the template adds to the messages. With a seed documents
    are shuffled: all of them where their number is known, else within a buffer.
    """
    begin = tokenizer("")["input_ids"][:1] if tokenizer.bos_token_id is not None else []
    begin = [int(token) for token in begin if token == tokenizer.bos_token_id]
    special, size = set(tokenizer.all_special_ids), context - len(begin)
    for number, document in enumerate(documents(texts, seed)):
        ids, said = _tokens(tokenizer, document)
        skip = len(begin) if ids[: len(begin)] == begin else 0  # a template may have begun with it already
        ids, said = ids[skip:], said[skip:]
        for start in range(0, len(ids), size):
            own = ids[start : start + size]
            kept = [s and i not in special for i, s in zip(own, said[start : start + size], strict=True)]
            kept = [False] * len(begin) + kept
            kept[0] = False
            if any(kept):
                yield Piece(number, start - len(begin), begin + own, kept)


def documents(texts: Texts, seed: int | None = None) -> Iterator[Any]:
    """Texts and chats, in the order they are numbered in."""
    if isinstance(texts, (str, os.PathLike)):
        texts = [Path(texts)]
    if isinstance(texts, Mapping):
        raise BadRecipe(f"expected documents, got a mapping of {', '.join(map(str, texts))}; choose one of these")
    if isinstance(texts, Sequence) and texts and all(isinstance(text, os.PathLike) for text in texts):
        texts = [document for path in texts for document in _read(Path(path))]
    for found in _shuffled(texts, seed):
        document = _cell(found) if isinstance(found, Mapping) else found
        if not isinstance(document, str) and not _is_chat(document):
            raise BadRecipe(f"expected texts, chats as lists of messages with role and content, or rows, got {document!r:.80}")
        yield document


def _read(path: Path) -> list[Any]:
    if path.suffix not in (".txt", ".jsonl") or not path.is_file():
        raise BadRecipe(f"expected a .txt or .jsonl file, found none at {path.name!r}; a single text is given as [text]")
    try:
        return parsed(path.read_text(encoding="utf-8"), path.name)
    except UnicodeDecodeError as error:
        raise BadRecipe(f"{path.name} is not UTF-8: {error}") from None


def parsed(text: str, name: str) -> list[Any]:
    """The documents of a file, by the end of its name."""
    if name.endswith(".txt"):
        return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    try:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise BadRecipe(f"{name} is not JSON lines: {error}") from None


def sources(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Number of documents and share of all characters, by the `source` and `licence` that lines of the files state."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for path in paths:
        for line in _read(path):
            row = line if isinstance(line, Mapping) else {}
            key = str(row.get("source", path.name)), str(row.get("licence", "not stated"))
            sizes.setdefault(key, []).append(len(str(_cell(row) if row else line)))
    whole = sum(map(sum, sizes.values()))
    return [
        {"source": source, "licence": licence, "documents": len(own), "share": round(sum(own) / whole, 4)}
        for (source, licence), own in sorted(sizes.items(), key=lambda item: (-sum(item[1]), item[0]))
    ]


def _shuffled(texts: Any, seed: int | None) -> Iterator[Any]:
    if seed is None:
        yield from texts
    elif hasattr(texts, "__len__") and hasattr(texts, "__getitem__"):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        yield from (texts[int(i)] for i in order)
    else:
        chance, waiting = random.Random(seed), []
        for text in texts:
            waiting.append(text)
            if len(waiting) > ROOM:
                i = chance.randrange(ROOM)
                waiting[i], waiting[-1] = waiting[-1], waiting[i]
                yield waiting.pop()
        chance.shuffle(waiting)
        yield from waiting


def _cell(row: Mapping[str, Any]) -> Any:
    found = [name for name in COLUMNS if name in row]
    if not found:
        raise BadRecipe(f"expected rows with a column text or messages, got {', '.join(row)}; give the texts themselves")
    return row[found[0]]


def _is_chat(document: Any) -> bool:
    return isinstance(document, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in document
    )


def _tokens(tokenizer: Any, document: Any) -> tuple[list[int], list[bool]]:
    """The ids of a document, and for each whether it is the document's own and not the chat template's."""
    if isinstance(document, str):
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        return ids, [True] * len(ids)
    if not tokenizer.is_fast:
        raise BadRecipe("chats need a fast tokenizer, which tells where tokens lie in the text; load it with use_fast=True")
    text, spans = rendered(tokenizer, document)
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    said = bytearray(len(text))
    for start, stop in spans:
        said[start:stop] = b"\1" * (stop - start)
    return found["input_ids"], [any(said[start:stop]) for start, stop in found["offset_mapping"]]


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """A chat as its template writes it, and the spans in it that are the messages' own."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    marked = [{**message, "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
    parts = re.split("\ue000(\\d+)\ue001", tokenizer.apply_chat_template(marked, tokenize=False))
    for said in ([m["content"] for m in messages], [m["content"].strip() for m in messages]):
        spans, built = [], ""
        for i, part in enumerate(parts):
            words = said[int(part)] if i % 2 else part
            spans += [(len(built), len(built) + len(words))] if i % 2 else []
            built += words
        if built == text:
            return text, spans
    raise BadRecipe("the chat template rewrites what messages say; render the chats yourself and give them as texts")
