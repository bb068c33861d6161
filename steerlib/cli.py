"""The command line: `steerlib demo | steer | train | eval | concepts | info | graph | list | pull | push | verify | migrate`.

It exits with 0; with 1 where steerlib refuses; with 2 where the command is misspelt; with 3 where a bank cannot be trusted.
"""

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from .bank.concept_bank import ConceptBank
from .bank.concepts import printable, signed
from .bank.hub import list_banks
from .encoders import KINDS, Sparse
from .errors import BadEdit, BadRecipe, CorruptBank, MissingExtra, SteerlibError, UnknownFormat
from .hosts import load
from .steering.session import steer as steered

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError:
    raise MissingExtra("the command line needs typer and rich: pip install 'steerlib[cli]'") from None

app = typer.Typer(help="Change what a generation model is thinking of, while it runs.", no_args_is_help=True)
console = Console()
errors = Console(stderr=True)
_traceback = False

DEMO_BANK = "smollm2-135m-instruct"
DEMO_PROMPTS = ("What did you do on your last holiday?", "Tell me about the place where you live.", "Why is it good to wait?")
DEMO_SCENES = "scenes-32"
DEMO_LEVERS = ("sunset", "stone", "blue", "circle", "large", "striped")
DEMO_SCENE_PROMPTS = (
    "a small plain red square at the front left at night on grass under a navy sky lit from the left",
    "a medium checked green triangle at the back right by day on sand under an azure sky lit from above",
    "a medium plain yellow cross at the front middle by day on grass under a pale sky lit from the right",
    "a small plain purple square at the front right indoors on wood before a cream wall lit from above",
)
DEMO_CONCEPTS = ("french", "fantasy", "formality")
DEMO_STRENGTHS = (-0.5, 0.5, 1.0)
DEMO_TOKENS = 40

BankName = Annotated[str, typer.Argument(help="a folder, a shipped bank, or a Hub id")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a Hub bank")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for machines")]
Key = Annotated[Path | None, typer.Option(help="Ed25519 key in PEM: public to verify, private to sign")]


def recipes() -> Path:
    """The folder of the recipes that come with steerlib."""
    from importlib.resources import files

    return Path(str(files("steerlib.concept_banks"))) / "recipes"


def recipe_of(bank: ConceptBank, recipe: Path | None) -> Any:
    """The recipe given, or the shipped one that the bank was made from."""
    from .training.recipe import Recipe

    path = recipe or recipes() / str(bank.provenance.get("recipe", bank.name)) / "recipe.toml"
    return Recipe.from_file(path, to_train=False)


def loaded(source: str) -> Any:
    """A model and its tokenizer, with the loader's progress bars but not its remarks."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    console.print(f"loading {source}", style="dim", highlight=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(source)


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(help="new tokens of each answer")] = DEMO_TOKENS,
    threads: Annotated[int, typer.Option(help="processor threads (0: torch's choice)")] = 0,
    only: Annotated[str, typer.Option(help="text or images (default: both)")] = "",
    out: Annotated[Path, typer.Option(help="where the pictures are drawn")] = Path("demo.png"),
) -> None:
    """Steer real models: three concepts of SmolLM2-135M-Instruct at several strengths, and six of a model of scenes."""
    import torch

    torch.set_num_threads(threads or torch.get_num_threads())
    if only != "images":
        _demo_text(tokens)
    if only != "text":
        _demo_images(out)


def _demo_images(out: Path) -> None:
    """One grid of pictures, steered by one concept a row, from the same noise and prompts."""
    from .evaluation.pictures import draw_as_told, edit_of, grid

    bank = ConceptBank.from_pretrained(DEMO_SCENES)
    if bank.folder is None or not (pipeline := bank.folder / "pipeline").is_dir():
        raise CorruptBank(f"bank {bank.name!r} lacks its pipeline; install steerlib anew")
    pipe, rows = loaded(str(pipeline))[0], {}
    for name in ("unsteered", *DEMO_LEVERS):
        edits = {name: edit_of(bank[name].effects["edit"], bank[name].effects["amount"])} if name in DEMO_LEVERS else {}
        with steered(pipe, bank, edits, branch="cond"):
            drawn = draw_as_told(pipe, DEMO_SCENE_PROMPTS)
        rows[name] = {prompt: drawn[i : i + 1] for i, prompt in enumerate(DEMO_SCENE_PROMPTS)}
    out.write_bytes(grid(rows))
    console.print(f"Pictures of {len(DEMO_SCENE_PROMPTS)} prompts, steered by {', '.join(DEMO_LEVERS)}: {out}")


def _demo_text(tokens: int) -> None:
    from .evaluation.text import judge_for
    from .text import chat, complete, progress

    bank = ConceptBank.from_pretrained(DEMO_BANK)
    recipe = recipe_of(bank, None)
    model, tokenizer = loaded(recipe.source)
    judge = judge_for(recipe.scorers)
    column = {name: judge.names.index(name) for name in DEMO_CONCEPTS}
    asked = [chat(tokenizer, prompt) for prompt in DEMO_PROMPTS]
    complete(model, tokenizer, asked, new_tokens=2)  # warm up
    plain, seconds = _timed(model, tokenizer, asked, tokens)
    done = {}
    for name in progress(DEMO_CONCEPTS, "writing"):
        useful = bank[name].useful or 1.0
        for share in DEMO_STRENGTHS:
            amount = round(share * useful, 2)
            with steered(model, bank, {name: amount}):
                done[name, amount] = _timed(model, tokenizer, asked, tokens)
    for i, prompt in enumerate(DEMO_PROMPTS):
        table = Table("", "score", "text", title=f"“{prompt}”", title_justify="left", show_lines=True, title_style="bold")
        table.add_row("unsteered", "", plain[i])
        for (name, amount), (texts, _) in done.items():
            before, after = judge([plain[i], texts[i]])[:, column[name]]
            table.add_row(f"{name} {amount:+.2f}", f"{before:.2f} → {after:.2f}", texts[i])
        console.print(table)
    summary = Table("concept", "amount", "mean score, unsteered → steered", title="Measured", title_justify="left")
    for (name, amount), (texts, _) in done.items():
        before, after = (judge(some)[:, column[name]].mean() for some in (plain, texts))
        summary.add_row(name, f"{amount:+.2f}", f"{before:.2f} → {after:.2f}")
    console.print(summary)
    times: dict[str, list[float]] = {"plain": [seconds], "steered": []}
    for _ in range(2):  # in turns, so that a busy machine troubles both alike
        with steered(model, bank, {DEMO_CONCEPTS[0]: bank[DEMO_CONCEPTS[0]].useful or 1.0}):
            times["steered"].append(_timed(model, tokenizer, asked, tokens)[1])
        times["plain"].append(_timed(model, tokenizer, asked, tokens)[1])
    before, after = min(times["plain"]), min(times["steered"])
    console.print(f"Writing took {before:.2f} s unsteered and {after:.2f} s steered ({after / before:.2f} ×; a rough figure.")
    console.print("scripts/bench_steering.py measures it properly).")


def _timed(model: Any, tokenizer: Any, asked: Sequence[str], tokens: int) -> tuple[list[str], float]:
    """Greedy answers of a fixed length, on one line each, and the seconds they took."""
    from .text import complete

    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        start = time.perf_counter()
        texts = complete(model, tokenizer, asked, new_tokens=tokens).texts
        return [" ".join(text.split()) for text in texts], time.perf_counter() - start
    finally:
        model.generation_config.eos_token_id = ends


@app.command()
def steer(
    bank: BankName,
    prompt: Annotated[str, typer.Argument(help="what to ask")],
    edit: Annotated[list[str], typer.Option("--edit", "-e", help="concept=amount; may be repeated")] = [],  # noqa: B006
    model: Annotated[str, typer.Option(help="folder, Hub id or package:<name>/<file>.gguf; default: the bank's own")] = "",
    tokens: Annotated[int, typer.Option(help="new tokens")] = 60,
) -> None:
    """Answer a prompt with and without steering."""
    from .text import chat, complete

    opened = ConceptBank.from_pretrained(bank)
    edits = dict(_edit(text) for text in edit)
    for name in edits:
        opened[name]
    language_model, tokenizer = loaded(model or recipe_of(opened, None).source)
    for title, context in (("unsteered", nullcontext()), ("steered", steered(language_model, opened, edits))):
        with context as session:
            text = complete(language_model, tokenizer, [chat(tokenizer, prompt)], new_tokens=tokens).texts[0]
        console.print(f"[bold]{title}[/bold]: ", end="")
        console.print(text, markup=False)
    console.print(str(session), markup=False)


def _edit(text: str) -> tuple[str, float]:
    name, _, amount = text.rpartition("=")
    try:
        return name.strip(), float(amount)
    except ValueError:
        raise BadEdit(f"expected --edit concept=amount, got {text!r}") from None


def said(values: Any, text: str, as_json: bool) -> None:
    """Print for machines or for people."""
    typer.echo(json.dumps(values, sort_keys=True, ensure_ascii=False) if as_json else printable(text))


@app.command()
def concepts(
    bank: BankName,
    words: Annotated[str, typer.Argument(help="search names and labels")] = "",
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """List the concepts of a bank, or find some."""
    opened = ConceptBank.from_pretrained(bank, revision=revision)
    found = opened.find(words, limit=20) if words else list(opened.concepts.values())
    if as_json:
        said([{**concept.to_dict(), "site": opened.site_of(concept)} for concept in found], "", True)
        return
    table = Table("concept", "meaning", "site", "useful", "safe range")
    for concept in found:
        safe = signed(*concept.range or ())
        useful = signed(concept.useful) if concept.present is None else "a gate"
        table.add_row(
            *(escape(printable(text)) for text in (concept.name, concept.label, opened.site_of(concept), useful, safe))
        )
    console.print(table)


@app.command()
def info(bank: BankName, revision: Revision = None, as_json: AsJson = False) -> None:
    """Show a bank's card."""
    opened = ConceptBank.from_pretrained(bank, revision=revision)
    facts = {
        "name": opened.name,
        "base_model": opened.base.id,
        "license": opened.license,
        "concepts": len(opened),
        "edges": len(opened.graph),
        "encoders": {id: facts.to_dict() for id, facts in opened.encoders.items()},
        "provenance": opened.provenance,
    }
    said(facts, opened.card.partition("---\n")[2].partition("---\n")[2] or repr(opened), as_json)


@app.command()
def graph(
    bank: BankName,
    out: Annotated[Path | None, typer.Option(help="a page (.html), circuit-tracer's .json, or .graphml")] = None,
) -> None:
    """Write which concept moves which: a page to click through that needs no network, or a file for other programs."""
    from .graph.exports import circuit_tracer, graphml
    from .graph.page import page

    opened, path = ConceptBank.from_pretrained(bank), out or Path(f"{Path(bank).name}-graph.html")
    ways = {".html": page, ".json": circuit_tracer, ".graphml": graphml}
    if path.suffix not in ways:
        raise BadEdit(f"expected a file that ends in {', '.join(ways)}, got {path.name!r}")
    path.write_text(ways[path.suffix](opened), encoding="utf-8")
    kinds = Counter(f"{edge.relation}, {edge.evidence}" for edge in opened.graph.edges)
    console.print(f"{len(opened.graph)} edges ({'; '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})", markup=False)
    console.print(f"written to {path}", markup=False)


@app.command()
def pull(bank: BankName, revision: Revision = None, key: Key = None, as_json: AsJson = False) -> None:
    """Download a bank whole and check every file; afterwards it opens offline."""
    opened = ConceptBank.from_pretrained(bank, revision=revision)
    opened.verify(key)
    assert opened.folder is not None
    said({"name": opened.name, "folder": str(opened.folder)}, str(opened.folder), as_json)


@app.command()
def push(
    bank: BankName,
    repo: Annotated[str, typer.Argument(help="Hub id org/name")],
    private: Annotated[bool, typer.Option(help="whether a new repository is private")] = False,
    revision: Revision = None,
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Check a bank and publish it in one commit, signed where there is a key."""
    opened = ConceptBank.from_pretrained(bank)
    opened.verify()
    commit = opened.push_to_hub(repo, private=private or None, revision=revision, commit_message=message, key=key)
    said({"repo": repo, "commit": commit}, f"{repo} at {commit}", as_json)


@app.command()
def verify(bank: BankName, revision: Revision = None, key: Key = None, as_json: AsJson = False) -> None:
    """Check every file, hash and value of a bank, and whose it is."""
    opened = ConceptBank.from_pretrained(bank, revision=revision)
    opened.verify(key)
    signed = ", signed with this key" if key else ""
    text = f"{opened.name}: {len(opened)} concepts and gates, every file as it should be{signed}"
    said({"name": opened.name, "concepts": len(opened), "signed": key is not None}, text, as_json)


@app.command()
def migrate(bank: BankName, folder: Annotated[Path, typer.Argument(help="where the new bank goes")]) -> None:
    """Write a bank of an older format in the newest one; the old bank stays as it is."""
    opened = ConceptBank.from_pretrained(bank)
    opened.verify()
    typer.echo(str(opened.save_pretrained(folder)))


@app.command("list")
def list_(
    hub: Annotated[bool, typer.Option(help="those on the Hub too")] = False,
    base_model: Annotated[str | None, typer.Option(help="only banks of this model")] = None,
    as_json: AsJson = False,
) -> None:
    """List the banks that come with steerlib, and those on the Hub."""
    found = list_banks(base_model, local_files_only=not hub)
    text = "\n".join(f"{bank.name}  for {bank.base_model or 'a model'}{'  (shipped)' * bank.is_shipped}" for bank in found)
    said([asdict(bank) for bank in found], text, as_json)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="recipe.toml")],
    out: Annotated[Path | None, typer.Option(help="folder of the bank (default: out/<name>)")] = None,
    work: Annotated[Path, typer.Option(help="where stages keep their results, so that a run can go on")] = Path("out/work"),
) -> None:
    """Train a bank from a recipe. Run it again to go on where it stopped."""
    from .training.pipeline import best_device
    from .training.pipeline import train as run
    from .training.recipe import Recipe

    read = Recipe.from_file(recipe)
    model, tokenizer = loaded(read.source)
    bank = run(model.to(best_device()), read, tokenizer=tokenizer, work=work)
    folder = bank.save_pretrained(out or Path("out") / read.name)
    console.print(repr(bank), markup=False)
    console.print(f"written to {folder}; what was measured is in its README.md")


@app.command("eval")
def eval_(
    bank: BankName,
    recipe: Annotated[Path | None, typer.Option(help="recipe with prompts and scorers (default: the bank's own)")] = None,
    concept: Annotated[list[str], typer.Option(help="only these; may be repeated")] = [],  # noqa: B006
    stored: Annotated[bool, typer.Option(help="show what the bank's maker measured, and measure nothing")] = False,
    quick: Annotated[bool, typer.Option(help="four prompts, one seed, 24 tokens: a look, not a measurement")] = False,
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON, and a picture beside them")] = None,
    save: Annotated[bool, typer.Option(help="write effects and card into the bank, which must be a folder")] = False,
    model: Annotated[str, typer.Option(help="folder, Hub id or package:<name>/<file>.gguf; default: the bank's own")] = "",
    against: Annotated[str, typer.Option(help="of latents: a bank of the same encoders trained from another seed")] = "",
) -> None:
    """Measure a bank's concepts on prompts never used before: beside prompting, random directions and other controls.

    Of a bank of latents: what its encoders keep of ordinary text, and what their latents tell of the recipe's attributes.
    """
    from .evaluation.report import missed, picture, summary_table, table
    from .training.package.directions import evaluate, with_effects

    opened = ConceptBank.from_pretrained(bank)
    if any(issubclass(KINDS[facts.kind], Sparse) for facts in opened.encoders.values()):
        if save or concept or quick:
            raise BadEdit("a bank of latents is measured encoder by encoder; leave out --concept, --quick and --save")
        _eval_latents(opened, recipe, model, against, stored, out)
        return
    if save and (concept or quick or stored):
        raise BadEdit("--save writes a card of all concepts, as measured whole; leave out --concept, --quick and --stored")
    if stored:
        chosen = [opened[name] for name in concept or opened.concepts]
        records = [dict(c.effects) for c in chosen if "conditions" in c.effects]
    else:
        read = recipe_of(opened, recipe)
        if quick:
            read = replace(read, evaluation_prompts=4, dev_prompts=4, seeds=1, new_tokens=24)
        language_model, tokenizer = loaded(model or read.source)
        records = evaluate(language_model, tokenizer, opened, read, concepts=concept)
        if save:
            with_effects(opened, read, records).save_pretrained(bank)
    if not records:
        raise BadRecipe(f"bank {opened.name!r} stores no measurements; leave out --stored to make them")
    typer.echo(f"{table(records)}\n\n{summary_table(records)}\n\n{missed(records)}")
    if out is not None:
        out.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        out.with_suffix(".png").write_bytes(picture(records))


def _eval_latents(bank: ConceptBank, recipe: Path | None, source: str, against: str, stored: bool, out: Path | None) -> None:
    from .evaluation.report import latents_table
    from .training.package.latents import evaluate_encoders
    from .training.recipe import TextEncoderRecipe

    found = bank.provenance.get("quality", {})
    if not stored:
        named = recipes() / str(bank.provenance.get("recipe", bank.name)) / "recipe.toml"
        is_known = recipe is not None or named.is_file()
        read = (
            recipe_of(bank, recipe) if is_known else TextEncoderRecipe(name=bank.name, base=bank.base.id, source=bank.base.id)
        )
        twin = ConceptBank.from_pretrained(against) if against else None
        model, tokenizer = loaded(source or read.source)
        found = evaluate_encoders(model, tokenizer, bank, read, against=twin)
    if not found:
        raise BadRecipe(f"bank {bank.name!r} stores no measurements; leave out --stored to make them")
    typer.echo(latents_table(found))
    if out is not None:
        out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="show where in the code an error was raised")] = False,
) -> None:
    """Change what a generation model is thinking of, while it runs."""
    global _traceback
    _traceback = traceback


def main() -> None:
    """Run the command line; what steerlib refuses is one line, not a traceback."""
    try:
        app()
    except (SteerlibError, OSError) as error:
        if _traceback:
            raise
        errors.print(f"[red]{type(error).__name__}[/red]: ", end="")
        errors.print(str(error), markup=False, highlight=False)
        sys.exit(3 if isinstance(error, (CorruptBank, UnknownFormat)) else 1)
