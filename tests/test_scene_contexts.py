"""What a context module of scenes is trained and measured on: no prompt names two values, and cases show none."""

import contexts
import numpy as np
import pytest
from contexts import CAUSES, DONE, cases, prompts, recipes, shows, table
from scenes import world

WORDS = {
    cause.value: {word for phrase in world.WORDS[cause.factor][cause.value] for word in phrase.split()} - {"at", "by"}
    for cause in CAUSES
}
"""Words that captions have for a value and for nothing else."""


def named(caption: str) -> set[str]:
    return {value for value, words in WORDS.items() if words & {*caption.split()}}


def test_a_prompt_of_training_names_its_own_value_and_never_two():
    for value, pairs in prompts(40, 0).items():
        assert len(pairs) == 40
        assert all(named(done) == {value} and len(named(plain)) <= 1 for done, plain in pairs)
    mixed = recipes(8, 0)["labels shuffled"].read_pairs()
    assert {value for done, _ in mixed["night"] for value in named(done)} == {cause.value for cause in CAUSES}


def test_what_is_measured_shows_none_of_the_values_and_the_truth_of_a_pair_shows_both():
    asked = cases(20, 0)
    assert not any(shows(asked.factors, cause).any() for cause in CAUSES)
    both = world.solve(asked.noise, {**CAUSES[0].sets, **CAUSES[1].sets})
    assert shows(both, CAUSES[0]).all() and shows(both, CAUSES[1]).all()
    captions = world.captions(asked.factors, seed=(0, contexts.CASES))
    assert np.array([named(caption) == set() for caption in captions]).all()


def test_the_table_counts_pairs_that_reach_both_bars_and_shows_the_ends_over_seeds():
    values = {" + ".join(cause.value for cause in done): [*[0.9] * len(done), 0.96] for done in DONE}
    poor = {**values, "night + blue": [0.9, 0.84, 1.0], "night + circle": [1.0, 1.0, 0.94]}
    about = {"cases": 4, "prompts": 9, "machine": "m", "torch": "t"}
    shown = table({"runs": [{"good": values, "poor": poor}], **about})
    assert "| pairs that reach both bars | 6 of 6 | 4 of 6 |" in shown and "seeds" not in shown
    assert "| night + blue | 0.90, 0.90 / 0.96 | 0.90, 0.84 / 1.00 |" in shown
    shown = table({"runs": [{"mixed": values}, {"mixed": poor}], **about})
    assert "| pairs that reach both bars | 5 (4–6) of 6 |" in shown and "Means over 2 seeds" in shown
    assert "| night + blue | 0.90, 0.87 (0.84–0.90) / 0.98 (0.96–1.00) |" in shown


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.value)
def test_an_object_that_is_not_there_shows_nothing(cause):
    asked = world.draw(300, seed=5)
    one = {**asked.factors, "count": np.zeros_like(asked.factors["count"])}
    other = {**one, **{f"{cause.factor}.1": np.zeros_like(one["count"])}}
    assert np.array_equal(shows(one, cause), shows(other, cause))
