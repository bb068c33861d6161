"""Causal discovery: its solver beside others, its screen beside the full table, its graphs beside the truth."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from graphs.compiled import Compiled
from graphs.edges import associated, calibration, edge_scores
from graphs.hierarchies import Imperfect, Layers, Selection
from scipy.sparse import hstack
from scipy.stats import norm

import steerlib as sl
from steerlib.bank.concept_bank import SiteFacts
from steerlib.errors import BadRecipe, Unanswerable
from steerlib.training.discover.confirm import CONFIRMED, Pair, adjusted, confirmed
from steerlib.training.discover.conjunctions import conjunction, extended, likelihood, parts_of_wholes
from steerlib.training.discover.discovery import composition, discover, eligible
from steerlib.training.discover.independence import by_independence
from steerlib.training.discover.lasso import Products, lasso, refit
from steerlib.training.discover.minimality import doubts, merged
from steerlib.training.discover.regress import Rows, explains, sparsest
from steerlib.training.discover.rows import Folder
from steerlib.training.discover.screen import firing_together, pointing
from steerlib.training.discover.systems import Reading, Shuffled, System, ablated, csr, fixed, held, matrix

EVERY = np.arange(200)


def dense(seed=0, n=400, size=6):
    """Rows, a target of two of their columns, and their products."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, generator=g, dtype=torch.float64) @ torch.randn(size, size, generator=g, dtype=torch.float64)
    x = x / x.square().mean(0).sqrt()
    y = x[:, 0] - 0.5 * x[:, 3] + torch.randn(n, generator=g, dtype=torch.float64)
    return x, y, Products((x.T @ x / n)[None], (x.T @ y / n)[None], (y @ y / n)[None])


def fires(units, latents, rate):
    """Latents that fire by chance."""
    return csr(np.random.default_rng(latents).random((units, latents)) < rate, dtype=np.float32)


# -- the solver ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("price", [0.01, 0.3, 2.0])
def test_the_lasso_equals_coordinate_descent(signed, price):
    from sklearn.linear_model import Lasso

    x, y, products = dense()
    other = Lasso(alpha=price, fit_intercept=False, positive=not signed, tol=1e-10, max_iter=100_000).fit(x.numpy(), y.numpy())
    found = lasso(products, torch.tensor([price], dtype=torch.float64), signed=signed, rounds=20_000, close=1e-12)
    torch.testing.assert_close(found[0], torch.from_numpy(other.coef_), atol=1e-5, rtol=0)


def test_the_group_lasso_meets_the_conditions_of_a_minimum():
    """0 is a subgradient: where a group is kept, the pull of the data equals that of the price; where not, it is weaker."""
    _, _, p = dense()
    price = 0.5
    b = lasso(p, torch.tensor([price], dtype=torch.float64), routes=2, rounds=20_000, close=1e-13)[0]
    pull = (p.cross[0] - p.gram[0] @ b).unflatten(0, (3, 2))
    kept = 0
    for own, force in zip(b.unflatten(0, (3, 2)), pull, strict=True):
        if own.norm() == 0:
            assert (force.abs() - price / 2).clamp(min=0).norm() <= price * 2**0.5 / 2 + 1e-6
            continue
        kept += 1
        along = price * 2**0.5 / 2 * own / own.norm() + price / 2 * own.sign()
        torch.testing.assert_close(force[own != 0], along[own != 0], atol=1e-5, rtol=0)
    assert 0 < kept < 3


def test_a_refit_is_least_squares_on_the_support_and_leaving_one_out_costs_what_is_said():
    x, y, p = dense()
    support = torch.tensor([[True, False, True, True, False, False]])
    found = refit(p, support)
    solved = torch.linalg.lstsq(x[:, support[0]], y[:, None]).solution[:, 0]
    torch.testing.assert_close(found[0, support[0]], solved, rtol=1e-4, atol=1e-5)
    for k in (0, 2, 3):
        without = support.clone()
        without[0, k] = False
        cost = float(p.error(refit(p, without)) - p.error(found)) / float(p.power)
        assert bool(explains(p, support, 1)[0, k]) == (cost > 0.005)


def test_effects_that_may_not_be_negative_are_left_out():
    _, _, p = dense()
    found = refit(p, torch.ones(1, 6, dtype=torch.bool), signed=False)
    assert (found >= 0).all() and (found > 0).any()


def test_the_sparsest_graph_within_a_standard_error_of_the_best_is_taken():
    """Of the difference: a price that is worse on every block alike is told from the best however much the blocks vary."""
    best = [0.2, 0.9, 0.5, 0.6]
    near, far = [0.3, 0.8, 0.4, 0.65], [value - 0.01 for value in best]
    assert sparsest({4.0: far, 2.0: near, 1.0: best}) == 2.0
    assert sparsest({4.0: far, 1.0: best}) == 1.0


# -- the screen ----------------------------------------------------------------------------------------------


def test_the_screen_equals_the_full_table(monkeypatch):
    monkeypatch.setattr("steerlib.training.discover.screen.CHUNK", 7)
    parents, children = (fires(500, n, 0.05) for n in (30, 20))
    children = csr(children + parents[:, :20].multiply(np.random.default_rng(0).random((500, 20)) < 0.7))
    p, c = ((z.toarray() > 0).astype(float) for z in (parents, children))
    expected = np.outer(c.sum(0), p.sum(0)) / 500
    lift = (c.T @ p - expected) / np.sqrt(expected + 1)
    wanted = (lift > 2) & (c.T @ p >= 4)
    assert np.array_equal(firing_together(parents, children, least=4, lift=2.0).toarray(), wanted) and wanted.sum() > 20
    few = firing_together(parents, children, least=4, lift=2.0, most=1).toarray()
    best = np.where(wanted, lift, -np.inf).argmax(1)
    assert all(few[i].sum() <= 1 and (few[i, best[i]] or not wanted[i].any()) for i in range(20))


def test_virtual_weights_find_what_never_fires_together():
    g = torch.Generator().manual_seed(0)
    decoder, encoder = torch.randn(40, 8, generator=g), torch.randn(20, 8, generator=g)
    found = pointing((decoder, encoder), most=3).toarray()
    wanted = (encoder @ decoder.T).abs().topk(3).indices
    assert [set(row.nonzero()[0]) for row in found] == [set(own) for own in wanted.tolist()]


def test_latents_that_fire_all_the_time_or_never_are_not_eligible():
    z = np.zeros((100, 3), np.float32)
    z[:, 0], z[:5, 1] = 1, 1
    assert eligible(csr(z), (1e-5, 0.1)).tolist() == [False, True, False]
    assert eligible(csr(z), (1e-5, 1.0)).tolist() == [True, True, False]


def test_latents_that_fire_too_often_are_counted_and_have_no_edges():
    system = Layers((24, 20), 2000, dropout=0.3, rate=0.06, fed=0.8)
    found, often = discover(system), (system.run(np.arange(1500))["level1"].natural > 0).mean(0).A1 > 0.1
    assert found.passive == {"level0": 0, "level1": often.sum()} and 0 < often.sum() < 20
    children = {int(edge.dst.split("/")[1]) for edge in found.graph.edges}
    assert children and not any(often[sorted(children)])


# -- systems -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layers():
    return Layers((48, 40, 32), 200, skips=0.3, dropout=0.4, rate=0.05, spontaneous=0.05, fed=0.8)


def test_a_level_set_to_its_own_readings_changes_nothing(layers):
    plain = layers.run(EVERY)
    again = layers.run(EVERY, {name: held(reading.natural) for name, reading in plain.items()})
    assert all((plain[name].flows != again[name].flows).nnz == 0 for name in layers.levels)


def test_only_descendants_move_and_as_much_as_the_effects_say():
    system = Layers((48, 40, 32), 200, rate=0.05, spontaneous=0.05, fed=0.8)
    plain, moved = system.run(EVERY), system.run(EVERY, {"level0": ablated(np.full(200, 3))})
    first, second = (system.truth[pair] for pair in (("level0", "level1"), ("level1", "level2")))
    z = plain["level0"].flows[:, [3]].toarray()
    change = (plain["level2"].natural - moved["level2"].natural).toarray()
    np.testing.assert_allclose(change, z @ (first[[3]] @ second).toarray(), atol=1e-5)
    assert (change == 0).any(0).all() and np.abs(change).sum() > 0


def test_dos_at_one_level_commute(layers):
    latents, values = np.full(200, 3), np.full(200, 2.0)

    def both(first, second):
        return layers.run(EVERY, {"level0": lambda z: second(first(z))})["level2"].natural

    one, other = fixed(latents, values), ablated(np.full(200, 5))
    assert (both(one, other) != both(other, one)).nnz == 0
    assert (layers.run(EVERY, {"level0": one})["level0"].flows[:, [3]].toarray() == 2).all()


def test_a_context_is_the_same_in_any_company(layers):
    alone, among = layers.run(EVERY[7:9])["level2"].natural, layers.run(EVERY)["level2"].natural[7:9]
    assert (alone != among).nnz == 0


def test_wholes_cannot_be_intervened_on():
    with pytest.raises(Unanswerable):
        Selection(10, 20, 100).run(np.arange(100), {"parts": lambda z: z})


# -- discovery -----------------------------------------------------------------------------------------------


def scores(found, system, src="level0", dst="level1"):
    truth = system.truth[src, dst]
    return edge_scores(matrix(found.graph, src, dst, truth.shape), truth)


@pytest.fixture(scope="module")
def hard():
    """Groups that fire together nine times out of ten, gates shut six times out of ten."""
    return Layers((256, 256), 20_000, dropout=0.6, together=0.9)


@pytest.fixture(scope="module")
def found(hard):
    return discover(hard)


def test_edges_are_found_where_correlation_fails(hard, found):
    z = hard.run(np.arange(len(hard)))
    truth = hard.truth["level0", "level1"]
    correlated = edge_scores(associated(z["level0"].natural, z["level1"].natural, "correlation", truth.nnz), truth)
    assert scores(found, hard).f1 >= max(0.95, correlated.f1 + 0.10)


def test_effects_are_those_that_are_true_and_their_intervals_hold(hard, found):
    measured = calibration(found.graph, "level0", "level1", hard.truth["level0", "level1"])
    assert measured.edges > 200 and abs(measured.slope - 1) <= 0.1 and 0.90 <= measured.coverage <= 0.99
    assert all(edge.evidence == "verified" and edge.n_verify <= CONFIRMED for edge in found.graph.edges if edge.n_verify)


def test_what_hidden_causes_join_is_told_apart_only_by_intervening():
    system = Layers((512, 384), 5334, hidden=300, reach=2)
    assert scores(discover(system), system).f1 >= 0.95
    assert scores(discover(system), system).f1 >= scores(discover(system, method="observational"), system).f1


def test_proposals_of_hidden_causes_need_interventions_to_be_refused():
    system = Layers((512, 384), 5334, hidden=300, reach=2)
    truth = system.truth["level0", "level1"]
    proposals = {m: discover(system, method=m).fits["level0", "level1"].effects for m in ("randomised", "observational")}
    assert edge_scores(proposals["randomised"], truth).f1 >= edge_scores(proposals["observational"], truth).f1 + 0.08


def test_a_dictionary_that_mixes_and_misses_still_gives_the_edges():
    inner = Layers((256, 256), 20_000, dropout=0.3, together=0.7)
    graph = discover(Imperfect(inner, mixing=0.3, miss=0.2)).graph
    assert edge_scores(matrix(graph, "level0", "level1", (256, 256)), inner.truth["level0", "level1"]).f1 >= 0.85


def test_edges_over_a_level_are_direct_effects_and_none_are_made_up():
    with_skips = Layers((128, 128, 128), 20_000, dropout=0.3, skips=0.3, rate=0.02, spontaneous=0.01, fed=0.8)
    without = Layers((128, 128, 128), 20_000, dropout=0.3, rate=0.02, spontaneous=0.01, fed=0.8)
    assert scores(discover(with_skips, skips=True), with_skips, "level0", "level2").f1 >= 0.95
    assert not any(e.src.startswith("level0") and e.dst.startswith("level2") for e in discover(without, skips=True).graph.edges)


def test_inhibition_is_found_with_its_sign():
    system = Layers((128, 128), 20_000, negative=0.3, parents=(2, 3), group=32, together=0.9, rate=0.06)
    tau = matrix(discover(system).graph, "level0", "level1", (128, 128), "tau").toarray()
    truth = system.truth["level0", "level1"].toarray()
    assert (np.sign(tau) == np.sign(truth))[tau != 0].all() and (tau < 0).sum() >= 10 <= (tau > 0).sum()


def test_nothing_is_accepted_of_later_levels_that_are_of_other_contexts(hard, found):
    """Neither from the start, nor of edges that are true elsewhere."""
    null = Shuffled(hard)
    assert len(discover(null).graph) == 0
    contexts = np.arange(15_000, 20_000)
    seen = {name: reading.flows for name, reading in null.run(contexts).items()}
    fit = found.fits["level0", "level1"]
    result = confirmed(Pair(null, contexts, seen, "level0", "level1", fit.effects), Folder(None, {}))
    accepted = (adjusted(result.p) <= 0.05) & result.matters & ((result.low > 0) | (result.high < 0))
    assert len(result.p) > 200 and accepted.sum() == 0


def test_parts_are_found_and_their_neighbours_are_not():
    system = Selection(150, 256, 20_000)
    graph, truth = composition(system).graph, system.truth["parts", "wholes"]
    assert edge_scores(matrix(graph, "parts", "wholes", truth.shape), truth).f1 >= 0.97
    assert all(edge.relation == "selection" and edge.src.startswith("parts/") for edge in graph.edges)
    assert matrix(graph, "parts", "wholes", truth.shape, "necessity").data.min() > 0.9
    assert graph.parents(graph.edges[0].dst) == {}  # nothing is moved along it


def partial_correlation(data, p, c, given):
    """Fisher's z, from the definition."""
    some = np.corrcoef(data[:, [p, c, *given]].T)
    inverse = np.linalg.inv(some)
    r = -inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1])
    return float(2 * norm.sf(np.sqrt(len(data) - len(given) - 3) * abs(np.arctanh(r))))


def test_tests_of_independence_are_another_method_and_can_be_ones_own():
    system = Layers((500, 24), 4000, dropout=0.3, rate=0.03)
    found = discover(system, method="independence", test=partial_correlation)
    assert edge_scores(found.fits["level0", "level1"].effects, system.truth["level0", "level1"]).f1 >= 0.9
    candidates = np.ones((1, 502), bool)
    candidates[0, :2] = False  # what takes no part does not count
    x = np.random.default_rng(0).standard_normal((600, 502))
    y = x[:, [0, 2]].sum(1, keepdims=True)
    found = by_independence(Rows((csr(x),), csr(y), csr(candidates)), lambda data, p, c, given: float(p > 0))
    assert found.effects.nonzero()[0].tolist() == [2] and found.effects[2, 0] == pytest.approx(1, abs=0.1)
    with pytest.raises(BadRecipe, match="at most 500 candidates, got 1 and 501"):
        by_independence(Rows((csr(x),), csr(y), csr(np.arange(502)[None] > 0)), partial_correlation)


def test_what_differs_between_environments_is_no_dependence_to_tests_that_are_told_of_them():
    """All read more in the second one; only the second parent has an effect."""
    random, place = np.random.default_rng(0), np.arange(4000) % 2
    x = random.standard_normal((4000, 2)) + place[:, None]
    rows = Rows((csr(x),), csr(place[:, None] + random.standard_normal((4000, 1)) + x[:, 1:]), csr(np.ones((1, 2), bool)))
    found = {
        by: by_independence(rows, partial_correlation, by and place.tolist()).effects.nonzero()[0] for by in (None, "told")
    }
    assert [some.tolist() for some in found.values()] == [[0, 1], [1]]


def test_causal_learn_gives_the_same_edges():
    pytest.importorskip("causallearn", reason="needs causal-learn: pip install 'steerlib[graph]'")
    system = Layers((24, 24), 4000, dropout=0.3, rate=0.03)
    own = discover(system, method="independence", test=partial_correlation).graph.edges
    assert discover(system, method="independence").graph.edges == own


# -- a transformer whose weights were written down ------------------------------------------------------------


def test_the_compiled_transformer_computes_what_it_says():
    system = Compiled(50)
    found = system.run(np.arange(50))
    answers = found["answers"].natural.toarray().reshape(50, system.length, -1)
    for text, told in zip(system.texts.tolist(), answers, strict=True):
        for place in range(system.length):
            for a, (before, now) in enumerate(zip(system.before, system.now, strict=True)):
                share = text[: place + 1].count(before) / (place + 1)
                assert told[place, a] == pytest.approx(share if text[place] == now else 0.0, abs=1e-6)
    assert answers.any()


def test_edges_by_attention_over_a_level_and_through_a_gate_are_all_found_and_no_mediated_one():
    system = Compiled(6000)
    graph = discover(system, skips=True).graph
    for (src, dst), truth in system.truth.items():
        assert edge_scores(matrix(graph, src, dst, truth.shape), truth).f1 >= 0.97
    by_attention = matrix(graph, "words", "contexts", (192, 16))
    np.testing.assert_allclose(by_attention.data, 1.0, atol=1e-3)


# -- what cannot be told -------------------------------------------------------------------------------------


def test_a_doubled_latent_is_said_to_be_one_and_parents_within_parents_are_pointed_out():
    edges = [("a/0", "b/0"), ("a/0", "b/1"), ("a/1", "b/2"), ("a/1", "b/3"), ("a/2", "b/3"), ("a/3", "b/4")]
    graph = sl.CausalGraph(sl.Edge(src=src, dst=dst, weight=1.0) for src, dst in edges)
    rows = torch.eye(5)
    rows[1] = rows[0] + 0.1 * rows[1]
    found = doubts(graph, {"a": torch.eye(5), "b": rows})
    assert found.same == (("b/0", "b/1"),)
    assert found.within == (("b/0", "b/1"), ("b/1", "b/0"), ("b/2", "b/3"))
    assert doubts(graph, {"a": torch.eye(5), "b": torch.eye(5)}).same == ()  # the same neighbours, another direction


def test_latents_that_are_one_become_one_lever_that_does_what_they_did_together():
    edges = [
        sl.Edge(
            src="a/0", dst="b/2", weight=1.0, evidence="verified", tau=0.75, tau_lo=0.5, tau_hi=1.0, p_adj=0.25, n_verify=40
        ),
        sl.Edge(
            src="a/1", dst="b/2", weight=2.0, evidence="verified", tau=0.5, tau_lo=0.25, tau_hi=0.75, p_adj=0.5, n_verify=20
        ),
        sl.Edge(src="a/3", dst="b/2", weight=0.5),
    ]
    concepts = [sl.Concept(name=f"{level}/{i}", encoder=level, index=i) for level in "ab" for i in range(4)]
    encoders, sites = dict.fromkeys("ab", sl.Directions(torch.eye(4))), dict.fromkeys("ab", SiteFacts(width=4))
    bank = sl.ConceptBank("twice", concepts, encoders, base=sl.BaseModel(), sites=sites, graph=sl.CausalGraph(edges))
    found = merged(bank, [("a/0", "a/1")])
    joined, other = sorted(found.graph.edges, key=lambda edge: edge.src)
    assert (joined.src, joined.weight, joined.tau, joined.tau_lo, joined.tau_hi) == ("a/0", 3.0, 1.25, 0.75, 1.75)
    assert (joined.n_verify, joined.p_adj, joined.evidence) == (20, 0.5, "verified") and other == edges[2]
    assert [place.id for place in found["a/0"].places] == ["a/0", "a/1"] and "a/1" not in found.concepts
    assert found.graph.forecast({"a/0": 2.0})["b/2"] == pytest.approx(2.5)
    stated = bank.with_concepts(concepts, graph=sl.CausalGraph([edges[0], sl.Edge(src="a/1", dst="b/2", weight=1.0)]))
    assert merged(stated, [("a/0", "a/1")]).graph.edges[0].evidence == "asserted"


# -- resuming ------------------------------------------------------------------------------------------------


class Counting(System):
    """Counts what is run, and stops like a killed process."""

    def __init__(self, inner, after=10**9):
        self.inner, self.runs, self.after = inner, 0, after

    @property
    def levels(self):
        return self.inner.levels

    def __len__(self):
        return len(self.inner)

    def run(self, contexts, do=None):
        self.runs += 1
        if self.runs > self.after:
            raise KeyboardInterrupt
        return self.inner.run(contexts, do)


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(System, "batch", 512)
    system = Layers((64, 64), 4000, dropout=0.3, rate=0.03)
    whole = Counting(system)
    wanted = discover(whole).graph.edges
    for after in (5, 9):
        with pytest.raises(KeyboardInterrupt):
            discover(Counting(system, after), folder=tmp_path)
    rest = Counting(system)
    assert discover(rest, folder=tmp_path).graph.edges == wanted and rest.runs <= whole.runs - 10
    last = Counting(system)
    assert discover(last, folder=tmp_path).graph.edges == wanted and last.runs == 0
    with pytest.raises(BadRecipe, match="other settings"):
        discover(system, folder=tmp_path, seed=1)


class Process:
    """One of two, as accelerate has them."""

    num_processes = 2

    def __init__(self, rank, barrier):
        self.process_index, self.is_main_process, self.wait_for_everyone = rank, rank == 0, barrier.wait


def test_processes_share_the_runs_and_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(System, "batch", 512)
    alone = Counting(Layers((64, 64), 4000, dropout=0.3, rate=0.03))
    wanted, barrier = discover(alone).graph.edges, Barrier(2)
    both = [Counting(Layers((64, 64), 4000, dropout=0.3, rate=0.03)) for _ in range(2)]

    def run(rank):
        return discover(both[rank], folder=tmp_path, accelerator=Process(rank, barrier)).graph.edges

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, (0, 1))) == [wanted, wanted]
    assert both[0].runs + both[1].runs == alone.runs and min(both[0].runs, both[1].runs) > alone.runs // 3
    with pytest.raises(BadRecipe, match="folder"):
        discover(alone, accelerator=Process(0, barrier))


class Doubled(System):
    """A system in whose last level another latent reads what the first does, or a share of it."""

    def __init__(self, inner, share):
        self.inner, self.share = inner, share

    @property
    def levels(self):
        return {**self.inner.levels, "level1": self.inner.levels["level1"] + 1}

    def __len__(self):
        return len(self.inner)

    def run(self, contexts, do=None):
        found = self.inner.run(contexts, do)
        z = found["level1"].natural
        whole = csr(hstack([z, self.share * z[:, [self.of]]]))
        return {**found, "level1": Reading(whole, whole)}

    @property
    def of(self):
        """A latent with parents."""
        return int(self.inner.truth["level0", "level1"].indices[0])


def test_a_latent_that_is_there_twice_is_not_chosen_in_silence():
    inner = Layers((64, 64), 8000, rate=0.03)
    double = Doubled(inner, 1.0)
    graph = discover(double).graph
    decoders = {"level0": torch.eye(65), "level1": torch.eye(65)}
    decoders["level1"][64] = decoders["level1"][double.of]
    assert doubts(graph, decoders).same == (tuple(sorted((f"level1/{double.of}", "level1/64"))),)
    echo = discover(Doubled(inner, 0.5))
    assert echo.echoes and {dst for _, dst in echo.echoes} == {"level1/64"}
    assert not any(edge.dst == "level1/64" for edge in echo.graph.edges)


# -- conjunctions ------------------------------------------------------------------------------------------------


def readings_of(columns):
    return csr(np.stack(columns, 1).astype(np.float32))


def test_a_whole_is_told_by_its_parts_and_not_by_what_comes_along_with_them():
    rng = np.random.default_rng(0)
    a, b, other = (rng.random(2000) < rate for rate in (0.3, 0.4, 0.3))
    along = np.where(rng.random(2000) < 0.9, a, other)  # nine times of ten where the first part is
    missed = a & (rng.random(2000) > 0.05)
    whole = np.where(rng.random(2000) < 0.02, ~(a & b), a & b)
    parts = readings_of([missed, b, along, other, *(rng.random((40, 2000)) < 0.3)])
    usable = np.ones(44, bool), np.ones(2, bool)
    found = parts_of_wholes(parts, readings_of([whole, rng.random(2000) < 0.2]), usable)
    assert [*zip(*found.nonzero(), strict=True)] == [(0, 0), (1, 0)]
    x, both = parts > 0, missed & b
    n, k = both.sum(), (both & whole).sum()
    m, rest = (~both).sum(), (~both & whole).sum()
    due = k * np.log(k / n) + (n - k) * np.log(1 - k / n) + rest * np.log(rest / m) + (m - rest) * np.log(1 - rest / m)
    assert likelihood(csr(x).astype(np.float32), whole, [0, 1]) == pytest.approx(due)
    k, n, m = (b & whole).sum(), b.sum(), (~b & whole).sum()
    without = k * np.log(k / n) + (n - k) * np.log(1 - k / n) + m * np.log(m / (~b).sum())
    without += ((~b).sum() - m) * np.log(1 - m / (~b).sum())
    assert found[0, 0] == pytest.approx((due - without) / 2000)
    assert parts_of_wholes(parts, readings_of([whole]), (np.arange(44) > 0, np.ones(1, bool)))[0, 0] == 0  # not usable


def test_a_part_that_others_make_needless_is_dropped():
    """The first to be found is nearer to the whole than either of its parts alone."""
    rng = np.random.default_rng(1)
    a, b = (rng.random(3000) < 0.5 for _ in range(2))
    near = np.where(rng.random(3000) < 0.1, ~(a & b), a & b)
    x = readings_of([near, a, b])
    assert int(extended(x, a & b, []).argmax()) == 0
    assert {*conjunction(x, a & b, np.ones(3, bool))} == {1, 2}


def test_wholes_that_have_nothing_to_do_with_candidates_are_given_a_part_once_in_a_hundred():
    rng = np.random.default_rng(2)
    parts, wholes = (csr((rng.random((400, count)) < 0.2).astype(np.float32)) for count in (200, 300))
    found = parts_of_wholes(parts, wholes, (np.ones(200, bool), np.ones(300, bool)))
    assert found.nnz <= 8
    signs = [extended(parts, wholes[:, [0]].toarray()[:, 0] > 0, [])[:5]]
    assert np.isfinite(signs).sum() < 5  # parts with which a whole is rarer do not count


def test_a_whole_that_has_a_part_is_not_given_more_by_chance():
    """Latents that nearly always read hardly change where all parts do, and some fit a little better than none."""
    rng = np.random.default_rng(3)
    a = rng.random(1000) < 0.5
    x = readings_of([a, *(rng.random((60, 1000)) < 0.95)])
    wholes = [rng.random(1000) < np.where(a, 0.6, 0.4) for _ in range(20)]
    found = [{*conjunction(x, whole, np.ones(61, bool))} for whole in wholes]
    assert all(0 in parts for parts in found) and sum(map(len, found)) <= 22
