"""A steered model inside lm-evaluation-harness: what it scores is what the steered model says."""

import json

import pytest
import torch
from conftest import two_directions
from tiny_models import tiny
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

import steerlib as sl

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'steerlib[harness]'")
from scripts.harness import OWN, TASKS, conditions, evaluate, huggingface, row, table

EDITS = {"a": 3.0, "b": sl.Set(-2.0)}
LIMIT = 8


@pytest.fixture(scope="module")
def model():
    return tiny("llama", max_position_embeddings=512)


@pytest.fixture(scope="module")
def tokenizer():
    """A letter a token, so that continuations are long and rows need padding."""
    letters = Tokenizer(WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    letters.pre_tokenizer = Split(Regex("."), "isolated")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="\x02", pad_token="\x00")


@pytest.fixture(scope="module")
def score(model, tokenizer, tmp_path_factory):
    """Log-likelihoods of every choice of the first items, as the harness reports them."""

    def scored(batch):
        lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        samples = evaluate(lm, [OWN], limit=LIMIT)["samples"][OWN]
        return torch.tensor([[answer[0] for answer in sample["filtered_resps"]] for sample in samples])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield scored


@torch.no_grad()
def by_hand(model, tokenizer):
    """The same from its definition, one choice at a time: log-softmax over the continuation, read at its tokens."""
    items = [json.loads(line) for line in (TASKS / "items.jsonl").read_text(encoding="utf-8").splitlines()][:LIMIT]
    result = torch.zeros(LIMIT, 4)
    for i, item in enumerate(items):
        for k, choice in enumerate(item["choices"]):
            ids = torch.tensor([tokenizer.encode(f"{item['context']} {choice}")])
            start = len(tokenizer.encode(item["context"]))
            scores = model(ids[:, :-1]).logits[0, start - 1 :].log_softmax(-1)
            result[i, k] = scores.gather(-1, ids[0, start:, None]).sum()
    return result


def test_the_harness_scores_what_the_steered_model_says_and_nothing_stays(model, tokenizer, score):
    bank = two_directions(model)
    before = score(1)
    with sl.steer(model, bank, EDITS):
        steered, expected = score(1), by_hand(model, tokenizer)
    assert ((steered - before).abs() > 1e-3).all()
    assert torch.equal(steered, expected) and torch.equal(before, by_hand(model, tokenizer))
    assert torch.equal(score(1), before)


def test_an_attached_model_scores_as_a_steered_one(model, score):
    bank = two_directions(model)
    before = score(1)
    with sl.steer(model, bank, EDITS):
        steered = score(1)
    with sl.attach(model, bank) as steering:
        steering.set(EDITS)
        assert torch.equal(score(1), steered)
        steering.clear()
        assert torch.equal(score(1), before)


def test_padded_batches_score_as_single_rows(model, score):
    with sl.steer(model, two_directions(model), EDITS):
        torch.testing.assert_close(score(8), score(1), atol=1e-4, rtol=0)


def test_items_have_four_different_choices_and_one_answer():
    items = [json.loads(line) for line in (TASKS / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({item["context"] for item in items}) == len(items) >= 50
    assert all(len({*item["choices"]}) == 4 and item["answer"] in range(4) for item in items)


def test_flips_are_counted_both_ways():
    """Of five items the first is mended, the next three are broken, the last stays right: three of four flips are wrong."""

    def found(*right):
        samples = [{"doc_id": i, "acc": float(r)} for i, r in enumerate(right)]
        return {"results": {"t": {"acc,none": sum(right) / 5, "acc_stderr,none": 0.25}}, "samples": {"t": samples}}

    figures = row("t", found(0, 1, 1, 1, 1), found(1, 0, 0, 0, 1))
    assert (figures["right_to_wrong"], figures["wrong_to_right"], figures["items"]) == (3, 1, 5)
    assert table({"x": figures}).endswith("| x | 0.400 ± 0.250 | – | 3 | 1 | 75% |")


def test_each_concept_stands_beside_a_random_direction_of_its_length():
    bank = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
    chosen = conditions(bank, ["fantasy"], 0)
    assert list(chosen) == ["unsteered", f"fantasy {bank['fantasy'].useful:+.2f}", "random for fantasy"]
    (steered, amounts), (control, others) = list(chosen.values())[1:]
    assert [*amounts.values()] == [*others.values()] and control.site_of(control["random-1"]) == bank.site_of(bank["fantasy"])
    torch.testing.assert_close(control.rows(control["random-1"]).write.norm(), bank.rows(bank["fantasy"]).write.norm())
    assert control["random-1"].unit == bank["fantasy"].unit and steered is bank
