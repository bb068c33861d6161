"""Models other than the one a recipe was written for: weights in parts, no chat template, an encoder beside the decoder."""

import hashlib
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import SENTENCES, lines, toy, write_recipe
from tiny_models import WORDS, shrunk, tiny, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import steerlib as sl
from steerlib import errors
from steerlib.evaluation import comparison, text
from steerlib.evaluation.comparison import Condition, Unrelated
from steerlib.text import ENDS, FRAME, behind, called, chat, complete, ordinary, tokens_of
from steerlib.training.carry import on, ported, recipe_in
from steerlib.training.entries import SiteEncoder
from steerlib.training.fit.encoder_recipe import EncoderRecipe
from steerlib.training.package.directions import sites_to_try
from steerlib.training.recipe import DirectionRecipe, TextEncoderRecipe
from steerlib.training.record.activations import answers

PROMPTS = ["the sun rises . why ?", "red tea ?"]


def chatless(**special):
    """The toy's tokenizer without a template; it writes `<s>` in front where asked to."""
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = None
    if special:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**special)
    return tokenizer


BOS = {"single": "<s> $A", "special_tokens": [("<s>", 1)]}
EOS = {"single": "$A </s>", "special_tokens": [("</s>", 2)]}

# -- a GGUF file in parts --------------------------------------------------------------------------------------


def write_gguf(path):
    """A Llama of one layer with random weights, and a tokenizer of 260 tokens."""
    import gguf

    width, inner, rng = 32, 64, np.random.default_rng(0)
    letters = list(dict.fromkeys(chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]))
    tokens = ["<|endoftext|>", *letters, "th", "the"]
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in {
        "context_length": 64, "embedding_length": width, "block_count": 1, "feed_forward_length": inner, "head_count": 4,
        "head_count_kv": 2, "vocab_size": len(tokens),
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h", "th e"])
    for kind in ("bos", "eos"):
        getattr(writer, f"add_{kind}_token_id")(0)
    square, narrow = (width, width), (width // 2, width)
    shapes = {"token_embd": (len(tokens), width), "output": (len(tokens), width), "output_norm": (width,)}
    block = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": square, "attn_k": narrow, "attn_v": narrow}
    block |= {"attn_output": square, "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    for name, shape in {**shapes, **{f"blk.0.{name}": shape for name, shape in block.items()}}.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """`whole_tiny` has the file; `split_tiny` says its hash, `split_tiny_part1` and `_part2` have its halves."""
    for name in ("whole_tiny", "split_tiny", "split_tiny_part1/data", "split_tiny_part2/data"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name.partition("/")[0] / "__init__.py").touch()
    write_gguf(tmp_path / "whole_tiny" / "tiny.gguf")
    content = (tmp_path / "whole_tiny" / "tiny.gguf").read_bytes()
    (tmp_path / "split_tiny" / "SHA256SUMS").write_text(f"{hashlib.sha256(content).hexdigest()}  tiny.gguf\n")
    for i, half in enumerate((content[:5000], content[5000:])):
        (tmp_path / f"split_tiny_part{i + 1}" / "data" / f"tiny.gguf.part0{i}").write_bytes(half)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_file_in_parts_is_the_whole_file_and_is_joined_once(packages, monkeypatch):
    model, tokenizer = sl.load("package:split_tiny/tiny.gguf")
    whole, own = sl.load("package:whole_tiny/tiny.gguf")
    for (name, found), (other, expected) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert name == other and torch.equal(found, expected)
    said = "the other\n Théâtre 12"
    assert tokenizer(said) == own(said) and tokenizer.decode(tokenizer(said)["input_ids"]) == said
    assert not model.training and model.dtype == torch.float32
    (kept,) = (packages / "cache").rglob("model.safetensors")
    assert not [*(packages / "cache").rglob("*.gguf"), *(packages / "cache").rglob("*.part")]
    monkeypatch.setattr("steerlib.hooks.transformers.packages._join", None)  # not called again
    again, _ = sl.load("package:split_tiny/tiny.gguf", dtype=torch.bfloat16)
    assert torch.equal(again.lm_head.weight, whole.lm_head.weight.bfloat16()) and again.dtype == torch.bfloat16


def test_what_a_killed_process_left_is_made_again(packages):
    sl.load("package:split_tiny/tiny.gguf")
    (kept,) = (packages / "cache").rglob("model")
    part = kept.rename(kept.with_name("model.part"))
    (part / "model.safetensors").write_bytes(b"half of it")
    model, _ = sl.load("package:split_tiny/tiny.gguf")
    assert kept.is_dir() and not part.exists() and model.lm_head.weight.shape[0] > 256


def test_parts_that_are_missing_damaged_or_unsaid_are_refused(packages):
    last = packages / "split_tiny_part2" / "data" / "tiny.gguf.part01"
    content = last.read_bytes()
    last.write_bytes(content[:-1] + b"x")
    with pytest.raises(errors.UnsupportedTarget, match="another SHA-256 .* install the package and all of its parts again"):
        sl.load("package:split_tiny/tiny.gguf")
    last.unlink()
    with pytest.raises(errors.UnsupportedTarget, match=r"that are installed \(tiny.gguf.part00\) give another SHA-256"):
        sl.load("package:split_tiny/tiny.gguf")
    with pytest.raises(errors.UnsupportedTarget, match="has no file 'other.gguf'; its GGUF files: tiny.gguf"):
        sl.load("package:split_tiny/other.gguf")
    assert not [*(packages / "cache").rglob("model")]
    (packages / "split_tiny" / "SHA256SUMS").unlink()
    with pytest.raises(errors.UnsupportedTarget, match="no SHA256SUMS"):
        sl.load("package:split_tiny/tiny.gguf")


# -- a page that is continued ----------------------------------------------------------------------------------


def test_a_request_without_a_template_is_the_last_question_of_a_page_behind_one_start_token():
    asked = chat(chatless(**BOS), "Why?", "Sing.")
    assert asked == f"<s>{FRAME.format(asked='Why? Sing.')}" and asked.endswith("Question: Why? Sing.\nAnswer:")
    assert chat(chatless(), "Why?").startswith("Question: ") and behind(asked, "Yes.") == " Yes."
    read = tokens_of(toy(), chatless(**BOS), [asked, asked + " tea"])
    assert (read.ids == 1).sum(1).tolist() == [1, 1] and read.mask.sum(1).diff() == 1
    assert behind(chat(toy_tokenizer(), "Why?"), "Yes.") == "Yes."


class Scripted:
    """Words that a model of this test writes: text by text."""

    def __init__(self, model, tokenizer, texts):
        new = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        longest = max(map(len, new))
        self.new = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in new])
        model.generate = lambda input_ids, **_: torch.cat((input_ids, self.new), 1)


def test_what_follows_an_answer_does_not_count():
    """Answers end where the page goes on, and the tokens that are scored are those of the answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"<pad>": 0, "</s>": 1} | {b: i + 2 for i, b in enumerate(bytes_)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    model = tiny("llama", vocab_size=len(tokenizer))
    ends = [" One.\n\nQuestion: two?", "\nTwo.\nAnswer: more", " Three: Question: no end.", "\n\nFour"]
    expected = ["One.", "Two.", "Three: Question: no end.", "Four"]
    Scripted(model, tokenizer, ends)
    done = complete(model, tokenizer, [chat(tokenizer, "Why?")] * 4, new_tokens=30)
    assert done.texts == expected
    ids, mask = done.new
    kept = [str(tokenizer.decode(row[some], skip_special_tokens=True)).strip() for row, some in zip(ids, mask, strict=True)]
    assert kept == expected
    plain = complete(model, tokenizer, ["Once"] * 4, new_tokens=30)  # a beginning of a text is continued to its end
    assert plain.texts[0] == ends[0].strip() and ENDS.search("a\nb") is None


def test_a_model_without_a_chat_template_is_trained_for(tmp_path):
    """From the recipe to the bank, and what the bank says of it."""
    recipe = few(tmp_path)
    bank = sl.train(toy(), recipe, tokenizer=chatless(**BOS))
    assert bank.provenance["chat"] is False and bank["tea"].useful and "as the last question of a page" in bank.card
    assert "a page of questions and answers" in bank["answering"].label and called(toy(), toy_tokenizer()) == "a chat"


# -- an encoder beside the decoder -------------------------------------------------------------------------------

PAIRS = ("t5", "bart", "marian")


def few(folder):
    """A recipe of one concept from sentences, with texts short enough for toys."""
    (folder / "recipe.toml").write_text(SENTENCES)
    lines(folder / "reference.jsonl", [{"text": " ".join(WORDS[i : i + 6])} for i in range(24)])
    lines(folder / "unrelated.jsonl", [{"text": " ".join(WORDS[i : i + 5 : 2])} for i in range(12)])
    prompts = [(f"{a} {b}", s) for s, a in (("train", "old"), ("dev", "the"), ("evaluation", "why")) for b in WORDS[2:6]]
    lines(folder / "prompts.jsonl", [{"prompt": prompt, "split": split} for prompt, split in prompts])
    recipe = DirectionRecipe.from_file(folder / "recipe.toml")
    (concept,) = recipe.concepts
    concept = replace(concept, methods=("difference-of-means", "several-layers"), instructions=("tea cup",))
    return replace(recipe, concepts=(concept,), layers=(0.5,), budget=40)


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    model = tiny(request.param, AutoModelForSeq2SeqLM, vocab_size=len(chatless()))
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    return model


@torch.no_grad()
def test_answers_of_a_decoder_are_scored_as_the_model_scores_its_labels(pair):
    """One request at a time, by the model's own loss; the encoder reads its text with what the tokenizer puts behind it."""
    tokenizer = chatless(**EOS)
    asked = [chat(tokenizer, prompt, model=pair) for prompt in PROMPTS]
    assert asked == PROMPTS and called(pair, tokenizer) == "an answer"
    done = complete(pair, tokenizer, asked, new_tokens=6, temperature=1.0)
    ids, mask = done.new
    assert done.prompt == 1 and not any(prompt in said for prompt, said in zip(PROMPTS, done.texts, strict=True))
    found = text.nll(pair, done), comparison.nll_behind(pair, tokenizer, done, PROMPTS[::-1])
    for row in range(2):
        new = ids[row][mask[row]][None]
        for scores, prompt in zip(found, (PROMPTS[row], PROMPTS[1 - row]), strict=True):
            read = tokenizer(prompt, return_tensors="pt")["input_ids"]
            assert read[0, -1] == 2
            assert scores[row] == pytest.approx(float(pair(input_ids=read, labels=new).loss), abs=1e-4)


@torch.no_grad()
def test_activations_of_a_decoder_are_those_of_the_answers_own_tokens(pair):
    tokenizer, said = chatless(**EOS), ["a warm tea cup", "snow"]
    found = answers(pair, tokenizer, [*zip(PROMPTS, said, strict=True)], ["decoder.layers.1"], what="")["decoder.layers.1"]
    for x, prompt, answer in zip(found, PROMPTS, said, strict=True):
        ids = [0, *tokenizer(answer, add_special_tokens=False)["input_ids"]]
        with sl.record(pair, ["decoder.layers.1"]) as tape:
            pair(input_ids=tokenizer(prompt, return_tensors="pt")["input_ids"], decoder_input_ids=torch.tensor([ids]))
        torch.testing.assert_close(x, tape["decoder.layers.1"][0][1][0, 1:], atol=1e-5, rtol=1e-4)


def test_side_effects_on_a_decoder_are_seen_in_what_it_writes(pair):
    tokenizer = chatless(**EOS)
    bank = sl.ConceptBank.from_directions({"a": torch.randn(32)}, site="decoder.layers.1", base=pair)
    seen = Unrelated(pair, tokenizer, PROMPTS, length=5)
    assert [part.ids.shape for part in seen.parts] == [(2, 6)] and ordinary(pair, tokenizer, PROMPTS, 5).prompt == 1
    nothing, much = (seen.side_effects(Condition(name="a", bank=bank, edits={"a": amount})) for amount in (0.0, 20.0))
    assert nothing == (0.0, 0.0, 1.0) and much.kl > 0


def test_an_encoder_decoder_is_loaded_by_its_name_with_its_encoder(pair, tmp_path):
    pair.save_pretrained(tmp_path)
    chatless(**EOS).save_pretrained(tmp_path)
    assert type(sl.load(str(tmp_path))[0]) is type(pair)


def test_latents_of_an_encoder_decoder_are_refused_with_the_reason(pair, tmp_path):
    made = SiteEncoder(site="decoder.layers.1", recipe=EncoderRecipe(latents=64))
    (tmp_path / "corpus.txt").write_text("the sun\n\nred tea")
    recipe = TextEncoderRecipe(name="x", base="b", source="s", corpus=("corpus.txt",), encoders=(made,), folder=tmp_path)
    with pytest.raises(errors.UnsupportedTarget, match="is measured for models without an encoder only"):
        sl.train(pair, recipe, tokenizer=chatless(**EOS))


def test_an_encoder_decoder_is_trained_for(pair, tmp_path):
    bank = sl.train(pair, few(tmp_path), tokenizer=chatless(**EOS))
    assert {*bank.sites} == {"decoder.layers.1"} and bank["tea"].useful and bank.base.id == "toy/llama"
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        plain = pair(input_ids=ids, decoder_input_ids=ids).logits
        with sl.steer(pair, bank, {"tea": bank["tea"].useful or 0.0}):
            assert not torch.equal(pair(input_ids=ids, decoder_input_ids=ids).logits, plain)


def test_the_text_side_of_a_captioner_is_trained_for_and_acts_when_it_sees_a_picture(tmp_path):
    from transformers import BlipConfig, BlipForConditionalGeneration

    torch.manual_seed(0)
    config: Any = shrunk(BlipConfig(), vocab_size=len(chatless()), sep_token_id=2, max_position_embeddings=512)
    model = BlipForConditionalGeneration(config).eval()
    with pytest.raises(errors.UnsupportedTarget, match=r"answers to pixel_values.* sl.train\(model.text_decoder, …\)"):
        sl.train(model, few(tmp_path), tokenizer=chatless())
    bank = sl.train(model.text_decoder, few(tmp_path), tokenizer=chatless())
    size = config.vision_config.image_size
    seen = {"pixel_values": torch.ones(1, 3, size, size), "input_ids": torch.arange(3, 7)[None]}
    with torch.no_grad():
        plain = model(**seen).logits
        with sl.steer(model.text_decoder, bank, {"tea": bank["tea"].useful or 0.0}):
            found = model(**seen)
    assert not torch.equal(found.logits, plain)


def test_a_captioner_that_reads_words_alone_is_asked_like_any_other_model(tmp_path):
    model = tiny("git", AutoModelForCausalLM, vocab_size=len(chatless()), max_position_embeddings=128)
    assert sl.train(model, few(tmp_path), tokenizer=chatless())["tea"].useful


# -- the same concepts for another model -------------------------------------------------------------------------


def test_layers_are_kept_as_shares_of_the_depth():
    bank = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
    path = Path(__file__).parent.parent / "concept_banks" / "recipes" / "smollm2-135m-instruct" / "recipe.toml"
    recipe = DirectionRecipe.from_file(path)
    made = ported(recipe, bank, "org/other", ["fantasy", "sports"], name="other-concepts", license="mit")
    assert made.layers == (0.3, 0.4, 0.5, 0.6, 0.7) and [concept.name for concept in made.concepts] == ["sports", "fantasy"]
    assert (made.base, made.source, made.license, made.name) == ("org/other", "org/other", "mit", "other-concepts")
    assert "SmolLM2" not in made.description and made.budget == recipe.budget
    made.check()
    assert {*made.read_held_out()[1]} == {"sports", "fantasy"} < {*recipe.read_held_out()[1]}
    for depth, expected in ((30, [9, 12, 15, 18, 21]), (18, [5, 7, 9, 11, 13]), (2, [1])):
        model = tiny("llama", num_hidden_layers=depth, num_key_value_heads=2)
        assert sites_to_try(model, made) == [f"layers.{layer}" for layer in expected]
    with pytest.raises(errors.UnknownConcept, match="no concept 'sport'"):
        ported(recipe, bank, "org/other", ["sport"])
    own = TextEncoderRecipe(name="x", base="b", source="s")
    with pytest.raises(errors.BadRecipe, match="has latents or a context module, which belong to their model"):
        ported(own, bank, "org/other")
    for wrong in ((0.0,), (1.0,), (-1,), (3, 3)):
        with pytest.raises(errors.BadRecipe, match="shares of the depth such as 0.4"):
            replace(recipe, layers=wrong).check()


def test_a_recipe_on_another_model_names_it_by_its_place(tmp_path):
    recipe = DirectionRecipe.from_file(write_recipe(tmp_path / "recipe"))
    (tmp_path / "own-model").mkdir()
    for source, base in {
        "org/model": "org/model",
        str(tmp_path / "own-model"): "own-model",
        "package:some_weights/model-7b.gguf": "model-7b",
    }.items():
        assert (on(recipe, source).base, on(recipe, source).source, on(recipe, source).license) == (base, source, "")
    assert on(recipe, "org/model", base="a/b").base == "a/b"


def test_a_bank_is_made_anew_for_another_model_by_one_command(tmp_path):
    """Of a bank that carries its recipe, for a model of another depth and without a template; it ends with a command to use."""
    own = sl.train(toy(), few(tmp_path), tokenizer=toy_tokenizer()).save_pretrained(tmp_path / "own")
    other = tiny("llama", vocab_size=len(chatless()), num_hidden_layers=5)
    other.save_pretrained(tmp_path / "other")
    chatless(**BOS).save_pretrained(tmp_path / "other")
    run = [sys.executable, "-m", "steerlib"]
    rest = ["--work", str(tmp_path / "work"), "--threads", "1", "--license", "mit"]
    said = subprocess.run(
        [*run, "port", str(own), str(tmp_path / "other"), "--out", str(tmp_path / "made"), *rest],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    bank = sl.ConceptBank.from_pretrained(tmp_path / "made")
    bank.verify()
    assert (bank.name, bank.base.id, bank.license) == ("made", "other", "mit") and [*bank.sites] == ["layers.2"]
    assert bank.provenance["source"] == str(tmp_path / "other") and bank.base.fingerprint["num_hidden_layers"] == 5
    assert "made anew for this model" in bank.card
    assert f"steerlib steer {tmp_path / 'made'} " in said.stdout and "-e tea=" in said.stdout
    command = said.stdout.rpartition("try it:  steerlib steer ")[2].strip()
    subprocess.run([*run, "steer", *shlex.split(command), "--threads", "1"], check=True, capture_output=True)
    again = recipe_in(bank)
    assert isinstance(again, DirectionRecipe) and again.source == str(tmp_path / "other") and again.layers == (0.5,)
