"""What moving something does to an outcome: closed forms of linear decoders, identities of patching and mediation, controls."""

from math import log, sqrt

import pytest
import torch
from tiny_pipelines import PIPELINES, autoencoder
from torch import nn

import steerlib as sl
from steerlib import errors
from steerlib.evaluation.coordinates import GRID, coordinates, published_specificity
from steerlib.evaluation.decoders import decoding, drawing, predicting
from steerlib.evaluation.interventions import Decoder, Interval, by_input, by_latent, by_mediators, by_patch

PAIRS = torch.tensor([[1.0, -1, 0, 0, 0, 0], [0, 0, 2, -2, 0, 0], [0, 0, 0, 0, 0.5, -0.5]])
"""Columns of a decoder that share no output, each of mean 0."""


class Linear(nn.Module):
    """`decode(z) = z W`, through units of its own."""

    def __init__(self, rows):
        super().__init__()
        self.decoder = nn.Sequential(nn.Identity(), nn.Linear(*rows.shape, bias=False))
        self.decoder[1].weight.data = rows.T.clone()

    def decode(self, z):
        return self.decoder(z)


def studied(rows):
    model = Linear(rows)
    axes = {f"z{i}": axis for i, axis in enumerate(torch.eye(len(rows)))}
    bank = sl.ConceptBank.from_directions(axes, site="decoder.in:BDN", base=model)
    return Decoder(model, decoding(model), bank)


@pytest.fixture
def z():
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def figures(rows, z, **options):
    return coordinates(studied(rows), z, hidden="decoder:BDN", **options)


# -- closed forms ------------------------------------------------------------------------------------------------


def test_columns_that_share_no_output_have_the_strength_that_their_lengths_say_and_are_modules(z):
    found = figures(PAIRS, z)
    spread = float(((z - z.mean(0)) @ PAIRS).norm(dim=-1).mean())
    for i, one in enumerate(found.each):
        ces = float((torch.tensor(GRID) - z[:, i, None]).abs().mean() * PAIRS[i].norm())
        assert one.ces == pytest.approx(ces, rel=1e-5)
        assert one.specificity == pytest.approx(1 / (log(2) + 1e-6), rel=1e-5)  # two outputs change alike
        assert one.focus == pytest.approx(1 - log(2) / log(6), rel=1e-5)
        assert not one.dead and one.low is not None and one.relative is not None and one.low < one.relative
    assert found.spread == pytest.approx(spread, rel=1e-5)
    assert found.modularity == pytest.approx(1, abs=1e-6) and found.published_modularity == pytest.approx(1, abs=1e-6)


def test_a_coordinate_takes_its_values_from_other_rows(z):
    """The oracle deals rows by hand: each row is given the value of each other one in turn."""
    effect = by_latent(studied(PAIRS), z[:5], "z1", draws=4)
    own = z[:5, 1]
    pairs = (own[:, None] - own[None]).abs().sum() / 20
    assert effect.strength == pytest.approx(float(pairs * PAIRS[1].norm()), rel=1e-5)
    assert effect.change.shape == (4, 5, 6) and torch.equal(effect.change[..., :2], torch.zeros(4, 5, 2))
    assert effect.by_chance.mean > 0
    assert effect.beyond.mean == pytest.approx(effect.length.mean - effect.by_chance.mean, rel=1e-9)
    many = by_latent(studied(PAIRS), z[:5], "z1", draws=6)  # more than there are other rows: none is given its own
    assert (many.change.norm(dim=-1) > 0).all()


def test_one_output_alone_is_most_specific_and_identical_columns_are_no_modules(z):
    alone = figures(torch.eye(3), z)
    assert all(one.specificity == pytest.approx(1e6) and one.focus == pytest.approx(1) for one in alone.each)
    same = figures(PAIRS[:1].expand(3, -1), z)
    assert same.modularity == pytest.approx(0, abs=1e-6) and same.published_modularity == pytest.approx(0, abs=1e-6)


def test_published_modularity_is_below_one_for_what_shares_nothing_and_the_mended_one_is_not(z):
    found = figures(torch.eye(3), z)
    assert found.modularity == pytest.approx(1, abs=1e-6)
    assert found.published_modularity == pytest.approx(0.5, abs=1e-6)  # one-hot columns of 3: rho = -1/2


def test_a_dead_coordinate_is_named_and_has_no_figure_that_is_not_finite(z):
    found = figures(PAIRS * torch.tensor([[1.0], [0.0], [1.0]]), z)
    assert found.dead == ("z1",) and "z1" in repr(found)
    dead = found.each[1]
    assert (dead.ces, dead.relative, dead.specificity, dead.focus) == (0, 0, None, None)
    assert found.modularity == pytest.approx(1, abs=1e-6)  # of the other two
    numbers = [v for one in found.to_dict()["each"] for v in one.values() if isinstance(v, float)]
    assert all(torch.tensor(numbers).isfinite())


def test_all_dead_is_said_too(z):
    found = figures(PAIRS * 0, z)
    assert found.dead == ("z0", "z1", "z2") and found.modularity is None and found.spread == 0
    assert published_specificity(torch.zeros(4, 6)) is None


def test_a_rotation_leaves_the_whole_effect_and_lowers_what_is_specific(z):
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    plain, turned = figures(torch.eye(3), z), figures(turn, z @ turn.T)  # the same outputs from other coordinates
    assert turned.spread == pytest.approx(plain.spread, rel=1e-5)
    assert sum(c.ces**2 for c in turned.each) == pytest.approx(sum(c.ces**2 for c in plain.each), rel=0.1)
    for one, other in zip(plain.each, turned.each, strict=True):
        assert one.focus is not None and other.focus is not None and other.focus < one.focus - 0.2
    assert turned.modularity is not None and turned.modularity < 0.5


def test_factors_that_can_be_read_tell_which_one_a_coordinate_moves(z):
    readout = lambda y: torch.stack([y[:, 0], y[:, 2] / 2], -1)  # noqa: E731
    found = figures(PAIRS, z, factors=["first", "second"], readout=readout)
    assert [(one.factor, one.on_factor) for one in found.each[:2]] == [("first", 1.0), ("second", 1.0)]
    assert found.each[2].factor == "" and found.each[2].on_factor is None


def test_the_control_of_a_coordinate_is_one_random_direction_dealt_alike(z):
    """Through a decoder that passes latents on: control changes lie along one line, by what rows differ along it."""
    effect = by_latent(studied(torch.eye(3)), z, "z0", draws=39)
    moved = effect.control.flatten(0, 1).double()
    _, sizes, directions = torch.linalg.svd(moved)
    assert float(sizes[1]) < 1e-5 * float(sizes[0]) and float(directions[0, 0].abs()) < 0.999
    along = z.double() @ directions[0]
    assert effect.by_chance.mean == pytest.approx(float((along[:, None] - along[None]).abs().sum()) / (40 * 39), rel=1e-5)


# -- inputs, activations, mediators --------------------------------------------------------------------------------


class Two(nn.Module):
    """`y = a . h + c . x` with `h = x B`: what goes through h is known."""

    def __init__(self):
        super().__init__()
        self.h = nn.Linear(2, 4, bias=False)
        self.out = nn.Linear(4, 3, bias=False)
        self.skip = nn.Linear(2, 3, bias=False)
        g = torch.Generator().manual_seed(4)
        for part in (self.h, self.out, self.skip):
            part.weight.data = torch.randn(part.weight.shape, generator=g)

    def forward(self, x):
        return self.out(self.h(x)) + self.skip(x)


@pytest.fixture
def two():
    model = Two().requires_grad_(False)
    units = {f"h{i}": axis for i, axis in enumerate(torch.eye(4))}
    return Decoder(model, model, sl.ConceptBank.from_directions(units, site="h:BDN", base=model))


def inputs(seed, width=2):
    return torch.randn(6, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chosen", [[0], [1, 3], [0, 1, 2, 3]])
def test_direct_and_indirect_effects_of_a_network_of_two_layers_are_its_weights(two, chosen):
    x, x0 = inputs(1), inputs(2)
    found = by_mediators(two, x, x0, [f"h{i}" for i in chosen])
    m = two.target
    through = ((x - x0) @ m.h.weight.T)[:, chosen] @ m.out.weight.T[chosen]
    total = (x - x0) @ (m.h.weight.T @ m.out.weight.T + m.skip.weight.T)
    torch.testing.assert_close(found.indirect.change[0].float(), through, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.total.change[0].float(), total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.total.change, found.direct.change + found.indirect.change, atol=1e-5, rtol=0)
    assert found.total.share == pytest.approx(1)
    assert found.direct.share is not None and found.indirect.share is not None
    assert found.direct.share + found.indirect.share == pytest.approx(1, abs=1e-5)


def test_patching_a_whole_layer_gives_the_sources_output_where_nothing_goes_around_it(two):
    x, x0 = inputs(1), inputs(2)
    two.target.skip.weight.zero_()
    found = by_patch(two, x, x0, "h:BDN")
    torch.testing.assert_close(found.change[0] + two(x0), two(x), atol=1e-6, rtol=0)
    assert found.share == pytest.approx(1) and found.share_by_chance is not None and found.share_by_chance < 0.9


def test_patching_a_channel_carries_what_that_channel_carries(two):
    x, x0 = inputs(1), inputs(2)
    found = by_patch(two, x, x0, "h:BDN", channels=[2])
    m = two.target
    expected = ((x - x0) @ m.h.weight.T)[:, [2]] @ m.out.weight.T[[2]]
    torch.testing.assert_close(found.change[0], expected, atol=1e-5, rtol=1e-5)
    other = by_patch(two, x, x0, "h:BDN", channels=[0, 1, 3])
    assert found.share is not None and other.share is not None
    around = ((x - x0) @ m.skip.weight.T * two.run(x - x0)).sum() / two.run(x - x0).square().sum()
    assert found.share + other.share == pytest.approx(1 - float(around), abs=1e-5)
    with pytest.raises(errors.BadEdit, match="from 0 to 3"):
        by_patch(two, x, x0, "h:BDN", channels=[4])


def test_a_change_of_the_input_is_compared_with_the_same_change_elsewhere():
    weights = torch.zeros(10, 3)
    weights[0] = torch.tensor([3.0, 4.0, 0.0])
    decoder = studied(weights)
    x0 = torch.zeros(20, 10)
    x = x0.clone()
    x[:, 0] = 2.0
    found = by_input(decoder, x, x0, seed=1)
    assert found.length == Interval(10.0, 10.0, 10.0)
    assert found.by_chance.mean == 0 and found.beyond.low == 10  # nine of ten places move nothing
    with pytest.raises(errors.BadEdit, match="control="):
        by_input(decoder, x.long(), x0.long())


def test_an_interval_covers_the_mean_as_often_as_it_says():
    g = torch.Generator().manual_seed(0)
    ends = [Interval.of(torch.randn(30, generator=g), seed=k)[1:] for k in range(200)]
    found = [(low, high) for low, high in ends if low is not None and high is not None]
    assert 0.88 <= sum(low <= 0 <= high for low, high in found) / 200 <= 0.98
    width = sum(high - low for low, high in found) / 200
    assert width == pytest.approx(2 * 1.96 / sqrt(30), rel=0.1)
    assert Interval.of(torch.ones(1)) == (1.0, None, None)


# -- strangers -------------------------------------------------------------------------------------------------------


def test_a_head_of_a_language_model_is_patched_and_its_whole_layer_is_all(llama, bank):
    ids = torch.randint(1, 100, (4, 6), generator=torch.Generator().manual_seed(0))
    other = torch.randint(1, 100, (4, 6), generator=torch.Generator().manual_seed(1))
    llm = Decoder(llama, predicting(llama), bank)
    whole = by_patch(llm, other, ids, "layers.1")
    torch.testing.assert_close(whole.change[0] + llm(ids), llm(other), atol=1e-5, rtol=0)
    last = by_patch(llm, other, ids, "layers.1", positions=[5])
    assert last.share == pytest.approx(1, abs=1e-4)  # the next token is read there alone
    head = by_patch(llm, other, ids, "layers.1.attn.heads.0")
    assert head.share is not None and 0 < abs(head.share) < 0.9
    moved = by_latent(llm, ids, "a", draws=2)
    assert 0 < moved.strength < sqrt(2) and moved.change.shape[:2] == (2, 4)


def test_rows_of_several_lengths_cannot_take_each_others_readings(llama, bank):
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    ids = torch.ones(2, 6, dtype=torch.long)
    run = lambda ids: llama(input_ids=ids, attention_mask=mask).logits[:, -1]  # noqa: E731
    with pytest.raises(errors.BadEdit, match="several lengths"):
        by_latent(Decoder(llama, run, bank), ids, "a")


def test_an_autoencoder_of_diffusers_is_studied_by_its_channels():
    vae = autoencoder().eval()
    axes = {f"channel{i}": axis for i, axis in enumerate(torch.eye(4))}
    bank = sl.ConceptBank.from_directions(axes, site="post_quant_conv.in:BDN", base=vae)
    z = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    decoder = Decoder(vae, decoding(vae), bank)
    dealt = by_latent(decoder, z, "channel2", draws=5)
    with torch.no_grad():  # the oracle: that channel of every other row
        plain, total = vae.decode(z).sample, 0.0
        for by in range(1, 6):
            mixed = z.clone()
            mixed[:, 2] = z.roll(by, 0)[:, 2]
            total += float((vae.decode(mixed).sample - plain).flatten(1).norm(dim=-1).mean()) / 5
    assert dealt.strength == pytest.approx(total, rel=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vae.modules())


def test_a_pipeline_from_fixed_noise_is_studied_too():
    pipe = PIPELINES["sd1"].build()
    given = PIPELINES["sd1"].call(pipe, batch=2, guidance=True)
    wanted = {name: value for name, value in given.items() if name not in ("generator", "output_type")}

    def run(scale):
        generators = [torch.Generator().manual_seed(k) for k in range(2)]
        drawn = pipe(
            **wanted | {"prompt_embeds": wanted["prompt_embeds"] * scale}, generator=generators, output_type="np"
        ).images
        return torch.as_tensor(drawn)

    site = "unet.mid_block.attentions.0"
    bank = sl.ConceptBank.from_directions(
        {"a": torch.randn(16, generator=torch.Generator().manual_seed(5))}, site=site, base=pipe
    )
    found = by_latent(Decoder(pipe, run, bank), 1.0, "a")
    assert found.strength > 0 and found.change.shape[:2] == (1, 2)
    assert by_latent(Decoder(pipe, run, bank), 1.0, "a").strength == found.strength  # the same noise every time
    assert callable(drawing(pipe))
