"""Show at a terminal what steering does: answers and pictures, unsteered and steered, of one prompt or of the demonstration."""

import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from .bank.concept_bank import ConceptBank
from .bank.concepts import Concept, printable
from .errors import BadEdit, ConflictingEdits
from .evaluation.pictures import draw_as_told, edit_of, grid, strip_of
from .evaluation.text import Judge
from .steering.interventions import Ablate, Add, Clamp, Intervention, Scale, Set
from .steering.presets import Preset
from .steering.session import steer
from .steering.swapping import Swap
from .steering.switching import Do
from .text import begun, chat, complete, is_pair, progress
from .threads import use_threads

TEXT_BANK, SCENES_BANK = "smollm2-135m-instruct", "scenes-32"
PROMPTS = ("How was your day?", "Describe your morning.", "Tell me about the place where you live.")
ASK = PROMPTS[-1]
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


KINDS: dict[str, tuple[type[Intervention], int]] = {
    "add": (Add, 1),
    "set": (Set, 1),
    "scale": (Scale, 1),
    "clamp": (Clamp, 2),
    "ablate": (Ablate, 0),
    "do": (Do, 1),
}
"""What stands behind `concept=`, and how many numbers follow, each after a colon. A number alone is added."""
USEFUL = "useful"
"""Stands for the edit that the bank's maker found useful."""


def read_setting(name: str, texts: Sequence[str]) -> tuple[ConceptBank, Any, Mapping[str, Any] | None]:
    """A bank, and what `steer` takes for bank and edits: those as they are typed, or a preset from a file, which says them."""
    if not name.endswith(".toml"):
        bank = ConceptBank.from_pretrained(name)
        return bank, bank, read_edits(bank, texts)
    if texts:
        raise BadEdit(f"{name} says what is edited; leave out --edit, or name the bank itself")
    preset = Preset.load(name)
    return preset.bank, preset, None


def read_edits(bank: ConceptBank, texts: Sequence[str]) -> dict[str, Intervention]:
    """Edits as they are typed: `concept=2.5`, `concept=set:1.5`, `concept=useful`, …

    Raises `BadEdit` for one that cannot be read, for none at all, for one concept named twice and for gates; `UnknownConcept`.
    """
    found: dict[str, Intervention] = {}
    for text in texts:
        name, _, amount = (part.strip() for part in text.rpartition("="))
        if not name or not amount:
            raise BadEdit(f"expected --edit concept=amount, got {text!r}; for example {example_of(bank)}")
        concept = bank[name]
        if concept.present is not None and concept.range is None:
            raise BadEdit(
                f"{name!r} is a gate, which reads where something is present, and no lever; {example_of(bank)} is one"
            )
        if name in found:
            raise ConflictingEdits(f"{name!r} is edited twice; give it one --edit")
        found[name] = useful_edit(concept) if amount == USEFUL else _intervention(text, amount)
    if not found:
        raise BadEdit(f"expected an --edit or more: {example_of(bank)}; steerlib concepts {bank.name} lists what there is")
    return found


def _intervention(text: str, amount: str) -> Intervention:
    kind, *given = amount.split(":")
    if kind == "swap" and any(given):
        return Swap(":".join(given))
    if kind not in KINDS:
        kind, given = "add", [kind, *given]
    make, count = KINDS[kind]
    try:
        numbers = [float(number) for number in given]
    except ValueError:
        numbers = []
    if len(numbers) != count or len(given) != count or not all(map(isfinite, numbers)):
        ways = ", ".join(":".join((name, *["NUMBER"] * n)) for name, (_, n) in KINDS.items())
        raise BadEdit(f"expected --edit concept=amount, a number or one of {ways}, swap:CONCEPT, {USEFUL}; got {text!r}")
    return make(*numbers)


def useful_edit(concept: Concept) -> Intervention:
    """The edit that the bank's maker found useful; raises `BadEdit` where there is none."""
    if concept.useful is None:
        why = f": {said}" if (said := concept.beyond or concept.unmeasured) else ""
        raise BadEdit(f"of {concept.name!r} no useful amount is known{why}; give a number, such as --edit {concept.name}=1")
    return edit_of(concept.useful_as, concept.useful)


def example_of(bank: ConceptBank) -> str:
    """An edit that works on a bank, as it is typed; nothing for a bank that describes no concept."""
    levers = [concept for concept in bank.concepts.values() if concept.present is None]
    best = max(levers, key=lambda concept: (concept.useful is not None, bool(concept.effects.get("verified", {}).get("holds"))))
    kind = "" if best.useful_as == "Add" else f"{best.useful_as.lower()}:"
    amount = f"{kind}{1 if best.useful is None else best.useful:g}"
    return shlex.join(["-e", f"{best.name}={amount}"])


def asking(recipe: Any, tokenizer: Any) -> str:
    """A prompt to try a bank with that was made by a recipe."""
    from .training.record.documents import documents

    if tokenizer is not None:
        return ASK
    return getattr(recipe, "plain", "") or next(
        (said for said in documents(recipe.read_corpus()) if isinstance(said, str)), ASK
    )


def finish(bank: ConceptBank, folder: Path, places: Sequence[Path], clean: bool, prompt: str) -> None:
    """Write a trained bank; say what it is and where, what is left in the folders of its work, and how to go on."""
    bank.save_pretrained(folder)
    size = sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file()) / 1e6
    for place in places if clean else ():
        shutil.rmtree(place, ignore_errors=True)
    how = " --chat" if bank.provenance.get("chat") is False and "answering" in bank else ""  # as it was measured
    left = "removed" if clean else "kept, so that a changed recipe finds what it does not change; --clean removes it"
    lines = [
        repr(bank),
        f"written to {folder}; what was measured is in its README.md",
        f"work folder {' and '.join(map(str, places))}: {size:.0f} MB, {left}",
        f"try it:  steerlib steer {shlex.quote(str(folder))} {shlex.quote(prompt)} {example_of(bank)}{how}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def train_to(recipe: Any, out: Path | None, work: Path, clean: bool, threads: int, dtype: str = "float32") -> None:
    """Train a recipe, write and show its bank."""
    from .origins import loaded
    from .training import pipeline

    pipeline.check(recipe)
    folder = out or Path("out") / recipe.name
    pipeline.check_writable(folder)
    console.print(f"work folder: {work}, from which a run that stops goes on", markup=False, soft_wrap=True, style="dim")
    model, tokenizer = loaded(recipe.weights, threads, dtype)
    bank = pipeline.train(model.to(pipeline.best_device()), recipe, tokenizer=tokenizer, work=work)
    finish(bank, folder, pipeline.work_of(recipe, work, model), clean, asking(recipe, tokenizer))


def make_to(
    names: Sequence[str], model: str, out: Path, work: Path, threads: int, *, seed: int, prompts: Path | None,
    score: str, steps: int | None, guidance: float | None, dtype: str, tflops: float | None,
) -> None:  # fmt: skip
    """Make concepts from their names, write and show their bank; or say what that takes at a rate `tflops`."""
    from .origins import loaded, recipe_of
    from .training import named, pipeline

    named.check_given(names)
    pipeline.check_writable(out)
    given = None if prompts is None else named.read_prompts(prompts)
    drawn: dict[str, Any] = {"steps": steps, "guidance": guidance}
    if tflops is not None:
        foretell(named.picture_recipe_of(names, model, given, name=out.name, seed=seed, **drawn), tflops, threads)
        return
    target, tokenizer = loaded(model, threads, dtype)
    how: dict[str, Any] = {"tokenizer": tokenizer, "source": model, "name": out.name, "seed": seed, "work": work}
    bank = named.make(target.to(pipeline.best_device()), names, prompts=given, score=score or None, **drawn, **how)
    finish(bank, out, [work], False, asking(recipe_of(bank, None), tokenizer))


def foretell(recipe: Any, tflops: float, threads: int) -> None:
    """Say what a recipe will take."""
    from .training.package.costs import costs_of
    from .training.pipeline import check

    check(recipe)
    use_threads(threads)
    console.print(str(costs_of(recipe, tflops * 1e12)), markup=False, highlight=False, soft_wrap=True)


def asked(model: Any, tokenizer: Any, prompt: str, as_question: bool | None) -> str:
    """A prompt as a question, in a chat or on a page, or to be continued; None: as a question where the model knows chats. An
    encoder reads it in either case."""
    if as_question is None:
        as_question = getattr(tokenizer, "chat_template", None) is not None
    return chat(tokenizer, prompt, model=model) if as_question or is_pair(model) else begun(tokenizer, prompt)


def answer_twice(
    model: Any,
    tokenizer: Any,
    bank: ConceptBank | Preset,
    asked: str,
    edits: Mapping[str, Any] | None,
    seeds: Sequence[int] = (0,),
    **how: Any,
) -> None:
    """Print the answers to a prompt, unsteered and steered, one for each seed, and what the edits did."""
    for title, context in (("unsteered", nullcontext()), ("steered", steer(model, bank, edits, tokenizer=tokenizer))):
        with context as session:
            texts = [complete(model, tokenizer, [asked], seed=seed, **how).texts[0] for seed in seeds]
        for seed, text in zip(seeds, texts, strict=True):
            console.print(f"[bold]{title}[/bold]{f' (seed {seed})' if len(texts) > 1 else ''}: ", end="")
            console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
    console.print(str(session), markup=False, soft_wrap=True)


def check_picture(path: Path) -> None:
    """Raise `BadEdit` for a file that cannot become a picture, before anything is drawn."""
    if path.suffix.lower() != ".png" or path.is_dir():
        raise BadEdit(f"expected --out to name a .png file, got {str(path)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)


SEEN = 256
"""Pixels that a picture is high at least when it is saved for a person to look at."""


def draw_both(
    pipe: Any,
    bank: ConceptBank | Preset,
    prompt: str,
    edits: Mapping[str, Any] | None,
    out: Path,
    *,
    samples: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
) -> None:
    """Draw a prompt unsteered (left) and steered (right), a row for each sample, both of a row from the same noise, to a PNG
    file; print what the edits did. Steps and guidance are those that the bank was made with, unless others are given."""
    own = bank.bank if isinstance(bank, Preset) else bank
    made = {"steps": 20, "guidance": 2.0, **own.provenance}
    how: Any = {"seed": seed, "steps": steps or made["steps"], "guidance": made["guidance"] if guidance is None else guidance}
    plain = draw_as_told(pipe, [prompt] * samples, **how)
    with steer(pipe, bank, edits, branch="both" if edits is None else "cond") as session:
        steered = draw_as_told(pipe, [prompt] * samples, **how)
    rows = [strip_of(both) for both in zip(plain, steered, strict=True)]
    times = max(1, SEEN // len(rows[0]))  # tiny pictures are shown larger, pixel by pixel
    shown = np.concatenate(rows).repeat(times, 0).repeat(times, 1)
    pipe.numpy_to_pil(shown / 255)[0].save(out)
    console.print(str(session), markup=False, soft_wrap=True)
    console.print(f"drawn to {out}: unsteered on the left, steered on the right", markup=False, soft_wrap=True)


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


def show_programs(name: str, out: Path | None) -> None:
    """List the example programs, print one of them, or copy them to a folder."""
    found = {path.stem: path for path in sorted((Path(__file__).parent / "examples").glob("*.py"))}
    if name and name not in found:
        raise BadEdit(f"expected one of {', '.join(found)}, got {name!r}")
    for path in [found[name]] if name else found.values():
        text = path.read_text(encoding="utf-8")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / path.name).write_text(text, encoding="utf-8")
        first = text.splitlines()[0].strip('"')
        typer.echo(text if name and out is None else f"{(out or Path()) / path.name}  {first}")


def study(model: str, data: Path, out: Path, concepts: Sequence[str], hidden: str | None, seed: int, threads: int) -> None:
    """Study an autoencoder, or concepts of a bank on prompts, and say what was found and where the page is."""
    from .evaluation import study as room
    from .evaluation.datasets import read

    use_threads(threads)
    if data.suffix == ".txt":
        prompts = [line.strip() for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
        decoder, inputs = run_of(ConceptBank.from_pretrained(model), prompts, seed, threads)
        found = room.of_bank(decoder, inputs, concepts or None, hidden=hidden, seed=seed)
    else:
        if concepts:
            raise BadEdit("--concept chooses concepts of a bank, which is studied on prompts; give --data prompts.txt")
        found = room.studied(room.opened(model), read(data), hidden=hidden, seed=seed)
    page = room.write(found, out, f"Study of {Path(model).name}")
    head, rows = room.told(found.figures)
    known = [f"{row[0].capitalize()}: {', '.join(map(' '.join, zip(head[1:], row[1:], strict=True)))}." for row in rows]
    for line in (*room.lines(found.figures), *known, f"page: {page}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def run_of(bank: ConceptBank, prompts: list[str], seed: int, threads: int) -> tuple[Any, Any]:
    """A bank's model with how it is run on prompts, and the inputs: of a pipeline the prompts, from fixed noise; of a language
    model their first tokens, as many as the shortest has."""
    from torch import tensor

    from .evaluation.decoders import drawing, predicting
    from .evaluation.interventions import Decoder
    from .origins import loaded, source_of

    model, tokenizer = loaded(source_of(bank), threads)
    if tokenizer is None:
        made = {"steps": 20, "guidance": 2.0, **bank.provenance}
        drawn = drawing(model, seed=seed, num_inference_steps=made["steps"], guidance_scale=made["guidance"])
        return Decoder(model, drawn, bank), prompts
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    return Decoder(model, predicting(model), bank), tensor([one[: min(map(len, ids))] for one in ids])
