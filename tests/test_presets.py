"""Settings kept in files: what comes back is what went in, and steers by the same bits."""

import hashlib
import shutil
from typing import Any

import pytest
import torch
from conftest import two_directions
from test_bank import make
from tiny_models import WORDS, tiny, toy_tokenizer

import steerlib as sl
from steerlib import errors, schedules
from steerlib.steering import masks
from steerlib.steering.interventions import Intervention
from steerlib.steering.presets import KINDS

GATE = sl.Gate("a", above=0.5, full=1.5, over="prompt")
SCHEDULES = [
    sl.Window(0.25, 1.0), sl.Steps(1), sl.Steps(0, 5), sl.PerStep((1.0, 0.5)), sl.Ramp(sl.Steps(0, 4), first=1.0, last=0.1),
    schedules.Within(sl.Steps(0, 3), sl.Window(0.0, 0.5)),
]  # fmt: skip
EDITS = [
    sl.Add(2.0), sl.Add((1.0, -0.1)), sl.Add(0.1, match_norm=True, keep_norm=True, unit="raw"), sl.Scale(0.5), sl.Set(1e-7),
    sl.Ablate(), sl.Ablate(exact=True, tokens="all"), sl.Clamp(high=1.0), sl.Clamp(low=(0.5, 0.25)), sl.Swap("b"), sl.Do(0.5),
    sl.Add(1.0, tokens=slice(2, None)), sl.Add(1.0, tokens=(slice(0, 9), "generated", "not-code", '<a "b">...</a>')),
    sl.Set(1.0, gate=GATE, branch="cond"), sl.Set(1.0, gate="open"), sl.Set(1.0, gate=sl.Gate('ünïcode "q"', below=-1.0)),
    *(sl.Add(1.0, when=when) for when in SCHEDULES),
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture
def kept(model, tmp_path):
    """A bank that was opened from a folder."""
    return sl.ConceptBank.from_pretrained(two_directions(model).save_pretrained(tmp_path / "bank"))


def test_every_edit_schedule_and_gate_comes_back_equal(kept, tmp_path):
    for edit in EDITS:
        again = sl.Preset.load(sl.Preset({"a": edit}, kept).save(tmp_path / "one.toml"))
        assert again.edits == {"a": edit} and repr(again.edits) == repr({"a": edit})


def test_no_kind_is_forgotten():
    """What users can name of interventions, schedules and masks is written, or refused: tapes are."""

    def below(kind):
        return {one.__name__ for one in kind.__subclasses__()}

    public = {name for name in below(Intervention) | below(sl.Schedule) | below(masks.Mask) if name in sl.__all__}
    assert public - {"Patch"} <= KINDS.keys()
    tried = {type(edit).__name__ for edit in EDITS} | {type(when).__name__ for when in SCHEDULES}
    assert KINDS.keys() - {"Gate", "Box", "Word"} == tried


@pytest.mark.parametrize("mask", [
    (0.0, 0.25, 1.0, 0.5), sl.Word("hat", at="unet.attn2", above=0.25), torch.rand(3, 4), torch.tensor([True, False]),
    torch.arange(12, dtype=torch.uint8).reshape(3, 4),
], ids=["box", "word", "shares", "flags", "bytes"])  # fmt: skip
def test_every_mask_comes_back_equal(mask, kept, tmp_path):
    again = sl.Preset.load(sl.Preset({"a": sl.Add(1.0, mask=mask)}, kept).save(tmp_path / "one.toml")).edits["a"].mask
    before = masks.mask_of(mask)
    if isinstance(before, masks.Weights):
        assert torch.equal(again.weights, before.weights)
    else:
        assert again == before


def test_combinations_are_keys_and_come_back(kept, tmp_path):
    mere, common = kept["a"] - kept["b"], kept["b"] & kept["a"]
    preset = sl.Preset({mere: 2.0, common: sl.Swap(mere)}, kept)
    again: Any = sl.Preset.load(preset.save(tmp_path / "one.toml"))
    assert [one.name for one in again.edits] == ["a - b", "b & a"] and again.edits[common].new == mere
    sl.steer(tiny("llama"), sl.Preset({mere: 2.0}, kept))


def test_a_tape_is_refused_by_the_name_of_its_concept(kept, model, tmp_path):
    with sl.record(model, kept, ["a"]) as tape:
        model(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(errors.BadEdit, match="'b': a tape is what a model read"):
        sl.Preset({"b": sl.Patch(tape)}, kept).save(tmp_path / "one.toml")
    assert not (tmp_path / "one.toml").exists()


def test_a_preset_steers_as_its_edits_do_and_moves_with_its_bank(kept, model, tmp_path):
    ids = torch.tensor([[1, 2, 3, 4]])
    edits = {"a": sl.Add(200.0, tokens=slice(1, 3)), "b": sl.Ablate()}
    sl.Preset(edits, kept, allow_ood=True, said={"seed": 7}).save(tmp_path / "one.toml")
    with torch.no_grad(), sl.steer(model, kept, edits, allow_ood=True):
        wanted = model(ids).logits
    shutil.copytree(tmp_path, other := tmp_path.parent / f"{tmp_path.name}-moved")
    preset = sl.Preset.load(other / "one.toml")
    assert preset.bank.folder == other / "bank" and preset.said == {"seed": 7} and preset.versions["torch"]
    with torch.no_grad(), sl.steer(model, preset):
        assert torch.equal(model(ids).logits, wanted)
    with pytest.raises(errors.BadEdit, match="says edits and options itself"):
        sl.steer(model, preset, exact=False)
    with pytest.raises(errors.BadEdit, match="expected edits as a mapping"):
        sl.steer(model, kept)


def test_another_bank_in_the_place_of_the_kept_one_is_refused(kept, tmp_path):
    place = sl.Preset({"a": 1.0}, kept).save(tmp_path / "one.toml")
    assert hashlib.sha256((tmp_path / "bank" / "bank.json").read_bytes()).hexdigest() in place.read_text()
    mine = kept.relabel(lambda _: "new")
    mine.save_pretrained(tmp_path / "bank")
    with pytest.raises(errors.BadBank, match="is not the one of the preset"):
        sl.Preset.load(place)
    assert sl.Preset.load(place, bank=mine).bank is mine
    with pytest.raises(errors.BadBank, match="was not opened from files"):
        sl.Preset({"a": 1.0}, mine).save(tmp_path / "two.toml")


def test_several_banks_and_shipped_ones_are_kept_by_name(kept, tmp_path):
    shipped = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
    assert 'source = "smollm2-135m-instruct"' in sl.Preset({"music": 1.0}, shipped).to_toml(tmp_path)
    other = two_directions(tiny("llama")).rename({"a": "c", "b": "d"}).save_pretrained(tmp_path / "other")
    edits = {"c": 1.0, "a": sl.Add(1.0, gate=sl.Gate("c", above=0.0))}
    both = sl.Preset(edits, [kept, sl.ConceptBank.from_pretrained(other)])
    again = sl.Preset.load(both.save(tmp_path / "two.toml"))
    assert again.edits == both.edits and [bank.folder for bank in again.banks] == [tmp_path / "bank", other]
    sl.steer(tiny("llama"), again)


def test_a_picture_carries_its_preset_and_the_same_seed_draws_it_again(tmp_path):
    """With the shipped pipeline, at few steps: the same bits."""
    import diffusers
    from PIL import Image

    bank = sl.ConceptBank.from_pretrained("scenes-32")
    where: Any = bank.file("pipeline")
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(where)  # pyright: ignore[reportPrivateImportUsage]
    pipe.set_progress_bar_config(disable=True)

    def drawn(preset):
        noise = torch.Generator().manual_seed(preset.said["seed"])
        with sl.steer(pipe, preset):
            return pipe(preset.said["prompt"], num_inference_steps=2, generator=noise).images[0]

    preset = sl.Preset({"night": sl.Set(1.5)}, bank, branch="cond", said={"prompt": "a hill", "seed": 3})
    picture = drawn(preset)
    again = sl.Preset.from_image(preset.stamp(picture, tmp_path / "hill.png"))
    assert again.said == preset.said and again.options == preset.options
    assert drawn(again).tobytes() == picture.tobytes() == Image.open(tmp_path / "hill.png").tobytes()
    picture.save(tmp_path / "plain.png")
    with pytest.raises(errors.BadEdit, match="plain.png is no text; a preset inside a PNG is read by sl.Preset.from_image"):
        sl.Preset.load(tmp_path / "plain.png")
    with pytest.raises(errors.BadEdit, match="plain.png carries no preset"):
        sl.Preset.from_image(tmp_path / "plain.png")


@pytest.mark.parametrize(("old", "new", "words"), [
    ("format = 1", "format = 2", "expected a preset of format 1, got 2"), ("format = 1", "", "of format 1, got None"),
    ('"kind" = "Add"', '"kind" = "Bad"', "no preset, or an altered one: KeyError"),
    ('"amount"', '"amounts"', "no preset, or an altered one: TypeError"), ("}", "", "no preset, or an altered one"),
])  # fmt: skip
def test_a_file_that_is_none_is_refused(old, new, words, kept):
    text = sl.Preset({"a": 1.0}, kept).to_toml()
    assert old in text
    with pytest.raises(errors.BadEdit, match=words):
        sl.Preset.from_toml(text.replace(old, new))


def test_options_that_steer_lacks_are_refused():
    with pytest.raises(errors.BadEdit, match="expected options branch, do, .* got tokenizer"):
        sl.Preset({}, make(), tokenizer=None)


def test_the_command_line_takes_a_preset_in_the_place_of_a_bank(kept, tmp_path, capsys):
    from steerlib import terminal

    place = sl.Preset({"a": sl.Add(2.0, tokens="generated")}, kept).save(tmp_path / "one.toml")
    bank, chosen, edits = terminal.read_setting(str(place), [])
    assert isinstance(chosen, sl.Preset) and bank is chosen.bank and edits is None
    model = tiny("llama", vocab_size=len(WORDS) + 3)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    with pytest.warns(errors.OtherWeights):  # a vocabulary of another size
        terminal.answer_twice(model, toy_tokenizer(), chosen, "the sun .", edits, new_tokens=3)
    assert "steered: " in (said := capsys.readouterr().out) and "layers.0" in said
    with pytest.raises(errors.BadEdit, match="says what is edited; leave out --edit"):
        terminal.read_setting(str(place), ["a=1"])
