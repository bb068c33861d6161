"""Training: formulas against closed forms, and the whole pipeline on a toy model, broken off and resumed.

The toy has random weights: these tests show that stages work together, never that a concept was found.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import steerlib as sl
from steerlib import errors
from steerlib.evaluation import text
from steerlib.training import calibrate, fit, pipeline
from steerlib.training.recipe import Recipe

WORDS = """a the sun moon rises falls slowly now why so red blue tea cup ? . yes no stone bird sings here there""".split()  # noqa: SIM905


def clouds(n=400, d=8, seed=0):
    """Pairs whose difference is 2 along the first axis, with much shared and a little own noise."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, d, generator=g) * 3
    shift = torch.zeros(d)
    shift[0] = 2.0
    return shared + shift + 0.1 * torch.randn(n, d, generator=g), shared


def test_difference_of_means_is_the_difference_of_means():
    positive, negative = clouds()
    torch.testing.assert_close(fit.difference_of_means(positive, negative), positive.mean(0) - negative.mean(0))


@pytest.mark.parametrize("method", ["difference-of-means", "pca"])
def test_paired_methods_find_the_axis_and_its_sign_under_shared_noise(method):
    direction = fit.unit(fit.METHODS[method](*clouds()))
    assert direction[0] > 0.99 and direction.norm() == pytest.approx(1.0)
    assert fit.unit(fit.METHODS[method](*clouds()[::-1]))[0] < -0.99


def test_the_probe_points_along_the_difference_of_separable_classes():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 300, 8, generator=g) * torch.linspace(0.5, 2, 8)
    shift = torch.zeros(8)
    shift[2] = 4.0
    direction = fit.unit(fit.probe(noise[0] + shift, noise[1]))
    assert direction.abs().argmax() == 2 and direction[2] > 0.9


def test_units_are_the_spread_of_the_reading_on_reference_text():
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0, 1, 1]) + 5
    found = calibrate.statistics(torch.tensor([0.0, 2.0, 0, 0]), x)
    assert found.std == pytest.approx(1.5, rel=0.03) and found.mean == pytest.approx(2.5, rel=0.03)
    assert found.high == pytest.approx(2.576 * 1.5, rel=0.05) and found.low == pytest.approx(-2.576 * 1.5, rel=0.05)


def test_counting_scorers_count():
    assert text.counter(r"\?", "sentence")(["Why? So. No", "a", ""]).tolist() == [1 / 3, 0, 0]
    assert text.counter(r"\b(I|we)\b", "word")(["I think we're I", "them"]).tolist() == [3 / 4, 0]
    assert text.shortness(["one", "one two three four"]).tolist() == pytest.approx([0, -1.3863], abs=1e-4)


def test_likelihood_equals_the_models_own_loss():
    model, tokenizer = tiny("llama"), toy_tokenizer()
    done = text.complete(model, tokenizer, ["the sun rises", "why"], new_tokens=6)
    for row in range(2):
        ids = done.ids[row][done.mask[row]]
        labels = ids.clone()
        labels[: int(done.mask[row, : done.prompt].sum())] = -100
        with torch.no_grad():
            expected = model(ids[None], labels=labels[None]).loss
        assert text.nll(model, done)[row] == pytest.approx(float(expected), abs=1e-4)


# -- the pipeline --------------------------------------------------------------------------------------------


def toy_tokenizer():
    vocabulary = {word: i + 3 for i, word in enumerate(WORDS)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    template = "{% for m in messages %}{{ m['content'] }} . {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def write_recipe(folder):
    """Two concepts, scored by counting."""
    (folder / "pairs").mkdir(parents=True)
    for name, positive, negative in (
        ("asking", "why so ? the bird ?", "yes . the bird ."),
        ("tea", "tea cup tea", "red stone here"),
    ):
        lines = [{"prompt": f"the {w}", "positive": f"{positive} {w}", "negative": f"{negative} {w}"} for w in WORDS[3:9]]
        (folder / "pairs" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = [{"prompt": f"{a} {b}", "split": s} for s, a in (("dev", "the"), ("test", "why")) for b in WORDS[2:6]]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    reference = [{"text": " ".join(WORDS[i : i + 6])} for i in range(12)]
    (folder / "reference.jsonl").write_text("\n".join(map(json.dumps, reference)))
    (folder / "recipe.toml").write_text("""
name = "toy"
base = "toy/llama"
source = "nowhere"
license = "apache-2.0"
layers = [0, 1]
shares = [0.1, 0.3]
dev_prompts = 4
test_prompts = 4
new_tokens = 6
[[concepts]]
name = "asking"
label = "asks"
instruction = "why ?"
scorer = { pattern = '[?a]', per = "word" }
[[concepts]]
name = "tea"
label = "drinks"
instruction = "tea"
scorer = { count = "words" }
""")
    return folder / "recipe.toml"


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    recipe = Recipe.from_file(write_recipe(folder / "recipe"))
    bank = sl.train(tiny("llama"), recipe, tokenizer=toy_tokenizer(), work=folder / "work")
    return folder, bank, bank.save_pretrained(folder / "bank")


def test_training_gives_a_bank_with_units_ranges_effects_and_card(uninterrupted):
    _, bank, folder = uninterrupted
    sl.ConceptBank.from_pretrained(folder).verify()
    for concept in bank.concepts.values():
        assert concept.unit > 0 and concept.natural and concept.range and concept.useful and concept.label
        assert concept.range[0] <= 0 < concept.useful <= concept.range[1] + 1e-3
        assert len(concept.effects["random"]) == 5 and f"| {concept.name} |" in bank.card
        assert bank.rows(concept).write.norm() == pytest.approx(1.0, abs=1e-5)
    with sl.steer(tiny("llama"), bank, {"tea": 0.1}) as session:
        pass
    assert session.bank is bank


def test_the_same_recipe_gives_the_same_bytes(uninterrupted, tmp_path):
    folder, _, first = uninterrupted
    again = sl.train(tiny("llama"), Recipe.from_file(folder / "recipe" / "recipe.toml"), tokenizer=toy_tokenizer())
    assert contents(again.save_pretrained(tmp_path / "again")) == contents(first)


def test_a_killed_run_goes_on_to_the_same_bytes(uninterrupted, tmp_path):
    """SIGKILL after the first file of each stage."""
    folder, _, first = uninterrupted
    work = tmp_path / "work"
    script = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent.parent)!r}]
from test_training import *
recipe = Recipe.from_file({str(folder / "recipe" / "recipe.toml")!r})
sl.train(tiny("llama"), recipe, tokenizer=toy_tokenizer(), work={str(work)!r}).save_pretrained({str(tmp_path / "bank")!r})
"""
    for wanted in ("*/directions.safetensors", "*/search/*.json", "*/effects/*.json"):
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(work.glob(wanted)):
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", script], check=True, stderr=subprocess.DEVNULL)
    assert contents(tmp_path / "bank") == contents(first)


def test_results_of_another_recipe_are_not_mixed_in(uninterrupted, tmp_path):
    folder, _, _ = uninterrupted
    recipe = Recipe.from_file(folder / "recipe" / "recipe.toml")
    changed = tmp_path / "recipe"
    write_recipe(changed)
    (changed / "reference.jsonl").write_text('{"text": "the moon"}\n')
    assert Recipe.from_file(changed / "recipe.toml").digest != recipe.digest


@pytest.mark.parametrize(("change", "match"), [
    (lambda r: r.write_text(r.read_text() + "\ncolour = 'red'"), "unknown fields colour"),
    (lambda r: r.write_text("name = "), "not valid TOML"),
    (lambda r: r.write_text('name = "x"\nbase = "b"\nsource = "s"'), "at least one concept"),
    (lambda r: (r.parent / "pairs" / "tea.jsonl").unlink(), "pairs/tea.jsonl"),
    (lambda r: (r.parent / "prompts.jsonl").write_text('{"prompt": 3}'), "expected lines with prompt, split"),
    (lambda r: (r.parent / "reference.jsonl").unlink(), "reference.jsonl"),
])  # fmt: skip
def test_a_recipe_that_cannot_work_is_refused_before_a_model_is_loaded(tmp_path, change, match):
    path = write_recipe(tmp_path / "recipe")
    change(path)
    with pytest.raises(errors.BadRecipe, match=match):
        sl.train(None, Recipe.from_file(path))


def test_layers_outside_the_model_and_unknown_methods_are_refused(uninterrupted):
    recipe = Recipe.from_file(uninterrupted[0] / "recipe" / "recipe.toml")
    with pytest.raises(errors.BadRecipe, match="layers from 0 to 1"):
        pipeline.layers_to_try(tiny("llama"), Recipe(**{**vars(recipe), "layers": (7,)}))
    with pytest.raises(errors.BadRecipe, match="unknown methods magic"):
        sl.train(None, Recipe(**{**vars(recipe), "methods": ("magic",)}))
