"""Graphs of pipelines: which concept brings which, and which latents are parts of which, from recipes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scenes import world

import steerlib as sl
from steerlib.bank.concept_bank import SiteFacts
from steerlib.encoders import TopK
from steerlib.errors import BadRecipe
from steerlib.evaluation.denoising import features
from steerlib.graph.causal_graph import CausalGraph
from steerlib.graph.page import page
from steerlib.training.carry import ported, recipe_in
from steerlib.training.discover import latent_graph
from steerlib.training.discover.concept_graph import Followed, Moved, Readers, followed, foretold
from steerlib.training.discover.steered_pictures import Cleared, SteeredPictures, _written, thresholds
from steerlib.training.discover.systems import Reading, System, ablated, csr, fixed
from steerlib.training.entries import ConceptGraphRecipe, LatentGraphRecipe
from steerlib.training.package.card import parts_section
from steerlib.training.package.prompted import Making
from steerlib.training.recipe import PictureRecipe, PipelineEncoderRecipe
from steerlib.training.record.noised import at_levels, spans

SITE = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2"
EARLY, LATE = f"{SITE}@850", f"{SITE}@300"


# -- concepts ----------------------------------------------------------------------------------------------------


def test_readings_are_fishers_discriminants_against_partners_and_against_all_others():
    g = torch.Generator().manual_seed(0)
    where = torch.randn(4, 30, generator=g, dtype=torch.double)  # of what all share, and of each of three concepts
    train, dev = ([_pair(where[0] + torch.stack((own, -own)), n, g) for own in where[1:]] for n in (6, 4))
    read = Readers.of(train, dev)
    x = torch.cat([own.flatten(0, 1) for own in train])
    y = (x - x.mean(0)) / x.std(0)
    covariance = 0.5 * y.T @ y / len(y) + 0.5 * torch.eye(30, dtype=torch.double)
    for k in range(3):
        ends = []
        for some in (train, dev):
            others = torch.cat([own.flatten(0, 1) for i, own in enumerate(some) if i != k])
            ends.append([(own.mean(0) - x.mean(0)) / x.std(0) for own in (*some[k], others)])
        for column, other in ((k, 1), (3 + k, 2)):
            whole = torch.linalg.solve(covariance, ends[0][0] - ends[0][other])
            assert float(torch.cosine_similarity(whole, read.weights[:, column], 0)) == pytest.approx(1)
            middle = (ends[1][0] + ends[1][other]) / 2 @ read.weights[:, column]
            assert float(read.least[column]) == pytest.approx(float(middle))
    shown = read(torch.stack([where[0] + own for own in where[1:]]))
    assert (shown == np.eye(3, dtype=bool)).all() and not read(where[:1]).any(), "one that shows nothing"


def _pair(means, count, g):
    return means[:, None] + 0.3 * torch.randn(2, count, 30, generator=g, dtype=torch.double)


def moved(name, amount, **shares):
    """A concept that is moved in 40 pictures, and the shares of them in which others came or went."""
    rng, d = np.random.default_rng(0), np.zeros((40, 4), np.float32)
    for other, share in shares.items():
        rows = rng.permutation(30)[: round(abs(share) * 30)]
        d[rows, "abcd".index(other)] = np.sign(share)
        d[30:, "abcd".index(other)] = share
    return Moved(name, amount, d)


def test_what_follows_has_to_be_large_told_and_neither_mutual_nor_a_circle():
    moves = [moved("a", 2.0, b=0.8, c=-0.6, d=0.9), moved("b", 1.0, c=0.1, a=0.5), moved("c", 4.0, a=-0.5)]
    found = followed(moves, [*"abcd"], [True, True, True, False], 30)
    assert [(edge.src, edge.dst) for edge in found.graph.edges] == [("a", "b")], "d is not told, 0.1 is too little"
    assert found.excluding == [("a", "c")] and found.circles == 1 and found.tested == 2 + 2 + 2
    (edge,) = found.graph.edges
    assert edge.effect == pytest.approx(0.8 / 2) and edge.n_verify == 30 and edge.evidence == "verified"
    assert edge.tau_lo is not None and edge.tau_hi is not None and 0 < edge.tau_lo < edge.effect < edge.tau_hi


def test_forecasts_are_held_against_pictures_that_no_edge_was_made_from():
    found = Followed(followed([moved("a", 2.0, b=0.8, c=0.4)], [*"abc"], [True] * 3, 30).graph, [], 2, [], 0)
    own = foretold(found._replace(moves=[moved("a", 2.0, b=0.8, c=0.4)]), [*"abcd"], 30, seed=0)
    assert own["edges"]["r2"] == pytest.approx(1, abs=1e-3) and own["edges"]["sign"] == 1
    turned = found._replace(moves=[moved("a", 2.0, b=-0.8, c=-0.4)])
    assert foretold(turned, [*"abcd"], 30, seed=0)["edges"]["sign"] == 0


RECIPE = """
name = "toy"
base = "toy"
source = "toy"
template = "{prompt} at {concept}"
prompts = "prompts.txt"
levels = [850, 300]
methods = ["mean"]
train_prompts = 3
dev_prompts = 1
evaluation_prompts = 1
steps = 2
guidance = 2.0
sites = ["%s"]

[[concepts]]
name = "night"

[[concepts]]
name = "sunset"

[graph]
contexts = 8
prompts = "bare.txt"
pairs = 2
controls = 1
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(world.captions(world.draw(6).factors)))
    (tmp_path / "bare.txt").write_text("a circle\na square\n")
    (tmp_path / "recipe.toml").write_text(RECIPE % SITE)
    return sl.Recipe.from_file(tmp_path / "recipe.toml")


def test_a_recipe_of_concepts_with_a_graph_moves_each_and_goes_on_where_it_stopped(toy, recipe, tmp_path, monkeypatch):
    assert isinstance(recipe, PictureRecipe) and recipe.graph is not None
    contexts = recipe.read_contexts(recipe.graph)
    assert [prompt for prompt, _ in contexts] == ["a circle", "a square"] * 4 and len({seed for _, seed in contexts}) == 8
    monkeypatch.setattr("steerlib.training.calibrate.prompted.MOVED", 0.0)
    monkeypatch.setattr("steerlib.training.calibrate.prompted.TOLD", 0.0)
    monkeypatch.setattr("steerlib.training.calibrate.prompted.HARM", 1e9)
    bank = sl.train(toy, recipe, work=tmp_path / "work")
    found = bank.provenance["graph"]
    assert found["moved"] == 2 and found["random"]["moved"] == 1 and found["contexts"] == 6 and {*found["told"]} == {*bank}
    assert "## What follows what" in bank.card and "| random directions as long | 1 |" in bank.card
    kept = recipe_in(bank)
    assert isinstance(kept, PictureRecipe) and kept.graph == recipe.graph and kept.read_contexts(recipe.graph) == contexts
    assert ported(kept, bank, "other").graph == recipe.graph and ported(kept, bank, "other", ["night"]).graph is None
    monkeypatch.setattr(Making, "look", lambda *_: pytest.fail("drawn again"))
    assert sl.train(toy, recipe, work=tmp_path / "work").provenance["graph"] == found
    lost = next(tmp_path.glob("work/*/graph-*/moved/night.safetensors"))
    lost.unlink()
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        sl.train(toy, recipe, work=tmp_path / "work")


def test_features_are_means_of_what_the_denoiser_has_where_pictures_are_judged(toy):
    latents = torch.randn(2, *toy_shape(toy), generator=torch.Generator().manual_seed(0))
    found = features(toy, latents, ["", ""], [SITE, f"{SITE}.in"])
    widths = {site: x.shape[-1] for site, x in recorded(toy).items()}
    assert found.shape == (2, sum(widths.values())) and not torch.equal(found[0], found[1])
    torch.testing.assert_close(features(toy, latents[:1], [""], [SITE, f"{SITE}.in"]), found[:1], rtol=1e-4, atol=1e-5)


def toy_shape(toy):
    size = toy.unet.config.sample_size
    return toy.unet.config.in_channels, size, size


def recorded(toy):
    with sl.record(toy, [SITE, f"{SITE}.in"]) as tape:
        toy("a circle", num_inference_steps=1, output_type="latent")
    return {site: passes[0][1] for site, passes in tape.items()}


def test_recipes_refuse_graphs_that_cannot_be(recipe, tmp_path):
    assert recipe.quick().graph is None
    with pytest.raises(BadRecipe, match="two concepts"):
        replace(recipe, concepts=recipe.concepts[:1]).check()
    with pytest.raises(BadRecipe, match="nowhere.txt"):
        replace(recipe, graph=replace(recipe.graph, prompts="nowhere.txt")).check()
    with pytest.raises(BadRecipe, match="8 contexts"):
        replace(recipe, graph=ConceptGraphRecipe(contexts=4)).check()


# -- latents -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents(toy):
    """A bank of latents at two noise levels of one site."""
    width = recorded(toy)[SITE].shape[-1]
    g = torch.Generator().manual_seed(1)
    encoders = {}
    for name in (LATE, EARLY):
        rows = torch.nn.functional.normalize(torch.randn(16, width, generator=g), dim=-1)
        encoders[name] = TopK(encoder=rows, bias=torch.zeros(16), decoder=30 * rows, k=4)
    concepts = [sl.Concept(name=f"{id}/{i}", encoder=id, index=i, unit=0.5) for id in encoders for i in range(16)]
    made = {"base": sl.BaseModel.of(toy), "sites": {SITE: SiteFacts(width=width)}, "levels": spans(toy, [850, 300])}
    return sl.ConceptBank("toy", concepts, encoders, **made)


CONTEXTS = [("a circle", 3), ("two squares by night", 4), ("a cross", 5)]


@pytest.fixture(scope="module")
def draw(toy):
    def draw(prompts, seeds):
        noises = [torch.Generator().manual_seed(seed) for seed in seeds]
        toy([*prompts], num_inference_steps=6, guidance_scale=2.0, generator=noises, output_type="latent")

    return draw


def test_a_picture_reads_the_mean_of_its_tokens_and_moving_latents_is_what_steering_does(toy, latents, draw):
    system = SteeredPictures(toy, latents, CONTEXTS, draw, size=2)
    assert [*system.levels] == [EARLY, LATE]
    plain = system.run(np.arange(3))

    def mean(edits):
        with sl.steer(toy, latents, edits, branch="cond", allow_ood=True):
            seen = at_levels(toy, [SITE], (850, 300), lambda: draw(*zip(*CONTEXTS, strict=True)))
        return {name: latents.encoder(name).encode(x.float()).mean(1).numpy() for name, x in seen.items()}

    for name, own in mean({}).items():
        np.testing.assert_allclose(plain[name].natural.toarray(), own, rtol=1e-3, atol=1e-5)
    strongest = int(plain[EARLY].natural.toarray().min(0).argmax())
    less = system.run(np.arange(3), {EARLY: ablated(np.full(3, strongest))})
    own = mean({f"{EARLY}/{strongest}": sl.Ablate()})[LATE]
    np.testing.assert_allclose(less[LATE].natural.toarray(), own, rtol=1e-3, atol=1e-5)
    assert np.abs(own - plain[LATE].natural.toarray()).max() > 1e-3 and less[EARLY].flows[:, strongest].nnz == 0


def test_a_latent_is_set_at_the_token_that_comes_nearest_where_it_fires_nowhere(toy, latents, draw):
    system = SteeredPictures(toy, latents, CONTEXTS[:1], draw)
    z = system.run(np.arange(1))[EARLY].natural.toarray()[0]
    for latent in {int(z.argmax()), int(z.argmin())}:
        own = system.run(np.arange(1), {EARLY: fixed(np.array([latent]), np.array([9.0]))})
        assert own[EARLY].flows[0, latent] == pytest.approx(9.0)
        assert abs(own[LATE].natural - system.run(np.arange(1))[LATE].natural).max() > 1e-3


def test_what_is_written_reads_on_average_what_was_set(latents):
    encoder, g = latents.encoder(EARLY), torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, encoder.encoder.shape[1], generator=g)
    z = encoder.encode(x)
    natural = csr(z.mean(1).numpy())
    silent, busy = int(z.amax((0, 1)).argmin()), int(z.mean(1).amin(0).argmax())
    assert z[..., silent].max() == 0 < natural[:, busy].min()
    for latent in (silent, busy):
        flows = natural.tolil()
        flows[:, latent] = 9.0
        written = _written(encoder, x, z, natural, csr(flows), np.array([latent]))
        rows = encoder.rows([latent])
        due = (9.0 - z.mean(1)[:, [latent]]) @ rows.write
        torch.testing.assert_close((written / rows.lengths(x)).mean(1), due, rtol=1e-4, atol=1e-4)


def test_banks_without_one_encoder_at_each_of_two_levels_are_refused(toy, latents):
    for ids in ((EARLY,), (EARLY, LATE, f"{EARLY}#other")):
        encoders = {id: latents.encoder(id.partition("#")[0]) for id in ids}
        some = sl.ConceptBank("x", [], encoders, base=latents.base, sites=latents.sites, levels=latents.levels)
        with pytest.raises(BadRecipe, match="one encoder at each"):
            SteeredPictures(toy, some, CONTEXTS, print)


class Composed(System):
    """Three wholes of two parts each, which also come alone."""

    levels = {EARLY: 16, LATE: 16}  # type: ignore[assignment]

    def __init__(self, bank, count, seed):
        self.bank, self.count, self.seed = bank, count, seed

    def __len__(self):
        return self.count

    place = SteeredPictures.place
    _encoders = levels

    def run(self, contexts, do=None):
        wholes, parts = np.zeros((len(contexts), 16), np.float32), np.zeros((len(contexts), 16), np.float32)
        chance = np.random.default_rng(self.seed).random((self.count, 2, 16))[contexts]
        wholes[:, :3] = chance[:, 0, :3] < 0.15
        natural = csr(wholes)
        flows = (do or {}).get(EARLY, lambda z: z)(natural)
        parts[:, :6] = np.maximum(np.repeat(flows.toarray()[:, :3], 2, 1), chance[:, 1, :6] < 0.03)
        own = csr(parts + 0.1 * chance[:, 1].astype(np.float32))
        return {EARLY: Reading(natural, flows), LATE: Reading(own, (do or {}).get(LATE, lambda z: z)(own))}


def test_parts_are_found_by_readings_and_follow_when_their_whole_is_moved(latents, tmp_path):
    first, second, recipe = Composed(latents, 900, 0), Composed(latents, 400, 1), LatentGraphRecipe()
    made = latent_graph.graphed(latents, first, second, recipe, tmp_path)
    true = {(f"{EARLY}/{k // 2}", f"{LATE}/{k}") for k in range(6)}
    by = {kind: {(e.src, e.dst) for e in made.graph.edges if e.relation == kind} for kind in ("selection", "compute")}
    assert by == {"selection": {ends[::-1] for ends in true}, "compute": true}
    (own,) = made.provenance["graph"]["levels"].values()
    assert own == {
        "parts": 6, "shuffled": 0, "verified": 6, "refused": 0, "few": 0, "positive": 6,
        "dealt": {"verified": 0, "refused": 6, "few": 0},
    }  # fmt: skip
    assert "| 6 of 6 | 6 | 0 | 0 of 6 |" in parts_section(made) and "selection" in page(made)
    only = latent_graph.graphed(latents, first, second, replace(recipe, parents=1), tmp_path / "one")
    assert only.provenance["graph"]["levels"][f"{EARLY} to {LATE}"]["verified"] == 2


def test_pictures_in_which_nothing_is_part_of_anything_have_an_empty_graph(latents, tmp_path):
    alone = Composed(latents, 300, 0)
    alone.run = lambda contexts, do=None: {name: Reading(*[csr((len(contexts), 16))] * 2) for name in alone.levels}
    made = latent_graph.graphed(latents, alone, alone, LatentGraphRecipe(), tmp_path)
    assert made.graph.edges == CausalGraph().edges and "0 of 0" in parts_section(made)


def test_readings_count_where_they_are_high():
    z = csr(np.array([[0.1, 5.0], [0.2, 0.0], [3.0, 4.0], [4.0, 0.0]]))
    limits = thresholds(z)
    np.testing.assert_allclose(limits, [3.0, 4.0])
    inner = Composed(None, 4, 0)
    own = Cleared(inner, {"x": limits})
    np.testing.assert_allclose(own.cleared("x", z).toarray(), [[0, 5], [0, 0], [3, 4], [4, 0]])
    assert own.rates == (inner.rates[0], 0.5)


def test_a_recipe_of_latents_has_one_encoder_at_each_level_of_its_graph(tmp_path):
    text = 'name = "x"\nbase = "x"\nsource = "x"\ncorpus = ["a.txt"]\n'
    for site, level in (("a", 850), ("b", 300)):
        text += f'[[encoders]]\nsite = "{site}"\nlevel = {level}\nlatents = 8\nk = 2\n'
    (tmp_path / "a.txt").write_text("a circle\n\na square")
    (tmp_path / "recipe.toml").write_text(text + "[graph]\ncontexts = 150\n")
    recipe = PipelineEncoderRecipe.from_file(tmp_path / "recipe.toml")
    assert recipe.graph == LatentGraphRecipe(contexts=150) and recipe.quick().graph is None
    assert LatentGraphRecipe(contexts=150).first == 100
    with pytest.raises(BadRecipe, match="one at each"):
        replace(recipe, encoders=(*recipe.encoders, replace(recipe.encoders[0], site="c"))).check()
    with pytest.raises(BadRecipe, match="120 contexts"):
        replace(recipe, graph=LatentGraphRecipe(contexts=60)).check()
