"""Recipes as files: every field of every kind, wrong types, unknown and missing names, and what a bank carries of them."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest

import steerlib as sl
from steerlib import errors
from steerlib.training.carry import RECIPE, carried, recipe_in
from steerlib.training.context_recipe import ContextRecipe
from steerlib.training.entries import ConceptRecipe, GraphRecipe, PictureConcept, SiteEncoder
from steerlib.training.fields import UNSAID
from steerlib.training.fit.encoder_recipe import EncoderRecipe
from steerlib.training.recipe import KINDS, DirectionRecipe, PictureRecipe, PipelineEncoderRecipe, TextEncoderRecipe
from steerlib.training.templates import TEMPLATES

TEXTS = {"positive": ["a warm cup", "red tea"], "negative": ["a warm hill", "red stone"]}
BASE = {"name": "x", "base": "b", "source": "s"}
ENCODER = {"site": "layers.0", "latents": 64}
SOUND: dict[Any, dict[str, Any]] = {
    DirectionRecipe: {**BASE, "concepts": [{"name": "tea", "label": "drinks", **TEXTS}]},
    TextEncoderRecipe: {**BASE, "corpus": ["c.txt"], "encoders": [ENCODER, {**ENCODER, "site": "layers.1"}], "graph": {}},
    PipelineEncoderRecipe: {**BASE, "corpus": ["c.txt"], "encoders": [{**ENCODER, "level": 500}]},
    ContextRecipe: {
        **BASE,
        "site": "layers.0",
        "contexts": {name: [f"{name} {k}" for k in range(8)] for name in ("observed", "day")},
    },
    PictureRecipe: {**BASE, "template": "{prompt}, {concept}", "concepts": [{"name": "snow"}]},
}
VALUES = {
    "text": "abc",
    "whole": 3,
    "number": 2.5,
    "flag": True,
    "texts": ["abc"],
    "wholes": [3],
    "table": {"a": 1},
    "tables": [{"a": 1}],
}
ACCEPTED = {
    "str": {"text"}, "int": {"whole"}, "float": {"whole", "number"}, "bool": {"flag"}, "tuple[str, ...]": {"texts"},
    "tuple[int, ...]": {"wholes"}, "tuple[float, ...]": {"wholes"},
    "tuple[float | str, ...]": {"texts", "wholes"},
    "Mapping[str, Any]": {"table"}, "Precision": set(), "Normalisation": set(),
}  # fmt: skip
"""By type as the classes state it, the values above that it takes; entries of their own take none of them."""
PLACES = {
    ConceptRecipe: (DirectionRecipe, "concepts"),
    PictureConcept: (PictureRecipe, "concepts"),
    SiteEncoder: (TextEncoderRecipe, "encoders"),
    EncoderRecipe: (TextEncoderRecipe, "encoders"),
    GraphRecipe: (TextEncoderRecipe, "graph"),
}
WRONG = [
    (cls, f.name, kind)
    for cls in (*KINDS, *PLACES)
    for f in fields(cls)
    if f.name not in (*UNSAID, "recipe", "is_quick")
    for kind in VALUES
    if kind
    not in ACCEPTED.get(
        getattr(f.type, "__name__", "")
        if isinstance(f.type, type)
        else str(f.type).removesuffix(" | None").replace("collections.abc.", "").replace("typing.", ""),
        set(),
    )
]


def toml(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    return f"[{', '.join(map(toml, value))}]" if isinstance(value, list) else json.dumps(value)


def write(folder, values):
    (folder / "c.txt").write_text("a red square\n\na blue circle")
    path = folder / "recipe.toml"
    path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in values.items()))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipes_that_are_broken_below_are_sound(kind, tmp_path):
    assert type(sl.Recipe.from_file(write(tmp_path, SOUND[kind]))) is kind


def test_every_field_of_every_kind_refuses_every_value_of_another_type_by_name(tmp_path):
    assert len(WRONG) > 300
    for cls, name, kind in WRONG:
        if cls in PLACES:
            home, key = (PipelineEncoderRecipe, "encoders") if name == "level" else PLACES[cls]
            entries = SOUND[home][key]
            changed = {**entries, name: VALUES[kind]} if key == "graph" else [{**entries[0], name: VALUES[kind]}, *entries[1:]]
            values = {**SOUND[home], key: changed}
        else:
            values = {**SOUND[cls], name: VALUES[kind]}
        with pytest.raises(errors.BadRecipe) as caught:
            sl.Recipe.from_file(write(tmp_path, values))
        assert "recipe.toml" in str(caught.value) and name in str(caught.value), (cls, name, kind)


@pytest.mark.parametrize(("text", "said"), [
    ('[concepts]\nname = "tea"\nlabel = "drinks"', r"recipe.toml, concepts: expected \[\[concepts\]\] before the fields"),
    ('[[concepts]]\nname = "tea"\nlabel = "drinks"\npositive = "abc"', "concepts 'tea', positive: expected a list.*'abc'"),
    ('[[concept]]\nname = "tea"', "'concept' is none of these names"),
    ('[[concepts]]\nname = "tea"', "concepts 'tea': expected label, which a ConceptRecipe cannot do without"),
    ('[[concepts]]\nnmae = "tea"\nlabel = "x"', "unknown fields nmae; .*did you mean 'name'"),
    ('corpus = ["c.txt"]\n[[encoders]]\nsite = "layers.0"\nlatent = 64', "encoders 1: unknown.*did you mean 'latents'"),
    ('corpus = ["c.txt"]\n[[encoders]]\nsite = "layers.0"\nlatents = 64\nk = "16"', "encoders 1, k: expected a whole number"),
    ('corpus = ["c.csv"]\n[[encoders]]\nsite = "layers.0"\nlatents = 64', "found none"),
    ('[[concepts]]\nname = "../x"\nlabel = "x"', "without slashes"),
    ('[[concepts]]\nname = "answering"\nlabel = "x"', "name of a gate"),
    ('budgt = 3\n[[concepts]]\nname = "tea"\nlabel = "x"', "for budgt did you mean 'budget'"),
])  # fmt: skip
def test_what_a_person_mistypes_is_named_with_what_was_expected(text, said, tmp_path):
    path = write(tmp_path, BASE)
    path.write_text(f"{path.read_text()}\n{text}")
    with pytest.raises(errors.BadRecipe, match=said):
        sl.Recipe.from_file(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_carries_its_recipe_with_the_files_it_names(kind, tmp_path):
    (tmp_path / "reference.jsonl").write_text('{"text": "of my own"}')
    recipe = sl.Recipe.from_file(write(tmp_path, SOUND[kind]))
    bank = sl.ConceptBank("x", [], {}, base=sl.BaseModel(), sites={}, files={RECIPE: carried(recipe)})
    found = recipe_in(sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank")))
    assert found is not None and type(found) is kind and found.read_texts("reference.jsonl") == ["of my own"]
    assert replace(found, folder=recipe.folder, texts=None) == recipe
    assert carried(found) == carried(recipe)
    (tmp_path / "secret.jsonl").write_text('{"text": "of another"}')
    assert replace(found, folder=tmp_path).text_of("secret.jsonl") is None  # what a bank names is looked for in the bank


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_are_sound_recipes_of_every_kind(kind, tmp_path):
    (tmp_path / "recipe.toml").write_text(TEMPLATES[kind])
    for name in ("corpus.txt", "prompts.txt"):
        (tmp_path / name).write_text("a red square\n\na blue circle")
    recipe = sl.Recipe.from_file(tmp_path / "recipe.toml")
    quick = recipe.quick()
    quick.check()
    assert quick.is_quick and quick.digest != recipe.digest and type(quick) is type(recipe)
    assert {type(sl.Recipe.from_file(tmp_path / "recipe.toml")) for _ in (0,)} <= {*KINDS}
