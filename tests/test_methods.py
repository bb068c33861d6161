"""Methods: one contract for every entry of METHODS, closed forms for each, and what training a lever leaves alone.

The model has random weights: a method is asked for its formula or its loss, never for a concept.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_text import snapshot
from tiny_models import tiny, toy_tokenizer

import steerlib as sl
from steerlib.steering.recording import record
from steerlib.text import chat
from steerlib.training.directions import objectives
from steerlib.training.directions.lens import word_directions
from steerlib.training.directions.levers import Lever, Task, bank_of
from steerlib.training.directions.methods import (
    METHODS,
    difference_of_means,
    gated,
    is_everywhere,
    norm_matched,
    orthogonal,
    word,
)
from steerlib.training.directions.readouts import discriminant, metric
from steerlib.training.entries import Pair, Shown
from steerlib.training.record.activations import answers, tokens

SITES = ["layers.0", "layers.1"]
LEARNED = sorted(name for name, method in METHODS.items() if hasattr(method, "RATE"))
PAIRS = [
    Pair("the sun", "red tea rises now", "yes stone bird"),
    Pair("why", "red cup . tea sings", "old house here . door"),
    Pair("rain falls there", "tea red tea", "wind"),
    Pair("the new garden", "cup tea red red slowly", "hill road town sleeps"),
]
SHOWN = Shown(*([(pair.prompt, getattr(pair, side)) for pair in PAIRS] for side in Shown._fields))
PROMPTS = ["the sun", "why ?", "the moon falls slowly", "rain", "old green boat", "the river", "bread milk", "snow"]
TEXTS = ["the moon falls slowly now", "yes", "bread salt fish tree leaf song drum book", "rain snow wind hill", "the old stone"]


@pytest.fixture(scope="module")
def model():
    """Weights so large that words make a difference."""
    model = tiny("llama", vocab_size=len(toy_tokenizer()), initializer_range=0.3)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def read(model):
    """Mean activations of both sides of the pairs, and tokens of ordinary text."""
    sides = (answers(model, toy_tokenizer(), [(p.prompt, p[i]) for p in PAIRS], SITES, what="") for i in (1, 2))
    means = [{site: torch.stack([t.mean(0) for t in x]) for site, x in side.items()} for side in sides]
    return *means, tokens(model, toy_tokenizer(), TEXTS, SITES, what="")


def task_of(model, positive, negative, reference, *, site=SITES[-1], keep=None):
    return Task(
        model=model, tokenizer=toy_tokenizer(), instruction="sing red . tea", shown=SHOWN, prompts=PROMPTS, texts=TEXTS,
        site=site, sites=[s for s in SITES if s in positive], positive=positive, negative=negative, reference=reference,
        norms={s: float(x.norm(dim=-1).median()) for s, x in reference.items()}, keep=keep or {}, name="red river",
    )  # fmt: skip


@pytest.fixture
def task(model, read):
    """A task that has learned nothing yet."""
    g = torch.Generator().manual_seed(5)
    keep = torch.randn(2, model.config.hidden_size, generator=g)
    return task_of(model, *read, keep={site: keep / keep.norm(dim=-1, keepdim=True) for site in SITES})


# -- activations ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_activations_are_those_of_the_answers_own_tokens(model):
    """Against one text at a time, without pads."""
    tokenizer = toy_tokenizer()
    found = answers(model, tokenizer, [(p.prompt, p.positive) for p in PAIRS], SITES, what="")
    for i, pair in enumerate(PAIRS):
        start = len(tokenizer(chat(tokenizer, pair.prompt))["input_ids"])
        ids = tokenizer(chat(tokenizer, pair.prompt) + pair.positive)["input_ids"]
        assert len(ids) - start == len(pair.positive.split())
        with record(model, ["layers.0"]) as tape:
            model(torch.tensor([ids]))
        torch.testing.assert_close(found["layers.0"][i], tape["layers.0"][0][1][0, start:], atol=1e-5, rtol=1e-4)
    whole = tokens(model, tokenizer, TEXTS, ["layers.0"], what="")["layers.0"]
    assert len(whole) == sum(len(text.split()) - 1 for text in TEXTS)
    with record(model, ["layers.0"]) as tape:
        model(torch.tensor([tokenizer(TEXTS[0])["input_ids"]]))
    torch.testing.assert_close(whole[:4], tape["layers.0"][0][1][0, 1:], atol=1e-5, rtol=1e-4)


# -- classes of unequal sizes --------------------------------------------------------------------------------


def repeated(read, times):
    """The same with the negative class several times over."""
    positive, negative, reference = read
    return positive, {site: torch.cat([x] * times) for site, x in negative.items()}, reference


@pytest.mark.parametrize("name", ["difference-of-means", "norm-matched", "orthogonal", "pca"])
def test_each_class_counts_as_a_whole(name, task, model, read):
    """Whatever its size: several times the same texts give the same direction."""
    two, three = (METHODS[name].fit(task_of(model, *repeated(read, k), keep=task.keep)).moves[SITES[-1]] for k in (2, 3))
    torch.testing.assert_close(two, three, atol=1e-5, rtol=1e-4)


def test_the_component_of_unequal_classes_is_that_of_all_differences(model, read):
    positive, negative, reference = read
    fewer = {site: x[:3] for site, x in negative.items()}
    found = METHODS["pca"].fit(task_of(model, positive, fewer, reference)).moves[SITES[-1]]
    p, n = positive[SITES[-1]], fewer[SITES[-1]]
    first = torch.linalg.svd((p[:, None] - n).flatten(0, 1)).Vh[0]
    assert float(torch.cosine_similarity(found, first, dim=0).abs()) == pytest.approx(1, abs=1e-5)
    assert float(found @ (p.mean(0) - n.mean(0))) > 0


def test_learned_methods_and_halves_take_classes_of_unequal_sizes(model, read):
    positive, negative, reference = read
    task = task_of(model, positive, {site: x[:3] for site, x in negative.items()}, reference)
    task = replace(task, shown=Shown(SHOWN.positive, SHOWN.negative[:3]))
    assert all(v.isfinite().all() for v in METHODS["rank-one"].fit(task).moves.values())
    half = task.half(1)
    assert [*map(len, half.shown)] == [2, 1] == [len(side[SITES[0]]) for side in (half.positive, half.negative)]


# -- the contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_same_finite_lever_each_time_and_leaves_the_model_alone(name, task, model, read):
    before, weights = snapshot(model), {n: p.clone() for n, p in model.state_dict().items()}
    lever = METHODS[name].fit(task)
    first, second = (x.to_tensors() for x in (lever, METHODS[name].fit(task_of(model, *read, keep=task.keep))))
    assert snapshot(model) == before and all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    assert set(lever.moves) <= set(SITES) and all(v.shape == (32,) and v.isfinite().all() for v in lever.moves.values())
    assert not any(t.requires_grad for t in first.values())
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_a_lever_at_its_site_or_the_same_one_everywhere(name, task):
    here, there = (METHODS[name].fit(task.elsewhere(site)).moves for site in SITES)
    if is_everywhere(name):
        assert list(here) == list(there) == SITES and all(torch.equal(here[site], there[site]) for site in SITES)
    else:
        assert (list(here), list(there)) == (SITES[:1], SITES[1:])


@pytest.mark.parametrize("name", METHODS)
def test_a_lever_is_stored_and_read_back_bit_for_bit(name, task):
    lever = METHODS[name].fit(task)
    back = Lever.from_tensors(lever.to_tensors())
    assert list(back.moves) == list(lever.moves) and back.norm == lever.norm
    assert all(torch.equal(back.moves[site], vector) for site, vector in lever.moves.items())
    assert (back.gate is None) == (lever.gate is None)
    if back.gate is not None and lever.gate is not None:
        assert back.gate.site == lever.gate.site
        assert torch.equal(back.gate.read, lever.gate.read) and torch.equal(back.gate.bias, lever.gate.bias)


def test_word_and_means_halves_the_angle_between_its_two_directions(task):
    """And the control of both is the direction of one random word, drawn by the task's seed."""
    names = ("word-and-means", "word", "difference-of-means")
    both, own, means = (METHODS[name].fit(task).moves[SITES[-1]] for name in names)
    torch.testing.assert_close(torch.cosine_similarity(both, own, dim=0), torch.cosine_similarity(both, means, dim=0))
    aims = word_directions(task.model, task.tokenizer, ["red river", word.random_word(task.tokenizer, 0)], TEXTS, sites=SITES)
    for found, lever in zip(aims.values(), (own, word.control(task).moves[SITES[-1]]), strict=True):
        torch.testing.assert_close(lever / lever.norm(), found[SITES[-1]] / found[SITES[-1]].norm(), atol=1e-5, rtol=1e-4)
    assert len({word.random_word(task.tokenizer, seed) for seed in range(8)}) > 4


def test_everywhere_is_what_word_and_means_finds_at_every_site(task):
    """And its control that of the random word there."""
    everywhere, here = METHODS["word-and-means-everywhere"], METHODS["word-and-means"]
    for name in ("fit", "control"):
        found = getattr(everywhere, name)(task.elsewhere(SITES[0])).moves
        assert list(found) == SITES
        for site in SITES:
            assert torch.equal(found[site], getattr(here, name)(task.elsewhere(site)).moves[site])


def test_halves_of_a_task_share_no_pair_and_are_the_whole_together(task):
    halves = task.half(0), task.half(1)
    for side, whole in SHOWN._asdict().items():
        assert [*getattr(halves[0].shown, side), *getattr(halves[1].shown, side)] == [whole[k] for k in (0, 2, 1, 3)]
    for site in SITES:
        assert torch.equal(torch.stack([half.positive[site] for half in halves], 1).flatten(0, 1), task.positive[site])
        assert torch.equal(torch.stack([half.negative[site] for half in halves], 1).flatten(0, 1), task.negative[site])


def test_levers_of_many_sites_keep_their_order():
    lever = Lever(moves={f"layers.{i}": torch.full((2,), float(i)) for i in range(12)})
    assert list(Lever.from_tensors(lever.to_tensors()).moves) == list(lever.moves)


@torch.no_grad()
def moved_by(lever, strength, model, ids):
    """Activations at a lever's first site, before and after."""
    with record(model, [lever.site]) as plain:
        model(ids)
    with sl.steer(model, bank_of(lever), {"lever": strength}, allow_ood=True), record(model, [lever.site]) as tape:
        model(ids)
    return plain[lever.site][0][1], tape[lever.site][0][1]


@pytest.mark.parametrize("name", METHODS)
def test_a_levers_bank_moves_each_token_by_its_formula(name, task, model):
    """`x' - x = s v clamp(x @ r + b, 0, 1) |x| / norm`, the factors where the lever has them, at the first site it moves."""
    lever, strength, ids = METHODS[name].fit(task), 0.5, torch.arange(3, 23).view(2, 10)
    x, moved = moved_by(lever, strength, model, ids)
    factor = strength * torch.ones(2, 10)
    if lever.gate is not None:
        assert lever.gate.site == lever.site
        factor *= (x @ lever.gate.read + lever.gate.bias).clamp(0, 1)
    if lever.norm is not None:
        factor *= x.norm(dim=-1) / lever.norm
    torch.testing.assert_close(moved - x, factor[..., None] * lever.moves[lever.site], atol=1e-4, rtol=1e-4)
    assert (moved - x).norm() > 0.1


def own_loss(name, task):
    """A learned method's own loss over all rows, at the lever it gives."""
    lever = METHODS[name].fit(task)
    lesson = objectives.shown(task) if name == "rank-one" else objectives.told(task)
    with torch.no_grad(), sl.steer(task.model, bank_of(lever), {"lever": 1.0}, allow_ood=True):
        total = objectives.loss(task.model, lesson, torch.arange(len(lesson.said.ids)))
        if name == "gated":
            kept = objectives.untouched(task)
            total += objectives.loss(task.model, kept, torch.arange(len(kept.said.ids)))
    return float(total)


@pytest.mark.parametrize("name", LEARNED)
def test_learning_lowers_the_loss_it_is_for(name, task, monkeypatch):
    learned = own_loss(name, task)
    for rate in ("RATE", "GATE_RATE"):
        monkeypatch.setattr(METHODS[name], rate, 0.0, raising=rate == "RATE")
    assert learned < 0.95 * own_loss(name, task)


# -- what is learned from ------------------------------------------------------------------------------------


def mean_loss(model, ids, start):
    """Cross-entropy per token of what stands behind `start`, summed, and the number of tokens."""
    labels = torch.tensor([[-100] * start + ids[start:]])
    with torch.no_grad():
        return float(model(torch.tensor([ids]), labels=labels).loss) * (len(ids) - start), len(ids) - start


def test_the_loss_of_shown_answers_is_the_models_own(task, model):
    lesson, tokenizer = objectives.shown(task), toy_tokenizer()
    parts = []
    for pair in PAIRS:
        asked = tokenizer(chat(tokenizer, pair.prompt))["input_ids"]
        parts.append(mean_loss(model, asked + tokenizer(pair.positive)["input_ids"], len(asked)))
    total, count = map(sum, zip(*parts, strict=True))
    assert float(objectives.loss(model, lesson, torch.arange(len(PAIRS)))) == pytest.approx(total / count, rel=1e-4)


@torch.no_grad()
def test_the_loss_of_told_answers_is_the_divergence_of_asking_plainly(task, model):
    """KL(asked for it || asked plainly) on what asking for it gives, one request at a time, without pads."""
    lesson, tokenizer = objectives.told(task), toy_tokenizer()
    kl = []
    for i, prompt in enumerate(PROMPTS):
        ids, real = lesson.said.new
        new = ids[i][real[i]].tolist()
        scores = []
        for words in (task.instruction, ""):
            asked = tokenizer(chat(tokenizer, prompt, words))["input_ids"]
            scores.append(model(torch.tensor([asked + new])).logits[0, len(asked) - 1 : -1].log_softmax(-1))
        assert scores[0][0].argmax() == new[0]
        kl += (scores[0].exp() * (scores[0] - scores[1])).sum(-1).tolist()
    found = float(objectives.loss(model, lesson, torch.arange(len(PROMPTS))))
    assert found == pytest.approx(np.mean(kl), abs=2e-3) and found > 0.1  # targets are kept in half precision


@torch.no_grad()
def test_ordinary_text_is_untouched_without_a_lever_and_touched_with_one(task, model):
    lesson = objectives.untouched(task)
    rows = torch.arange(len(TEXTS))
    assert float(objectives.loss(model, lesson, rows)) == pytest.approx(0, abs=1e-3)
    lever = METHODS["difference-of-means"].fit(task)
    with sl.steer(model, bank_of(lever), {"lever": 1.0}, allow_ood=True):
        assert float(objectives.loss(model, lesson, rows)) > 0.1


# -- closed forms --------------------------------------------------------------------------------------------


def clouds(n=400, d=8, seed=0):
    """Pairs whose difference is 2 along the first axis, with much shared and a little own noise."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, d, generator=g) * 3
    shift = torch.zeros(d)
    shift[0] = 2.0
    return shared + shift + 0.1 * torch.randn(n, d, generator=g), shared


def direction(name, positive, negative):
    """What a method finds at a site whose activations are one long."""
    reference = torch.nn.functional.normalize(negative, dim=-1)
    task = task_of(None, {"layers.1": positive}, {"layers.1": negative}, {"layers.1": reference})
    found = METHODS[name].fit(task).moves["layers.1"]
    assert found.norm() == pytest.approx(1.0)
    return found


def test_difference_of_means_is_the_difference_of_means():
    positive, negative = clouds()
    difference = positive.mean(0) - negative.mean(0)
    torch.testing.assert_close(direction("difference-of-means", positive, negative), difference / difference.norm())


@pytest.mark.parametrize("name", ["difference-of-means", "pca"])
def test_paired_methods_find_the_axis_and_its_sign_under_shared_noise(name):
    assert direction(name, *clouds())[0] > 0.99 and direction(name, *clouds()[::-1])[0] < -0.99


def test_pca_is_the_first_eigenvector_of_the_differences():
    positive, negative = clouds(n=6)
    difference = (positive - negative).double()
    first = torch.linalg.eigh(difference.T @ difference).eigenvectors[:, -1]
    found = direction("pca", positive, negative).double()
    assert abs(float(found @ first)) == pytest.approx(1, abs=1e-6) and float(found @ difference.mean(0)) > 0


def test_the_probe_points_along_the_difference_of_separable_classes():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 300, 8, generator=g) * torch.linspace(0.5, 2, 8)
    shift = torch.zeros(8)
    shift[2] = 4.0
    found = direction("probe", noise[0] + shift, noise[1])
    assert found.abs().argmax() == 2 and found[2] > 0.9


def test_the_metric_is_the_inverse_of_the_shrunk_covariance():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 3
    covariance = np.cov(x.numpy().T, bias=True)
    expected = np.linalg.inv(0.9 * covariance + 0.1 * np.trace(covariance) / 6 * np.eye(6))
    np.testing.assert_allclose(metric(x), expected, rtol=1e-3, atol=1e-6)


def test_without_makes_kept_directions_uncorrelated_and_changes_nothing_else():
    g = torch.Generator().manual_seed(0)
    inverse = metric(torch.randn(200, 6, generator=g) * torch.arange(1, 7))
    d, keep = torch.randn(6, generator=g), torch.randn(2, 6, generator=g)
    found = orthogonal.without(d, keep, inverse)
    torch.testing.assert_close(keep @ inverse @ found, torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(orthogonal.without(found, keep, inverse), found, atol=1e-5, rtol=1e-5)
    taken = torch.linalg.lstsq(keep.T, (d - found)[:, None])
    torch.testing.assert_close(keep.T @ taken.solution[:, 0], d - found, atol=1e-5, rtol=1e-5)  # in their span
    assert torch.equal(orthogonal.without(d, keep[:0], inverse), d)


def test_orthogonal_keeps_the_other_concepts_of_its_task_and_is_difference_of_means_without_any(task, model, read):
    reading = task.keep[task.site] @ metric(task.reference[task.site])
    freed, plain = (METHODS[name].fit(task).moves[task.site] for name in ("orthogonal", "difference-of-means"))
    torch.testing.assert_close(reading @ freed / (reading.norm() * freed.norm()), torch.zeros(2), atol=1e-5, rtol=0)
    assert (reading @ plain).abs().max() > 1e-3 * reading.norm() * plain.norm()
    alone = METHODS["orthogonal"].fit(task_of(model, *read)).moves[task.site]
    torch.testing.assert_close(alone, plain)


def test_the_discriminant_reads_1_and_0_at_the_means_and_tells_them_apart_best():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=g) * torch.arange(1, 7)
    present, absent = torch.randn(2, 6, generator=g) * 4
    found = discriminant("layers.0", present, absent, x)
    readings = torch.stack((present, absent)) @ found.read + found.bias
    torch.testing.assert_close(readings, torch.tensor([1.0, 0.0]), atol=1e-5, rtol=0)
    # Fisher's criterion, over any direction: squared distance of the means by variance
    covariance = torch.linalg.inv(metric(x))
    tried = torch.cat((found.read[None], torch.randn(1000, 6, generator=g), present[None] - absent))
    criterion = (tried @ (present - absent)) ** 2 / (tried @ covariance * tried).sum(-1)
    assert criterion.argmax() == 0


def test_a_gate_opens_between_a_quarter_and_three_quarters_of_the_way_to_answers(task):
    gate = gated.first_gate(task)
    assert gate.site == SITES[0]
    answer = (task.positive[gate.site].mean(0) + task.negative[gate.site].mean(0)) / 2
    ordinary = task.reference[gate.site].mean(0)
    shares = torch.tensor([0, 0.25, 0.5, 0.75, 1])[:, None]
    readings = (ordinary + shares * (answer - ordinary)) @ gate.read + gate.bias
    torch.testing.assert_close(readings, torch.tensor([-0.5, 0, 0.5, 1, 1.5]), atol=1e-4, rtol=0)


def test_a_norm_matched_change_is_the_same_share_of_each_tokens_length(task, model):
    x, moved = moved_by(norm_matched.fit(task), 0.2, model, torch.arange(3, 23).view(2, 10))
    shares = (moved - x).norm(dim=-1) / x.norm(dim=-1)
    torch.testing.assert_close(shares, torch.full((2, 10), 0.2), atol=1e-4, rtol=1e-4)
    assert x.norm(dim=-1).std() > 0.1 * x.norm(dim=-1).mean()
    along = (moved - x) @ difference_of_means.direction(task, task.site)
    torch.testing.assert_close(along, (moved - x).norm(dim=-1), atol=1e-4, rtol=1e-4)
