"""Edits and readings are float32 whatever the model is computed in."""

from typing import Any

import pytest
import torch
from tiny_models import tiny

import steerlib as sl
from steerlib import encoders
from steerlib.steering.recording import replacing

IDS = torch.tensor([[0, 0, 3, 5, 7, 9], [4, 6, 8, 10, 12, 14]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
WIDTH, SITE = 32, "layers.0"


def directions(model):
    generator = torch.Generator().manual_seed(3)
    vectors = {name: torch.randn(WIDTH, generator=generator) for name in "ab"}
    return sl.ConceptBank.from_directions(vectors, site=SITE, base=model, norm=3.0)


def latents(model, kind="topk"):
    kinds: Any = encoders.KINDS
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(64, WIDTH, generator=generator)
    extra = {"k": 8} if kind == "topk" else {}
    encoder = kinds[kind](encoder=rows, bias=torch.zeros(64), decoder=rows / rows.square().sum(-1, keepdim=True), **extra)
    return sl.ConceptBank.from_encoder(encoder, site=SITE, base=model)


EDITS = {
    "add": (directions, {"a": 2.5}),
    "rows": (directions, {"a": sl.Add([2.5, -1.5])}),
    "slice": (directions, {"a": sl.Add(2.5, tokens=slice(1, 3))}),
    "scale": (directions, {"a": sl.Scale(1.7)}),
    "set": (directions, {"a": sl.Set(3.0), "b": sl.Set(-1.0)}),
    "norm": (directions, {"a": sl.Add(1.0, keep_norm=True), "b": sl.Add(0.5, match_norm=True)}),
    "gate": (directions, {"a": sl.Add(2.0, gate=sl.Gate("b", above=0.05))}),
    "mask": (directions, {"a": sl.Set(2.0, mask=torch.linspace(0, 1, 6))}),
    "latent": (latents, {"layers.0/3": sl.Scale(1.7), "layers.0/9": sl.Add(0.7)}),
    "latents": (latents, {"layers.0/3": sl.Set(2.0)}),
}
MODES = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def models():
    return {torch.float32: tiny("llama")} | {dtype: tiny("llama").to(dtype) for dtype in (torch.bfloat16, torch.float16)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EDITS)
def test_what_an_edit_makes_of_an_activation_is_rounded_once(models, name, mode):
    """The site's plain activation, edited in float32 by a model that gives just that, and rounded once."""
    make, edits = EDITS[name]
    dtype, is_autocast = MODES[mode], mode.endswith("autocast")
    model = models[torch.float32 if is_autocast else dtype]
    bank, run = make(model), lambda: model(input_ids=IDS, attention_mask=MASK)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=is_autocast):
        with sl.record(model, [SITE]) as plain:
            run()
        with sl.steer(model, bank, edits, allow_ood=True), sl.record(model, [SITE]) as steered:
            run()
        names = [name for name in edits if "/" not in name]
        with sl.steer(model, bank, edits, allow_ood=True), sl.record(model, bank, names) as read:
            run()
    x, y = plain[SITE][0][1], steered[SITE][0][1]
    assert y.dtype == x.dtype
    given, whole = replacing(models[torch.float32], {SITE: lambda _, now: x.float()}), models[torch.float32]
    with torch.no_grad(), given, sl.steer(whole, bank, edits, allow_ood=True), sl.record(whole, [SITE]) as exact:
        whole(input_ids=IDS, attention_mask=MASK)  # the same in float32 alone
    expected, real = exact[SITE][0][1], MASK.bool()
    step = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 2e-6
    norms = 4 if "norm" in name else 1  # lengths are taken of the rounded activation
    assert ((y.float() - expected).abs() <= norms * step * expected.abs().clamp(min=0.1))[real].all()
    for concept in names:  # what is recorded is the float32 product with what flows on
        d = bank.rows(bank[concept]).read[0]
        torch.testing.assert_close(read[concept][0][1], y.float() @ d, rtol=1e-5, atol=1e-5)


def test_a_set_concept_reads_its_value_under_autocast(models):
    model = models[torch.float32]
    bank = directions(model)
    low = torch.autocast("cpu", dtype=torch.bfloat16)  # planned under it, too
    with low, torch.no_grad(), sl.record(model, bank, ["a"]) as tape, sl.steer(model, bank, {"a": sl.Set(3.0)}, allow_ood=True):
        model(input_ids=IDS[1:])
    torch.testing.assert_close(tape["a"][0][1], torch.full((1, 6), 3.0), rtol=1e-5, atol=1e-5)
