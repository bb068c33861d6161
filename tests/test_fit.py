"""Training sparse encoders: gradients, ground truth, exact resume, many processes."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs.synthetic import superposed
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from steerlib.encoders import Matryoshka, ReLU, Transcoder
from steerlib.encoders.jumprelu import BANDWIDTH
from steerlib.errors import BadRecipe
from steerlib.evaluation.representation import (
    dead_share,
    dense_share,
    dictionary_match,
    explained_variance,
    l0,
    random_dictionary,
    stability,
)
from steerlib.training.fit.dense_step import dense_step
from steerlib.training.fit.encoder_recipe import EncoderRecipe, objectives
from steerlib.training.fit.inputs import Tokens, geometric_median, normalising
from steerlib.training.fit.learner import Learner
from steerlib.training.fit.run import CHECKPOINT, ahead, fit
from steerlib.training.fit.sparse_step import largest, sparse_step, top

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_training.py"
COMPETING = ("topk", "batchtopk", "matryoshka")
TRANSCODING = ("topk", "batchtopk", "relu", "jumprelu")
ALL = (*COMPETING, "relu", "jumprelu", "gated")
N, D, LATENTS = 96, 24, 256


def test_every_kind_that_can_be_trained_is_tested():
    found = objectives()
    assert set(found) == set(ALL)
    assert {kind for kind in found if found[kind].keeps} == set(COMPETING)
    assert {kind for kind in found if found[kind].transcodes} == set(TRANSCODING)


def recipe(kind="topk", **others):
    sparsity = 0.0 if kind in COMPETING else 0.1
    return EncoderRecipe(**{"kind": kind, "latents": LATENTS, "k": 6, "k_aux": 4, "batch": N, "sparsity": sparsity, **others})


def weights(width=D, written=D, *, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "encoder": 1.2 * normalize(torch.randn(LATENTS, width, generator=g), dim=-1),
        "bias": 0.1 * torch.randn(LATENTS, generator=g),
        "decoder": normalize(torch.randn(LATENTS, written, generator=g), dim=-1),
        "decoder_bias": 0.3 * torch.randn(written, generator=g),
    }


def tokens(width=D, *, seed=1):
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed))


def without_radial(gradient, decoder):
    return gradient - (gradient * decoder).sum(-1, keepdim=True) * decoder


# -- the sparse step -----------------------------------------------------------------------------------------


def plain(recipe, weights, x, y, unit, dead):
    """The same loss by whole matrices and autograd."""
    w = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    p = (x - w["decoder_bias"] if y is None else x) @ w["encoder"].T + w["bias"]
    y = y - x @ w["skip"].T if recipe.skip else y
    if recipe.kind == "topk":
        kept = torch.zeros_like(p).scatter(1, p.topk(recipe.k).indices, 1.0)
    else:
        kept = torch.zeros(p.numel()).scatter(0, p.flatten().topk(recipe.k * len(p)).indices, 1.0).view_as(p)
    z, target = p.relu() * kept, x if y is None else y
    loss, rest = torch.zeros(()), target
    for end in torch.tensor(recipe.sizes).cumsum(0).tolist():
        rest = target - z[:, :end] @ w["decoder"][:end] - w["decoder_bias"]
        loss = loss + rest.square().sum() / (unit * len(recipe.sizes))
    if dead is not None:
        values, indices = p[:, dead].topk(recipe.k_aux)
        spare = torch.zeros(len(p), len(dead)).scatter(1, indices, values.relu())
        loss = loss + recipe.auxk * (rest.detach() - spare @ w["decoder"][dead]).square().sum() / unit
    loss.backward()
    found = {name: tensor.grad for name, tensor in w.items()}
    found["decoder"] = without_radial(found["decoder"], weights["decoder"])
    return found, loss.detach(), (z > 0).sum(0).float()


@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("transcodes", [False, True, "skip"])
@pytest.mark.parametrize("kind", COMPETING)
def test_the_sparse_step_has_the_gradient_of_the_plain_formula(kind, transcodes, with_dead):
    written = 17 if transcodes else D
    r, w, x = recipe(kind, skip=transcodes == "skip"), weights(written=written), tokens()
    if r.skip:
        w["skip"] = 0.1 * torch.randn(17, D, generator=torch.Generator().manual_seed(4))
    y = tokens(written, seed=2) if transcodes else None
    dead = torch.tensor([3, 7, 90, 91, 92, 200]) if with_dead else None
    expected, loss, fired = plain(r, w, x, y, 1000.0, dead)
    found = sparse_step(r, w, x, y, unit=1000.0, dead=dead)
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.fired, fired)
    for name in w:
        torch.testing.assert_close(found.gradients[name], expected[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(("n", "k"), [(512, 2), (4608, 32), (4600, 32), (100, 7), (64, 64)])
def test_the_search_in_two_steps_finds_the_largest(n, k):
    p = tokens(n).bfloat16() if n == 4608 else tokens(n)  # in bfloat16 many values are equal
    values, indices = top(p, k)
    assert torch.equal(values.sort(-1, descending=True).values, p.topk(k).values)
    assert torch.equal(p.gather(1, indices), values) and all(len(row.unique()) == k for row in indices)


@pytest.mark.parametrize("count", [5, 700, N * 40])
def test_the_largest_of_a_batch_are_found_without_sorting_it(count):
    p = tokens(64) * torch.linspace(0.1, 3, N)[:, None]  # tokens differ in how much fires on them
    found = largest(p, count)
    expected = torch.zeros(p.numel()).scatter(0, p.flatten().topk(count).indices, 1.0).view_as(p)
    assert torch.equal(found.offsets.diff(), expected.sum(-1).long())
    assert torch.equal(found.values.sort().values, p.flatten().topk(count).values.sort().values)


def test_the_product_in_bfloat16_changes_little():
    w, x = weights(), tokens()
    exact, low = (sparse_step(recipe(precision=precision), w, x, None, unit=1000.0) for precision in ("fp32", "bf16"))
    assert (low.fired - exact.fired).abs().sum() < 0.05 * exact.fired.sum()
    torch.testing.assert_close(low.error, exact.error, rtol=0.01, atol=0)
    firing = exact.fired == low.fired  # where the same fires, readings and gradients are those of float32
    both = (exact.gradients["bias"][firing], low.gradients["bias"][firing])
    assert torch.nn.functional.cosine_similarity(*both, dim=0) > 0.98


class NothingReadBack(TorchDispatchMode):
    """Refuses what a processor would have to wait for its accelerator for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu", "gated"])
def test_a_step_reads_nothing_back(kind):
    learner = Learner(recipe(kind), tokens(), None, 10)
    learner.dead = torch.tensor([1, 2, 3, 4, 5])
    with NothingReadBack():
        for step in range(3):
            learner.learn(learner.outcome(tokens(), None, step), step)
    with NothingReadBack(), pytest.raises(AssertionError, match="nonzero"):
        tokens().nonzero()


# -- the dense step ------------------------------------------------------------------------------------------


def test_relu_pays_for_readings_times_the_length_of_what_they_write():
    w, x, unit = weights(), tokens(), 24.0 * N
    w["decoder"] = w["decoder"] * torch.linspace(0.5, 2, LATENTS)[:, None]
    z = ((x - w["decoder_bias"]) @ w["encoder"].T + w["bias"]).relu()
    error = (x - z @ w["decoder"] - w["decoder_bias"]).square().sum() / unit
    price = 0.1 * (z * w["decoder"].norm(dim=-1)).sum(-1).mean() / 24.0**0.5
    found = dense_step(recipe("relu"), w, x, None, unit=unit, tokens=N, price=0.1, scale=1.0)
    torch.testing.assert_close(found.loss, error + price)
    torch.testing.assert_close(found.error, error)


def test_thresholds_of_jumprelu_have_the_straight_through_gradient():
    w, x, price = weights(), tokens(), 0.1
    w["log_threshold"] = torch.full((LATENTS,), 0.4).log()
    found = dense_step(recipe("jumprelu"), w, x, None, unit=1.0, tokens=N, price=price, scale=1.0)
    p = ((x - w["decoder_bias"]) @ w["encoder"].T + w["bias"]).relu()
    z = p * (p > 0.4)
    by_z = 2 * (z @ w["decoder"] + w["decoder_bias"] - x) @ w["decoder"].T
    window = ((p - 0.4).abs() < BANDWIDTH / 2) / BANDWIDTH
    by_threshold = -(window * (0.4 * by_z + price / N)).sum(0)
    torch.testing.assert_close(found.gradients["log_threshold"], 0.4 * by_threshold, rtol=1e-4, atol=1e-3)
    assert (window.sum(0) > 0).any()


def test_the_gate_learns_from_its_own_reconstruction_and_not_from_what_it_gates():
    w, x = weights(), tokens()
    w |= {"gate_bias": torch.full((LATENTS,), -0.3), "log_scale": torch.full((LATENTS,), 0.2)}
    found = dense_step(recipe("gated"), w, x, None, unit=1000.0, tokens=N, price=0.1, scale=1.0)
    gate_bias = w["gate_bias"].clone().requires_grad_()
    gate = ((x - w["decoder_bias"]) @ w["encoder"].T + gate_bias).relu()
    alone = (x - gate @ w["decoder"] - w["decoder_bias"]).square().sum() / 1000
    (alone + 0.1 * gate.sum() / N / (1000 / N) ** 0.5).backward()
    torch.testing.assert_close(found.gradients["gate_bias"], gate_bias.grad)


# -- inputs --------------------------------------------------------------------------------------------------


def test_batches_can_be_read_again_from_any_one_on():
    source = Tokens(torch.arange(70.0)[:, None], seed=4)
    whole: Any = list(islice(source.batches(0, 20), 8))
    again: Any = list(islice(source.batches(5, 20), 3))
    assert all(torch.equal(a, b) for a, b in zip(again, whole[5:], strict=True))
    assert len(torch.cat(whole[:3]).unique()) == 60 and not torch.equal(whole[0], whole[3])


def test_the_geometric_median_is_where_distances_add_up_to_least():
    x = tokens() + 5 * (torch.arange(N) < 10)[:, None]
    middle = geometric_median(x).requires_grad_()
    (gradient,) = torch.autograd.grad((x - middle).norm(dim=-1).sum(), middle)
    assert gradient.norm() < 1e-2
    torch.testing.assert_close(geometric_median(torch.tensor([[0.0], [0.1], [9.0]])), torch.tensor([0.1]), atol=1e-2, rtol=0)


@pytest.mark.parametrize("kind", ["scale", "std", "whiten"])
def test_normalised_activations_are_what_they_should_be(kind):
    x = tokens() @ (torch.eye(D) + 0.1 * torch.randn(D, D, generator=torch.Generator().manual_seed(3))) + 4
    affine = normalising(kind, x)
    assert affine is not None
    there = affine(x)
    if kind == "scale":
        torch.testing.assert_close(there.norm(dim=-1).mean(), torch.tensor(D**0.5))
    elif kind == "std":
        torch.testing.assert_close(there.std(0), torch.ones(D))
    else:
        torch.testing.assert_close(there.T.cov(), torch.eye(D), atol=0.02, rtol=0)


@pytest.mark.parametrize("normalise", ["none", "scale", "std", "whiten"])
@pytest.mark.parametrize(
    ("kind", "transcodes"),
    [(kind, False) for kind in ALL] + [(kind, how) for kind in TRANSCODING for how in (True, "skip")],
)
def test_a_finished_encoder_reads_raw_activations_and_reconstructs_what_was_trained(kind, normalise, transcodes):
    x = tokens() @ torch.randn(D, D, generator=torch.Generator().manual_seed(3)) + 4
    y = x[:, :17] ** 2 if transcodes else None
    learner = Learner(recipe(kind, normalise=normalise, rate=1e-2, skip=transcodes == "skip"), x, y, 4)
    for step in range(4):
        learner.learn(learner.outcome(x, y, step), step)
    inner = learner.encoder()
    learner.reads, learner.writes = None, None
    still = learner.encoder()
    if learner.transcodes:  # its first bias holds a centre that is not the decoder's
        assert isinstance(inner, Transcoder) and inner.decoder.shape == (LATENTS, 17)
    near, far = (normalising(normalise, t) for t in (x, x if y is None else y))
    there = x if near is None else near(x)
    kept = still.reconstruct(there)
    kept = kept if far is None else kept @ (far.back.diag() if far.back.ndim == 1 else far.back) + far.mean
    torch.testing.assert_close(inner.reconstruct(x), kept, rtol=1e-3, atol=2e-3 * float(kept.abs().max()))
    lengths = inner.decoder.norm(dim=-1)
    exactly = kind not in COMPETING or normalise in ("none", "scale")
    torch.testing.assert_close(lengths if exactly else lengths.mean(), torch.ones_like(lengths if exactly else lengths.mean()))


# -- a whole training ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def truth():
    torch.set_num_threads(1)
    return superposed(20_000, seed=3)


@pytest.fixture(scope="module")
def few(truth):
    return Tokens(truth.x[:2_000])


def test_the_generator_keeps_its_promises():
    s = superposed(20_000, features=60, width=32, roots=12, rates=(0.2, 0.05), seed=2)
    torch.testing.assert_close(s.x, s.z @ s.dictionary)
    torch.testing.assert_close(s.dictionary.norm(dim=-1), torch.ones(60))
    often = (0.2 * torch.arange(1, 13) ** -0.5).clamp(min=0.05)
    torch.testing.assert_close(s.rates[:12], often, atol=0.02, rtol=0)
    fires = s.z > 0
    for feature in range(12, 60):
        assert not (fires[:, feature] & ~fires[:, s.parent[feature]]).any()
    children = fires[:, s.parent == 0]
    assert children.sum(-1).max() == 1 and children.any(0).all()
    assert torch.equal(superposed(50, seed=2).x, superposed(50, seed=2).x)


def test_training_finds_superposed_features(truth):
    r = EncoderRecipe(kind="topk", latents=256, k=4, batch=512, rate=3e-3, dead_after=20_000, seed=1)
    encoder = fit({"a": r}, Tokens(truth.x), steps=700)["a"]
    found = dictionary_match(truth.dictionary, encoder.decoder)
    control = dictionary_match(truth.dictionary, random_dictionary(256, 64))
    assert found.mcc >= 0.85 and control.mcc < 0.5
    x = truth.x[:4000]
    code = encoder.encode(x)
    assert explained_variance(x, encoder.reconstruct(x)) > 0.85 and l0(code) <= 4 and dead_share(code) < 0.05
    assert dense_share(code) < 0.02


def test_two_seeds_find_much_the_same_where_there_is_something_to_find():
    """And a copy with its latents dealt anew, some of their signs turned and dead ones beside, is found whole."""
    s = superposed(20_000, features=64, width=32, seed=5)
    r = EncoderRecipe(kind="topk", latents=64, k=4, batch=512, rate=3e-3, dead_after=20_000)
    both = fit({"a": r, "b": replace(r, seed=1)}, Tokens(s.x), steps=400)
    found = stability(both["a"], both["b"], s.x[:4000])
    assert found.mcc > 0.75 > found.control + 0.25
    w: Any = both["a"].to_tensors()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    dealt: Any = {name: t[order] if name != "decoder_bias" else t for name, t in w.items()}
    dealt["decoder"] = dealt["decoder"] * torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)[:, None]
    copy = ReLU(**dealt, centred=True)
    plain = ReLU(**w, centred=True)
    torch.testing.assert_close(stability(plain, copy, s.x[:4000]).mcc, 1.0, rtol=0, atol=1e-6)
    dead = {"encoder": torch.zeros(9, 32), "bias": -torch.ones(9), "decoder": torch.randn(9, 32)}
    larger: Any = {**w, **{name: torch.cat((w[name], dead[name])) for name in dead}}
    more = ReLU(**larger, centred=True)
    torch.testing.assert_close(stability(more, copy, s.x[:4000]).mcc, 1.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_the_linear_part_of_a_transcoder_learns_what_is_linear(kind):
    """y = A x + c: one latent a token could not write it."""
    g = torch.Generator().manual_seed(0)
    x, a, c = torch.randn(4000, 16, generator=g), torch.randn(12, 16, generator=g) / 4, torch.randn(12, generator=g)
    source = Tokens(x, target=x @ a.T + c)
    r = recipe(kind, latents=32, k=1, batch=500, rate=2e-2, skip=True, normalise="std", sparsity=0.5 if kind == "relu" else 0.0)
    both = fit({"skip": r, "plain": replace(r, skip=False)}, source, steps=300)
    linear, plain = both["skip"], both["plain"]
    assert isinstance(linear, Transcoder) and linear.skip is not None
    torch.testing.assert_close(linear.skip, a, atol=0.1, rtol=0)
    assert explained_variance(x @ a.T + c, linear.reconstruct(x)) > 0.97
    assert explained_variance(x @ a.T + c, plain.reconstruct(x)) < 0.7


def test_dead_latents_are_revived(truth):
    r = EncoderRecipe(kind="topk", latents=256, k=4, batch=512, rate=3e-3, dead_after=5_000, seed=1)
    shares = {}
    for auxk in (0.0, 1 / 32):
        learner = Learner(replace(r, auxk=auxk), truth.x[:8192], None, 250)
        with torch.no_grad():
            learner.weights["bias"][128:] = -3.0  # half of them far too low to be among the largest
        batches: Any = islice(Tokens(truth.x).batches(0, 512), 250)
        for step, x in enumerate(batches):
            learner.learn(learner.outcome(x, None, step), step)
        shares[auxk] = dead_share(learner.encoder().encode(truth.x[:4000]))
    assert shares[0.0] > 0.3 and shares[1 / 32] < 0.1


def test_the_first_groups_of_a_matryoshka_reconstruct_alone(truth):
    shape = {"latents": 256, "k": 4, "batch": 256, "rate": 3e-3, "seed": 1}
    recipes = {
        "nested": EncoderRecipe(kind="matryoshka", groups=(32, 224), **shape),
        "flat": EncoderRecipe(kind="batchtopk", **shape),
    }
    encoders, x = fit(recipes, Tokens(truth.x), steps=200), truth.x[:4000]
    nested, flat = encoders["nested"], encoders["flat"]
    assert isinstance(nested, Matryoshka) and nested.groups == [32, 224]
    first = nested.first(1)
    alone = explained_variance(x, first.reconstruct(x))
    z = flat.encode(x)
    z[:, 32:] = 0
    assert alone > explained_variance(x, flat.decode(z)) + 0.1
    assert abs(l0(nested.encode(x)) - 4) < 1.5  # the threshold stands for the k that training kept on average


# -- a run that stops, and many processes ----------------------------------------------------------------------


def small(kind, **others):
    return recipe(kind, batch=32, rate=1e-2, dead_after=200, **others)


def test_several_encoders_from_one_pass_are_those_of_a_pass_each(few):
    recipes = {kind: small(kind) for kind in ALL}
    together = fit(recipes, few, steps=12)
    for kind, r in recipes.items():
        alone = fit({kind: r}, few, steps=12)[kind]
        for name, tensor in alone.to_tensors().items():
            assert torch.equal(tensor, together[kind].to_tensors()[name]), (kind, name)


def test_a_stopped_run_goes_on_to_the_same_bytes(few, tmp_path):
    recipes = {kind: small(kind, normalise="std") for kind in ALL}
    fit(recipes, few, steps=60, folder=tmp_path / "whole", save_every=12)

    class Stops(Tokens):
        def batches(self, start, batch):
            yield from islice(super().batches(start, batch), 35)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(recipes, Stops(few.values), steps=60, folder=tmp_path / "stopped", save_every=12)
    encoders = fit(recipes, few, steps=60, folder=tmp_path / "stopped", save_every=12)
    assert (tmp_path / "stopped" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()
    again = fit(recipes, few, steps=60, folder=tmp_path / "whole")  # nothing is left to do
    for kind in ALL:
        assert torch.equal(again[kind].encode(few.values[:50]), encoders[kind].encode(few.values[:50]))
    with pytest.raises(BadRecipe, match="another folder"):
        fit(recipes, few, steps=61, folder=tmp_path / "whole")


def script(*arguments, **environment):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(command, env={**os.environ, "TQDM_DISABLE": "1", **environment}, stdout=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_to_the_same_bytes():
    process = script("kill", "--times", "2")
    out, _ = process.communicate()
    assert process.returncode == 0 and "killed 2 times: the last bytes are the same" in out


def test_two_processes_find_what_one_finds():
    process = script("processes")
    out, _ = process.communicate()
    assert process.returncode == 0 and out.count("apart") == 3, out


class Two:
    """What fit asks of an accelerator on two processes, seen from one of them that is told what the other found."""

    device, num_processes, is_main_process = torch.device("cpu"), 2, True

    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize("kind", ALL)
def test_what_two_halves_of_a_batch_find_adds_up(kind):
    x, said = tokens(), []
    learner = Learner(recipe(kind), x, None, 10)
    halves = [next(ahead(iter([x]), torch.device("cpu"), Two(i)))[0] for i in (0, 1)]
    assert sum(map(len, halves)) == N
    whole = learner.outcome(x, None, 5)
    learner.gather = lambda values: said.append(values) or torch.cat((values, values))
    for half in halves:
        learner.outcome(half, None, 5)
    learner.gather = lambda _: torch.cat(said)
    parts = [learner.outcome(half, None, 5) for half in halves]
    for name, gradient in whole.gradients.items():
        added = parts[0].gradients[name] + parts[1].gradients[name]
        torch.testing.assert_close(added, gradient, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    torch.testing.assert_close(parts[0].fired + parts[1].fired, whole.fired)


# -- recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"k": 300}, "at most 256"),
        ({"kind": "relu", "sparsity": 0.0}, "sparsity"),
        ({"kind": "matryoshka", "groups": (10, 20)}, "groups"),
        ({"decay": 1.5}, "shares"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(wrong, said, few):
    with pytest.raises(BadRecipe, match=said):
        fit({"a": recipe(**wrong)}, few, steps=1)


def test_an_unknown_kind_is_refused():
    wrong = recipe()
    object.__setattr__(wrong, "kind", "tokp")
    with pytest.raises(BadRecipe, match="batchtopk, gated, jumprelu, matryoshka, relu, topk, got 'tokp'"):
        wrong.check()


def test_what_cannot_be_trained_together_is_refused(few):
    with pytest.raises(BadRecipe, match="one batch size"):
        fit({"a": recipe(), "b": recipe(batch=64)}, few, steps=1)
    with pytest.raises(BadRecipe, match="transcoder"):
        fit({"a": recipe("gated")}, Tokens(few.values, target=few.values), steps=1)
    with pytest.raises(BadRecipe, match="transcoder only"):
        fit({"a": recipe(skip=True)}, few, steps=1)
    with pytest.raises(BadRecipe, match="ended after 3"):
        fit({"a": recipe()}, Short(few.values), steps=5)


class Short(Tokens):
    def batches(self, start, batch):
        return islice(super().batches(start, batch), 3)


def test_rates_rise_and_fall_in_lines():
    r = recipe(rate=1.0, warmup=0.1, decay=0.5)
    rates = [r.rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:51] == [1.0] * 42 and rates[99] == pytest.approx(0.02)
    assert recipe().rate_at(50, 100) == pytest.approx(2e-4 * 8)
