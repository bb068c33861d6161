"""The graph stage of training: edges of a tiny model, what they foretell of other texts, and the controls."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import steerlib as sl
from steerlib.bank.concept_bank import SiteFacts
from steerlib.encoders import JumpReLU
from steerlib.errors import BadRecipe
from steerlib.graph.causal_graph import CausalGraph, Edge
from steerlib.training.discover import text_graph
from steerlib.training.discover.text_graph import Foretold, best_known, carried, contexts, foretold, graphed, scores
from steerlib.training.entries import GraphRecipe
from steerlib.training.package.card import graph_table
from steerlib.training.pipeline import key_of
from steerlib.training.recipe import TextEncoderRecipe

SIZE = 24
RECIPE = GraphRecipe(contexts=720, length=12, parents=12, controls=4)


@pytest.fixture
def bank(llama):
    """Latents of two layers of a tiny model."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(SIZE, llama.config.hidden_size, generator=g), dim=-1)
    encoders = {
        f"layers.{k}": JumpReLU(encoder=own, bias=torch.zeros(SIZE), decoder=own.clone(), threshold=torch.full((SIZE,), 0.03))
        for k, own in enumerate((rows, rows.flip(0)))
    }
    concepts = [
        sl.Concept(name=f"{site}/{i}", encoder=site, index=i, unit=0.1 + 0.01 * i, effects={"frequency": i / 100})
        for site in encoders
        for i in range(SIZE)
    ]
    sites = {site: SiteFacts(width=llama.config.hidden_size) for site in encoders}
    return sl.ConceptBank("tiny", concepts, encoders, base=sl.BaseModel.of(llama), sites=sites)


@pytest.fixture
def ids(llama):
    return torch.randint(0, llama.config.vocab_size, (720, 12), generator=torch.Generator().manual_seed(1))


def test_the_stage_stores_verified_edges_alone_and_foretells_what_happens(llama, bank, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(text_graph, "STEPS", 5)
    recipe = replace(RECIPE, environments=("news.txt", "tales.txt"))
    made = graphed(llama, bank, ids, recipe, tmp_path)
    facts = made.provenance["graph"]
    assert made.graph.edges and {edge.evidence for edge in made.graph.edges} == {"verified"}
    assert facts["verified"] == len(made.graph) == sum(own["verified"] for own in facts["levels"].values())
    assert facts["shuffled"]["verified"] == 0 < facts["random model"]["proposed"]
    assert {edge.src for edge in made.graph.edges} <= set(best_known(bank, ["layers.0"], RECIPE.parents))
    found = [facts["forecast"][name] for name in ("more than carried on", "carried on")]
    assert sum(own["edges"] for own in found) > 10
    assert all(own["sign"] >= 0.85 and own["r2"] > 0.5 for own in found if own["edges"] > 5)
    assert facts["forecast"]["… by effects dealt among edges"]["r2"] < max(own["r2"] for own in found) - 0.3
    lines = graph_table(facts).splitlines()
    assert f"| this model | {facts['proposed']} |" in lines[2] and "random weights" in lines[3] and "720 texts" in lines[-1]
    told = [edge.everywhere for edge in made.graph.edges]  # both are of the same random tokens
    assert facts["everywhere"] == told.count(True) > 0.5 * len(told) and facts["differ"] == told.count(False) <= 0.1 * len(told)
    assert f"From news.txt, tales.txt in turn: {told.count(True)} edges" in lines[-1]
    assert graphed(llama, bank, ids, recipe, tmp_path).graph.edges == made.graph.edges, "it goes on from what it kept"
    made.save_pretrained(tmp_path / "bank")
    kept = sl.ConceptBank.from_pretrained(tmp_path / "bank")
    assert kept.provenance["graph"] == facts
    assert text_graph.measure_forecasts(llama, kept, ids, recipe, tmp_path / "again") == facts["forecast"]


def test_a_forecast_of_the_wrong_sign_is_seen(llama, bank, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(text_graph, "STEPS", 5)
    made = graphed(llama, bank, ids, RECIPE, tmp_path)
    turned = CausalGraph(replace(edge, tau=-edge.effect) for edge in made.graph.edges)
    wrong = made.with_concepts(list(made.concepts.values()), graph=turned)
    third = text_graph.SteeredText(llama, bank, ids[600:])
    found = scores([*foretold(wrong, third, tmp_path / "wrong")])
    assert found["sign"] < 0.15 and found["r2"] < 0


def test_an_edge_is_carried_on_where_its_effect_is_the_product_of_the_rows(bank):
    rows, reads = bank.encoder("layers.0").decoder, bank.encoder("layers.1").encoder
    plain = float(rows[3] @ reads[5]) * bank["layers.0/3"].unit / bank["layers.1/5"].unit
    edge = Edge(src="layers.0/3", dst="layers.1/5", weight=0.0, tau=1.15 * plain)
    assert carried(bank, edge) and not carried(bank, replace(edge, tau=1.25 * plain))
    assert not carried(bank, replace(edge, tau=-plain))


def test_scores_are_of_means_and_of_single_prompts():
    edge = Edge(src="a/0", dst="b/0", weight=-2.0, tau=0.5, evidence="verified", n_verify=2)
    rows = [
        Foretold("a to b", edge, False, np.array([1.0, 1.0]), np.array([2.0, 0.0])),
        Foretold("a to b", edge, False, np.array([-1.0, -1.0]), np.array([1.0, 1.0])),
    ]
    assert scores(rows[:1]) == {"edges": 1, "sign": 1.0, "r2": 1.0, "r2 interval": [1.0, 1.0], "r2 by prompt": 0.5}
    assert scores(rows)["sign"] == 0.5 and scores(rows)["r2"] == -1.0
    assert scores([]) == {"edges": 0}
    (turned,) = text_graph._by(rows[:1], [edge.weight])
    assert turned.said.tolist() == [-4.0, -4.0]


def test_latents_that_go_with_an_attribute_come_first_then_those_that_were_moved(bank):
    bank.provenance = {"quality": {"layers.0": {"probes": {"music": {"best": [[2, 0.9]]}}}}}
    moved = replace(bank["layers.0/1"], effects={"verified": {}, "frequency": 0.01})
    told = bank.with_concepts([moved if c.name == moved.name else c for c in bank.concepts.values()])
    told.provenance = bank.provenance
    assert best_known(told, ["layers.0"], 3) == ["layers.0/2", "layers.0/1", "layers.0/23"]


def test_too_few_documents_are_refused(tmp_path):
    class Words:
        bos_token_id, all_special_ids = None, ()

        def __call__(self, text, **_):
            ids = [len(word) for word in text.split()]
            return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(ids))]}

    (tmp_path / "texts.txt").write_text("one two three four\n\nfive six\n")
    with pytest.raises(BadRecipe, match="120 documents of 4 tokens"):
        contexts(Words(), [[tmp_path / "texts.txt"]], GraphRecipe(contexts=120, length=4))
    for name, word in (("short.txt", "a"), ("long.txt", "word")):
        (tmp_path / name).write_text("\n\n".join(f"{word} {word} {'b' * n}" for n in range(1, 70)))
    ids = contexts(Words(), [[tmp_path / "short.txt"], [tmp_path / "long.txt"]], GraphRecipe(contexts=121, length=3))
    assert len(ids) == 121 and ids[:, 0].tolist() == [1, 4] * 60 + [1], "in turn"
    with pytest.raises(BadRecipe, match="100 documents of 3 tokens for the graph in short.txt"):
        contexts(Words(), [[tmp_path / "short.txt"], [tmp_path / "long.txt"]], GraphRecipe(contexts=200, length=3))
    with pytest.raises(BadRecipe, match="120 contexts"):
        GraphRecipe(contexts=100).check()


RECIPE_TEXT = """name = "tiny"
base = "tiny"
source = "tiny"
corpus = ["texts.txt"]
[[encoders]]
site = "layers.0"
latents = 64
[graph]
contexts = {contexts}
"""


def test_a_recipe_asks_for_a_graph_of_two_layers_or_more(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE_TEXT.format(contexts=240))
    with pytest.raises(BadRecipe, match="two layers"):
        TextEncoderRecipe.from_file(path, to_train=False)
    whole = RECIPE_TEXT.format(contexts=240).replace("[graph]", '[[encoders]]\nsite = "layers.1"\nlatents = 64\n[graph]')
    path.write_text(whole)
    read = TextEncoderRecipe.from_file(path, to_train=False).graph
    assert read is not None
    assert (read.contexts, read.first, read.second, read.held_out) == (240, 120, 80, 0.4)
    path.write_text(whole + 'environments = ["news.txt", "tales.txt"]\n')
    read = TextEncoderRecipe.from_file(path, to_train=False).graph
    assert read is not None and read.labels == ["news.txt", "tales.txt"] * 120
    (tmp_path / "texts.txt").write_text("some text")
    keys = []
    for text in ("one", "other", "one"):
        (tmp_path / "news.txt").write_text(text)
        keys.append(key_of(TextEncoderRecipe.from_file(path, to_train=False)))
    assert keys[0] == keys[2] != keys[1], "what was run on other texts is not gone on from"
    (tmp_path / "news.txt").unlink()
    with pytest.raises(BadRecipe, match="news.txt, tales.txt beside the recipe"):
        TextEncoderRecipe.from_file(path)
    path.write_text(whole + 'environments = ["news.txt"]\n')
    with pytest.raises(BadRecipe, match="two environments or more"):
        TextEncoderRecipe.from_file(path, to_train=False)
    path.write_text(whole.replace("240", "60"))
    with pytest.raises(BadRecipe, match="120 contexts"):
        TextEncoderRecipe.from_file(path, to_train=False)
    path.write_text(whole.replace("contexts", "context"))
    with pytest.raises(BadRecipe, match="context"):
        TextEncoderRecipe.from_file(path, to_train=False)


def test_every_edge_of_a_shipped_bank_was_verified_and_its_interval_leaves_out_nothing():
    bank = sl.ConceptBank.from_pretrained("smollm2-135m-latents")
    assert len(bank.graph) > 20
    assert {bank[edge.src].encoder for edge in bank.graph.edges if edge.relation == "total"} == {"layers.7"}
    for edge in bank.graph.edges:
        assert edge.evidence == "verified" and edge.n_verify >= 16 and edge.tau is not None
        assert edge.tau_lo is not None and edge.tau_hi is not None and edge.tau_lo <= edge.tau <= edge.tau_hi
        if edge.relation == "total":  # what is left over two levels may be next to nothing
            continue
        assert (edge.p_adj or 0.0) <= 0.05 and edge.tau_lo * edge.tau_hi > 0
        said = bank.graph.forecast({edge.src: -1.0}, unmeasured=True)[edge.dst]
        assert np.sign(said) == -np.sign(edge.effect) or len(bank.graph.parents(edge.dst)) > 1
