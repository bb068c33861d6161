"""The real SmolLM2-135M-Instruct with the shipped bank: parity, and an effect that scorers see."""

import json
import re
import threading
from pathlib import Path

import pytest
import torch
from test_text import snapshot
from transformers import TextIteratorStreamer

import steerlib as sl
from steerlib.cli import recipe_of
from steerlib.evaluation.text import chat, complete, scorer_for

pytestmark = pytest.mark.real
NEW = 10
EDITS = {
    "add": {"french": 3.0},
    "rows": {"french": [3.0, -1.0], "fantasy": 1.0},
    "set": {"french": sl.Set(2.0, when=sl.Steps(0, 6)), "anger": sl.Ablate()},
    "generated": {"fantasy": sl.Add(2.0, tokens="generated", gate=sl.Gate("french", below=1.0))},
}


@pytest.fixture(scope="module")
def shipped():
    return sl.ConceptBank.from_pretrained("smollm2-135m-instruct")


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


@pytest.fixture(params=sorted(EDITS))
def edits(request, shipped):
    chosen = EDITS[request.param]
    if request.param == "generated":  # a gate reads at an earlier site
        first, later = sorted(("french", "fantasy"), key=lambda n: int(shipped.site_of(shipped[n]).partition(".")[2]))
        chosen = {later: sl.Add(2.0, tokens="generated", gate=sl.Gate(first, below=1.0))}
    return chosen


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


def test_logits_agree_between_padded_and_unpadded_rows(real, shipped, batch):
    model, _ = real
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), sl.steer(model, shipped, {"french": 3.0, "fantasy": sl.Set(1.0)}):
        padded = model(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions).logits[0, -1]
        alone = model(**row(batch, 0)).logits[0, -1]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)


def test_beams_equal_teacher_forced_passes(real, shipped, batch):
    model, _ = real
    one = row(batch, 0)
    start = one["input_ids"].shape[1]
    with torch.no_grad(), sl.steer(model, shipped, {"french": 3.0}):
        out = model.generate(
            **one, num_beams=3, num_return_sequences=3, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=2,
            length_penalty=0.0, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
            picked = model(sequence[None]).logits.log_softmax(-1)[0, start - 1 : -1].gather(-1, sequence[start:, None])
            torch.testing.assert_close(score, picked.sum(), atol=1e-3, rtol=1e-4)


def test_no_edit_is_bit_identical_and_nothing_is_left_behind(real, shipped, batch):
    model, _ = real
    before = snapshot(model)
    with torch.no_grad():
        plain = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for edits in ({}, {"french": 0.0}, {"french": sl.Scale(1.0)}):
            with sl.steer(model, shipped, edits):
                same = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            assert torch.equal(plain, same)
    assert snapshot(model) == before


def test_hidden_states_assisted_decoding_and_streaming(real, shipped, batch):
    model, tokenizer = real
    one, site = row(batch, 0), shipped.site_of(shipped["french"])
    with torch.no_grad(), sl.steer(model, shipped, {"french": 3.0}), sl.record(model, [site]) as tape:
        hidden = model(**one, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[int(site.partition(".")[2]) + 1], tape[site][0][1])
    with sl.steer(model, shipped, {"french": 3.0}):
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
    assert len(shipped) >= 12 and shipped.base.id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for concept in shipped.concepts.values():
        assert concept.label and concept.examples and concept.range and concept.useful and concept.natural
        assert concept.effects["prompts"] >= 20 and len(concept.effects["random"]) == 5
        assert f"| {concept.name} | {shipped.site_of(concept)} | {concept.useful:+.2f} |" in shipped.card


def test_at_least_twelve_concepts_clear_every_bar(shipped):
    """From the stored measurement; `steerlib eval` makes it anew."""
    cleared = [
        c.name
        for c in shipped.concepts.values()
        if c.effects["moved"] >= 0.8
        and c.effects["steered"] > max(c.effects["random"])
        and c.effects["nll_steered"] - c.effects["nll_prompted"] <= 0.5
    ]
    assert len(cleared) >= 12, cleared


def test_scorers_share_no_text_with_the_contrast_pairs(shipped):
    recipe = recipe_of(shipped, None)

    def runs(texts, length=8):
        words = [text.lower().split() for text in texts]
        return {tuple(w[i : i + length]) for w in words for i in range(len(w) - length + 1)}

    def plain(text):
        return " ".join(re.findall(r"\w+", text.lower()))

    pairs = runs(t for c in recipe.concepts for p in recipe.read_pairs(c.name) for t in (p.positive, p.negative))
    files = sorted((recipe.folder / recipe.scoring).glob("*.jsonl"))
    scoring = runs(json.loads(line)["text"] for path in files for line in path.read_text().splitlines())
    splits = {"dev", *(concept.split for concept in recipe.concepts)}
    asked = {plain(prompt) for split in splits for prompt in recipe.read_prompts(split)}
    told = {plain(pair.prompt) for concept in recipe.concepts for pair in recipe.read_pairs(concept.name)}
    assert len(files) >= 12 and len(pairs) > 10_000 and len(scoring) > 5_000
    assert not pairs & scoring  # eight words in a row; stock phrases of six or seven occur by chance
    assert len(asked) >= 50 and not asked & told


@pytest.mark.parametrize("name", ["french", "fantasy"])
def test_steering_moves_what_a_scorer_reads_and_random_directions_do_not(real, shipped, name):
    """A small version of `steerlib eval`, on prompts of this test's own."""
    model, tokenizer = real
    prompts = [chat(tokenizer, p) for p in ("How was your day?", "Describe your house.", "What did your friend say to you?")]
    recipe = recipe_of(shipped, None)
    spec = next(c for c in recipe.concepts if c.name == name)
    score, _ = scorer_for(name, spec.scorer, Path(recipe.folder) / recipe.scoring)
    base = score(complete(model, tokenizer, prompts, new_tokens=32).texts).mean()
    with sl.steer(model, shipped, {name: shipped[name].useful or 0.0}):
        steered = score(complete(model, tokenizer, prompts, new_tokens=32).texts).mean()
    noise = torch.randn(576, generator=torch.Generator().manual_seed(0))
    concept = shipped[name]
    length = float(shipped.rows(concept).write.norm()) * concept.unit * (concept.useful or 0.0)
    random = sl.ConceptBank.from_directions({"noise": noise / noise.norm() * length}, site=shipped.site_of(concept), base=model)
    with sl.steer(model, random, {"noise": 1.0}):
        control = score(complete(model, tokenizer, prompts, new_tokens=32).texts).mean()
    assert steered > base + 0.1 and steered > control + 0.1


def test_the_readmes_first_example_runs(capsys):
    """Copied out and run as a newcomer would."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = readme.partition("```python\n")[2].partition("```")[0]
    assert "sl.steer(model, bank" in code
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 10
