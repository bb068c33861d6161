"""Concepts from their names: what the model writes is kept or dropped by rule, and a bank comes of it like any other.

The toy has random weights: these tests show that the stages work together, never that a concept was found.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_training import contents, toy
from tiny_models import toy_tokenizer

import steerlib as sl
from steerlib import cli, errors
from steerlib.bank.sentences import embed
from steerlib.evaluation.text import ABOUT, counting, nearness
from steerlib.training import named
from steerlib.training.carry import recipe_in
from steerlib.training.directions.written import KEPT, kept, written
from steerlib.training.entries import Pair
from steerlib.training.recipe import COMMON, DirectionRecipe

NAMES = ["river", "red stone"]
EVERYWHERE = "word-and-means-everywhere"


@pytest.fixture(scope="module", autouse=True)
def few():
    """Fewer and shorter answers than for a model that can write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(named, "FEW", {"dev_prompts": 2, "evaluation_prompts": 2, "seeds": 1, "new_tokens": 6, "is_brief": True})
        patch.setattr(named, "REFERENCE", 24)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bank of two names, its folder, and the folder of its model and its work."""
    folder = tmp_path_factory.mktemp("named")
    toy().save_pretrained(folder / "model")
    toy_tokenizer().save_pretrained(folder / "model")
    bank = sl.make(str(folder / "model"), NAMES, name="bank", work=folder / "work")
    return bank, bank.save_pretrained(folder / "bank"), folder


def test_names_give_a_bank_like_any_other(made):
    bank, folder, _ = made
    sl.ConceptBank.from_pretrained(folder).verify()
    levers = [concept for concept in bank.concepts.values() if concept.useful is not None]
    assert sorted(concept.name for concept in levers) == sorted(NAMES)
    for concept in levers:
        assert concept.unit > 0 and concept.natural and concept.range and concept.range[0] <= 0 < concept.useful
        tried = [tuple(trial[:2]) for trial in map(tuple, concept.effects["tried"])]
        screened = {trial for trial in tried if trial[0] != EVERYWHERE}
        assert len(screened) == 1 and tried.count((EVERYWHERE, "layers.1")) == 2  # two amounts; of others what is left of all
        uses_words = concept.effects["method"] != "difference-of-means"
        assert ("random word" in concept.effects["conditions"]) is uses_words
        assert f"| {concept.name} | {concept.label} |" in bank.card
    assert "from their names alone" in bank.card


def test_the_bank_carries_what_the_model_wrote(made):
    """So that it can be measured, and made, again."""
    bank, _, folder = made
    recipe = recipe_in(bank)
    assert isinstance(recipe, DirectionRecipe)
    (stored,) = (folder / "work").glob("pairs-*.json")
    for name, pairs in json.loads(stored.read_text()).items():
        concept = next(concept for concept in recipe.concepts if concept.name == name)
        assert [[p, a, b] for (p, a), (_, b) in zip(*recipe.read_shown(concept), strict=True)] == pairs and 2 <= len(
            pairs
        ) <= KEPT
        assert concept.scorer == {"near": name}


def test_the_command_goes_on_from_the_work_folder_and_ends_with_the_command_that_steers(made, tmp_path, capsys):
    _, bank, folder = made
    cli.make(str(folder / "model"), NAMES, out=tmp_path / "bank", work=folder / "work", threads=1)
    assert f"steerlib steer {tmp_path / 'bank'}" in capsys.readouterr().out
    assert contents(tmp_path / "bank") == contents(bank)


def test_a_seed_gives_the_same_answers_and_another_seed_others():
    prompts = [json.loads(line)["prompt"] for line in (COMMON / "prompts.jsonl").read_text().splitlines()][:6]
    once, again, other = (written(toy(), toy_tokenizer(), ["river"], prompts, seed=seed) for seed in (1, 1, 2))
    assert once == again != other


def test_kept_are_the_nearest_answers_that_do_not_repeat_themselves():
    about = "The waves of the sea rolled onto the beach, and far out a whale rose from the deep blue water."
    other = "The committee has moved its next meeting to Tuesday because two members are travelling."
    answers = [(about, other), (other, about), ("the ocean " * 12, other), (f"Yes. {about}", other)]
    pairs = [Pair("Tell me something.", *both) for both in answers]
    assert kept("ocean", pairs) == [pairs[0], pairs[3]]
    assert len(kept("ocean", [pairs[0]] * (KEPT + 3))) == KEPT
    with pytest.raises(errors.BadRecipe, match="does not write about 'ocean' when it is asked to: 1 of 3 answers"):
        kept("ocean", pairs[:3])


def test_a_brief_recipe_is_another_one(made):
    """So that a work folder keeps apart what each of them made."""
    recipe = recipe_in(made[0])
    assert isinstance(recipe, DirectionRecipe) and recipe.is_brief
    assert replace(recipe, is_brief=False).digest != recipe.digest


def test_nearness_is_the_cosine_with_the_mean_of_sentences_about_the_name():
    texts = ["A ship on the sea.", "Two meetings on Monday."]
    mean = np.mean([embed([said.format("ocean")])[0] for said in ABOUT], axis=0)
    expected = [float(embed([text])[0] @ mean) for text in texts]
    assert nearness("ocean")(texts) == pytest.approx(expected, abs=1e-5) and expected[0] > expected[1] + 0.1
    near: Any = counting({"near": "ocean"})
    assert near(texts) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["cooking", "music", "sports", "science", "finance", "nature"])
def test_nearness_tells_texts_about_a_name_from_others(name):
    """Texts that were written for another scorer: the share of pairs in which the one about the name is nearer to it."""
    path = COMMON.parent / "smollm2-135m-instruct" / "scoring" / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    near = nearness(name)([line["text"] for line in lines])
    labels = np.array([line["label"] for line in lines])
    assert (near[labels == 1][:, None] > near[labels == 0]).mean() > 0.9


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([], "expected a name or more"),
        ([" "], "1 to 100 printable letters"),
        (["red", "Red"], "each name once"),
        (["red  stone"], "one space between"),
        (["answering"], "other than 'answering'"),
        (["a/b"], "without slashes"),
    ],
)
def test_names_that_no_bank_could_have_are_refused_before_a_model_is_loaded(names, match):
    with pytest.raises(errors.BadRecipe, match=match):
        sl.make("nowhere", names)


def test_models_and_names_that_cannot_work_are_refused():
    with pytest.raises(errors.UnsupportedTarget, match="tokenizer beside a model"):
        sl.make(toy(), "river")
    with pytest.raises(errors.BadRecipe, match="cannot write 'volcano'"):
        sl.make(toy(), "volcano", tokenizer=toy_tokenizer())


def test_the_recipe_of_the_measured_names_is_read_and_its_scorer_knows_them():
    read = DirectionRecipe.from_file(Path(COMMON).parent / "named" / "test" / "recipe.toml", to_train=False)
    assert len(read.concepts) == 10
    for concept in read.concepts:
        found = read.read_scoring(concept)
        assert (len(found.positive), found.others, len(concept.asked)) == (8, True, 3)
    with pytest.raises(errors.BadRecipe, match="expected pairs/"):
        read.check()
