"""Ask a language model, in a chat or on a page that it continues: requests, answers in one batch, and how they are laid out for
scoring; say how far a run is."""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from .errors import UnsupportedTarget

FRAME = """Question: What did you do with the old table?
Answer: I gave it to my neighbour, who needed one for her hall. It took two of us to carry it down the stairs, and it looks \
better there than it ever did here.

Question: {asked}
Answer:"""
"""A page that a model without a chat template continues: it ends where an answer is due, like the one before."""
ENDS = re.compile(r"\n\s*\n|\n\s*(?:Question|Answer):")
"""Where the answer is over, and the page goes on with the next question."""
BEGUN = FRAME.rpartition("\n")[2]


class Completions(NamedTuple):
    """What a model wrote, and how it is laid out for scoring."""

    texts: list[str]
    ids: Tensor
    """`[rows, prompt + new]`, padded on both sides; of an encoder-decoder those of its decoder, which starts from one token."""
    mask: Tensor
    """Real tokens."""
    prompt: int
    """Columns of the prompt."""
    read: dict[str, Tensor] = {}
    """`input_ids` and `attention_mask` of an encoder; nothing without one."""

    @property
    def new(self) -> tuple[Tensor, Tensor]:
        """Tokens of the answers, and which are real."""
        return self.ids[:, self.prompt :], self.mask[:, self.prompt :]

    def rows(self, chosen: Any) -> "Completions":
        """Some rows, without their texts."""
        read = {name: values[chosen] for name, values in self.read.items()}
        return Completions([], self.ids[chosen], self.mask[chosen], self.prompt, read)


def is_pair(model: Any) -> bool:
    """Whether an encoder reads requests and a decoder writes answers."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def chat(tokenizer: Any, prompt: Any, instruction: str = "", model: Any = None) -> str:
    """A user's message, or the messages of a chat so far, as the model was trained to read them. Without a chat template
    a message is what it is for an encoder (of `model`), else a question on a page, behind one with its answer."""
    if not isinstance(prompt, str):
        if getattr(tokenizer, "chat_template", None) is None:
            raise UnsupportedTarget("this tokenizer has no chat template to write messages with; give prompts as strings")
        return tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    said = f"{prompt} {instruction}".strip()
    if getattr(tokenizer, "chat_template", None) is not None:
        return tokenizer.apply_chat_template([{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True)
    return said if model is not None and is_pair(model) else begun(tokenizer, FRAME.format(asked=said))


def called(model: Any, tokenizer: Any) -> str:
    """What a model's requests and answers are, in words."""
    if getattr(tokenizer, "chat_template", None) is not None:
        return "a chat"
    return "an answer" if is_pair(model) else "a page of questions and answers"


def begun(tokenizer: Any, text: str) -> str:
    """A text to be continued, behind the token that the tokenizer begins texts with, if it does."""
    begins = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return f"{tokenizer.bos_token}{text}" if begins else text


def behind(asked: str, answer: str) -> str:
    """An answer as it stands behind what `chat` gave."""
    return f" {answer}" if asked.endswith(BEGUN) else answer


def tokens_of(
    model: Any, tokenizer: Any, asked: Sequence[str], new: tuple[Tensor, Tensor] | None = None, texts: Sequence[str] = ()
) -> Completions:
    """Requests, as `chat` gives them, with the tokens of answers behind them, if there are any; `new` as of `Completions`."""
    pair = is_pair(model)  # an encoder reads a whole text, with what the tokenizer puts around it
    side = "right" if pair else "left"
    batch = tokenizer(list(asked), return_tensors="pt", padding=True, padding_side=side, add_special_tokens=pair)
    ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    read = {"input_ids": ids, "attention_mask": mask} if pair else {}
    if pair:
        ids = ids.new_full((len(ids), 1), starts(model))
        mask = torch.ones_like(ids)
    whole = ids, mask.bool()
    if new is not None:
        whole = torch.cat((ids, new[0].to(ids)), 1), torch.cat((mask.bool(), new[1].to(mask.device)), 1)
    return Completions(list(texts), *whole, ids.shape[1], read)


def starts(model: Any) -> int:
    """The token that a decoder starts from."""
    given = [getattr(config, "decoder_start_token_id", None) for config in (model.generation_config, model.config)]
    found = next((token for token in (*given, model.generation_config.bos_token_id) if token is not None), None)
    if found is None:
        raise UnsupportedTarget(
            f"{type(model).__name__} does not say its decoder_start_token_id; set it in its generation_config"
        )
    return found


def logits(model: Any, done: Completions, **how: Any) -> Float[Tensor, "rows new vocab"]:
    """Of every token of the answers, under the model as it is now; `how` goes to the model."""
    mask = done.mask.long()
    if not done.read:
        keep = done.ids.shape[1] - done.prompt + 1
        return model(input_ids=done.ids, attention_mask=mask, logits_to_keep=keep, **how).logits[:, :-1]
    given = {"decoder_input_ids": done.ids[:, :-1], "decoder_attention_mask": mask[:, :-1]}
    return model(**done.read, **given, **how).logits[:, done.prompt - 1 :]


def at_once(model: Any, columns: int) -> int:
    """How many rows, 32 at most, can be scored at once: their logits take half a gigabyte."""
    config = model.config.get_text_config(decoder=True)
    return max(1, min(32, (1 << 27) // (columns * getattr(config, "vocab_size", 1))))


@torch.no_grad()
def complete(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Completions:
    """Answers to what `chat` gave, in one batch: greedy, or sampled at a temperature, leaving the global generator as it was.
    On a page of questions, what follows an answer does not count."""
    asked = tokens_of(model, tokenizer, prompts)
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    batch = {**asked.read, "num_beams": 1} if asked.read else {"input_ids": asked.ids, "attention_mask": asked.mask.long()}
    used = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    with torch.random.fork_rng(used, enabled=temperature > 0):  # without naming devices it warns where there are several
        torch.manual_seed(seed) if temperature > 0 else None
        out = model.generate(**batch, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id, **how)
    new = out[:, asked.prompt :]
    ended = (new == tokenizer.eos_token_id).long().cumsum(1)
    real = (ended - (new == tokenizer.eos_token_id).long()) == 0  # up to and including the first end
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    for row, text in enumerate(texts):
        if prompts[row].endswith(BEGUN) and (end := ENDS.search(text, len(text) - len(text.lstrip()))):
            texts[row] = text[: end.start()]
            real[row, _reaching(tokenizer, new[row], end.start()) :] = False
    mask = torch.cat((asked.mask, real), dim=1)
    return Completions([text.strip() for text in texts], out, mask, asked.prompt, asked.read)


def _reaching(tokenizer: Any, new: Tensor, length: int) -> int:
    """How many tokens, one at least, it takes to write so many characters."""
    written = (len(tokenizer.decode(new[:n], skip_special_tokens=True)) for n in range(1, len(new) + 1))
    return next((n for n, count in enumerate(written, 1) if count >= length), len(new))


def ordinary(model: Any, tokenizer: Any, texts: Sequence[str], length: int) -> Completions:
    """Text to be continued, of at most `length` tokens, from its second token on; of an encoder-decoder, what it writes when
    its encoder reads the text."""
    if is_pair(model):
        return complete(model, tokenizer, texts, new_tokens=length)
    how: dict[str, Any] = {"padding": True, "truncation": True, "max_length": length, "padding_side": "right"}
    batch = tokenizer(list(texts), return_tensors="pt", **how)
    ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    return Completions([], ids, mask.bool(), 1)


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
