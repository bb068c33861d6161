"""The command line, in processes of its own."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from PIL import Image
from test_bank import make
from tiny_models import tiny, toy_tokenizer

import steerlib as sl
from steerlib.evaluation.report import summary_table, table

ROOT = Path(__file__).parent.parent


def run(*arguments, code=0, **environment):
    command = [sys.executable, "-m", "steerlib", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    assert done.returncode == code, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


def printed(*arguments, **environment):
    """What a command prints for machines: JSON and nothing else."""
    command = [sys.executable, "-m", "steerlib", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=True)
    return json.loads(done.stdout)


COMMANDS = [
    "demo",
    "port",
    "steer",
    "make",
    "train",
    "eval",
    "concepts",
    "info",
    "graph",
    "examples",
    "study",
    "list",
    "pull",
    "push",
    "verify",
    "migrate",
]


def test_help_lists_the_commands():
    text = run("--help")
    assert all(command in text for command in COMMANDS)
    assert "completion" in text
    assert run("--version") == f"steerlib {version()}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    text = run(command, "--help", COLUMNS="200")
    assert "Usage" in text and "--help" in text


def test_banks_can_be_listed_searched_shown_and_verified():
    assert "smollm2-135m-instruct" in run("list")
    assert "sports" in run("concepts", "smollm2-135m-instruct", "games, matches and athletes")
    assert "What was measured" in run("info", "smollm2-135m-instruct")
    assert "every file as it should be" in run("verify", "smollm2-135m-instruct")


def test_what_is_refused_is_one_line_without_a_traceback(tmp_path):
    text = run("verify", "no such bank", code=1)
    assert "BadBank" in text and "Traceback" not in text
    assert "expected --edit concept=amount" in run("steer", "smollm2-135m-instruct", "hello", "-e", "sports", code=1)
    assert "did you mean 'sports'" in run("steer", "smollm2-135m-instruct", "hello", "-e", "sprots=1", code=1)
    assert "BadRecipe" in run("train", tmp_path / "recipe.toml", code=1)


def test_a_bank_is_pushed_listed_pulled_and_verified_from_the_command_line(tmp_path):
    hub = Hub()
    there = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    folder = make().save_pretrained(tmp_path / "made")
    commit = printed("push", folder, "org/made", HF_TOKEN="secret", **there)["commit"]
    assert hub.repos["org/made"]["refs"]["main"] == commit and not hub.repos["org/made"]["private"]
    assert printed("list", "--hub", "--base-model", "org/model", **there) == [
        {"name": "org/made", "base_model": "org/model", "is_shipped": False}
    ]
    pulled = Path(printed("pull", "org/made", "--revision", commit, **there)["folder"])
    assert (
        pulled.name == commit and (pulled / "bank.json").read_bytes() == hub.repos["org/made"]["commits"][commit]["bank.json"]
    )
    hub.shutdown()
    hub.server_close()
    assert printed("verify", "org/made", "--revision", commit, **there) == {"name": "made", "concepts": 3, "signed": False}
    assert [c["name"] for c in printed("concepts", pulled)] == [f"concept {i}" for i in range(3)]
    assert printed("info", pulled)["base_model"] == "org/model"
    assert "NotReached" in run("pull", "org/other", code=1, **there)


def test_exit_codes_tell_refusal_misspelling_and_distrust_apart_and_tracebacks_come_when_asked(tmp_path):
    folder = make().save_pretrained(tmp_path / "made")
    assert run("migrate", folder, tmp_path / "new").endswith("new")
    assert (tmp_path / "new" / "bank.json").read_bytes() == (folder / "bank.json").read_bytes()
    (folder / "README.md").write_text("# altered")
    text = run("verify", folder, code=3)
    assert "CorruptBank: README.md is not the file that bank.json describes" in text and "Traceback" not in text
    assert "Traceback" in run("--traceback", "verify", folder, code=1)
    run("verify", "--no-such-option", folder, code=2)
    run("verify", tmp_path / "none", code=1)


def test_what_the_maker_of_a_bank_measured_is_shown_again(tmp_path):
    text = run("eval", "smollm2-135m-instruct", "--stored", "--out", tmp_path / "figures.json")
    bank = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
    records = json.loads((tmp_path / "figures.json").read_text())
    assert records == [concept.effects for concept in bank.concepts.values() if concept.useful is not None]
    assert " ".join(table(records).split()) in text and " ".join(summary_table(records).split()) in text
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_a_bank_without_measurements_says_so(tmp_path):
    bank = sl.ConceptBank.from_directions({"a": torch.ones(32)}, site="layers.0", base=tiny("llama"))
    assert "stores no measurements" in run("eval", bank.save_pretrained(tmp_path / "bank"), "--stored", code=1)
    assert "not measured: sl.calibrate(model, bank, ['name'], judge=…)" in run("concepts", tmp_path / "bank")


def test_a_bank_without_a_recipe_is_steered_in_the_model_it_names(tmp_path):
    """A bank that was just made, in a folder, of a model that is a folder."""
    model, bank = tmp_path / "model", tmp_path / "bank"
    (llama := tiny("llama", vocab_size=64)).save_pretrained(model)
    toy_tokenizer().save_pretrained(model)
    made = sl.ConceptBank.from_directions({"a": torch.ones(32)}, site="layers.0", base=llama)
    made.base = replace(made.base, id=str(model))
    made.save_pretrained(bank)
    text = run("steer", bank, "the bird", "-e", "a=3", "--tokens", 4, "--threads", 1)
    assert "unsteered" in text and "layers.0" in text and "threads: 1" in text
    assert "comes without its recipe" in run("eval", bank, code=1)


def test_pictures_are_drawn_with_and_without_steering(tmp_path):
    out = tmp_path / "steered.png"
    text = run("steer", "scenes-32", "a red square at night", "-e", "blue=1", "--out", out)
    assert "blue" in text and out.read_bytes().startswith(b"\x89PNG")
    with Image.open(out) as picture:  # two of 32 pixels, large enough to be looked at
        assert picture.height >= 256 and picture.width > 2 * 256


@pytest.mark.parametrize(("arguments", "said", "code"), [
    (("steer", "smollm2-135m-instruct", "hi"), "expected an --edit or more: -e formality=", 1),
    (("steer", "smollm2-135m-instruct", "hi", "-e", "sports=set:a"), "add:NUMBER, set:NUMBER, scale:NUMBER", 1),
    (("steer", "smollm2-135m-instruct", "hi", "-e", "sports=nan"), "a number or one of", 1),
    (("steer", "smollm2-135m-instruct", "hi", "-e", "sports=1", "-e", "sports=2"), "edited twice", 1),
    (("steer", "smollm2-135m-instruct", "hi", "-e", "answering=1"), "is a gate", 1),
    (("steer", "scenes-32", "hi", "-e", "night.where=1"), "is a gate", 1),
    (("steer", "smollm2-135m-latents", "hi", "-e", "layers.15/17=useful"), "no useful amount is known", 1),
    (("steer", "scenes-32", "hi", "-e", "blue=useful", "--out", "x.gif"), "a .png file", 1),
    (("steer", "smollm2-135m-instruct", "hi", "-e", "sports=1", "--tokens", "-3"), "greater than or equal to 1", 2),
    (("demo", "--only", "txt"), "'txt' is not one of 'text', 'images'", 2),
    (("migrate", "concept_banks/scenes-32", "concept_banks/scenes-32"), "is there already and stays as it is", 1),
    (("train",), "steerlib train --template writes one", 1),
    (("train", "--template", "latnts"), "one of text, latents, graph, pictures", 1),
    (("eval", "scenes-32"), "is of pictures or contexts", 1),
])  # fmt: skip
def test_what_a_person_mistypes_is_one_message_without_a_traceback(arguments, said, code):
    text = " ".join(run(*arguments, code=code, COLUMNS="300").split())
    assert said in text.replace("│", "") and "Traceback" not in text


def test_a_template_is_written_once(tmp_path):
    path = tmp_path / "recipe.toml"
    assert "written to" in run("train", "--template", "--out", path)
    assert sl.Recipe.from_file(path).name == "my-concepts"
    assert "stays as it is" in run("train", "--template", "latents", "--out", path, code=1)


@pytest.mark.parametrize(("text", "expected"), [
    ("a=2", sl.Add(2.0)), ("a=add:-2", sl.Add(-2.0)), ("a=set:1.5", sl.Set(1.5)), ("a=scale:0.5", sl.Scale(0.5)),
    ("a=do:0.5", sl.Do(0.5)), ("a=clamp:-1:1", sl.Clamp(-1.0, 1.0)), ("a=ablate", sl.Ablate()), ("a=swap:b", sl.Swap("b")),
    ("a=useful", sl.Set(3.0)),
])  # fmt: skip
def test_edits_are_read_as_they_are_typed(text, expected):
    from steerlib.terminal import read_edits

    bank = sl.ConceptBank.from_directions({"a": torch.ones(32)}, site="layers.0", base=tiny("llama"))
    bank = bank.with_concepts([replace(bank["a"], useful=3.0, useful_as="Set")])
    assert read_edits(bank, [text]) == {"a": expected}


def test_pictures_of_a_bank_that_was_just_made_are_steered_and_measured_with_no_further_option(tmp_path):
    """Trained by the command line; the command that it prints at the end works."""
    import shlex

    lines = [json.dumps({"text": f"a {hue} square at night"}) for hue in ("red", "green", "blue") * 3]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    (tmp_path / "recipe.toml").write_text(f"""
name = "pictures"
base = "scenes"
source = "{ROOT / "concept_banks" / "scenes-32" / "pipeline"}"
corpus = ["prompts.jsonl"]
tokens = 512
encoders = [{{ site = "unet.mid_block.attentions.0", level = 500, kind = "topk", latents = 32, k = 4, batch = 64 }}]
""")
    bank = tmp_path / "bank"
    command = [sys.executable, "-m", "steerlib", "train", tmp_path / "recipe.toml", "--out", bank, "--work", tmp_path / "work"]
    done = subprocess.run([*map(str, command), "--threads", "1"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "\x1b" not in done.stderr and "stage 2 of 3" in done.stderr, done.stderr
    said = shlex.split(next(line for line in done.stdout.splitlines() if line.startswith("try it:")).removeprefix("try it:"))
    assert said[:4] == ["steerlib", "steer", str(bank), "a red square at night"]
    out = tmp_path / "new" / "drawn.png"
    assert str(out) in run(*said[1:], "--steps", 2, "--samples", 2, "--out", out, "--threads", 1)
    assert out.read_bytes().startswith(b"\x89PNG")
    stored = json.loads((bank / "bank.json").read_text())["provenance"]["quality"]
    run("eval", bank, "--threads", 1, "--out", tmp_path / "figures.json")
    for id, figures in json.loads((tmp_path / "figures.json").read_text()).items():
        assert {key: figures[key] for key in ("explained", "l0")} == pytest.approx(
            {k: stored[id][k] for k in ("explained", "l0")}, rel=1e-3
        )


@pytest.mark.real
def test_a_prompt_is_answered_with_and_without_steering():
    text = run("steer", "smollm2-135m-instruct", "How are you?", "-e", "sports=1", "--tokens", "8")
    assert "unsteered" in text and "passes" in text


def test_scripts_explain_themselves():
    for script in ("train_bank.py", "bench_steering.py"):
        done = subprocess.run([sys.executable, ROOT / "scripts" / script, "--help"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and "Usage" in done.stdout, done.stderr


def test_a_wheel_contains_the_banks_whole_and_no_package_called_hooks(tmp_path):
    """Build it, unpack it, and open the shipped bank from what was unpacked."""
    import zipfile

    source = tmp_path / "source"  # where nothing is left of an earlier build
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "out", "*.egg-info", "tests"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source]
    subprocess.run([*map(str, command)], check=True, capture_output=True, cwd=tmp_path)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "installed")
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"steerlib", f"steerlib-{version()}.dist-info"}
    own = {p.relative_to(ROOT).as_posix() for p in (ROOT / "steerlib").rglob("*.py")}
    parts = {"hooks": ROOT, "concept_banks": ROOT, "examples": ROOT / "scripts"}
    own |= {f"steerlib/{p.relative_to(at).as_posix()}" for part, at in parts.items() for p in (at / part).rglob("*.py")}
    assert own == {name for name in names if name.endswith(".py")} and "steerlib/graph/page.html" in names
    check = (
        "import steerlib as sl; b = sl.ConceptBank.from_pretrained('smollm2-135m-instruct'); b.verify(); print(sl.__file__);"
        "import steerlib.cli as c; r = c.recipe_of(b, None); r.check();"
        "print(len(r.read_shown(r.concepts[0]).positive))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed")},
    )
    assert str(tmp_path / "installed") in done.stdout and done.stdout.split()[-1] == "24", done.stderr


def version():
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_public_help_is_not_empty():
    assert all((getattr(sl, name).__doc__ or "").strip() for name in sl.__all__)
