"""A bank and a model that it was not made on: what fits, what is said, what is refused."""

import copy
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import two_directions
from tiny_models import tiny, toy_tokenizer, toy_writer
from tiny_pipelines import PIPELINES, run

import steerlib as sl
from steerlib import errors
from steerlib.hosts import hub_id
from steerlib.training.record.activations import tokens

IDS = torch.tensor([[1, 2, 3]])


def of(model, **changes):
    """A model of the same family whose config differs."""
    return type(model)(type(model.config)(**{**model.config.to_dict(), **changes})).eval()


def changed(model, bank, **options):
    """What an edit moves at the site."""
    with torch.no_grad(), sl.record(model, ["layers.0"]) as plain:
        model(IDS)
    with torch.no_grad(), sl.steer(model, bank, {"a": 2.0}, **options), sl.record(model, ["layers.0"]) as moved:
        model(IDS)
    return moved["layers.0"][0][1] - plain["layers.0"][0][1]


def test_a_bank_of_own_directions_knows_the_weights_it_was_made_on():
    model, other = tiny("llama"), tiny("llama")
    bank = two_directions(model)
    assert bank.fits(model) == {"layers.0": "same weights"} and bank.base.weights is not None
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    assert bank.fits(other) == {"layers.0": "other weights"} and repr(bank.fits(other)).endswith("other weights")
    sl.steer(other, bank, {"a": 1.0})  # nothing was measured that could differ
    measured = bank.with_concepts([replace(concept, range=(-2.0, 2.0)) for concept in bank.concepts.values()])
    with pytest.warns(errors.OtherWeights, match="other weights"):
        sl.steer(other, measured, {"a": 1.0})


def test_a_token_more_in_the_vocabulary_is_said_and_nothing_else():
    model = tiny("llama")
    bank = two_directions(model)
    larger = of(model, vocab_size=model.config.vocab_size + 1)
    with pytest.warns(errors.OtherWeights, match="vocab_size=.* this model has .*: its sites fit, effects may differ"):
        change = changed(larger, bank)
    torch.testing.assert_close(change, 2 * bank.rows(bank["a"]).write.expand_as(change))


def test_sites_match_by_name_and_width_where_that_is_asked_for():
    model = tiny("llama")
    bank = two_directions(model).add("deep", torch.ones(32), site="layers.1")
    shallow = of(model, num_hidden_layers=1)
    assert bank.fits(shallow) == {"layers.0": "same width", "layers.1": "missing"}
    with pytest.raises(errors.WrongModel, match="num_hidden_layers=2, this model has 1.* match='sites'"):
        sl.steer(shallow, bank, {"a": 1.0})
    with pytest.warns(errors.OtherWeights, match=r"effects may differ; not there: layers.1 \(missing\)"):
        change = changed(shallow, bank, match="sites")
    torch.testing.assert_close(change, 2 * bank.rows(bank["a"]).write.expand_as(change))
    with pytest.raises(errors.UnknownSite, match="layers.1"):
        sl.steer(shallow, bank, {"deep": 1.0}, match="sites")


def test_what_fits_nowhere_is_refused():
    model = tiny("llama")
    narrow = of(model, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    bank = two_directions(model)
    assert bank.fits(narrow) == {"layers.0": "other width"}
    with pytest.raises(errors.WrongModel, match=r"no site of bank 'directions'.* layers.0 \(other width\)"):
        sl.steer(narrow, bank, {"a": 1.0}, match="sites")
    partly = bank.with_concepts(sites={**bank.sites, "layers.1": replace(bank.sites["layers.0"], width=16)})
    with pytest.raises(errors.WrongWidth, match="site 'layers.0' of this model is not 32 wide"):
        sl.steer(narrow, partly, {"a": 1.0}, match="sites")


def test_a_bank_of_four_channels_steers_a_denoiser_of_nine():
    """A UNet that takes image and mask beside the latent, as for inpainting: what is added at its sites is the same."""
    (pipe, kin, bank), site = channels(), "unet.mid_block.attentions.0"
    text = torch.zeros(1, 4, kin.unet.config.cross_attention_dim)

    def seen():
        with torch.no_grad(), sl.record(kin, [site]) as tape:
            kin.unet(torch.zeros(1, 9, 16, 16), torch.tensor(500), text)
        return tape[site][0][1]

    assert bank.fits(pipe)[site] == "same weights" and bank.fits(kin)[site] in ("same width", "unknown width")
    with pytest.raises(errors.WrongModel, match="match='sites'"):
        sl.steer(kin, bank, {"a": 1.0})
    plain = seen()
    with pytest.warns(errors.OtherWeights, match="its sites fit"):
        session = sl.steer(kin, bank, {"a": 1.0}, match="sites")
    with session:
        moved = seen()
    torch.testing.assert_close(moved - plain, bank.rows(bank["a"]).write.expand_as(plain))
    assert is_in_readme(line := row(FOUR_AND_NINE, bank, kin, "by what is drawn")), line


def test_vectors_at_two_sites_of_a_denoiser_each_have_a_window():
    pipe, (mid, up) = PIPELINES["sd1"].build(), ("unet.mid_block.attentions.0", "unet.mid_block.resnets.0")
    with sl.record(pipe, [mid, up]) as tape:
        run(pipe, steps=4, height=16, width=16)
    vectors = {site: torch.ones(tape[site][0][1].shape[-1]) for site in (mid, up)}
    bank = sl.ConceptBank.from_directions({"snow": vectors}, when={mid: sl.Window(0.0, 0.4)}, base=pipe)
    assert [bank.window_of(place) for place in bank["snow"].places] == [sl.Window(0.0, 0.4), None]
    with sl.steer(pipe, bank, {"snow": 1.0}) as session, sl.record(pipe, [mid]) as moved:
        run(pipe, steps=4, height=16, width=16)
    early = [not torch.equal(x, y) for (_, x), (_, y) in zip(tape[mid][:1], moved[mid][:1], strict=True)]
    calls = {line.site: line.acted for line in session.report().lines}
    assert early == [True] and calls[mid] < calls[up]
    whole = sl.ConceptBank.from_directions({"snow": vectors[mid]}, site=mid, when=sl.Window(0.5, 1.0), base=pipe)
    assert whole.window_of(whole["snow"]) == sl.Window(0.5, 1.0) and whole["snow"].id == f"{mid}@0.5-1/0"
    with pytest.raises(errors.BadBank, match="when= names 'unet.nowhere'"):
        sl.ConceptBank.from_directions({"snow": vectors}, when={"unet.nowhere": sl.Window(0, 0.4)}, base=pipe)
    with pytest.raises(errors.Unanswerable, match="text has no progress"):
        sl.ConceptBank.from_directions({"a": torch.ones(32)}, site=0, when=sl.Window(0, 0.4), base=tiny("llama"))


def test_only_an_id_of_the_hub_is_kept_as_the_name_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert [hub_id(name) for name in ("org/model", "org/here", "/tmp/model", "model", None)] == ["org/model", "", "", "", ""]
    model = tiny("llama")
    model.name_or_path = "org/model"
    assert two_directions(model).base.id == "org/model"


# -- another checkpoint ---------------------------------------------------------------------------------------------------

WARM = sl.Contrast(
    ("warm bread", "green tea now", "the sun rises slowly"), ("black stone", "the moon falls", "why snow"), "CC0-1.0"
)
TEXTS = ["the old bird sings now", "a boat runs down the river", "why rain falls", "red house . old door"]


@pytest.fixture(scope="module")
def talker():
    return toy_writer().eval()


def warmth(talker):
    """A bank of directions that carries its data, calibrated by hand."""
    bank = sl.directions(talker, {"warm": WARM}, sites=["layers.0", "layers.1"], tokenizer=toy_tokenizer())
    return bank.with_concepts([replace(bank["warm"], range=(-1.0, 1.0), natural=(-2.0, 2.0), useful=0.5)])


@pytest.fixture(scope="module")
def warm(talker):
    return warmth(talker)


def rotated(model):
    """The same model in another basis of its residual stream: the same logits."""
    turned, draw = copy.deepcopy(model), torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(32, 32, generator=draw))
    inner = turned.model
    reads = [
        m
        for b in inner.layers
        for m in (b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj, b.mlp.gate_proj, b.mlp.up_proj)
    ]
    with torch.no_grad():
        inner.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ turn)
        for module in [*reads, turned.lm_head]:
            module.weight.copy_(module.weight @ turn)
        for block in inner.layers:
            for module in (block.self_attn.o_proj, block.mlp.down_proj):
                module.weight.copy_(turn.T @ module.weight)
    assert all((norm.weight == 1).all() for norm in inner.modules() if type(norm).__name__ == "LlamaRMSNorm")
    torch.testing.assert_close(turned(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-3)
    return turned


def tuned(model):
    """A little training's worth of noise on all weights."""
    near, draw = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in near.parameters():
            weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=draw) if weight.ndim > 1 else 0)
    return near


def grown(**changes):
    """Makes a model whose config differs and whose weights are the same, as far as both have them."""

    def make(model):
        kin, own = of(model, **{key: getattr(model.config, key) + more for key, more in changes.items()}), model.state_dict()
        with torch.no_grad():
            for name, weight in kin.state_dict().items():
                if name in own:
                    part = tuple(map(slice, map(min, own[name].shape, weight.shape)))
                    weight[part] = own[name][part]
        return kin

    return make


SITES = ("layers.0", "layers.1")
KIN = {
    "the model itself": (copy.deepcopy, ("same weights",) * 2, ()),
    "a fine-tune": (tuned, ("other weights",) * 2, ()),
    "the same in a rotated residual stream": (rotated, ("other weights",) * 2, SITES),
    "one token more in the vocabulary": (grown(vocab_size=1), ("other weights",) * 2, ()),
    "one layer more": (grown(num_hidden_layers=1), ("same width",) * 2, ()),
    "one layer less": (grown(num_hidden_layers=-1), ("same width", "missing"), None),
    "a narrower stream": (grown(hidden_size=-16, num_attention_heads=-2, num_key_value_heads=-1), ("other width",) * 2, None),
}
"""How each is made, how the two sites of a bank fit it, and which of them are rotated; None: nothing can be compared."""


def row(case, bank, kin, compared):
    """What the README says of a case."""
    fits, name = ", ".join(dict.fromkeys(bank.fits(kin).values())), next(iter(bank))
    ways: Any = {"yes": {}, 'refused, `match="sites"` allows it': {"match": "sites"}}
    for way, options in ways.items():
        with warnings.catch_warnings(record=True) as told, suppress(errors.SteerlibError):
            warnings.simplefilter("always")
            sl.steer(kin, bank, {name: 0.5}, **options)
            said = any(issubclass(one.category, errors.OtherWeights) for one in told)
            return f"| {case} | {fits} | {way}{', with a notice' if said else ''} | {compared} |"
    return f"| {case} | {fits} | refused | {compared} |"


def said(found):
    """What a comparison comes to."""
    return "rotated" if found.rotated else f"cosine {found['warm'].cosine.here:.2f}"


FOUR_AND_NINE = "a UNet of nine channels instead of four"


def channels():
    """A pipeline with a bank of one of its sites, and the same with a UNet that takes image and mask beside the latent."""
    pipe, kin = PIPELINES["sd1"].build(), PIPELINES["sd1"].build()
    kin.unet = type(kin.unet).from_config(kin.unet.config, in_channels=9).eval()
    site = "unet.mid_block.attentions.0"
    return pipe, kin, sl.ConceptBank.from_directions({"a": torch.linspace(-1, 1, 16)}, site=site, base=pipe)


def table():
    """The table of the README."""
    talker, rows = toy_writer().eval(), []
    bank = warmth(talker)
    for case, (make, _, turned) in KIN.items():
        kin, compared = make(talker), "refused"
        if turned is not None:
            compared = said(bank.compare(kin, ["warm"], tokenizer=toy_tokenizer(), texts=TEXTS))
        rows.append(row(case, bank, kin, compared))
    _, kin, pictures = channels()
    rows.append(row(FOUR_AND_NINE, pictures, kin, "by what is drawn"))
    return "\n".join(["| beside the bank's own | `fits` | `steer` | `compare` |", "|---|---|---|---|", *rows])


def is_in_readme(line):
    return f"{line}\n" in (Path(sl.__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", KIN)
def test_kin_of_a_model_fit_and_are_compared(case, talker, warm):
    make, how, turned = KIN[case]
    kin = make(talker)
    assert warm.fits(kin) == dict(zip(SITES, how, strict=True))
    asked: Any = {"tokenizer": toy_tokenizer(), "texts": TEXTS, "prompts": ["why rain"], "judge": judge, "new_tokens": 3}
    if turned is None:
        with pytest.raises(errors.WrongModel, match="no concept of bank 'directions' fits this model"):
            warm.compare(kin, ["warm"], **asked)
        assert is_in_readme(line := row(case, warm, kin, "refused")), line
        return
    found = warm.compare(kin, ["warm"], **asked)
    held = found["warm"]
    assert found.rotated == turned and found.untold == ()
    assert is_in_readme(line := row(case, warm, kin, said(found))), line
    assert found.fits == warm.fits(kin) and held.unit.stored == warm["warm"].unit and held.damage.here > 0
    assert held.effect.here is not None and "stored → here" in repr(found)
    alike = held.cosine.here
    if case == "the model itself":
        x = tokens(kin, toy_tokenizer(), TEXTS, ["layers.0"], what="texts")["layers.0"]
        rows = warm.rows(warm["warm"])
        assert held.unit.here == pytest.approx(float((x @ rows.read[0]).std()), rel=1e-4) and alike == pytest.approx(1)
    elif case == "a fine-tune":
        assert 0.9 < alike < 1
    elif turned:
        assert abs(alike) < 0.5 and "is rotated" in repr(found)


@pytest.fixture(scope="module")
def plain(talker):
    """A bank of which nothing is known but what is natural for its readings."""
    draw, read, known = torch.Generator().manual_seed(2), tokens(talker, toy_tokenizer(), TEXTS, SITES, what="texts"), []
    vectors = {f"{k} {site}": {site: torch.randn(32, generator=draw)} for k in range(2) for site in SITES}
    bank = sl.ConceptBank.from_directions(vectors, base=talker)
    for name, ((site, vector),) in ((name, own.items()) for name, own in vectors.items()):
        z = read[site] @ vector / vector.square().sum()
        low, high = torch.quantile(z, torch.tensor([0.005, 0.995])).tolist()
        known.append(replace(bank[name], natural=(low, high)))
    return bank.with_concepts(known)


@pytest.mark.parametrize("case", [*KIN][:3])
def test_without_data_another_basis_is_told_by_readings_that_are_no_nearer_than_in_any(case, talker, plain):
    make, _, turned = KIN[case]
    found = plain.compare(make(talker), tokenizer=toy_tokenizer(), texts=TEXTS)
    assert found.rotated == turned and found.untold == ()


def judge(requests, answers, concept):  # noqa: ARG001
    return [len(answer) for answer in answers]


def test_a_bank_without_data_or_amounts_is_compared_as_far_as_that_goes(talker):
    bank = two_directions(talker)
    found = bank.compare(talker, ["a"], tokenizer=toy_tokenizer(), texts=TEXTS)
    assert found["a"].cosine == (None, None) and found["a"].damage == (None, None) and found["a"].unit.here
    assert found.rotated == () and found.untold == ("layers.0",)
    assert "whether layers.0 is rotated cannot be told: that needs contrast data (sl.directions" in repr(found)
    narrow = of(tiny("llama"), hidden_size=16, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    with pytest.raises(errors.WrongModel, match=r"no concept of bank 'directions' fits this model: layers.0 \(other width\)"):
        bank.compare(narrow, ["a"], tokenizer=toy_tokenizer(), texts=TEXTS)


@pytest.mark.filterwarnings("ignore::steerlib.errors.OutOfRange")
def test_an_adapted_bank_serves_the_new_model_and_says_that_it_was_measured_on_another(talker, warm):
    larger = of(talker, num_hidden_layers=3)
    with pytest.raises(errors.WrongModel):
        sl.steer(larger, warm, {"warm": 0.5})
    bank = warm.with_concepts(card="# Warm").adapt(larger)
    assert {*bank.fits(larger).values()} == {"same weights"} and "serves another now" in bank.card
    with pytest.warns(errors.OtherWeights, match="measured on another model and adapted to this one"):
        sl.steer(larger, bank, {"warm": 0.5})
    for one, other in zip(bank["warm"].places, warm["warm"].places, strict=True):
        assert torch.equal(bank.rows(one).write, warm.rows(other).write)
    done = bank.with_concepts(provenance={**bank.provenance, "calibrated": {"warm": {}}})
    sl.steer(larger, done, {"warm": 0.5})
    sl.steer(larger, two_directions(talker).adapt(larger), {"a": 0.5})  # nothing was measured that could differ
    assert {*bank.merge(two_directions(larger))} == {"warm", "a", "b"}
    with pytest.raises(errors.WrongModel, match=r"does not fit this model at layers.1 \(missing\); keep what fits"):
        warm.adapt(of(talker, num_hidden_layers=1))


def test_a_bank_of_pictures_is_compared_with_a_copy_of_its_pipeline(toy):
    site = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2"
    plain = ["a small red square", "a green triangle"]
    data = {"night": sl.Contrast.from_prompts([f"{prompt} by night" for prompt in plain], plain, license="CC0-1.0")}
    bank = sl.directions(toy, data, sites=[site], steps=2, batch=4)
    bank = bank.with_concepts([replace(bank["night"], useful=0.5, natural=(-1.0, 1.0))])
    pairs = [(f"{prompt} by night", prompt) for prompt in plain]
    held = bank.compare(toy, prompts=pairs, steps=2, batch=4)["night"]
    assert held.cosine.here == pytest.approx(1, abs=1e-4) and held.unit.here > 0
    assert 0 <= held.effect.here <= 1 and held.damage.here >= 0
