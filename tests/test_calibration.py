"""Units, useful amounts and safe ranges of any bank: measured again they are the same, and they follow a planted judge."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import toy_tokenizer, toy_writer

import steerlib as sl
from steerlib.encoders import TopK
from steerlib.errors import BadEdit, NoScore
from steerlib.evaluation import denoising
from steerlib.evaluation.comparison import Condition, Unrelated
from steerlib.evaluation.score import Scores
from steerlib.evaluation.text import Judge
from steerlib.training.calibrate import calibration, doses
from steerlib.training.calibrate.prompted import Drawing, Trial
from steerlib.training.carry import carried
from steerlib.training.entries import ConceptRecipe
from steerlib.training.picture_recipe import PictureRecipe
from steerlib.training.recipe import DirectionRecipe
from steerlib.training.record.activations import tokens

PROMPTS = ["why rain", "the red house", "green tea now", "old stone"]
TEXTS = ["the sun rises slowly", "warm bread and milk", "the old bird sings now", "a boat runs down the river", "why snow"]
SITES = ("layers.0", "layers.1")
pytestmark = pytest.mark.filterwarnings("ignore::steerlib.errors.OutOfRange")


model = pytest.fixture(scope="module")(toy_writer)
tokenizer = pytest.fixture(scope="module")(toy_tokenizer)


@pytest.fixture(scope="module")
def bank(model):
    draw = torch.Generator().manual_seed(3)
    vectors = {name: {site: torch.randn(32, generator=draw) for site in SITES} for name in ("a", "b")}
    return sl.ConceptBank.from_directions(vectors, base=model)


def measured(model, tokenizer, bank, judge, names=("a",), **how) -> Any:
    given = {"prompts": PROMPTS, "texts": TEXTS, "new_tokens": 6, **how}
    return sl.calibrate(model, bank, names, judge=judge, tokenizer=tokenizer, **given)


class Noting:
    """Notes what it is asked; likes some answers, or long ones."""

    def __init__(self, liked: Any = None):
        self.liked, self.asked = liked, []

    def __call__(self, requests, answers, concept):
        assert len(requests) == len(answers) and concept in "ab" and set(requests) <= {*PROMPTS}
        self.asked.append([*answers])
        return [len(answer) if self.liked is None else answer in self.liked for answer in answers]


@pytest.fixture(scope="module")
def first(model, tokenizer, bank):
    """A calibration, and what its judge was asked."""
    judge = Noting()
    return measured(model, tokenizer, bank, judge), judge


def test_units_are_the_spread_of_readings_and_the_same_bits_move(first, model, tokenizer, bank):
    found: Any = first[0]["a"]
    x = tokens(model, tokenizer, TEXTS, SITES, what="texts")
    z = (x["layers.0"] @ bank.rows(bank["a"]).write[0]) / bank.rows(bank["a"]).write[0].square().sum()
    assert found.unit == pytest.approx(float(z.std()), rel=1e-4)
    np.testing.assert_allclose(found.natural, np.quantile(z.numpy(), [0.005, 0.995]), rtol=1e-3)
    assert found.parts[0].unit == pytest.approx(found.unit) and first[0]["b"] == bank["b"]
    assert [first[0].sites[site].norm for site in SITES] == [round(float(x[site].norm(dim=-1).median()), 4) for site in SITES]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), sl.steer(model, first[0], {"a": 0.5}, allow_ood=True):
        one = model(ids).logits
    with torch.no_grad(), sl.steer(model, bank, {"a": 0.5 * found.unit}):
        assert torch.equal(one, model(ids).logits)


@pytest.fixture(scope="module")
def tried(first, model, tokenizer):
    """The amounts that are tried, in units: shares of the strongest that leaves ordinary text nearly as it is."""
    ordinary = Unrelated(model, tokenizer, TEXTS)

    def change(amount):
        return ordinary.side_effects(Condition(name="x", bank=first[0], edits={"a": amount})).kl

    top = doses.strongest(doses.longest(first[0], first[0]["a"]), change)
    assert change(top) <= doses.DISTURBANCE
    return [float(f"{share * top:.4g}") for share in (0.7, 1.0, 0.85)]


def test_the_range_holds_the_amount_that_was_chosen(first, tried):
    known: Any = first[0]["a"]
    low, high = known.range
    assert low <= 0 and any(high == pytest.approx(amount * times, rel=1e-3) for amount in tried for times in (1, 1.5, 2))
    assert known.useful in (None, *tried)


def test_a_bank_that_lost_its_facts_gets_them_back(first, model, tokenizer, bank):
    """In whatever unit it is: as raw amounts they are the same."""
    known: Any = first[0]["a"]
    parts = tuple(replace(part, unit=part.unit / known.unit * 7) for part in known.parts)
    facts: dict[str, Any] = {"unit": 7.0, "natural": None, "range": None, "useful": None, "beyond": "", "parts": parts}
    bare = sl.ConceptBank(**{**first[0].contents(), "concepts": [replace(known, **facts)]})
    again = measured(model, tokenizer, bare, Noting())["a"]
    assert again.unit == pytest.approx(known.unit, rel=1e-5)
    assert again.range == pytest.approx(known.range, rel=0.01) and (again.useful or 0) == pytest.approx(
        known.useful or 0, rel=0.01
    )
    kept = replace(known, unit=7.0, parts=parts, range=(0.0, 1.0))
    other = measured(model, tokenizer, sl.ConceptBank(**{**bare.contents(), "concepts": [kept]}), Noting())["a"]
    assert other.unit == 7.0  # that was measured
    assert np.multiply(other.range, 7.0) == pytest.approx(np.multiply(known.range, known.unit), rel=0.01)


@pytest.mark.parametrize("planted", [0, 1, 2])
def test_a_judge_that_likes_what_one_amount_gives_is_followed_there(first, tried, model, tokenizer, bank, planted):
    by_amount = np.array(first[1].asked[1]).reshape(3, -1)  # asked second, of each amount for both seeds
    others = {*first[1].asked[0], *np.delete(by_amount, planted, 0).flat}
    assert len(liked := {*by_amount[planted]} - others) > 1
    found = measured(model, tokenizer, bank, Noting(liked))["a"]
    low, high = found.range
    assert found.useful in (None, tried[planted]) and high / tried[planted] == pytest.approx(
        round(2 * high / tried[planted]) / 2
    )


def test_where_nothing_moves_the_judge_no_amount_is_called_useful(model, tokenizer, bank):
    found = measured(model, tokenizer, bank, lambda requests, answers: [1.0] * len(answers))["a"]  # noqa: ARG005
    assert found.useful is None and "no amount that was tried raised it surely" in found.beyond
    assert found.range is not None and not found.unmeasured
    with pytest.raises(NoScore):
        measured(model, tokenizer, bank, lambda requests, answers: None)  # noqa: ARG005
    with pytest.raises(BadEdit, match="carries no recipe with a scorer of 'a'; give judge="):
        measured(model, tokenizer, bank, None)
    for wrong in ({"names": "a"}, {"prompts": "why"}, {"texts": "rain"}):
        with pytest.raises(BadEdit, match="as lists"):
            measured(model, tokenizer, bank, Noting(), **wrong)
    rows = sl.ConceptBank.from_encoder(bank.encoder("layers.0"), site="layers.0", base=model)
    with pytest.raises(BadEdit, match="lists no concept; name some, such as layers.0/0"):
        measured(model, tokenizer, rows, Noting(), None)
    with pytest.raises(BadEdit, match="steps: no argument"):
        measured(model, tokenizer, bank, len, steps=3)


def test_amounts_that_raise_other_concepts_too_are_worth_less():
    """By the share of all gains that is the concept's own, over 0.9."""
    concepts, ones = np.zeros((4, 1, 1, 2)), np.ones((4, 1, 1))
    concepts[1:, ..., 0] = concepts[3, ..., 1] = 1.0
    scores = Scores(concepts, ones, ones, ones, 0 * ones, np.zeros((4, 1, 1, 3)), [[["x"]]] * 4)
    assert doses.worth(scores, 0) == pytest.approx([1.0, 0.5 / doses.SPECIFIC])


def test_the_scorer_of_a_recipe_scores_the_concept_first_and_others_behind_it(model, tokenizer):
    known = Judge(("b", "a"), 0, None, {"b": lambda texts: np.zeros(len(texts)), "a": lambda texts: np.arange(len(texts))}, {})
    asking = calibration.Asking(model, tokenizer, PROMPTS, known, 3)
    found = asking("a", [Condition(name="unsteered")], (None,)).concepts
    assert found[0, 0].tolist() == [[k, 0] for k in range(len(PROMPTS))] and asking.knows("b") and not asking.knows("c")


def test_a_bank_is_measured_by_what_its_recipe_says(model, tokenizer, bank):
    pairs: Any = {"positive": ("warm milk", "tea"), "negative": ("cold rain", "snow")}
    concept = ConceptRecipe(name="a", label="short", scorer={"count": "words"}, **pairs)
    recipe = DirectionRecipe(name="r", base="b", source="s", concepts=(concept,), dev_prompts=2, new_tokens=3)
    own, given = bank.with_concepts(files={"recipe.jsonl": carried(recipe)}), {"tokenizer": tokenizer, "texts": TEXTS}
    found = sl.calibrate(model, own, ["a"], **given)
    assert found.provenance["calibrated"]["a"] == {"judge": "the scorer of its recipe", "prompts": 2}
    with pytest.raises(BadEdit, match="carries no recipe with a scorer of 'b'"):
        sl.calibrate(model, own, **given)


def test_units_that_a_gate_or_the_graph_counts_in_stay(model, tokenizer, bank):
    gated = sl.ConceptBank(
        **{**bank.contents(), "concepts": [bank["a"], replace(bank["b"], gate=sl.Gate("a", above=0.2))], "card": "# Mine"}
    )
    found = measured(model, tokenizer, gated, Noting())
    assert found["a"].unit == 1.0 and found["a"].natural is not None
    assert "“a” were measured later, by Noting" in found.card and found.provenance["calibrated"]["a"]["prompts"] == 4


def test_the_unit_of_a_latent_is_the_median_where_it_fires(model, tokenizer):
    draw = torch.Generator().manual_seed(5)
    weights = torch.randn(6, 32, generator=draw)
    encoder = TopK(encoder=weights, bias=torch.zeros(6), decoder=weights / 6, decoder_bias=torch.zeros(32), k=2)
    bank = sl.ConceptBank.from_encoder(encoder, site="layers.1", base=model)
    x = tokens(model, tokenizer, TEXTS, ["layers.1"], what="texts")["layers.1"]
    z = encoder.encode(x)
    name = f"layers.1/{int((z > 0).sum(0).argmax())}"
    own = z[:, bank[name].index]
    found: Any = calibration.in_units(
        bank, bank[name], calibration.readings(bank, [name], {"layers.1": x})[name], is_latent=True
    )
    assert found.unit == pytest.approx(float(own[own > 0].median())) and found.natural[0] == 0.0
    silent = calibration.in_units(bank, bank[name], torch.zeros(20), True)
    assert silent == bank[name]  # of one that never fires nothing is known


def test_a_rise_is_sure_where_most_prompts_share_it():
    before = np.zeros(10)
    assert calibration.surely_more(before, np.full(10, 0.1)) and not calibration.surely_more(before, before)
    assert not calibration.surely_more(before, np.array([1.0, *[-0.1] * 9]))


# -- pictures ----------------------------------------------------------------------------------------------------

SITE = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2"
DRAWN: dict[str, Any] = {"steps": 2, "guidance": 2.0, "batch": 4}


@pytest.fixture(scope="module")
def snow(toy):
    width = toy.unet.get_submodule(SITE.removeprefix("unet.")).to_out[0].out_features
    return sl.ConceptBank.from_directions({"snow": torch.ones(width)}, site=SITE, base=toy)


def test_pictures_are_judged_by_whom_is_asked(toy, snow, monkeypatch):
    monkeypatch.setattr(denoising, "DRAWS", 1)
    asked = []

    def bright(prompts, pictures):
        asked.append(([*prompts], pictures.shape))
        return pictures.mean((1, 2, 3))

    bank = sl.calibrate(toy, snow, prompts=["a hill", ("a lake at night", "a lake")], judge=bright, **DRAWN)
    found = bank["snow"]
    assert {tuple(prompts) for prompts, _ in asked} == {("a hill", "a lake")} and {s for _, s in asked} == {(2, 32, 32, 3)}
    with sl.record(toy, snow) as tape:
        noises = [torch.Generator().manual_seed(k) for k in (0, 1)]
        toy(["a hill", "a lake"], generator=noises, num_inference_steps=2, guidance_scale=2.0, output_type="latent")
    half = [(state.branches or ()).index("cond") for state, _ in tape["snow"]]
    z = torch.cat([z.chunk(2)[k].flatten() for k, (_, z) in zip(half, tape["snow"], strict=True)])
    assert found.unit == pytest.approx(float(z.std()), rel=1e-4) and bank.sites == snow.sites
    assert found.range is not None and found.effects["edit"] == "Add" and found.effects["told"] in (0, 0.5, 1)
    assert found.useful is not None or found.beyond
    assert bank.provenance["calibrated"]["snow"] == {"judge": "bright", "prompts": 2}


def test_pictures_without_a_judge_are_judged_by_the_pipeline(toy, snow, monkeypatch):
    monkeypatch.setattr(denoising, "DRAWS", 1)
    monkeypatch.setattr(calibration, "LOOKS", 2)
    monkeypatch.setattr(calibration, "PARTS", (0.5,))
    found = sl.calibrate(toy, snow, prompts=["a hill"], **DRAWN)
    assert found.provenance["calibrated"]["snow"]["judge"] == "the pipeline itself"
    with pytest.raises(BadEdit, match="two different ones"):
        sl.calibrate(toy, snow, prompts=[("a", "a")], **DRAWN)
    with pytest.raises(BadEdit, match="height: no argument"), warnings.catch_warnings():
        sl.calibrate(toy, snow, prompts=["a"], height=8)


class Planned(calibration.Trials):
    """Trials of which all is known: it moves all there is at 3, and harms from 10 on."""

    def __init__(self, *_):
        self.concept = "snow"

    @property
    def told(self) -> float:
        return 1.0

    def of(self, bank, edits, *, remove=False):  # noqa: ARG002
        amount = edits["snow"].amount
        return Trial(min(1.0, amount / 3), 0.0 if amount < 9 else 4.0 if amount > 10 else 0.1)


@pytest.mark.parametrize(("start", "cap"), [(np.inf, None), (0.5, None), (100.0, None), (2.0, 4.0)])
def test_amounts_of_pictures_are_doubled_until_they_harm_or_halved_until_they_do_not(toy, snow, monkeypatch, start, cap):
    monkeypatch.setattr(calibration, "Trials", Planned)
    length = float(snow.rows(snow["snow"]).write.norm())
    facts = replace(snow.sites[SITE], norm=cap and cap * length / 0.35)
    bank = sl.ConceptBank(**{**snow.contents(), "sites": {SITE: facts}})
    drawing = Drawing(toy, PictureRecipe(name="x", base="x", source="x"))
    found: Any = calibration._by_pictures(drawing, bank, bank["snow"], [], None, start)
    most = 4.0 if cap else 10.0
    assert found.range == (0.0, pytest.approx(found.range[1])) and 2.5 < found.range[1] <= most and found.useful <= most
    assert found.effects["effect"] > 0.8 and not found.unmeasured
