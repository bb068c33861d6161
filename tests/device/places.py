"""A model split over two devices and the host, models in half precision, and whatever is trained: as on the CPU alone."""

from typing import Any

import pytest
import torch
from pretend_device import waits
from test_fit import ALL, D, N, recipe
from tiny_models import tiny
from torch import Tensor

import steerlib as sl
from steerlib.bank import SiteFacts
from steerlib.encoders import TopK
from steerlib.training.fit import run
from steerlib.training.fit.inputs import Tokens
from steerlib.training.fit.run import fit

IDS = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
PLACES = ("pretend:0", "pretend:1", "cpu")
"""Of the three layers; the embedding is with the first, the head with the last."""


def model_on(places=("cpu",), dtype=torch.float32) -> Any:
    """A Llama of three layers, each of which has its input moved to where it is, as accelerate does."""
    model = tiny("llama", num_hidden_layers=3).to("cpu", dtype)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    parts = dict(zip(model.model.layers, places * 3, strict=False))
    parts |= {model.model.embed_tokens: places[0], model.model.norm: places[-1], model.lm_head: places[-1]}
    parts |= {model.model.rotary_emb: places[0]}
    for part, place in parts.items():
        part.to(place).register_forward_pre_hook(moves(place), with_kwargs=True)
    return model


def moves(place: str):
    def there(x: Any) -> Any:
        return tuple(map(there, x)) if isinstance(x, tuple) else x.to(place) if isinstance(x, Tensor) else x

    return lambda module, args, kwargs: (there(args), {name: there(x) for name, x in kwargs.items()})


def bank_over(model: Any) -> Any:
    """`low`, `mid` and `high` at one layer each, joined by a graph; and a latent that competes at the second."""
    g = torch.Generator().manual_seed(3)
    names, sites = ("low", "mid", "high"), [f"layers.{i}" for i in range(3)]
    encoders: dict[str, Any] = {site: sl.Directions(torch.randn(1, 32, generator=g).cpu()) for site in sites}
    drawn: dict[str, Any] = {name: torch.randn(12, 32, generator=g).cpu() / 4 for name in ("encoder", "decoder")}
    encoders["layers.1#topk"] = TopK(**drawn, bias=torch.full((12,), 0.1).cpu(), k=3)
    facts = [sl.Concept(name=name, encoder=site, index=0, natural=(-9.0, 9.0)) for name, site in zip(names, sites, strict=True)]
    return sl.ConceptBank(
        "split",
        facts,
        encoders,
        base=sl.BaseModel.of(model),
        sites={site: SiteFacts(width=32, norm=50.0) for site in sites},
        graph=sl.CausalGraph([sl.Edge(src="low", dst="high", weight=0.7)]),
    )


EDITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "everywhere": ({"low": 1.0, "mid": sl.Set([2.0, 1.0]), "high": sl.Ablate(), "layers.1#topk/2": sl.Set(1.0)}, {}),
    "gates": ({name: sl.Add(2.0, gate=sl.Gate("low", above=0.0, full=1.0)) for name in ("mid", "high")}, {}),
    "masks": ({name: sl.Add(2.0, mask=torch.tensor([[0.0, 1, 0.5, 1]]).cpu()) for name in ("low", "mid", "high")}, {}),
    "slice, ramp": ({n: sl.Add(2.0, tokens=slice(1, 9), when=sl.Ramp(sl.Steps(0, 4))) for n in ("low", "mid", "high")}, {}),
    "hold": ({"low": 3.0}, {"do": "hold", "hold": ["mid"]}),
    "graph": ({"low": 3.0}, {"do": "graph"}),
}


def texts(model: Any, case: str, tokens: int = 4) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What it writes, its last logits and what concepts read, on the CPU."""
    edits, options = EDITS[case]
    bank = bank_over(model)
    ids = IDS.to("cpu").to(model.model.embed_tokens.weight.device)
    with sl.steer(model, bank, edits, **options) as session, sl.record(model, bank) as tape:
        out = model.generate(
            ids, attention_mask=(ids > 0).long(), do_sample=False, max_new_tokens=tokens, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert str(session.report())
    read = {name: torch.cat([z.cpu() for _, z in passes], 1) for name, passes in tape.items()}
    return out.sequences.cpu(), torch.stack([step.cpu() for step in out.logits]), read


@pytest.mark.parametrize("case", EDITS)
@pytest.mark.parametrize("places", [PLACES, PLACES[::-1]], ids=["device first", "host first"])
def test_a_split_model_is_steered_as_on_the_cpu(case, places):
    split = model_on(places)
    assert {str(p.device) for p in split.parameters()} == {*places}
    found, expected = texts(split, case), texts(model_on(), case)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("case", EDITS)
def test_half_precision_equals_the_cpus(case, dtype, tolerance):
    found, expected = texts(model_on(("pretend:0",), dtype), case), texts(model_on(dtype=dtype), case)
    torch.testing.assert_close(found[1:], expected[1:], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coordinates_are_float32_in_half_precision(dtype):
    model = model_on(("pretend:0",), dtype)
    bank = bank_over(model)
    ids = IDS.to("pretend:0")
    with torch.no_grad(), sl.record(model, ["layers.1"]) as plain:
        model(ids)
    with torch.no_grad(), sl.steer(model, bank, {"mid": sl.Set(2.0)}), sl.record(model, ["layers.1"]) as tape:
        model(ids)
    x, row = plain["layers.1"][0][1].cpu(), bank.rows(bank["mid"])
    wanted = x.float() + ((2.0 - x.float() @ row.read[0].cpu())[..., None] * row.write[0].cpu())
    assert torch.equal(tape["layers.1"][0][1].cpu(), x + (wanted - x.float()).to(dtype))


@pytest.mark.parametrize("kind", ALL)
def test_every_kind_is_fitted_as_on_the_cpu_and_no_step_waits_but_for_its_batch(kind, monkeypatch):
    """The pretend device has no pinned memory; where there is some, batches are not waited for either."""
    source = Tokens(torch.randn(4 * N, D, generator=torch.Generator().manual_seed(1)).cpu())
    asked = {"it": recipe(kind, **({"groups": (100, 156)} if kind == "matryoshka" else {}))}
    fit(asked, source, steps=1)
    counts = []
    for steps in (4, 8):
        with waits() as found:
            there = fit(asked, source, steps=steps)["it"]
        counts.append({line: n for line, n in found.items() if "/training/fit/" in line and "run.py" not in line})
    assert counts[0] == counts[1]
    monkeypatch.setattr(run, "best_device", lambda: torch.device("cpu"))
    here = fit(asked, source, steps=8)["it"]
    torch.testing.assert_close(there.to_tensors(), here.to_tensors(), atol=1e-4, rtol=1e-4)
