"""Concepts that move at several sites, gates and lengths: against hooks written by hand, on a small real model."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import jaxtyping
import pytest
import torch
from tiny_models import tiny
from torch import Tensor

import steerlib as sl
from steerlib import errors
from steerlib.bank.concept_bank import SiteFacts
from steerlib.steering.lowering import SHARE

SITES = ["layers.0", "layers.1", "layers.2"]
UNITS = (0.5, 0.3, 0.2)
"""Of `tone`, site by site."""
NORMS = (20.0, 25.0, 30.0)
"""What the bank says activations measure: more than here, so that caps are out of the way."""
RAMP = sl.Gate("topic", above=-1.0, full=1.0)


def prompts(rows=2, length=7, seed=0):
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def llama():
    """Three blocks, whose activations are long enough for small edits to matter."""
    model = tiny("llama", num_hidden_layers=3)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(40)
    return model


class Seen(NamedTuple):
    """One pass: the activations at every site, and the logits."""

    at: list[Tensor]
    logits: Tensor


def observe(model, ids, bank: sl.ConceptBank | None = None, edits: Any = None, **options):
    """A pass, steered or not."""
    with torch.no_grad(), ExitStack() as stack:
        if bank is not None:
            stack.enter_context(sl.steer(model, bank, edits, **options))
        tape = stack.enter_context(sl.record(model, SITES))
        logits = model(ids).logits
    return Seen([tape[site][0][1] for site in SITES], logits)


def by_hand(model, ids, change: Callable[[int, Tensor], Tensor]):
    """A pass whose block i gives `change(i, x)` in place of x, without the library."""
    at = []

    def hook(i):
        def run(module, args, x):
            at.append(change(i, x))
            return at[-1]

        return run

    with ExitStack() as stack:
        for i, block in enumerate(model.model.layers):
            stack.callback(block.register_forward_hook(hook(i)).remove)
        return Seen(at, model(ids).logits)


def close(found, expected, atol=1e-5):
    for ours, theirs in zip((*found.at, found.logits), (*expected.at, expected.logits), strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def made(model):
    """`topic` and `tone` at block 0 and `effect` at block 1; `tone` moves at all three, `effect` at blocks 1 and 2."""
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(2, 32, generator=generator) for _ in SITES]
    vectors = [rows / rows.norm(dim=-1, keepdim=True) for rows in drawn]
    tone = sl.Concept(
        name="tone", encoder="layers.0", index=1, unit=UNITS[0],
        parts=tuple(sl.Part(encoder=site, index=0, unit=unit) for site, unit in zip(SITES[1:], UNITS[1:], strict=True)),
    )  # fmt: skip
    return sl.ConceptBank(
        "levers",
        [
            sl.Concept(name="topic", encoder="layers.0", index=0, unit=0.5, present=0.3),
            tone,
            sl.Concept(name="effect", encoder="layers.1", index=1, parts=(sl.Part(encoder="layers.2", index=1, unit=0.4),)),
        ],
        {site: sl.Directions(rows, torch.tensor([0.1, -0.2])) for site, rows in zip(SITES, vectors, strict=True)},
        base=sl.BaseModel.of(model),
        sites={site: SiteFacts(width=32, norm=norm) for site, norm in zip(SITES, NORMS, strict=True)},
        graph=sl.CausalGraph([sl.Edge(src="tone", dst="effect", weight=0.7)]),
    )  # fmt: skip


@pytest.fixture
def bank(llama):
    return made(llama)


def known(bank, name="tone", **facts):
    """The same bank with other facts about one concept."""
    return bank.with_concepts([replace(c, **facts) if c.name == name else c for c in bank.concepts.values()])


def directions(bank, name="tone"):
    return [bank.rows(place).write[0] for place in bank[name].places]


def readings(bank, at, name="tone"):
    """What a concept reads at each of its places, in the units there."""
    places = bank[name].places
    found = [at[SITES.index(bank.site_of(place))] for place in places]
    return [bank.encoder(p.encoder).encode(x)[..., p.index] / p.unit for p, x in zip(places, found, strict=True)]


def moved(bank, share, to):
    """`x + share (to(z) - z) unit d` at each place of `tone`: z in units, one share for all places."""

    def change(i, x):
        z, d = (bank.encoder(SITES[i]).encode(x)[..., bank["tone"].places[i].index] / UNITS[i]), directions(bank)[i]
        return x + (share * (to(z) - z) * UNITS[i])[..., None] * d

    return change


# -- several sites -------------------------------------------------------------------------------------------

RULES: dict[str, tuple[Callable[..., sl.Intervention], Callable[[Tensor], Tensor]]] = {
    "add": (lambda **how: sl.Add(2.0, **how), lambda z: z + 2.0),
    "rows": (lambda **how: sl.Add([2.0, -1.5], **how), lambda z: z + torch.tensor([[2.0], [-1.5]])),
    "scale": (lambda **how: sl.Scale(0.5, **how), lambda z: 0.5 * z),
    "set": (lambda **how: sl.Set(1.5, **how), lambda z: torch.full_like(z, 1.5)),
    "ablate": (lambda **how: sl.Ablate(**how), torch.zeros_like),
    "clamp": (lambda **how: sl.Clamp(-0.5, 0.5, **how), lambda z: z.clamp(-0.5, 0.5)),
}
GATES: dict[str, tuple[dict[str, Any], sl.Gate | None, Callable[[Tensor], Tensor]]] = {
    "no gate": ({}, None, torch.ones_like),
    "above": ({"gate": sl.Gate("topic", above=0.5)}, None, lambda z: (z > 0.5).float()),
    "below": ({"gate": sl.Gate("topic", below=0.5)}, None, lambda z: (z < 0.5).float()),
    "full": ({"gate": RAMP}, None, lambda z: ((z + 1) / 2).clamp(0, 1)),
    "present": ({"gate": sl.Gate("topic")}, None, lambda z: (z > 0.3).float()),
    "stored": ({}, RAMP, lambda z: ((z + 1) / 2).clamp(0, 1)),
    "stored present": ({}, sl.Gate("topic"), lambda z: (z > 0.3).float()),
    "own and stored": ({"gate": sl.Gate("topic", above=0.5)}, RAMP, lambda z: (z > 0.5) * ((z + 1) / 2).clamp(0, 1)),
    "open before stored": ({"gate": "open"}, RAMP, torch.ones_like),
}
"""What the edit brings, what is stored with the concept, and the share of an edit by the reading of `topic` in units."""


@pytest.mark.parametrize("gate", sorted(GATES))
@pytest.mark.parametrize("rule", sorted(RULES))
def test_an_intervention_acts_alike_at_every_place_of_a_concept(llama, bank, rule, gate):
    (make, to), (how, stored, form) = RULES[rule], GATES[gate]
    bank, ids = known(bank, gate=stored), prompts()
    topic = readings(bank, observe(llama, ids).at, "topic")[0]
    share = form(topic)
    assert gate in ("no gate", "open before stored") or 0 < share.mean() < 1
    with torch.no_grad():
        expected = by_hand(llama, ids, moved(bank, share, to))
    close(observe(llama, ids, bank, {"tone": make(**how)}), expected)


def test_an_addition_moves_each_site_by_that_parts_unit(llama, bank):
    """Against the same bank without the last part, which leaves everything before that site alone."""
    tone = bank["tone"]
    seen = [observe(llama, prompts(), known(bank, parts=tone.parts[:n]), {"tone": 2.0}).at for n in range(len(SITES))]
    for i, (before, after) in enumerate(zip([observe(llama, prompts()).at, *seen], seen, strict=False)):
        step = 2.0 * UNITS[i] * directions(bank)[i]
        torch.testing.assert_close(after[i] - before[i], step.expand_as(after[i]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("edit", "low", "high"), [(sl.Set(1.5), 1.5, 1.5), (sl.Ablate(), 0, 0), (sl.Clamp(-0.5, 0.5), -0.5, 0.5)]
)
def test_a_target_is_read_at_every_place(llama, bank, edit, low, high):
    plain = readings(bank, observe(llama, prompts()).at)
    for z, before in zip(readings(bank, observe(llama, prompts(), bank, {"tone": edit}).at), plain, strict=True):
        assert low - 1e-4 <= z.min() and z.max() <= high + 1e-4 and (before.min() < low or before.max() > high)


def test_a_value_beyond_the_natural_ones_is_capped_at_as_many_units_everywhere(llama, bank):
    bank = known(bank, natural=(-0.5, 0.75))  # raw: -1 to 1.5 units
    with pytest.warns(errors.OutOfRange, match="capped at its natural values, -1.00 to .1.50 units") as told:
        seen = observe(llama, prompts(), bank, {"tone": sl.Set(9.0)})
    assert len(told) == 1
    for z in readings(bank, seen.at):
        torch.testing.assert_close(z, torch.full_like(z, 1.5), atol=1e-4, rtol=0)
    for z in readings(bank, observe(llama, prompts(), bank, {"tone": sl.Set(1.75)}, allow_ood=True).at):
        torch.testing.assert_close(z, torch.full_like(z, 1.75), atol=1e-4, rtol=0)


def test_a_warning_is_given_once_for_a_concept_and_once_for_a_site(llama, bank):
    twice = tuple(replace(part, encoder="layers.1", index=i) for i, part in enumerate(bank["tone"].parts))
    for edits, facts, expected in [
        ({"tone": 2.0}, {"range": (-1.0, 1.0), "beyond": "noise"}, ["beyond: noise"]),
        ({"tone": 30.0}, {"parts": twice}, ["'layers.0' is capped", "'layers.1' is capped"]),
    ]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            sl.steer(llama, known(bank, **facts), edits)
        texts = [str(warning.message) for warning in told]
        assert len(texts) == len(expected) and all(e in text for e, text in zip(expected, texts, strict=True))
        assert all(text.count("'tone'") == 1 for text in texts)


def test_a_tape_cannot_be_replayed_at_several_sites(llama, bank):
    with torch.no_grad(), sl.record(llama, bank, ["tone"]) as tape:
        llama(prompts())
    with pytest.raises(errors.Unanswerable, match="one reading of 'tone', which moves at 3 sites"):
        sl.steer(llama, bank, {"tone": sl.Patch(tape)})


def test_the_report_has_a_line_for_every_place(llama, bank):
    with sl.steer(llama, bank, {"tone": sl.Set(1.5)}) as session:
        llama(prompts())
    lines = session.report().lines
    assert [(line.concept, line.site, line.tokens) for line in lines] == [("tone", site, 7) for site in SITES]
    assert [line.largest for line in lines] == pytest.approx([1.5] * 3, abs=1e-4)


# -- gates and lengths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["no gate", "full", "stored present"])
@pytest.mark.parametrize("where", ["edit", "concept"])
def test_match_norm_multiplies_each_change_by_the_tokens_length_over_the_median(llama, bank, gate, where):
    how, stored, form = GATES[gate]
    bank = known(bank, gate=stored, match_norm=where == "concept")
    edit = sl.Add([1.5, -1.0], match_norm=where == "edit", **how)
    share = form(readings(bank, observe(llama, prompts()).at, "topic")[0])

    def change(i, x):
        length = x.norm(dim=-1) / NORMS[i]
        return moved(bank, share * length, lambda z: z + torch.tensor([[1.5], [-1.0]]))(i, x)

    with torch.no_grad():
        expected = by_hand(llama, prompts(), change)
    close(observe(llama, prompts(), bank, {"tone": edit}), expected)


def test_lengths_matter_to_additions_only(llama, bank):
    for edit in (sl.Set(1.5), sl.Scale(0.5)):
        plain, matched = (observe(llama, prompts(), known(bank, match_norm=m), {"tone": edit}) for m in (False, True))
        close(matched, plain, atol=0)


def test_a_change_that_grew_with_its_token_is_cut_to_the_cap(llama, bank):
    plain, bank = observe(llama, prompts()).at[0], known(bank, match_norm=True, parts=())
    lengths = plain.norm(dim=-1)
    median = float(lengths.median())
    bank.sites["layers.0"], cap = SiteFacts(width=32, norm=median), SHARE * median
    amount = 0.99 * cap / UNITS[0]  # d is of length 1: too long only where a token is longer than the median
    with pytest.warns(errors.OutOfRange, match="at run time"):
        after = observe(llama, prompts(), bank, {"tone": amount}).at[0]
    expected = (0.99 * cap * lengths / median).clamp(max=cap)
    assert (expected < cap).any() and (expected == cap).any()
    torch.testing.assert_close((after - plain).norm(dim=-1), expected, atol=1e-5, rtol=0)


def test_edits_of_several_sessions_keep_their_own_gates(llama, bank):
    stored, ids = known(bank, gate=RAMP), prompts()
    topic = readings(bank, observe(llama, ids).at, "topic")[0]
    stored_share = ((topic + 1) / 2).clamp(0, 1)
    share = stored_share + 0.5 * (topic > 0.5) * stored_share + 0.25
    with torch.no_grad():
        expected = by_hand(llama, ids, moved(bank, share, lambda z: z + 2.0))
    with (
        sl.steer(llama, stored, {"tone": 2.0}),
        sl.steer(llama, stored, {"tone": sl.Add(1.0, gate=sl.Gate("topic", above=0.5))}),
    ):
        close(observe(llama, ids, stored, {"tone": sl.Add(0.5, gate="open")}), expected)


def test_a_gate_needs_a_threshold_a_known_concept_and_an_earlier_site(llama, bank):
    with pytest.raises(errors.BadEdit, match=r"'effect' is present; give the gate a bound: Gate\('effect', above=1.0\)"):
        sl.steer(llama, bank, {"tone": sl.Add(1.0, gate=sl.Gate("effect"))})
    with pytest.raises(errors.UnknownConcept, match="did you mean 'topic'"):
        sl.steer(llama, bank, {"tone": sl.Add(1.0, gate=sl.Gate("topics", above=0.0))})
    late = sl.Gate("effect", above=0.0)
    for edits, stored in (({"tone": sl.Add(1.0, gate=late)}, None), ({"tone": 1.0}, late)):
        with pytest.raises(errors.Unanswerable, match="'effect' is read at 'layers.1', after 'tone' is edited at 'layers.0'"):
            sl.steer(llama, known(bank, gate=stored), edits)
    turned = known(bank, encoder="layers.1", index=0, parts=(sl.Part(encoder="layers.0", index=1, unit=1.0),))
    with pytest.raises(errors.Unanswerable, match="after 'tone' is edited at 'layers.0'"):  # a part counts as well
        sl.steer(llama, turned, {"tone": sl.Add(1.0, gate=late)})


def test_match_norm_needs_the_length_at_every_site(llama, bank):
    bank.sites["layers.2"] = SiteFacts(width=32)
    with pytest.raises(errors.BadEdit, match="at 'layers.2', which bank 'levers' lacks"):
        sl.steer(llama, bank, {"tone": sl.Add(1.0, match_norm=True)})
    with pytest.raises(errors.BadEdit, match="at 'layers.2'"):
        sl.steer(llama, known(bank, match_norm=True), {"tone": 1.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "edit", [0.0, [0.0, 0.0], sl.Scale(1.0), sl.Clamp(-1e9, 1e9), sl.Add(2.0, gate=sl.Gate("topic", above=1e9))]
)
def test_what_changes_nothing_is_bit_identical_at_every_place(llama, bank, edit, dtype):
    llama, bank = llama.to(dtype), known(bank, gate=RAMP, match_norm=True)
    close(observe(llama, prompts(), bank, {"tone": edit}), observe(llama, prompts()), atol=0)


def test_gradients_reach_the_gate_through_its_ramp(llama, bank):
    """Every place carries the gate's gradient: autograd through hooks by hand that compute the share themselves."""
    found = []
    for library in (True, False):
        d = directions(bank, "topic")[0].clone().requires_grad_()
        if library:
            rows = {site: bank.encoder(site) for site in SITES}
            rows["layers.0"] = sl.Directions(torch.stack((d, rows["layers.0"].decoder[1])), rows["layers.0"].mean)
            learned = sl.ConceptBank("learned", list(bank.concepts.values()), rows, base=bank.base, sites=bank.sites)
            with sl.steer(llama, learned, {"tone": sl.Add(2.0, gate=RAMP, match_norm=True)}):
                logits = llama(prompts()).logits
        else:
            share: list[Tensor] = []

            def change(i, x, d=d, share=share):
                if i == 0:
                    topic = (x @ d / d.square().sum() - 0.1) / 0.5
                    share.append(((topic + 1) / 2).clamp(0, 1))
                length = x.norm(dim=-1) / NORMS[i]
                return x + (share[0] * length * 2.0 * UNITS[i])[..., None] * directions(bank)[i]

            logits = by_hand(llama, prompts(), change).logits
        logits.square().sum().backward()
        found.append(d.grad)
    ours, theirs = found
    assert theirs.norm() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_ramp_is_its_slope_where_it_rises(llama, bank):
    """`tone` reads `z + 2 unit clamp((t - above) / (full - above), 0, 1)`, t = (<x, d> / |d|^2 - mean) / unit of topic."""
    d = directions(bank, "topic")[0].clone().requires_grad_()
    first = bank.encoder("layers.0")
    rows = {
        **{site: bank.encoder(site) for site in SITES},
        "layers.0": sl.Directions(torch.stack((d, first.decoder[1])), first.mean),
    }
    learned = sl.ConceptBank("learned", list(bank.concepts.values()), rows, base=bank.base, sites=bank.sites)
    with sl.steer(llama, learned, {"tone": sl.Add(2.0, gate=RAMP)}), sl.record(llama, learned, ["tone"]) as tape:
        llama(prompts())
    tape["tone"][0][1].sum().backward()
    x, unit = observe(llama, prompts()).at[0], d.detach()
    topic = (x @ unit - 0.1) / 0.5  # d is of length 1
    rises = (topic > -1) & (topic < 1)
    slope = x - 2 * (x @ unit)[..., None] * unit
    assert 0 < rises.float().mean() < 1
    torch.testing.assert_close(d.grad, (2.0 * UNITS[0] / 2 / 0.5) * slope[rises].sum(0), atol=1e-4, rtol=1e-4)


# -- generating ----------------------------------------------------------------------------------------------

WAYS: dict[str, tuple[dict[str, Any], Any]] = {
    "parts": ({}, [2.0, -1.5]),
    "gate": ({"gate": RAMP}, [3.0, -2.0]),
    "lengths": ({"match_norm": True}, [8.0, -6.0]),
    "all": ({"gate": RAMP, "match_norm": True}, [12.0, -8.0]),
    "present": ({"match_norm": True}, sl.Add([12.0, -8.0], gate=sl.Gate("topic"), tokens="generated")),
    "set": ({"gate": RAMP}, sl.Set([2.5, -3.0])),
    "clamp": ({}, sl.Clamp([0.5, -0.5], 2.0)),
}


@pytest.fixture(params=sorted(WAYS))
def way(request, bank):
    """A bank, and an edit of `tone` with an amount for each of two rows."""
    facts, edit = WAYS[request.param]
    return known(bank, **facts), edit


def of_row(edit, row):
    """The edit that one row of a batch gets."""
    if isinstance(edit, list):
        return edit[row]
    name = next(name for name in ("amount", "value", "low") if isinstance(getattr(edit, name, None), tuple))
    return replace(edit, **{name: getattr(edit, name)[row]})


class Written(NamedTuple):
    tokens: Tensor
    logits: Tensor


def write(model, ids, mask=None, **settings):
    """Greedy new tokens, and the logits they were chosen by."""
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, do_sample=False, max_new_tokens=8,
        output_logits=True, return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return Written(out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1))


def agree(found, expected):
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str
)
def test_caches_agree(llama, way, settings):
    bank, edit = way
    plain = write(llama, prompts())
    with sl.steer(llama, bank, {"tone": edit}):
        expected = write(llama, prompts())
        agree(write(llama, prompts(), **settings), expected)
    assert (expected.logits - plain.logits).abs().max() > 1e-2


def test_left_padding_changes_nothing_and_is_not_touched(llama, way):
    bank, edit = way
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), prompts()), 1)
    mask = (padded > 0).long()
    with torch.no_grad(), sl.record(llama, ["layers.0"]) as before:
        llama(padded, attention_mask=mask)
    with sl.steer(llama, bank, {"tone": edit}):
        agree(write(llama, padded, mask), write(llama, prompts()))
        with torch.no_grad(), sl.record(llama, ["layers.0"]) as after:
            llama(padded, attention_mask=mask)
    assert torch.equal(before["layers.0"][0][1][:, :3], after["layers.0"][0][1][:, :3])


def test_rows_of_a_batch_are_steered_as_if_alone(llama, way):
    """The first row is two tokens shorter, so that it is padded in the batch and not when alone."""
    bank, edit = way
    ids = prompts()
    ids[0, :2] = 0
    with sl.steer(llama, bank, {"tone": edit}):
        together = write(llama, ids, (ids > 0).long())
    for row, alone in enumerate((ids[:1, 2:], ids[1:])):
        with sl.steer(llama, bank, {"tone": of_row(edit, row)}):
            agree(write(llama, alone), Written(*(part[row : row + 1] for part in together)))


def test_amounts_follow_their_prompt_over_beams(llama, bank):
    bank = known(bank, gate=RAMP, match_norm=True)
    with sl.steer(llama, bank, {"tone": [12.0, -8.0]}):
        together = write(llama, prompts(), num_beams=2).tokens
    for row, amount in enumerate((12.0, -8.0)):
        with sl.steer(llama, bank, {"tone": amount}):
            assert torch.equal(write(llama, prompts()[row : row + 1], num_beams=2).tokens[0], together[row])


# -- do ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generated", [False, True])
def test_hold_keeps_a_descendant_at_every_place(llama, bank, generated):
    """For generated text a bare pass over the steered tokens tells what an unsteered twin reads."""

    def run(**options):
        with torch.no_grad(), sl.steer(llama, bank, {"tone": 3.0}, **options), sl.record(llama, SITES) as tape:
            tokens = write(llama, prompts()).tokens[:, :-1] if generated else llama(prompts()) and prompts()[:, :0]
        return [torch.cat([x for _, x in tape[site]], 1) for site in SITES], torch.cat((prompts(), tokens), 1)

    held, whole = run(do="hold")
    plain = observe(llama, whole).at
    for ours, theirs in zip(readings(bank, held, "effect"), readings(bank, plain, "effect"), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(readings(bank, held)[0] - 3.0, readings(bank, plain)[0], atol=1e-4, rtol=0)
    free, whole = run(do="hold", free=["effect"])
    for ours, theirs in zip(readings(bank, free, "effect"), readings(bank, observe(llama, whole).at, "effect"), strict=True):
        assert (ours - theirs).abs().max() > 1e-2


def test_a_concept_held_by_name_is_held_at_every_place(llama, bank):
    held = observe(llama, prompts(), bank, {"topic": 3.0}, do="hold", hold=["effect"], allow_ood=True).at
    for ours, theirs in zip(
        readings(bank, held, "effect"), readings(bank, observe(llama, prompts()).at, "effect"), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("facts", [{}, {"gate": RAMP}, {"match_norm": True}])
def test_graph_moves_a_descendant_at_every_place_by_what_its_cause_was_moved(llama, bank, facts):
    bank = known(bank, **facts)
    model, graph = (observe(llama, prompts(), bank, {"tone": 2.0}, do=do).at for do in ("model", "graph"))
    one = observe(llama, prompts(), known(bank, "effect", parts=()), {"tone": 2.0}, do="graph").at
    caused = readings(bank, graph)[0] - readings(bank, observe(llama, prompts()).at)[0]
    first, second = directions(bank, "effect")
    torch.testing.assert_close(graph[1] - model[1], 0.7 * caused[..., None] * first, atol=1e-5, rtol=0)
    torch.testing.assert_close(graph[2] - one[2], 0.7 * 0.4 * caused[..., None] * second, atol=1e-5, rtol=0)


# -- compiled ------------------------------------------------------------------------------------------------


def test_a_compiled_model_moves_every_place_and_refuses_gates_and_lengths(llama, bank, monkeypatch):
    """No concept is at home at `layers.2`, where parts of two must find room."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch would compile the checks of shapes as well
    torch.compiler.reset()
    steering, edits = sl.attach(llama, bank), {"tone": [2.0, -1.0], "effect": sl.Set(0.5)}

    def logits():
        with torch.no_grad():
            return llama(prompts(), use_cache=False).logits

    steering.set(edits)
    eager = logits()
    steering.clear()
    llama.compile(backend="eager")  # the code torch traced, without minutes of code generation
    plain = logits()
    with torch.compiler.set_stance("fail_on_recompile"):
        steering.set(edits)
        torch.testing.assert_close(logits(), eager, atol=1e-5, rtol=0)
        assert (eager - plain).abs().max() > 1e-2
        for refused in (sl.Add(1.0, gate=RAMP), sl.Add(1.0, match_norm=True)):
            with pytest.raises(errors.Unanswerable, match="'tone': gates, .*match_norm.*compiled"):
                steering.set({"tone": refused})
            torch.testing.assert_close(logits(), eager, atol=1e-5, rtol=0)
        for stored in (known(bank, gate=RAMP), known(bank, match_norm=True)):
            with pytest.raises(errors.Unanswerable, match="'tone': gates, .*match_norm.*compiled"):
                sl.steer(llama, stored, {"tone": 1.0}).__enter__()
    torch.compiler.reset()


def test_a_forecast_over_two_edges_is_done_and_said(llama):
    sites = [f"layers.{k}" for k in range(3)]
    concepts = [sl.Concept(name=name, encoder=site, index=0) for name, site in zip("abc", sites, strict=True)]
    encoders = {site: sl.Directions(torch.randn(1, 32)) for site in sites}
    graph = sl.CausalGraph([sl.Edge(src="a", dst="b", weight=0.5), sl.Edge(src="b", dst="c", weight=0.5)])
    bank = sl.ConceptBank(
        "chain", concepts, encoders, base=sl.BaseModel(), sites={site: SiteFacts(width=32) for site in sites}, graph=graph
    )
    with pytest.warns(errors.Unmeasured, match="'c' over two edges or more"):
        sl.steer(llama, bank, {"a": 1.0}, do="graph")
    sl.steer(llama, bank, {"b": 1.0}, do="graph")


def test_the_name_of_a_factor_stands_for_its_values(llama):
    sites = [f"layers.{k}" for k in range(2)]
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    values = [("night", "", 0), ("red", "color", 0), ("blue", "color", 1), ("stone", "ground", 2)]
    concepts = [
        sl.Concept(name=name, factor=factor, encoder=sites[name != "night"], index=index) for name, factor, index in values
    ]
    encoders = {sites[0]: sl.Directions(rows[:1]), sites[1]: sl.Directions(rows[1:])}
    graph = sl.CausalGraph([sl.Edge(src="night", dst=name, weight=1.0) for name in ("red", "blue")])
    facts = {site: SiteFacts(width=32) for site in sites}
    bank = sl.ConceptBank("scene", concepts, encoders, base=sl.BaseModel(), sites=facts, graph=graph)

    def pinned(**options):
        session = sl.steer(llama, bank, {"night": 1.0}, do="hold", **options)
        return {edit.name for edit in session.plan.edits if edit.aim.needs_twin}

    assert pinned() == {"red", "blue"} and pinned(free=["color"]) == set() and pinned(free=["red"]) == {"blue"}
    assert pinned(hold=["ground"]) == {"red", "blue", "stone"}
    with pytest.raises(errors.BadEdit, match="free= 'stone' changes nothing: it does not follow what is edited"):
        pinned(free=["stone"])
    with pytest.raises(errors.BadEdit, match="free= 'ground' changes nothing"):
        pinned(free=["ground"])
    with pytest.raises(errors.BadEdit, match="hold= 'night' changes nothing: it is edited itself"):
        pinned(hold=["night"])
