"""Latents of autoencoders as concepts: which are active, where they enter, what their labels say."""

import pytest
import torch
from tiny_pipelines import PIPELINES, autoencoder, quantizer
from torch import nn
from torch.distributions import Normal

import steerlib as sl
from steerlib import errors
from steerlib.bank.autoencoders import explained
from steerlib.evaluation.decoders import decoding
from steerlib.evaluation.interventions import Decoder, by_swap

SIDE = 16


class Spot(nn.Module):
    """Draws a spot, at `z0` across, on a ground as bright as `z2`; its encoder tells nothing by `z1`, hardly any by `z3`."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Identity()

    def decode(self, z):
        z = self.decoder(z)
        at = torch.linspace(-2, 2, SIDE)
        spot = torch.exp(-4 * ((at - z[:, :1])[:, None] ** 2 + at[:, None] ** 2))
        return (0.3 * z[:, 2, None, None] + spot)[:, None]

    def encode(self, x):
        """x holds the causes in its first row."""
        mean = torch.stack([x[:, 0, 0, 0], 0 * x[:, 0, 0, 0], x[:, 0, 0, 1], 0.01 * x[:, 0, 0, 2]], -1)
        return Normal(mean, torch.tensor([0.1, 1.0, 0.2, 1.0]).expand_as(mean))


@pytest.fixture
def causes():
    return torch.randn(64, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pictures(causes):
    x = torch.zeros(64, 1, SIDE, SIDE)
    x[:, 0, 0, :3] = causes
    return x


def test_latents_that_say_nothing_of_the_input_are_left_out_and_named(pictures, causes):
    bank = sl.ConceptBank.from_autoencoder(Spot(), pictures)
    assert list(bank) == ["z0", "z2"] and bank.provenance["passive"] == ["z1", "z3"]
    assert bank["z2"].unit == pytest.approx(float(causes[:, 1].std()), rel=1e-5)
    assert bank.site_of(bank["z0"]) == "decoder.in:BDN" and bank["decoder.in:BDN/3"].index == 3  # still there by its number


def test_labels_say_what_changes_from_one_end_to_the_other(pictures):
    bank = sl.ConceptBank.from_autoencoder(Spot(), pictures)
    assert "further right" in bank["z0"].label and "further left" not in bank["z0"].label
    assert bank["z2"].label == "up: brighter"


def test_a_known_factor_is_named_and_a_shuffled_one_is_not(pictures, causes):
    sides = (causes[:, 0] > 0).long()
    shuffled = sides[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    bank = sl.ConceptBank.from_autoencoder(Spot(), pictures, factors={"side": sides.tolist(), "ground": causes[:, 1].tolist()})
    assert bank["z0"].label.startswith("side (") and bank["z2"].label.startswith("ground (9")
    assert bank["z0"].source == "known factors, extreme values"
    control = sl.ConceptBank.from_autoencoder(Spot(), pictures, factors={"side": shuffled.tolist()})
    assert not any("side" in concept.label for concept in control.concepts.values())


def test_the_share_of_variance_between_groups_is_that_of_an_analysis_of_variance():
    """By hand: the groups (0, 2), (3, 5) and (7, 8) have squares 2, 2 and 0.5 about their means, all of them 46.83."""
    z, v = torch.tensor([0.0, 2.0, 3.0, 5.0, 7.0, 8.0]), [0, 0, 1, 1, 2, 2]
    assert explained(z, v) == pytest.approx(1 - (4.5 / 3) / (46.833333 / 5), rel=1e-5)
    assert explained(torch.ones(6), v) == 0


def test_moving_a_latent_by_its_concept_is_decoding_the_moved_latent():
    vae = autoencoder().eval()
    bank = sl.ConceptBank.from_autoencoder(vae)
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    moved = z.clone()
    moved[:, 1] += 1.5 * bank["z1"].unit
    with torch.no_grad(), sl.steer(vae, bank, {"z1": sl.Add(1.5)}, allow_ood=True):
        steered = vae.decode(z).sample
    torch.testing.assert_close(steered, vae.decode(moved).sample.detach(), atol=1e-5, rtol=1e-5)
    assert bank.provenance["data"] == "drawn from the prior"


def test_it_steers_the_decoder_of_a_pipeline():
    pipe = PIPELINES["sd1"].build()
    bank = sl.ConceptBank.from_autoencoder(pipe)
    assert bank.site_of(bank["z0"]) == "vae.post_quant_conv.in"
    given = PIPELINES["sd1"].call(pipe) | {"generator": None, "output_type": "latent"}
    draw = lambda **o: pipe(**given | {"generator": torch.Generator().manual_seed(0)} | o).images  # noqa: E731
    z = draw() / pipe.vae.config.scaling_factor
    z[:, 0] += 2 * bank["z0"].unit
    with sl.steer(pipe, bank, {"z0": 2.0}, allow_ood=True):
        steered = draw(output_type="pt")
    with torch.no_grad():
        expected = pipe.image_processor.postprocess(pipe.vae.decode(z).sample, output_type="pt")
    torch.testing.assert_close(steered, expected, atol=1e-4, rtol=1e-4)


class Pair(Spot):
    """Whose encoder gives a tuple."""

    def encode(self, x):
        found = super().encode(x)
        return found.mean, found.variance


def test_what_cannot_be_known_is_refused(pictures):
    with pytest.raises(errors.UnsupportedTarget, match="encode="):
        sl.ConceptBank.from_autoencoder(Pair(), pictures)
    bank = sl.ConceptBank.from_autoencoder(Pair(), pictures, encode=lambda x: Pair().encode(x)[0])
    assert list(bank) == ["z0", "z2"]  # what varies next to nothing beside the most active one
    with pytest.raises(errors.BadBank, match="does not say how many latents"):
        sl.ConceptBank.from_autoencoder(Spot())
    with pytest.raises(errors.BadBank, match="'side' for each of 64 inputs, got 2"):
        sl.ConceptBank.from_autoencoder(Spot(), pictures, factors={"side": [0, 1]})
    plain = Spot()
    del plain.decoder
    with pytest.raises(errors.UnsupportedTarget, match="no module of Spot that latents enter"):
        sl.ConceptBank.from_autoencoder(plain, pictures)
    with pytest.raises(errors.UnsupportedTarget, match="got object"):
        sl.ConceptBank.from_autoencoder(object())


# -- quantisers --------------------------------------------------------------------------------------------------------


BOOK = torch.tensor([[1.0, 0.0], [0.0, 3.0]])


class Two(nn.Module):
    """A code book of two, which `decode` doubles."""

    def __init__(self):
        super().__init__()
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding.from_pretrained(BOOK)
        self.decoder = nn.Identity()

    def encode(self, x):
        return x

    def decode(self, z):
        nearest = torch.cdist(z.transpose(1, 2), BOOK).argmin(-1)
        return 2 * self.decoder(BOOK[nearest].transpose(1, 2))


def test_codes_of_a_book_of_two_are_swapped_exactly_and_not_by_an_amount():
    model = Two()
    z = torch.tensor([[[1.1, 0.2, 0.9], [0.1, 2.5, 0.0]]])  # codes 0, 1, 0
    bank = sl.ConceptBank.from_autoencoder(model, z, site="decoder.in:BDN", decode=lambda z: z)
    assert [c.label for c in bank.concepts.values() if c.name.startswith("code")] == [
        "66.7% of positions",
        "33.3% of positions",
    ]
    plain = model.decode(z)
    with sl.steer(model, bank, {"code 0": sl.Swap("code 1")}):
        one = model.decode(z)
    with sl.steer(model, bank, {"code 0": sl.Swap("code 1"), "code 1": sl.Swap("code 0")}):
        both = model.decode(z)
    torch.testing.assert_close(one, torch.tensor([[[0.0, 0, 0], [6, 6, 6]]]))
    torch.testing.assert_close(both, torch.tensor([[[0.0, 2, 0], [6, 0, 6]]]))
    assert torch.equal(plain, torch.tensor([[[2.0, 0, 2], [0, 6, 0]]]))
    for edit in (2.0, sl.Set(1.0), sl.Clamp(high=0.5), sl.Scale(2.0), sl.Ablate()):
        with pytest.raises(errors.Unanswerable, match="sl.Swap"):
            sl.steer(model, bank, {"code 0": edit})


def test_continuous_moves_of_a_quantiser_do_nothing_where_swaps_of_its_codes_do():
    """Finding (iv) on real classes: within a cell nothing comes out, and the mended intervention is exact."""
    vq = quantizer().eval()
    book = vq.quantize.embedding.weight
    with torch.no_grad():
        book.copy_(4 * torch.randn(book.shape, generator=torch.Generator().manual_seed(0)))
    chosen = torch.randint(0, 3, (6, 4, 4), generator=torch.Generator().manual_seed(1))
    z = book[chosen].permute(0, 3, 1, 2).detach()
    bank = sl.ConceptBank.from_autoencoder(vq, z, encode=lambda z: z)
    names = [name for name in bank if name.startswith("code")]
    assert names == ["code 0", "code 1", "code 2"] and {"code 3", "code 15"} <= {*bank.provenance["passive"]}
    studied = Decoder(vq, decoding(vq), bank)
    small = studied(z, {"z0": sl.Add(0.05, unit="raw")})
    assert torch.allclose(small, studied(z), atol=1e-5)
    swapped = by_swap(studied, z, "code 0", ["code 1", "code 2"])
    with torch.no_grad():
        for other, change in zip((1, 2), swapped.change, strict=True):
            dealt = book[torch.where(chosen == 0, other, chosen)].permute(0, 3, 1, 2)
            torch.testing.assert_close(change, vq.decode(dealt).sample - vq.decode(z).sample, atol=1e-4, rtol=1e-4)
    assert swapped.strength > 0 and swapped.by_chance.mean > 0


def test_a_bank_of_codes_is_saved_and_opened(tmp_path):
    bank = sl.ConceptBank.from_autoencoder(Two(), torch.randn(5, 2, 3), site="decoder.in:BDN", decode=lambda z: z)
    opened = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "codes"))
    assert torch.equal(opened.encoder("decoder.in:BDN#codebook").decode(torch.eye(2)), BOOK)
