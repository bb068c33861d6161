"""The shipped scenes model and its bank: real effects against the truth, beside chance."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenes import judges, world
from scenes.experiment import Experiment
from scenes.measures import Cause, every

import steerlib as sl
from steerlib.errors import OutOfRange
from steerlib.evaluation.pictures import draw_as_told
from steerlib.training import store
from steerlib.training.carry import recipe_in
from steerlib.training.discover.concept_graph import randomised

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "concept_banks" / "recipes" / "scenes-32" / "measured.json"


@pytest.fixture(scope="module")
def bank():
    return sl.ConceptBank.from_pretrained("scenes-32")


@pytest.fixture(scope="module")
def pipe(bank):
    found, none = sl.load(str(bank.folder / "pipeline"))
    assert none is None
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def experiment(pipe, bank):
    return Experiment(pipe, bank, judges.load("scenes"), seed=9)


def test_the_model_draws_what_it_is_told(pipe):
    judge, asked = judges.load("scenes"), world.draw(32, seed=(4, 4))
    drawn = draw_as_told(pipe, world.captions(asked.factors), steps=10)
    found = judges.accuracy(judge.read(drawn), judges.truth("scenes", asked.factors))
    assert min(found[name] for name in ("shape", "hue", "size", "scene")) >= 0.93, found
    shuffled = judges.accuracy(judge.read(asked.pixels[::-1].copy()), judges.truth("scenes", asked.factors))
    assert shuffled["scene"] < 0.6
    red = judge.read(np.array(pipe("a red square at night", num_inference_steps=10).images[0])[None])
    assert red["scene"] == world.SCENES.index("night")
    there = red["shape"][0] > 0
    assert there.any() and (red["hue"][0][there] == list(world.HUES).index("red")).all()


def test_the_shipped_model_does_not_say_where_it_was_made(bank):
    files = [*(bank.folder / "pipeline").rglob("*.json")]
    assert files and not any("_name_or_path" in path.read_text() for path in files)


def test_every_value_that_captions_name_has_a_concept_made_from_captions_alone(bank):
    assert {*bank.concepts} >= {cause.value for cause in every()}
    recipe: Any = recipe_in(bank)
    assert {c.name for c in recipe.concepts} == {cause.value for cause in every()}
    for concept in recipe.concepts:
        assert len({pair for part in recipe.read_splits(concept) for pair in part}) == 68


def test_figures_of_the_readme_are_those_that_judges_gave_of_this_bank(bank):
    found = json.loads(MEASURED.read_text())
    assert [*found] == [cause.value for cause in every()]
    for value, own in found.items():
        assert own["chosen"] == [bank[value].effects["edit"], bank[value].effects["amount"], bank[value].source]


@pytest.mark.parametrize("value", ["night", "stone", "blue"])
def test_a_concept_moves_its_factor_and_a_random_direction_does_not(experiment, bank, value):
    (cause,) = (cause for cause in every() if cause.value == value)
    case, edits = experiment.case(cause, 12, 9), experiment.lever(cause)
    found = experiment.effect(case, edits)
    assert found.effectiveness >= 0.85 and found.preservation >= 0.9, found
    assert experiment.effect(case, edits, randomised(bank, bank[value], 0)).effectiveness <= 0.35


def test_no_edit_changes_nothing_and_an_edit_taken_back_neither(experiment, bank):
    case = experiment.case(Cause("hue", "blue"), 4, 8)
    assert (experiment.draw(case.captions, {"violet": sl.Add(0.0)}) == case.before).all()
    with pytest.warns(OutOfRange), sl.steer(experiment.pipe, bank, {"violet": sl.Add(-2.0)}, branch="cond", allow_ood=True):
        back = experiment.draw(case.captions, {"violet": sl.Add(2.0)})
    assert np.abs(back.astype(int) - case.before).mean() < 0.5
    assert np.abs(experiment.draw(case.captions, {"violet": sl.Add(2.0)}).astype(int) - case.before).mean() > 1


# -- the same commands, smaller ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory, pipe):
    """A folder with a model of few pictures, which starts from the shipped model's words."""
    folder = tmp_path_factory.mktemp("made")
    store.save(folder / "words.safetensors", pipe.text_encoder.state_dict())
    few = ("--images", 1120, "--lr", 4e-3, "--look-every", 1120, "--look-at", 24, "--check", 0)
    command = [sys.executable, ROOT / "scripts" / "train_scenes.py", folder, *few]
    subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True)
    return folder


def test_a_model_of_few_pictures_knows_types_of_scenes(made):
    (look,) = [json.loads(line) for line in (made / "curve.jsonl").read_text().splitlines()]
    assert look["scene"] >= 0.5 and look["light"] >= 0.5, look  # a quarter by chance
    assert (made / "curve.png").is_file()
