"""The real SmolLM2-135M-Instruct with the shipped bank: parity, and an effect that scorers see."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_text import snapshot
from transformers import TextIteratorStreamer

import steerlib as sl
from steerlib.cli import recipe_of
from steerlib.evaluation.comparison import RANDOM_DIRECTIONS
from steerlib.evaluation.report import summary, table
from steerlib.evaluation.score import ratios
from steerlib.text import chat
from steerlib.training.calibrate.measure import ANSWERING
from steerlib.training.label.verify import dose, gains, next_tokens, opened
from steerlib.training.package.directions import evaluate

pytestmark = pytest.mark.real
NEW = 10


@pytest.fixture(scope="module")
def shipped():
    return sl.ConceptBank.from_pretrained("smollm2-135m-instruct")


def levers(bank):
    """Concepts that were measured to move the text, the strongest first."""

    def gain(concept):
        lines = concept.effects["conditions"]
        return lines["steered"]["score"] - lines["unsteered"]["score"]

    return sorted((c for c in bank.concepts.values() if c.useful is not None), key=gain, reverse=True)


@pytest.fixture(scope="module")
def strong(shipped):
    """The strongest lever at its useful amount."""
    return {levers(shipped)[0].name: levers(shipped)[0].useful}


@pytest.fixture(scope="module")
def weak(shipped):
    """The next two, by name."""
    return [concept.name for concept in levers(shipped)[1:3]]


@pytest.fixture(scope="module")
def batch(real):
    _, tokenizer = real
    texts = [chat(tokenizer, "Tell me about your morning."), chat(tokenizer, "What should I cook for a friend who visits me?")]
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


def write(model, batch, **kwargs):
    return model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, pad_token_id=2,
        **{"max_new_tokens": NEW, **kwargs},
    )  # fmt: skip


def row(batch, i):
    kept = batch["attention_mask"][i].bool()
    return {name: batch[name][i : i + 1, kept] for name in ("input_ids", "attention_mask")}


def of_row(edits, i):
    return {name: value[i] if isinstance(value, list) else value for name, value in edits.items()}


@pytest.fixture(params=["add", "rows", "set", "generated"])
def edits(request, shipped, strong, weak):
    ((name, amount),), (second, third) = strong.items(), weak
    some = 0.5 * shipped[second].useful
    return {
        "add": {name: amount},
        "rows": {name: [amount, -0.3 * amount], second: some},
        "set": {name: sl.Set(2.0, when=sl.Steps(0, 6)), third: sl.Ablate()},
        "generated": {name: sl.Add(amount, tokens="generated", gate=sl.Gate(ANSWERING)), second: some},
    }[request.param]


def test_caches_padding_and_batches_agree(real, shipped, batch, edits):
    model, _ = real
    with sl.steer(model, shipped, edits, allow_ood=True):
        together = write(model, batch)
        assert torch.equal(together, write(model, batch, use_cache=False))
        assert torch.equal(together, write(model, batch, cache_implementation="static"))
    for i in range(2):
        with sl.steer(model, shipped, of_row(edits, i), allow_ood=True):
            alone = write(model, row(batch, i))
        assert torch.equal(alone[0, -NEW:], together[i, -NEW:])


def test_logits_agree_between_padded_and_unpadded_rows(real, shipped, batch, strong, weak):
    model, _ = real
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), sl.steer(model, shipped, {**strong, weak[0]: sl.Set(1.0)}, allow_ood=True):
        padded = model(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions).logits[0, -1]
        alone = model(**row(batch, 0)).logits[0, -1]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)


def test_beams_equal_teacher_forced_passes(real, shipped, batch, strong):
    model, _ = real
    one = row(batch, 0)
    start = one["input_ids"].shape[1]
    with torch.no_grad(), sl.steer(model, shipped, strong):
        out = model.generate(
            **one, num_beams=3, num_return_sequences=3, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=2,
            length_penalty=0.0, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
            picked = model(sequence[None]).logits.log_softmax(-1)[0, start - 1 : -1].gather(-1, sequence[start:, None])
            torch.testing.assert_close(score, picked.sum(), atol=1e-3, rtol=1e-4)


def test_no_edit_is_bit_identical_and_nothing_is_left_behind(real, shipped, batch, weak):
    model, _ = real
    before = snapshot(model)
    with torch.no_grad():
        plain = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for edits in ({}, {weak[0]: 0.0}, {weak[0]: sl.Scale(1.0)}):
            with sl.steer(model, shipped, edits):
                same = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            assert torch.equal(plain, same)
    assert snapshot(model) == before


def test_hidden_states_assisted_decoding_and_streaming(real, shipped, batch, strong):
    model, tokenizer = real
    one, site = row(batch, 0), shipped.site_of(levers(shipped)[0])
    with torch.no_grad(), sl.steer(model, shipped, strong), sl.record(model, [site]) as tape:
        hidden = model(**one, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[int(site.partition(".")[2]) + 1], tape[site][0][1])
    with sl.steer(model, shipped, strong):
        expected = write(model, one)
        assert torch.equal(expected, write(model, one, prompt_lookup_num_tokens=3))
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=lambda: write(model, one, streamer=streamer))
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == tokenizer.decode(expected[0, one["input_ids"].shape[1] :])


# -- the shipped bank ----------------------------------------------------------------------------------------


def test_the_shipped_bank_is_whole_and_measured(shipped):
    shipped.verify()
    assert shipped.base.id == "HuggingFaceTB/SmolLM2-135M-Instruct" and ANSWERING in shipped
    recipe = recipe_of(shipped, None)
    for concept in levers(shipped):
        assert concept.label and concept.range and concept.natural and len(concept.examples) == 3
        assert table([concept.effects]).splitlines()[-1] in shipped.card and concept.effects["amount"] == concept.useful
        assert concept.effects["answers"] == recipe.evaluation_prompts * recipe.seeds
        own = f"{concept.name}.present"
        assert own in shipped and shipped[own].present is not None and shipped[own].effects["tokens"] > 100


def test_what_is_stored_follows_from_the_scores_of_every_answer(shipped):
    """`steerlib eval` makes the measurement anew."""
    for concept in levers(shipped):
        lines = concept.effects["conditions"]
        means = {name: np.mean(values) for name, values in concept.effects["joint"].items()}
        gain = means["prompted"] - means["unsteered"]
        ratio = (means["steered"] - means["unsteered"]) / gain
        half = ratio >= 0.5 if "ratio" in lines["steered"] else means["steered"] >= means["prompted"]
        assert lines["steered"].get("ratio", ratio) == pytest.approx(ratio, abs=2e-3)  # without one: it is undefined
        loops = concept.effects["loops"]["steered"] - concept.effects["loops"]["unsteered"]
        randoms = [means[name] for name in means if name.startswith("random-")]
        worse = lines["steered"]["nll"] - lines["prompted"]["nll"]
        sound = worse <= 0.5 and loops <= 0.05
        cleared = concept.effects["moved"] >= 0.8 and means["steered"] > max(randoms) and half and sound
        assert len(randoms) == RANDOM_DIRECTIONS and bool(cleared) == all(concept.effects["passes"].values())


def test_the_readmes_say_of_concepts_what_was_measured(shipped):
    root = Path(__file__).parent.parent
    first, second = (" ".join((root / place / "README.md").read_text().split()) for place in (".", "concept_banks"))
    found = summary([concept.effects for concept in shipped.concepts.values() if "conditions" in concept.effects])
    steered, random = found["steered"], found["random direction"]["ratio"]
    text = "Ratio to prompting {ratio:.2f} (95 %: {low:.2f} to {high:.2f}) over {concepts} concepts".format_map(steered)
    assert f"{text}; random directions {random:.2f}".replace("-", "−") in first
    together = []
    for model in ("smollm2-135m-instruct", "gemma-3-270m"):
        figures = json.loads((root / f"concept_banks/recipes/named/{model}.json").read_text())["concepts"]
        joint = {kind: np.concatenate([line["joint"][kind] for line in figures]) for kind in figures[0]["joint"]}
        together.append(ratios(joint)["steered"]["ratio"])
    assert "From names alone, on ten: {:.2f}, and {:.2f} on a second model.".format(*together) in first
    own = [
        f"{shipped[name].effects['conditions']['steered']['specificity']:.2f}" for name in ("formality", "finance", "nature")
    ]
    assert "(specificity {}, {} and {}); over all it is {:.2f}".format(*own, steered["specificity"]) in second


def test_useful_amounts_are_carried_out_whole(real, shipped, batch):
    """Nothing of what was measured was cut short: a notice would be an error here. What grows with a token's length is capped
    on the longest tokens, and was when it was measured."""
    model, _ = real
    for concept in (lever for lever in levers(shipped) if not lever.match_norm):
        with torch.no_grad(), sl.steer(model, shipped, {concept.name: concept.useful}):
            limited = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        with torch.no_grad(), sl.steer(model, shipped, {concept.name: concept.useful}, allow_ood=True):
            assert torch.equal(limited, model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits)


def test_a_small_evaluation_finds_the_effect_and_no_effect_of_the_controls(real, shipped):
    """`steerlib eval` itself, on fewer prompts."""
    model, tokenizer = real
    few = replace(recipe_of(shipped, None), evaluation_prompts=6, dev_prompts=4, seeds=1, new_tokens=24)
    name = next(concept.name for concept in levers(shipped) if "ratio" in concept.effects["conditions"]["steered"])
    (record,) = evaluate(model, tokenizer, shipped, few, concepts=[name])
    found = summary([record])
    controls = [found[control]["ratio"] for control in ("no-op", "random direction", "wrong concept", "shuffled labels")]
    assert found["unsteered"]["ratio"] == 0 and found["prompted"]["ratio"] == 1
    assert found["steered"]["ratio"] > 0.5 > max(controls), found
    assert record["moved"] >= 0.8 and record["response"]["slope"] > 0
    assert record["conditions"]["steered, gated"]["kl"] < record["conditions"]["steered"]["kl"] / 3


@pytest.fixture(scope="module")
def sparse():
    return sl.ConceptBank.from_pretrained("smollm2-135m-latents")


def held(bank):
    """Verified latents, those first whose tokens gained most."""
    found = [c for c in bank.concepts.values() if c.effects.get("verified", {}).get("holds")]
    return sorted(found, key=lambda c: -c.effects["verified"]["gain"])


def test_the_bank_of_latents_is_whole_small_and_verified(sparse):
    sparse.verify()
    assert {id: len(sparse.encoder(id).encoder) for id in sparse.encoders} == {f"layers.{k}": 2304 for k in (7, 15, 23)}
    assert sum(path.stat().st_size for path in sparse.folder.rglob("*") if path.is_file()) < 22e6
    quality = sparse.provenance["quality"].values()
    assert len(held(sparse)) == sum(line["verified"] for line in quality) >= 100
    assert sum(line["verified_random"] + line["verified_swapped"] for line in quality) < len(held(sparse))
    for figures in (concept.effects["verified"] for concept in held(sparse)):
        assert figures["gain"] >= max(2 * figures["others"], figures["highest"]) > -1
    assert all(line["explained"] > line["control"] + 0.4 and line["recovered"] > 0.8 for line in quality)


def test_verified_latents_raise_their_tokens_on_texts_that_nothing_was_measured_on(real, sparse):
    model, tokenizer = real
    texts = recipe_of(sparse, None).read_texts("reference.jsonl")
    best = held(sparse)[:8]
    sets = [[tokenizer.encode(token)[0] for token in concept.effects["verified"]["tokens"]] for concept in best]
    prompts = opened(tokenizer, texts, model.device)
    plain = next_tokens(model, prompts)
    for k, concept in enumerate(best):
        with sl.steer(model, sparse, {concept.name: dose(sparse, concept)}):
            found = gains(next_tokens(model, prompts) - plain, sets)
        assert found[k] > 0.3 and found[k] > np.delete(found, k).mean()


def test_the_readmes_first_example_runs(capsys):
    """Copied out and run as a newcomer would."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = readme.partition("```python\n")[2].partition("```")[0]
    assert "sl.steer(model, bank" in code
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 10
