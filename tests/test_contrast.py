"""Directions from data: the means that a loop by hand computes, whatever the numbers, pads and turns."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import two_directions
from tiny_models import WORDS, tiny, toy_tokenizer

import steerlib as sl
from steerlib import errors
from steerlib.training.calibrate.prompted import Drawing
from steerlib.training.carry import carried
from steerlib.training.contrast import contrasts_in
from steerlib.training.directions import prompted
from steerlib.training.entries import ConceptRecipe
from steerlib.training.picture_recipe import PictureRecipe, PromptPair
from steerlib.training.recipe import DirectionRecipe
from steerlib.training.record.contrasts import contrasts

TALK = [
    {"role": "user", "content": "why rain"},
    {"role": "assistant", "content": "the cold wind"},
    {"role": "user", "content": "now"},
]
POSITIVE = ("the sun rises slowly", "warm bread", (TALK, "green tea cup"), ("why sings bird", "red house . old door"))
NEGATIVE = ("the moon falls now here", ("why snow", "black stone"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return toy_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", vocab_size=len(WORDS) + 3)


def by_hand(model, tokenizer, texts, module):
    """The mean over tokens of each text, one text at a time, unpadded: `[n, D]`."""
    seen, rows = [], []
    handle = module.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    for text in texts:
        if isinstance(text, str):
            ids, start = tokenizer(text)["input_ids"], 1
        else:
            talk = [{"role": "user", "content": text[0]}] if isinstance(text[0], str) else text[0]
            asked = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
            ids = tokenizer(asked + text[1], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            model(torch.tensor([ids]))
        rows.append(seen.pop()[0, start:].mean(0))
    handle.remove()
    return torch.stack(rows)


@pytest.mark.parametrize("site", ["layers.0", "layers.1.attn"])
def test_differences_are_those_of_means_by_hand(site, model, tokenizer):
    contrast = sl.Contrast(POSITIVE, NEGATIVE)
    bank = sl.directions(model, {"polite": contrast}, sites=["layers.0", "layers.1.attn"], tokenizer=tokenizer)
    module = model.model.layers[0] if site == "layers.0" else model.model.layers[1].self_attn
    p, n = (by_hand(model, tokenizer, texts, module) for texts in (POSITIVE, NEGATIVE))
    place = next(place for place in bank["polite"].places if bank.site_of(place) == site)
    rows = bank.rows(place)
    torch.testing.assert_close(rows.write[0], p.mean(0) - n.mean(0), atol=1e-5, rtol=0)
    reading = [float(rows.reading(mean)) for mean in (p.mean(0), n.mean(0))]
    assert reading == pytest.approx([0.5, -0.5], abs=1e-4)  # midway between the classes it reads 0
    assert bank.base.weights is not None and bank.norm_of(place) and bank["polite"].range is None
    with torch.no_grad(), sl.steer(model, bank, {"polite": 0.1}):
        model(torch.tensor([[1, 2, 3]]))


def test_a_method_is_a_function_or_a_name(model, tokenizer):
    given = []

    def mine(positive, negative):
        given.append((positive.shape, negative.shape))
        return positive[0]

    data = {"polite": sl.Contrast(POSITIVE, NEGATIVE)}
    bank = sl.directions(model, data, sites=[0], method=mine, tokenizer=tokenizer)
    assert given == [((4, 32), (2, 32))] and bank.provenance == {"directions": {"method": "a function"}}
    torch.testing.assert_close(bank.rows(bank["polite"]).write, by_hand(model, tokenizer, POSITIVE[:1], model.model.layers[0]))
    with pytest.raises(errors.BadBank, match="no method 'gated' works without a search"):
        sl.directions(model, data, sites=[0], method="gated", tokenizer=tokenizer)
    with pytest.raises(errors.WrongWidth, match="expected a vector of 32 from the method"):
        sl.directions(model, data, sites=[0], method=lambda p, n: p, tokenizer=tokenizer)
    with pytest.raises(errors.BadBank, match="requires gradients"):
        sl.directions(model, data, sites=[0], method=lambda p, n: p[0].clone().requires_grad_(), tokenizer=tokenizer)


def test_the_probe_finds_the_coordinate_that_tells_classes_apart_whatever_their_sizes():
    from steerlib.training.contrast import BY_NAME

    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(90, 4, generator=generator), torch.randn(30, 4, generator=generator)
    positive[:, 2] += 6.0
    found = BY_NAME["probe"](positive, negative)
    assert found.abs().argmax() == 2 and found[2] > 5 and found[[0, 1, 3]].abs().max() < 1


def test_rows_and_preferences_become_classes():
    rows = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}, {"text": "c", "label": "yes"}]
    assert sl.Contrast.from_rows(rows, positive="yes") == sl.Contrast(("a", "c"), ("b",))
    with pytest.raises(errors.BadBank, match="label 'yes' is neither true nor false; give positive="):
        sl.Contrast.from_rows(rows)
    with pytest.raises(errors.BadBank, match="expected fields 'said', 'label' in every row"):
        sl.Contrast.from_rows(rows, text="said")
    with pytest.raises(errors.BadBank, match="expected negative texts"):
        sl.Contrast.from_rows([{"text": "a", "label": True}])
    answer = [{"role": "assistant", "content": "warm"}]
    said = [{"prompt": TALK, "chosen": "warm", "rejected": "cold"}, {"prompt": TALK, "chosen": answer, "rejected": answer}]
    wanted = sl.Contrast(((TALK, "warm"), (TALK, "warm")), ((TALK, "cold"), (TALK, "warm")))
    assert sl.Contrast.from_preferences(said) == wanted
    chat = [{"role": "assistant", "content": "well"}, {"role": "user", "content": "go on"}, *answer]
    later = sl.Contrast.from_preferences([{"prompt": "talk", "chosen": chat, "rejected": chat}])
    assert later.positive == (([{"role": "user", "content": "talk"}, *chat[:2]], "warm"),)
    with pytest.raises(errors.BadBank, match="expected fields 'asked', 'chosen', 'rejected' in every row, got prompt"):
        sl.Contrast.from_preferences(said, prompt="asked")
    whole = [{"chosen": [*TALK, *answer], "rejected": [*TALK, *answer]}]
    assert sl.Contrast.from_preferences(whole, prompt=None).positive == ((TALK, "warm"),)


def test_messages_without_a_chat_template_are_refused(model):
    plain = toy_tokenizer()
    plain.chat_template = None
    with pytest.raises(errors.UnsupportedTarget, match="no chat template to write messages with"):
        sl.directions(model, {"a": sl.Contrast(((TALK, "warm"),), ("cold rain",))}, sites=[0], tokenizer=plain)


# -- pictures -------------------------------------------------------------------------------------------------------------

SITE = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2"
PLAIN = ["a small red square", "a large blue circle on sand", "a green triangle"]
NIGHT = [f"{prompt} by night" for prompt in PLAIN]


def test_directions_of_pictures_are_the_mean_difference_of_pairs_drawn_from_one_noise(toy):
    drawing = {"steps": 3, "guidance": 2.0, "seed": 7}
    data = {"night": sl.Contrast.from_prompts(NIGHT, PLAIN)}
    bank = sl.directions(toy, data, sites=[SITE], batch=4, **drawing)
    recipe = PictureRecipe(name="x", base="x", source="x", steps=3, guidance=2.0)
    pairs = [PromptPair(said, plain, 7 + k) for k, (said, plain) in enumerate(zip(NIGHT, PLAIN, strict=True))]
    sums = contrasts(toy, pairs, Drawing(toy, recipe), sites=[SITE], levels=(500,), batch=6)  # summed by pair, in one batch
    ((_, move),) = prompted.mean(sums).moves.items()
    torch.testing.assert_close(bank.rows(bank["night"]).write[0], move, rtol=1e-4, atol=1e-6)
    assert move.norm() > 0 and bank.norm_of(bank["night"]) and bank.provenance["directions"]["drawing"]["steps"] == 3
    whole = sl.directions(toy, data, steps=1, batch=6)
    assert SITE in whole.sites and all(name.endswith("attn2") for name in whole.sites)
    with sl.steer(toy, bank, {"night": 1.0}) as session:
        toy(PLAIN[:1], num_inference_steps=1, output_type="latent")
    assert session.report().lines[0].acted


def test_prompts_of_pictures_are_pairs(toy):
    with pytest.raises(errors.BadBank, match="differs in the concept alone, got 3 and 2, of which 2 are"):
        sl.Contrast.from_prompts(NIGHT, PLAIN[:2])
    with pytest.raises(errors.BadBank, match="of which 1 are such pairs"):
        sl.directions(toy, {"night": sl.Contrast(("a", "b"), ("c", "b"))}, sites=[SITE])
    with pytest.raises(errors.BadBank, match="levels: no argument of what is drawn"):
        sl.directions(toy, {"night": sl.Contrast.from_prompts(NIGHT, PLAIN)}, sites=[SITE], levels=(500,))


# -- a bank is made again from itself --------------------------------------------------------------------------------------


def test_a_bank_is_made_again_from_the_data_that_its_license_lets_it_carry(model, tokenizer, tmp_path):
    data = {"polite": sl.Contrast(POSITIVE, NEGATIVE, license="CC0-1.0"), "mine": sl.Contrast(POSITIVE[:2], NEGATIVE)}
    bank = sl.directions(model, data, sites=["layers.1", "layers.0.attn"], method="probe", tokenizer=tokenizer)
    stored = sl.ConceptBank.from_pretrained(bank.rename({"polite": "kind"}).save_pretrained(tmp_path / "bank"))
    assert contrasts_in(stored) == {"kind": data["polite"]} and b"mine" not in stored.content("contrast.jsonl")
    again = sl.directions(model, stored, tokenizer=tokenizer)
    assert list(again) == ["kind"] and again.provenance == bank.provenance and again.content("contrast.jsonl")
    for one, other in zip(again["kind"].places, bank["polite"].places, strict=True):
        assert again.site_of(one) == bank.site_of(other)
        for mine, first in zip(again.rows(one)[:3], bank.rows(other)[:3], strict=True):
            torch.testing.assert_close(mine, first)
    plain = sl.directions(model, {"mine": data["mine"]}, sites=[0], tokenizer=tokenizer)
    assert not plain.files
    with pytest.raises(errors.BadBank, match="carries no contrast data"):
        sl.directions(model, plain, tokenizer=tokenizer)
    broken = bank.with_concepts(files={"contrast.jsonl": b'{"id": "layers.1/0", "positive": [1]}'})
    with pytest.raises(errors.CorruptBank, match="has no contrast data"):
        contrasts_in(broken)


def test_the_pairs_of_a_recipe_are_contrast_data_too():
    pairs: Any = {"positive": ("warm milk", "tea"), "negative": ("cold rain", "snow")}
    concepts = (ConceptRecipe(name="a", label="warmth", **pairs), ConceptRecipe(name="gone", label="x", **pairs))
    recipe = DirectionRecipe(name="r", base="b", source="s", concepts=concepts, license="CC0-1.0", prompts="p.jsonl")
    recipe = replace(recipe, texts={"p.jsonl": '{"prompt": "why", "split": "train"}\n'})
    bank = two_directions(tiny("llama")).with_concepts(files={"recipe.jsonl": carried(recipe)})
    wanted = sl.Contrast((("why", "warm milk"), ("why", "tea")), (("why", "cold rain"), ("why", "snow")), license="CC0-1.0")
    assert contrasts_in(bank) == {"a": wanted}
