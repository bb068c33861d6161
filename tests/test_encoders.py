"""Encoders: one contract for every kind, closed forms for each, and what steering a latent does to a model."""

import doctest
import sys
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bank import bytes_read
from tiny_models import tiny
from torch import Tensor

import steerlib as sl
from steerlib import encoders, errors
from steerlib.bank.concept_bank import SiteFacts
from steerlib.encoders import KINDS, BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, Sparse, TopK, Transcoder, topk
from steerlib.evaluation.representation import explained_variance
from steerlib.training.fit.encoder_recipe import EncoderRecipe
from steerlib.training.fit.inputs import Tokens
from steerlib.training.fit.run import fit

N, D = 12, 32


def tensors(seed: int = 0, width: int = D, n: int = N) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "encoder": torch.randn(n, width, generator=g) / width**0.5,
        "bias": torch.randn(n, generator=g) * 0.1,
        "decoder": torch.randn(n, width, generator=g) / width**0.5,
        "decoder_bias": torch.randn(width, generator=g),
    }


def numbers(seed: int, scale: float = 0.3) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * scale


MADE: dict[str, Any] = {
    "relu": lambda **o: ReLU(**tensors(), **o),
    "jumprelu": lambda **o: JumpReLU(**tensors(), threshold=numbers(1), **o),
    "topk": lambda **o: TopK(**tensors(), k=3, **o),
    "batchtopk": lambda **o: BatchTopK(**tensors(), k=3.0, threshold=0.4, **o),
    "matryoshka": lambda **o: Matryoshka(**tensors(), groups=[3, 9], k=3.0, threshold=0.4, **o),
    "gated": lambda **o: Gated(**tensors(), gate_bias=numbers(2), log_scale=numbers(3), **o),
    "transcoder": lambda **o: Transcoder(**tensors(), threshold=numbers(1).abs(), skip=torch.eye(D)[:, range(D)[::-1]], **o),
}
"""Every sparse kind."""
WAYS: list[dict[str, Any]] = [{}, {"centred": True}, {"norm": "layer"}, {"norm": "length", "centred": True}]


@pytest.fixture
def x():
    return 3 * torch.randn(2, 7, D, generator=torch.Generator().manual_seed(9)) + 0.5


def test_every_sparse_kind_is_tested():
    assert set(MADE) == {name for name, kind in KINDS.items() if issubclass(kind, Sparse)}


# -- the contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", MADE)
def test_one_latent_alone_reads_what_the_whole_encoder_reads(kind, way, x):
    encoder = MADE[kind](**way)
    z = encoder.encode(x)
    assert (z >= 0).all() and 0 < (z > 0).float().mean() < 1
    if not KINDS[kind].competes(encoder.settings):
        for i in (0, 5, N - 1):
            torch.testing.assert_close(encoder.rows([i]).reading(x)[..., 0], z[..., i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", MADE)
def test_an_encoder_is_what_its_tensors_and_settings_say(kind, way, x):
    encoder = MADE[kind](**way)
    stored = encoder.to_tensors()
    assert {*encoder.tensors} <= {*stored} <= {*encoder.tensors, *encoder.shared}
    again = type(encoder).from_tensors(stored, encoder.settings)
    assert torch.equal(again.reconstruct(x), encoder.reconstruct(x)) and again.settings == encoder.settings


@pytest.mark.parametrize("kind", MADE)
def test_half_precision_is_kept_and_computed_with_in_float32(kind, x):
    encoder = MADE[kind]()
    halves = {name: tensor.half() for name, tensor in encoder.to_tensors().items()}
    half = type(encoder).from_tensors(halves, encoder.settings)
    assert all(tensor.dtype == torch.float16 for tensor in half.to_tensors().values())
    wide = type(encoder).from_tensors({name: tensor.float() for name, tensor in halves.items()}, encoder.settings)
    assert torch.equal(half.encode(x), wide.encode(x)) and torch.equal(half.reconstruct(x), wide.reconstruct(x))


@pytest.mark.parametrize("kind", MADE)
def test_tensors_that_do_not_fit_are_refused(kind):
    encoder = MADE[kind]()
    stored, settings = encoder.to_tensors(), encoder.settings
    for wrong in ({"bias": stored["bias"][1:]}, {"decoder": stored["decoder"][:-1]}, {"decoder_bias": torch.zeros(D + 1)}):
        with pytest.raises(errors.CorruptBank, match="fit each other"):
            type(encoder).from_tensors(stored | wrong, settings)
    with pytest.raises(errors.CorruptBank, match="is not made of this"):
        type(encoder).from_tensors(stored, settings | {"colour": "red"})
    with pytest.raises(errors.CorruptBank, match="norm"):
        type(encoder).from_tensors(stored, settings | {"norm": "odd"})


# -- formulas ------------------------------------------------------------------------------------------------


def test_kinds_follow_their_formulas(x):
    t = tensors()
    p = x @ t["encoder"].T + t["bias"]
    expected = {
        "relu": p.clamp(min=0),
        "jumprelu": p.clamp(min=0) * (p > numbers(1)),
        "batchtopk": p * (p > 0.4),
        "matryoshka": p * (p > 0.4),
        "transcoder": p * (p > numbers(1).abs()),
    }
    u = p - t["bias"]
    expected["gated"] = (numbers(3).exp() * u + t["bias"]).clamp(min=0) * (u + numbers(2) > 0)
    kth = p.sort(-1, descending=True).values[..., 2:3]
    expected["topk"] = p.clamp(min=0) * (p >= kth)
    for kind, z in expected.items():
        torch.testing.assert_close(MADE[kind]().encode(x), z)
        skip = x.flip(-1) if kind == "transcoder" else 0.0
        torch.testing.assert_close(MADE[kind]().reconstruct(x), z @ t["decoder"] + t["decoder_bias"] + skip)


def test_centring_and_normalising_follow_their_formulas(x):
    t = tensors()
    flat, level = x - x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-5
    z = (flat / level @ t["encoder"].T + t["bias"]).clamp(min=0)
    encoder = ReLU(**t, norm="layer")
    torch.testing.assert_close(encoder.encode(x), z)
    expected = (z @ t["decoder"] + t["decoder_bias"]) * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
    torch.testing.assert_close(encoder.reconstruct(x), expected)
    length = x.norm(dim=-1, keepdim=True) / D**0.5
    z = ((x / length - t["decoder_bias"]) @ t["encoder"].T + t["bias"]).clamp(min=0)
    encoder = ReLU(**t, norm="length", centred=True)
    torch.testing.assert_close(encoder.encode(x), z)
    torch.testing.assert_close(encoder.reconstruct(x), (z @ t["decoder"] + t["decoder_bias"]) * length)


def test_a_potential_at_its_threshold_does_not_fire():
    one: dict[str, Any] = {"encoder": torch.eye(2), "bias": torch.zeros(2), "decoder": torch.eye(2)}
    x, expected = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.0, 0.5]])
    encoder = JumpReLU(**one, threshold=torch.tensor([0.5, 0.25]))
    assert torch.equal(encoder.encode(x), expected) and torch.equal(encoder.rows([0, 1]).reading(x), expected)
    assert not BatchTopK(**one, k=1.0, threshold=0.5).encode(x).any()
    gated = Gated(**one, gate_bias=torch.tensor([-0.5, -0.25]), log_scale=torch.zeros(2))
    assert torch.equal(gated.encode(x), expected) and torch.equal(gated.rows([0, 1]).reading(x), expected)


def test_the_calibrated_threshold_keeps_k_on_average_and_counts_where_it_differs(x):
    encoder = TopK(**tensors(), k=3)
    reference = 3 * torch.randn(400, D, generator=torch.Generator().manual_seed(4))
    found = encoder.calibrated(reference)
    assert found.threshold is not None
    alone = found.rows(range(N)).reading(reference) > 0
    assert alone.float().sum(-1).mean() == pytest.approx(3, abs=0.02)
    ranked = found.encode(reference) > 0
    assert found.disagreement == pytest.approx(float((ranked != alone).sum() / (ranked | alone).sum()), abs=1e-6)
    assert found.disagreement is not None and 0 < found.disagreement < 1 and torch.equal(found.encode(x), encoder.encode(x))


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("way", [*WAYS, {"rescaled": True}], ids=str)
def test_some_latents_of_many_read_what_the_whole_code_says(way, halves, monkeypatch):
    """Copies of one another and of what they are compared with included. Only tokens that might have them are encoded, and
    where the processor multiplies bfloat16, no token is by all of its latents."""
    monkeypatch.setattr(topk, "_multiplies_halves", lambda: halves)
    many = tensors(n=200)
    for i, j in ((150, 7), (8, 7), (9, 0), (10, 0)):
        many["encoder"][i], many["bias"][i] = many["encoder"][j], many["bias"][j]
    encoder, chosen = TopK(**many, k=3, **way), [7, 150, 0, 60, 199]
    tokens = 3 * torch.randn(4, 500, D, generator=torch.Generator().manual_seed(4))
    whole, encode, encoded = encoder.encode(tokens), encoder.encode, []
    monkeypatch.setattr(encoder, "encode", lambda some: encoded.append(some) or encode(some))
    torch.testing.assert_close(encoder.readings(tokens, chosen), whole[..., chosen])
    seen, firing = sum(map(len, encoded)), int((whole[..., chosen] > 0).any(-1).sum())
    assert firing and (seen == 0 if halves else firing <= seen < 1000)


@pytest.mark.parametrize("k", [1, 8, 32])
def test_a_look_in_halves_never_tells_another_code_than_all_of_it(k, monkeypatch):
    """Latents close to the k-th, whose order bfloat16 does not know: rows of the encoder that differ by a thousandth."""
    g = torch.Generator().manual_seed(5)
    monkeypatch.setattr(topk, "_multiplies_halves", lambda: True)
    n, width = 2100, 64
    encoder = torch.randn(1, width, generator=g) + 1e-3 * torch.randn(n, width, generator=g)
    made = TopK(encoder=encoder, bias=torch.zeros(n), decoder=torch.zeros(n, width), k=k)
    tokens = torch.randn(64, width, generator=g)
    code = made.encode(tokens)
    chosen = code.count_nonzero(0).topk(40).indices.tolist() + [*range(40)]
    torch.testing.assert_close(made.readings(tokens, chosen), code[:, chosen])
    rough = made.select(tokens.bfloat16() @ encoder.bfloat16().T).float()[:, chosen]
    assert ((rough > 0) != (code[:, chosen] > 0)).any()


def test_rescaled_latents_compete_by_what_they_write(x):
    """The same as an encoder whose decoder rows have length 1 and whose potentials are as many times longer."""
    t = tensors()
    by = t["decoder"].norm(dim=-1)
    encoder = TopK(**t, k=3, rescaled=True)
    unit = {"encoder": t["encoder"] * by[:, None], "bias": t["bias"] * by, "decoder": t["decoder"] / by[:, None]}
    flat = TopK(**(t | unit), k=3)
    torch.testing.assert_close(encoder.encode(x), flat.encode(x))
    torch.testing.assert_close(encoder.reconstruct(x), flat.reconstruct(x))
    for ours, theirs in zip(encoder.rows([2, 7])[:4], flat.rows([2, 7])[:4], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert TopK.from_tensors(encoder.to_tensors(), encoder.settings).rescaled


def test_the_first_groups_of_a_matryoshka_are_an_encoder():
    encoder = MADE["matryoshka"]()
    first = encoder.first(1)
    assert first.groups == [3] and torch.equal(first.decoder, encoder.decoder[:3])
    with pytest.raises(errors.CorruptBank, match="groups that make up 12"):
        Matryoshka(**tensors(), groups=[3, 8], k=3.0, threshold=0.1)


# -- steering ------------------------------------------------------------------------------------------------


IDS = torch.arange(3, 15).view(2, 6)


@pytest.fixture
def model():
    """Weights so large that latents fire."""
    return tiny("llama", initializer_range=0.4).requires_grad_(False)


def bank_of(model, encoder, site="layers.0", **facts):
    return sl.ConceptBank.from_encoder(encoder, site=site, base=model) if not facts else sl.ConceptBank(
        "b", [], {site: encoder}, base=sl.BaseModel.of(model), **facts
    )  # fmt: skip


def at(model, bank=None, edits=None, sites=("layers.0",), **options):
    """Activations at sites, with or without edits."""
    with torch.no_grad(), sl.record(model, list(sites)) as tape:
        if bank is None:
            model(IDS)
        else:
            with sl.steer(model, bank, edits or {}, allow_ood=True, **options):
                model(IDS)
    return [tape[site][0][1] for site in sites]


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk", "matryoshka", "gated"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_latent_is_changed_in_the_code_and_the_rest_stays(model, kind, way):
    encoder = MADE[kind](**way)
    bank, x = bank_of(model, encoder), at(model)[0]
    z = encoder.encode(x)
    i = int((z > 0).sum((0, 1)).argmax())
    scale = {"": torch.ones(1), "layer": x.std(-1, keepdim=True) + 1e-5, "length": x.norm(dim=-1, keepdim=True) / D**0.5}
    written = scale[way.get("norm", "")] * encoder.decoder[i]
    assert 0 < (z[..., i] > 0).sum() < 12 or kind == "relu"
    wanted = {
        sl.Set(2.5): torch.full_like(z[..., i], 2.5),
        sl.Ablate(): torch.cat((z[:, :1, i], torch.zeros_like(z[:, 1:, i])), 1),  # first tokens are left alone
        sl.Ablate(tokens="all"): torch.zeros_like(z[..., i]),
        sl.Scale(3.0): 3 * z[..., i],
        sl.Add(0.7): z[..., i] + 0.7,
        sl.Add(-0.4): (z[..., i] - 0.4).clamp(min=0),
        sl.Clamp(0.2, 0.5): z[..., i].clamp(0.2, 0.5),
    }
    for edit, after in wanted.items():
        found = at(model, bank, {f"layers.0/{i}": edit})[0]
        torch.testing.assert_close(found, x + (after - z[..., i])[..., None] * written, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk", "matryoshka", "gated"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_an_exact_ablation_leaves_several_latents_nothing_to_read(model, kind, way):
    """And a direction its value; the change beyond what they write is none where nothing is left, and the shortest."""
    d, encoder = torch.randn(D, generator=torch.Generator().manual_seed(3)), MADE[kind](**way)
    encoders = {"layers.0": encoder, "layers.0#d": sl.Directions(d[None])}
    sites = {"layers.0": SiteFacts(width=D, norm=1e-3)}  # far shorter than what is removed: removals have no cap
    bank = sl.ConceptBank("both", [], encoders, base=sl.BaseModel.of(model), sites=sites)
    x = at(model)[0]
    z = encoder.encode(x)
    chosen = (z > 0).sum((0, 1)).topk(4).indices.tolist()
    gone = {f"layers.0/{i}": sl.Ablate(exact=True) for i in chosen}
    with sl.steer(model, bank, gone | {"layers.0#d/0": sl.Ablate()}) as session:
        found = at(model)[0]
    assert (encoder.encode(found)[:, 1:, chosen] == 0).all() and (z[:, 1:, chosen] > 0).any()
    torch.testing.assert_close(found @ d / d.square().sum(), torch.zeros(2, 6), atol=2e-5, rtol=0)
    lines = [one for one in session.report().lines if one.concept != "layers.0#d/0"]
    assert {one.left for one in lines} <= {0.0, None} and all(one.capped == 0 for one in lines)
    (one, *_), plain = chosen, at(model, bank, {f"layers.0/{chosen[0]}": sl.Ablate()})[0]
    alone = at(model, bank, {f"layers.0/{one}": sl.Ablate(exact=True)})[0]
    silent = encoder.encode(plain)[..., one] == 0
    if not KINDS[kind].competes(encoder.settings):
        torch.testing.assert_close(alone[silent], plain[silent], atol=1e-3, rtol=0)
    rest, row = (alone - plain)[~silent][:, :], encoder.rows([one]).read[0]
    torch.testing.assert_close(rest, (rest @ row)[:, None] * row / row.square().sum(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_exact_ablation_holds_in_the_precision_of_the_model(model, dtype):
    model, encoder = model.to(dtype), JumpReLU(**tensors(), threshold=numbers(1).abs() + 0.5)
    bank, z = bank_of(model, encoder), encoder.encode(at(model)[0])
    found = at(model, bank, {f"layers.0/{i}": sl.Ablate(exact=True) for i in range(N)})[0]
    assert (z[:, 1:] > 0).any() and (encoder.encode(found)[:, 1:] == 0).all()


def test_an_exact_ablation_that_is_half_let_through_leaves_half(model):
    encoder = MADE["relu"]()
    bank, z = bank_of(model, encoder), encoder.encode(at(model)[0])
    i = int((z > 0).sum((0, 1)).argmax())
    found = at(model, bank, {f"layers.0/{i}": sl.Ablate(exact=True, tokens="all", mask=torch.full((6,), 0.5))})[0]
    assert (encoder.encode(found)[..., i] <= 0.5 * z[..., i] + 1e-5).all() and (encoder.encode(found)[..., i] > 0).any()


def test_the_report_says_what_is_left_of_a_reading(model):
    """By readings before and after, of tokens that were ablated; nothing is said of additions."""
    encoder = MADE["jumprelu"]()
    bank, x = bank_of(model, encoder), at(model)[0]
    z = encoder.encode(x)
    i = int((z > 0).sum((0, 1)).argmax())
    with sl.steer(model, bank, {f"layers.0/{i}": sl.Ablate(), f"layers.0/{(i + 1) % N}": sl.Scale(0.5)}) as session:
        after = encoder.encode(at(model)[0])[:, 1:, i].sum()
    line, scaled = session.report().lines
    assert line.left == pytest.approx(float(after / z[:, 1:, i].sum()), abs=1e-5) and line.tokens == 5 and line.seen == 6
    assert scaled.left is None or scaled.left > 0
    assert f"{line.left:.0%}" in str(session) and "left: of a reading that is taken away" in session.report().legend()
    with sl.steer(model, bank, {f"layers.0/{i}": sl.Set(1.0)}, allow_ood=True) as session:
        at(model)
    assert session.report().lines[0].left is None and "left" not in str(session)


def test_a_latent_is_never_set_below_0(model):
    encoder = MADE["relu"]()
    bank = bank_of(model, encoder)
    for edit in (sl.Set(-2.0), sl.Clamp(high=-1.0)):
        assert torch.equal(*(at(model, bank, {"layers.0/4": one})[0] for one in (edit, sl.Ablate(tokens="all"))))


def test_what_a_latent_does_not_do_is_bit_identical(model):
    """Ablating where it is silent, scaling by 1, adding 0."""
    encoder = JumpReLU(**tensors(), threshold=torch.full((N,), 1e4))
    bank, x = bank_of(model, encoder), at(model)[0]
    for edit in (sl.Ablate(), sl.Scale(1.0), sl.Scale(5.0), sl.Add(0.0), sl.Add(-1.0)):
        assert torch.equal(at(model, bank, {"layers.0/3": edit})[0], x)


def test_additions_to_one_latent_count_together_before_the_floor(model):
    encoder = MADE["relu"]()
    bank, x = bank_of(model, encoder), at(model)[0]
    z = encoder.encode(x)[..., 4]
    with (
        sl.steer(model, bank, {"layers.0/4": -5.0}, allow_ood=True),
        sl.steer(model, bank, {"layers.0/4": 4.5}, allow_ood=True),
    ):
        found = at(model)[0]
    expected = ((z - 0.5).clamp(min=0) - z)[..., None] * encoder.decoder[4]
    torch.testing.assert_close(found - x, expected, atol=2e-5, rtol=0)


def test_targets_of_directions_hold_whatever_latents_do(model):
    """The direction is set on what the latents leave, in whichever order the edits are named."""
    d = torch.randn(D, generator=torch.Generator().manual_seed(3))
    encoders = {"layers.0": MADE["relu"](), "layers.0#d": sl.Directions(d[None])}
    bank = sl.ConceptBank(
        "both", [], encoders, base=sl.BaseModel.of(model), sites={"layers.0": SiteFacts(width=D)}
    )  # fmt: skip
    edits = {"layers.0/2": sl.Set(3.0), "layers.0#d/0": sl.Set(-1.0), "layers.0/7": 2.0}
    found = at(model, bank, edits)[0]
    torch.testing.assert_close(bank.encoder("layers.0#d").encode(found)[..., 0], torch.full((2, 6), -1.0))
    torch.testing.assert_close(found, at(model, bank, dict(reversed(edits.items())))[0])
    x = at(model)[0]
    z, w = encoders["layers.0"].encode(x), encoders["layers.0"].decoder
    moved = x + (3.0 - z[..., 2, None]) * w[2] + 2.0 * w[7]
    rest = found - moved
    torch.testing.assert_close(rest, (rest @ d)[..., None] * d / d.square().sum(), atol=2e-5, rtol=0)


def test_a_competing_latent_can_be_read_by_its_threshold_on_request(model):
    x = at(model)[0]
    encoder = TopK(**tensors(), k=3)
    with pytest.raises(errors.BadEdit, match="no threshold by which"):
        sl.steer(model, bank_of(model, encoder), {"layers.0/1": sl.Set(1.0)}, exact=False)
    encoder = encoder.calibrated(x.reshape(-1, D))
    bank = bank_of(model, encoder)
    z, alone = encoder.encode(x), encoder.rows(range(N)).reading(x)
    i = int((z != alone).sum((0, 1)).argmax())
    assert not torch.equal(z[..., i], alone[..., i])
    for exact, reading in ((True, z), (False, alone)):
        found = at(model, bank, {f"layers.0/{i}": sl.Set(1.5)}, exact=exact)[0]
        torch.testing.assert_close(found, x + (1.5 - reading[..., i])[..., None] * encoder.decoder[i], atol=2e-5, rtol=0)


@pytest.mark.parametrize("k", [None, 3])
def test_a_transcoder_reads_at_one_site_and_writes_at_a_later_one(model, k):
    encoder = Transcoder(**tensors(), threshold=numbers(1).abs(), k=k)
    sites = {name: SiteFacts(width=D) for name in ("layers.0", "layers.1.mlp")}
    bank = bank_of(model, encoder, "layers.1.mlp", sites=sites, reads={"layers.1.mlp": "layers.0"})
    read, written = at(model, sites=sites)
    z = encoder.encode(read)
    i = int((z > 0).sum((0, 1)).argmax())
    for edit, after in ((sl.Set(2.0), 2.0), (sl.Scale(0.0), 0.0), (sl.Add(1.0), z[..., i] + 1.0)):
        before, found = at(model, bank, {f"layers.1.mlp/{i}": edit}, sites)
        assert torch.equal(before, read)
        torch.testing.assert_close(found, written + (after - z[..., i])[..., None] * encoder.decoder[i], atol=2e-5, rtol=0)
    before, found = at(model, bank, {f"layers.1.mlp/{i}": sl.Ablate()}, sites)
    assert torch.equal(before, read) and torch.equal(found[:, 0], written[:, 0])
    torch.testing.assert_close(found[:, 1:], (written - z[..., i, None] * encoder.decoder[i])[:, 1:], atol=2e-5, rtol=0)
    with pytest.raises(errors.Unanswerable, match="read at 'layers.0'.*Ablate"):
        sl.steer(model, bank, {f"layers.1.mlp/{i}": sl.Ablate(exact=True)})
    with torch.no_grad(), sl.record(model, bank, [f"layers.1.mlp/{i}"]) as tape:
        model(IDS)
    torch.testing.assert_close(tape[f"layers.1.mlp/{i}"][0][1], z[..., i])
    backwards = bank_of(model, encoder, "layers.0", sites=sites, reads={"layers.0": "layers.1.mlp"})
    with pytest.raises(errors.Unanswerable, match="not before 'layers.0'"):
        sl.steer(model, backwards, {"layers.0/0": sl.Set(1.0)})


def test_an_update_is_what_a_block_adds(model):
    before, after, update = at(model, sites=("layers.1.in", "layers.1", "layers.1.update"))
    torch.testing.assert_close(update, after - before)
    encoder = MADE["relu"]()
    z = encoder.encode(update)[..., 5]
    for site in ("layers.1.update", "model.layers.1.update"):
        bank = bank_of(model, encoder, site)
        (found,) = at(model, bank, {f"{site}/5": sl.Set(1.5)}, sites=("layers.1",))
        torch.testing.assert_close(found, after + (1.5 - z)[..., None] * encoder.decoder[5], atol=2e-5, rtol=0)
        assert torch.equal(at(model, bank, {f"{site}/5": sl.Add(0.0)}, sites=("layers.1",))[0], after)


def test_an_output_is_read_after_its_update_was_changed_whichever_came_first(model):
    encoder = ReLU(**tensors())
    update, out = (bank_of(model, encoder, site) for site in ("layers.1.update", "layers.1"))
    found = []
    for first, second in (((update, 3), (out, 6)), ((out, 6), (update, 3))):
        edits = [(bank, {f"{next(iter(bank.encoders))}/{i}": sl.Set(2.0)}) for bank, i in (first, second)]
        with sl.steer(model, *edits[0]), sl.steer(model, *edits[1]):
            found += at(model, sites=("layers.1",))
    assert torch.equal(*found)


def test_a_gate_opens_where_a_latent_fires(model):
    encoder, x = MADE["jumprelu"](), at(model)[0]
    z = encoder.encode(x)
    i = int(((z > 0).float().mean((0, 1)) - 0.5).abs().argmin())
    found = at(model, bank_of(model, encoder), {"layers.0/0": sl.Add(1.0, gate=sl.Gate(f"layers.0/{i}", above=0.0))})[0]
    torch.testing.assert_close(found - x, (z[..., i, None] > 0) * encoder.decoder[0], atol=1e-5, rtol=0)


def test_a_positive_addition_encodes_nothing_and_a_negative_one_does(model, monkeypatch):
    encoder, read = MADE["topk"](), []
    readings = encoder.readings
    monkeypatch.setattr(encoder, "readings", lambda *args: read.append(1) or readings(*args))
    at(model, bank_of(model, encoder), {"layers.0/0": 1.0, "layers.0/1": [0.5, 2.0]})
    assert not read
    at(model, bank_of(model, encoder), {"layers.0/0": -1.0})
    assert read


# -- banks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MADE)
def test_banks_give_back_the_same_encoder_whole_or_one_row_at_a_time(model, kind, tmp_path, x):
    encoder = MADE[kind](statistics={"unit": numbers(5).abs() + 0.1, "high": numbers(6).abs() + 1.0})
    reads = {"layers.1.mlp": "layers.0"} if kind == "transcoder" else {}
    sites = {name: SiteFacts(width=D) for name in ("layers.0", "layers.1.mlp")}
    bank = bank_of(model, encoder, "layers.1.mlp", sites=sites, reads=reads)
    bank.save_pretrained(tmp_path / "a")
    lazy, whole = (sl.ConceptBank.from_pretrained(tmp_path / "a") for _ in range(2))
    whole.verify()
    rebuilt: Any = whole.encoder("layers.1.mlp")
    assert torch.equal(rebuilt.reconstruct(x), encoder.reconstruct(x))
    for i in (0, N - 1):
        concept = lazy[f"layers.1.mlp/{i}"]
        assert concept.unit == pytest.approx(float(encoder.statistics["unit"][i]))
        assert concept.natural == (0.0, pytest.approx(float(encoder.statistics["high"][i])))
        for ours, theirs in zip(lazy.rows(concept)[:4], encoder.rows([i])[:4], strict=True):
            torch.testing.assert_close(ours, theirs)
        assert lazy.read_at(concept) == (reads.get("layers.1.mlp") or "layers.1.mlp")
    assert not lazy._shelf._made and not lazy.concepts
    whole.save_pretrained(tmp_path / "b")
    assert all((tmp_path / "b" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "a").iterdir() if p.is_file())
    with pytest.raises(errors.UnknownConcept, match="rows 0 to 11, got '12'"):
        lazy["layers.1.mlp/12"]
    with pytest.raises(errors.UnknownConcept):
        lazy["layers.7/0"]


def test_thresholds_of_directions_let_everything_pass():
    rows = sl.Directions(torch.eye(3)).rows([0, 2])
    assert not rows.is_sparse and (rows.threshold == -inf).all()


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel counts bytes read on Linux only")
def test_one_of_a_million_latents_is_read_without_the_others(tmp_path):
    n, width = 1_000_000, 8
    g = torch.Generator().manual_seed(0)
    rows: dict[str, Any] = {
        name: torch.randn(n, width, generator=g, dtype=torch.float32).half() for name in ("encoder", "decoder")
    }
    encoder = JumpReLU(**rows, bias=torch.zeros(n).half(), threshold=torch.ones(n).half())
    site = {"layers.0": SiteFacts(width=width)}
    sl.ConceptBank("million", [], {"layers.0": encoder}, base=sl.BaseModel(), sites=site).save_pretrained(tmp_path / "bank")

    def one():
        bank = sl.ConceptBank.from_pretrained(tmp_path / "bank")
        return bank.rows(bank["layers.0/654321"])

    found, read = bytes_read(one)
    assert torch.equal(found.write, encoder.decoder[[654321]].float()) and read < 1_000_000
    _, whole = bytes_read(next((tmp_path / "bank" / "sites").iterdir()).read_bytes)  # the control
    assert whole > 30_000_000


# -- a new kind ----------------------------------------------------------------------------------------------

FLOORED = '''
"""Latents that fire above a floor which is none of the parameters."""

from steerlib.encoders.objective import Cost, Objective
from steerlib.encoders.sparse import Sparse
from torch import Tensor


def cost(w, x, y, root, scale):
    p = x @ w["encoder"].T * w["gain"] + w["bias"]
    z = p * (p > 0.1)
    return Cost(y - z @ w["decoder"], z, z.sum() / root)


class Floored(Sparse):
    kind = "floored"
    tensors = (*Sparse.tensors, "floor")
    objective = Objective(
        loss=cost,
        begin=lambda zeros, scale: {"gain": zeros + 1},
        finish=lambda w: {
            "encoder": w["encoder"] * w["gain"][:, None], "floor": 0 * w["bias"] + 0.1,
            **{name: w[name] for name in w if name not in ("encoder", "gain")},
        },
        potentials=("bias", "floor"),
        transcodes=True,
    )

    floor: Tensor

    def thresholds(self):
        return self.floor
'''


@pytest.fixture
def floored(tmp_path, monkeypatch):
    """The kind above, as a file that was put into the folder of encoders."""
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "floored.py").write_text(FLOORED)
    monkeypatch.setattr(encoders, "__path__", [*encoders.__path__, str(tmp_path / "kinds")])
    encoders.__spec__.loader.exec_module(encoders)  # as an import would, with what is in the folder now
    yield KINDS["floored"]
    del KINDS["floored"], sys.modules["steerlib.encoders.floored"]
    delattr(encoders, "floored")


def test_a_kind_in_a_file_of_its_own_is_trained_steered_saved_and_opened(floored, model, tmp_path):
    g = torch.Generator().manual_seed(0)
    data = 3 * torch.randn(4000, 6, generator=g).relu() @ torch.randn(6, D, generator=g) + 1
    recipe = EncoderRecipe(kind="floored", latents=48, sparsity=0.01, batch=200, rate=1e-2)
    encoder = fit({"a": recipe}, Tokens(data), steps=300)["a"]
    assert type(encoder) is floored and encoder.settings == {"centred": True}
    assert explained_variance(data, encoder.reconstruct(data)) > 0.8
    written = fit({"a": recipe}, Tokens(data, target=data[:, :5]), steps=300)["a"]
    assert isinstance(written, Transcoder) and explained_variance(data[:, :5], written.reconstruct(data)) > 0.8

    bank, x = bank_of(model, encoder), at(model)[0]
    z = encoder.encode(x)
    i = int((z > 0).sum((0, 1)).argmax())
    bank.save_pretrained(tmp_path / "bank")
    for some in (bank, sl.ConceptBank.from_pretrained(tmp_path / "bank")):
        found = at(model, some, {f"layers.0/{i}": sl.Set(2.0)})[0]
        torch.testing.assert_close(found, x + (2.0 - z[..., i])[..., None] * encoder.decoder[i], atol=2e-5, rtol=1e-5)
        some.verify()


def test_every_file_of_the_folder_is_searched_for_kinds():
    folder = Path(encoders.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} <= {*vars(encoders)}


@pytest.mark.parametrize("name", ["directions", "jumprelu", "relu", "topk"])
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(sys.modules[f"steerlib.encoders.{name}"], raise_on_error=True).attempted
