"""Context modules: what they compute, what `Do` makes of a model, and how they are kept."""

from typing import Any

import pytest
import torch
from torch.nn.functional import gelu

import steerlib as sl
from steerlib import errors
from steerlib.encoders import Context

K, IN, OUT, D = 3, 2, 2, 32
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def tensors(seed: int = 0, *, depth: int = 2, positions: int = 1, width: int = D) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    own = torch.eye(K)[:, None, :, None, None]
    effects = torch.rand(K, 2, K, OUT, OUT, generator=g) * (1 - own) + own * torch.eye(OUT)
    made = {"pool": some(K, IN, positions * width), "noise": 2 * some(K, 2, IN, IN), "effects": effects, "bias": some(K, OUT)}
    made |= {
        "unpool": some(K, OUT, positions * width),
        "mean": some(K),
        "axis": some(K, OUT),
        "pool.bias": some(K, IN),
        "noise.bias": some(K, 2, IN),
    }
    wide = [IN] * depth + [OUT]
    for layer in range(depth):
        made[f"expressive.{layer}"] = some(K, wide[layer + 1], wide[layer])
        made[f"expressive.{layer}.bias"] = some(K, wide[layer + 1])
    return made


def concept(k: int, **facts: Any) -> sl.Concept:
    return sl.Concept(name=f"c{k}", encoder="layers.0", index=k, useful=1.0, useful_as="Do", **facts)


def bank_of(model: Any, module: Context) -> sl.ConceptBank:
    names = [concept(k) for k in range(K)]
    return sl.ConceptBank.from_encoder(module, site="layers.0", base=model, concepts=names)


@pytest.fixture
def module():
    return Context(tensors())


@pytest.fixture
def contexts(llama, module):
    return bank_of(llama, module)


def by_hand(module: Context, x: torch.Tensor, a: list[float]) -> torch.Tensor:
    """m(x; a) of one activation, as one matrix a layer: blocks on the diagonal, rows cut, columns switched."""
    t, switch = module.to_tensors(), torch.tensor(a).repeat_interleave(IN)
    z = torch.cat([t["pool"][k] @ x + t["pool.bias"][k] for k in range(K)])
    observed, intervened = (torch.block_diag(*t["noise"][:, s]) @ z + t["noise.bias"][:, s].flatten() for s in (0, 1))
    e = (1 - switch) * observed + switch * intervened
    e = gelu(e) if module.depth else e
    for layer in range(module.depth):
        e = torch.block_diag(*t[f"expressive.{layer}"]) @ e + t[f"expressive.{layer}.bias"].flatten()
        e = gelu(e) if layer + 1 < module.depth else e
    return torch.einsum("p,pd->d", matrix(t, a) @ e + t["bias"].flatten(), t["unpool"].flatten(0, 1))


def matrix(t: dict[str, Any], a: list[float]) -> torch.Tensor:
    """A of a set of interventions, `[K OUT, K OUT]`: block (i, j) is what concept i receives from concept j."""
    rows = []
    for i in range(K):
        blocks = [(1 - a[i]) * ((1 - a[j]) * t["effects"][j, 0, i] + a[j] * t["effects"][j, 1, i]) for j in range(K)]
        blocks[i] = torch.eye(OUT)
        rows.append(torch.cat(blocks, 1))
    return torch.cat(rows)


def site(model: Any, bank: Any = None, edits: Any = None, **options: Any) -> torch.Tensor:
    with sl.record(model, ["layers.0"]) as tape:
        if edits is None:
            model(IDS)
        else:
            with sl.steer(model, bank, edits, **options):
                model(IDS)
    return tape["layers.0"][0][1]


# -- the module ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [[0.0, 0, 0], [1.0, 0, 0], [0.0, 1, 1], [0.25, 0, 1]], ids=str)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_it_computes_what_its_matrices_say(depth, a):
    module = Context(tensors(depth=depth))
    x = torch.randn(2, 5, D)
    amounts = torch.tensor(a).expand(2, 5, K)
    change = torch.stack([by_hand(module, row, a) - by_hand(module, row, [0.0] * K) for row in x.flatten(0, 1)])
    torch.testing.assert_close(module.change(x, amounts), change.unflatten(0, (2, 5)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("depth", [0, 1])
def test_without_expressive_layers_all_is_linear(depth):
    module, (x, y) = Context(tensors(depth=depth)), torch.randn(2, D)
    a = torch.tensor([1.0, 0.0, 0.5])
    middle, ends = module.change((x + y) / 2, a), module.change(torch.stack([x, y]), a.expand(2, K)).mean(0)
    assert torch.allclose(middle, ends, atol=1e-5) == (depth == 0)


def test_a_do_cuts_what_its_concept_receives_and_switches_what_it_sends_and_nothing_else(module):
    """From the outputs alone: how c answers to noise, before and after."""
    z, zero, one = torch.randn(K, IN), torch.zeros(K), torch.tensor([0.0, 1.0, 0.0])

    def answers(a: torch.Tensor) -> torch.Tensor:
        jacobian = torch.autograd.functional.jacobian(lambda z: module.concepts(z, a).sum(-1), z)
        return (jacobian.abs().sum(-1) > 0).float()  # [effect, cause]

    assert answers(zero).tolist() == torch.ones(K, K).tolist()
    assert answers(one).tolist() == [[1, 1, 1], [0, 1, 0], [1, 1, 1]]
    t = module.to_tensors()
    e = module.concepts(z, torch.ones(K)) - t["bias"]  # nothing is received by any: what each is by itself, intervened on
    e_observed = torch.linalg.solve(matrix(t, [0, 0, 0]), (module.concepts(z, zero) - t["bias"]).flatten()).unflatten(
        0, (K, OUT)
    )
    moved = module.concepts(z, one) - module.concepts(z, zero)
    sent = t["effects"][1, 1] @ e[1] - t["effects"][1, 0] @ e_observed[1]  # of the column, old and new
    torch.testing.assert_close(moved[[0, 2]], sent[[0, 2]], atol=1e-4, rtol=1e-4)


def test_pictures_are_read_whole_and_each_place_is_written_for_its_own_amounts():
    module, x = Context(tensors(positions=4, width=3), positions=4), torch.randn(2, 4, 3)
    flat = Context({**module.to_tensors()})  # the same weights, one position of 12
    a = torch.tensor([1.0, 0.0, 0.5]).expand(2, 4, K).clone()
    together = module.change(x, a)
    torch.testing.assert_close(together.flatten(1), flat.change(x.flatten(1), a[:, 0]))
    a[:, 2:] = 0
    assert torch.equal(module.change(x, a)[:, 2:], torch.zeros(2, 2, 3))
    torch.testing.assert_close(module.change(x, a)[:, :2], together[:, :2])
    assert module.encode(x).shape == (2, 4, K) and torch.equal(module.encode(x)[:, 0], module.encode(x)[:, 3])
    with pytest.raises(errors.WrongWidth, match="4 positions"):
        module.encode(x[:, :3])


@pytest.mark.parametrize("wrong", [
    {"effects": 2 * tensors()["effects"]}, {"effects": tensors()["effects"] - 0.5}, {"bias": torch.zeros(K, OUT + 1)},
    {"expressive.0": torch.zeros(K, OUT, IN + 1)}, {"noise.bias": None}, {"unpool": torch.zeros(K, 3, D)},
    {"more": torch.ones(K)}, {"pool": torch.zeros(K, 4)},
], ids=lambda one: next(iter(one)))  # fmt: skip
def test_tensors_that_are_no_module_are_refused(wrong):
    given = {name: tensor for name, tensor in {**tensors(), **wrong}.items() if tensor is not None}
    with pytest.raises(errors.CorruptBank, match="context module"):
        Context(given)


# -- steering ------------------------------------------------------------------------------------------------


def test_a_do_adds_what_the_module_changes_and_no_do_is_bit_identical(llama, contexts, module):
    plain = site(llama)
    assert torch.equal(site(llama, contexts, {}), plain)
    assert torch.equal(site(llama, contexts, {"c0": sl.Do(0.0), "c2": sl.Do([0.0, 0.0])}), plain)
    a = torch.tensor([1.0, 0.0, 0.5]).expand(2, 4, K)
    found = site(llama, contexts, {"c0": sl.Do(), "c2": sl.Do(0.5)})
    torch.testing.assert_close(found, plain + module.change(plain, a))
    assert (found - plain).norm() > 1


def test_dos_commute_in_one_call_and_in_nested_ones(llama, contexts):
    both = site(llama, contexts, {"c0": sl.Do(), "c1": sl.Do()})
    assert torch.equal(site(llama, contexts, {"c1": sl.Do(), "c0": sl.Do()}), both)
    for outer, inner in (("c0", "c1"), ("c1", "c0")):
        with sl.steer(llama, contexts, {outer: sl.Do()}):
            torch.testing.assert_close(site(llama, contexts, {inner: sl.Do()}), both)
    one_after_the_other = site(llama, contexts, {"c0": sl.Do()}) + site(llama, contexts, {"c1": sl.Do()}) - site(llama)
    assert not torch.allclose(one_after_the_other, both)  # what c0 sent to c1 is cut
    with sl.steer(llama, contexts, {"c0": sl.Do()}), pytest.raises(errors.ConflictingEdits, match="'c0' is set"):
        site(llama, contexts, {"c0": sl.Do(0.5)})


def test_rows_tokens_masks_and_gates_say_how_far(llama, contexts, module):
    plain, a = site(llama), torch.zeros(2, 4, K)

    def check(edit: Any, a: torch.Tensor) -> None:
        torch.testing.assert_close(site(llama, contexts, {"c1": edit}), plain + module.change(plain, a))

    a[0, :, 1], a[1, :, 1] = 1.0, 0.25
    check(sl.Do([1.0, 0.25]), a)
    check(sl.Do(tokens=slice(1, 3)), a.copy_(torch.tensor([0.0, 1, 1, 0])[None, :, None] * torch.tensor([0.0, 1, 0])))
    check(
        sl.Do(0.5, mask=torch.tensor([1.0, 0.5, 0.0, 0.0])),
        a.copy_(torch.tensor([0.5, 0.25, 0, 0])[None, :, None] * torch.tensor([0.0, 1, 0])),
    )
    z = module.encode(plain)[..., 2]
    middle = float(z.median())
    a = (z > middle).float()[..., None] * torch.tensor([0.0, 1, 0])
    assert 0 < a.mean() < 1 / 3
    check(sl.Do(gate=sl.Gate("c2", above=middle)), a)


def test_directions_beside_it_add_up_and_targets_count_it_in(llama, contexts, module):
    plain, d = site(llama), torch.randn(D)
    norm = float(plain.norm(dim=-1).median())
    others = sl.ConceptBank.from_directions({"d": d}, site="layers.0", base=llama, norm=norm)
    change = module.change(plain, torch.tensor([1.0, 0, 0]).expand(2, 4, K))
    with pytest.warns(sl.errors.OutOfRange):
        found = site(llama, [contexts, others], {"c0": sl.Do(), "d": 9.0})
    torch.testing.assert_close(found, plain + change + d * (0.35 * norm / d.norm()), atol=1e-4, rtol=1e-4)  # only d is capped
    free = sl.ConceptBank.from_directions({"d": d}, site="layers.0", base=llama)
    found = site(llama, [contexts, free], {"c0": sl.Do(), "d": sl.Set(0.5)})
    torch.testing.assert_close(found @ d / d.dot(d), torch.full((2, 4), 0.5), atol=1e-4, rtol=1e-4)
    away = found - plain - change
    torch.testing.assert_close(away, (away @ d / d.dot(d))[..., None] * d, atol=1e-4, rtol=1e-3)


def test_report_and_record_tell_of_it_as_of_other_edits(llama, contexts, module):
    plain = site(llama)
    with sl.record(llama, contexts) as tape, sl.steer(llama, contexts, {"c1": sl.Do(tokens=slice(1, None))}) as session:
        llama(IDS)
    a = torch.tensor([0.0, 1, 1, 1])[None, :, None] * torch.tensor([0.0, 1, 0]) * torch.ones(2, 1, 1)
    after = plain + module.change(plain, a)
    torch.testing.assert_close(tape["c1"][0][1], module.encode(after)[..., 1])
    (line,) = session.report().lines
    assert (line.concept, line.tokens, line.seen, line.capped) == ("c1", 3, 4, 0.0)
    assert line.largest == pytest.approx(float(module.encode(after)[:, 1:, 1].abs().max()), rel=1e-4)
    contexts.sites["layers.0"] = type(contexts.sites["layers.0"])(width=D, norm=2.0)
    with sl.steer(llama, contexts, {"c1": sl.Do()}) as session:
        llama(IDS)
    every = torch.tensor([0.0, 1, 0]).expand(2, 4, K)
    length = float(module.change(plain, every)[:, 1:].norm(dim=-1).mean())
    assert session.report().lines[0].change == pytest.approx(length / 2, rel=1e-4)


@pytest.mark.parametrize(("edits", "said"), [
    ({"c0": 1.0}, r"use sl\.Do\(\)"), ({"c0": sl.Ablate()}, r"use sl\.Do\(\)"), ({"c0": sl.Swap("c1")}, r"use sl\.Do\(\)"),
    ({"d": sl.Do()}, "'d' is none"),
], ids=str)  # fmt: skip
def test_concepts_of_modules_are_switched_and_others_are_not(llama, contexts, edits, said):
    others = sl.ConceptBank.from_directions({"d": torch.ones(D)}, site="layers.0", base=llama)
    with pytest.raises(errors.Unanswerable, match=said):
        sl.steer(llama, [contexts, others], edits)
    with pytest.raises(errors.BadEdit, match="kind 'context'"):
        sl.steer(llama, contexts, {contexts["c0"] - contexts["c1"]: sl.Do()})


@pytest.mark.parametrize("amount", [-0.1, 1.5, [0.5, 2.0], float("nan")])
def test_an_amount_is_from_observed_to_intervened(amount):
    with pytest.raises(errors.BadEdit):
        sl.Do(amount)


def test_a_module_learns_through_steer(llama, module):
    learning = Context({name: tensor.clone().requires_grad_(name == "noise") for name, tensor in module.to_tensors().items()})
    llama.requires_grad_(False)
    with sl.steer(llama, bank_of(llama, learning), {"c0": sl.Do()}):
        llama(IDS).logits.square().sum().backward()
    gradient = learning.to_tensors()["noise"].grad
    assert gradient is not None and gradient[0].norm() > 0 and gradient[0, 1].norm() > 0


# -- the bank ------------------------------------------------------------------------------------------------


def test_a_bank_of_it_comes_back_the_same(llama, contexts, tmp_path):
    again = sl.ConceptBank.from_pretrained(contexts.save_pretrained(tmp_path / "bank"))
    again.verify()
    assert again["c1"] == contexts["c1"] and again.encoders["layers.0"].kind == "context"
    edits = {"c0": sl.Do(), "c1": sl.Do(0.5)}
    assert torch.equal(site(llama, again, edits), site(llama, contexts, edits))
    assert (tmp_path / "bank/bank.json").read_bytes() == (again.save_pretrained(tmp_path / "two") / "bank.json").read_bytes()


def test_effects_of_a_context_are_kept_and_may_go_both_ways(llama, contexts, tmp_path):
    edges = [sl.Edge(src="c0", dst="c1", weight=0.5, relation="context", tau=0.5, tau_lo=0.25, tau_hi=0.75)]
    edges.append(sl.Edge(src="c1", dst="c0", weight=0.25, relation="context"))
    contexts.graph = sl.CausalGraph(edges)
    again = sl.ConceptBank.from_pretrained(contexts.save_pretrained(tmp_path / "bank"))
    assert again.graph.edges == contexts.graph.edges
    assert again.graph.descendants("c0") == () and again.graph.forecast({"c0": 1.0}) == {"c0": 1.0}
    with pytest.raises(errors.CorruptBank, match="two"):
        sl.CausalGraph([edges[1], edges[1]])
    found = site(llama, again, {"c0": sl.Do()}, do="graph")  # it is no graph of what the network computes
    torch.testing.assert_close(found, site(llama, again, {"c0": sl.Do()}))
