"""Cards as the Hub reads them."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import SOURCE
from huggingface_hub import ModelCard
from test_bank import make
from tiny_models import tiny

import steerlib as sl
from steerlib import errors
from steerlib.bank.card import for_hub
from steerlib.evaluation.report import table

SHIPPED = "smollm2-135m-instruct"
METRICS = ("score", "ratio", "specificity", "kl")


def card_of(bank, repo="org/made"):
    return for_hub(bank.card, bank.name, repo, bank.base.id, bank.license, list(bank.concepts.values()))


def test_metadata_says_what_was_measured_and_the_body_stays():
    bank = sl.ConceptBank.from_pretrained(SHIPPED)
    card = ModelCard(card_of(bank, "org/made"))
    data = card.data.to_dict()
    assert (data["library_name"], data["base_model"], data["license"]) == ("steerlib", bank.base.id, "apache-2.0")
    assert {"steerlib", "steering", "concepts"} <= set(data["tags"])
    stored = {(m["type"], m["value"]) for result in data["model-index"][0]["results"] for m in result["metrics"]}
    levers = [c for c in bank.concepts.values() if c.useful is not None]
    said = {(c.name, key, value) for c in levers for key, value in c.effects["conditions"]["steered"].items() if key in METRICS}
    assert stored == {(f"{name}: {key}", value) for name, key, value in said}
    assert {key for _, key, _ in said} == {*METRICS} and len(said) >= 4 * len(levers) - 1  # the ratio of one is undefined
    assert table([levers[0].effects]).splitlines()[-1] in card.content
    assert 'from_pretrained("org/made")' in card.content and f'from_pretrained("{SHIPPED}")' not in card.content


def test_a_maker_keeps_metadata_of_their_own():
    bank = make().with_concepts(
        card="---\nlanguage: en\ntags: [mine, steering]\nlicense: mit\nmodel-index: []\n---\n# Words of mine\n"
    )
    data = ModelCard(card_of(bank)).data.to_dict()
    assert data["language"] == "en" and data["tags"] == ["steerlib", "steering", "concepts", "mine"]
    assert data["license"] == "apache-2.0" and "# Words of mine\n" in card_of(bank)
    bank = bank.with_concepts(license="")
    assert ModelCard(card_of(bank)).data.to_dict()["license"] == "mit"
    with pytest.raises(errors.CorruptBank, match="not YAML"):
        card_of(bank.with_concepts(card="---\na: [\n---\nwords"))


def test_a_bank_without_a_card_gets_one_of_what_it_holds():
    bank = sl.ConceptBank.from_directions({"a|b": torch.ones(32)}, site="layers.0", base=tiny("llama"))
    concepts = [replace(bank["a|b"], label="pipes | and\nlines", useful=2.0, range=(-1.0, 3.0))]
    card = card_of(bank.with_concepts(concepts))
    assert (
        "| a\\|b | pipes \\| and lines | +2.00 | -1.00 to +3.00 |" in card and "sl.steer(model, bank, {'a|b': +2.00})" in card
    )


@pytest.mark.real
def test_the_example_runs_as_it_is():
    """On the shipped bank, with the model from a package instead of the Hub."""
    bank = sl.ConceptBank.from_pretrained(SHIPPED).with_concepts(card="")
    code = re.findall(r"```python\n(.*?)```", card_of(bank, SHIPPED), re.DOTALL)
    assert len(code) == 1
    exec(code[0].replace(bank.base.id, SOURCE).replace("=60", "=4"), {})


@pytest.mark.real
@pytest.mark.parametrize("name", [SHIPPED, "smollm2-135m-latents"])
def test_the_example_of_a_shipped_card_runs_as_it_is(name, real, monkeypatch):
    monkeypatch.setattr(sl, "load", {SOURCE: real}.__getitem__)
    code = re.findall(r"```python\n(.*?)```", sl.ConceptBank.from_pretrained(name).card, re.DOTALL)
    assert len(code) == 1
    exec(code[0].replace("=60", "=4"), {})


def test_a_shipped_card_carries_its_own_figures_and_picture():
    bank = sl.ConceptBank.from_pretrained(SHIPPED)
    results: Any = ModelCard(bank.card).data.to_dict()["model-index"][0]["results"]
    measured = {metric["type"]: metric["value"] for result in results for metric in result["metrics"]}
    scores = {name: value for name, value in measured.items() if name.endswith(": score")}
    assert scores == {
        f"{c.name}: score": c.effects["conditions"]["steered"]["score"]
        for c in bank.concepts.values()
        if "conditions" in c.effects
    }
    assert len(scores) == 12 and all(name in bank.card for name in bank.pictures) and bank.pictures
