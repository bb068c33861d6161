"""Edits in parts of a text: which tokens they move, against a second reading of the decoded text, one character at a time."""

import json
import random
from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import two_directions
from tiny_models import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

import steerlib as sl
from steerlib import errors
from steerlib.steering.dialect import Dialect

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}{# <tool_call></tool_call> #}"""
TURNS = {role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")}
PAIRS = {
    "thinking": ("<think>", "</think>"),
    "tool-call": ("<tool_call>", "</tool_call>"),
    "code": ("```", "```"),
    "<a>...</a>": ("<a>", "</a>"),
}
PIECES = [
    *TURNS.values(),
    "<|im_end|>\n",
    *(one for pair in PAIRS.values() for one in pair),
    "<",
    "th",
    "ink>",
    "``",
    "`",
    "</",
]
PIECES += ["\n", " say ", "a tree", "x`y", "<|im_end|>", "é"]
WORDS = ("system", "user", "assistant", *PAIRS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE whose merges cross delimiters, with a chat template; `<think>` is a token, the rest is spelled."""
    core: Any = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    rng, special = random.Random(3), ["<pad>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    texts = ["".join(rng.choices(PIECES[3:], k=6)) for _ in range(300)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny("llama", vocab_size=400, max_position_embeddings=512)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.fixture(scope="module")
def bank(model):
    return two_directions(model)


def drawn(tokenizer, seed, pieces=12) -> list[int]:
    """Tokens of a random text; every other one is cut at random places first, so that delimiters are spelled in many ways."""
    rng = random.Random(seed)
    text = "".join(rng.choices(PIECES, k=pieces))
    cuts = sorted(rng.sample(range(len(text) + 1), 6)) if seed % 2 else []
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]


def by_hand(tokenizer, ids, word, prompt=10**6) -> list[bool]:
    """Whether each token lies in a part, from the texts of all beginnings of the list."""
    if word.startswith("not-"):
        return [not inside for inside in by_hand(tokenizer, ids, word[4:], prompt)]
    if word == "answer":
        out = (by_hand(tokenizer, ids, part) for part in ("thinking", "tool-call"))
        return [k >= prompt and not (a or b) for k, (a, b) in enumerate(zip(*out, strict=True))]
    opener, *closers = PAIRS.get(word) or (TURNS[word], "<|im_end|>", *(t for role, t in TURNS.items() if role != word))
    found, inside, since, turn, length = [], False, "", "", 0
    for k in range(len(ids)):
        text = tokenizer.decode(ids[: k + 1], skip_special_tokens=False).replace("\ufffd", "?")
        touched = inside
        for char in text[length:]:
            touched, since, turn = touched or inside, since + char, turn + char
            if since.endswith(tuple(closers) if inside else opener):
                inside, since = not inside, ""
                touched = True
            if turn.endswith(tuple(TURNS.values())):
                turn = ""
                if word in PAIRS:
                    inside, since = False, ""
        length = len(text)
        found.append(touched)
    return found


class Forced(LogitsProcessor):
    """Makes generation write given tokens, `[rows, new]`."""

    def __init__(self, prompt, tokens):
        self.prompt, self.tokens = prompt, tokens

    def __call__(self, input_ids, scores):
        wanted = self.tokens[:, input_ids.shape[1] - self.prompt].repeat_interleave(len(scores) // len(self.tokens))
        noise = torch.arange(len(scores))[:, None] * 1e-3
        return torch.full_like(scores, -1e4).scatter(1, wanted[:, None], 0.0) - noise


def moved(model, bank, run, tokens, tokenizer) -> list[torch.Tensor]:
    """Which tokens an edit moves at its site, `[B, N]` for each pass of a run."""
    with sl.record(model, ["layers.0"]) as plain:
        run()
    with sl.steer(model, bank, {"a": sl.Add(2.0, tokens=tokens)}, tokenizer=tokenizer), sl.record(model, ["layers.0"]) as tape:
        run()
    both = zip(plain["layers.0"], tape["layers.0"], strict=True)
    return [(before != after).any(-1) for (_, before), (_, after) in both]


def padded(rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens, padded on the left, and the mask."""
    most = max(map(len, rows))
    ids = torch.tensor([[0] * (most - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (most - len(row)) + [1] * len(row) for row in rows])


@pytest.mark.parametrize("word", [*WORDS, "not-code", "not-thinking"])
def test_tokens_are_moved_where_the_decoded_text_says_so(model, bank, tokenizer, word):
    rows = [drawn(tokenizer, seed) for seed in range(40)]
    ids, mask = padded(rows)
    with torch.no_grad():
        (found,) = moved(model, bank, lambda: model(ids, attention_mask=mask), word, tokenizer)
    expected = [by_hand(tokenizer, row, word) for row in rows]
    assert [found[r, -len(row) :].tolist() for r, row in enumerate(rows)] == expected
    assert not found[mask == 0].any() and 0 < sum(map(sum, expected)) < sum(map(len, rows))


WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 4},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize(
    "tokens", ["answer", "thinking", "not-code", "user", "not-answer", ("answer", "not-code"), ("code", slice(9))]
)
def test_every_way_to_generate_moves_the_tokens_that_the_text_says(model, bank, tokenizer, tokens, way):
    """Left-padded rows whose prompts open what the new tokens go on with; the new tokens are given."""
    rows = [drawn(tokenizer, seed, pieces=4) + tokenizer.encode(end) for seed, end in ((1, "<think>"), (2, "``"), (3, "\n"))]
    new = [(drawn(tokenizer, seed) + [9] * 24)[:24] for seed in (11, 12, 13)]
    (ids, mask), settings = padded(rows), WAYS[way]
    force = LogitsProcessorList([Forced(ids.shape[1], torch.tensor(new))])

    def run():
        given = {"max_new_tokens": 24, "do_sample": False, "logits_processor": force, **settings}
        out = model.generate(ids, attention_mask=mask, **given)
        assert out[:, ids.shape[1] :].tolist() == new

    passes = moved(model, bank, run, tokens, tokenizer)
    found = passes[-1] if way == "uncached" else torch.cat(passes, dim=1)
    for r, row in enumerate(rows):
        text = (row + new[r])[:-1]
        expected = [True] * len(text)
        for one in tokens if isinstance(tokens, tuple) else (tokens,):
            own = (
                [k < one.stop for k in range(len(text))] if isinstance(one, slice) else by_hand(tokenizer, text, one, len(row))
            )
            expected = [a and b for a, b in zip(expected, own, strict=True)]
        best = found.view(len(rows), -1, found.shape[1])[r, 0]  # the given tokens have the best score at every step
        assert best[-len(text) :].tolist() == expected, r


def test_each_beams_score_equals_a_steered_teacher_forced_pass(model, bank, tokenizer):
    """Beams change places between passes, and each goes on with its own text."""
    ids = torch.randint(5, 380, (2, 6), generator=torch.Generator().manual_seed(4))
    beams = {"max_new_tokens": 10, "do_sample": False, "num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0}
    beams |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(ids, **beams)
    texts = [tokenizer.decode([token]) for token in plain.sequences[0, 6:].tolist()]
    tokens = f"{texts[1]}...{texts[4]}"
    with sl.steer(model, bank, {"a": sl.Add(30.0, tokens=tokens)}, tokenizer=tokenizer, allow_ood=True), torch.no_grad():
        out = model.generate(ids, **beams)
        logits = model(out.sequences).logits[:, 5:-1].log_softmax(-1)
    scores = logits.gather(2, out.sequences[:, 6:, None])[..., 0].sum(1)
    torch.testing.assert_close(out.sequences_scores, scores, atol=1e-4, rtol=0)
    assert not torch.allclose(plain.sequences_scores, out.sequences_scores, atol=1e-3)


def test_json_that_begins_a_line_is_what_a_parser_reads_there(model, bank, tokenizer):
    rng, found = random.Random(0), []
    values = [{"a": [1, {"b": '}"{\\'}]}, {}, ["x", {}], [[1], -2], {"é": "]"}]
    for _ in range(30):
        lines = [rng.choice(("say {x}", "[a](b)", " tree", *map(json.dumps, values))) for _ in range(5)]
        text = "\n".join(lines) + "\n"
        ids = tokenizer.encode(text, add_special_tokens=False)
        spans, at = [], 0
        for line in lines:
            if line not in ("say {x}", "[a](b)", " tree"):
                _, end = json.JSONDecoder().raw_decode(text, at)
                spans.append((at + (line[0] == "["), end))  # a bracket is known by what follows it
            at += len(line) + 1
        ends = [len(tokenizer.decode(ids[: k + 1])) for k in range(len(ids))]
        expected = [any(a < end and start < b for a, b in spans) for start, end in zip([0, *ends], ends, strict=False)]
        with torch.no_grad():
            (one,) = moved(model, bank, lambda ids=ids: model(torch.tensor([ids])), "json", tokenizer)
        found.append((one[0].tolist(), expected))
    assert all(a == b for a, b in found) and any(any(a) for a, _ in found)


def test_a_continued_conversation_is_read_from_its_beginning_or_refused(model, bank, tokenizer):
    ids, mask = padded([tokenizer.encode("<|im_start|>user\nx<|im_end|>\n<think> say ") * 2])
    with sl.steer(model, bank, {"a": sl.Add(2.0, tokens="thinking")}, tokenizer=tokenizer):
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        first = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        more = {"max_new_tokens": 4, "do_sample": False, "past_key_values": first.past_key_values}
        assert torch.equal(model.generate(first.sequences, attention_mask=torch.ones_like(first.sequences), **more), whole)
        with pytest.raises(errors.Unanswerable, match="those before this pass"), torch.no_grad():
            model(ids[:, :1], past_key_values=first.past_key_values)
        with pytest.raises(errors.Unanswerable, match="embeddings"), torch.no_grad():
            model(inputs_embeds=model.get_input_embeddings()(ids))


def test_what_cannot_be_told_is_refused_with_what_to_do(model, bank, tokenizer):
    with pytest.raises(errors.BadEdit, match="tokenizer=tokenizer"):
        sl.steer(model, bank, {"a": sl.Add(1.0, tokens="answer")})
    with pytest.raises(errors.BadEdit, match="'thinking'"):
        sl.Add(1.0, tokens="thoughts")
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    for word in ("user", "thinking", "tool-call"):
        with pytest.raises(errors.BadEdit, match="delimits no"):
            sl.steer(model, bank, {"a": sl.Add(1.0, tokens=word)}, tokenizer=bare)
    sl.steer(model, bank, {"a": sl.Add(1.0, tokens=("answer", "not-code", "<a>...</a>"))}, tokenizer=bare)


TEMPLATES = {
    "llama 3": (
        "{{ '<|begin|>' }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\\n\\n' + m['content'] + '<|eot|>' }}"
        "{% endfor %}",
        {
            "system": "<|start|>system<|end|>\n\n",
            "user": "<|start|>user<|end|>\n\n",
            "assistant": "<|start|>assistant<|end|>\n\n",
        },
    ),
    "gemma": (
        "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% for m in messages %}"
        "{% set role = 'model' if m['role'] == 'assistant' else 'user' %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] + '<end_of_turn>\\n' }}{% endfor %}",
        {"user": "<start_of_turn>user\n", "assistant": "<start_of_turn>model\n"},
    ),
    "mistral": (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}{% else %}{{ raise_exception('no') }}{% endif %}"
        "{% endfor %}",
        {"user": "[INST] ", "assistant": "[/INST]"},
    ),
    "none": ("{% for m in messages %}{{ m['content'] + ' . ' }}{% endfor %}", {}),
}


@pytest.mark.parametrize("family", sorted(TEMPLATES))
def test_turns_are_learned_from_the_template(tokenizer, family):
    own, (template, openers) = deepcopy(tokenizer), TEMPLATES[family]
    own.chat_template = template
    found = {role: opener for role, (opener, _) in Dialect(own).turns.items()}
    assert {role: opener.rstrip(" ") for role, opener in found.items()} == {r: o.rstrip(" ") for r, o in openers.items()}


def test_the_real_models_chat_is_told_apart_by_its_template(real):
    model, tokenizer = real
    bank = two_directions(model)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a fjord?"}]
    given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**given, max_new_tokens=6, do_sample=False)
    said = {"system": "\nBe brief.<|im_end|>", "user": "\nWhat is a fjord?<|im_end|>"}  # with what delimits them
    said["assistant"] = "\n" + tokenizer.decode(out[0, given["input_ids"].shape[1] :])
    for role, text in said.items():
        with torch.no_grad():
            (found,) = moved(model, bank, lambda: model(out), role, tokenizer)
        assert tokenizer.decode(out[0, found[0]]) == text
