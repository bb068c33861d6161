"""Ask a language model: chat prompts, answers in one batch, and how they are laid out for scoring; say how far a run is."""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm


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
    """A user's message as the model was trained to read it; for a model without a chat template, a line of plain text."""
    said = f"{prompt} {instruction}".strip()
    if getattr(tokenizer, "chat_template", None) is None:
        return begun(tokenizer, f"{said}\n")
    return tokenizer.apply_chat_template([{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True)


def begun(tokenizer: Any, text: str) -> str:
    """A text to be continued, behind the token that the tokenizer begins texts with, if it does."""
    begins = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return f"{tokenizer.bos_token}{text}" if begins else text


@torch.no_grad()
def complete(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Completions:
    """Answers to chat prompts, in one batch: greedy, or sampled at a temperature, leaving the global generator as it was."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    batch = {name: value.to(model.device) for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    used = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    with torch.random.fork_rng(used, enabled=temperature > 0):  # without naming devices it warns where there are several
        torch.manual_seed(seed) if temperature > 0 else None
        out = model.generate(**batch, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id, **how)
    start = batch["input_ids"].shape[1]
    new = out[:, start:]
    ended = (new == tokenizer.eos_token_id).long().cumsum(1)
    real = (ended - (new == tokenizer.eos_token_id).long()) == 0  # up to and including the first end
    mask = torch.cat((batch["attention_mask"].bool(), real), dim=1)
    return Completions([text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)], out, mask, start)


EVERY = 10.0
"""Seconds between lines of progress, where they go to a file."""
STAGE: ContextVar[str] = ContextVar("STAGE", default="")


class Lines:
    """What progress bars write, for output that is no terminal: now and then a line, without escape codes."""

    def __init__(self) -> None:
        self.last = -EVERY

    def write(self, text: str) -> None:
        line = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).strip()
        if line and time.monotonic() - self.last >= EVERY:
            self.last = time.monotonic()
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def flush(self) -> None:
        sys.stderr.flush()


LINES = Lines()
PLAIN = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {elapsed} so far, about {remaining} left"


def progress(items: Any, what: str, **options: Any) -> Any:
    """A progress bar over work that takes a while, with the stage it belongs to and the time left.

    `options` are tqdm's. Where errors go to a file, it writes lines there.
    """
    plain = {} if sys.stderr.isatty() or "ipykernel" in sys.modules else {"file": LINES, "bar_format": PLAIN}
    return tqdm(items, desc=f"{STAGE.get()}{what}", leave=False, **{**plain, **options})


@contextmanager
def stage(number: int, of: int, what: str) -> Iterator[None]:
    """Say which stage of how many a long run is in, before, after and on every progress bar of it."""
    begun, before = time.monotonic(), STAGE.set(f"stage {number} of {of}, ")
    print(f"stage {number} of {of}: {what}", file=sys.stderr, flush=True)
    try:
        yield
        print(f"stage {number} of {of}: done in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    finally:
        STAGE.reset(before)
