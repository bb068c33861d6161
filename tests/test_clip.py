"""A CLIP model as a scorer, at toy size: its arithmetic, what it refuses, and how a recipe names it."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import steerlib as sl
from steerlib.errors import BadRecipe, UnsupportedTarget
from steerlib.training import named
from steerlib.training.calibrate import prompted as calibrate
from steerlib.training.carry import recipe_in
from steerlib.training.directions import prompted as levers
from steerlib.training.recipe_base import place_of

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 20, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(toy, tmp_path_factory):
    """A model of 8 pixels with random weights, its processor, and the folder of both."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(toy.tokenizer), "eos_token_id": toy.tokenizer.eos_token_id}
    text["bos_token_id"] = toy.tokenizer.bos_token_id
    vision = small | {"image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)).eval()
    size: Any = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    processor = CLIPProcessor(CLIPImageProcessor(**size), toy.tokenizer)
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


def test_a_score_is_the_cosine_of_a_picture_and_what_is_said_of_it(clip):
    model, processor, folder = clip
    found = sl.ClipScore(model, processor, template="a {concept} hill")(PICTURES, "blue")
    seen = processor.image_processor([*PICTURES], return_tensors="pt").pixel_values
    ids = processor.tokenizer(["a blue hill"], return_tensors="pt").input_ids
    with torch.no_grad():
        picture = model.visual_projection(model.vision_model(seen).pooler_output)
        words = model.text_projection(model.text_model(ids).pooler_output)
    torch.testing.assert_close(torch.from_numpy(found), torch.cosine_similarity(picture, words))
    again = sl.ClipScore(folder, template="a {concept} hill")(PICTURES, "blue")
    assert found.std() > 1e-4 and again == pytest.approx(found, abs=1e-6)


def test_pictures_of_a_known_embedding_have_a_known_score(clip):
    model, processor, folder = clip
    own = CLIPModel.from_pretrained(folder)
    for norm, value in ((own.vision_model.post_layernorm, 2.0), (own.text_model.final_layer_norm, 5.0)):
        torch.nn.init.zeros_(norm.weight)
        torch.nn.init.constant_(norm.bias, value)  # whatever the last block gives
    for weight, rows in ((own.visual_projection.weight, (3.0, 4.0)), (own.text_projection.weight, (1.0, 0.0))):
        torch.nn.init.zeros_(weight)
        weight.data[:2] = torch.tensor(rows)[:, None]
    score = sl.ClipScore(own, processor)
    assert score(PICTURES, "blue") == pytest.approx([0.6] * 3) and score.__name__ == "CLIP tiny"


def test_what_is_no_clip_is_refused_and_many_pictures_are_seen_in_parts(clip, monkeypatch):
    model, processor, _ = clip
    whole = sl.ClipScore(model, processor)(PICTURES, "blue")
    monkeypatch.setattr("steerlib.evaluation.clip.BATCH", 2)
    assert sl.ClipScore(model, processor)(PICTURES, "blue") == pytest.approx(whole, abs=1e-6)
    with pytest.raises(BadRecipe, match="a template with {concept}"):
        sl.ClipScore(model, processor, template="a picture")
    for wrong in ((model,), (torch.nn.Linear(1, 1), processor)):
        with pytest.raises(UnsupportedTarget, match="expected a CLIPModel and its CLIPProcessor"):
            sl.ClipScore(*wrong)


def test_a_recipe_and_a_name_can_be_scored_by_a_clip_of_a_folder(clip, toy, tmp_path, monkeypatch):
    few = {"train_prompts": 1, "dev_prompts": 1, "evaluation_prompts": 1, "steps": 2, "methods": ("mean",), "levels": (500,)}
    monkeypatch.setattr(named, "DRAWN", few)
    monkeypatch.setattr(levers, "REACHES", {"norm kept": lambda sites, levels: (sites, levels)})
    monkeypatch.setattr("steerlib.training.package.prompted.find_spec", lambda _: None)
    for name, value in {"DOSES": (), "EDITS": ("Add",), "REMOVED": (("Set", 0.0),)}.items():
        monkeypatch.setattr(calibrate, name, value)
    bank = sl.make(toy, "night", prompts=[f"a hill {k}" for k in range(4)], score=str(clip[2]), work=tmp_path / "work")
    recipe: Any = recipe_in(bank)
    assert bank["night"].effects["scorer"] == "CLIP tiny" and recipe is not None and recipe.score == str(clip[2])
    (tmp_path / "beside").symlink_to(clip[2])
    assert place_of("beside", tmp_path) == str(tmp_path / "beside") and (*(tmp_path / "work").glob("*/chosen by CLIP tiny/*"),)
