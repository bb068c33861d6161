"""Edges by name, effects over several levels, outcomes, environments: beside systems whose effects are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from graphs.compiled import Compiled
from graphs.hierarchies import Layers
from test_steered import CONTEXTS, latents  # noqa: F401
from test_steered import system as steered  # noqa: F401

import steerlib as sl
from steerlib.errors import BadRecipe, Unanswerable, UnknownConcept
from steerlib.training.discover import verify
from steerlib.training.discover.discovery import discover
from steerlib.training.discover.steered import SteeredText
from steerlib.training.discover.systems import Around, Outcomes, Reading, entries
from steerlib.training.discover.verify import verify_edges, with_totals


@pytest.fixture(scope="module")
def layers():
    return Layers((24, 20), 1500, dropout=0.3, rate=0.06, fed=0.8)


def true_edges(system, src="level0", dst="level1"):
    """By ends, what is true of them."""
    truth = system.truth[src, dst].todok()
    return {(f"{src}/{a}", f"{dst}/{b}"): float(w) for (a, b), w in truth.items()}


def inside(edge, true, margin=0.0):
    return edge.tau_lo - margin <= true <= edge.tau_hi + margin


def test_planted_edges_are_refused_and_true_ones_stay_within_their_intervals(layers):
    truth = true_edges(layers)
    random = np.random.default_rng(0)
    drawn = {(f"level0/{a}", f"level1/{b}") for a, b in random.integers((24, 20), size=(60, 2))}
    false = sorted(drawn - truth.keys())
    found = verify_edges(layers, [*truth, *(sl.Edge(src=a, dst=b, weight=9.0) for a, b in false)])
    held, planted = found[: len(truth)], found[len(truth) :]
    assert len(truth) > 15 and len(false) > 40
    assert [own.verdict for own in held] == ["verified"] * len(truth)
    assert sum(own.verdict == "verified" for own in planted) <= 0.05 * len(truth)
    assert all(own.edge.evidence == "asserted" and own.edge.n_verify >= 16 for own in planted if own.verdict == "refused")
    within = [inside(own.edge, truth[own.edge.src, own.edge.dst]) for own in held]
    assert np.mean(within) >= 0.9
    assert all(own.edge.evidence == "verified" and own.edge.weight == own.edge.tau for own in held)


def test_a_cause_that_hardly_fires_is_not_judged_and_what_cannot_be_tested_is_refused():
    system = Layers((24, 20), 300, rate=0.002, spontaneous=0.001, fed=0.8)
    (found,) = verify_edges(system, [sl.Edge(src="level0/0", dst="level1/1", weight=0.5)])
    assert found == (sl.Edge(src="level0/0", dst="level1/1", weight=0.5), "too few contexts")
    with pytest.raises(UnknownConcept, match="level9"):
        verify_edges(system, [("level9/0", "level1/0")])
    with pytest.raises(Unanswerable, match="not after"):
        verify_edges(system, [("level1/0", "level0/0")])
    with pytest.raises(Unanswerable, match="selection"):
        verify_edges(system, [sl.Edge(src="level0/0", dst="level1/0", weight=1.0, relation="selection")])


def test_effects_on_the_same_token_are_told_from_those_on_later_ones():
    """A word moves its context by 1 / (k + 1) at place k and at all later ones; a context moves its answer where it is."""
    system = Compiled(300, words=24, answers=4)
    word, answer = int(system.before[0]), 0
    found = verify_edges(system, [(f"words/{word}", "contexts/0"), ("contexts/0", f"answers/{answer}")])
    places = [text.index(word) for text in system.texts.tolist() if word in text]
    own, later = (sum(f(k) for k in places) for f in (lambda k: 1 / (k + 1), lambda k: sum(1 / (j + 1) for j in range(k, 12))))
    assert len(places) > 64 and found[0].edge.same == pytest.approx(own / later, rel=0.2)
    assert found[1].edge.same == 1.0 and found[0].edge.tau == pytest.approx(later / len(places), rel=0.2)


def test_a_cause_is_ablated_once_more_for_the_tokens_of_all_its_effects(monkeypatch, tmp_path):
    system, shared, asked = Compiled(300, words=24, answers=4), verify._shared, []
    monkeypatch.setattr(verify, "_shared", lambda pair, parent, seed: asked.append(parent) or shared(pair, parent, seed))
    word = int(system.before[0])
    pairs = [(f"words/{word}", "contexts/0"), *((f"words/{word}", f"answers/{k}") for k in range(4))]
    found = verify_edges(system, pairs, folder=tmp_path)
    told = [one for one in found if one.verdict == "verified"]
    assert len(told) > 1 and all(one.edge.same is not None for one in told)
    assert asked == [word] * len({one.edge.dst.partition("/")[0] for one in told}), "once a level"
    assert verify_edges(system, pairs, folder=tmp_path) == found and len(asked) <= 2, "it goes on from what was kept"


# -- over several levels -------------------------------------------------------------------------------------


def test_total_effects_are_measured_over_paths_that_the_graph_does_not_know():
    """A third of the edges come over a level, two in three first ones are left out: products miss them, totals do not."""
    system = Layers((16, 16, 16), 2000, parents=(3, 5), skips=0.35, dropout=0.2, rate=0.06, spontaneous=0.02, fed=0.9)
    first, second, over = (system.truth[f"level{a}", f"level{b}"].toarray() for a, b in ((0, 1), (1, 2), (0, 2)))
    known = [*true_edges(system).items()][::3] + [*true_edges(system, "level1", "level2").items()]
    graph = sl.CausalGraph(sl.Edge(src=a, dst=b, weight=w) for (a, b), w in known)
    made, whole = with_totals(system, graph), first @ second + over
    assert {edge.relation for edge in made.edges} == {"compute", "total"}
    said, product, true, within = [], [], [], []
    for edge in made.edges:
        if edge.relation == "total":
            ablated = made.forecast({edge.src: -2.0})
            low, high = ablated.intervals[edge.dst]
            true.append(-2 * whole[int(edge.src.split("/")[1]), int(edge.dst.split("/")[1])])
            said.append(ablated[edge.dst])
            product.append(graph.forecast({edge.src: -2.0}, unmeasured=True)[edge.dst])
            within.append(low <= true[-1] <= high)
    power = np.square(true).sum()
    fits = [1 - np.square(np.subtract(true, own)).sum() / power for own in (said, product)]
    assert len(true) > 15 and fits[0] >= 0.95 and fits[1] <= fits[0] - 0.1 and np.mean(within) >= 0.9


# -- outcomes and environments -------------------------------------------------------------------------------


def test_an_outcome_is_a_child_like_any_other(layers):
    """A score of either sign that depends on two latents of the last level."""
    a, b = (int(edge[1].split("/")[1]) for edge in [*true_edges(layers)][:2])

    def score(contexts, do):
        z = layers.run(contexts, do)["level1"].flows.toarray()
        return z[:, a] - 2 * z[:, b] - 1.0

    outcomes = Outcomes(layers, {"score": score})
    truth = layers.truth["level0", "level1"].toarray() @ (np.eye(20)[a] - 2 * np.eye(20)[b])
    found = verify_edges(outcomes, [*((f"level0/{p}", "score") for p in range(24)), (f"level1/{b}", "score")])
    causes = {p for p in range(24) if found[p].verdict == "verified"}
    assert causes == set(np.flatnonzero(truth)) and len(causes) > 1
    assert found[24].edge.tau == pytest.approx(-2, abs=1e-6) and found[24].edge.relation == "compute"
    for p in causes:
        edge = found[p].edge
        assert edge.relation == "total" and edge.necessity is None and inside(edge, truth[p], 0.1)
    graph = sl.CausalGraph(own.edge for own in found if own.verdict == "verified")
    assert "score" in graph.descendants(found[min(causes)].edge.src)


class Places(Around):
    """In every other context one latent of the last level reads three times as much."""

    of = 0

    def run(self, contexts, do=None):
        found = self.inner.run(contexts, do)
        z = found["level1"].natural
        unit = np.repeat(contexts % 2 > 0, np.diff(z.indptr))
        z = entries(z, z.data * np.where(unit & (z.indices == self.of), 3, 1))
        return {**found, "level1": Reading(z, z)}


def test_edges_that_hold_in_all_environments_are_marked(layers):
    there, truth = Places(layers), true_edges(layers)
    there.of = int([*truth][0][1].split("/")[1])
    half = ["here", "there"] * (len(layers) // 2)
    found = {own.edge.src + own.edge.dst: own.edge for own in (own for own in verify_edges(there, truth, environments=half))}
    differ = {name for name, edge in found.items() if edge.everywhere is False}
    wanted = {a + b for a, b in truth if b == f"level1/{there.of}"}
    assert wanted <= differ and len(differ - wanted) <= 0.1 * len(truth)
    assert sum(edge.everywhere is True for edge in found.values()) > 10
    alone = verify_edges(there, [[*truth][0]])[0].edge
    assert alone.everywhere is None
    rare = ["here"] * (len(layers) - 5) + ["there"] * 5
    assert verify_edges(there, [[*truth][0]], environments=rare)[0].edge == replace(alone, everywhere=None)


def test_discovery_marks_its_edges_by_environment_and_finds_the_same_ones(tmp_path):
    system = Layers((24, 20), 3000, dropout=0.3, rate=0.03, fed=0.8)
    there, half = Places(system), ["here", "there"] * 1500
    there.of = int([*true_edges(system)][0][1].split("/")[1])
    found = discover(there, held_out=0.6, environments=half, folder=tmp_path).graph
    differ = {edge.dst for edge in found.edges if edge.everywhere is False}
    assert f"level1/{there.of}" in differ and len(differ) <= 2
    assert sum(edge.everywhere is True for edge in found.edges) >= 0.7 * len(found)
    plain = discover(there, held_out=0.6).graph
    assert plain.edges == tuple(replace(edge, everywhere=None) for edge in found.edges) and len(plain) > 10
    with pytest.raises(BadRecipe, match="other settings"):
        discover(there, held_out=0.6, environments=half[::-1], folder=tmp_path)


# -- a language model ----------------------------------------------------------------------------------------


def test_a_latents_effect_on_a_logit_difference_is_what_steer_measures(llama, latents, steered):  # noqa: F811
    """By the names and in the units of the bank, in 40 contexts that are all used."""
    five = replace(latents["layers.1/5"], name="five", unit=0.5)
    named = latents.with_concepts([five if own.id == five.id else own for own in latents.concepts.values()])
    some = SteeredText(llama, named, steered.ids[:40])

    def difference(contexts, do):
        logits = some.logits(contexts, do)
        return logits[:, 3] - logits[:, 7]

    (found,) = verify_edges(Outcomes(some, {"three or seven": difference}), [("five", "three or seven")])
    with torch.no_grad():
        plain = llama(some.ids).logits[:, -1].float()
        with sl.steer(llama, named, {"five": sl.Ablate()}), sl.record(llama, named, ["five"]):
            moved = llama(some.ids).logits[:, -1].float()
        with sl.record(llama, named, ["five"]) as tape:
            llama(some.ids)
    z = tape["five"][0][1][:, 1:].sum(1)
    fires = z > 0
    lost = ((plain - moved)[:, 3] - (plain - moved)[:, 7])[fires].sum()
    assert fires.sum() >= 16 and CONTEXTS > 40
    assert found.edge.tau == pytest.approx(float(lost / z[fires].sum() * 0.5), rel=1e-3)
    assert tape.latents()["five"].shape == some.ids.shape
    torch.testing.assert_close(tape.latents()["five"], tape["five"][0][1] / 0.5)
