"""Gates that a whole prompt decides, once for a row: equal to amounts that are given to each row by hand."""

from typing import Any

import pytest
import torch
from conftest import two_directions
from test_beside import bank_for
from test_pipelines import pipe_of, site_of

import steerlib as sl
from steerlib import errors
from steerlib.bank import SiteFacts

IDS = torch.randint(3, 100, (4, 6), generator=torch.Generator().manual_seed(0))
WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
}


def means(model, bank, ids=IDS):
    """What concept b reads of each prompt by mean, first tokens aside."""
    with torch.no_grad(), sl.record(model, bank, ["b"]) as tape:
        model(ids)
    return tape["b"][0][1][:, 1:].mean(1)


def write(model, ids=IDS, mask=None, **settings):
    torch.manual_seed(0)
    given = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    return model.generate(ids, **given | settings)


def gated(**bounds):
    return {"a": sl.Add(4.0, gate=sl.Gate("b", over="prompt", **bounds))}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_gated_row_is_as_if_it_alone_were_given_the_amount(llama, bank, way):
    read = means(llama, bank)
    bound = float(read.median()) + 1e-6
    decided = (read > bound).float()
    with sl.steer(llama, bank, gated(above=bound)):
        found = write(llama, **WAYS[way])
    with sl.steer(llama, bank, {"a": (4.0 * decided).tolist()}):
        assert torch.equal(found, write(llama, **WAYS[way]))
    assert 0 < decided.sum() < 4 and not torch.equal(found, write(llama, **WAYS[way]))


def test_a_gate_that_grows_lets_through_a_share_of_each_row_and_pads_have_no_say(llama, bank):
    read = means(llama, bank)
    low, high = (float(end) for end in read.aminmax())
    amounts = (4.0 * (read - low) / (high - low)).tolist()
    pads = torch.cat((torch.zeros(4, 3, dtype=torch.long), IDS), dim=1)
    with torch.no_grad():
        with sl.steer(llama, bank, gated(above=low, full=high)):
            found = llama(pads, attention_mask=(pads > 0).long(), position_ids=((pads > 0).cumsum(1) - 1).clamp(min=0)).logits
            written = write(llama, pads, (pads > 0).long())
        with sl.steer(llama, bank, {"a": amounts}):
            torch.testing.assert_close(found[:, 3:], llama(IDS).logits, atol=1e-4, rtol=0)
            assert torch.equal(written[:, 3:], write(llama))


def test_every_call_of_generate_decides_anew_and_a_later_site_acts_on_the_prompt_too(llama):
    here, there = two_directions(llama), two_directions(llama, "layers.1")
    facts = {site: SiteFacts(width=32) for site in ("layers.0", "layers.1")}
    encoders = {"layers.0": here.encoder("layers.0"), "layers.1": there.encoder("layers.1")}
    concepts = [sl.Concept(name="a", encoder="layers.1", index=0), sl.Concept(name="b", encoder="layers.0", index=1)]
    bank = sl.ConceptBank("two", concepts, encoders, base=sl.BaseModel(), sites=facts)
    read = means(llama, bank)
    high, low = int(read.argmax()), int(read.argmin())
    with sl.steer(llama, bank, gated(above=float(read.mean()))):
        found = [write(llama, IDS[k : k + 1]) for k in (low, high, low)]
        with torch.no_grad():
            moved = llama(IDS).logits
    with sl.steer(llama, bank, {"a": 4.0}):
        assert torch.equal(write(llama, IDS[high : high + 1]), found[1])
    for k in (0, 2):
        assert torch.equal(write(llama, IDS[low : low + 1]), found[k])
    decided = (read > read.mean()).float()
    with sl.steer(llama, bank, {"a": (4.0 * decided).tolist()}), torch.no_grad():
        torch.testing.assert_close(moved, llama(IDS).logits)
    early = {"b": sl.Add(1.0, gate=sl.Gate("a", above=0.0, over="prompt"))}
    with pytest.raises(errors.Unanswerable, match="earlier site"):
        sl.steer(llama, bank, early)


def test_what_does_not_see_the_whole_prompt_is_refused_unless_nothing_is_edited_there(llama, bank):
    edits = gated(above=0.0)
    with torch.no_grad():
        cache = llama(IDS).past_key_values
    with sl.steer(llama, bank, edits), torch.no_grad():
        for run in (
            lambda: write(llama, prefill_chunk_size=4),
            lambda: write(llama, guidance_scale=2.0),
            lambda: llama(IDS[:, :2], past_key_values=cache),
            lambda: llama(IDS, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 4)),
        ):
            with pytest.raises(errors.Unanswerable, match="over the prompt on 'b' needs all of it"):
                run()
    with sl.steer(llama, bank, edits, branch="cond"):
        write(llama, guidance_scale=2.0)


def test_where_there_is_no_prompt_it_is_refused():
    pipe = pipe_of("sd1")
    bank = bank_for(pipe, site_of("sd1"), 8)
    with pytest.raises(errors.Unanswerable, match="counts tokens of text"):
        sl.steer(pipe, bank, gated(above=0.0))


def test_a_stored_gate_over_the_prompt_comes_back_and_others_are_stored_as_before(llama):
    concept = sl.Concept(name="a", encoder="layers.0", index=0, gate=sl.Gate("b", above=1.0, over="prompt"))
    assert sl.Concept.from_dict(concept.to_dict()) == concept
    plain = sl.Concept(name="a", encoder="layers.0", index=0, gate=sl.Gate("b", above=1.0))
    assert plain.to_dict()["gate"] == {"concept": "b", "above": 1.0}
