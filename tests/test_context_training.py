"""Context modules are trained: the truth is found where the theorem says so, runs go on, recipes make banks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_training import contents, toy
from tiny_models import WORDS, toy_tokenizer

import steerlib as sl
from steerlib import cli, errors
from steerlib.evaluation.contexts import concept_match, correlations, distances, sliced_wasserstein, unidentified
from steerlib.training.carry import RECIPE as CARRIED
from steerlib.training.carry import carried, recipe_in
from steerlib.training.context_recipe import FIT as FIT_OF_RECIPES
from steerlib.training.context_recipe import ContextRecipe
from steerlib.training.fit.contexts import OBSERVED, ContextFit, ContextLayer, fit_contexts
from steerlib.training.package.contexts import Fitted, Pairs, fitted_to, fitted_to_pairs, layer_bank
from steerlib.training.recipe import DirectionRecipe
from steerlib.training.record.contexts import aligned, paired

K, D, N = 3, 6, 1000
A = torch.tensor([[0.0, 0, 0], [0.8, 0, 0], [-0.7, 0, 0]])
"""What each concept receives from the noise of others; none both receives and sends."""
VIEW = torch.randn(K, D, generator=torch.Generator().manual_seed(0))
FIT = ContextFit(inner=2, outer=4, steps=200, batch=128, rate=1e-3, warmup=30)


def drawn(done: dict[int, float], n: int = N, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """True concepts and what is seen of them, by the theorem's assumptions: concepts linear in noise, a linear injective view,
    and an intervention that replaces what one concept is."""
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(n, K, generator=g)
    for i, value in done.items():
        e[:, i] = value + 0.5 * e[:, i]
    received = A.clone()
    received[[*done]] = 0.0
    c = e + e @ received.T
    return c, (c @ VIEW + 0.1 * torch.randn(n, D, generator=g))[:, None]


def contexts(missing: int | None = None) -> dict[str, torch.Tensor]:
    """Data of every context; in a missing one nothing was intervened on."""
    done = {f"c{k}": drawn({} if k == missing else {k: 2.0}, seed=1 + k)[1] for k in range(K)}
    return {OBSERVED: drawn({}, seed=5)[1], **done}


def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    """Concepts and what is seen of them, observed and with each intervention."""
    parts = [drawn(done, 500, seed=77 + len(done)) for done in ({}, {0: 2.0}, {1: 2.0}, {2: 2.0})]
    return torch.cat([c for c, _ in parts]), torch.cat([x for _, x in parts])


def done(fitted: Fitted, x: torch.Tensor, *concepts: int) -> torch.Tensor:
    a = torch.zeros(len(x), 1, K)
    a[..., list(concepts)] = 1.0
    return x + fitted.module.change(x, a)


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    torch.set_num_threads(1)
    return fitted_to(contexts(), FIT)


# -- the truth -----------------------------------------------------------------------------------------------


def test_concepts_are_identified_where_each_was_intervened_on(fitted):
    c, x = held_out()
    match = concept_match(c, fitted.module.encode(x[:, 0]))
    assert match.mcc >= 0.95 and match.likeness.min() >= 0.9
    assert match.latents.tolist() == [0, 1, 2]  # each by the name of its context


def test_a_linear_module_starts_from_what_another_starts_from(monkeypatch):
    monkeypatch.setitem(globals(), "A", 2 * A)  # so large that concepts are scaled
    data = {name: x[:, 0] for name, x in contexts().items()}
    first, other = (ContextLayer(["c0", "c1", "c2"], D, replace(FIT, inner=4, depth=depth)).eval() for depth in (0, 1))
    for layer in (first, other):
        layer.begin(data)
    for context, x in data.items():
        with torch.no_grad(), first.within(context), other.within(context):
            assert (first(x) - other(x)).square().mean() <= 0.02 * x.var()


def test_with_an_intervention_missing_its_concept_is_not_and_is_told():
    c, x = held_out()
    for missing in (1, 2):
        data = contexts(missing)
        read = fitted_to(data, replace(FIT, steps=60)).module.encode(x[:, 0])
        assert concept_match(c, read).mcc < 0.9 and int(correlations(c, read).diagonal().argmin()) == missing
        assert unidentified(data.pop(OBSERVED), data) == [f"c{missing}"]  # told without the truth


def test_dos_give_what_interventions_give_and_compose_what_was_never_seen_together(fitted):
    plain = drawn({}, 1000, seed=50)[1]
    truth = {"0": drawn({0: 2.0}, seed=60)[1], "1": drawn({1: 2.0}, seed=61)[1], "01": drawn({0: 2.0, 1: 2.0}, seed=62)[1]}
    truth |= {"02": drawn({0: 2.0, 2: 2.0}, seed=63)[1], "12": drawn({1: 2.0, 2: 2.0}, seed=64)[1]}
    given = {name: done(fitted, plain, *map(int, name)) for name in truth}
    found = distances(given, truth, plain)
    assert found.ratio <= 0.3 and all(found.distance[name] <= 0.5 * found.plain[name] for name in truth)


def test_with_labels_shuffled_it_does_no_better_than_nothing():
    every = contexts()
    pool = torch.cat([*every.values()])[torch.randperm(4 * N, generator=torch.Generator().manual_seed(3))]
    shuffled = fitted_to(dict(zip(every, pool.split(N), strict=True)), replace(FIT, steps=60))
    plain, truth = drawn({}, 1000, seed=50)[1], {"01": drawn({0: 2.0, 1: 2.0}, seed=62)[1]}
    assert distances({"01": done(shuffled, plain, 0, 1)}, truth, plain).ratio >= 0.8


def test_effects_are_the_total_ones_in_units_of_both(fitted):
    unit = (torch.eye(K) + A).norm(dim=1)  # noise has variance 1
    wanted = A * unit / unit[:, None]
    torch.testing.assert_close(fitted.effects, wanted, atol=0.12, rtol=0)


# -- pairs ---------------------------------------------------------------------------------------------------

KINDS = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(8))
"""What a thing looks like by its shape, of three, and by its colour, of three; an intervention makes it the first of either."""


def things(n: int, seed: int, done: tuple[int, ...] = ()) -> torch.Tensor:
    """`[n, 4, D]`: four things of each prompt, that show shape, colour and something that nothing is done to."""
    g = torch.Generator().manual_seed(seed)
    which, rest = torch.randint(3, (2, n, 4), generator=g), 0.3 * torch.randn(n, 4, D, generator=g)
    which[[*done]] = 0
    return KINDS[0][which[0]] + KINDS[1][which[1]] + rest


def fitted_to_things(shuffled: bool = False) -> Fitted:
    plain, done = things(200, 1), [things(200, 1, (k,)) for k in range(2)]
    if shuffled:
        mixed = torch.rand(200, generator=torch.Generator().manual_seed(2)) < 0.5
        done = [torch.where(mixed[:, None, None], done[k], done[1 - k]) for k in range(2)]
    pairs = {name: Pairs(plain, after) for name, after in zip(("shape", "colour"), done, strict=True)}
    settings = ContextFit(inner=8, outer=6, depth=2, steps=300, batch=128, rate=5e-3, warmup=30, sparse=100.0)
    return fitted_to_pairs(plain, pairs, settings)


def left(fitted: Fitted, *done: int) -> float:
    """Of the squared change that these interventions make on other things, what dos do not."""
    plain, after = things(100, 7), things(100, 7, done)
    a = torch.zeros(100, 4, 2)
    a[..., list(done)] = 1.0
    given = plain + fitted.module.change(plain, a)
    return float((given - after).square().sum() / (plain - after).square().sum())


def test_pairs_teach_dos_that_compose_what_was_never_done_together():
    torch.set_num_threads(1)
    fitted = fitted_to_things()
    assert max(left(fitted, 0), left(fitted, 1), left(fitted, 0, 1)) < 0.1
    assert min(left(fitted_to_things(shuffled=True), k) for k in range(2)) > 0.3  # half of the change is that of the other


def test_what_differs_least_is_paired_and_tokens_keep_their_partners():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, D, generator=g)
    prompts, tokens = torch.randperm(5, generator=g), torch.randperm(4, generator=g)
    y = x[prompts] + 0.01
    before, after = paired(x, y[:4], words=False)
    torch.testing.assert_close(after, before + 0.01)
    assert len(before) == 4
    before, after = paired(x, y[:, tokens], words=True)
    torch.testing.assert_close(aligned(before, after), x + 0.01)


# -- the training --------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path):
    data, settings = contexts(), replace(FIT, steps=12)

    def run(folder: Any, until: int) -> ContextLayer:
        layer, left = ContextLayer(["c0", "c1", "c2"], D, settings), iter(range(until))

        def batches(name: str, g: torch.Generator) -> torch.Tensor:
            if next(left, None) is None:
                raise Killed
            return data[name][torch.randint(N, (16,), generator=g)]

        return fit_contexts(
            layer, batches, lambda x: (x - layer(x)).square().sum(-1).mean(), settings, folder=folder, save_every=4
        )

    whole = run(tmp_path / "whole", 99).state_dict()
    with pytest.raises(Killed):
        run(tmp_path / "killed", 7)
    again = run(tmp_path / "killed", 8).state_dict()  # from step 4 on
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    with pytest.raises(errors.BadRecipe, match="another folder"):
        fit_contexts(
            ContextLayer(["c0"], D, settings), lambda *_: data["c0"], lambda x: x.sum(), settings, folder=tmp_path / "killed"
        )


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine_to_a_hundredth():
    fit = ContextFit(steps=1200)
    assert fit.rate_at(0) == pytest.approx(1e-3 / 200) and fit.rate_at(199) == pytest.approx(1e-3)
    assert fit.rate_at(700) == pytest.approx(1e-3 * (0.01 + 0.99 / 2)) and fit.rate_at(1200) == pytest.approx(1e-5)


def test_effects_stay_from_0_to_1_and_the_identity_on_their_diagonal():
    settings = ContextFit(inner=2, outer=3, steps=5, batch=4, rate=1.0, warmup=0)
    layer = ContextLayer(["a", "b"], 4, settings)
    batches = lambda _, g: torch.randn(8, 4, generator=g)  # noqa: E731
    fit_contexts(layer, batches, lambda x: (layer(x) - x).square().sum(-1).mean(), settings)
    effects = layer.effects.detach()
    assert ((effects >= 0) & (effects <= 1)).all() and (effects != 0).float().mean() > 0.3
    assert all(torch.equal(effects[k, s, k], torch.eye(3)) for k in range(2) for s in range(2))


# -- recipes -------------------------------------------------------------------------------------------------

RECIPE = """
name = "rooms"
base = "org/toy"
source = "toy"
site = "layers.0"
seeds = 2
samples = 16
[fit]
inner = 2
outer = 2
steps = 20
batch = 8
[contexts]
observed = "plain.txt"
tea = {tea}
"""


def recipe(folder: Any) -> ContextRecipe:
    folder.mkdir(exist_ok=True)
    words = [*WORDS[:12]]
    (folder / "plain.txt").write_text("\n".join(f"{one} {other}" for one in words[:4] for other in words[4:7]))
    tea = [f"{one} {other}" for one in words[7:10] for other in words[:4]]
    (folder / "recipe.toml").write_text(RECIPE.replace("{tea}", repr(tea)))
    return ContextRecipe.from_file(folder / "recipe.toml")


def test_a_recipe_with_contexts_makes_a_bank_that_is_switched(tmp_path):
    made, model = recipe(tmp_path / "recipe"), toy()
    bank = sl.train(model, made, tokenizer=toy_tokenizer(), work=tmp_path / "work")
    assert list(bank) == ["tea"] and bank.encoders["layers.0"].kind == "context"
    assert (
        bank["tea"].effects.keys() == {"changed", "distance", "plain"}
        and "sl.Do()" in bank.card
        and "model.generate(" in bank.card
    )
    assert not bank["tea"].unmeasured and "not measured" not in repr(bank)  # amounts of `Do` go from 0 to 1
    with pytest.raises(errors.BadRecipe, match="its figures are in its README.md"):
        cli.eval_(str(bank.save_pretrained(tmp_path / "made")), threads=1)
    before = contents(tmp_path / "work")
    first = contents(bank.save_pretrained(tmp_path / "bank"))
    again = sl.train(model, made, tokenizer=toy_tokenizer(), work=tmp_path / "work")
    assert contents(again.save_pretrained(tmp_path / "bank")) == first and contents(tmp_path / "work") == before
    opened = sl.ConceptBank.from_pretrained(tmp_path / "bank")
    opened.verify()
    kept = recipe_in(opened)
    assert (
        isinstance(kept, ContextRecipe)
        and kept.digest == made.digest
        and kept.plain == made.plain
        and kept.read_contexts() == made.read_contexts()
    )
    ids = torch.tensor([[1, 5, 6, 7]])
    plain = model(ids).logits
    with sl.steer(model, opened, {"tea": sl.Do(tokens="prompt")}) as session:
        assert not torch.equal(model(ids).logits, plain)
    assert session.report().lines[0].tokens == 4 and torch.equal(model(ids).logits, plain)


def test_a_context_like_the_observed_one_identifies_nothing_and_the_card_says_so(tmp_path):
    made = replace(recipe(tmp_path), seeds=1)
    plain = made.read_contexts()[OBSERVED]
    (tmp_path / "tea.jsonl").write_text(
        "".join(f'{{"positive": "{prompt} tea", "negative": "{prompt}"}}\n' for prompt in plain)
    )
    lists = replace(made, contexts={OBSERVED: plain, "same": plain[::-1], "tea": "tea.jsonl"})
    pairs = replace(
        made, contexts={OBSERVED: plain, "same": "tea"}, template="{prompt} {concept}", site="embed"
    )  # shows nothing
    for one in (lists, pairs):
        bank = sl.train(toy(), one, tokenizer=toy_tokenizer(), work=tmp_path / "work")
        assert "**same: not identified" in bank.card and "not identified" in repr(bank["same"])
        assert {c.name for c in bank.concepts.values() if c.useful is None} == {"same"}
        assert one is pairs or '{"tea": sl.Do()}' in bank.card
    assert bank["same"].effects["changed"] == 0


def test_the_graph_has_effects_of_the_first_seed_and_the_ends_over_all(tmp_path):
    made, model = recipe(tmp_path), toy()
    words = made.read_contexts()
    both = replace(
        made, contexts={**words, "milk": [f"{one} milk" for one in words["tea"]]}, fit=replace(made.fit, sparse=0.0, warmup=0)
    )
    banks = [
        sl.train(model, replace(both, seeds=seeds, seed=seed), tokenizer=toy_tokenizer(), work=tmp_path / "work")
        for seeds, seed in ((2, 0), (1, 0), (1, 1))
    ]
    every, first, second = ({(e.src, e.dst): e for e in bank.graph.edges} for bank in banks)
    assert every and all(e.relation == "context" and e.tau_lo is None for e in first.values())
    for ends, edge in every.items():
        weights = sorted([first[ends].weight, second[ends].weight if ends in second else 0.0])
        assert edge.weight == first[ends].weight
        assert [edge.tau_lo, edge.tau_hi] == pytest.approx(weights, abs=1e-3)


def test_contexts_of_a_file_of_rows_are_those_of_lists(tmp_path):
    listed = recipe(tmp_path)
    lines = [f'{{"text": "{text}", "context": "{name}"}}' for name, texts in listed.read_contexts().items() for text in texts]
    (tmp_path / "rows.jsonl").write_text("\n".join(reversed(lines)))
    head, _, _ = RECIPE.partition("[contexts]")
    (tmp_path / "recipe.toml").write_text(head.replace("[fit]", 'rows = "rows.jsonl"\n[fit]'))
    found = sl.Recipe.from_file(tmp_path / "recipe.toml")
    assert isinstance(found, ContextRecipe) and found.digest != listed.digest
    assert {name: sorted(texts) for name, texts in found.read_contexts().items()} == {
        name: sorted(texts) for name, texts in listed.read_contexts().items()
    }
    before = found.digest
    (tmp_path / "rows.jsonl").write_text("\n".join(lines).replace("moon", "sun", 1))
    assert ContextRecipe.from_file(tmp_path / "recipe.toml").digest != before


def test_pairs_templates_and_folders_say_the_same_contexts(tmp_path):
    listed = recipe(tmp_path)
    plain = listed.read_contexts()[OBSERVED]
    tea = [f"{prompt}, with tea" for prompt in plain]
    by_template = replace(listed, contexts={OBSERVED: "plain.txt", "tea": "with tea"}, template="{prompt}, {concept}")
    (tmp_path / "sorted").mkdir()
    lines = [f'{{"positive": "{a}", "negative": "{b}"}}' for a, b in zip(tea, plain, strict=True)]
    (tmp_path / "sorted/tea.jsonl").write_text("\n".join(lines))
    by_pairs = replace(listed, contexts={"tea": "sorted/tea.jsonl"})
    by_folder = replace(listed, contexts=None, rows="sorted")
    for one in (by_template, by_pairs, by_folder):
        one.check()
        assert one.read_contexts() == {OBSERVED: plain, "tea": tea}
        assert one.read_pairs() == {"tea": [*zip(tea, plain, strict=True)]}
        kept = recipe_in(sl.ConceptBank("x", [], {}, base=sl.BaseModel(), sites={}, files={CARRIED: carried(one)}))
        assert isinstance(kept, ContextRecipe) and kept.read_pairs() == one.read_pairs() and kept.digest == one.digest
    (tmp_path / "sorted/observed.txt").write_text("\n".join(reversed(plain)))
    assert by_folder.read_contexts() == {OBSERVED: plain[::-1], "tea": tea} and listed.read_pairs() == {}


def test_functions_make_contexts_and_the_bank_keeps_what_they_gave(tmp_path):
    listed = recipe(tmp_path)
    plain = listed.read_contexts()[OBSERVED]
    bare = replace(listed, contexts={OBSERVED: "plain.txt"}, seeds=1)
    wanted = replace(bare, contexts={OBSERVED: plain, "tea": [[f"{prompt}, with tea", prompt] for prompt in plain]})
    bank = sl.train(toy(), bare, tokenizer=toy_tokenizer(), work=tmp_path / "work", contexts={"tea": "{}, with tea".format})
    kept = recipe_in(bank)
    assert isinstance(kept, ContextRecipe) and kept.read_pairs() == wanted.read_pairs() and kept.digest == wanted.digest
    for given, contexts in ((bare, {OBSERVED: str}), (bare, {"tea": len}), (replace(bare, contexts={}), {"tea": str.upper})):
        with pytest.raises(errors.BadRecipe, match="expected p"):
            sl.train(None, given, contexts=contexts)  # type: ignore[arg-type]
    other = DirectionRecipe(name="x", base="b", source="s", concepts=())
    with pytest.raises(errors.BadRecipe, match="is for a recipe of contexts"):
        sl.train(None, other, contexts={"tea": str.upper})


def test_a_table_of_the_fit_leaves_its_other_fields_as_they_are_by_default(tmp_path):
    assert recipe(tmp_path).fit == replace(FIT_OF_RECIPES, inner=2, outer=2, steps=20, batch=8)


@pytest.mark.parametrize(("changes", "said"), [
    ({"template": "{prompt}"}, "with {concept}"), ({"template": "{prompt}, {concept}"}, "words for the template"),
    ({"contexts": {OBSERVED: "plain.txt", "tea": "same.jsonl"}}, "two different prompts"),
    ({"contexts": {"tea": ["a"] * 9}}, "of 'observed'"),
    ({"contexts": {OBSERVED: list("abcdefgh"), "tea": ["a"] * 9}}, "'tea': expected 8"),
    ({"rows": "rows.jsonl"}, "not both"), ({"site": ""}, "expected a site"), ({"level": -1}, "timestep"),
    ({"contexts": {OBSERVED: 3, "tea": "tea.txt"}}, "list of prompts"), ({"contexts": {OBSERVED: "no.txt"}}, "found none"),
    ({"fit": ContextFit(depth=9)}, "at most 8 layers"), ({"fit": ContextFit(depth=0)}, "inner and outer alike"),
    ({"fit": ContextFit(rate=0.0)}, "positive rate"),
], ids=str)  # fmt: skip
def test_recipes_that_cannot_work_are_refused(tmp_path, changes, said):
    (tmp_path / "same.jsonl").write_text('{"positive": "tea", "negative": "tea"}')
    with pytest.raises(errors.BadRecipe, match=said):
        replace(recipe(tmp_path), **changes).check()


# -- the scores ----------------------------------------------------------------------------------------------


def test_distances_and_matches_have_closed_forms():
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([3.0, 0, 0, 4, 0])
    assert sliced_wasserstein(x, x.clone()) == 0 and sliced_wasserstein(x, x[torch.randperm(400)]) == 0
    assert sliced_wasserstein(x, x + shift, directions=20_000) == pytest.approx(5 / 5**0.5, rel=0.02)
    mixed = x[:, [2, 0, 1]] * torch.tensor([-2.0, 1, 3])
    match = concept_match(x[:, :4], mixed)
    assert match.latents.tolist() == [1, 2, 0] and match.mcc == pytest.approx(0.75)
    torch.testing.assert_close(correlations(x, x).float(), torch.corrcoef(x.T).abs(), atol=1e-5, rtol=1e-5)
    with pytest.raises(errors.BadEdit):
        sliced_wasserstein(x, x[:, :3])


# -- in a model of one's own ---------------------------------------------------------------------------------


class Own(torch.nn.Module):
    """An autoencoder with a context layer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(D, 4), torch.nn.Linear(4, D)
        self.context = ContextLayer(["c0", "c1", "c2"], 4, FIT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.context(self.encoder(x)))


@pytest.mark.parametrize("learns", ["all", "module", "late"])
def test_a_model_of_ones_own_learns_with_its_layer_and_is_switched(learns):
    torch.manual_seed(0)
    data, model = {name: x[:, 0] for name, x in contexts().items()}, Own()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = lambda name, g: data[name][torch.randint(N, (64,), generator=g)]  # noqa: E731
    settings = replace(FIT, steps=10)
    layer = fit_contexts(model, batches, lambda x: (model(x) - x).square().sum(-1).mean(), settings, learns=learns)
    after, own = model.state_dict(), ("encoder.weight", "decoder.bias")
    assert all(torch.equal(after[name], before[name]) == (learns == "module") for name in own)
    assert not torch.equal(after["context.pool"], before["context.pool"])
    bank, x = layer_bank(model, data), data[OBSERVED][:5]
    plain = model(x)
    for done in (["c0"], ["c1", "c2"]):
        with layer.within(dict.fromkeys(done, 1.0)):
            wanted = model(x)
        with sl.steer(model, bank, dict.fromkeys(done, sl.Do())):
            torch.testing.assert_close(model(x), wanted)
        assert not torch.allclose(wanted, plain) and torch.equal(model(x), plain)


def accelerated(accelerator: Any, folder: Any = None) -> tuple[Own, list[torch.Tensor]]:
    """A model after a few steps, and the batches it saw."""
    torch.manual_seed(0)
    data, model, seen = contexts()[OBSERVED][:, 0], Own(), []

    def cost(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return (model(x) - x).square().sum(-1).mean()

    batches = lambda _, g: data[torch.randint(N, (8,), generator=g)]  # noqa: E731
    fit_contexts(model, batches, cost, replace(FIT, steps=4, warmup=0), folder=folder, save_every=2, accelerator=accelerator)
    return model, seen


def test_accelerate_brings_precision_and_alone_changes_no_bit(tmp_path, accelerate):
    plain, same, half = (
        accelerated(accelerator, tmp_path / str(k))[0].state_dict()
        for k, accelerator in enumerate((None, accelerate.Accelerator(cpu=True), Rounding()))
    )
    assert all(torch.equal(same[name], tensor) for name, tensor in plain.items())
    assert all(tensor.dtype == torch.float32 for tensor in half.values())
    apart = max(float((half[name] - tensor).abs().max()) for name, tensor in plain.items())
    assert 1e-6 < apart < 0.1


class Rounding:
    """What training asks of accelerate's object: one process, in bfloat16."""

    device, num_processes, process_index, is_main_process = torch.device("cpu"), 1, 0, True

    def autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    def prepare_optimizer(self, adam: Any) -> Any:
        return adam

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


class Second(Rounding):
    """The second of two processes, which together find that nothing has to change."""

    num_processes, process_index, is_main_process = 2, 1, False

    def reduce(self, gradient: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "mean"
        return 0 * gradient


def test_processes_learn_from_batches_of_their_own_by_the_mean_of_all(tmp_path):
    torch.manual_seed(0)
    before = Own().state_dict()
    (first, seen), (second, others) = accelerated(None), accelerated(Second(), tmp_path / "none")
    assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in before.items())
    assert not torch.equal(first.encoder.weight, second.encoder.weight) and not (tmp_path / "none").exists()
    assert len(seen) == len(others) == 4 and not any(map(torch.equal, seen, others))


def test_the_rest_learns_late_after_a_fifth_of_the_steps():
    data, model = contexts()[OBSERVED][:, 0], Own()
    first, seen = model.encoder.weight.detach().clone(), []

    def cost(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.equal(model.encoder.weight, first))
        return (model(x) - x).square().sum(-1).mean()

    fit_contexts(model, lambda *_: data[:32], cost, replace(FIT, steps=10), learns="late")
    assert seen == [True] * 3 + [False] * 7  # the third batch is the first that moves it


@pytest.mark.parametrize(("site", "level"), [("unet.mid_block", 500), ("text_encoder.layers.1", None)])
def test_a_pipeline_is_switched_where_its_recipe_says(toy, tmp_path, site, level):
    scene = "a {} plain {} square at the front left {} on grass under a navy sky lit from the left"
    kinds = [(size, colour) for size in ("small", "medium", "large") for colour in ("red", "green", "blue")]
    given = {
        OBSERVED: [scene.format(*kind, "by day") for kind in kinds],
        "night": [scene.format(*k, "at night") for k in kinds],
    }
    few: dict[str, Any] = {"seeds": 1, "samples": 8, "steps": 2, "batch": 4, "fit": replace(FIT, outer=2, steps=3, batch=4)}
    made = ContextRecipe(name="x", base="b", source="s", contexts=given, site=site, level=level, **few)
    bank = sl.train(toy, made, work=tmp_path)
    assert f'pipe("{made.plain}")' in bank.card

    def draw() -> Any:
        return toy(given[OBSERVED][:1], num_inference_steps=4, generator=torch.manual_seed(0), output_type="np").images

    plain = draw()
    with sl.steer(toy, bank, {"night": sl.Do()}) as session:
        assert (draw() != plain).any()
    assert session.report().lines[0].tokens > 0 and (draw() == plain).all()
    assert (bank.window_of(bank["night"]) is None) == (level is None)
