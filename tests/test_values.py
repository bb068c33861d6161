"""Values from outside: masks, amounts, gates, vectors and sites as other libraries have them are taken right, or refused."""

from typing import Any

import jaxtyping
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import two_directions
from tiny_models import tiny
from tiny_pipelines import ddpm

import steerlib as sl
from steerlib import errors
from steerlib.encoders import ReLU, Transcoder
from steerlib.steering.masks import mask_of

HALF = np.zeros((8, 8), np.uint8)
HALF[:, :4] = 255
SOFT = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
IDS = torch.arange(3, 9)[None]


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """As users run it: no type checker stands before the library's own checks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def rgb(grey):
    return PIL.Image.fromarray(np.repeat(grey[..., None], 3, -1))


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


FORMS: dict[str, Any] = {
    "float tensor": lambda m: torch.tensor(m / 255.0),
    "half tensor": lambda m: torch.tensor(m / 255.0).half(),
    "byte tensor": torch.tensor,
    "float array": lambda m: m / 255.0,
    "byte array": lambda m: m,
    "read-only array": read_only,
    "array of the other byte order": lambda m: (m / 255.0).astype(">f4"),
    "half array": lambda m: (m / 255.0).astype(np.float16),
    "grey picture": PIL.Image.fromarray,
    "RGB picture": rgb,
    "with two axes more": lambda m: torch.tensor(m / 255.0)[None, None],
    "bytes with two axes more": lambda m: m[None, None],
    "with a row more": lambda m: torch.tensor(m)[None],
}
TRUTH: dict[str, Any] = {
    "bool tensor": lambda m: torch.tensor(m > 0),
    "bool array": lambda m: m > 0,
    "whole numbers": lambda m: torch.tensor(m > 0).long(),
    "bytes of 0 and 1": lambda m: (m > 0).astype(np.uint8),
    "black and white": lambda m: PIL.Image.fromarray(m).convert("1"),
}


@pytest.mark.parametrize("form", [*FORMS, *TRUTH])
def test_a_mask_means_the_same_in_whatever_form_it_comes(form):
    for mask in (HALF,) if form in TRUTH else (HALF, SOFT):
        found: Any = mask_of((FORMS | TRUTH)[form](mask))
        torch.testing.assert_close(found.weights.squeeze(), torch.tensor(mask / 255.0).float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("mask", "words"), [
    (torch.tensor(HALF).float(), "0 to 255 of torch.float32"), (HALF.astype(np.int64), "0 to 255 of torch.int64"),
    (HALF.astype(np.float32), "mask / 255"), (torch.full((8, 8), -0.5), "-0.5 to -0.5"),
    (torch.full((8, 8), 1.5), "1.5 to 1.5"), (torch.full((8, 8), torch.nan), "nan to nan"), (torch.ones(0, 8), "of shares"),
    (torch.ones(8, 8, dtype=torch.complex64), "of shares"), (HALF[..., None], "channels last"),
    (np.repeat(HALF[..., None], 3, -1), "channels last"), (np.array([["a"]]), "mask of numbers"),
    (PIL.Image.fromarray(HALF).convert("P"), "mode 'P'"), (PIL.Image.fromarray(HALF).convert("RGBA"), "mode 'RGBA'"),
    (PIL.Image.fromarray(HALF.astype(np.float32)), "mode 'F'"), ([[0, 1], [1, 1]], "expected a mask"),
    ("mask", "expected a mask"), ([0.0, 0.0, 2.0, 1.0], "box"), (object(), "expected a mask"),
])  # fmt: skip
def test_a_mask_that_is_none_is_refused_when_the_edit_is_made(mask, words):
    with pytest.raises(errors.BadEdit, match=words):
        sl.Add(1.0, mask=mask)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def moved(model, bank, edit, rows=1) -> Any:
    """The change of `layers.0` by an edit."""
    ids = IDS.expand(rows, -1)
    with torch.no_grad(), sl.record(model, ["layers.0"]) as plain:
        model(ids)
    with torch.no_grad(), sl.steer(model, bank, edit, allow_ood=True), sl.record(model, ["layers.0"]) as seen:
        model(ids)
    return seen["layers.0"][0][1] - plain["layers.0"][0][1]


@pytest.mark.parametrize("mask", [[0, 1, 0, 1, 1, 0], [[0, 1, 0, 1, 1, 0]]], ids=["text", "row"])
def test_masks_of_a_text_act_at_their_positions_in_whatever_form(mask, llama):
    bank, numbers = two_directions(llama), np.array(mask)
    expected = torch.tensor([0, 1, 0, 1, 1, 0.0])[:, None] * bank.rows(bank["a"]).write[0]
    forms = (torch.tensor(numbers), torch.tensor(numbers).bool(), numbers, numbers.astype(np.uint8) * 255, numbers > 0)
    for form in forms:
        torch.testing.assert_close(moved(llama, bank, {"a": sl.Add(1.0, mask=form)})[0], expected)
    with pytest.raises(errors.BadEdit, match=r"\[L\] or \[rows, L\]"):
        moved(llama, bank, {"a": sl.Add(1.0, mask=torch.ones(1, 1, 6))})


# -- amounts and gates --------------------------------------------------------------------------------------------


AMOUNTS = [2.0, 2, [2.0], (2.0,), np.float32(2), np.array(2.0), np.array([2.0]), torch.tensor(2.0), torch.tensor([2.0])]
NO_AMOUNTS = ["2", b"2", ["1", "2"], None, [], float("nan"), [1.0, float("inf")], [[1.0]], np.ones((2, 2)), {}, {1.0}, 1j,
              torch.tensor([torch.nan]), torch.tensor(2.0, requires_grad=True), object(), slice(2)]  # fmt: skip


@pytest.mark.parametrize("make", [sl.Add, sl.Scale, sl.Set, lambda a: sl.Clamp(high=a)], ids=["Add", "Scale", "Set", "Clamp"])
def test_amounts_in_whatever_form_mean_the_same_or_are_refused(make):
    assert all(make(amount) == make(2.0) for amount in AMOUNTS)
    pair = np.array([1.0, 2.0])
    assert make([1.0, 2.0]) == make(pair) == make(torch.tensor(pair)) == make((1.0, 2.0))
    for amount in NO_AMOUNTS:  # of a Clamp, None means no bound, and it needs one
        with pytest.raises(errors.BadEdit):
            make(amount)


def test_a_bare_amount_that_is_none_is_refused_with_its_concept(llama):
    for amount in NO_AMOUNTS:
        with pytest.raises(errors.BadEdit):
            sl.steer(llama, two_directions(llama), {"a": amount})


@pytest.mark.parametrize("edits", [
    {"a": [1.0, 2.0], "b": [1.0, 2.0, 3.0]}, {"a": sl.Clamp(low=[0.0, 1.0], high=[2.0, 3.0, 4.0])},
    {"a": torch.ones(2), "b": sl.Set([1.0, 1.0, 2.0])},
])  # fmt: skip
def test_amounts_for_different_numbers_of_prompts_are_refused(edits, llama):
    with pytest.raises(errors.RowMismatch, match="2 of 'a' and 3 of '[ab]'"):
        sl.steer(llama, two_directions(llama), edits)


@pytest.mark.parametrize("given", [("a", "b"), ["a"], 3, None, sl.Gate("a", above=0.0)])
def test_a_gate_names_one_concept(given):
    with pytest.raises(errors.BadEdit, match="name of one concept"):
        sl.Gate(given)


@pytest.mark.parametrize(
    "bounds", [{"above": "0.5"}, {"below": [1.0]}, {"above": 0.0, "full": "1"}, {"above": torch.nan}, {"above": True}]
)
def test_bounds_of_a_gate_are_numbers(bounds):
    with pytest.raises(errors.BadEdit, match="of a gate as a number"):
        sl.Gate("a", **bounds)
    given: Any = {"above": np.float32(0.5), "full": torch.tensor(1.5)}
    assert sl.Gate("a", **given) == sl.Gate("a", above=0.5, full=1.5)


@pytest.mark.parametrize("gate", [("a", "b"), (sl.Gate("a"), sl.Gate("b")), "a"])
def test_an_edit_takes_one_gate(gate):
    with pytest.raises(errors.BadEdit, match="a Gate or 'open'"):
        sl.Add(1.0, gate=gate)


# -- vectors and sites --------------------------------------------------------------------------------------------


VECTOR = torch.linspace(-1, 1, 32)


ALIKE = {
    "array": VECTOR.numpy(),
    "double array": VECTOR.numpy().astype(np.float64),
    "list": VECTOR.tolist(),
    "double": VECTOR.double(),
    "bfloat16": VECTOR.bfloat16(),
}


@pytest.mark.parametrize("vector", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("site", ["layers.0", 0, np.int64(0), ["layers.0"], (0,)])
def test_vectors_and_sites_in_whatever_form_make_the_same_bank(vector, site, llama):
    bank = sl.ConceptBank.from_directions({"a": vector}, site=site, base=llama)
    change = moved(llama, bank, {"a": 1.0})
    torch.testing.assert_close(change, VECTOR.expand_as(change), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("directions", "site", "words"), [
    ({"a": VECTOR}, None, "expected site= for 'a'"), ({3: VECTOR, 5: VECTOR}, None, "names of concepts"),
    ({"layers.0": VECTOR, "layers.1": VECTOR}, None, "site="), ({"a": {0: VECTOR}}, 1, "and no site="),
    ({"a": {}}, None, "got 0"), ({"a": VECTOR}, -1, "name of a site"), ({"a": VECTOR}, True, "name of a site"),
    ({"a": VECTOR}, [0, "layers.0"], "each site once"),
    ({"a": VECTOR}, [], "each site once"), ({}, 0, "at least one"), ([VECTOR], 0, "by name of concept"),
    ({"a": "vector"}, 0, "vector of numbers"), ({"a": VECTOR[None]}, 0, "one axis"), ({"a": VECTOR + 1j}, 0, "one axis"),
    ({"a": VECTOR[:5]}, 0, "width 32"),
    ({"a": VECTOR, "b": VECTOR[:5]}, 0, "equal width"), ({"a": VECTOR * torch.nan}, 0, "finite"),
    ({"a": {0: VECTOR, 1: VECTOR[:5]}}, None, "width 32"),
])  # fmt: skip
def test_vectors_that_make_no_bank_are_refused(directions, site, words, llama):
    with pytest.raises(errors.BadBank, match=words):
        sl.ConceptBank.from_directions(directions, site=site, base=llama)


@pytest.mark.parametrize(("directions", "site"), [
    ({"a": {"layers.0": VECTOR, 1: 2 * VECTOR}, "b": {1: VECTOR.flip(0)}}, None), ({"a": VECTOR}, [0, "layers.1"]),
])  # fmt: skip
def test_one_concept_of_several_sites_moves_at_each_by_its_own_vector(directions, site, llama, tmp_path):
    bank = sl.ConceptBank.from_directions(directions, site=site, base=llama, norm={"layers.0": 9.0})
    again = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank"))
    second = 2 * VECTOR if site is None else VECTOR
    for each in (bank, again):
        assert [each.site_of(place) for place in each["a"].places] == ["layers.0", "layers.1"]
        with torch.no_grad(), sl.record(llama, ["layers.1.in", "layers.1"]) as plain:
            llama(IDS)
        with torch.no_grad(), sl.steer(llama, each, {"a": 1.0}, allow_ood=True), sl.record(llama, ["layers.1.in"]) as seen:
            llama(IDS)
        change = seen["layers.1.in"][0][1] - plain["layers.1.in"][0][1]
        torch.testing.assert_close(change, VECTOR.expand_as(change))
        torch.testing.assert_close(each.rows(each["a"].places[1]).write[0], second)
    with pytest.raises(errors.BadBank, match="norm= by name of the sites"):
        sl.ConceptBank.from_directions(directions, site=site, base=llama, norm=3.0)


def test_a_transcoder_is_read_where_it_reads(llama):
    torch.manual_seed(0)
    parts: Any = {"encoder": torch.randn(8, 32), "bias": torch.zeros(8), "decoder": torch.randn(8, 32)}
    coder = Transcoder(**parts, threshold=torch.zeros(8))
    with pytest.raises(errors.BadBank, match="'layers.1.mlp' is a transcoder.*reads="):
        sl.ConceptBank.from_encoder(coder, site="layers.1.mlp", base=llama)
    bank = sl.ConceptBank.from_encoder(coder, site="layers.1.mlp", reads="layers.1.mlp.in", base=llama)
    with torch.no_grad(), sl.record(llama, bank, ["layers.1.mlp/3"]) as tape, sl.record(llama, ["layers.1.mlp.in"]) as x:
        llama(IDS)
    torch.testing.assert_close(tape["layers.1.mlp/3"][0][1], coder.encode(x["layers.1.mlp.in"][0][1])[..., 3])
    with pytest.raises(errors.WrongWidth, match="'layers.1.mlp.in' has width 32, got vectors of width 16"):
        narrow = Transcoder(**{**parts, "encoder": torch.randn(8, 16)}, threshold=torch.zeros(8))
        sl.ConceptBank.from_encoder(narrow, site=1, reads="layers.1.mlp.in", base=llama)
    same = sl.ConceptBank.from_encoder(coder, site=1, reads=1, base=llama)
    assert same.read_at(same["layers.1/3"]) == "layers.1"
    assert sl.ConceptBank.from_encoder(ReLU(**parts), site=1, base=llama).encoders["layers.1"].reads == ""


# -- targets and banks --------------------------------------------------------------------------------------------


def test_a_banks_name_is_no_bank_and_says_how_to_open_it(llama):
    for act in (lambda: sl.steer(llama, "smollm2-135m-instruct", {}), lambda: sl.attach(llama, "smollm2-135m-instruct")):  # type: ignore[arg-type]
        with pytest.raises(errors.BadBank, match=r"sl.ConceptBank.from_pretrained\('smollm2-135m-instruct'\)"):
            act()
    with pytest.raises(errors.BadBank, match="expected a ConceptBank, got {"):
        sl.steer(llama, {"a": VECTOR}, {})  # type: ignore[arg-type]


def test_a_pipeline_of_transformers_is_steered_by_its_model(llama):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, pipeline

    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 3, "b": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]")
    pipe = pipeline("text-generation", model=llama, tokenizer=tokenizer, device="cpu")
    bank = sl.ConceptBank.from_directions({"a": 50 * VECTOR}, site=0, base=pipe)
    options: Any = {"max_new_tokens": 4, "do_sample": False, "return_tensors": True}
    with sl.steer(pipe, bank, {"a": 3.0}) as session:
        steered = pipe("a b a", **options)
    assert session.report().ran and session.host.model is llama
    with sl.steer(llama, bank, {"a": 3.0}):
        assert pipe("a b a", **options) == steered != pipe.__call__
    assert pipe("a b a", **options) != steered


def test_masks_of_an_image_act_as_their_shares_do_whatever_their_form():
    pipe = ddpm()
    site, unet = "unet.mid_block.attentions.0", pipe.unet
    width = unet.mid_block.attentions[0].to_q.in_features
    bank = sl.ConceptBank.from_directions({"a": torch.ones(width)}, site=site, base=pipe)

    def change(mask) -> Any:
        x, seen = torch.zeros(2, unet.config.in_channels, *unet.config.sample_size), []
        for edits in ({}, {"a": sl.Add(1.0, mask=mask)}):
            with torch.no_grad(), sl.steer(pipe, bank, edits), sl.record(pipe, [site]) as tape:
                unet(x, torch.tensor(500))
            seen.append(tape[site][0][1])
        return seen[1] - seen[0]

    expected = change(torch.tensor(HALF / 255.0))
    assert expected.abs().max() == pytest.approx(1.0, abs=1e-4) and (expected == 0).any()
    for form in FORMS:
        torch.testing.assert_close(change(FORMS[form](HALF)), expected, atol=2e-3, rtol=0)
