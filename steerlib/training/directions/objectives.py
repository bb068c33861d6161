"""What learned levers are trained for, and the loop that trains them. The model's own weights never move.

`p` are next-token distributions of the model as it is, `p_v` those while a lever v acts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...steering.session import steer
from ...text import chat, complete, progress
from .levers import Lever, Task, bank_of

BATCH = 5
TOKENS = 20
"""New tokens of an answer to learn from."""


class Lesson(NamedTuple):
    """Requests with answers, padded on both sides; the answers are the last `answer` columns, with tokens where `real` is 1.

    `target` holds the log-probabilities to reproduce; without it the answer itself is to be predicted.
    """

    ids: Tensor
    mask: Tensor
    answer: int
    real: Float[Tensor, "rows answer"]
    target: Float[Tensor, "rows answer vocab"] | None = None


def told(task: Task) -> Lesson:
    """Answers of the model when the prompt asks for the concept, with the distributions it drew them from."""
    if "told" not in task.memo:
        asked = [chat(task.tokenizer, prompt) for prompt in task.prompts]
        with_words = [chat(task.tokenizer, prompt, task.instruction) for prompt in task.prompts]
        written = complete(task.model, task.tokenizer, with_words, new_tokens=TOKENS)
        new, real = written.ids[:, written.prompt :], written.mask[:, written.prompt :]
        target = _targets(task.model, written.ids, written.mask, new.shape[1])
        task.memo["told"] = Lesson(*_behind(task.tokenizer, asked, new, real), new.shape[1], real.float(), target)
    return task.memo["told"]


def shown(task: Task, side: Literal["positive", "negative"] = "positive") -> Lesson:
    """The answers of the contrast pairs that show the concept, or those that do not."""
    asked = [chat(task.tokenizer, pair.prompt) for pair in task.pairs]
    answers = [getattr(pair, side) for pair in task.pairs]
    batch = task.tokenizer(answers, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    new, real = batch["input_ids"][:, : 2 * TOKENS], batch["attention_mask"][:, : 2 * TOKENS].bool()
    ids, mask = _behind(task.tokenizer, asked, new.to(task.model.device), real.to(task.model.device))
    return Lesson(ids, mask, new.shape[1], real.float().to(task.model.device))


def untouched(task: Task) -> Lesson:
    """Ordinary text, and the distributions of the model as it is."""
    batch = task.tokenizer(list(task.texts), return_tensors="pt", truncation=True, max_length=32, padding=True)
    ids, mask = batch["input_ids"].to(task.model.device), batch["attention_mask"].bool().to(task.model.device)
    answer = ids.shape[1] - 1
    return Lesson(ids, mask, answer, mask[:, 1:].float(), _targets(task.model, ids, mask, answer))


def _behind(tokenizer: Any, asked: Sequence[str], new: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Requests with given answers behind them."""
    batch = tokenizer(list(asked), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    ids, mask = batch["input_ids"].to(new.device), batch["attention_mask"].bool().to(new.device)
    return torch.cat((ids, new), 1), torch.cat((mask, real), 1)


def _logits(model: Any, ids: Tensor, mask: Tensor, answer: int) -> Float[Tensor, "rows answer vocab"]:
    out = model(input_ids=ids, attention_mask=mask.long(), logits_to_keep=answer + 1, use_cache=False)
    return out.logits[:, :-1].float()


@torch.no_grad()
def _targets(model: Any, ids: Tensor, mask: Tensor, answer: int) -> Float[Tensor, "rows answer vocab"]:
    """Log-probabilities of the model as it is, in half precision."""
    batches = zip(ids.split(BATCH), mask.split(BATCH), strict=True)
    return torch.cat([_logits(model, *some, answer).log_softmax(-1).half() for some in batches])


def loss(model: Any, lesson: Lesson, rows: Tensor) -> Float[Tensor, ""]:
    """KL(target || p_v) in nats per token, or the cross-entropy of the answers, over some rows."""
    scores = _logits(model, lesson.ids[rows], lesson.mask[rows], lesson.answer).log_softmax(-1)
    if lesson.target is None:
        new = lesson.ids[rows, -lesson.answer :]
        each = -scores.gather(-1, new[..., None])[..., 0]
    else:
        target = lesson.target[rows].float()
        each = (target.exp() * (target - scores)).sum(-1)
    return (each * lesson.real[rows]).sum() / lesson.real[rows].sum()


def optimise(
    task: Task,
    start: Sequence[tuple[Tensor, float]],
    build: Callable[[Sequence[Tensor]], Lever],
    lesson: Lesson,
    *,
    steps: int,
    retain: Lesson | None = None,
    what: str,
) -> Lever:
    """Adam on the tensors a lever is built from, each at a rate of its own, relative to its length, that falls to 0.

    `retain` is a second lesson whose loss is added.
    """
    tensors = [tensor.clone().requires_grad_() for tensor, _ in start]
    lengths = [float(tensor.norm().clamp(min=1e-6)) / tensor.numel() ** 0.5 for tensor, _ in start]
    groups = [{"params": [t], "lr": rate * n} for t, (_, rate), n in zip(tensors, start, lengths, strict=True)]
    optimiser = torch.optim.Adam(groups)
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1 / steps, total_iters=steps - 1)
    generator = torch.Generator().manual_seed(task.seed)
    for _ in progress(range(steps), what):
        with frozen(task.model), steer(task.model, bank_of(build(tensors)), {"lever": 1.0}, allow_ood=True):
            total = sum(
                loss(task.model, some, torch.randperm(len(some.ids), generator=generator)[:BATCH])
                for some in (lesson, retain)
                if some is not None
            )
        optimiser.zero_grad()
        torch.as_tensor(total).backward()
        optimiser.step()
        falling.step()
    return build([tensor.detach() for tensor in tensors])


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Gradients flow through the model and are not kept for its weights."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
