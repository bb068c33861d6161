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
from ...text import Completions, behind, chat, complete, logits, ordinary, progress, tokens_of
from .levers import Lever, Task, bank_of

BATCH = 5
TOKENS = 20
"""New tokens of an answer to learn from."""


class Lesson(NamedTuple):
    """Requests with answers, whose tokens are to be predicted.

    `target` holds the log-probabilities to reproduce; without it the answers themselves are.
    """

    said: Completions
    target: Float[Tensor, "rows answer vocab"] | None = None


def told(task: Task) -> Lesson:
    """Answers of the model when the prompt asks for the concept, with the distributions it drew them from."""
    if "told" not in task.memo:
        asked = [chat(task.tokenizer, prompt, model=task.model) for prompt in task.prompts]
        with_words = [chat(task.tokenizer, prompt, task.instruction, task.model) for prompt in task.prompts]
        written = complete(task.model, task.tokenizer, with_words, new_tokens=TOKENS)
        said = tokens_of(task.model, task.tokenizer, asked, written.new)
        task.memo["told"] = Lesson(said, _targets(task.model, written))
    return task.memo["told"]


def shown(task: Task, side: Literal["positive", "negative"] = "positive") -> Lesson:
    """The answers that show the concept, or those that do not."""
    said = getattr(task.shown, side)
    asked = [chat(task.tokenizer, prompt, model=task.model) for prompt, _ in said]
    answers = [behind(ask, answer) for ask, (_, answer) in zip(asked, said, strict=True)]
    batch = task.tokenizer(answers, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    new, real = batch["input_ids"][:, : 2 * TOKENS], batch["attention_mask"][:, : 2 * TOKENS].bool()
    return Lesson(tokens_of(task.model, task.tokenizer, asked, (new, real)))


def untouched(task: Task) -> Lesson:
    """Ordinary text, and the distributions of the model as it is."""
    said = ordinary(task.model, task.tokenizer, task.texts, 32)
    return Lesson(said, _targets(task.model, said))


def _logits(model: Any, some: Completions) -> Float[Tensor, "rows answer vocab"]:
    return logits(model, some, use_cache=False).float()


@torch.no_grad()
def _targets(model: Any, said: Completions) -> Float[Tensor, "rows answer vocab"]:
    """Log-probabilities of the model as it is, in half precision."""
    batches = torch.arange(len(said.ids), device=said.ids.device).split(BATCH)
    return torch.cat([_logits(model, said.rows(rows)).log_softmax(-1).half() for rows in batches])


def loss(model: Any, lesson: Lesson, rows: Tensor) -> Float[Tensor, ""]:
    """KL(target || p_v) in nats per token, or the cross-entropy of the answers, over some rows."""
    some = lesson.said.rows(rows)
    (new, real), scores = some.new, _logits(model, some).log_softmax(-1)
    if lesson.target is None:
        each = -scores.gather(-1, new[..., None])[..., 0]
    else:
        target = lesson.target[rows].float()
        each = (target.exp() * (target - scores)).sum(-1)
    return (each * real).sum() / real.sum()


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
                loss(task.model, some, torch.randperm(len(some.said.ids), generator=generator)[:BATCH])
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
