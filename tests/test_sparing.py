"""Graphs that tell of answers, and edits planned from them."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny, toy_tokenizer

import steerlib as sl
from steerlib.bank import trust
from steerlib.errors import BadBank, BadRecipe, CorruptBank, Unanswerable
from steerlib.evaluation.text import Judge, counting, judge_for
from steerlib.steering.sparing import spared
from steerlib.text import chat, complete
from steerlib.training.discover.answered import answered, foretold, moved
from steerlib.training.discover.concept_graph import Moved
from steerlib.training.package.directions import with_answers

RECIPE = Path(__file__).parents[1] / "concept_banks/recipes/smollm2-135m-instruct/recipe.toml"
SITE, NAMES = "layers.1", ["a", "b", "c"]
IDS = torch.arange(1, 6)[None]


def edge(src, outcome, effect):
    facts = {"weight": effect, "tau": effect, "tau_lo": effect - 0.25, "tau_hi": effect + 0.25, "n_verify": 24}
    return sl.Edge(src=src, dst=f"answers:{outcome}", relation="total", evidence="verified", **facts)


EFFECTS = {"aa": 2.0, "ab": 1.0, "ac": -0.5, "bb": 4.0, "ba": 1.0}
GRAPH = sl.CausalGraph(edge(src, outcome, effect) for (src, outcome), effect in EFFECTS.items())


@pytest.fixture
def three(llama):
    """Three directions at the last layer, none orthogonal to another."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(llama.config.hidden_size, generator=generator)
    own = torch.randn(3, llama.config.hidden_size, generator=generator)
    return sl.ConceptBank.from_directions(dict(zip(NAMES, own + 1.5 * shared, strict=True)), site=SITE, base=llama)


def activations(model, bank, edits, **how):
    with torch.no_grad(), sl.record(model, [SITE]) as tape, sl.steer(model, bank, edits, **how):
        model(IDS)
    return tape[SITE][0][1]


def linear(model, bank):
    """Outcomes that are linear in what the last layer gives: a mean over tokens, read along other directions."""
    rows = torch.stack([bank.rows(bank[name]).write[0] for name in NAMES])
    return lambda edits, **how: (activations(model, bank, edits, **how).mean((0, 1)) @ rows.T / 30).double().numpy()


def measured_graph(read):
    """Each concept moved alone by 1.5, seen at 24 requests that differ by a little chance."""
    random = np.random.default_rng(0)
    moves = [Moved(name, 1.5, (read({name: 1.5}) - read({})) + random.normal(0, 1e-9, (24, 3))) for name in NAMES]
    return answered(moves, NAMES)


def test_in_a_linear_model_nothing_that_is_carried_along_moves_and_the_own_effect_stays(llama, three):
    read = linear(llama, three)
    bank = three.with_concepts(graph=measured_graph(read))
    plain, before = read({"a": 2.0}) - read({}), read({})
    assert plain[1] > 0.1 * plain[0] and plain[2] > 0.1 * plain[0]
    changed = linear(llama, bank)({"a": 2.0}, do="spare") - before
    np.testing.assert_allclose(changed, [plain[0], 0, 0], atol=1e-4 * plain[0])


def test_of_several_edits_each_spares_what_it_carries_along(llama, three):
    read = linear(llama, three)
    bank = three.with_concepts(graph=measured_graph(read))
    changed = linear(llama, bank)({"a": 2.0, "b": -1.0}, do="spare") - read({})
    own = [read({name: amount})[k] - read({})[k] for k, (name, amount) in enumerate({"a": 2.0, "b": -1.0}.items())]
    np.testing.assert_allclose(changed, [*own, 0], atol=1e-4 * abs(own[0]))


def test_amounts_solve_the_linear_system(three):
    bank = three.with_concepts(graph=GRAPH)
    found: dict[str, Any] = spared(bank, {"a": sl.Add(3.0, tokens="generated")})
    # 2 a + 1 b = 6 and 1 a + 4 b = 0; c falls and is left alone
    assert {name: edit.amount for name, edit in found.items()} == pytest.approx({"a": 24 / 7, "b": -6 / 7})
    assert all(edit.tokens == "generated" for edit in found.values())
    rows: dict[str, Any] = spared(bank, {"a": sl.Add([3.0, 0.0, -1.0])})
    assert rows["b"].amount == pytest.approx((-6 / 7, 0.0, 2 / 7))


def test_without_an_amount_or_what_it_carries_along_it_is_the_plain_edit_bit_for_bit(llama, three):
    bank = three.with_concepts(graph=sl.CausalGraph([edge("a", "a", 2.0), edge("a", "b", 0.1), edge("b", "b", 1.0)]))
    assert torch.equal(activations(llama, bank, {"a": 0.0}, do="spare"), activations(llama, bank, {}))
    assert torch.equal(activations(llama, bank, {"a": 1.3}, do="spare"), activations(llama, bank, {"a": 1.3}))
    strong = three.with_concepts(graph=GRAPH)
    assert torch.equal(activations(llama, strong, {"a": 0.0}, do="spare"), activations(llama, strong, {}))
    assert not torch.equal(activations(llama, strong, {"a": 1.3}, do="spare"), activations(llama, strong, {"a": 1.3}))


def test_what_cannot_be_planned_is_refused(llama, three):
    with pytest.raises(Unanswerable, match="no edge 'a' -> 'answers:a'; measure it"):
        sl.steer(llama, three, {"a": 1.0}, do="spare")
    bank = three.with_concepts(graph=GRAPH)
    mixed = {"a": sl.Add(1.0), "b": sl.Add(1.0, tokens="prompt")}
    for edits in ({"a": sl.Set(1.0)}, {"a": sl.Add(1.0, unit="raw")}, mixed):
        with pytest.raises(Unanswerable, match="numbers or sl.Add alone"):
            sl.steer(llama, bank, edits, do="spare")


def test_a_graph_of_answers_foretells_them_and_holds_and_carries_no_concept(llama, three):
    bank = three.with_concepts(graph=GRAPH)
    told = bank.graph.forecast({"a": 2.0})
    assert told == {"a": 2.0, "answers:a": 4.0, "answers:b": 2.0, "answers:c": -1.0} and told.unmeasured == ()
    assert told.intervals["answers:b"] == (1.5, 2.5)
    assert bank.graph.followers("a") == () and len(bank.graph) == 0 and len(bank.graph.answers) == 5
    plain = activations(llama, bank, {"a": 1.0})
    for do in ("hold", "graph"):
        torch.testing.assert_close(activations(llama, bank, {"a": 1.0}, do=do), plain)


def test_edges_are_those_whose_effect_is_surely_not_chance():
    random = np.random.default_rng(1)
    d = random.normal(0, 1.0, (24, 40))
    d[:, 0] += 3.0
    (only,) = answered([Moved("a", 1.5, d)], [f"o{k}" for k in range(40)]).answers
    assert (only.src, only.dst, only.n_verify, only.evidence) == ("a", "answers:o0", 24, "verified")
    assert only.effect == pytest.approx(d[:, 0].mean() / 1.5) and (only.tau_lo or 0) < only.effect < (only.tau_hi or 0)
    rows = foretold(sl.CausalGraph([only]), [Moved("o0", 1.0, d), Moved("a", 3.0, d)], ["o0", "o1"])
    said = {(row.edge.src, row.edge.dst): row.said[0] for row in rows}
    assert said == {("o0", "answers:o1"): 0, ("a", "answers:o0"): pytest.approx(3.0 * only.effect), ("a", "answers:o1"): 0}


def test_a_bank_keeps_edges_to_answers_through_files_and_changes(tmp_path, three):
    bank = three.with_concepts(graph=GRAPH)
    bank.save_pretrained(tmp_path / "bank")
    again = sl.ConceptBank.from_pretrained(tmp_path / "bank")
    again.verify()
    assert again.graph.every == bank.graph.every and not (tmp_path / "bank" / "graph.safetensors").exists()
    again.save_pretrained(tmp_path / "again")
    names = ("outcomes.jsonl", "bank.json")
    assert all((tmp_path / "bank" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    renamed = bank.rename({"a": "first"})
    assert {e.src for e in renamed.graph.answers} == {"first", "b"} and renamed.graph.forecast({"first": 1.0})["answers:b"] == 1
    assert {e.src for e in bank.drop("a").graph.answers} == {"b"}
    more = bank.select("c").add("d", torch.ones(three.sites[SITE].width), site=SITE)
    assert {e.src for e in more.merge(bank.select("a", "b"), prefix="x ").graph.answers} == {"x a", "x b"}


BAD = [
    ("dst", "b"),
    ("weight", True),
    ("weight", "1"),
    ("weight", 10**400),
    ("n_verify", 1.5),
    ("relation", "friend"),
    ("evidence", None),
    ("everywhere", 1),
    ("src", 3),
    ("src", "z"),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_edges_of_strangers_are_checked(tmp_path, three, field, value):
    three.with_concepts(graph=GRAPH).save_pretrained(tmp_path)
    path = tmp_path / "outcomes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(line | {field: value}) for line in lines[:1]) + "\n")
    manifest = json.loads((tmp_path / "bank.json").read_text())
    manifest["files"]["outcomes.jsonl"] = trust.describe(path)
    (tmp_path / "bank.json").write_text(json.dumps(manifest))
    with pytest.raises((CorruptBank, BadBank)):
        sl.ConceptBank.from_pretrained(tmp_path).verify()


def test_concepts_are_moved_alone_and_answers_scored_by_prompt():
    """What is written is scored: the same as steering by hand and reading the judge's logits."""
    tokenizer = toy_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer), initializer_range=0.3)
    generator = torch.Generator().manual_seed(1)
    d = 4 * torch.randn(2, model.config.hidden_size, generator=generator)
    bank = sl.ConceptBank.from_directions({"a": d[0], "b": d[1]}, site="layers.0", base=model)
    bank = bank.with_concepts([replace(bank["a"], useful=1.0), replace(bank["b"], useful=2.0)])
    judge = Judge.fit({"a": ["a cat and a dog", "the cat sleeps"], "b": ["a plane in the sky", "the pilot lands"]})
    prompts = ["one two", "three"]
    moves = moved(model, tokenizer, bank, ["a", "b"], prompts, judge, seeds=2)
    assert [(own.name, own.amount, own.d.shape) for own in moves] == [("a", 1.0, (2, 2)), ("b", 2.0, (2, 2))]
    found = []
    asked, how = [chat(tokenizer, prompt) for prompt in prompts] * 3, {"new_tokens": 40, "temperature": 0.7}
    for edits in ({}, {"b": 2.0}):
        with sl.steer(model, bank, edits):
            done = [complete(model, tokenizer, asked, seed=seed, **how) for seed in range(2)]
        k = 4 if edits else 0
        found.append(np.mean([judge.evidence(one.texts[k : k + 2]) for one in done], 0))
    np.testing.assert_allclose(moves[1].d, found[1] - found[0], atol=1e-5)
    assert np.abs(moves[1].d).max() > 1e-3


def test_a_recipe_asks_for_the_graph_of_answers_and_a_second_run_finds_it(tmp_path, monkeypatch):
    d = np.zeros((2, 24, 2))
    d[0, :, 1] = 3.0 + np.random.default_rng(0).normal(0, 0.1, 24)
    asked = []

    def moved(_model, _tokenizer, bank, names, prompts, _judge):
        asked.append((names, prompts))
        return [Moved(name, bank[name].useful, own) for name, own in zip(names, d, strict=True)]

    monkeypatch.setattr("steerlib.training.discover.answered.moved", moved)
    own = {"a": torch.eye(32)[0], "b": torch.eye(32)[1], "gate": torch.eye(32)[2]}
    bank = sl.ConceptBank.from_directions(own, site="layers.0", base=tiny("llama"))
    useful = {"a": 1.5, "b": 2.0, "gate": None}
    bank = bank.with_concepts([replace(bank[name], useful=amount) for name, amount in useful.items()])
    recipe: Any = replace(sl.Recipe.from_file(RECIPE), answers=2)
    judge = Judge.fit({"a": ["a cat and a dog", "the cat sleeps"], "b": ["a plane in the sky", "the pilot lands"]})
    for _ in range(2):
        made = with_answers(None, None, bank, recipe, judge, tmp_path)
        (edge,) = made.graph.answers
        assert (edge.src, edge.dst, edge.n_verify) == ("a", "answers:b", 24)
        assert edge.effect == pytest.approx(d[0, :, 1].mean() / 1.5)
    assert asked == [(["a", "b"], recipe.read_prompts("train")[:2])]
    judge = judge_for({"long": counting({"count": "words"})})
    with pytest.raises(BadRecipe, match="scorer learns from texts"):
        with_answers(None, None, bank, recipe, judge, tmp_path)
    with pytest.raises(BadRecipe, match="answers from 0 to train_prompts = 24, got 25"):
        replace(recipe, answers=25).check(to_train=False)


def test_forecasts_that_hold_are_told_from_dealt_ones_and_what_spares_from_what_does_not():
    """Answers that do just what the graph says; the spared ones lose what rose along."""
    import side_effects
    from side_effects import Told

    random, names = np.random.default_rng(0), ["a", "b", "c"]
    base = random.normal(0, 0.1, (24, 3))
    effects = np.array([[EFFECTS.get(src + to, 0.0) for to in names] for src in names])
    told = lambda change: Told(base + change, side_effects.softmax(base + change, 1), 0.25)  # noqa: E731
    answers = {"unsteered": {"": told(np.zeros(3))}, "plain": {name: told(effects[k]) for k, name in enumerate("ab")}}
    spared_answers = {name: told(np.where(np.eye(3)[k], effects[k], np.minimum(effects[k], 0))) for k, name in enumerate("ab")}
    answers |= {"part": answers["plain"], "spare": spared_answers, "dealt": answers["plain"], "hold": answers["plain"]}
    alone = {name: {name: 1.0} for name in "ab"}
    study: Any = SimpleNamespace(
        graph=GRAPH,
        answers=answers,
        judge=SimpleNamespace(names=names),
        ways={"plain": alone, "part": alone, "spare": alone, "dealt": alone},
        useful={"a": 1.0, "b": 1.0},
        kl=lambda: {"plain": {"a": 0.5, "b": 0.5}, "spare": {"a": 0.5, "b": 0.5}},
        greedy=dict,
    )
    figures = side_effects.measured(study)
    own = figures["forecasts"]["useful amount"]
    assert (own["r2"], own["sign"], own["told"], own["pairs"], own["with an edge"]) == (1, 1, 3, 4, 3)
    assert own["r2 of probabilities"] == pytest.approx(1) and own["dealt"] < 0.9
    one = figures["concepts"]["a"]
    rise, along = (np.mean(answers["plain"]["a"].points[:, k] - answers["unsteered"][""].points[:, k]) for k in (0, 1))
    assert one["plain"]["gain"] == pytest.approx(rise) and one["plain"]["specificity"] == pytest.approx(
        rise / (rise + max(along, 0))
    )
    assert one["spare"]["specificity"] >= one["plain"]["specificity"] and one["spare"]["specificity"] == 1
    lines = side_effects.table(figures).splitlines()
    assert lines[2].startswith("| useful amount | 1.00 (1.00 to 1.00) | 1.00 | 100% of 3 |") and "| a | " in lines[7]
