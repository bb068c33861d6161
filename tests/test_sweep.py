"""Sweeps over amounts, edits and sites: the answers and pictures of a loop by hand, planted bests, tables and sheets."""

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import toy_tokenizer, toy_writer

import steerlib as sl
from steerlib.errors import BadEdit, NoScore
from steerlib.evaluation.comparison import nll_behind
from steerlib.evaluation.pictures import GAP, LINE, sheet
from steerlib.text import chat, complete

PROMPTS = ["why rain", "the red house"]
NEW = 6


model = pytest.fixture(scope="module")(toy_writer)
tokenizer = pytest.fixture(scope="module")(toy_tokenizer)


@pytest.fixture(scope="module")
def bank(model):
    draw = torch.Generator().manual_seed(3)
    vectors = {name: {k: 0.05 * torch.randn(32, generator=draw) for k in (0, 1)} for name in ("a", "b")}
    return sl.ConceptBank.from_directions(vectors, base=model)


def swept(model, tokenizer, bank, edits, **how):
    return sl.sweep(model, bank, edits, prompts=PROMPTS, tokenizer=tokenizer, new_tokens=NEW, **how)


def by_hand(model, tokenizer, bank, edits, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = [chat(tokenizer, prompt, model=model) for prompt in PROMPTS]
        with sl.steer(model, bank, edits):
            done = complete(model, tokenizer, asked, new_tokens=NEW, **how)
        return done.texts, nll_behind(model, tokenizer, done, asked)


def count(requests, answers):  # noqa: ARG001
    return [len(answer) for answer in answers]


def test_answers_and_figures_are_those_of_a_loop_by_hand(model, tokenizer, bank):
    asked = []

    def judge(requests, answers):
        asked.append((list(requests), list(answers)))
        return count(requests, answers)

    table = swept(model, tokenizer, bank, {"a": [0, 1.5], "b": [0, sl.Set(2.0)]}, judge=judge, seeds=[5, None])
    edits = [{}, {"a": 0, "b": sl.Set(2.0)}, {"a": 1.5, "b": 0}, {"a": 1.5, "b": sl.Set(2.0)}]
    assert table.settings == [{}, {"a": 0, "b": "Set(value=2.0)"}, {"a": 1.5, "b": 0}, {"a": 1.5, "b": "Set(value=2.0)"}]
    hand = [by_hand(model, tokenizer, bank, e, **how) for e in edits for how in ({"temperature": 0.7, "seed": 5}, {})]
    assert [record["answer"] for record in table.records] == [text for texts, _ in hand for text in texts]
    np.testing.assert_allclose([r["nll"] for r in table.records], np.concatenate([nll for _, nll in hand]), rtol=1e-5)
    assert len(asked) == 1 and asked[0] == (PROMPTS * 8, [record["answer"] for record in table.records])
    for k, row in enumerate(table.rows):
        own = [len(record["answer"]) for record in table.records if record["setting"] == k]
        assert row["score"] == np.mean(own) and row["±"] == pytest.approx(np.std(own, ddof=1) / 2)
    assert {record["answer"] for record in table.records[:4]} != {record["answer"] for record in table.records[4:]}


def test_a_judge_with_a_planted_layer_and_amount_is_followed_there(model, tokenizer, bank):
    """Whatever layer and amount it is: it likes the answers that they give and no others."""
    for site, amount in (("layers.0", 2), ("layers.1", -2)):
        vector = bank.rows(next(p for p in bank["a"].places if bank.site_of(p) == site)).write[0]
        only = sl.ConceptBank.from_directions({"a": vector}, site=site, base=model)
        wanted, _ = by_hand(model, tokenizer, only, {"a": amount}, temperature=0.7, seed=0)
        like = lambda requests, answers: [answer in wanted for answer in answers]  # noqa: ARG005, B023, E731
        table = swept(model, tokenizer, bank, {"a": [-2, 0, 2]}, sites=[0, "layers.1"], judge=like)
        assert len(table.settings) == 5 and [row["score"] for row in table.rows].count(1.0) == 1
        assert (table.best["site"], table.best["a"]) == (site, amount)


def test_the_best_is_not_one_that_makes_answers_unlikely(model, tokenizer, bank):
    table = swept(model, tokenizer, bank, {"a": [1, 50]}, judge=count, allow_ood=True)
    worse = [
        {**record, "score": 10.0 * record["setting"], "nll": [1.0, 1.5, 4.0][record["setting"]]} for record in table.records
    ]
    forged = type(table)(settings=table.settings, records=worse, more=table.more)
    assert forged.best["a"] == 1 and max(row["score"] for row in forged.rows) == 20.0
    with pytest.raises(BadEdit, match="expected a judge"):
        _ = swept(model, tokenizer, bank, {"a": [1]}).best


def test_a_judge_that_asks_for_the_concept_scores_each(model, tokenizer, bank):
    judge = lambda requests, answers, concept: [{"a": 1, "b": 2}[concept]] * len(answers)  # noqa: ARG005, E731
    table = swept(model, tokenizer, bank, {"a": [1], "b": [1]}, judge=judge)
    assert [(row["score of a"], row["± of a"], row["score of b"]) for row in table.rows] == [(1, 0, 2)] * 2
    with pytest.raises(NoScore, match="for each of 4 answers"):
        swept(model, tokenizer, bank, {"a": [1]}, judge=lambda requests, answers: [1.0])  # noqa: ARG005


def test_benchmarks_run_while_the_model_is_steered(model, tokenizer, bank):
    ids = torch.tensor([[5, 6, 7]])

    def top(target):
        return target(ids).logits[0, -1].max().item()

    def several(target):
        return {"x": top(target), "y": 1.0}

    with torch.no_grad():
        table = swept(model, tokenizer, bank, {"a": [0, 2]}, also=[top, several])
    assert [[*row][-3:] for row in table.rows] == [["top", "x", "y"]] * 2
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sl.steer(model, bank, {"a": 2}):
            steered = top(model)
        plain = top(model)
    assert [row["top"] for row in table.rows] == [plain, steered] == [row["x"] for row in table.rows] and plain != steered


def test_what_the_cap_on_lengths_cut_is_said(model, tokenizer, bank):
    vectors = {bank.site_of(place): bank.rows(place).write[0] for place in bank["a"].places}
    short = sl.ConceptBank.from_directions({"a": vectors}, base=model, norm=dict.fromkeys(vectors, 0.1))
    table = swept(model, tokenizer, short, {"a": [0.01, 5]})
    assert [row.get("capped", 0) for row in table.rows] == [0, 0, 1.0] and "cut short" in repr(table)
    free = swept(model, tokenizer, short, {"a": [0.01, 5]}, allow_ood=True)
    assert "capped" not in repr(free)
    assert [r["nll"] for r in free.records[-2:]] != [r["nll"] for r in table.records[-2:]]


def test_the_table_says_what_was_not_measured_is_written_and_drawn(model, tokenizer, bank, tmp_path):
    table = swept(model, tokenizer, bank, {"a": [0, 1, 2]}, judge=count, sites=["layers.1"])
    shown = repr(table)
    assert "unit and range not measured: sl.calibrate(model, bank, ['a'], judge=…)" in shown and "nats per token" in shown
    values = json.loads(table.to_json(tmp_path / "table.json"))
    assert json.loads((tmp_path / "table.json").read_text()) == values and values["rows"] == table.rows
    assert values["settings"][2] == {"a": 2, "site": "layers.1"} and "<td>layers.1</td>" in table._repr_html_()
    assert len(swept(model, tokenizer, bank, {"a": [0]}, judge=count).rows) == 1
    assert table.plot(tmp_path / "table.png").size[0] > 300 and (tmp_path / "table.png").stat().st_size > 1000
    swept(model, tokenizer, bank, {"a": [sl.Ablate(), sl.Set(1.0)]}).plot()


@pytest.mark.parametrize(("change", "said"), [
    ({"edits": {"a": 1}}, "amounts by name of concept"), ({"edits": {}}, "amounts by"), ({"edits": {"a": "1"}}, "amounts by"),
    ({"edits": {"a": [None]}}, "numbers or edits"), ({"prompts": "why"}, "prompts as a list"), ({"prompts": []}, "as a list"),
    ({"seeds": []}, "seeds as a list"), ({"sites": [7]}, "moves at layers.0, layers.1, not at"),
    ({"guidance_scale": 2.0}, "arguments of a pipeline"), ({"also": [len, len]}, "functions of different names"),
])  # fmt: skip
def test_what_cannot_be_swept_is_refused(model, tokenizer, bank, change, said):
    given: Any = {"edits": {"a": [0, 1]}, "prompts": PROMPTS, "tokenizer": tokenizer, "new_tokens": 2} | change
    with pytest.raises(BadEdit, match=said):
        sl.sweep(model, bank, **given)
    for name in ("site", "nll"):
        with pytest.raises(BadEdit, match=f"a concept called '{name}' cannot be told"):
            swept(model, tokenizer, bank.rename({"a": name}), {name: [1]})
    with pytest.raises(sl.errors.UnknownConcept):
        sl.sweep(model, bank, {"c": [1]}, prompts=PROMPTS, tokenizer=tokenizer)


# -- pictures ----------------------------------------------------------------------------------------------------


def test_pictures_are_those_drawn_by_hand_and_the_sheet_has_each_in_its_place(toy, tmp_path):
    site = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2"
    width = toy.unet.get_submodule(site.removeprefix("unet.")).to_out[0].out_features
    bank = sl.ConceptBank.from_directions({"snow": torch.ones(width)}, site=site, base=toy)
    how: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0}
    bright = lambda prompts, pictures: pictures.mean((1, 2, 3))  # noqa: ARG005, E731
    found = sl.sweep(toy, bank, {"snow": [0, 3]}, prompts=["a hill", "a lake"], seeds=[0, 1], judge=bright, **how)
    assert found.pictures is not None and found.pictures.shape[0] == 8 and len(found.rows) == 2
    noises = [torch.Generator().manual_seed(1) for _ in range(2)]
    with sl.steer(toy, bank, {"snow": 3}, branch="cond"):
        drawn = toy(["a hill", "a lake"], generator=noises, output_type="np", **how).images
    own = [found.pictures[r["picture"]] for r in found.records if r["setting"] == 1 and r["seed"] == 1]
    np.testing.assert_array_equal(own, (drawn * 255).round().astype(np.uint8))
    image = np.asarray(found.plot(tmp_path / "sheet.png"))
    height, times = found.pictures.shape[1], 3
    first = image[-height * times - GAP : -GAP, -found.pictures.shape[2] * times - GAP : -GAP]
    last = found.records[-1]
    np.testing.assert_array_equal(first[::times, ::times], found.pictures[last["picture"]])
    assert (last["prompt"], last["seed"], last["setting"]) == ("a lake", 1, 1)
    with pytest.raises(BadEdit, match="of answers also None"):
        sl.sweep(toy, bank, {"snow": [1]}, prompts=["a hill"], seeds=[None])


def test_rows_and_columns_of_a_sheet_are_labelled():
    picture = np.full((100, 100, 3), 7, np.uint8)
    image = np.asarray(sheet({"first row": {"one": picture, "two": picture}}))
    margin = image.shape[1] - 2 * (100 + GAP)
    assert (image[GAP + LINE :, margin : margin + 100][:100] == 7).all()
    assert (image[: GAP + LINE, margin:] < 128).any() and (image[GAP + LINE :, :margin] < 128).any()
