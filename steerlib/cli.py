"""The command line: `steerlib demo | steer | make | train | port | lint | eval | concepts | info | graph | list | ...`.

Nothing here imports torch before a command needs it: `sl` loads each name when it is first used.
"""

import json
import warnings
from collections import Counter
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import steerlib as sl

from .errors import BadBank, BadEdit, BadRecipe, MissingExtra

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table
except ImportError:
    raise MissingExtra("the command line needs typer and rich: pip install 'steerlib[cli]'") from None

from .origins import has_recipe, loaded, recipe_of, source_of

app = typer.Typer(help="Change what a generation model is thinking of, while it runs.", no_args_is_help=True)
console = Console()
state = {"traceback": False}  # of the program, not of a command

BankName = Annotated[str, typer.Argument(help="a folder, a shipped bank, or a Hub id")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a Hub bank")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for machines")]
Key = Annotated[Path | None, typer.Option(help="Ed25519 key in PEM: public to verify, private to sign")]
Model = Annotated[str, typer.Option(help="folder, Hub id or package:<name>/<file>.gguf (default: the bank's own)")]
Tokens = Annotated[int, typer.Option(help="new tokens of each answer", min=1)]
TEMPLATE = "write a recipe to start from: steerlib train --template [text|latents|graph|pictures|prompts|contexts] [--out FILE]"
EDITS = "concept=amount in its units, or concept=useful, set:1.5, scale:0.5, clamp:-1:1, ablate, do:1, swap:other; repeatable"
Work = Annotated[Path, typer.Option(help="folder of what each stage made, so that a run can go on")]
Quick = Annotated[bool, typer.Option("--quick", help="a rough bank in about two minutes, to see whether it works")]
Clean = Annotated[bool, typer.Option("--clean", help="remove what the stages made once the bank is written")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="of pictures: what it will take, without loading any weight")]
Tflops = Annotated[float, typer.Option(help="rate for --dry-run, in 10^12 operations a second (0: measured here)", min=0)]
Threads = Annotated[int, typer.Option(help="processor threads (0: as many as a trial of 0.2 s finds fastest)", min=0)]

Half = StrEnum("Half", ["text", "images"])  # what `demo` can show alone
Precision = StrEnum("Precision", ["float32", "bfloat16", "auto"])
Dtype = Annotated[Precision, typer.Option(help="of the weights; auto: bfloat16 where the device computes faster with it")]


@app.command()
def demo(
    tokens: Tokens = 40,
    threads: Threads = 0,
    only: Annotated[Half | None, typer.Option(help="one half of it (default: both)")] = None,
    out: Annotated[Path, typer.Option(help="PNG file that the pictures are drawn to")] = Path("demo.png"),
) -> None:
    """Steer real models: three concepts of SmolLM2-135M-Instruct at several strengths, and six of a model of scenes."""
    from . import terminal
    from .evaluation.text import judge_for

    terminal.check_picture(out)
    if only != Half.images:
        bank = sl.ConceptBank.from_pretrained(terminal.TEXT_BANK)
        model, tokenizer = loaded(source_of(bank), threads)
        terminal.demo_text(model, tokenizer, bank, judge_for(recipe_of(bank, None).scorers), tokens)
    if only != Half.text:
        bank = sl.ConceptBank.from_pretrained(terminal.SCENES_BANK)
        terminal.demo_images(loaded(source_of(bank), threads)[0], bank, out)


@app.command()
def steer(
    bank: BankName,
    prompt: Annotated[str, typer.Argument(help="what to ask, to continue or to draw")],
    edit: Annotated[list[str], typer.Option("--edit", "-e", help=EDITS)] = [],  # noqa: B006
    model: Model = "",
    tokens: Tokens = 60,
    temperature: Annotated[float, typer.Option(help="of sampled answers (0: the likeliest token every time)", min=0)] = 0.0,
    samples: Annotated[int, typer.Option(help="how many answers or pictures", min=1, max=64)] = 1,
    seed: Annotated[int, typer.Option(help="of the first answer or picture; the next ones follow", min=0)] = 0,
    chat: Annotated[bool | None, typer.Option(help="ask, or continue the prompt (default: as the bank says)")] = None,
    steps: Annotated[int | None, typer.Option(help="scheduler steps of a picture (default: as the bank says)", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="of a picture towards its prompt (default: as the bank says)")] = None,
    threads: Threads = 0,
    out: Annotated[Path, typer.Option(help="PNG file, if it draws: unsteered left, steered right")] = Path("steered.png"),
) -> None:
    """Answer or draw a prompt, plain and steered: by edits of a bank, or by a preset, FILE.toml in the place of BANK."""
    from . import terminal

    opened, chosen, edits = terminal.read_setting(bank, edit)
    terminal.check_picture(out)
    target, tokenizer = loaded(model or source_of(opened), threads)
    if tokenizer is None:
        terminal.draw_both(target, chosen, prompt, edits, out, samples=samples, seed=seed, steps=steps, guidance=guidance)
    elif samples > 1 and not temperature:
        raise BadEdit(f"expected --temperature above 0 beside --samples {samples}: greedy answers are all the same")
    else:
        how = {"new_tokens": tokens, "temperature": temperature}
        asked = terminal.asked(target, tokenizer, prompt, opened.provenance.get("chat") if chat is None else chat)
        terminal.answer_twice(target, tokenizer, chosen, asked, edits, range(seed, seed + samples), **how)


def said(values: Any, text: str, as_json: bool) -> None:
    """Print for machines or for people."""
    from .bank.concepts import printable

    typer.echo(json.dumps(values, sort_keys=True, ensure_ascii=False) if as_json else printable(text))


@app.command()
def concepts(
    bank: BankName,
    words: Annotated[str, typer.Argument(help="search names and labels")] = "",
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """List the concepts of a bank, or find some."""
    from .bank.concepts import printable, signed

    opened = sl.ConceptBank.from_pretrained(bank, revision=revision)
    found = opened.find(words, limit=20) if words else list(opened.concepts.values())
    if as_json:
        said([{**concept.to_dict(), "site": opened.site_of(concept)} for concept in found], "", True)
        return
    how = escape("not measured: sl.calibrate(model, bank, ['name'], judge=…)") if any(c.unmeasured for c in found) else None
    table = Table(Column("concept", overflow="fold"), "meaning", "site", "useful", "safe range", caption=how)
    for concept in found:
        safe = "not measured" if concept.unmeasured else signed(*concept.range or ())
        useful = f"{concept.useful_as} {signed(concept.useful)}" if concept.useful is not None else ""
        useful = useful if concept.present is None else "a gate"
        cells = (concept.name, concept.label, opened.site_of(concept), useful, safe)
        table.add_row(*(escape(printable(text)) for text in cells))
    console.print(table)


@app.command()
def info(bank: BankName, revision: Revision = None, as_json: AsJson = False) -> None:
    """Show a bank's card."""
    opened = sl.ConceptBank.from_pretrained(bank, revision=revision)
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

    opened = sl.ConceptBank.from_pretrained(bank)
    path = out or Path(f"{opened.name}-graph.html")
    ways = {".html": page, ".json": circuit_tracer, ".graphml": graphml}
    if path.suffix not in ways:
        raise BadEdit(f"expected a file that ends in {', '.join(ways)}, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(ways[path.suffix](opened), encoding="utf-8")
    kinds = Counter(f"{edge.relation}, {edge.evidence}" for edge in opened.graph.edges)
    console.print(f"{len(opened.graph)} edges ({'; '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})", markup=False)
    console.print(f"written to {path}", markup=False)


@app.command()
def pull(bank: BankName, revision: Revision = None, key: Key = None, as_json: AsJson = False) -> None:
    """Download a bank whole and check every file; afterwards it opens offline."""
    opened = sl.ConceptBank.from_pretrained(bank, revision=revision)
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
    opened = sl.ConceptBank.from_pretrained(bank)
    opened.verify()
    commit = opened.push_to_hub(repo, private=private or None, revision=revision, commit_message=message, key=key)
    said({"repo": repo, "commit": commit}, f"{repo} at {commit}", as_json)


@app.command()
def verify(bank: BankName, revision: Revision = None, key: Key = None, as_json: AsJson = False) -> None:
    """Check every file, hash and value of a bank, and whose it is."""
    opened = sl.ConceptBank.from_pretrained(bank, revision=revision)
    opened.verify(key)
    text = f"{opened.name}: {len(opened)} concepts and gates, every file as it should be{', signed with this key' * bool(key)}"
    said({"name": opened.name, "concepts": len(opened), "signed": key is not None}, text, as_json)


@app.command()
def migrate(bank: BankName, folder: Annotated[Path, typer.Argument(help="where the new bank goes")]) -> None:
    """Write a bank of an older format in the newest one; the old bank stays as it is."""
    opened = sl.ConceptBank.from_pretrained(bank)
    if (there := folder.resolve()).exists() and (not there.is_dir() or any(there.iterdir())):
        raise BadBank(f"{str(folder)!r} is there already and stays as it is; give a new or empty folder")
    opened.verify()
    typer.echo(str(opened.save_pretrained(folder)))


@app.command("list")
def list_(
    hub: Annotated[bool, typer.Option(help="those on the Hub too")] = False,
    base_model: Annotated[str | None, typer.Option(help="only banks of this model")] = None,
    as_json: AsJson = False,
) -> None:
    """List the banks that come with steerlib, and those on the Hub."""
    found = sl.list_banks(base_model, local_files_only=not hub)
    text = "\n".join(f"{bank.name}  for {bank.base_model or 'a model'}{'  (shipped)' * bank.is_shipped}" for bank in found)
    said([asdict(bank) for bank in found], text, as_json)


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="recipe.toml; with --template, the kind of recipe to write")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the bank (default: out/<name>), or file of the template")] = None,
    work: Work = Path("out/work"),
    quick: Quick = False,
    template: Annotated[bool, typer.Option("--template", help=TEMPLATE)] = False,
    clean: Clean = False,
    model: Annotated[str, typer.Option(help="in place of the recipe's: folder, Hub id or package:<name>/<file>.gguf")] = "",
    dtype: Dtype = Precision.float32,
    threads: Threads = 0,
    dry_run: DryRun = False,
    tflops: Tflops = 0.0,
) -> None:
    """Train a bank from a recipe. Run it again to go on where it stopped."""
    if template:
        from .training.templates import write

        path = write(str(recipe or "text"), out or Path("recipe.toml"))
        console.print(f"written to {path}; edit it, then: steerlib train {path} --quick", markup=False, soft_wrap=True)
        return
    if recipe is None:
        raise BadRecipe("expected a recipe: steerlib train recipe.toml; steerlib train --template writes one to start from")
    from . import terminal

    read = sl.Recipe.from_file(recipe)
    if model:
        from .training.carry import on

        read = on(read, model, name=out.name if out else f"{read.name}-on-{Path(model).stem.lower()}")
    read = read.quick() if quick else read
    terminal.foretell(read, tflops, threads) if dry_run else terminal.train_to(read, out, work, clean, threads, dtype)


@app.command()
def port(
    bank: BankName,
    model: Annotated[str, typer.Argument(help="another model: folder, Hub id or package:<name>/<file>.gguf")],
    out: Annotated[Path | None, typer.Option(help="folder of the new bank; its name is the bank's (default: in out/)")] = None,
    concept: Annotated[list[str], typer.Option(help="only these; may be repeated")] = [],  # noqa: B006
    budget: Annotated[int, typer.Option(help="answers that the search may write for a concept (0: as the bank's)", min=0)] = 0,
    base: Annotated[str, typer.Option(help="id of the model, for the card (default: made from its place)")] = "",
    license: Annotated[str, typer.Option(help="of the new bank, as a Hub licence id (default: none is said)")] = "",
    work: Work = Path("out/work"),
    quick: Quick = False,
    clean: Clean = False,
    threads: Threads = 0,
) -> None:
    """Make a bank of the same concepts for another model, by the recipe of a bank."""
    from . import terminal
    from .training.carry import ported

    opened = sl.ConceptBank.from_pretrained(bank)
    name = out.name if out else f"{opened.name}-on-{Path(model).stem.lower()}"
    more: dict[str, Any] = {"name": name, "license": license, **({"budget": budget} if budget else {})}
    read = ported(recipe_of(opened, None), opened, model, concept, base=base, **more)
    terminal.train_to(read.quick() if quick else read, out, work, clean, threads)


@app.command()
def make(
    model: Annotated[str, typer.Argument(help="folder, Hub id or package:<name>/<file>.gguf")],
    names: Annotated[list[str], typer.Argument(help="what the concepts are about: a word or a few, in quotes")],
    out: Annotated[Path, typer.Option(help="folder of the bank")] = Path("out/made"),
    seed: Annotated[int, typer.Option(help="of all random choices", min=0)] = 0,
    prompts: Annotated[Path | None, typer.Option(help="of a pipeline: a file of prompts without the names, one a line")] = None,
    score: Annotated[str, typer.Option(help="of a pipeline: a CLIP model that scores (default: the pipeline itself)")] = "",
    steps: Annotated[int | None, typer.Option(help="of a pipeline: scheduler steps of a picture (default: 20)", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="of a pipeline: towards the prompt (default: its own)")] = None,
    work: Work = Path("out/work"),
    dtype: Dtype = Precision.float32,
    threads: Threads = 0,
    dry_run: DryRun = False,
    tflops: Tflops = 0.0,
) -> None:
    """Make concepts of a model from their names alone, a few minutes each. Run it again to go on where it stopped."""
    from . import terminal

    rate = tflops if dry_run else None
    how: dict[str, Any] = {"prompts": prompts, "score": score, "steps": steps, "guidance": guidance}
    terminal.make_to(names, model, out, work, threads, seed=seed, dtype=dtype, tflops=rate, **how)


@app.command()
def lint(recipe: Annotated[Path, typer.Argument(help="recipe.toml")], as_json: AsJson = False) -> None:
    """Find what spoils a recipe's contrast data, without a model. Exit code 1: errors; 0: nothing, or only advice."""
    found = sl.lint(sl.Recipe.from_file(recipe, to_train=False))
    said([asdict(one) for one in found], "\n".join(map(str, found)) or "nothing found", as_json)
    raise typer.Exit(int(any(one.level == "error" for one in found)))


@app.command("eval")
def eval_(
    bank: BankName,
    recipe: Annotated[Path | None, typer.Option(help="recipe with prompts and scorers (default: the bank's own)")] = None,
    concept: Annotated[list[str], typer.Option(help="only these; may be repeated")] = [],  # noqa: B006
    stored: Annotated[bool, typer.Option(help="show what the bank's maker measured, and measure nothing")] = False,
    quick: Annotated[bool, typer.Option(help="four prompts, one seed, 24 tokens: a look, not a measurement")] = False,
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON, and a picture beside them")] = None,
    save: Annotated[bool, typer.Option(help="write effects and card into the bank, which must be a folder")] = False,
    model: Model = "",
    against: Annotated[str, typer.Option(help="of latents: a bank of the same encoders trained from another seed")] = "",
    threads: Threads = 0,
) -> None:
    """Measure a bank's concepts on prompts never used before: beside prompting, random directions and other controls.

    Of a bank of latents: what its encoders keep of ordinary text, and what their latents tell of the recipe's attributes.
    """
    from .encoders import KINDS, Sparse
    from .evaluation.report import latents_table, missed, picture, summary_table, table

    opened = sl.ConceptBank.from_pretrained(bank)
    are_latents = any(issubclass(KINDS[facts.kind], Sparse) for facts in opened.encoders.values())
    if are_latents and (save or concept or quick):
        raise BadEdit("a bank of latents is measured encoder by encoder; leave out --concept, --quick and --save")
    if save:
        _check_saving(bank, bool(concept or quick or stored))
    if are_latents:
        found: Any = opened.provenance.get("quality") if stored else _eval_latents(opened, recipe, model, against, threads)
    elif stored:
        found = [dict(made) for name in concept or opened.concepts if "conditions" in (made := opened[name].effects)]
    else:
        found = _eval_concepts(opened, recipe, concept, quick, bank if save else "", model, threads)
    if not found:
        raise BadRecipe(f"bank {opened.name!r} stores no measurements; leave out --stored to make them")
    typer.echo(latents_table(found) if are_latents else f"{table(found)}\n\n{summary_table(found)}\n\n{missed(found)}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if not are_latents:
            out.with_suffix(".png").write_bytes(picture(found))


def _check_saving(bank: str, in_part: bool) -> None:
    if in_part:
        raise BadEdit("--save writes a card of all concepts, as measured whole; leave out --concept, --quick and --stored")
    if not Path(bank).is_dir():
        raise BadBank(f"--save writes into a folder, {bank!r} is none; copy the bank first: steerlib migrate {bank} FOLDER")


def _eval_concepts(
    bank: "sl.ConceptBank", recipe: Path | None, names: list[str], quick: bool, save: str, source: str, threads: int
) -> Any:
    from .training.package.directions import evaluate, with_effects

    for name in names:
        bank[name]
    read = recipe_of(bank, recipe)
    if hasattr(read, "levels") or not hasattr(read, "concepts"):
        what = f"bank {bank.name!r} is of pictures or contexts"
        raise BadRecipe(f"{what}; its figures are in its README.md, and steerlib train makes them anew")
    if quick:
        read = replace(read, evaluation_prompts=4, dev_prompts=4, seeds=1, new_tokens=24)
    model, tokenizer = loaded(source or (source_of(bank) if recipe is None else read.weights), threads)
    if save and (how := {*bank.fits(model).values()} - {"same weights", "same shapes"}):
        raise BadEdit(f"--save would keep the hash of other weights beside these figures ({', '.join(how)}); leave out --save")
    records = evaluate(model, tokenizer, bank, read, concepts=names)
    if save:
        with_effects(bank, read, records).save_pretrained(save)
    return records


def _eval_latents(bank: "sl.ConceptBank", recipe: Path | None, source: str, against: str, threads: int) -> Any:
    from .training.package.latents import evaluate_encoders
    from .training.package.pictures import evaluate_pictures
    from .training.recipe import TextEncoderRecipe

    own: Any = TextEncoderRecipe(name=bank.name, base=bank.base.id or "model", source=source or bank.base.id or "model")
    read = recipe_of(bank, recipe) if recipe or has_recipe(bank) or bank.levels else own
    twin = sl.ConceptBank.from_pretrained(against) if against else None
    model, tokenizer = loaded(source or (source_of(bank) if recipe is None else read.weights), threads)
    if tokenizer is None:
        return evaluate_pictures(model, bank, read, against=twin)
    return evaluate_encoders(model, tokenizer, bank, read, against=twin)


@app.command()
def examples(
    name: Annotated[str, typer.Argument(help="text, image or train: print this program")] = "",
    out: Annotated[Path | None, typer.Option(help="folder to copy the programs to")] = None,
) -> None:
    """List three short programs, print one of them, or copy them to a folder."""
    from . import terminal

    terminal.show_programs(name, out)


@app.command()
def study(
    model: Annotated[str, typer.Argument(help="an autoencoder or pipeline, a folder or module:name of your own; or a bank")],
    data: Annotated[Path, typer.Option(help="folder of pictures, .npz or .h5 with images and factors; of a bank prompts.txt")],
    out: Annotated[Path, typer.Option(help="folder of page, figures, pictures and bank")] = Path("out/study"),
    concept: Annotated[list[str], typer.Option(help="of a bank, only these; may be repeated")] = [],  # noqa: B006
    hidden: Annotated[str, typer.Option(help="site of the units that may be modular (default: the decoder's middle)")] = "",
    seed: Annotated[int, typer.Option(help="of all random choices", min=0)] = 0,
    threads: Threads = 0,
) -> None:
    """Study latents of an autoencoder, or concepts of a bank: what each does, how specifically, and what acts through it."""
    from . import terminal

    terminal.study(model, data, out, concept, hidden or None, seed, threads)


def _tell(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"steerlib {sl.__version__}")
        raise typer.Exit


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="show where in the code an error was raised")] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version", callback=_tell, is_eager=True)] = False,  # noqa: ARG001
) -> None:
    """Change what a generation model is thinking of, while it runs."""
    state.update(traceback=traceback)
    warnings.showwarning = lambda message, category, *_: typer.echo(f"{category.__name__}: {message}", err=True)
