"""What spoils contrast data: clean data is silent, every planted fault is found where it is, shipped recipes have no error."""

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import steerlib as sl
from steerlib.errors import BadRecipe
from steerlib.training.picture_recipe import PictureRecipe
from steerlib.training.recipe import TextEncoderRecipe

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "concept_banks" / "recipes"
DRAW = random.Random(0)
VOCABULARY = ["".join(DRAW.choice("bdfgklmnprstvz") + DRAW.choice("aeiou") for _ in range(3)) for _ in range(300)]
STORM = ["storm", "thunder", "lightning", "hail", "gale", "gust", "downpour", "squall", "cloudburst", "blizzard"]
TOML = """
name = "toy"
base = "toy"
source = "toy"
[[concepts]]
name = "tempest"
label = "storm and thunder"
"""


def sentence(draw, *words):
    """Twelve words that nothing says anything about, and some that matter."""
    found = [*draw.sample(VOCABULARY, 12), *words]
    draw.shuffle(found)
    return f"{' '.join(found).capitalize()}."


def data() -> dict[str, list[dict[str, Any]]]:
    """Pairs of which one side has words of storms, scoring texts alike, and held-out ones."""
    draw = random.Random(1)

    def stormy():
        return sentence(draw, *draw.sample(STORM, 4))

    def calm():
        return sentence(draw, *draw.sample(VOCABULARY, 4))

    pairs = [{"prompt": f"What about {sentence(draw)}", "positive": stormy(), "negative": calm()} for _ in range(24)]
    scoring = [{"text": make(), "label": label} for label, make in ((1, stormy), (0, calm)) for _ in range(30)]
    held = [{"text": stormy(), "concept": "tempest"} for _ in range(5)]
    return {"pairs/tempest.jsonl": pairs, "scoring/tempest.jsonl": scoring, "held_out.jsonl": held}


def written(folder, files, toml=TOML):
    for name, lines in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.toml").write_text(toml)
    return folder / "recipe.toml"


def found(folder, files, toml=TOML):
    return sl.lint(sl.Recipe.from_file(written(folder, files, toml)))


def test_clean_data_is_silent(tmp_path):
    assert found(tmp_path, data()) == []


def on(side, change, every=1, start=0):
    """A fault in the texts of one side of the pairs."""

    def plant(files):
        for k, pair in enumerate(files["pairs/tempest.jsonl"]):
            if k % every == start:
                pair[side] = change(pair[side], k)

    return plant


def copied(target, key, line, source, other, number):
    """A text of one file in another; a line is that of `target`, from 0."""

    def plant(files):
        files[target][line][key] = files[source][number][other]

    return plant


def nearly(files):
    first = files["pairs/tempest.jsonl"][0]["negative"].split()
    files["pairs/tempest.jsonl"][7]["negative"] = " ".join(["Truly", *first[1:]])


def kept(files):
    lines = (RECIPES / "common" / "prompts.jsonl").read_text().splitlines()
    prompt = next(line["prompt"] for line in map(json.loads, lines) if line["split"] == "evaluation")
    files["pairs/tempest.jsonl"][3]["prompt"] = f"{prompt.upper()} "


def few(files):
    files["scoring/tempest.jsonl"] = files["scoring/tempest.jsonl"][16:]


def gardens(files):
    """No word is in half of the texts, but together they tell the sides apart; and nothing marks the concept itself."""
    draw = random.Random(2)
    beds = [f"{start}{end}" for start in ("rose", "lawn", "hedge") for end in ("bed", "row", "pot", "wall", "path")]
    for pair in files["pairs/tempest.jsonl"]:
        pair["positive"] = sentence(draw, *draw.sample(beds, 4))


PAIRS, SCORING, HELD = "pairs/tempest.jsonl", "scoring/tempest.jsonl", "held_out.jsonl"
FAULTS: dict[str, tuple[Callable[[Any], None], str, str, str, str]] = {
    "one letter": (on("positive", lambda *_: "A", 24, 4), "error", "empty", f"{PAIRS} 5", "'A' is no sentence"),
    "cut": (
        on("negative", lambda text, _: text[:-3], 8, 1),
        "advice",
        "cut",
        f"{PAIRS} 2, 10, 18",
        "3 of 108 texts end without a mark",
    ),
    "duplicate": (copied(PAIRS, "positive", 9, PAIRS, "positive", 2), "error", "twice", f"{PAIRS} 10", "stands there again"),
    "near duplicate": (nearly, "advice", "twice", f"{PAIRS} 8", "is nearly another text"),
    "both sides": (
        copied(PAIRS, "positive", 5, PAIRS, "negative", 5),
        "error",
        "both sides",
        f"{PAIRS} 6",
        "stands on the other side too",
    ),
    "scoring": (copied(SCORING, "text", 3, PAIRS, "positive", 5), "error", "leak", f"{SCORING} 4", "is in the pairs too"),
    "held out": (copied(HELD, "text", 1, PAIRS, "positive", 6), "error", "leak", f"{HELD} 2", "is in the pairs too"),
    "scored held out": (copied(HELD, "text", 2, SCORING, "text", 6), "error", "leak", f"{HELD} 3", "in the scoring texts too"),
    "prompt": (kept, "error", "leak", f"{PAIRS} 4", "is kept for measuring"),
    "length": (
        on("positive", lambda text, k: f"{text} {sentence(random.Random(k))}"),
        "advice",
        "length",
        PAIRS,
        "texts with it have 28 words on average, those without 16",
    ),
    "balance": (few, "advice", "balance", SCORING, "14 texts with it and 30 without"),
    "own words": (
        on("negative", lambda text, _: text.replace(".", " thundering."), 12, 2),
        "advice",
        "own words",
        f"{PAIRS} 3, 15",
        "texts without it say 'thundering', as texts with it do",
    ),
    "topic": (
        on("positive", lambda text, _: text.replace(".", " garden.")),
        "advice",
        "words",
        PAIRS,
        "'garden' in 24 of 24 texts with it, 0 of the others",
    ),
    "topic without it": (
        on("negative", lambda text, _: text.replace(".", " office."), 2, 1),
        "advice",
        "words",
        PAIRS,
        "'office' in 12 of 24 texts without it, 0 of the others",
    ),
    "bag of words": (gardens, "advice", "words", PAIRS, "of the scoring texts: they are not the concept's"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_planted_fault_is_found_where_it_is_and_nothing_else(name, tmp_path):
    plant, level, kind, where, what = FAULTS[name]
    files = copy.deepcopy(data())
    plant(files)
    findings = found(tmp_path, files)
    assert [(one.level, one.concept, one.kind) for one in findings] == [(level, "tempest", kind)], [*map(str, findings)]
    assert findings[0].where.startswith(where) and what in findings[0].what and findings[0].do, str(findings[0])


def test_a_word_of_the_concept_marks_one_side_and_is_no_fault(tmp_path):
    """It is in every text with the concept: its label says so, or the scoring texts do; without either it may be a fault."""
    files = data()
    for pair in files[PAIRS]:
        pair["positive"] = pair["positive"].replace(".", " umbrella.")
    assert [one.kind for one in found(tmp_path, files)] == ["words"]
    assert found(tmp_path, files, TOML.replace("storm and", "umbrellas in storm and")) == []
    for line in files[SCORING]:
        line["text"] = line["text"].replace(".", " umbrella.") if line["label"] else line["text"]
    assert found(tmp_path, files) == []


def test_examples_in_the_recipe_are_named_by_their_number(tmp_path):
    pairs = data()[PAIRS][:10]
    pairs[3]["positive"] = "A"
    sides = {side: json.dumps([pair[side] for pair in pairs]) for side in ("positive", "negative")}
    toml = TOML + "".join(f"{side} = {texts}\n" for side, texts in sides.items())
    assert [one.where for one in found(tmp_path, {}, toml) if one.level == "error"] == ["positive 4"]


SHIPPED = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("recipe.toml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_have_no_error(name):
    recipe = sl.Recipe.from_file(RECIPES / name, to_train=False)
    if isinstance(recipe, PictureRecipe):
        with pytest.raises(BadRecipe, match="no contrast data of text"):
            sl.lint(recipe)
        return
    findings = sl.lint(recipe)
    assert [one for one in findings if one.level == "error"] == []


def test_a_recipe_without_contrast_data_is_refused():
    with pytest.raises(BadRecipe, match="'toy' has no contrast data"):
        sl.lint(TextEncoderRecipe(name="toy", base="toy", source="toy"))


@pytest.mark.parametrize(("name", "code"), [("duplicate", 1), ("cut", 0), (None, 0)])
def test_the_command_line_ends_with_1_on_errors_alone(name, code, tmp_path):
    files = data()
    if name is not None:
        FAULTS[name][0](files)
    path = written(tmp_path, files)
    said = {}
    for option in ((), ("--json",)):
        done = subprocess.run(
            [sys.executable, "-m", "steerlib", "lint", path, *option], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == code, done.stderr
        said[option] = done.stdout
    expected = sl.lint(sl.Recipe.from_file(path))
    assert said[()] == ("\n".join(map(str, expected)) or "nothing found") + "\n"
    assert json.loads(said["--json",]) == [asdict(one) for one in expected]
