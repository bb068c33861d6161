"""Training: the whole pipeline on a toy model, broken off and resumed, and what a recipe may be.

The toy has random weights: these tests show that stages work together, never that a concept was found.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import WORDS, tiny, toy_tokenizer

import steerlib as sl
from steerlib import errors
from steerlib.evaluation import report
from steerlib.evaluation.comparison import Condition, Unrelated
from steerlib.evaluation.score import Scores
from steerlib.training.calibrate import doses as calibrate
from steerlib.training.calibrate.measure import ANSWERING, moved
from steerlib.training.contrast import contrasts_in
from steerlib.training.directions import methods
from steerlib.training.directions.levers import Lever
from steerlib.training.directions.methods import METHODS
from steerlib.training.directions.studio import PRESENT, Studio
from steerlib.training.entries import ConceptRecipe
from steerlib.training.package.directions import sites_to_try
from steerlib.training.recipe import (
    KINDS,
    ContextRecipe,
    DirectionRecipe,
    PictureRecipe,
    PipelineEncoderRecipe,
    TextEncoderRecipe,
)
from steerlib.training.record.activations import answers

pytestmark = pytest.mark.filterwarnings("ignore:.*a budget of [23][0-9] answers:steerlib.errors.Unmeasured")


def test_units_are_the_spread_of_the_reading_on_reference_text():
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0, 1, 1]) + 5
    found = calibrate.statistics(torch.tensor([0.0, 2.0, 0, 0]), x)
    assert found.std == pytest.approx(1.5, rel=0.03) and found.mean == pytest.approx(2.5, rel=0.03)
    assert found.high == pytest.approx(2.576 * 1.5, rel=0.05) and found.low == pytest.approx(-2.576 * 1.5, rel=0.05)


# -- the pipeline --------------------------------------------------------------------------------------------


def lines(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, values)))


def write_recipe(folder):
    """Two concepts: one scored by counting, one by a classifier of texts of its own."""
    for name, positive, negative in (
        ("asking", "why now ? the bird ?", "yes . the bird ."),
        ("tea", "tea cup tea", "red stone here"),
    ):
        pairs = [{"prompt": f"the {w}", "positive": f"{positive} {w}", "negative": f"{negative} {w}"} for w in WORDS[3:9]]
        lines(folder / "pairs" / f"{name}.jsonl", pairs)
    texts = [(f"{a} {w} {b}", label) for w in WORDS[20:26] for a, b, label in (("warm tea", "cup", 1), ("the", "sleeps", 0))]
    lines(folder / "scoring" / "tea.jsonl", [{"text": text, "label": label} for text, label in texts])
    prompts = [(f"{a} {b}", s) for s, a in (("train", "old"), ("dev", "the"), ("evaluation", "why")) for b in WORDS[2:6]]
    lines(folder / "prompts.jsonl", [{"prompt": prompt, "split": split} for prompt, split in prompts])
    lines(folder / "reference.jsonl", [{"text": " ".join(WORDS[i : i + 6])} for i in range(24)])
    lines(folder / "unrelated.jsonl", [{"text": " ".join(WORDS[i : i + 5 : 2])} for i in range(12)])
    lines(folder / "held_out.jsonl", [{"text": f"a cup of {w} tea", "concept": "tea"} for w in WORDS[10:14]])
    (folder / "recipe.toml").write_text("""
name = "toy"
base = "toy/llama"
source = "nowhere"
license = "apache-2.0"
layers = [0, 1]
methods = ["difference-of-means", "several-layers"]
budget = 32
train_prompts = 4
dev_prompts = 2
evaluation_prompts = 4
seeds = 2
new_tokens = 6
answers = 3
[[concepts]]
name = "asking"
label = "asks"
instructions = ["why ?"]
scorer = { pattern = '[?]|why', per = "word" }
[[concepts]]
name = "tea"
label = "drinks"
instructions = ["tea"]
""")
    return folder / "recipe.toml"


def toy():
    """A model that knows the tokenizer's words."""
    return tiny("llama", vocab_size=len(toy_tokenizer()))


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    recipe = DirectionRecipe.from_file(write_recipe(folder / "recipe"))
    with pytest.warns(errors.Unmeasured, match="asking, tea: a budget of 32 answers tries 2 of 2 methods at layers.1"):
        bank = sl.train(toy(), recipe, tokenizer=toy_tokenizer(), work=folder / "work")
    return folder, bank, bank.save_pretrained(folder / "bank")


def test_each_concept_is_moved_alone_on_as_many_prompts_as_the_recipe_says(uninterrupted):
    """Of what counts nothing is told: `tea` is all that its scorer learned from texts."""
    folder, bank, _ = uninterrupted
    (path,) = (folder / "work").glob("*/answers/3.json")
    found = json.loads(path.read_text())
    assert found and [(name, amount) for name, amount, _ in found] == [(own.name, own.useful) for own in levers_of(bank)]
    assert all(np.shape(d) == (3, 1) for *_, d in found) and {edge.dst for edge in bank.graph.answers} <= {"answers:tea"}


def levers_of(bank):
    return [concept for concept in bank.concepts.values() if concept.useful is not None]


def chosen(folder, name):
    """What the search wrote down."""
    (path,) = (folder / "work").glob(f"*/search/{name}.json")
    return calibrate.Choice.from_dict(json.loads(path.read_text()))


def test_training_gives_a_bank_with_units_ranges_effects_gates_and_card(uninterrupted):
    _, bank, folder = uninterrupted
    sl.ConceptBank.from_pretrained(folder).verify()
    assert [concept.name for concept in levers_of(bank)] == ["asking", "tea"]
    assert "](effects.png)" in bank.card and (folder / "effects.png").read_bytes().startswith(b"\x89PNG")
    assert set(bank) - {"asking", "tea"} == {"tea.present", ANSWERING}  # there are no texts to test a gate for asking on
    for concept in levers_of(bank):
        assert concept.unit > 0 and concept.natural and concept.range and concept.useful and concept.label
        assert concept.range[0] <= 0 < concept.useful <= concept.range[1] + 1e-3 and len(concept.examples) == 3
        assert f"| {concept.name} | {concept.label} |" in bank.card
        asked = {"prompt", "unsteered", "prompted", "steered", *(["reversed"] if concept.range[0] else [])}
        assert all(example.keys() == asked for example in concept.effects["examples"])
        for place in concept.places:
            assert bank.rows(place).write.norm() == pytest.approx(1.0, abs=1e-5)
    for name in ("tea.present", ANSWERING):
        assert bank[name].present == PRESENT and 0 <= bank[name].effects["precision"] <= 1 and f"| {name} |" in bank.card
    ids, model = torch.arange(3, 13).view(2, 5), toy()
    with torch.no_grad():
        plain = model(ids).logits
        with sl.steer(model, bank, {"tea": bank["tea"].useful or 0.0}):
            assert not torch.equal(model(ids).logits, plain)


def test_a_concept_at_its_useful_amount_is_the_lever_at_the_strength_that_was_chosen(uninterrupted):
    folder, bank, _ = uninterrupted
    for concept in levers_of(bank):
        choice = chosen(folder, concept.name)
        (stored,) = (folder / "work").glob(f"*/levers/{concept.name}/{choice.method}@{choice.site}.safetensors")
        lever = Lever.from_tensors(load_file(stored))
        assert [bank.site_of(place) for place in concept.places] == list(lever.moves)
        for place, vector in zip(concept.places, lever.moves.values(), strict=True):
            moved = bank.rows(place).write[0] * place.unit * (concept.useful or 0.0)
            torch.testing.assert_close(moved, choice.strength * vector, rtol=2e-3, atol=1e-6)
        assert concept.source.startswith(f"{choice.method}, ") and choice.low <= 0 < choice.strength <= choice.high


def test_the_search_stays_within_its_budget_and_chooses_a_finalist(uninterrupted):
    """The budget of 32 is less than all settings would take, with 2 prompts each: 2 anchors twice, 2 methods at a site, the
    better one at another, 4 strengths of which 2 are left out, then 3 finalists, and 4 doses."""
    for name in ("asking", "tea"):
        choice = chosen(uninterrupted[0], name)
        assert choice.answers == 32 and len(choice.trials) == 5
        assert {trial.method for trial in choice.trials} == {"difference-of-means", "several-layers"}
        assert choice.untried.endswith("and 2 of 4 other strengths there; budget = 36 tries all")
        assert calibrate.Choice.from_dict(choice.to_dict()) == choice
        best = sorted(choice.trials, key=lambda trial: -trial.joint)[: calibrate.FINALISTS]
        assert (choice.method, choice.site, choice.strength) in [trial[:3] for trial in best]


def test_a_budget_is_spent_on_methods_first_and_on_sites_coarse_to_fine():
    """By hand: 400 answers to 10 prompts are 40 settings, of which 4 anchors twice, 3 finalists and 4 doses take 15."""
    concept = ConceptRecipe(name="a", label="a")
    recipe = DirectionRecipe(name="r", base="b", source="s", concepts=(concept,), methods=tuple("abcdefghi"))
    sites = [f"layers.{k}" for k in range(30)]
    assert calibrate.room_for(recipe, concept) == 25
    assert calibrate.Split.of(25, 9, 30) == (9, 8, 8) and calibrate.Split.of(25, 2, 3) == (2, 2, 4)
    assert calibrate.Split.of(1, 9, 30) == (1, 0, 0) and calibrate.Split.of(1000, 9, 30) == (9, 29, 18)
    assert calibrate.coarse_to_fine(sites)[:3] == ["layers.15", "layers.7", "layers.23"]
    assert sorted(calibrate.coarse_to_fine(sites)) == sorted(sites)
    said = calibrate.untried(recipe, concept, sites)
    assert said.startswith("a budget of 400 answers tries 9 of 9 methods at layers.15, the best of them at 8 of 29 further")
    assert said.endswith("budget = 710 tries all")
    assert calibrate.untried(replace(recipe, budget=710), concept, sites) == ""
    assert calibrate.untried(replace(recipe, budget=709), concept, sites) != ""


class Planned(calibrate.Search):
    """A search that only writes down what it tries; a method of all layers does best, at every site alike."""

    def __init__(self, methods, sites):
        self.concept = ConceptRecipe(name="a", label="a", methods=methods)
        recipe = DirectionRecipe(name="r", base="b", source="s", concepts=(self.concept,), budget=10_000)
        self.studio = SimpleNamespace(recipe=recipe, sites=sites)
        self.tried = []

    def _try(self, shares):
        self.tried += [(method, site) for method, site, _ in shares]
        known = {("pca", "layers.1"): 0.5, ("pca", "layers.2"): 0.7, ("probe", "layers.1"): 0.4}
        return [
            calibrate.Trial(method, site, share, 0.9 if method == "several-layers" else known.get((method, site), 0.1))
            for method, site, share in shares
        ]


def test_further_sites_are_those_of_the_best_method_that_has_one():
    methods, sites = ("probe", "several-layers", "pca"), ["layers.0", "layers.1", "layers.2"]
    search = Planned(methods, sites)
    search._tried(methods, calibrate.coarse_to_fine(sites))
    first = [(method, "layers.1") for method in methods]
    further = [("pca", "layers.0"), ("pca", "layers.2")]
    best = [("several-layers", "layers.1"), ("pca", "layers.2"), ("probe", "layers.2")]
    assert search.tried == [*first, *further, *(setting for setting in best for _ in calibrate.SHARES)]


def test_a_prompt_counts_as_moved_where_its_mean_over_seeds_rises():
    plain, steered = [[0.2, 0.5, 0.1], [0.4, 0.5, 0.1]], [[0.3, 0.1, 0.3], [0.4, 0.2, 0.0]]
    assert moved(np.array([plain, steered])) == pytest.approx(2 / 3)


def test_strengths_are_shares_of_the_strongest_that_leaves_ordinary_text_nearly_as_it_is(uninterrupted):
    """Or of the longest that the cap on lengths lets through; each lever's change of ordinary text is measured anew."""
    folder, bank, _ = uninterrupted
    recipe, model = DirectionRecipe.from_file(folder / "recipe" / "recipe.toml"), toy()
    studio = Studio(model, toy_tokenizer(), recipe, ["layers.0", "layers.1"])
    ordinary = Unrelated(model, toy_tokenizer(), recipe.read_texts(recipe.reference)[-calibrate.ORDINARY :])
    for concept in recipe.concepts:
        choice, strongest = chosen(folder, concept.name), {}
        for trial in choice.trials:
            made = studio.bank(concept, concept.asked[choice.prompt], trial.method, trial.site)
            kl = ordinary.side_effects(Condition(name="tried", bank=made, edits={"lever": trial.strength})).kl
            moves = {
                made.site_of(place): trial.strength * float(made.rows(place).write.norm()) for place in made["lever"].places
            }
            length = max(moved / studio.norms[site] for site, moved in moves.items())
            assert kl <= calibrate.DISTURBANCE and length <= 0.35 + 1e-4
            strongest[trial.method, trial.site] = max(
                strongest.get((trial.method, trial.site), (0, 0, 0)), (trial.strength, kl, length)
            )
        for (method, site), (strength, kl, length) in strongest.items():
            assert kl > 0.3 * calibrate.DISTURBANCE or length > 0.24  # 0.7 of the strongest at least
            others = {trial.strength / strength for trial in choice.trials if (trial.method, trial.site) == (method, site)}
            assert all(min(abs(share - s) for s in (0.7, 0.85, 1.0, 0.7 / 0.85)) < 2e-3 for share in others)


def test_a_setting_that_moves_another_concept_as_much_counts_for_half_of_what_it_should(monkeypatch):
    concepts = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])[:, None, None].repeat(2, 2)
    ones = np.ones((4, 1, 2))
    scores = Scores(concepts, ones, ones, ones, 0 * ones, np.zeros((4, 1, 2, 3)), texts=[[["", ""]]] * 4)
    search: Any = object.__new__(calibrate.Search)
    search.column, search.anchors = 0, [scores.of([0, 1])]
    monkeypatch.setattr(calibrate.Search, "_condition", lambda *setting: setting)
    monkeypatch.setattr(calibrate.Search, "_answers", lambda *given: scores.of([2, 3]))
    alone, both = search._scored([("pca", "layers.0", 1.0), ("probe", "layers.0", 1.0)], seed=0)
    assert (alone.joint, both.joint) == pytest.approx((1.0, 0.5 / calibrate.SPECIFIC))


def test_measurements_agree_with_what_they_were_made_from(uninterrupted):
    folder, bank, _ = uninterrupted
    for concept in levers_of(bank):
        effects = concept.effects
        found, cells = effects["conditions"], effects["joint"]
        assert {"unsteered", "prompted", "steered", "no-op", "shuffled labels", "wrong concept"} <= set(cells)
        assert sum(name.startswith("random-") for name in cells) == 3
        assert {"difference-of-means", "several-layers"} <= set(cells) and effects["method"] in cells
        means = {name: np.mean(values) for name, values in cells.items()}
        u, p = means["unsteered"], means["prompted"]
        for name, line in found.items():
            if name in cells:
                assert len(cells[name]) == 4 and line["joint"] == pytest.approx(means[name], abs=1e-4)
                if "ratio" in line:  # both were rounded, so a small gain can carry their error far
                    assert line["ratio"] == pytest.approx((means[name] - u) / (p - u), abs=1e-4 * (3 + 3 / max(p - u, 1e-4)))
        choice = chosen(folder, concept.name)
        same = choice.best_of(choice.method)[:3] == (choice.method, choice.site, choice.strength)
        assert (found[choice.method] == found["steered"]) is same and choice.method == effects["method"]
        assert found["steered"]["kl"] > 0 and found["random-1"]["kl"] > 0 and "kl" not in found["no-op"]
        assert effects["passes"]["at most 0.5 nats worse than prompting"] is (
            found["steered"]["nll"] - found["prompted"]["nll"] <= 0.5
        )


def test_stored_measurements_can_be_shown_again(uninterrupted, tmp_path):
    _, bank, folder = uninterrupted
    command = [sys.executable, "-m", "steerlib", "eval", folder, "--stored", "--out", tmp_path / "figures.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    records = [dict(concept.effects) for concept in levers_of(bank)]
    assert report.table(records) in done.stdout and report.summary_table(records) in done.stdout
    assert json.loads((tmp_path / "figures.json").read_text()) == records
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_detectors_count_tokens_of_texts_they_were_not_made_from(uninterrupted):
    """Text by text, token by token."""
    folder, bank, _ = uninterrupted
    recipe, model = DirectionRecipe.from_file(folder / "recipe" / "recipe.toml"), toy()
    studio = Studio(model, toy_tokenizer(), recipe, ["layers.0", "layers.1"])
    found = studio.detector(recipe.concepts[1])
    assert found is not None and studio.detector(recipe.concepts[0]) is None
    yes, total = [0, 0], [0, 0]
    for side, texts in enumerate(recipe.read_scoring(recipe.concepts[1])[:2]):
        for i, text in enumerate(texts):
            asked = [(recipe.read_prompts("train")[i % 4], text)]
            x = answers(model, toy_tokenizer(), asked, ["layers.0"], what="")["layers.0"][0]
            yes[side] += sum(float(token @ found.gate.read + found.gate.bias) > 0.5 for token in x)
            total[side] += len(x)
    assert (found.precision, found.recall, found.tokens) == (yes[0] / sum(yes), yes[0] / total[0], sum(total))
    assert bank["tea.present"].effects == found.effects


def test_the_same_recipe_gives_the_same_bytes(uninterrupted, tmp_path):
    folder, _, first = uninterrupted
    again = sl.train(toy(), DirectionRecipe.from_file(folder / "recipe" / "recipe.toml"), tokenizer=toy_tokenizer())
    assert contents(again.save_pretrained(tmp_path / "again")) == contents(first)


def test_a_killed_run_goes_on_to_the_same_bytes(uninterrupted, tmp_path):
    """SIGKILL after the first file of each stage."""
    folder, _, first = uninterrupted
    work = tmp_path / "work"
    script = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent.parent)!r}]
from test_training import *
torch.set_num_threads(1)
recipe = DirectionRecipe.from_file({str(folder / "recipe" / "recipe.toml")!r})
sl.train(toy(), recipe, tokenizer=toy_tokenizer(), work={str(work)!r}).save_pretrained({str(tmp_path / "bank")!r})
"""
    for wanted in ("*/activations.safetensors", "*/levers/*/*.safetensors", "*/search/*.json", "*/effects/*.json"):
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(work.glob(wanted)):
            time.sleep(0.005)
        assert process.poll() is None  # it was not done yet
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "bank").exists()
    subprocess.run([sys.executable, "-c", script], check=True, stderr=subprocess.DEVNULL)
    assert contents(tmp_path / "bank") == contents(first)


def test_results_of_another_recipe_are_not_mixed_in(uninterrupted, tmp_path):
    folder, _, _ = uninterrupted
    recipe = DirectionRecipe.from_file(folder / "recipe" / "recipe.toml")
    digests = {recipe.digest}
    for name in ("reference.jsonl", "pairs/tea.jsonl", "scoring/tea.jsonl", "prompts.jsonl", "unrelated.jsonl", "recipe.toml"):
        path = write_recipe(tmp_path / name / "recipe")
        assert DirectionRecipe.from_file(path).digest == recipe.digest
        changed = path.parent / name
        old, new = ("drinks", "sips") if name == "recipe.toml" else ("the", "old")
        changed.write_text(changed.read_text().replace(old, new))
        digests.add(DirectionRecipe.from_file(path).digest)
    assert len(digests) == 7


# -- a concept from sentences alone --------------------------------------------------------------------------

SENTENCES = """
name = "few"
base = "toy/llama"
source = "nowhere"
layers = [0, 1]
budget = 20
train_prompts = 3
dev_prompts = 2
evaluation_prompts = 2
seeds = 1
new_tokens = 4
[[concepts]]
name = "tea"
label = "drinks"
methods = ["pca"]
positive = ["the warm tea", "red tea cup", "tea sings", "old tea cup"]
negative = ["the warm hill", "red stone road", "wind sings", "old rain boat"]
"""


def test_sentences_are_enough_beside_what_comes_with_steerlib(tmp_path):
    """A folder with nothing in it but the recipe; only two requests are reported on."""
    (tmp_path / "recipe.toml").write_text(SENTENCES)
    recipe = DirectionRecipe.from_file(tmp_path / "recipe.toml")
    (concept,) = recipe.concepts
    shown, prompts = recipe.read_shown(concept), recipe.read_prompts("train")
    for side, own in zip(shown, (concept.positive, concept.negative), strict=True):
        assert side == list(zip([*prompts, prompts[0]], own, strict=True)) and len(set(prompts)) == 3
    assert recipe.read_scoring(concept) == ([*concept.positive], [*concept.negative], False)
    assert len(concept.asked) == 3 and all("drinks" in words for words in concept.asked)
    bank = sl.train(toy(), recipe, tokenizer=toy_tokenizer())
    sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank")).verify()
    assert list(bank) == ["tea", ANSWERING] and "the very examples it was made from" in bank.card
    assert len(bank["tea"].effects["examples"]) == 2 and bank["tea"].source.startswith("pca, ")


def test_classes_of_any_size_own_methods_and_other_sites_make_a_bank(tmp_path):
    """As `sl.directions` does of the data that the bank carries."""
    text = SENTENCES.replace('["pca"]', '["mine"]').replace(', "old rain boat"', "").replace("[0, 1]", '["layers.0.attn", 1]')
    (tmp_path / "recipe.toml").write_text(text.replace('base = "toy/llama"', 'base = "toy/llama"\nlicense = "CC0-1.0"'))
    recipe, model = DirectionRecipe.from_file(tmp_path / "recipe.toml"), toy()
    own: Any = {"mine": lambda positive, negative: positive.mean(0) - negative.mean(0)}
    bank = sl.train(model, recipe, tokenizer=toy_tokenizer(), methods=own)
    assert bank["tea"].source.startswith("mine, ") and {*bank.sites} <= {"layers.0.attn", "layers.1"}
    data = contrasts_in(bank)["tea"]
    assert (len(data.positive), len(data.negative)) == (4, 3)
    site = bank.site_of(bank["tea"])
    again = sl.directions(model, {"tea": data}, sites=[site], tokenizer=toy_tokenizer())
    one, other = (known.rows(known["tea"]).write[0] for known in (bank, again))
    assert float(torch.cosine_similarity(one, other, dim=0)) == pytest.approx(1, abs=1e-5)
    ordinary = Unrelated(model, toy_tokenizer(), recipe.read_texts(recipe.reference)[-calibrate.ORDINARY :])
    top = calibrate.strongest(  # what is measured again is tried at the amounts that the search tried
        calibrate.longest(bank, bank["tea"]),
        lambda amount: ordinary.side_effects(Condition(name="x", bank=bank, edits={"tea": amount})).kl,
    )
    shares = (*calibrate.SHARES, calibrate.QUICK)
    assert any(bank["tea"].useful == pytest.approx(share * top, rel=0.01) for share in shares)
    assert "mine" not in METHODS
    with pytest.raises(errors.BadRecipe, match="unknown methods mine"):
        sl.train(model, recipe, tokenizer=toy_tokenizer())
    with pytest.raises(errors.BadRecipe, match="without work="):
        sl.train(model, recipe, tokenizer=toy_tokenizer(), methods=own, work=tmp_path)
    with pytest.raises(errors.BadRecipe, match="pca: a method of steerlib is called so"):
        sl.train(model, recipe, tokenizer=toy_tokenizer(), methods={"pca": own["mine"]})


def test_lines_of_pairs_may_have_one_side_and_prompts_of_several_turns(tmp_path):
    path = write_recipe(tmp_path / "recipe")
    recipe, file = DirectionRecipe.from_file(path), path.parent / "pairs" / "tea.jsonl"
    talk = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}, {"role": "user", "content": "now"}]
    lines(file, [{"prompt": talk, "positive": "tea"}, {"prompt": "rain", "positive": "cup", "negative": "hill"}])
    (own,) = (concept for concept in recipe.concepts if concept.name == "tea")
    assert recipe.read_shown(own) == ([(talk, "tea"), ("rain", "cup")], [("rain", "hill")])
    assert [finding.what for finding in sl.lint(recipe) if finding.concept == "tea"]
    for wrong in ({"prompt": "why"}, {"positive": "tea"}, {"prompt": [{"role": "user"}], "positive": "tea"}):
        lines(file, [wrong])
        with pytest.raises(errors.BadRecipe, match="expected lines with prompt, positive, negative"):
            recipe.read_shown(own)


def test_a_method_that_is_added_is_tried_chosen_and_shipped(tmp_path, monkeypatch):
    """A file of the folder, to the registry: here one that always finds the same direction."""

    def fit(task):
        return task.at(torch.ones(len(task.positive[task.site][0])))

    monkeypatch.setitem(METHODS, "all-ones", SimpleNamespace(fit=fit))
    (tmp_path / "recipe.toml").write_text(SENTENCES.replace('["pca"]', '["all-ones"]'))
    bank = sl.train(toy(), DirectionRecipe.from_file(tmp_path / "recipe.toml"), tokenizer=toy_tokenizer(), work=tmp_path)
    assert bank["tea"].source.startswith("all-ones, ") and "| all-ones |" in bank.card
    torch.testing.assert_close(bank.rows(bank["tea"]).write[0], torch.full((32,), 32**-0.5))
    assert list(tmp_path.glob("*/levers/tea/all-ones@layers.*.safetensors"))


def test_every_file_of_the_folder_of_methods_is_a_method():
    names = [path.stem.replace("_", "-") for path in Path(methods.__file__).parent.glob("*.py") if path.stem != "__init__"]
    assert list(METHODS) == sorted(names) and all(callable(METHODS[name].fit) for name in names)


# -- kinds of recipes ----------------------------------------------------------------------------------------


def test_a_file_is_read_as_the_kind_that_it_describes(tmp_path):
    entry = '[[encoders]]\nsite = "layers.0"\nlatents = 64\n'
    texts = {
        DirectionRecipe: SENTENCES,
        TextEncoderRecipe: f'name = "x"\nbase = "b"\nsource = "s"\ncorpus = ["c.txt"]\n{entry}',
        PictureRecipe: 'name = "x"\nbase = "b"\nsource = "s"\ntemplate = "{prompt}, {concept}"\n[[concepts]]\nname = "a"\n',
        PipelineEncoderRecipe: f'name = "x"\nbase = "b"\nsource = "s"\ncorpus = ["c.txt"]\n{entry}level = 500\n',
    }
    texts[ContextRecipe] = (
        'name = "x"\nbase = "b"\nsource = "s"\nsite = "layers.0"\n[contexts]\nobserved = "a.txt"\nb = "b.txt"\n'
    )
    assert {*texts} == {*KINDS}
    for kind, text in texts.items():
        (tmp_path / "recipe.toml").write_text(text)
        assert type(sl.Recipe.from_file(tmp_path / "recipe.toml", to_train=False)) is kind
        assert type(kind.from_file(tmp_path / "recipe.toml", to_train=False)) is kind
        for other in {*KINDS} - {kind}:
            with pytest.raises(errors.BadRecipe, match=f"expected a {other.__name__}, got a {kind.__name__}"):
                other.from_file(tmp_path / "recipe.toml", to_train=False)
    (tmp_path / "recipe.toml").write_text(SENTENCES + entry)
    with pytest.raises(errors.BadRecipe, match="at least one concept, or instead at least one encoder"):
        sl.Recipe.from_file(tmp_path / "recipe.toml")
    (tmp_path / "recipe.toml").write_text(f"budget = 3\n{texts[TextEncoderRecipe]}")
    with pytest.raises(errors.BadRecipe, match="unknown fields budget; known to a TextEncoderRecipe are .*corpus"):
        sl.Recipe.from_file(tmp_path / "recipe.toml", to_train=False)


def test_a_shipped_bank_names_the_digest_of_its_recipe():
    bank = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
    path = Path(__file__).parent.parent / "concept_banks" / "recipes" / bank.provenance["recipe"] / "recipe.toml"
    assert sl.Recipe.from_file(path).digest == bank.provenance["recipe_sha256"]


# -- recipes that cannot work --------------------------------------------------------------------------------


def replaced(name, old, new):
    """A change of one file of the recipe."""

    def change(path):
        file = path.parent / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))

    return change


@pytest.mark.parametrize(("change", "match"), [
    (lambda r: r.write_text(r.read_text() + "\ncolour = 'red'"), "unknown fields colour"),
    (lambda r: r.write_text("name = "), "not valid TOML"),
    (lambda r: r.write_text('name = "x"\nbase = "b"\nsource = "s"'), "at least one concept"),
    (replaced("recipe.toml", 'name = "tea"', 'name = "asking"'), "each name once"),
    (lambda r: (r.parent / "pairs" / "tea.jsonl").unlink(), "pairs/tea.jsonl"),
    (lambda r: (r.parent / "prompts.jsonl").write_text('{"prompt": 3}'), "expected lines with prompt, split"),
    (lambda r: (r.parent / "reference.jsonl").write_text('{"words": "the sun"}'), "reference.jsonl: expected lines with text"),
    (lambda r: (r.parent / "unrelated.jsonl").write_text("the sun"), "unrelated.jsonl is not JSON lines"),
    (replaced("recipe.toml", "evaluation_prompts = 4", "evaluation_prompts = 5"), "4 evaluation prompts, expected 5"),
    (replaced("recipe.toml", "budget = 32", "budget = 0"), "positive budget"),
    (replaced("recipe.toml", '["difference-of-means", "several-layers"]', "[]"), "a method or more"),
    (replaced("recipe.toml", "seeds = 2", "seeds = 0"), "positive numbers"),
    (replaced("recipe.toml", "seeds = 2", "ship = 'some'"), "'all' or 'clearing'"),
    (replaced("recipe.toml", 'per = "word"', 'per = "page"'), "per = 'word' or 'sentence'"),
    (replaced("recipe.toml", 'label = "drinks"', 'label = "drinks"\npositive = ["tea"]'), "or more with it, and two without"),
])  # fmt: skip
def test_a_recipe_that_cannot_work_is_refused_before_a_model_is_loaded(tmp_path, change, match):
    path = write_recipe(tmp_path / "recipe")
    DirectionRecipe.from_file(path).check()
    change(path)
    with pytest.raises(errors.BadRecipe, match=match):
        sl.train(None, DirectionRecipe.from_file(path))


def test_scoring_texts_need_both_labels(tmp_path):
    path = write_recipe(tmp_path / "recipe")
    lines(path.parent / "scoring" / "tea.jsonl", [{"text": "tea", "label": 1}])
    with pytest.raises(errors.BadRecipe, match="labels 0 and 1, got"):
        DirectionRecipe.from_file(path).read_scoring(ConceptRecipe(name="tea", label="drinks"))


def test_layers_outside_the_model_and_unknown_methods_are_refused(uninterrupted):
    recipe = DirectionRecipe.from_file(uninterrupted[0] / "recipe" / "recipe.toml")
    with pytest.raises(errors.BadRecipe, match="layers from 0 to 1"):
        sites_to_try(tiny("llama"), replace(recipe, layers=(7,)))
    with pytest.raises(errors.BadRecipe, match="unknown methods magic"):
        sl.train(None, replace(recipe, methods=("magic",)))
