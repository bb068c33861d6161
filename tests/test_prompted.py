"""Concepts of pictures from prompts alone: sums, levers, the score without a judge, recipes, and whole banks at toy size."""

import json
import zlib
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from conftest import two_directions
from scenes import world
from tiny_models import tiny

import steerlib as sl
from steerlib import cli
from steerlib.bank.concepts import Concept
from steerlib.encoders import Directions
from steerlib.errors import BadRecipe, Unanswerable
from steerlib.evaluation import denoising
from steerlib.evaluation.pictures import draw_as_told, saturated
from steerlib.hosts import host_for
from steerlib.origins import source_of
from steerlib.training import named, pipeline
from steerlib.training.calibrate import prompted as calibrate
from steerlib.training.calibrate.prompted import Attempt, Choice, Drawing
from steerlib.training.carry import ported, recipe_in
from steerlib.training.directions import prompted
from steerlib.training.entries import PictureConcept
from steerlib.training.package import prompted as package
from steerlib.training.picture_recipe import PictureRecipe, PromptPair
from steerlib.training.record import contrasts as record

SITE = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2"
LEVELS = (850, 300)
RECIPE = """
name = "toy"
base = "toy"
source = "toy"
template = "{prompt} at {concept}"
prompts = "prompts.txt"
levels = [850, 300]
methods = ["mean", "placed"]
train_prompts = 3
dev_prompts = 1
evaluation_prompts = 1
steps = 3
guidance = 2.0
sites = ["%s"]

[[concepts]]
name = "night"
"""


@pytest.fixture
def recipe(tmp_path):
    return written(tmp_path, RECIPE % SITE)


def written(folder, text):
    (folder / "prompts.txt").write_text("\n".join(world.captions(world.draw(8).factors)) + "\n\n")
    (folder / "recipe.toml").write_text(text)
    return sl.Recipe.from_file(folder / "recipe.toml")


# -- finding -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sums(toy):
    pairs = [PromptPair(f"{said} at night", said, k) for k, said in enumerate(world.captions(world.draw(3).factors))]
    draw = Drawing(toy, PictureRecipe(name="x", base="x", source="x", steps=3, guidance=2.0))
    return pairs, draw, record.contrasts(toy, pairs, draw, sites=[SITE], levels=LEVELS, batch=4)


def test_sums_are_those_of_activations_that_were_recorded_whole(toy, sums):
    pairs, draw, found = sums
    with sl.record(toy, [SITE, f"{SITE}.in"]) as tape:
        draw([pair.positive for pair in pairs] + [pair.negative for pair in pairs], [0, 1, 2] * 2)
    for level, window in record.spans(toy, LEVELS).items():
        seen = [(x, u) for (now, x), (_, u) in zip(tape[SITE], tape[f"{SITE}.in"], strict=True)
                if window.start <= now.progress < window.stop]  # fmt: skip
        rows = torch.cat([x.chunk(2)[1] for x, _ in seen], 1)  # the half of guidance that reads the prompt
        positive, negative = rows.chunk(2)
        difference = positive - negative
        length = difference.norm(dim=-1, keepdim=True)
        own = {name.partition("|")[2]: value for name, value in found.items() if name.startswith(f"{SITE}@{level}|")}
        torch.testing.assert_close(own["difference"] / own["count"], difference.mean((0, 1)), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            own["weighed"] / own["length"], (length * difference).sum((0, 1)) / length.sum(), rtol=1e-3, atol=1e-5
        )
        zero = (length * negative).sum((0, 1)) / length.sum()
        torch.testing.assert_close(own["zero"] / own["length"], zero, rtol=1e-3, atol=1e-5)
        given = torch.cat([u.chunk(2)[1] for _, u in seen], 1)
        torch.testing.assert_close(own["inside sum"] + own["outside sum"], given.sum((0, 1)), rtol=1e-3, atol=1e-2)
        assert float(own["inside count"] + own["outside count"]) == given.shape[0] * given.shape[1]


def test_values_are_parted_where_that_leaves_the_largest_variance_between_both():
    rows = torch.rand(6, 9, generator=torch.Generator().manual_seed(0))
    for row, found in zip(rows, record.apart(rows), strict=True):

        def between(top, row=row):
            inside, outside = row[top], row[~top]
            return len(inside) * len(outside) * (inside.mean() - outside.mean()) ** 2

        best = max((row >= value for value in row if value > row.min()), key=between)
        assert torch.equal(found, best)


def test_levers_read_nothing_where_the_concept_is_not_and_gates_read_where_it_is(toy, sums):
    _, _, found = sums
    lever = prompted.placed(found)
    bank = prompted.bank_of(toy, "x", {"night": lever}, LEVELS)
    assert bank["night"].gate == sl.Gate("night.where", above=0.5, full=1.0) and set(bank.levels) == {"850", "300"}
    for key, own in prompted.by_key(found).items():
        gate, move = bank.encoder(f"{key}#where"), bank.encoder(key)
        assert isinstance(move, Directions)
        ends = torch.stack([own[f"{side} sum"] / own[f"{side} count"] for side in ("outside", "inside")])
        torch.testing.assert_close(gate.encode(ends)[:, 0], torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3)
        assert bank.read_at(bank["night.where"]) == f"{SITE}.in"
        zero = own["zero"] / own["length"]
        assert float(move.encode(zero[None])[0, 0]) == pytest.approx(0, abs=1e-3)
        torch.testing.assert_close(move.decoder[0], own["weighed"] / own["length"])


TEXT = "text_encoder.layers.0"


def test_what_a_text_encoder_makes_of_prompts_is_found_and_moved(toy, sums):
    pairs, draw, _ = sums
    assert record.texts(host_for(toy)) == [TEXT]
    found = record.contrasts(toy, pairs, draw, sites=[SITE], levels=LEVELS, batch=4, texts=[TEXT])
    means = {}
    for arm in ("positive", "negative"):
        with sl.record(toy, [TEXT]) as tape:
            draw([getattr(pair, arm) for pair in pairs], [0, 1, 2])
        means[arm] = next(x for state, x in tape[TEXT] if state.branches == ("cond",)).mean((0, 1))
    lever = prompted.found_by("text", found, [SITE], LEVELS)
    assert [*lever.moves] == [TEXT] and prompted.usable(["mean", "text"], found) == ["mean", "text"]
    torch.testing.assert_close(lever.moves[TEXT], means["positive"] - means["negative"], rtol=1e-3, atol=1e-5)
    assert not [key for key in prompted.found_by("mean", found, [SITE], LEVELS).moves if "@" not in key]
    bank = prompted.bank_of(toy, "x", {"night": lever}, LEVELS)
    with sl.record(toy, [TEXT]) as tape, sl.steer(toy, bank, {"night": 1.0}, branch="cond"):
        draw([pair.negative for pair in pairs], [0, 1, 2])
    moved = next(x for state, x in tape[TEXT] if state.branches == ("cond",)).mean((0, 1))
    torch.testing.assert_close(moved, means["positive"], rtol=1e-3, atol=1e-4)
    without = {key: value for key, value in found.items() if "@" in key}
    assert prompted.usable(["mean", "text"], without) == ["mean"]
    with pytest.raises(BadRecipe, match="needs a text encoder"):
        prompted.usable(["text"], without)


def test_a_lever_that_keeps_norms_turns_tokens_as_the_edit_does_that_keeps_them(toy, sums):
    _, draw, found = sums
    kept, free = (
        prompted.bank_of(toy, "x", {"night": prompted.found_by(name, found, [SITE], LEVELS)}, LEVELS)
        for name in ("mean, norm kept", "mean")
    )
    assert kept["night"].keep_norm and prompted.reaches("mean", "Add", found, [SITE], LEVELS)[-1] == "mean, norm kept"
    drawn = {}
    for name, bank, edit in (("kept", kept, 3.0), ("asked", free, sl.Add(3.0, keep_norm=True)), ("free", free, 3.0)):
        with sl.steer(toy, bank, {"night": edit}, branch="cond"):
            drawn[name] = draw(["a red square"], [0])
    assert torch.equal(drawn["kept"], drawn["asked"]) and not torch.equal(drawn["kept"], drawn["free"])
    again = Concept.from_dict(kept["night"].to_dict())
    assert again == kept["night"]


def test_a_reach_leaves_the_directions_of_some_sites_or_levels(toy, sums):
    _, _, found = sums
    whole, part = (prompted.found_by(name, found, [SITE], LEVELS) for name in ("placed", "placed, low noise"))
    assert [*part.moves] == [*part.gates] == [f"{SITE}@300"] and len(whole.moves) == 2
    assert torch.equal(part.moves[f"{SITE}@300"], whole.moves[f"{SITE}@300"])
    assert prompted.reaches("mean", "Set", found, [SITE], LEVELS) == ["mean, high noise", "mean, low noise"]
    early = {name: value for name, value in found.items() if "@850" in name}
    assert not prompted.reaches("mean", "Set", early, [SITE], LEVELS)  # nothing is left, or all


def test_a_gate_is_read_at_what_the_very_module_is_given_and_not_the_other_way_round(toy, sums):
    _, draw, found = sums
    bank = prompted.bank_of(toy, "x", {"night": prompted.placed(found)}, LEVELS)
    plain = draw(["a red square"], [0])
    with sl.steer(toy, bank, {"night": 3.0}, branch="cond", allow_ood=True) as session:
        moved = draw(["a red square"], [0])
    assert not torch.equal(plain, moved) and session.report().lines[0].acted
    behind = sl.ConceptBank.from_directions({"a": {f"{SITE}.in": torch.ones(16)}, "b": {SITE: torch.ones(16)}}, base=toy)
    with pytest.raises(Unanswerable, match="is read at"):
        sl.steer(toy, behind, {"a": sl.Add(1.0, gate=sl.Gate("b", above=0.0))})


@pytest.mark.parametrize(
    ("family", "ending"), [("sd1", ".attn2"), ("pixart", ".attn2"), ("sd3", ":image.update"), ("flux", ".update")]
)
def test_concepts_are_looked_for_at_cross_attention_or_at_what_blocks_add(family, ending):
    host = host_for(tiny_pipelines.PIPELINES[family].make())
    found = record.places(host)
    assert found and any(name.endswith(ending) for name in found) and not any(":text" in name for name in found)
    assert all(host.site(record.given_to(name)).side == "input" for name in found)


# -- the score without a judge -----------------------------------------------------------------------------------


def test_errors_are_those_of_the_denoiser_called_by_hand(toy):
    prompts = ["a red square", "a blue circle"]
    latents = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    found = denoising.errors(toy, latents, prompts, seed=3, draws=1)
    noise = torch.randn(2, 32 * 32, 3, generator=torch.Generator().manual_seed(3)).transpose(1, 2).reshape(2, 3, 32, 32)
    toy.scheduler.set_timesteps(denoising.STEPS)
    words = toy.tokenizer(prompts, padding="max_length", max_length=toy.tokenizer.model_max_length, return_tensors="pt")
    text, due = toy.text_encoder(words.input_ids)[0], []
    for t in toy.scheduler.timesteps:
        if denoising.JUDGED[0] <= 1 - float(t) / 1000 <= denoising.JUDGED[1]:
            times = t.expand(2)
            with torch.no_grad():
                guess = toy.unet(toy.scheduler.add_noise(latents, noise, times), t, encoder_hidden_states=text).sample
            velocity = toy.scheduler.get_velocity(latents, noise, times)
            due.append((guess - velocity).square().mean((1, 2, 3)))
    assert len(due) == 3
    torch.testing.assert_close(found, torch.stack(due).mean(0), rtol=1e-3, atol=1e-4)


def test_errors_of_two_prompts_in_one_call_are_those_of_two_calls(toy):
    draw = Drawing(toy, PictureRecipe(name="x", base="x", source="x", batch=2, seed=3))
    latents = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    arms = ["a red square", "a", "b"], ["a blue circle", "c", "d"]
    both = draw.errors(latents, *arms)
    for found, arm in zip(both, arms, strict=True):
        parts = [denoising.errors(toy, latents[some], arm[some], seed=3) for some in (slice(2), slice(2, 3))]
        torch.testing.assert_close(found, torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_pictures_that_are_scored_are_those_of_the_latents_and_are_drawn_once(toy):
    recipe = PictureRecipe(name="x", base="x", source="x", steps=2, guidance=2.0, batch=2)
    draw, prompts, kind = Drawing(toy, recipe), ["a red square", "a hill", "a"], type(toy.scheduler)
    latents, pictures = draw.shown(prompts, [4, 5, 6])
    assert torch.equal(latents, draw(prompts, [4, 5, 6])) and type(toy.scheduler) is kind
    noises = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    own = toy(prompts[:2], generator=noises, num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert np.array_equal(pictures[:2], (own * 255).round().astype(np.uint8)) and pictures.shape == (3, 32, 32, 3)
    passes = []
    with toy.unet.register_forward_hook(lambda *_: passes.append(1)):
        for score in (None, lambda some, _: some.mean((1, 2, 3))):
            calibrate.Trials(draw, [PromptPair("a hill", "a", 4)], "hill", score).of(two_directions(tiny("llama")), {})
            passes.append(0)
    first, second, _ = "".join(map(str, passes)).split("0")
    assert first == second and "1" in first


def test_pixels_are_saturated_where_a_channel_is_at_its_end():
    row = [[0, 1, 2], [5, 255, 5], [1, 254, 3], [9, 9, 9]]
    assert saturated(np.array([[row]], dtype=np.uint8)) == 0.5


def test_a_scheduler_is_left_as_it_was_where_a_run_breaks_off(toy):
    kind = type(toy.scheduler)
    with pytest.raises(ValueError, match="num_inference_steps|custom timesteps|steps"):
        denoising.drawn(toy, ["a"], num_inference_steps=5000)
    assert type(toy.scheduler) is kind


@pytest.mark.parametrize("sign", [1, -1])
def test_a_denoiser_that_knows_the_picture_has_no_error_and_its_opposite_is_refused(toy, monkeypatch, sign):
    latents = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))

    def forward(sample, timestep, encoder_hidden_states=None, **_):  # noqa: ARG001 - as the pipeline calls it
        clean, noise = (toy.scheduler.alphas_cumprod[timestep], 1 - toy.scheduler.alphas_cumprod[timestep])
        e = (sample - clean.sqrt() * latents) / noise.sqrt()
        return (sign * (clean.sqrt() * e - noise.sqrt() * latents),)

    monkeypatch.setattr(toy.unet, "forward", forward)
    if sign < 0:
        with pytest.raises(sl.errors.UnsupportedTarget, match="the opposite"):
            denoising.errors(toy, latents, ["a", "b"], draws=1)
    else:
        assert (denoising.errors(toy, latents, ["a", "b"], draws=1) < 1e-4).all()


def test_a_scheduler_that_says_nothing_of_its_denoiser_is_refused():
    class Silent:
        config = type("Config", (), {})()

    with pytest.raises(sl.errors.UnsupportedTarget, match="does not say what its denoiser predicts"):
        denoising.predicts(Silent())


def test_a_choice_says_what_is_safe_and_whether_it_is_useful():
    tried = [Attempt("mean", "Add", amount, min(1.0, amount / 4), amount**2 / 10) for amount in (2.5, 1.0, 6.0, 4.0)]
    best = max(tried, key=lambda line: line.score)
    choice = Choice(best, tried, 1.0)
    assert choice.range == (0.0, 4.0) and choice.beyond == "at 6 a damage of 3.6" and choice.is_useful
    assert choice.best.setting == sl.Add(best.amount)
    assert not choice._replace(told=0.5).is_useful and "told from plain ones" in choice._replace(told=0.5).beyond
    assert Choice.from_json(json.loads(json.dumps(choice))) == choice
    lucky = choice._replace(tried=[*tried, Attempt("mean", "Add", 8.0, 1.0, 0.1)])
    assert lucky.range == (0.0, 4.0)  # beyond an amount that does harm nothing is safe


class Written(Drawing):
    """Draws no picture; errors of prompts on what would be drawn are written down."""

    def __call__(self, prompts, seeds):  # noqa: ARG002 - as `Drawing`
        return torch.tensor([{"a day": 0.0, "a night": 1.0}[prompt] for prompt in prompts]) + 2.0 * STEERED[-1]

    def errors(self, latents, *arms):
        """Of a plain and a prompted picture, and of both steered."""
        table = {"a day": (1.0, 3.0, 2.0, 9.0), "a night": (2.0, 1.0, 1.5, 1.7), "a": (1.5, 2.0, 9.0, 2.1)}
        return [torch.tensor([table[prompt][int(x)] for x, prompt in zip(latents, arm, strict=True)]) for arm in arms]


STEERED = [False]


def test_effect_and_damage_of_errors_that_are_written_down(toy, monkeypatch):
    """Added: -1 plain, 2 prompted, 0.5 steered are shown; the better prompt's error is 1 on natural pictures, 1.5 on steered
    ones. Removed, against the word that both prompts share: -0.5, 1 and 0.4; its error is 1.75 on natural pictures, 2.1."""

    @contextmanager
    def steered(_, bank, edits):
        STEERED.append(bool(edits))
        yield
        STEERED.pop()

    monkeypatch.setattr(calibrate, "steered", steered)
    drawing = Written(toy, PictureRecipe(name="x", base="x", source="x"))
    trials = calibrate.Trials(drawing, [PromptPair("a night", "a day", k) for k in range(3)], "night")
    bank = two_directions(tiny("llama"))
    assert trials.of(bank, {"a": 1.0}) == (0.5, 0.5) and trials.told == 1.0
    assert trials.of(bank, {"a": 1.0}, remove=True) == (0.4, 0.2)


@pytest.mark.parametrize(("positive", "negative", "both"), [
    ("a small blue circle on sand", "a small red square on sand", "a small on sand"),
    ("a hill, by night", "a hill", "a hill"), ("a dark hill", "a pale, wide hill.", "a hill."), ("3", "4", "4"),
])  # fmt: skip
def test_what_two_prompts_share_is_what_a_removed_concept_is_judged_against(positive, negative, both):
    assert calibrate.shared(positive, negative) == both


class Known(calibrate.Trials):
    """Trials of which all is known: a method acts well at 4, better at fewer sites, and reflecting removes best; what is left
    of a concept is subtracted with as much damage."""

    def __init__(self):
        self.concept = "night"

    @property
    def told(self) -> float:
        return 1.0

    def of(self, bank: Any, edits, *, remove=False):
        edit: Any = edits[self.concept]
        if remove:
            if edit.__class__ is sl.Add:
                return calibrate.Trial(min(1.0, -edit.amount / 4), -edit.amount)
            return calibrate.Trial(0.8 if isinstance(edit, sl.Scale) else 0.7, 0.1)
        amount = getattr(edit, "value" if isinstance(edit, sl.Set) else "amount")
        strength = {"mean": 16, "placed": 4, "placed, later": 4}[bank] * (1 + isinstance(edit, sl.Set))
        harm = {"mean": 0, "placed": 0.4, "placed, later": 0.2}[bank]
        return calibrate.Trial(min(1.0, amount / strength), harm * amount)


def test_the_search_finds_the_best_method_amount_reach_and_removal(monkeypatch):
    named: Any = str  # a bank is told by its name alone
    choice = calibrate.chosen(Known(), named, ["mean", "placed"], lambda name, _: [f"{name}, later"])
    assert choice.best == Attempt("placed, later", "Add", 4.0, 1.0, 0.8)
    ways = calibrate.removals(Known(), two_directions(tiny("llama")), "mean")
    assert ways[0] == Attempt("mean", "Scale", -1.0, 0.8, 0.1) and ways[0].setting == sl.Scale(-1.0)
    assert [way.edit for way in ways] == ["Scale", "Set", "Set", "Add", "Add"] and ways[-1].score == 0.0
    monkeypatch.setattr(calibrate, "ENOUGH", ways[0].score)  # which the third reaches
    assert len(calibrate.removals(Known(), two_directions(tiny("llama")), "mean")) == 3


def test_the_second_best_is_not_tried_where_it_cannot_become_the_best():
    tried = [Attempt("mean", "Add", 2.5, 0.6, 0.1), Attempt("placed", "Add", 2.5, 0.9, 0.05)]
    assert calibrate.hoped(tried, "mean", "Add", 1.0) == 0.6 and calibrate.hoped(tried, "mean", "Add", 4.0) == 1 - 0.1 / 4
    asked = []

    class Seen(Known):
        def of(self, bank, edits, *, remove=False):
            asked.append((bank, edits["night"], remove))
            return super().of(bank, edits, remove=remove)

    named: Any = str
    calibrate.chosen(Seen(), named, ["mean", "placed"], lambda name, _: [f"{name}, later"])
    amounts = {edit.amount for bank, edit, _ in asked if bank == "mean" and isinstance(edit, sl.Add)}
    assert amounts == {calibrate.FIRST, 4.0, 6.0}  # an effect of 0.16 at 2.5 is the most at less
    assert len(asked) <= calibrate.most_trials(["mean", "placed"], 1)


# -- recipes -----------------------------------------------------------------------------------------------------


def test_pairs_are_lists_or_a_file_or_prompts_with_a_template(recipe, tmp_path):
    concept, prompts = recipe.concepts[0], recipe.read_prompts()
    assert len(prompts) == 8 and recipe.read_pairs(concept)[0] == (f"{prompts[0]} at night", prompts[0])
    (tmp_path / "pairs").mkdir()
    lines = [{"positive": f"{k} dark", "negative": f"{k} light"} for k in range(5)]
    (tmp_path / "pairs" / "night.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert recipe.read_pairs(concept)[4] == ("4 dark", "4 light")
    own = replace(concept, positive=("a", "b"), negative=("c", "d"))
    assert recipe.read_pairs(own) == [("a", "c"), ("b", "d")]
    for wrong, said in (
        (replace(own, negative=("c",)), "as many negative"),
        (replace(own, negative=("a", "d")), "two different"),
    ):
        with pytest.raises(BadRecipe, match=said):
            recipe.read_pairs(wrong)


def test_no_prompt_and_no_noise_is_in_two_parts(recipe):
    many = replace(recipe, train_prompts=20, dev_prompts=7, evaluation_prompts=5)
    parts = many.read_splits(many.concepts[0])
    assert [len(part) for part in parts] == [20, 7, 5]
    said = [{pair.negative for pair in part} for part in parts]
    assert not (said[0] & said[1] or said[1] & said[2] or said[0] & said[2]) and len(said[0] | said[1] | said[2]) == 8
    assert len({pair.seed for part in parts for pair in part}) == 32


@pytest.mark.parametrize(("change", "said"), [
    ({"template": "{prompt} at night"}, "with {concept}"), ({"levels": ()}, "levels as timesteps"),
    ({"levels": (5, 5)}, "each once"), ({"methods": ()}, "a method or more"), ({"methods": ("median",)}, "unknown methods"),
    ({"texts": {"prompts.txt": "one\ntwo"}}, "4 different pairs"), ({"steps": 0}, "positive numbers"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_loaded(recipe, change, said):
    with pytest.raises(BadRecipe, match=said):
        sl.train(None, replace(recipe, **change))


# -- whole banks -------------------------------------------------------------------------------------------------


@pytest.fixture
def quickly(monkeypatch):
    """Fewer amounts and noises."""
    monkeypatch.setattr("steerlib.training.calibrate.prompted.DOSES", (5.0,))
    monkeypatch.setattr("steerlib.training.package.prompted.SHARES", (1.0,))
    monkeypatch.setattr(denoising, "DRAWS", 1)


@pytest.mark.usefixtures("quickly")
def test_a_pipeline_gets_a_bank_of_concepts_from_prompts(toy, recipe, tmp_path):
    bank = sl.train(toy, recipe, work=tmp_path / "work")
    night = bank["night"]
    assert {place.encoder for place in night.places} <= {f"{SITE}@850", f"{SITE}@300"}
    assert night.effects["scorer"] == "the pipeline itself" and 0 <= night.effects["effect"] <= 1
    assert len(night.effects["saturated"]) == 2 and all(0 <= share <= 1 for share in night.effects["saturated"])
    assert "No judge of pictures had a say" in bank.card and "strips/000.png" in bank.card
    opened = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank"))
    opened.verify()
    carried = recipe_in(opened)
    assert isinstance(carried, PictureRecipe) and carried.read_splits(carried.concepts[0]) == recipe.read_splits(
        recipe.concepts[0]
    )
    again = sl.train(toy, recipe, work=tmp_path / "work").save_pretrained(tmp_path / "again")
    files = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert files and all((again / path).read_bytes() == (tmp_path / "bank" / path).read_bytes() for path in files)


@pytest.mark.usefixtures("quickly")
def test_a_bank_carries_its_pipeline_where_the_recipe_says_so(toy, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "find_spec", lambda _: None)
    toy.save_pretrained(folder := tmp_path / "toy")
    (folder / "notes.json").write_text("{}")  # of no component
    said = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(said | {"_name_or_path": str(tmp_path)}))
    bank = sl.train(None, replace(recipe, source="toy", carry_model=True), work=tmp_path / "work")
    opened = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank"))
    opened.verify()
    assert "source" not in opened.provenance and 'sl.load(str(bank.file("pipeline")))' in opened.card
    there = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.parent != folder)
    own = opened.file("pipeline")
    assert own is not None and (own / "model_index.json").is_file() and not (own / "notes.json").is_file()
    assert sorted(path.relative_to(own) for path in own.rglob("*") if path.is_file() and path.parent != own) == there
    assert json.loads((own / "unet" / "config.json").read_text()) == {k: v for k, v in said.items() if k != "_name_or_path"}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (own / weights).read_bytes() == (folder / weights).read_bytes()
    assert source_of(opened) == str(own) and opened.check(host_for(sl.load(str(own))[0])) == ""
    again = recipe_in(opened)
    assert isinstance(again, PictureRecipe) and again.carry_model and not ported(again, opened, "other").carry_model
    (folder / "unet" / "more.bin").write_bytes(b"")
    for wrong, text in (
        (replace(recipe, carry_model=True), "holds pickles"),
        (replace(recipe, source="none", carry_model=True), "none"),
    ):
        with pytest.raises(BadRecipe, match=text):
            sl.train(None, wrong)


@pytest.mark.usefixtures("quickly")
def test_a_run_that_is_killed_at_any_draw_goes_on_to_the_same_bytes(toy, tmp_path, monkeypatch):
    """In the middle of the pairs, of the search, and of what comes after it; sums are not drawn again."""
    monkeypatch.setattr(named, "DRAWN", {"train_prompts": 3, "dev_prompts": 1, "evaluation_prompts": 1, "steps": 2, "batch": 2})
    given: Any = {"names": "night", "prompts": world.captions(world.draw(6).factors), "name": "bank"}
    whole = sl.make(toy, work=tmp_path / "a", **given).save_pretrained(tmp_path / "whole")
    drawn, draw = [], Drawing.__call__
    (chosen,) = (path.relative_to(tmp_path / "a") for path in (tmp_path / "a").glob("*/chosen/night.json"))
    for killed in (lambda: len(drawn) == 2, lambda: len(drawn) == 5, (tmp_path / "b" / chosen).is_file):

        def dying(self, prompts, seeds, killed=killed):
            drawn.append(prompts)
            if killed():
                raise KeyboardInterrupt
            return draw(self, prompts, seeds)

        drawn.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Drawing, "__call__", dying)
            sl.make(toy, work=tmp_path / "b", **given)
    monkeypatch.setattr(package, "contrasts", lambda *_, **__: pytest.fail("drawn again"))
    gone_on = sl.make(toy, work=tmp_path / "b", **given).save_pretrained(tmp_path / "gone on")
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(gone_on) for path in gone_on.rglob("*") if path.is_file())
    assert all((gone_on / path).read_bytes() == (whole / path).read_bytes() for path in files)


@pytest.mark.usefixtures("quickly")
def test_removal_is_chosen_anew_from_choices_that_are_stored(toy, recipe, tmp_path, monkeypatch):
    """Also from those of a time when a choice named the way of removal."""
    whole = sl.train(toy, recipe, work=tmp_path / "work").save_pretrained(tmp_path / "whole")
    (lost,), (kept,) = ([*(tmp_path / "work").glob(f"*/{name}/night.json")] for name in ("removed", "chosen"))
    before = json.loads(kept.read_text())
    best, tried, told = before["choice"]
    kept.write_text(json.dumps(before | {"choice": [best, tried, "ablated", told], "removed": [0.1, 9.0]}))
    lost.unlink()
    monkeypatch.setattr(package, "chosen", lambda *_: pytest.fail("chosen again"))
    again = sl.train(toy, recipe, work=tmp_path / "work").save_pretrained(tmp_path / "again")
    assert (again / "concepts.jsonl").read_bytes() == (whole / "concepts.jsonl").read_bytes()
    assert 0 < len(json.loads(lost.read_text())["tried"]) <= len(calibrate.REMOVED)


@pytest.mark.usefixtures("quickly")
def test_a_scorer_of_the_user_is_given_pictures_and_the_name(toy, tmp_path):
    seen = []

    def redness(pictures, name):
        seen.append((pictures.shape[1:], pictures.dtype, name))
        return pictures[..., 0].mean((1, 2))

    prompts = [f"{said} " for said in world.captions(world.draw(4).factors)]
    quick = {"steps": 2, "train_prompts": 2, "dev_prompts": 1, "evaluation_prompts": 1, "sites": (SITE,), "methods": ("mean",)}
    made = PictureRecipe(
        name="x", base="x", source="x", concepts=(), prompts="p.txt", texts={"p.txt": "\n".join(prompts)}, **quick
    )
    recipe = replace(made, concepts=(PictureConcept(name="night"),))
    with pytest.raises(BadRecipe, match="a finite number from score= for each of 1 pictures"):
        sl.train(toy, recipe, score=lambda pictures, name: 3.0)  # noqa: ARG005
    bank = sl.train(toy, recipe, score=redness)
    assert bank["night"].effects["scorer"] == "redness" and {*seen} == {((32, 32, 3), np.dtype("uint8"), "night")}


@pytest.mark.usefixtures("quickly")
def test_a_pipeline_makes_concepts_of_names_and_draws_with_them_at_the_command_line(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(named, "DRAWN", {"train_prompts": 2, "dev_prompts": 1, "evaluation_prompts": 1, "steps": 2})
    monkeypatch.setattr("steerlib.training.package.prompted.find_spec", lambda _: None)
    toy.save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("\n".join(world.captions(world.draw(4).factors)))
    folder, picture = tmp_path / "bank", tmp_path / "picture.png"
    files = {"prompts": tmp_path / "prompts.txt", "work": tmp_path / "work", "out": folder}
    how: Any = {"steps": 1, "guidance": 1.5, "dtype": cli.Precision.bfloat16, "threads": 1}
    cli.make(str(tmp_path / "pipe"), ["by night"], **how, **files)
    assert [*files["work"].glob("*-bfloat16/sums/by night.safetensors")]  # apart from that of other precisions
    recipe = recipe_in(sl.ConceptBank.from_pretrained(folder))
    assert isinstance(recipe, PictureRecipe) and recipe.read_pairs(recipe.concepts[0])[0][0].endswith(", by night")
    assert (recipe.steps, recipe.guidance) == (1, 1.5)
    assert recipe.plain in capsys.readouterr().out  # the prompt of the command that it ends with
    cli.steer(str(folder), "a red square", ["by night=2"], threads=1, out=picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_made_in_another_precision_has_a_folder_of_its_own(recipe):
    llama, halved = tiny("llama"), tiny("llama").to(torch.bfloat16)
    assert (pipeline.precision_of(llama), pipeline.precision_of(halved)) == ("", "bfloat16")
    (place,), (other,) = (pipeline.work_of(recipe, Path("work"), model) for model in (llama, halved))
    assert (place.name, other.name) == (pipeline.key_of(recipe), f"{place.name}-bfloat16")


@pytest.mark.parametrize("given", [{"prompts": ["a house"]}, {"steps": 4}, {"guidance": 0.0}])
def test_how_pictures_are_drawn_is_of_pipelines_alone(given):
    with pytest.raises(BadRecipe, match="prompts=, score=, steps= and guidance= are of pictures"):
        sl.make(tiny("llama"), "river", tokenizer=object(), **given)


@pytest.mark.parametrize(("given", "said"), [
    ({"prompts": "a house"}, "prompts as a list"), ({"prompts": ["a", "b"]}, "4 different pairs"), ({"names": []}, "a name"),
])  # fmt: skip
def test_what_cannot_become_concepts_of_pictures_is_refused(toy, given, said):
    with pytest.raises(BadRecipe, match=said):
        sl.make(toy, given.pop("names", ["night"]), **given)


# -- every kind of pipeline --------------------------------------------------------------------------------------


def asked_in_words(family):
    """A pipeline at toy size that makes embeddings of its own of each prompt."""
    pipe = family.build()

    def call(self, prompt, **how):
        given = family.call(self, batch=len(prompt))
        for name, shape in family.prompt.items():
            if "mask" not in name:
                seeds = [zlib.crc32(text.encode()) for text in prompt]
                given[name] = family.join([torch.randn(shape, generator=tiny_pipelines.seeded(seed)) for seed in seeds])
        return type(pipe).__mro__[1].__call__(self, **{**given, **how})

    pipe.__class__ = type("AskedInWords", (type(pipe),), {"__call__": call})
    return pipe


WITH_PROMPTS = [name for name, family in tiny_pipelines.PIPELINES.items() if family.prompt]


@pytest.mark.parametrize("family", ["sdxl", "pixart", "sd3", "flux", "flux2", "qwenimage", "wan", "zimage"])
def test_pairs_are_drawn_and_pictures_are_judged_under_every_kind_of_denoiser_and_scheduler(family):
    pipe = asked_in_words(tiny_pipelines.PIPELINES[family])
    host, plan = host_for(pipe), PictureRecipe(name="x", base="x", source="x", steps=3)
    draw, sites = Drawing(pipe, plan), record.places(host)
    found = record.contrasts(pipe, [PromptPair("a", "b", 0)], draw, sites=sites, levels=(500,), batch=2)
    lever = prompted.placed(found)
    assert len(lever.moves) >= len(sites) - 1  # what no later block sees may not differ
    latents = draw(["a", "a"], [0, 1])
    bank = prompted.bank_of(pipe, "x", {"c": lever}, (500,))
    with sl.steer(pipe, bank, {"c": 4.0}, branch="cond", allow_ood=True):
        assert not torch.equal(draw(["a", "a"], [0, 1]), latents)
    own, again, other = (denoising.errors(pipe, latents, [said] * 2, draws=1) for said in ("a", "a", "b"))
    assert own.shape == (2,) and (own > 0).all() and torch.equal(own, again) and not torch.equal(own, other)


@pytest.mark.parametrize(("family", "sign"), [("lumina2", -1), ("zimage", -1), ("sana", 1)])
def test_a_denoiser_is_judged_by_what_its_scheduler_is_told(family, sign, monkeypatch):
    """Lumina 2 and Z-Image give the velocity towards the picture, which their pipelines turn around."""
    pipe = asked_in_words(tiny_pipelines.PIPELINES[family])
    latents = Drawing(pipe, PictureRecipe(name="x", base="x", source="x", steps=1))(["a"], [0])

    @wraps(plain := pipe.transformer.forward)
    def knows(*args, **kwargs):
        x, time, *_ = signature(plain).bind(*args, **kwargs).arguments.values()
        time = kwargs.get("timestep", time)
        sigma = 1 - float(time[0]) if sign < 0 else float(time[0]) / 1000
        rows = torch.stack(x)[:, :, 0] if isinstance(x, list) else x
        velocity = sign * (rows - latents) / sigma
        return ([*velocity[:, :, None]] if isinstance(x, list) else velocity,)

    monkeypatch.setattr(pipe.transformer, "forward", knows)
    assert (denoising.errors(pipe, latents, ["a"], draws=1) < 1e-3).all()


@pytest.fixture
def briefly(monkeypatch):
    """One method, one amount, one way of removal."""
    few = {"train_prompts": 1, "dev_prompts": 1, "evaluation_prompts": 1, "steps": 2, "methods": ("placed",), "levels": (500,)}
    monkeypatch.setattr(named, "DRAWN", few)
    for name, value in {"DOSES": (), "EDITS": ("Add",), "REMOVED": (("Set", 0.0),)}.items():
        monkeypatch.setattr(calibrate, name, value)
    monkeypatch.setattr(prompted, "REACHES", {"norm kept": lambda sites, levels: (sites, levels)})
    monkeypatch.setattr(denoising, "DRAWS", 1)
    monkeypatch.setattr(package, "find_spec", lambda _: None)


@pytest.mark.usefixtures("briefly")
@pytest.mark.parametrize("family", WITH_PROMPTS)
def test_every_family_makes_concepts_of_names(family):
    pipe = asked_in_words(tiny_pipelines.PIPELINES[family])
    bank = sl.make(pipe, ["by night"], prompts=["a house", "a boat", "a hill", "a cup"])
    assert bank["by night"].effects["scorer"] == "the pipeline itself" and bank.base.fingerprint
    assert {*bank["by night"].effects} >= {"effect", "damage", "removed"} and "by night" in bank.card


CLASSES: dict[str, Any] = {"positive": ("1", "3", "5", "tabby cat"), "negative": ("2", "4", "6", "grey cat")}


@pytest.mark.usefixtures("briefly")
def test_a_pipeline_of_classes_makes_concepts_of_labels_and_refuses_prompts():
    pipe = tiny_pipelines.PIPELINES["dit"].build()
    pipe.labels = {"tabby cat": 7, "grey cat": 8}  # no class is called by the word that both share
    with pytest.raises(BadRecipe, match="draws classes: expected lists positive and negative"):
        sl.make(pipe, ["by night"], prompts=["a house", "a boat", "a hill", "a cup"])
    plan = named.picture_recipe_of([], "x", None, name="x")
    recipe = replace(plan, concepts=(PictureConcept(name="odd", **CLASSES),), batch=4)
    bank = sl.train(pipe, recipe)
    assert "picture = pipe([8]).images[0]" in bank.card and bank["odd"].effects["told"] in (0.0, 1.0)
    draw, plain = Drawing(pipe, recipe), draw_as_told(pipe, ["tabby cat"], steps=2)
    assert np.array_equal(plain, draw_as_told(pipe, ["7"], steps=2)) and plain.shape[1:] == (16, 16, 3)
    with sl.steer(pipe, bank, {"odd": 2.0}, branch="cond"):
        moved = draw(["tabby cat"], [0])
    assert not torch.equal(moved, draw(["7"], [0])) and len(moved) == 1
