"""The laws for text, on small real models: positions, rows, schedules, caches, padding, beams, guidance, gates, do."""

import threading
from contextvars import Context
from typing import Any, cast

import pytest
import torch
from conftest import two_directions
from tiny_models import tiny
from transformers import TextIteratorStreamer

import steerlib as sl
from steerlib import errors
from steerlib.bank.concept_bank import SiteFacts
from steerlib.hooks.attach import _ATTACHED

GREEDY = {"do_sample": False, "max_new_tokens": 12}


def prompts(rows=2, length=6, seed=0):
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def ones(ids):
    return torch.ones_like(ids)


def write(model, ids, mask=None, **kwargs):
    return model.generate(ids, attention_mask=ones(ids) if mask is None else mask, **{**GREEDY, **kwargs})


def snapshot(model):
    """Everything a session could leave behind."""
    hooks = [
        (name, tuple(getattr(m, kind)), m.__dict__.get("forward"), m.__dict__.get("_diffusers_hook"))
        for name, m in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    ]
    return hooks, "generate" in model.__dict__


EDITS = {
    "add": {"a": 1.5},
    "rows": {"a": [1.5, -1.0], "b": 0.5},
    "generated": {"a": sl.Add(1.5, tokens="generated")},
    "prompt": {"a": sl.Add(1.5, tokens="prompt")},
    "slice": {"a": sl.Add(1.5, tokens=slice(2, 9))},
    "ramp": {"a": sl.Add(2.0, when=sl.Ramp(sl.Steps(0, 8), first=1.0, last=0.0))},
    "steps": {"a": sl.Set(2.0, when=sl.Steps(2, 6)), "b": sl.Ablate()},
    "gate": {"a": sl.Add(2.0, gate=sl.Gate("b", above=0.0))},
    "mask": {"a": sl.Add(2.0, mask=torch.tensor([0.0, 1.0, 0.5, 0, 0, 1, 1, 1]))},
    "scale": {"a": sl.Scale(3.0), "b": sl.Clamp(-0.1, 0.1)},
}


@pytest.fixture(params=sorted(EDITS))
def edits(request):
    return EDITS[request.param]


# -- caches, padding, batches, beams -------------------------------------------------------------------------


def test_steering_changes_the_text_and_leaving_restores_it(llama, bank):
    ids = prompts()
    plain, before = write(llama, ids), snapshot(llama)
    with sl.steer(llama, bank, {"a": 3.0}):
        assert not torch.equal(write(llama, ids), plain)
    assert torch.equal(write(llama, ids), plain) and snapshot(llama) == before and llama not in _ATTACHED


def test_cache_and_no_cache_agree(llama, bank, edits):
    ids = prompts()
    with sl.steer(llama, bank, edits):
        assert torch.equal(write(llama, ids), write(llama, ids, use_cache=False))


def test_a_static_cache_agrees(llama, bank, edits):
    ids = prompts()
    with sl.steer(llama, bank, edits):
        assert torch.equal(write(llama, ids), write(llama, ids, cache_implementation="static"))


def test_reading_the_prompt_in_chunks_agrees(llama, bank, edits):
    ids = prompts()
    with sl.steer(llama, bank, edits):
        assert torch.equal(write(llama, ids), write(llama, ids, prefill_chunk_size=4))


@pytest.mark.parametrize("cache", [None, "static"])
def test_padded_and_unpadded_rows_agree(llama, bank, edits, cache):
    ids = prompts()
    padded = torch.cat((torch.full((2, 3), 0), ids), 1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), ones(ids)), 1)
    with sl.steer(llama, bank, edits), torch.no_grad():
        assert torch.equal(write(llama, ids), write(llama, padded, mask, cache_implementation=cache)[:, 3:])
        alone = llama(ids).logits
        together = llama(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 3:]
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)


def test_pads_are_never_touched(llama, bank, edits):
    ids = torch.cat((torch.zeros(2, 3, dtype=torch.long), prompts()), 1)
    mask = (ids > 0).long()
    with torch.no_grad(), sl.record(llama, ["layers.0"]) as plain:
        llama(ids, attention_mask=mask)
    with torch.no_grad(), sl.steer(llama, bank, edits), sl.record(llama, ["layers.0"]) as tape:
        llama(ids, attention_mask=mask)
    before, after = plain["layers.0"][0][1], tape["layers.0"][0][1]
    assert torch.equal(before[:, :3], after[:, :3])


def test_a_batch_of_different_settings_equals_single_runs(llama, bank):
    ids = prompts(3)
    amounts = [2.0, 0.0, -1.5]
    with sl.steer(llama, bank, {"a": amounts, "b": sl.Set([0.0, 1.0, 2.0])}):
        together = write(llama, ids)
    for row, (a, b) in enumerate(zip(amounts, [0.0, 1.0, 2.0], strict=True)):
        with sl.steer(llama, bank, {"a": a, "b": sl.Set(b)}):
            assert torch.equal(write(llama, ids[row : row + 1])[0], together[row])


def test_a_row_with_amount_zero_is_as_if_alone_and_unsteered(llama, bank):
    ids = prompts(2)
    plain = write(llama, ids)
    with sl.steer(llama, bank, {"a": [0.0, 3.0]}):
        assert torch.equal(write(llama, ids)[0], plain[0])


@pytest.mark.parametrize("amounts", [2.0, [2.0, -2.0]])
def test_each_beams_score_equals_a_steered_teacher_forced_pass(llama, bank, amounts):
    ids = prompts(2)
    with sl.steer(llama, bank, {"a": amounts}), torch.no_grad():
        out = llama.generate(
            ids, attention_mask=ones(ids), num_beams=3, num_return_sequences=3, max_new_tokens=5, do_sample=False,
            length_penalty=0.0, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    for row, sequence in enumerate(out.sequences):
        amount = amounts if isinstance(amounts, float) else amounts[row // 3]
        with sl.steer(llama, bank, {"a": amount}), torch.no_grad():
            scores = llama(sequence[None]).logits.log_softmax(-1)[0, 5:-1].gather(-1, sequence[6:, None]).sum()
        torch.testing.assert_close(out.sequences_scores[row], scores, atol=1e-4, rtol=0)


def test_sampled_return_sequences_follow_their_prompt(llama, bank):
    with sl.steer(llama, bank, {"a": [0.0, 3.0]}), sl.record(llama, bank, ["a"]) as tape:
        llama.generate(prompts(2), attention_mask=ones(prompts(2)), do_sample=True, num_return_sequences=2, max_new_tokens=2)
    assert tape["a"][0][1].shape[0] == 4
    assert tape["a"][0][1][2:].mean() - tape["a"][0][1][:2].mean() > 1


def test_amounts_for_other_rows_are_refused(llama, bank):
    with sl.steer(llama, bank, {"a": [1.0, 2.0, 3.0]}), pytest.raises(errors.RowMismatch, match="2 rows"):
        write(llama, prompts(2))


def test_output_hidden_states_report_what_flows_on(llama, bank):
    with torch.no_grad(), sl.steer(llama, bank, {"a": 2.0}), sl.record(llama, ["layers.0", "layers.1.in"]) as tape:
        hidden = llama(prompts(), output_hidden_states=True).hidden_states
    assert torch.equal(hidden[1], tape["layers.0"][0][1]) and torch.equal(hidden[1], tape["layers.1.in"][0][1])


def test_assisted_decoding_agrees(llama, bank, edits):
    if "rows" in str(edits) or any(isinstance(v, list) for v in edits.values()):
        edits = {"a": [1.5]}
    helper, ids = tiny("llama"), prompts(1)
    with sl.steer(llama, bank, edits):
        plain = write(llama, ids)
        assert torch.equal(plain, write(llama, ids, assistant_model=helper))
        assert torch.equal(plain, write(llama, ids, prompt_lookup_num_tokens=2))


def test_a_reused_cache_continues_as_one_conversation(llama, bank):
    """The second call's prompt is all it was given, what the first call wrote included."""
    first, edits = prompts(1), {"a": sl.Add(2.0, tokens="prompt"), "b": sl.Add(1.0, tokens="generated")}
    with sl.steer(llama, bank, edits):
        start = llama.generate(first, attention_mask=ones(first), return_dict_in_generate=True, **GREEDY)
        whole = torch.cat((start.sequences, prompts(1, 4, seed=5)), 1)
        with sl.record(llama, bank, ["a"]) as tape:
            write(llama, whole, past_key_values=start.past_key_values)
        states: list[Any] = [state for state, _ in tape["a"]]
    assert states[0].section == "prompt" and states[0].start + states[0].length == whole.shape[1]
    assert all(state.section == "generated" for state in states[1:])
    assert int(states[0].positions[0, 0]) == states[0].start > first.shape[1]


# -- positions and time --------------------------------------------------------------------------------------


def changes(llama, bank, edits, ids, mask=None, **kwargs):
    """How far `a` was moved at each column of prompt and new tokens (columns after the last input are absent)."""
    tokens = write(llama, ids, mask, **kwargs)
    whole = tokens[:, :-1]
    mask = ones(whole) if mask is None else torch.cat((mask, ones(whole[:, mask.shape[1] :])), 1)
    with torch.no_grad(), sl.record(llama, ["layers.0.in"]) as before:
        llama(whole, attention_mask=mask)
    with sl.steer(llama, bank, edits), sl.record(llama, ["layers.0", "layers.0.in"]) as tape:
        llama.generate(
            ids, attention_mask=mask[:, : ids.shape[1]], **{**GREEDY, **kwargs},
            prefix_allowed_tokens_fn=lambda row, sofar: [int(tokens[row, len(sofar)])],
        )  # fmt: skip
    with torch.no_grad(), sl.record(llama, ["layers.0"]) as plain:
        llama(whole, attention_mask=mask)
    assert before
    steered = torch.cat([x for _, x in tape["layers.0"]], 1)
    delta = steered - plain["layers.0"][0][1]
    d = bank.rows(bank["a"]).write[0]
    return delta @ d / d.square().sum()


CLOSED_FORMS = {
    "all": (sl.Add(2.0), lambda column, step: 2.0),
    "prompt": (sl.Add(2.0, tokens="prompt"), lambda column, step: 2.0 * (step == 0)),
    "generated": (sl.Add(2.0, tokens="generated"), lambda column, step: 2.0 * (step > 0)),
    "slice": (sl.Add(2.0, tokens=slice(2, 9)), lambda column, step: 2.0 * (2 <= column < 9)),
    "steps": (sl.Add(2.0, when=sl.Steps(1, 4)), lambda column, step: 2.0 * (1 <= step < 4)),
    "first steps": (sl.Add(2.0, when=sl.Steps(0, 2)), lambda column, step: 2.0 * (step < 2)),
    "ramp": (sl.Add(2.0, when=sl.Ramp(sl.Steps(0, 4))), lambda column, step: 2.0 * min(step / 4, 1)),
    "decay": (sl.Add(2.0, when=sl.Ramp(sl.Steps(2, 4), 1, 0)), lambda column, step: 2.0 * (1 - min(max(step - 2, 0) / 2, 1))),
}


@pytest.mark.parametrize("case", sorted(CLOSED_FORMS))
@pytest.mark.parametrize("pads", [0, 3])
def test_where_and_when_an_edit_acts(llama, bank, case, pads):
    """Positions count from the first real token; step k is the pass that makes new token k."""
    edit, form = CLOSED_FORMS[case]
    ids = torch.cat((torch.zeros(2, pads, dtype=torch.long), prompts()), 1)
    mask = torch.cat((torch.zeros(2, pads, dtype=torch.long), ones(prompts())), 1)
    moved = changes(llama, bank, {"a": edit}, ids, mask, max_new_tokens=8)
    expected = [0.0] * pads + [form(position, max(0, position - 5)) for position in range(moved.shape[1] - pads)]
    torch.testing.assert_close(moved, torch.tensor(expected).expand(2, -1), atol=1e-4, rtol=0)


def test_the_first_new_token_is_not_moved_by_generated(llama, bank):
    ids = prompts()
    plain = write(llama, ids)
    with sl.steer(llama, bank, {"a": sl.Add(5.0, tokens="generated")}):
        steered = write(llama, ids)
    assert torch.equal(plain[:, 6], steered[:, 6]) and not torch.equal(plain, steered)


def test_a_bare_pass_is_all_prompt(llama, bank):
    with torch.no_grad(), sl.steer(llama, bank, {"a": sl.Add(5.0, tokens="generated")}):
        steered = llama(prompts()).logits
    with torch.no_grad():
        assert torch.equal(steered, llama(prompts()).logits)


def test_a_window_is_refused_for_text_with_the_reason(llama, bank):
    with pytest.raises(errors.Unanswerable, match="no progress"):
        sl.steer(llama, bank, {"a": sl.Add(1.0, when=sl.Window(0.0, 0.5))})


def test_a_gate_acts_where_another_concept_reads_high(llama):
    model = llama
    low, high = two_directions(model, "layers.0"), two_directions(model, "layers.1")
    bank = sl.ConceptBank(
        "both",
        [sl.Concept(name="topic", encoder="layers.0", index=0, unit=0.5), sl.Concept(name="tone", encoder="layers.1", index=0)],
        {"layers.0": low.encoder("layers.0"), "layers.1": high.encoder("layers.1")},
        base=low.base, sites=low.sites | high.sites,
    )  # fmt: skip
    ids = prompts()
    with torch.no_grad(), sl.record(model, bank) as plain:
        model(ids)
    edits = {"tone": sl.Add(2.0, gate=sl.Gate("topic", above=0.0))}
    with torch.no_grad(), sl.steer(model, bank, edits), sl.record(model, bank) as tape:
        model(ids)
    topic = plain["topic"][0][1] / 0.5
    torch.testing.assert_close(tape["tone"][0][1] - plain["tone"][0][1], 2.0 * (topic > 0.0), atol=1e-5, rtol=0)
    assert 0 < (topic > 0.0).float().mean() < 1
    with pytest.raises(errors.Unanswerable, match="earlier site"):
        sl.steer(model, bank, {"topic": sl.Add(2.0, gate=sl.Gate("tone", above=0.1))})


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_text_guidance_is_steered_on_the_branch_asked_for(llama, bank, branch, use_cache):
    """Guided scores are g (cond - uncond) + uncond: steering one branch equals steering the passes of that branch."""
    ids, settings = prompts(1), {"guidance_scale": 1.5, "use_cache": use_cache, "max_new_tokens": 6}
    expected = ids
    for _ in range(6):  # by hand: both branches as bare passes, one of them steered
        with torch.no_grad():
            parts = {}
            for name, tokens in (("cond", expected), ("uncond", expected[:, 5:])):
                if name == branch:
                    with sl.steer(llama, bank, {"a": 4.0}):
                        parts[name] = llama(tokens).logits[:, -1].log_softmax(-1)
                else:
                    parts[name] = llama(tokens).logits[:, -1].log_softmax(-1)
        scores = 1.5 * (parts["cond"] - parts["uncond"]) + parts["uncond"]
        expected = torch.cat((expected, scores.argmax(-1, keepdim=True)), 1)
    with sl.steer(llama, bank, {"a": 4.0}, branch=branch):
        assert torch.equal(write(llama, ids, **settings), expected)


# -- patches and recording -----------------------------------------------------------------------------------


def test_patching_a_concept_replays_another_run(llama, bank):
    source, target = prompts(1, seed=1), prompts(1, seed=2)
    with torch.no_grad(), sl.record(llama, bank, ["a"]) as tape:
        llama(source)
    with torch.no_grad(), sl.steer(llama, bank, {"a": sl.Patch(tape)}), sl.record(llama, bank, ["a"]) as seen:
        llama(target)
    torch.testing.assert_close(seen["a"][0][1], tape["a"][0][1], atol=1e-5, rtol=0)
    with pytest.raises(errors.BadEdit, match="does not hold 'b'"):
        sl.steer(llama, bank, {"b": sl.Patch(tape)})


def test_positions_that_were_not_recorded_are_left_alone(llama, bank):
    with torch.no_grad(), sl.record(llama, bank, ["a"]) as tape:
        llama(prompts(1, 3))
    with torch.no_grad(), sl.record(llama, bank, ["a"]) as plain:
        llama(prompts(1))
    with torch.no_grad(), sl.steer(llama, bank, {"a": sl.Patch(tape)}), sl.record(llama, bank, ["a"]) as seen:
        llama(prompts(1))
    torch.testing.assert_close(seen["a"][0][1][:, 3:], plain["a"][0][1][:, 3:], atol=1e-6, rtol=0)


def test_recording_under_generate_sees_every_position_once(llama):
    with sl.record(llama, ["layers.1"]) as tape:
        out = write(llama, prompts())
    columns = torch.cat([state.positions[0] for state, _ in tape["layers.1"]])
    assert columns.tolist() == list(range(out.shape[1] - 1))


# -- composition and sessions --------------------------------------------------------------------------------


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_nested_sessions_add_up(llama, bank):
    ids = prompts()
    with sl.steer(llama, bank, {"a": 1.0}), sl.steer(llama, bank, {"a": 0.5, "b": 2.0}):
        nested = logits(llama, ids)
    with sl.steer(llama, bank, {"a": 1.5, "b": 2.0}):
        torch.testing.assert_close(nested, logits(llama, ids), atol=1e-5, rtol=0)


def test_leaving_an_inner_session_leaves_the_outer_one(llama, bank):
    ids = prompts()
    with sl.steer(llama, bank, {"a": 1.0}):
        alone = logits(llama, ids)
        with sl.steer(llama, bank, {"b": 2.0}):
            assert not torch.equal(logits(llama, ids), alone)
        assert torch.equal(logits(llama, ids), alone)


def test_several_banks_at_once(llama):
    one, other = two_directions(llama, "layers.0"), two_directions(llama, "layers.1")
    with sl.steer(llama, one, {"a": 1.0}), sl.steer(llama, other, {"a": 1.0}), sl.record(llama, ["layers.1"]) as tape:
        logits(llama, prompts())
    with sl.steer(llama, one, {"a": 1.0}), sl.record(llama, ["layers.1"]) as single:
        logits(llama, prompts())
    moved = tape["layers.1"][0][1] - single["layers.1"][0][1]
    torch.testing.assert_close(moved, other.rows(other["a"]).write[0].expand_as(moved), atol=1e-5, rtol=0)


def test_the_same_concept_set_twice_is_a_conflict(llama, bank):
    with sl.steer(llama, bank, {"a": sl.Set(1.0)}) as outer:
        with pytest.raises(errors.ConflictingEdits, match="'a'"), sl.steer(llama, bank, {"a": sl.Ablate()}):
            pass
        before = logits(llama, prompts())
        assert len(outer.runs) == 1
    with sl.steer(llama, bank, {"a": sl.Set(1.0)}):
        assert torch.equal(before, logits(llama, prompts()))
    with pytest.raises(errors.ConflictingEdits, match="named twice"):
        sl.steer(llama, bank, {"a": 1.0, "layers.0/0": 1.0})


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind_when_a_run_breaks_off(llama, bank, error):
    def own(module, args, output):
        calls.append(1)
        if len(calls) > 3:
            raise error("midway")

    calls = []
    handle = llama.model.layers[1].register_forward_hook(own)
    before = snapshot(llama)
    with pytest.raises(error, match="midway"), sl.steer(llama, bank, {"a": 1.0}):
        write(llama, prompts())
    assert snapshot(llama) == before and llama.model.layers[1]._forward_hooks[handle.id] is own


def test_a_session_that_cannot_start_changes_nothing(llama, bank):
    before = snapshot(llama)
    broken = sl.ConceptBank(
        "broken",
        [sl.Concept(name="x", encoder="layers.0", index=0), sl.Concept(name="y", encoder="layers.9", index=0)],
        {"layers.0": bank.encoder("layers.0"), "layers.9": bank.encoder("layers.0")},
        base=bank.base,
        sites={"layers.0": bank.sites["layers.0"], "layers.9": bank.sites["layers.0"]},
    )
    with pytest.raises(errors.UnknownSite, match="layers.1"):
        sl.attach(llama, broken)
    assert snapshot(llama) == before


def test_a_site_that_is_never_reached_is_an_error(bank, llama):
    llama.extra = torch.nn.Linear(32, 32)
    idle = sl.ConceptBank.from_directions({"a": torch.ones(32)}, site="extra", base=llama)
    missed = pytest.raises(errors.SiteNotReached, match="'extra'")
    with sl.steer(llama, bank, {"a": 1.0}), missed, sl.steer(llama, idle, {"a": 1.0}):
        logits(llama, prompts())


def test_the_report_says_what_happened_and_why_nothing_did(llama, bank):
    with sl.steer(llama, bank, {"a": 1.0}) as session:
        assert "did not run" in str(session.report())
        write(llama, prompts())
    line = session.report().lines[0]
    assert (line.concept, line.site, line.passes, line.tokens) == ("a", "layers.0", 12, 17)
    with sl.steer(llama, bank, {"a": sl.Add(1.0, tokens="generated")}) as session:
        logits(llama, prompts())
    assert "no schedule" in str(session.report())


# -- do ------------------------------------------------------------------------------------------------------


@pytest.fixture
def levels(llama):
    """Concept `cause` at layer 0, `effect` and `side` at layer 1, joined by a graph."""
    g = torch.Generator().manual_seed(3)
    vectors = torch.randn(3, 32, generator=g)
    return sl.ConceptBank(
        "levels",
        [sl.Concept(name="cause", encoder="layers.0", index=0, unit=0.5)]
        + [sl.Concept(name=n, encoder="layers.1", index=i, unit=2.0) for i, n in enumerate(("effect", "side"))],
        {"layers.0": sl.Directions(vectors[:1]), "layers.1": sl.Directions(vectors[1:])},
        base=sl.BaseModel.of(llama),
        sites={"layers.0": SiteFacts(width=32), "layers.1": SiteFacts(width=32)},
        graph=sl.CausalGraph([sl.Edge(src="cause", dst="effect", weight=0.7)]),
    )


def readings(llama, levels, edits, ids, run=logits, **options):
    with sl.steer(llama, levels, edits, **options), sl.record(llama, levels) as tape:
        run(llama, ids)
    return {name: torch.cat([z for _, z in passes], 1) for name, passes in tape.items()}


@pytest.mark.parametrize("run", [logits, write])
def test_hold_keeps_descendants_at_their_unsteered_reading(llama, levels, run):
    """For generated text the twin reads the steered tokens, so a bare unsteered pass over them is the oracle."""
    ids = prompts()
    with sl.steer(llama, levels, {"cause": 6.0}, do="hold"):
        whole = write(llama, ids)[:, :-1] if run is write else ids
    plain = readings(llama, levels, {}, whole)
    held = readings(llama, levels, {"cause": 6.0}, ids, run, do="hold")
    torch.testing.assert_close(held["effect"], plain["effect"], atol=1e-4, rtol=0)
    assert (held["side"] - plain["side"]).abs().max() > 1e-2
    torch.testing.assert_close(held["cause"] - plain["cause"], torch.full_like(plain["cause"], 3.0), atol=1e-4, rtol=0)
    both = readings(llama, levels, {"cause": 6.0}, ids, run, do="hold", hold=["side"], free=["effect"])
    if run is logits:
        torch.testing.assert_close(both["side"], plain["side"], atol=1e-4, rtol=0)
        assert (both["effect"] - plain["effect"]).abs().max() > 1e-2


def test_hold_is_refused_where_a_twin_cannot_follow(llama, levels):
    ids = prompts()
    for settings in ({"num_beams": 2}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(errors.Unanswerable, match="hold"), sl.steer(llama, levels, {"cause": 1.0}, do="hold"):
            write(llama, ids[:1], **settings)


def test_graph_adds_the_forecast_at_the_later_site(llama, levels):
    ids = prompts()
    plain = readings(llama, levels, {"cause": 6.0}, ids)
    graph = readings(llama, levels, {"cause": 6.0}, ids, do="graph")
    added = 6.0 * 0.7 * 2.0 * torch.ones_like(plain["effect"])
    torch.testing.assert_close(graph["effect"] - plain["effect"], added, atol=1e-4, rtol=0)


def test_a_set_concept_is_cut_from_its_parents(llama, levels):
    graph = readings(llama, levels, {"cause": 6.0, "effect": sl.Set(0.25)}, prompts(), do="graph")
    torch.testing.assert_close(graph["effect"], torch.full_like(graph["effect"], 0.5), atol=1e-4, rtol=0)


def test_hold_and_free_belong_to_hold(llama, levels):
    with pytest.raises(errors.BadEdit, match="do='hold'"):
        sl.steer(llama, levels, {"cause": 1.0}, hold=["side"])


# -- guard ---------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(llama):
    d = torch.zeros(32)
    d[0] = 1.0
    return sl.ConceptBank(
        "guarded",
        [sl.Concept(name="a", encoder="layers.0", index=0, unit=0.1, natural=(-0.2, 0.3), range=(-5.0, 5.0), beyond="noise")],
        {"layers.0": sl.Directions(d[None])},
        base=sl.BaseModel.of(llama),
        sites={"layers.0": SiteFacts(width=32, norm=2.0)},
    )


def moved_by(llama, guarded, edit, **options):
    with sl.record(llama, ["layers.0"]) as plain:
        logits(llama, prompts())
    with sl.steer(llama, guarded, {"a": edit}, **options), sl.record(llama, ["layers.0"]) as tape:
        logits(llama, prompts())
    return plain["layers.0"][0][1], tape["layers.0"][0][1]


def test_an_addition_is_capped_at_a_share_of_the_sites_norm(llama, guarded):
    with pytest.warns(errors.OutOfRange, match="capped at 0.7"), pytest.warns(errors.OutOfRange, match="beyond: noise"):
        before, after = moved_by(llama, guarded, 30.0)
    torch.testing.assert_close((after - before).norm(dim=-1), torch.full((2, 6), 0.7), atol=1e-5, rtol=0)
    with pytest.warns(errors.OutOfRange, match="beyond: noise"):
        before, after = moved_by(llama, guarded, 30.0, allow_ood=True)
    torch.testing.assert_close((after - before).norm(dim=-1), torch.full((2, 6), 3.0), atol=1e-5, rtol=0)


def test_a_value_is_capped_at_the_natural_ones(llama, guarded):
    with pytest.warns(errors.OutOfRange, match="'a' is capped at its natural values, -2.00 to .3.00 units"):
        _, after = moved_by(llama, guarded, sl.Set(9.0), allow_ood=False)
    torch.testing.assert_close(after[..., 0], torch.full((2, 6), 0.3), atol=1e-5, rtol=0)


# -- sockets and threads -------------------------------------------------------------------------------------


def test_an_attached_model_without_edits_is_bit_identical(llama, bank):
    plain = logits(llama, prompts())
    steering = sl.attach(llama, bank)
    assert torch.equal(logits(llama, prompts()), plain)
    steering.set({"a": 2.0})
    steered = logits(llama, prompts())
    steering.clear()
    assert torch.equal(logits(llama, prompts()), plain) and not torch.equal(steered, plain)
    steering.detach()
    with sl.steer(llama, bank, {"a": 2.0}):
        assert torch.equal(logits(llama, prompts()), steered)


def test_one_session_acts_in_every_thread_streaming_included(llama, bank):
    with sl.steer(llama, bank, {"a": 3.0}):
        expected = write(llama, prompts(1))
        found = []
        thread = threading.Thread(target=lambda: found.append(write(llama, prompts(1))))
        thread.start()
        thread.join()
        assert torch.equal(found[0], expected)

        class Tokens:  # what TextIteratorStreamer needs of a tokenizer
            def decode(self, ids, **_):
                return " ".join(map(str, torch.as_tensor(ids).flatten().tolist()))

        streamer = TextIteratorStreamer(cast(Any, Tokens()), skip_prompt=True, timeout=30)
        thread = threading.Thread(target=lambda: write(llama, prompts(1), streamer=streamer))
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text.split() == [str(t) for t in expected[0, 6:].tolist()]


def test_each_thread_uses_its_own_session_and_one_without_raises(llama, bank):
    amounts, found, refused = (1.0, -2.0, 3.0), {}, []
    expected = {}
    for amount in amounts:
        with sl.steer(llama, bank, {"a": amount}):
            expected[amount] = write(llama, prompts(1))
    inside, done = threading.Barrier(len(amounts) + 1), threading.Barrier(len(amounts) + 1)

    def work(amount):
        with sl.steer(llama, bank, {"a": amount}):
            inside.wait(30)
            found[amount] = write(llama, prompts(1))
            done.wait(30)

    threads = [threading.Thread(target=work, args=(amount,)) for amount in amounts]
    for thread in threads:
        thread.start()
    inside.wait(30)
    try:
        Context().run(write, llama, prompts(1))  # where nothing that another test forgot is entered
    except errors.NoSession as error:
        refused.append(error)
    done.wait(30)
    for thread in threads:
        thread.join()
    assert refused and all(torch.equal(found[a], expected[a]) for a in amounts)
    assert llama not in _ATTACHED


def test_a_session_can_be_entered_again(llama, bank):
    session = sl.steer(llama, bank, {"a": 3.0})
    plain = logits(llama, prompts())
    for _ in range(2):
        with session:
            assert not torch.equal(logits(llama, prompts()), plain)
        assert torch.equal(logits(llama, prompts()), plain)


def test_sessions_that_come_and_go_in_threads_keep_to_themselves(llama, bank):
    """Eight threads enter and leave at random moments; each always sees its own amount or, alone, nobody else's."""
    expected = {}
    for amount in range(8):
        with sl.steer(llama, bank, {"a": float(amount)}):
            expected[amount] = logits(llama, prompts())
    wrong = []

    def work(amount):
        for _ in range(25):
            with sl.steer(llama, bank, {"a": float(amount)}):
                if not torch.equal(logits(llama, prompts()), expected[amount]):
                    wrong.append(amount)

    before = snapshot(llama)
    threads = [threading.Thread(target=work, args=(amount,)) for amount in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and snapshot(llama) == before and llama not in _ATTACHED


# -- other ways in which a model comes -----------------------------------------------------------------------


def test_a_model_dispatched_over_devices_is_steered(llama, bank, tmp_path):
    from accelerate import dispatch_model

    with sl.steer(llama, bank, {"a": 2.0, "b": sl.Set(1.0)}):
        expected = write(llama, prompts())
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    places = {**parts, "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread: Any = dispatch_model(llama, cast(Any, places), main_device=cast(Any, "cpu"), offload_dir=tmp_path)
    before = snapshot(spread)
    assert next(spread.model.layers[0].parameters()).is_meta
    with sl.steer(spread, bank, {"a": 2.0, "b": sl.Set(1.0)}):
        assert torch.equal(write(spread, prompts()), expected)
    assert snapshot(spread) == before


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_steered_at_its_outputs(llama, bank):
    small = torch.ao.quantization.quantize_dynamic(llama, {torch.nn.Linear}, dtype=torch.qint8)
    with torch.no_grad(), sl.record(small, ["layers.0"]) as plain:
        small(prompts())
    with torch.no_grad(), sl.steer(small, bank, {"a": 2.0}), sl.record(small, ["layers.0"]) as tape:
        small(prompts())
    moved = tape["layers.0"][0][1] - plain["layers.0"][0][1]
    torch.testing.assert_close(moved, (2.0 * bank.rows(bank["a"]).write[0]).expand_as(moved), atol=1e-5, rtol=0)


def test_gradient_checkpointing_runs_the_same_edits_again(llama, bank):
    def gradient():
        llama.zero_grad()
        with sl.steer(llama, bank, {"a": 2.0, "b": sl.Set(1.0)}):
            llama(prompts(), use_cache=False).logits.square().mean().backward()
        return llama.get_input_embeddings().weight.grad.clone()

    llama.train()
    plain = gradient()
    getattr(llama, "activation_checkpointing_enable", llama.gradient_checkpointing_enable)()
    torch.testing.assert_close(gradient(), plain)


# -- faults that a fresh pair of eyes found ------------------------------------------------------------------


def test_masks_are_not_mistaken_for_each_other(llama, bank):
    plain = logits(llama, prompts())
    for mask, moves in ((None, True), (torch.zeros(6), False), (torch.ones(6), True)):
        with sl.steer(llama, bank, {"a": sl.Add(2.0, mask=mask)}):
            assert torch.equal(logits(llama, prompts()), plain) is not moves


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_padded_prompts_of_models_without_attention_know_where_they_are(model_type):
    model = tiny(model_type)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.cat((torch.zeros(2, 3, dtype=torch.long), prompts()), 1)
    with sl.record(model, ["layers.0", "lm_head"]) as tape:
        write(model, ids, (ids > 0).long())
    states: list[Any] = [state for state, _ in tape["layers.0"]]
    assert [state.start for state in states] == [0, *range(9, 9 + 11)]
    assert [state.section for state in states] == ["prompt"] + ["generated"] * 11
    assert int(states[1].positions.max()) == 6 and states[1].steps.tolist() == [[1]]


def test_what_is_left_of_a_pass_by_the_head_keeps_its_positions(llama):
    with sl.record(llama, ["lm_head"]) as tape:
        write(llama, prompts(), max_new_tokens=3)
    assert [int(state.positions[0, -1]) for state, _ in tape["lm_head"]] == [5, 6, 7]


def test_hold_needs_the_whole_model_and_a_state_it_can_copy(llama, levels):
    with pytest.raises(errors.Unanswerable, match="whole model"), sl.steer(llama, levels, {"cause": 1.0}, do="hold"):
        llama.model(prompts())


def test_nested_graph_sessions_add_up_and_forecasts_keep_to_the_cap(llama, levels):
    ids = prompts()
    once = readings(llama, levels, {"cause": 6.0}, ids, do="graph")
    with sl.steer(llama, levels, {"cause": 2.0}, do="graph"):
        nested = readings(llama, levels, {"cause": 4.0}, ids, do="graph")
    torch.testing.assert_close(nested["effect"], once["effect"], atol=1e-4, rtol=0)
    levels.sites["layers.0"] = SiteFacts(width=32, norm=1.0)
    plain = readings(llama, levels, {}, ids)
    with pytest.warns(errors.OutOfRange):
        capped = readings(llama, levels, {"cause": 20.0}, ids, do="graph")
    moved = (capped["cause"] - plain["cause"])[0, 0]
    length = levels.rows(levels["cause"]).write.norm()
    torch.testing.assert_close(moved, 0.35 / length, atol=1e-4, rtol=0)


def test_a_generation_config_given_by_place_is_read(llama, bank):
    from transformers import GenerationConfig

    config = GenerationConfig(guidance_scale=1.5, max_new_tokens=4, do_sample=False, pad_token_id=0)
    ids = prompts(1)
    with sl.steer(llama, bank, {"a": 4.0}, branch="uncond"):
        by_place = llama.generate(ids, config, attention_mask=ones(ids))
        assert torch.equal(by_place, llama.generate(ids, generation_config=config, attention_mask=ones(ids)))


def test_without_guidance_every_pass_is_conditional(llama, bank):
    plain = write(llama, prompts())
    with sl.steer(llama, bank, {"a": 4.0}, branch="uncond"):
        assert torch.equal(write(llama, prompts()), plain)
    with sl.steer(llama, bank, {"a": 4.0}, branch="cond"):
        assert not torch.equal(write(llama, prompts()), plain)


def test_a_bare_pass_of_another_model_inside_generate_is_all_prompt(llama, bank):
    other = tiny("llama")
    with sl.record(other, ["layers.0"]) as tape:
        write(llama, prompts(), prefix_allowed_tokens_fn=lambda row, sofar: (other(sofar[None]), list(range(128)))[1])
    assert tape == {"layers.0": []} or all(state.section == "prompt" for state, _ in tape["layers.0"])
    with sl.record(llama, ["layers.0"]), sl.record(other, ["layers.0"]) as tape:
        write(llama, prompts(), prefix_allowed_tokens_fn=lambda row, sofar: (other(sofar[None]), list(range(128)))[1])
    assert all(state.section == "prompt" for state, _ in tape["layers.0"])


def test_a_loose_clamp_is_not_tightened_and_bounds_may_differ_by_row(llama, guarded):
    before, after = moved_by(llama, guarded, sl.Clamp(high=100.0))
    assert torch.equal(before, after)
    before, after = moved_by(llama, guarded, sl.Clamp(low=[-1.0, 0.5]))
    assert after[0, :, 0].min() >= -0.1 - 1e-6 and after[1, :, 0].min() >= 0.05 - 1e-6


def test_masks_and_tapes_follow_their_prompt_over_beams(llama, bank):
    ids = prompts(2)
    with torch.no_grad(), sl.record(llama, bank, ["b"]) as tape:
        llama(ids)
    mask = torch.stack((torch.zeros(30), torch.ones(30)))
    with sl.steer(llama, bank, {"a": sl.Add(3.0, mask=mask), "b": sl.Patch(tape)}):
        together = write(llama, ids, num_beams=2)
    with torch.no_grad(), sl.record(llama, bank, ["b"]) as tape:
        llama(ids[1:])
    with sl.steer(llama, bank, {"a": 3.0, "b": sl.Patch(tape)}):
        assert torch.equal(write(llama, ids[1:], num_beams=2)[0], together[1])


def test_parallel_directions_cannot_both_be_given_a_value(llama):
    d = torch.randn(32, generator=torch.Generator().manual_seed(0))
    bank = sl.ConceptBank.from_directions({"a": d, "twice a": 2 * d}, site="layers.0", base=llama)
    with pytest.raises(errors.ConflictingEdits, match="depend on each other"):
        sl.steer(llama, bank, {"a": sl.Set(1.0), "twice a": sl.Set(1.0)})


def test_a_refused_set_keeps_the_edits_before_it(llama, bank):
    with sl.steer(llama, bank, {"b": 2.0}) as session:
        before = logits(llama, prompts())
        with sl.steer(llama, bank, {"a": sl.Set(1.0)}), pytest.raises(errors.ConflictingEdits):
            session.set({"a": sl.Set(2.0)})
        assert torch.equal(logits(llama, prompts()), before)


def test_an_empty_session_around_others_leaves_nothing_behind(llama, bank):
    before = snapshot(llama)
    with sl.steer(llama, bank, {}):
        with sl.steer(llama, bank, {"a": 1.0}):
            logits(llama, prompts())
        steering = sl.attach(llama, bank)
    steering.set({"a": 1.0})
    logits(llama, prompts())
    steering.detach()
    assert snapshot(llama) == before and llama not in _ATTACHED


def test_an_attached_model_that_is_not_compiled_has_no_limits(llama, bank):
    steering = sl.attach(llama, bank).set({"a": 1.0, "b": 1.0})
    with sl.steer(llama, bank, {"a": 0.5}), sl.record(llama, ["layers.0"]) as tape:
        logits(llama, prompts())
    steering.set({"a": [1.0] * 70})
    assert logits(llama, prompts(70)).shape[0] == 70 and tape["layers.0"]
    steering.detach()


def test_warnings_are_given_every_time(llama, guarded):
    for _ in range(2):
        with pytest.warns(errors.OutOfRange, match="beyond: noise"):
            sl.steer(llama, guarded, {"a": 5.5})


def test_reports_tell_where_edits_acted(llama, bank):
    with sl.steer(llama, bank, {"a": sl.Add(2.0, when=sl.Steps(500, 600))}) as session:
        write(llama, prompts())
    assert session.report().lines[0].tokens == 0 and "no schedule" in str(session)
    with sl.steer(llama, bank, {"a": sl.Add(2.0, tokens="generated")}) as session:
        write(llama, prompts())
    assert session.report().lines[0].tokens == 11 and session.report().lines[0].largest is not None
    with sl.steer(llama, bank, {"b": 1.0}), sl.steer(llama, bank, {"a": 1.0}) as inner:
        logits(llama, prompts())
        assert inner.report().lines[0].tokens == 6 and inner.report().lines[0].largest is not None


def test_a_thread_that_ran_nothing_is_not_told_that_it_missed_a_site(llama, bank):
    inside, ran, left = threading.Event(), threading.Event(), []

    def idle():
        with sl.steer(llama, bank, {"a": 1.0}):
            inside.set()
            ran.wait(30)
        left.append(True)

    thread = threading.Thread(target=idle)
    thread.start()
    inside.wait(30)
    with sl.steer(llama, bank, {"b": 1.0}):
        logits(llama, prompts())
        ran.set()
        thread.join()
    assert left
