"""Scores against closed forms and second implementations; the scorer on texts that it never saw."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import two_directions
from tiny_models import tiny, toy_tokenizer
from torch.nn.functional import kl_div

import steerlib as sl
from steerlib import errors
from steerlib.evaluation import comparison, report, text
from steerlib.evaluation.comparison import Condition, Unrelated
from steerlib.evaluation.score import Scores, best_prompt, joint, ratios, specificity
from steerlib.evaluation.text import Judge, counter, distinct, embed, foreign, judge_for, language, relevance, repeated
from steerlib.text import chat, complete
from steerlib.training.directions.levers import Lever, bank_of
from steerlib.training.directions.readouts import Readout
from steerlib.training.recipe import DirectionRecipe, Recipe

ROOT = Path(__file__).parent.parent
PROMPTS = ("the sun rises", "why", "tea . the red house sings now")
TEXTS = ("the moon falls slowly", "yes", "bread salt fish tree leaf song drum book", "rain snow", "old stone here ? no")


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """Weights so large that its answers differ."""
    return tiny("llama", vocab_size=len(tokenizer), initializer_range=0.3)


@pytest.fixture(scope="module")
def counted():
    """A scorer that reads nothing but words."""
    return Judge.fit({}, counters={"sun": counter(r"\bsun\b", "word")})


# -- the joint score -----------------------------------------------------------------------------------------


def scores(concept, relevance: Any = 1.0, nll: Any = 1.0, distinct: Any = 1.0, repeated: Any = 0.0, foreign: Any = 0.0):
    """One seed and one concept, asked for in the language of the requests; numbers by condition and prompt."""
    c = np.array(concept, float)[:, None, :]
    numbers = (relevance, nll, distinct, repeated, foreign)
    *full, strange = (np.broadcast_to(np.array(v, float), c[:, 0].shape)[:, None] for v in numbers)
    return Scores(c[..., None], *full, foreign=np.stack([strange] * 2, -1), texts=[[[""]] for _ in concept])


def test_joint_scores_follow_their_formula():
    found = joint(
        scores(
            [[0.1, 0.3], [0.6, 0.8], [0.45, 0.0], [0.9, 0.45]],
            [[0.5, 0.5], [0.4, 0.6], [0.25, 0.5], [0.25, -0.1]],
            [[1.0, 1.0], [2.0, 2.0], [2 + np.log(2), 0], [0, 2]],
            [[0.7, 0.9], [1.0, 1.0], [0.4, 0.8], [1.0, 1.0]],
            [[0.0, 0.1], [0.0, 0.0], [0.05, 0.0], [0.05 + 1 / 6, 0.4]],
            [[0.2, 0.0], [0.0, 0.0], [0.1, 0.55], [0.0, 1.0]],
        ),
        0,
    )
    # reach 0.7 - 0.2, relevance of the prompted 0.5, likelihood down to that of the prompted, distinct 0.8
    np.testing.assert_allclose(found.concept[2:, 0], [[0.5, 0], [1, 0.5]])
    np.testing.assert_allclose(found.relevance[2:, 0], [[0.5, 1], [0.5, 0]])
    np.testing.assert_allclose(found.fluency[2:, 0], [[0.25, 1], [1, 1]])
    np.testing.assert_allclose(found.before[2:, 0], [[3 / (2 + 2 + 4), 0], [3 / (1 + 2 + 1), 0]])
    # repeated 0.05 and in another language 0.1, as unsteered texts are on average; half of a third more, and more than that
    np.testing.assert_allclose(found.variety[2:, 0], [[1, 1], [0.5, 0]])
    np.testing.assert_allclose(found.language[2:, 0], [[1, 0.5], [1, 0]])
    floored = [[3 / (2 + 2 + 4), 3 / (20 + 1 + 1)], [3 / (1 + 2 + 1), 3 / (2 + 20 + 1)]]
    np.testing.assert_allclose(found.total[2:], np.array(floored)[:, None] * found.variety[2:] * found.language[2:])


def test_a_concept_in_another_language_is_asked_for_in_that_language():
    """Unsteered texts are wholly in the language of the requests, and what is wanted is another one."""
    given = scores([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    own = np.array([[1.0, 1.0], [0.5, 0.0], [0.25, 1.0]])[:, None]
    found = joint(given._replace(foreign=np.stack([own, 0 * own], -1)), 0)
    np.testing.assert_allclose(found.language, 1 - own)


def test_the_best_prompt_is_the_one_with_the_best_joint_score_not_the_loudest():
    """The first prompt raises the concept most and forgets the request; the second has less of it and keeps to the request."""
    found = scores([[0.0, 0.0], [0.8, 0.8], [0.6, 0.6], [0.05, 0.05]], [[0.5, 0.5], [0.05, 0.05], [0.5, 0.5], [0.5, 0.5]])
    assert best_prompt(found, 0) == 2
    # C, R, F: 1, 0.1, 1 and 0.75, 1, 1 and 1/16, 1, 1
    totals = joint(found, 0, prompted=(1, 2, 3)).total[1:, 0, 0]
    np.testing.assert_allclose(totals, [3 / 12, 3 / (4 / 3 + 2), 3 / 18])
    assert best_prompt(found.of([0, 1, 3]), 0) == 1
    assert found.of([2], slice(0, 1)).nll.shape == (1, 1, 2)


def test_where_prompting_does_not_help_the_scale_is_the_unsteered_texts_own_spread():
    found = joint(scores([[0.1, 0.3], [0.2, 0.0], [0.25, 0.2]]), 0)
    np.testing.assert_allclose(found.concept[2, 0], [0.5, 0], atol=1e-12)  # (0.25 - 0.2) / 0.1


def test_ratios_are_0_unsteered_1_prompted_and_linear_between():
    u, p = np.array([0.1, 0.3, 0.0, 0.4]), np.array([0.6, 0.5, 0.9, 0.4])
    found = ratios({"unsteered": u, "half": (u + p) / 2, "prompted": p, "less": u - (p - u) / 4})
    for name, value in {"unsteered": 0, "half": 0.5, "prompted": 1, "less": -0.25}.items():
        # cells are drawn together, so what is the same share of every cell has no spread at all
        assert found[name] == pytest.approx({"ratio": value, "low": value, "high": value}, abs=1e-12)


def test_a_ratio_to_a_prompt_that_does_not_surely_help_is_undefined():
    u, p = np.array([0.1, 0.3, 0.0, 0.4]), np.array([0.6, 0.5, 0.9, 0.4])
    assert ratios({"unsteered": p, "prompted": u, "steered": p + 1}) == {"unsteered": {}, "prompted": {}, "steered": {}}
    unsure = u + np.array([-0.2, 0.3, -0.1, 0.1])  # better on average, and as often worse
    assert not any(ratios({"unsteered": u, "prompted": unsure, "steered": u + 1}).values())


def test_intervals_contain_their_ratio_and_are_those_of_the_mean():
    """With anchors that do not vary the ratio is a mean: 1.96 standard errors to each side."""
    x = np.random.default_rng(1).normal(0.4, 0.2, 400)
    found = ratios({"unsteered": np.zeros(400), "prompted": np.ones(400), "steered": x})["steered"]
    error = x.std() / 20
    assert found["ratio"] == pytest.approx(x.mean()) and found["low"] < found["ratio"] < found["high"]
    assert [found["low"], found["high"]] == pytest.approx([x.mean() - 1.96 * error, x.mean() + 1.96 * error], abs=0.15 * error)


def test_identical_cells_leave_nothing_to_chance():
    totals = {"unsteered": np.full(5, 0.25), "prompted": np.full(5, 0.75), "steered": np.full(5, 0.5)}
    assert ratios(totals)["steered"] == {"ratio": 0.5, "low": 0.5, "high": 0.5}


def test_specificity_is_the_own_share_of_all_that_rises():
    def of(*gains):
        table = np.zeros((2, 2, 3, len(gains)))
        table[1] = gains
        return specificity(Scores(table, *[table[..., 0]] * 4, foreign=table, texts=[]), 0, 1)

    assert of(0.4, 0.1, -0.2) == pytest.approx(0.8) and of(0.4, -0.1) == 1 and of(0.0, 0.3) == of(-0.1, -0.3) == 0


# -- what texts are scored by --------------------------------------------------------------------------------


def test_counting_scorers_count():
    assert text.counter(r"\?", "sentence")(["Why? So. No", "a", ""]).tolist() == [1 / 3, 0, 0]
    assert text.counter(r"\b(I|we)\b", "word")(["I think we're I", "them"]).tolist() == [3 / 4, 0]
    assert text.shortness(["one", "one two three four"]).tolist() == pytest.approx([0, -1.3863], abs=1e-4)


def test_distinct_is_the_share_of_different_word_pairs():
    assert distinct("a b a B a b") == 2 / 5 and distinct("a b c d") == 1 and distinct("a a a a a", n=3) == 1 / 3
    assert distinct("") == distinct("word") == 1


def test_repeated_is_the_share_of_trigrams_said_before():
    assert (
        repeated("a b c a b c") == 1 / 4
        and repeated("A b, c. a b, c.") == 3 / 8
        and repeated("m" * 120) == 7 / 8
        and repeated("one two") == 0
    )
    assert repeated("It is late.\n" * 2) == pytest.approx(2 / 6)


def test_texts_in_another_language_are_told_from_texts_in_the_one_asked_for():
    texts = ["The kettle is boiling over and nobody cares.", "La bouilloire déborde et personne ne s'en soucie.", ""]
    english, french = (foreign(texts, tongue).tolist() for tongue in ("en", "fr"))
    assert english == pytest.approx([0, 1, 0], abs=0.1) and french == pytest.approx([1, 0, 0], abs=0.1)
    assert language(texts[:1]) == "en"


def test_relevance_is_the_own_cosine_less_the_mean_of_the_others():
    requests = ["How do I bake bread?", "Who won the match?", "What is a star?"]
    answers = ["Mix flour and water.", "A ball of hot gas.", "Nobody, it was a draw."]
    of = [0, 2, 1]
    cosine = torch.nn.functional.cosine_similarity(*map(torch.tensor, (embed(answers)[:, None], embed(requests)[None])), dim=-1)
    expected = [cosine[i, k] - cosine[i, [j for j in range(3) if j != k]].mean() for i, k in enumerate(of)]
    np.testing.assert_allclose(relevance(requests, answers, of), expected, atol=1e-5)
    assert (relevance(requests, answers, of) > relevance(requests, answers, [2, 0, 0])).all()
    two = [relevance(requests[:2], answers, [k] * 3) for k in (0, 1)]
    np.testing.assert_allclose(two[0], -two[1], atol=1e-6)


def test_the_lexicon_ranks_words_of_two_texts_or_more_by_log_odds():
    positive = ["Red tea!", "red, the cup", "tea: RED the", "the sun's"]
    negative = ["the sun", "the moon", "a bird"]
    assert comparison.lexicon(positive, negative) == ["red", "tea", "the"]
    assert comparison.lexicon(positive, negative, size=1) == ["red"] and comparison.lexicon([], negative) == []


@pytest.fixture(scope="module")
def recipe():
    return DirectionRecipe.from_file(ROOT / "concept_banks" / "recipes" / "smollm2-135m-instruct" / "recipe.toml")


@pytest.fixture(scope="module")
def judge(recipe):
    return judge_for(recipe.scorers)


def test_the_scorer_names_the_concept_of_texts_it_never_saw(recipe, judge):
    held_out = recipe.read_held_out()
    assert judge.accuracy(*held_out) >= 0.95
    assert judge_for(recipe.scorers, shuffle=True).accuracy(*held_out) < 0.25


def test_identical_texts_score_identically(recipe, judge):
    texts = recipe.read_held_out()[0][:12]
    twice = judge([*texts, *texts])
    assert twice[:12].tobytes() == twice[12:].tobytes() and judge(texts).tobytes() == judge(texts).tobytes()
    np.testing.assert_allclose(judge(texts[::-1])[::-1], twice[:12], atol=1e-5)


def test_probabilities_are_shared_among_concepts_and_ordinary_text():
    texts = {"tea": ["a cup of tea", "green tea"], "rain": ["it rains", "a wet day"]}
    without, beside = (Judge.fit(texts, ordinary=some) for some in ((), ("a red car", "the new chair")))
    asked = ["hot tea", "the car", "rain again"]
    np.testing.assert_allclose(without(asked).sum(1), 1)
    assert without.names == beside.names == ("tea", "rain") and (beside(asked).sum(1) < 0.999).all()
    counted = Judge.fit(texts, counters={"length": text.shortness})
    np.testing.assert_array_equal(counted(asked), np.column_stack([without(asked), text.shortness(asked)]))
    with pytest.raises(errors.BadRecipe, match="ordinary texts"):
        Judge.fit({"tea": texts["tea"]})


def test_likelihood_equals_the_models_own_loss(model, tokenizer):
    done = complete(model, tokenizer, PROMPTS[:2], new_tokens=6)
    for row in range(2):
        ids = done.ids[row][done.mask[row]]
        labels = ids.clone()
        labels[: int(done.mask[row, : done.prompt].sum())] = -100
        with torch.no_grad():
            expected = model(ids[None], labels=labels[None]).loss
        assert text.nll(model, done)[row] == pytest.approx(float(expected), abs=1e-4)


# -- answers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conditions(model):
    bank = two_directions(model)
    return [
        Condition(name="unsteered"),
        Condition(name="prompted", instruction="sing slowly . now"),
        Condition(name="steered", bank=bank, edits={"a": 3.0}),
        Condition(name="both", bank=bank, edits={"a": -2.0, "b": 4.0}, instruction="why ?"),
        Condition(name="no-op", bank=bank, edits={"b": 0.0}),
    ]


def test_conditions_in_one_batch_give_each_the_answers_they_get_alone(model, tokenizer, conditions, counted, monkeypatch):
    def answers(some, **given):
        return comparison.answer(model, tokenizer, some, PROMPTS, counted, seeds=[0], new_tokens=8, **given)

    together = answers(conditions, temperature=0)
    for k, condition in enumerate(conditions):
        alone = answers([condition], temperature=0)
        assert alone.texts[0] == together.texts[k]
        np.testing.assert_allclose(alone.nll[0], together.nll[k], atol=1e-4)
    assert together.texts[0] == together.texts[4] and len({str(texts) for texts in together.texts}) == 4
    monkeypatch.setattr(comparison, "ROWS", 6)  # two conditions at a time
    assert answers(conditions, temperature=0).texts == together.texts


def test_answers_repeat_with_their_seed_and_leave_the_global_generator_alone(model, tokenizer, conditions, counted):
    state = torch.get_rng_state()
    some = comparison.answer(model, tokenizer, conditions[:3], PROMPTS, counted, seeds=[5, 6, 5], new_tokens=8, temperature=1.0)
    assert torch.equal(state, torch.get_rng_state())
    for texts in some.texts:
        assert texts[0] == texts[2] != texts[1]
    np.testing.assert_array_equal(some.nll[:, 0], some.nll[:, 2])
    expected = [[[text.split().count("sun") / max(1, len(text.split())) for text in t] for t in by] for by in some.texts]
    no_marks = np.array([[["?" not in text and "." not in text for text in t] for t in by] for by in some.texts])
    np.testing.assert_allclose(some.concepts[..., 0][no_marks], np.array(expected)[no_marks])


def test_answers_are_judged_as_answers_to_the_plain_request_by_the_unsteered_model(model, tokenizer, conditions, counted):
    some = comparison.answer(model, tokenizer, conditions, PROMPTS[:1], counted, seeds=[None], new_tokens=8)  # greedy
    plain = tokenizer(chat(tokenizer, PROMPTS[0]), add_special_tokens=False)["input_ids"]
    for k, condition in enumerate(conditions):
        with comparison.together(model, [condition], 1):
            asked = chat(tokenizer, PROMPTS[0], condition.instruction)
            done = complete(model, tokenizer, [asked], new_tokens=8)
        new = done.ids[0, done.prompt :][done.mask[0, done.prompt :]].tolist()
        labels = torch.tensor([[-100] * len(plain) + new])
        with torch.no_grad():
            expected = model(torch.tensor([plain + new]), labels=labels).loss
        assert some.nll[k, 0, 0] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "mamba", "bamba"])
def test_reading_each_request_once_changes_no_likelihood(family, tokenizer):
    """Whatever a family keeps between passes: the same as every request and answer in one pass."""
    model = tiny(family, vocab_size=len(tokenizer), initializer_range=0.3)
    done = complete(model, tokenizer, [f"red {prompt}" for prompt in PROMPTS] * 12, new_tokens=8, temperature=1.0)
    found = comparison.nll_behind(model, tokenizer, done, PROMPTS)
    asked = tokenizer(list(PROMPTS) * 12, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    ids = torch.cat((asked["input_ids"], done.ids[:, done.prompt :]), 1)
    mask = torch.cat((asked["attention_mask"].bool(), done.mask[:, done.prompt :]), 1)
    whole = text.nll(model, text.Completions(done.texts, ids, mask, asked["input_ids"].shape[1]))
    np.testing.assert_allclose(found, whole, atol=1e-4)
    assert whole.std() > 0.01


# -- side effects --------------------------------------------------------------------------------------------


def test_no_edit_has_no_side_effects(model, tokenizer):
    condition = Condition(name="no-op", bank=two_directions(model), edits={"a": 0.0})
    assert Unrelated(model, tokenizer, TEXTS, rows=2).side_effects(condition) == (0.0, 0.0, 1.0)


def test_side_effects_equal_a_second_implementation(model, tokenizer):
    """Text by text, without pads."""
    bank, rows = two_directions(model), []
    found = Unrelated(model, tokenizer, TEXTS, length=6, rows=2).side_effects(Condition(name="a", bank=bank, edits={"a": 2.0}))
    for one in TEXTS:
        ids = torch.tensor([tokenizer(one)["input_ids"][:6]])
        with torch.no_grad():
            before = model(ids).logits[0, :-1].log_softmax(-1)
            with sl.steer(model, bank, {"a": 2.0}):
                after = model(ids).logits[0, :-1].log_softmax(-1)
        kl = kl_div(after, before, log_target=True, reduction="none").sum(-1)
        loss = (before - after)[range(len(kl)), ids[0, 1:]]
        rows += torch.stack([kl, loss, (before.argmax(-1) == after.argmax(-1)).float()], 1).tolist()
    assert found == pytest.approx(np.mean(rows, axis=0), abs=1e-4)
    assert found.kl > 0.01 and 0 < found.agreement < 1


# -- dose and response ---------------------------------------------------------------------------------------


def test_a_direction_towards_the_words_raises_them_with_the_dose_and_its_negative_lowers_them(model, tokenizer):
    words, doses = ["sun", "moon", "tea"], (-0.5, -0.25, 0.0, 0.25, 0.5)
    towards = model.lm_head.weight[tokenizer.convert_tokens_to_ids([f"▁{word}" for word in words])].detach().mean(0)
    bank = sl.ConceptBank.from_directions({"to": towards, "from": -towards}, site="layers.1", base=model)
    up, down = (comparison.dose_response(model, tokenizer, bank, name, doses, PROMPTS, words) for name in ("to", "from"))
    assert up.slope > 0 and up.spearman == pytest.approx(1) and up.anti_steerable == 0 and up.propensity[2] == 0
    assert down.slope == pytest.approx(-up.slope, rel=1e-4) and down.spearman == pytest.approx(-1) and down.anti_steerable == 1
    assert down.propensity == pytest.approx(up.propensity[::-1], abs=1e-5)
    assert down.symmetry == pytest.approx(1 / up.symmetry, rel=1e-3)


# -- random directions ---------------------------------------------------------------------------------------


def gated(model, bias):
    """A concept at two sites that each token's reading lets through."""
    g = torch.Generator().manual_seed(3)
    a, b, read = torch.randn(3, model.config.hidden_size, generator=g)
    return bank_of(Lever(moves={"layers.0": 2 * a, "layers.1": b}, gate=Readout("layers.0", read, torch.tensor(bias))))


def test_random_directions_are_as_long_as_the_concept_everywhere_and_share_its_gate(model):
    bank = gated(model, 0.25)
    controls = comparison.random_bank(bank["lever"], bank, count=3, seed=1)
    drawn = [controls[f"random-{i}"] for i in (1, 2, 3)]
    for concept in drawn:
        for own, place in zip(bank["lever"].places, concept.places, strict=True):
            lengths = [float(b.rows(at).write.norm()) * at.unit for b, at in ((bank, own), (controls, place))]
            assert lengths[0] == pytest.approx(lengths[1], rel=1e-5) and controls.site_of(place) == bank.site_of(own)
        assert concept.gate == bank["lever"].gate
    x = torch.randn(20, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    readings = [x @ b.rows(b["lever.gate"]).read[0] + b.rows(b["lever.gate"]).bias for b in (bank, controls)]
    torch.testing.assert_close(*readings, atol=1e-5, rtol=1e-5)
    again = comparison.random_bank(bank["lever"], bank, count=3, seed=1)
    assert torch.equal(*(b.rows(b["random-2"]).write for b in (controls, again)))
    first, second = (controls.rows(concept).write for concept in drawn[:2])
    assert not torch.allclose(first, second)


def test_a_closed_gate_stops_random_directions_and_an_open_one_does_not(model):
    ids = torch.arange(3, 13).view(2, 5)
    with torch.no_grad():
        plain = model(ids).logits
        for bias, still in ((-1e3, True), (1e3, False)):
            bank = gated(model, bias)
            with sl.steer(model, comparison.random_bank(bank["lever"], bank), {"random-1": 1.0}, allow_ood=True):
                assert torch.equal(model(ids).logits, plain) is still


def test_random_directions_know_the_threshold_of_a_gate_without_bounds(model):
    bank = gated(model, 0.0)
    concepts = [replace(bank["lever"], gate=sl.Gate("lever.gate")), replace(bank["lever.gate"], present=0.5)]
    bank = bank.with_concepts(concepts)
    controls = comparison.random_bank(bank["lever"], bank)
    ids = torch.arange(3, 13).view(2, 5)
    with torch.no_grad(), sl.steer(model, controls, {"random-1": 1.0}, allow_ood=True):
        gateless = model(ids).logits
    with (
        torch.no_grad(),
        sl.steer(model, controls, {"random-1": sl.Add(1.0, gate=sl.Gate("lever.gate", above=0.5))}, allow_ood=True),
    ):
        assert torch.equal(model(ids).logits, gateless)


# -- reports -------------------------------------------------------------------------------------------------


def record(name, totals, kl, passes=True):
    """What the measurement of one concept writes, as far as reports read it."""
    lines = {n: {"score": sum(t) / 2, "ratio": 0.5, "nll": 1.25, "specificity": 0.75} for n, t in totals.items()}
    lines |= {n: lines[n] | {"kl": value, "agreement": 0.5} for n, value in kl.items()}
    return {
        "concept": name, "method": "pca", "amount": 2.0, "moved": 0.8, "conditions": lines, "joint": totals,
        "response": {"doses": [-2.0, 0.0, 2.0], "propensity": [-1.0, 0.0, 1.0], "anti_steerable": 0.1},
        "passes": {"is good": passes, "is cheap": True}, "also": {"is small": False},
    }  # fmt: skip


RECORDS = [
    record(
        "tea",
        {
            "unsteered": [0.0, 0.0], "prompted": [0.5, 0.5], "steered": [0.25, 0.5], "pca": [0.5, 0.5],
            "difference-of-means": [0.0, 0.25], "random-1": [0.0, 0.1], "random-2": [0.1, 0.0],
        },
        {"steered": 0.2, "random-1": 0.1, "random-2": 0.3},
    ),
    record(
        "rain",
        {
            "unsteered": [0.0, 0.0], "prompted": [1.0, 1.0], "steered": [0.5, 1.0],
            "difference-of-means": [0.25, 0.25], "random-1": [0.2, 0.2], "random-2": [0.0, 0.0],
        },
        {"steered": 0.4, "random-1": 0.1, "random-2": 0.1},
        passes=False,
    ),
]  # fmt: skip


def test_the_summary_is_over_all_cells_of_all_concepts():
    found = report.summary(RECORDS)
    assert found["steered"]["ratio"] == pytest.approx((0.25 + 0.5 + 0.5 + 1.0) / 3.0)
    assert found["steered"]["low"] == pytest.approx(0.5, abs=0.05) and found["steered"]["high"] == pytest.approx(1, abs=0.05)
    assert found["random direction"]["ratio"] == pytest.approx((0.05 + 0.05 + 0.1 + 0.1) / 3.0)
    assert found["steered"]["kl"] == pytest.approx(0.3) and found["random direction"]["kl"] == pytest.approx(0.15)
    assert "kl" not in found["unsteered"] and found["prompted"]["specificity"] == 0.75
    # what was tried on one concept is compared on that one
    assert [found[name]["concepts"] for name in ("steered", "pca")] == [2, 1] and found["pca"]["ratio"] == pytest.approx(1)
    assert [found[name]["baseline"] for name in ("steered", "pca")] == pytest.approx([0.75 / 3.0, 0.25 / 1.0])


def test_tables_say_what_the_records_say():
    lines = report.table(RECORDS).splitlines()
    assert lines[2].startswith("| tea | pca | +2.00 |") and " ".join(re.findall(r"[\d.]+%?", lines[2])) == (
        "2.00 0.00 0.50 0.38 0.05 0.50 80% 1.25 1.25 1.25 0.20 0.20 0.75 10%"
    )
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    lines = report.summary_table(RECORDS).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "unsteered", "prompted", "random direction", "difference-of-means", "pca", "**chosen per concept**",
    ]  # fmt: skip
    assert len({line.count("|") for line in lines}) == 1
    assert " ".join(re.findall(r"[\d.]+", lines[3])) == "2 1.00 0.25 0.75"
    assert " ".join(re.findall(r"[\d.]+", lines[7]))[:6] == "2 0.75" and " to " in lines[7]


def test_every_bar_that_is_missed_is_named():
    assert report.missed(RECORDS).splitlines()[2:] == [
        "- **tea** misses “is small”",
        "- **rain** misses “is good”, which a shipped concept has to clear",
        "- **rain** misses “is small”",
    ]
    assert report.missed([RECORDS[0] | {"also": {}}]) == "Every concept clears every bar."


def test_pictures_are_png_and_the_same_bytes_each_time():
    first = report.picture(RECORDS)
    assert first.startswith(b"\x89PNG\r\n") and first == report.picture(RECORDS)
    assert int.from_bytes(first[16:20], "big") == 1320  # 12 inches of 110 dots


# -- the data of the recipes ---------------------------------------------------------------------------------

FOUND = sorted((ROOT / "concept_banks" / "recipes").rglob("recipe.toml"))
RECIPES = [path for path in FOUND if isinstance(Recipe.from_file(path, to_train=False), DirectionRecipe)]


def runs(texts, length=8):
    """Words in a row; stock phrases of six or seven occur by chance."""
    words = [text.lower().split() for text in texts]
    return {tuple(w[i : i + length]) for w in words for i in range(len(w) - length + 1)}


def plain(prompt):
    return " ".join(re.findall(r"\w+", prompt.lower()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_no_text_that_levers_are_made_from_is_one_that_scorers_learn_from_or_are_tested_on(path):
    recipe = DirectionRecipe.from_file(path, to_train=False)
    has_pairs = path.parent.parent.name != "named"  # whose concepts are made from their names alone
    pairs = runs(text for concept in recipe.concepts * has_pairs for side in recipe.read_shown(concept) for _, text in side)
    learned = [recipe.read_scoring(concept) for concept in recipe.concepts]
    scoring = runs(text for positive, negative, others in learned if others for text in (*positive, *negative))
    held_out = runs(recipe.read_held_out()[0])
    ordinary, unrelated = (runs(recipe.read_texts(name)) for name in (recipe.reference, recipe.unrelated))
    groups = [pairs, scoring, held_out, ordinary, unrelated]
    assert (len(pairs) > 1000) is has_pairs and min(len(scoring) + len(pairs), len(ordinary)) > 1000 and len(unrelated) > 100
    assert all(a.isdisjoint(b) for i, a in enumerate(groups) for b in groups[:i])


def test_requests_serve_one_purpose_each(recipe):
    """To learn from, to choose with, to report on, or as the prompt of a contrast pair."""
    lines = [json.loads(line) for line in recipe.path(recipe.prompts).read_text(encoding="utf-8").splitlines()]
    splits = [{plain(line["prompt"]) for line in lines if line["split"] == name} for name in ("train", "dev", "evaluation")]
    paired, sentences = ([c for c in recipe.concepts if bool(c.positive) is given] for given in (False, True))
    told, learnt = (
        {plain(prompt) for c in some for side in recipe.read_shown(c) for prompt, _ in side} for some in (paired, sentences)
    )
    assert sum(map(len, splits)) == len(lines) and all(len(split) >= 10 for split in splits) and len(told) >= 24
    groups = [*splits, told]
    assert all(a.isdisjoint(b) for i, a in enumerate(groups) for b in groups[:i])
    assert learnt and learnt <= splits[0]  # sentences answer prompts to learn from
