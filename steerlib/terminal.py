"""Show at a terminal what steering does: answers and pictures, unsteered and steered, of one prompt or of the demonstration."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .bank.concept_bank import ConceptBank
from .evaluation.pictures import draw_as_told, edit_of, grid, strip_of
from .evaluation.text import Judge
from .steering.session import steer
from .text import chat, complete, progress

TEXT_BANK, SCENES_BANK = "smollm2-135m-instruct", "scenes-32"
PROMPTS = ("How was your day?", "Describe your morning.", "Tell me about the place where you live.")
CONCEPTS = ("sports", "science", "fantasy")
SHARES = (-0.5, 0.5, 1.0)
"""Amounts, as shares of a concept's useful amount."""
CAPTIONS = (
    "a small plain red square at the front left at night on grass under a navy sky lit from the left",
    "a medium checked green triangle at the back right by day on sand under an azure sky lit from above",
    "a medium plain yellow cross at the front middle by day on grass under a pale sky lit from the right",
    "a small plain purple square at the front right indoors on wood before a cream wall lit from above",
)
LEVERS = ("sunset", "stone", "blue", "circle", "large", "striped")
console = Console()

Answers = Mapping[tuple[str, float], Sequence[str]]
"""By concept and amount, one answer a prompt."""


def answer_twice(model: Any, tokenizer: Any, bank: ConceptBank, prompt: str, edits: Mapping[str, float], tokens: int) -> None:
    """Print the greedy answer to a prompt, unsteered and steered, and what the edits did."""
    for title, context in (("unsteered", nullcontext()), ("steered", steer(model, bank, edits))):
        with context as session:
            text = complete(model, tokenizer, [chat(tokenizer, prompt)], new_tokens=tokens).texts[0]
        console.print(f"[bold]{title}[/bold]: ", end="")
        console.print(text, markup=False)
    console.print(str(session), markup=False)


def draw_both(pipe: Any, bank: ConceptBank, prompt: str, edits: Mapping[str, float], out: Path) -> None:
    """Draw a prompt unsteered (left) and steered (right), from the same noise, to a PNG file; print what the edits did."""
    plain = draw_as_told(pipe, [prompt])[0]
    with steer(pipe, bank, edits, branch="cond") as session:
        steered = draw_as_told(pipe, [prompt])[0]
    pipe.numpy_to_pil(strip_of([plain, steered]) / 255)[0].save(out)
    console.print(f"{session}\ndrawn to {out}: unsteered on the left, steered on the right", markup=False)


def demo_text(model: Any, tokenizer: Any, bank: ConceptBank, judge: Judge, tokens: int) -> None:
    """Answer the prompts with `tokens` new tokens, unsteered and steered; print answers, scores and the time they took."""
    asked = [chat(tokenizer, prompt) for prompt in PROMPTS]
    complete(model, tokenizer, asked, new_tokens=2)  # warm up
    plain, seconds = _timed(model, tokenizer, asked, tokens)
    useful = {name: bank[name].useful or 1.0 for name in CONCEPTS}
    done = {}
    for name, amount in progress([(name, round(share * useful[name], 2)) for name in CONCEPTS for share in SHARES], "writing"):
        with steer(model, bank, {name: amount}):
            done[name, amount], _ = _timed(model, tokenizer, asked, tokens)
    _show(plain, done, {key: judge([*plain, *texts])[:, judge.names.index(key[0])] for key, texts in done.items()})
    unsteered, steered = [seconds], []
    for _ in range(2):  # in turns, so that a busy machine slows both alike
        with steer(model, bank, {CONCEPTS[0]: useful[CONCEPTS[0]]}):
            steered.append(_timed(model, tokenizer, asked, tokens)[1])
        unsteered.append(_timed(model, tokenizer, asked, tokens)[1])
    before, after = min(unsteered), min(steered)
    console.print(f"Writing took {before:.2f} s unsteered and {after:.2f} s steered ({after / before:.2f} ×; a rough figure.")
    console.print("scripts/bench_steering.py measures it properly).")


def demo_images(pipe: Any, bank: ConceptBank, out: Path) -> None:
    """Draw the captions, unsteered and with one concept a row, all from the same noise; `out` is a PNG file."""
    rows = {}
    for name in ("unsteered", *LEVERS):
        edits = {name: edit_of(bank[name].effects["edit"], bank[name].effects["amount"])} if name in LEVERS else {}
        with steer(pipe, bank, edits, branch="cond"):
            drawn = draw_as_told(pipe, CAPTIONS)
        rows[name] = {caption: drawn[i : i + 1] for i, caption in enumerate(CAPTIONS)}
    out.write_bytes(grid(rows))
    console.print(f"Pictures of {len(CAPTIONS)} prompts, steered by {', '.join(LEVERS)}: {out}")


def _show(plain: Sequence[str], done: Answers, scores: Mapping[tuple[str, float], Any]) -> None:
    """One table a prompt, and one of mean scores. `scores` are of the unsteered answers, then of the steered ones."""
    for i, prompt in enumerate(PROMPTS):
        table = Table("", "score", "text", title=f"“{prompt}”", title_justify="left", show_lines=True, title_style="bold")
        table.add_row("unsteered", "", plain[i])
        for (name, amount), texts in done.items():
            before, after = scores[name, amount][i], scores[name, amount][len(plain) + i]
            table.add_row(f"{name} {amount:+.2f}", f"{before:.2f} → {after:.2f}", texts[i])
        console.print(table)
    summary = Table("concept", "amount", "mean score, unsteered → steered", title="Measured", title_justify="left")
    for (name, amount), found in scores.items():
        before, after = found[: len(plain)].mean(), found[len(plain) :].mean()
        summary.add_row(name, f"{amount:+.2f}", f"{before:.2f} → {after:.2f}")
    console.print(summary)


def _timed(model: Any, tokenizer: Any, asked: Sequence[str], tokens: int) -> tuple[list[str], float]:
    """Greedy answers of a fixed length, on one line each, and the seconds they took."""
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        start = time.perf_counter()
        texts = complete(model, tokenizer, asked, new_tokens=tokens).texts
        return [" ".join(text.split()) for text in texts], time.perf_counter() - start
    finally:
        model.generation_config.eos_token_id = ends
