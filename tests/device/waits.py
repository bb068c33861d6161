"""How often lines of steerlib make the host wait for the device: once for a generation perhaps, never for a token or a step.

A run of N new tokens (or denoising steps) is compared with one of 2 N, with every pass looked at for the report.
"""

from typing import Any

import pytest
import torch
from conftest import two_directions
from pretend_device import waits
from test_beside import bank_for
from test_encoders import MADE
from test_encoders import bank_of as latents_of
from tiny_models import tiny, toy_tokenizer
from tiny_pipelines import PIPELINES, run

import steerlib as sl
from steerlib.bank import SiteFacts
from steerlib.steering import report

N = 3
IDS = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))
RAMP = sl.Ramp(sl.Steps(0, 8), first=1.0, last=0.0)
TEXT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "add": ({"a": 1.5}, {}),
    "add, several": ({"a": 1.5, "b": -1.0}, {}),
    "add to each row its own": ({"a": [1.5, -1.0]}, {}),
    "scale, clamp": ({"a": sl.Scale(3.0), "b": sl.Clamp(-0.1, 0.1)}, {}),
    "set": ({"a": sl.Set(2.0)}, {}),
    "set, several": ({"a": sl.Set([2.0, 1.0]), "b": sl.Ablate()}, {}),
    "generated": ({"a": sl.Add(1.5, tokens="generated")}, {}),
    "slice": ({"a": sl.Add(1.5, tokens=slice(2, 99))}, {}),
    "ramp": ({"a": sl.Add(2.0, when=RAMP)}, {}),
    "each step its own": ({"a": sl.Add(2.0, when=sl.PerStep((1.0, 0.5, 0.2)))}, {}),
    "each step, no cache": ({"a": sl.Add(2.0, when=sl.PerStep((1.0, 0.5, 0.2)))}, {"use_cache": False}),
    "ramp, no cache": ({"a": sl.Add(2.0, when=RAMP)}, {"use_cache": False}),
    "gate": ({"a": sl.Add(2.0, gate=sl.Gate("b", above=0.0))}, {}),
    "gate over the prompt": ({"a": sl.Add(2.0, gate=sl.Gate("b", above=0.0, over="prompt"))}, {}),
    "mask": ({"a": sl.Add(2.0, mask=torch.rand(1, 30).cpu())}, {}),
    "match_norm": ({"a": sl.Add(2.0, match_norm=True)}, {}),
    "keep_norm": ({"a": sl.Add(2.0, keep_norm=True)}, {}),
    "guidance": ({"a": sl.Add(2.0, branch="cond")}, {"guidance_scale": 2.0}),
    "beams": ({"a": [1.0, 2.0]}, {"num_beams": 2}),
    "static cache": ({"a": sl.Set(1.0, when=sl.Steps(1))}, {"cache_implementation": "static"}),
}
PADDED = ("add", "set, several", "slice", "gate", "mask", "static cache")
LATENT = {"set": sl.Set(2.0), "add": 1.0, "add below 0": -1.0, "ablate": sl.Ablate()}


@pytest.fixture(autouse=True)
def _looked_at_in_every_pass(monkeypatch):
    monkeypatch.setattr(report, "SAMPLE_EVERY", 1)
    monkeypatch.setattr(report, "STEPS_EVERY", 1)


@pytest.fixture(scope="module")
def llama():
    model = tiny("llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def written(model, tokens, pads=0, **settings):
    ids = torch.cat((torch.zeros(2, pads, dtype=torch.long), IDS.to("cpu")), 1).to(model.device)
    mask = (ids > 0).long()
    mask[1, : pads + 1] = 0  # rows of different lengths
    given = {"do_sample": False, "attention_mask": mask if pads else torch.ones_like(ids)} | settings
    return model.generate(ids, max_new_tokens=tokens, **given)


def per_unit(make, capsys, what):
    """What each further token or step waits for; prints a line of the table."""
    make(2)
    counts = []
    for n in (N, 2 * N):
        with waits() as found:
            make(n)
        counts.append({line: count for line, count in found.items() if not line.startswith("elsewhere")})
    once, twice = counts
    more = {line: count - once.get(line, 0) for line, count in twice.items() if count != once.get(line, 0)}
    with capsys.disabled():
        print(f"\n{what:<42} {sum(once.values()):>4} in all {sum(more.values()) / N:>6.2f} each", end="")
        print("".join(f"\n    {line}: {count / N:.2f}" for line, count in more.items()), end="")
    return more


@pytest.mark.parametrize(("case", "pads"), [*((case, 0) for case in TEXT), *((case, 3) for case in PADDED)])
def test_no_token_waits_for_an_edit(llama, capsys, case, pads):
    edits, settings = TEXT[case]
    bank = two_directions(llama)
    bank = bank.with_concepts(sites={"layers.0": SiteFacts(width=32, norm=60.0)})

    def make(n):
        with sl.steer(llama, bank, edits, allow_ood=case == "match_norm"):
            written(llama, n, pads, **settings)

    assert not per_unit(make, capsys, f"text: {case}{', padded' if pads else ''}")


@pytest.mark.parametrize("pads", [0, 3])
def test_a_part_of_the_text_waits_once_a_token_for_the_tokens_themselves(llama, capsys, pads):
    bank, edits = two_directions(llama), {name: sl.Add(1.0, tokens="not-sun...moon") for name in "ab"}

    def make(n):
        with sl.steer(llama, bank, edits, tokenizer=toy_tokenizer()):
            written(llama, n, pads)

    more = per_unit(make, capsys, f"text: part of the text{', padded' if pads else ''}")
    assert [line.endswith("copy to the host") for line in more] == [True] and sum(more.values()) == N


@pytest.mark.parametrize(("kind", "edit"), [*((kind, "set") for kind in MADE), *(("topk", edit) for edit in [*LATENT][1:])])
def test_no_token_waits_for_a_latent(llama, capsys, kind, edit):
    if kind == "transcoder":
        site, sites = "layers.1.mlp", {name: SiteFacts(width=32) for name in ("layers.0", "layers.1.mlp")}
        base, reads = sl.BaseModel.of(llama), {site: "layers.0"}
        bank, name = sl.ConceptBank("t", [], {site: MADE[kind]()}, base=base, sites=sites, reads=reads), f"{site}/1"
    else:
        bank, name = latents_of(llama, MADE[kind](norm="layer", centred=True)), "layers.0/1"

    def make(n):
        with sl.steer(llama, bank, {name: LATENT[edit]}, allow_ood=True):
            written(llama, n)

    assert not per_unit(make, capsys, f"text: {kind}, {edit}")


@pytest.fixture(scope="module")
def levels(llama):
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)).cpu()
    sites = {name: SiteFacts(width=32, norm=60.0) for name in ("layers.0", "layers.1")}
    concepts = [sl.Concept(name="cause", encoder="layers.0", index=0), sl.Concept(name="effect", encoder="layers.1", index=0)]
    concepts.append(sl.Concept(name="side", encoder="layers.1", index=1))
    parts = {"layers.0": sl.Directions(vectors[:1]), "layers.1": sl.Directions(vectors[1:])}
    graph = sl.CausalGraph([sl.Edge(src="cause", dst="effect", weight=0.7)])
    return sl.ConceptBank("levels", concepts, parts, base=sl.BaseModel.of(llama), sites=sites, graph=graph)


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hold": ({"cause": 2.0}, {"do": "hold"}),
    "hold, two": ({"cause": 2.0}, {"do": "hold", "hold": ["side"]}),
    "graph": ({"cause": 2.0}, {"do": "graph"}),
    "gate of an earlier site": ({"side": sl.Add(1.0, gate=sl.Gate("cause", above=0.0, full=2.0))}, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_token_waits_for_another_site(llama, levels, capsys, way):
    edits, options = WAYS[way]

    def make(n):
        with sl.steer(llama, levels, edits, allow_ood=True, **options):
            written(llama, n)

    assert not per_unit(make, capsys, f"text: {way}")


def test_no_token_waits_for_a_tape(llama, levels, capsys):
    def record(n):
        with sl.record(llama, levels) as tape, sl.record(llama, ["layers.0"]):
            written(llama, n)
        return tape

    assert not per_unit(record, capsys, "text: record")
    tape = record(2 * N)

    def replay(n):
        with sl.steer(llama, levels, {"cause": sl.Patch(tape)}):
            written(llama, n)

    assert not per_unit(replay, capsys, "text: patch")


IMAGE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "add": ({"a": 1.0}, {}),
    "set, several": ({"a": sl.Set(1.0), "b": sl.Ablate()}, {}),
    "window": ({"a": sl.Add(1.0, when=sl.Window(0.2, 0.8))}, {}),
    "window, ramp": ({"a": sl.Set(1.0, when=sl.Ramp(sl.Window(0.2, 0.8)))}, {}),
    "cond": ({"a": 1.0}, {"branch": "cond"}),
    "an amount for each image": ({"a": [1.0, -1.0]}, {}),
    "box": ({"a": sl.Add(1.0, mask=(0.0, 0.0, 0.5, 1.0))}, {}),
    "mask": ({"a": sl.Add(1.0, mask=torch.rand(8, 8).cpu())}, {}),
    "gate": ({"a": sl.Add(1.0, gate=sl.Gate("b", above=0.0))}, {}),
    "hold": ({"a": 1.0}, {"do": "hold", "hold": ["b"]}),
}
FAMILIES = {"sd1": "unet.mid_block.attentions.0", "flux": "transformer.transformer_blocks.0:image"}


@pytest.fixture(scope="module", params=FAMILIES)
def painted(request):
    pipe, site = PIPELINES[request.param].build(), FAMILIES[request.param]
    with sl.record(pipe, [site]) as tape:
        run(pipe, steps=1, height=16, width=16)
    return pipe, bank_for(pipe, site, tape[site][0][1].shape[-1]), site


@pytest.mark.parametrize("case", IMAGE)
def test_no_denoising_step_waits_for_an_edit(painted, capsys, case):
    (pipe, bank, _), (edits, options) = painted, IMAGE[case]

    def make(n):
        with sl.steer(pipe, bank, edits, **options):
            run(pipe, steps=n, height=16, width=16, batch=2)

    assert not per_unit(make, capsys, f"{pipe.family}: {case}")


def test_no_denoising_step_waits_for_a_tape(painted, capsys):
    pipe, bank, site = painted

    def record(n):
        with sl.record(pipe, bank) as tape, sl.record(pipe, [site]):
            run(pipe, steps=n, height=16, width=16)
        return tape

    assert not per_unit(record, capsys, f"{pipe.family}: record")
    tape = record(2 * N)

    def replay(n):
        with sl.steer(pipe, bank, {"a": sl.Patch(tape)}):
            run(pipe, steps=n, height=16, width=16)

    assert not per_unit(replay, capsys, f"{pipe.family}: patch")
