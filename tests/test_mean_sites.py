"""`site.mean`: the tokens of an image as one, their mean; what is added to it is added to all of them."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_pipelines import PIPELINES, run
from torch import nn

import steerlib as sl
from steerlib.encoders import TopK
from steerlib.errors import Unanswerable, UnknownSite
from steerlib.hooks.parallel import why_split
from steerlib.hosts import host_for

SITES = {
    "sd1": ("unet.mid_block.attentions.0.update", "unet.mid_block.attentions.0"),
    "sd3": ("transformer.transformer_blocks.0:image", "transformer.transformer_blocks.1:image.in"),
    "dit": ("transformer.transformer_blocks.0", "transformer.transformer_blocks.1.in"),
}
"""A site, and one that is given what goes on from there."""
STEPS = 2


@cache
def pipe_of(family) -> Any:
    return PIPELINES[family].build()


def recorded(family, *sites, bank=None, edits=None):
    pipe, bank = pipe_of(family), bank or bank_of(family)
    with sl.steer(pipe, bank, edits or {}, allow_ood=True), sl.record(pipe, sites) as tape:
        made = run(pipe, steps=STEPS)
    return [[x for _, x in tape[site]] for site in sites], made


@cache
def bank_of(family):
    """The same vector at the tokens and at their mean."""
    site = SITES[family][0]
    with sl.record(pipe_of(family), [site]) as tape:
        run(pipe_of(family), steps=1)
    v = torch.randn(tape[site][0][1].shape[-1], generator=torch.Generator().manual_seed(1))
    given = {name: {at: v} for name, at in (("each", site), ("mean", f"{site}.mean"))}
    return sl.ConceptBank.from_directions(given, base=pipe_of(family))


def direction(family):
    bank = bank_of(family)
    return bank.rows(bank["mean"]).write[0]


@pytest.mark.parametrize("family", SITES)
def test_it_reads_the_mean_of_the_tokens_and_does_nothing_by_itself(family):
    plain = run(pipe_of(family), steps=STEPS)
    site, _ = SITES[family]
    (each, mean), made = recorded(family, site, f"{site}.mean")
    assert torch.equal(made, plain)
    for x, m in zip(each, mean, strict=True):
        assert m.shape == (len(x), 1, x.shape[2])
        torch.testing.assert_close(m, x.mean(1, keepdim=True))


@pytest.mark.parametrize("family", SITES)
def test_what_is_added_to_it_is_added_to_every_token(family):
    later = SITES[family][1]
    (each,), made = recorded(family, later, edits={"each": 2.0})
    (mean,), same = recorded(family, later, edits={"mean": 2.0})
    torch.testing.assert_close(mean[0], each[0])
    torch.testing.assert_close(same, made, atol=1e-4, rtol=1e-4)
    assert not torch.equal(made, run(pipe_of(family), steps=STEPS))


@pytest.mark.parametrize("family", SITES)
def test_it_is_set_by_moving_all_tokens_alike(family):
    site, later = SITES[family]
    (plain, before), _ = recorded(family, later, site)
    (moved,), _ = recorded(family, later, edits={"mean": sl.Set(3.0)})
    v = direction(family)
    due = (3.0 - before[0].mean(1) @ v / v.norm() ** 2)[:, None, None] * v
    torch.testing.assert_close(moved[0] - plain[0], due.expand_as(plain[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", ["each", "mean"])
def test_tokens_come_before_their_mean_whichever_was_attached_first(first):
    """So that the mean reads what is set, whatever was done to tokens."""
    bank, pipe, (site, later) = bank_of("sd1"), pipe_of("sd1"), SITES["sd1"]
    done = {"each": {"each": 2.0}, "mean": {"mean": sl.Set(3.0)}}
    second = next(name for name in done if name != first)
    (given,), _ = recorded("sd1", f"{site.removesuffix('.update')}.in")
    with sl.steer(pipe, bank, done[first]), sl.steer(pipe, bank, done[second]), sl.record(pipe, [later]) as tape:
        run(pipe, steps=STEPS)
    v = direction("sd1")
    reading = (tape[later][0][1] - given[0]).mean(1) @ v / v.norm() ** 2
    torch.testing.assert_close(reading, torch.full_like(reading, 3.0), atol=1e-4, rtol=1e-4)


def test_sparse_latents_of_it_are_set_and_saved(tmp_path):
    site, later = SITES["sd1"]
    g, width = torch.Generator().manual_seed(0), len(direction("sd1"))
    read, write = (torch.randn(12, width, generator=g) for _ in range(2))
    encoder = TopK(encoder=read, decoder=write, bias=torch.zeros(12), k=4)
    bank = sl.ConceptBank.from_encoder(encoder, site=f"{site}.mean", base=pipe_of("sd1"))
    bank = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank"))
    (plain, before), _ = recorded("sd1", later, site)
    (moved,), _ = recorded("sd1", later, bank=bank, edits={f"{site}.mean/0": sl.Set(2.0)})
    z, row = encoder.encode(before[0].mean(1, keepdim=True))[..., :1], bank.rows(bank[f"{site}.mean/0"]).write[0]
    torch.testing.assert_close(moved[0] - plain[0], ((2.0 - z) * row).expand_as(plain[0]), atol=1e-4, rtol=1e-4)


def test_what_has_no_mean_and_parts_of_it_are_refused():
    pipe = pipe_of("sd1")
    attention = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    for site in (f"{attention}.heads.0.mean", f"{attention}.to_k.mean", "vae.decoder.mid_block.mean"):
        with pytest.raises(UnknownSite, match="tokens of an image that a denoiser works on have a mean"):
            host_for(pipe).site(site)
    with pytest.raises(UnknownSite, match="no site 'text_encoder.layers.0.mean'"):
        host_for(pipe).site("text_encoder.layers.0.mean")
    with pytest.raises(Unanswerable, match=r"is the mean of all of it; mask at 'unet.mid_block.attentions.0.update'"):
        recorded("sd1", edits={"mean": sl.Add(1.0, mask=(0, 0, 0.5, 1))})
    split = nn.Module()
    split._parallel_config = SimpleNamespace(context_parallel_config=object())  # type: ignore[assignment]
    site = host_for(pipe).site(f"{SITES['sd1'][0]}.mean")
    assert "context parallelism" in why_split([split], site)
    assert not why_split([split], host_for(pipe).site(SITES["sd1"][0]))
