"""Layers of a language model as a system: its readings, what it does beside `steer`, and the graph found in it."""

import numpy as np
import pytest
import torch

import steerlib as sl
from steerlib.bank.concept_bank import SiteFacts
from steerlib.encoders import Gated, JumpReLU, ReLU, TopK, Transcoder
from steerlib.errors import BadRecipe
from steerlib.training.discover.discovery import discover, with_graph
from steerlib.training.discover.steered import SteeredText
from steerlib.training.discover.systems import Shuffled, ablated, csr, fixed, held

SIZE, CONTEXTS, LENGTH = 24, 512, 12
EVERY = np.arange(CONTEXTS)


@pytest.fixture
def latents(llama):
    """Latents of two layers of a tiny model, those of the second in reverse order."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(SIZE, llama.config.hidden_size, generator=g), dim=-1)
    encoders = {
        f"layers.{k}": JumpReLU(encoder=own, bias=torch.zeros(SIZE), decoder=own, threshold=torch.full((SIZE,), 0.03))
        for k, own in enumerate((rows, rows.flip(0)))
    }
    concepts = [sl.Concept(name=f"{site}/{i}", encoder=site, index=i) for site in encoders for i in range(SIZE)]
    sites = {site: SiteFacts(width=llama.config.hidden_size) for site in encoders}
    return sl.ConceptBank("tiny", concepts, encoders, base=sl.BaseModel.of(llama), sites=sites)


@pytest.fixture
def system(llama, latents):
    ids = torch.randint(0, llama.config.vocab_size, (CONTEXTS, LENGTH), generator=torch.Generator().manual_seed(1))
    return SteeredText(llama, latents, ids)


def test_it_reads_what_record_does_of_every_token_but_the_first(llama, latents, system):
    found = system.run(EVERY[:4])
    with torch.no_grad(), sl.record(llama, ["layers.0", "layers.1"]) as tape:
        llama(system.ids[:4])
    for site, reading in found.items():
        z = latents.encoder(site).encode(tape[site][0][1][:, 1:]).flatten(0, 1)
        torch.testing.assert_close(torch.from_numpy(reading.natural.toarray()), z, atol=1e-6, rtol=0)
        assert (reading.natural != reading.flows).nnz == 0
    assert system.levels == {"layers.0": SIZE, "layers.1": SIZE} and len(system.owners(EVERY)) == CONTEXTS * (LENGTH - 1)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_what_is_done_moves_later_layers_as_a_hook_by_hand_does(llama, latents, system, value):
    """Checked with torch's own hook: all tokens but the first get the change of one latent along its decoder row."""
    row, own = latents.encoder("layers.0").decoder[5], np.full(4 * (LENGTH - 1), 5)
    do = fixed(own, np.full(len(own), value)) if value else ablated(own)
    found = system.run(EVERY[:4], {"layers.0": do})["layers.1"].natural.toarray()
    plain = system.run(EVERY[:4])["layers.1"].natural.toarray()

    def by_hand(_module, _args, output):
        z = latents.encoder("layers.0").encode(output[:, 1:])[..., 5:6]
        return torch.cat([output[:, :1], output[:, 1:] + (value - z) * row], 1)

    handle = llama.model.layers[0].register_forward_hook(by_hand)
    with torch.no_grad(), sl.record(llama, ["layers.1"]) as tape:
        llama(system.ids[:4])
    handle.remove()
    wanted = latents.encoder("layers.1").encode(tape["layers.1"][0][1][:, 1:]).flatten(0, 1)
    assert np.abs(found - plain).max() > 1e-4
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=0)


CODES = [
    lambda t: JumpReLU(**t, threshold=torch.full((SIZE,), 0.03)),
    lambda t: JumpReLU(**t, decoder_bias=torch.ones(32), centred=True, norm="layer", threshold=torch.full((SIZE,), 0.1)),
    lambda t: ReLU(**t, decoder_bias=torch.ones(32), centred=True, norm="length"),
    lambda t: TopK(**t, k=4, rescaled=True),
    lambda t: Gated(**t, gate_bias=torch.full((SIZE,), 0.02), log_scale=torch.full((SIZE,), 0.2)),
]


@pytest.mark.parametrize("first", [1, 0])
@pytest.mark.parametrize("made", CODES)
def test_an_ablation_in_steer_is_the_graphs_own(llama, made, first):
    """Both leave first tokens alone, or both do not."""
    g = torch.Generator().manual_seed(2)
    encoder = made({"encoder": torch.randn(SIZE, 32, generator=g) / 6, "decoder": torch.randn(SIZE, 32, generator=g),
                    "bias": torch.randn(SIZE, generator=g) / 50})  # fmt: skip
    sites = {site: SiteFacts(width=32, norm=1e-4) for site in ("layers.0", "layers.1")}
    bank = sl.ConceptBank("own", [], {site: encoder for site in sites}, base=sl.BaseModel.of(llama), sites=sites)
    system = SteeredText(llama, bank, torch.randint(0, 99, (4, LENGTH), generator=g), first=first)
    plain = system.run(EVERY[:4])
    latent = int(plain["layers.0"].natural.toarray().sum(0).argmax())
    theirs = system.run(EVERY[:4], {"layers.0": ablated(np.full(4 * (LENGTH - first), latent))})["layers.1"].natural.toarray()
    edit = sl.Ablate() if first else sl.Ablate(tokens="all")
    with torch.no_grad(), sl.steer(llama, bank, {f"layers.0/{latent}": edit}), sl.record(llama, ["layers.1"]) as tape:
        llama(system.ids)
    ours = encoder.encode(tape["layers.1"][0][1][:, first:]).flatten(0, 1)
    assert np.abs(theirs - plain["layers.1"].natural.toarray()).max() > 1e-3
    torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-5, rtol=0)


def test_nothing_done_changes_nothing_and_leaves_no_hook(llama, system):
    plain = system.run(EVERY[:4])
    same = system.run(EVERY[:4], {name: held(reading.natural) for name, reading in plain.items()})
    assert all((plain[name].natural != same[name].natural).nnz == 0 for name in plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


def test_the_token_before_is_of_the_same_context(system):
    z = csr(np.arange(1, 2 * (LENGTH - 1) + 1, dtype=np.float32)[:, None])
    wanted = [0, *range(1, LENGTH - 1), 0, *range(LENGTH, 2 * LENGTH - 2)]
    assert system.carried("before", z, EVERY[:2]).toarray()[:, 0].tolist() == wanted
    assert system.carried("same", z, EVERY[:2]) is z


def test_a_graph_is_found_in_it_and_none_where_contexts_are_shuffled(latents, system):
    found = discover(system, held_out=0.5, seed=0)
    verified = [edge for edge in found.graph.edges if edge.evidence == "verified"]
    assert len(verified) >= 10 and all(edge.src.startswith("layers.0/") for edge in verified)
    assert not [edge for edge in discover(Shuffled(system), held_out=0.5).graph.edges if edge.evidence == "verified"]
    bank = with_graph(latents, found.graph)
    assert len(bank.graph) == len(found.graph)
    only = verified[0].src
    few = discover(system, held_out=0.5, seed=0, verify=[only]).graph.edges
    assert {edge.src for edge in few if edge.evidence == "verified"} == {only} and len(few) >= len(verified)


def test_shuffled_contexts_keep_their_units_and_the_first_layer(system):
    other, some = Shuffled(system), EVERY[:4]
    assert other.owners(some).tolist() == system.owners(some).tolist() and other.routes == system.routes
    assert other.weights("layers.0", "layers.1") is not None
    own, found = system.run(some), other.run(some)
    differs = {name: (own[name].natural != found[name].natural).nnz for name in own}
    assert differs["layers.0"] == 0 < differs["layers.1"]


def test_it_looks_at_some_layers_alone(llama, latents, system):
    with pytest.raises(BadRecipe, match="two layers"):
        SteeredText(llama, latents, system.ids, levels=["layers.1"])


def test_a_folder_is_not_shared_by_runs_that_verify_different_parents(system, tmp_path):
    first = discover(system, held_out=0.5, verify=["layers.0/1"], folder=tmp_path)
    assert discover(system, held_out=0.5, verify=["layers.0/1"], folder=tmp_path).graph.edges == first.graph.edges
    with pytest.raises(BadRecipe, match="other settings"):
        discover(system, held_out=0.5, verify=["layers.0/2"], folder=tmp_path)


def test_it_says_what_it_needs(llama, latents):
    none = torch.zeros(4)
    made = Transcoder(encoder=torch.zeros(4, 32), decoder=torch.zeros(4, 32), bias=none, threshold=none)
    apart = {site: made for site in ("layers.0.mlp", "layers.1.mlp")}
    sites = {site: SiteFacts(width=32) for site in (*apart, "embed")}
    bank = sl.ConceptBank(
        "b", [], apart, base=sl.BaseModel.of(llama), sites=sites, reads=dict.fromkeys(apart, "embed")
    )  # fmt: skip
    with pytest.raises(BadRecipe, match="read where they write, got the transcoders layers.0.mlp, layers.1.mlp"):
        SteeredText(llama, bank, torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(BadRecipe, match="two layers"):
        SteeredText(llama, latents, torch.zeros(3, 1, dtype=torch.long))
