"""From a recipe with encoders to a bank of labelled latents, on toy models; every figure by a second way."""

import json
import math
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import WORDS, tiny, toy_tokenizer

import steerlib as sl
from steerlib import errors
from steerlib.bank.concept_bank import SiteFacts
from steerlib.encoders import ReLU, Transcoder
from steerlib.evaluation import representation
from steerlib.evaluation.quality import quality
from steerlib.evaluation.report import latents_table
from steerlib.training.fit.run import fit
from steerlib.training.label import labels as labels
from steerlib.training.label import verify as verification
from steerlib.training.label.attributes import select
from steerlib.training.label.verify import Followers, followers, next_tokens, opened, verify
from steerlib.training.package.latents import evaluate_encoders
from steerlib.training.recipe import TextEncoderRecipe
from steerlib.training.record.activations import tokens
from steerlib.training.record.documents import sources
from steerlib.training.record.shards import Shards

RECIPE = """
name = "toy-latents"
base = "toy"
source = "toy"
corpus = ["corpus.txt"]
tokens = 1200
epochs = 4
unrelated = "unrelated.jsonl"
reference = "unrelated.jsonl"
attributes = ["tea.jsonl"]

[[encoders]]
site = "layers.0"
seeds = 2
kind = "topk"
latents = 48
k = 4
batch = 128
rate = 0.01

[[encoders]]
site = "layers.1"
kind = "batchtopk"
latents = 40
k = 4
batch = 128
rate = 0.01

[[encoders]]
site = "layers.1"
name = "wide"
kind = "topk"
latents = 64
k = 4
batch = 128
rate = 0.01
"""
LOOKED_AT = {"RARE": 4, "OFTEN": 0.5, "LEAST": 1}
"""How often latents and tokens have to come up among the few that are held out."""
IDS = ["layers.0", "layers.1", "layers.1#wide"]
WITH_TEA = [f"the {word} tea sings {other}" for word in ("red", "old", "warm", "cold") for other in ("slowly", "why", "sun")]
WITHOUT = [text.replace("tea", "stone") for text in WITH_TEA]


@pytest.fixture(scope="module", autouse=True)
def _few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LOOKED_AT.items():
            patch.setattr(verification, name, value)
        yield


def write_tea(folder):
    lines = [{"text": text, "label": int(text in WITH_TEA)} for text in WITH_TEA + WITHOUT]
    (folder / "tea.jsonl").write_text("\n".join(map(json.dumps, lines)))


def toy():
    return tiny("llama", vocab_size=len(toy_tokenizer()), initializer_range=0.3).requires_grad_(False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(6, 20))) for _ in range(160)]
    (folder / "corpus.txt").write_text("\n\n".join(texts))
    (folder / "unrelated.jsonl").write_text("\n".join(f'{{"text": "{text}"}}' for text in texts[:6]))
    (folder / "recipe.toml").write_text(RECIPE)
    write_tea(folder)
    recipe = TextEncoderRecipe.from_file(folder / "recipe.toml")
    bank = sl.train(toy(), recipe, tokenizer=toy_tokenizer(), work=folder / "work")
    (activations,) = (folder / "work").glob("*/activations")
    return folder, recipe, bank, Shards(activations, held_out=0.1)


def test_every_encoder_of_the_recipe_is_in_the_bank_and_steers(made, tmp_path):
    folder, _, bank, _ = made
    assert list(bank.encoders) == IDS and bank.encoders["layers.1#wide"].site == "layers.1"
    reread = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank"))
    reread.verify()
    model, ids = toy(), torch.arange(3, 13)[None]
    plain = model(ids).logits
    for name in ("layers.0/3", "layers.1/7", "layers.1#wide/63"):
        with sl.steer(model, reread, {name: sl.Set(3.0, unit="raw")}, allow_ood=True):
            assert not torch.equal(model(ids).logits, plain)
    assert all(kind in bank.card for kind in ("topk", "batchtopk", "explained variance", "random dictionary"))
    assert bank.encoders["layers.0"].settings["disagreement"] >= 0


def test_a_run_that_goes_on_gives_the_same_bytes(made, tmp_path):
    folder, recipe, bank, _ = made
    again = sl.train(toy(), recipe, tokenizer=toy_tokenizer(), work=folder / "work")
    first, second = bank.save_pretrained(tmp_path / "a"), again.save_pretrained(tmp_path / "b")
    for path in first.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path.name


@pytest.mark.parametrize("id", IDS)
def test_statistics_are_those_of_the_recorded_activations(made, id):
    _, _, bank, shards = made
    x = torch.cat(list(shards.in_order(id.partition("#")[0], 500))).float()
    encoder = bank.encoder(id)
    z = encoder.encode(x)
    close = 2 ** (1 / labels.FINENESS)  # a bin's width; half precision moved a few readings across
    seen = [i for i in range(z.shape[1]) if (z[:, i] > 0).sum() > 20]
    assert len(seen) > 5
    for i in seen:
        positive = z[:, i][z[:, i] > 0]
        assert encoder.statistics["frequency"][i] == pytest.approx(len(positive) / len(x), rel=0.1)
        assert 1 / close < float(encoder.statistics["unit"][i] / positive.median()) < close
        concept = bank[f"{id}/{i}"]
        assert concept.unit == float(encoder.statistics["unit"][i]) and concept.label
        assert sum(concept.effects["histogram"]["counts"]) == pytest.approx(len(positive), rel=0.1)


def test_sightings_are_the_highest_activations_and_where_they_were(made):
    _, _, bank, shards = made
    encoder, site = bank.encoder("layers.0"), "layers.0"
    z = encoder.encode(torch.cat(list(shards.in_order(site, 500))).float())
    found = labels.sightings(encoder, shards, site)
    assert found.tokens == len(z) == 1200
    torch.testing.assert_close(found.highest, z.T.topk(labels.CONTEXTS).values)
    rows = found.rows[found.highest > 0]
    latents = (found.highest > 0).nonzero()[:, 0]
    torch.testing.assert_close(z[rows, latents], found.highest[found.highest > 0])
    assert torch.equal(found.histogram.sum(-1), (z > 0).sum(0))
    part = labels.sightings(encoder, shards, site, start=100, stop=300)
    assert part.tokens == 200 and part.rows[part.highest > 0].min() >= 100


def test_contexts_mark_the_token_and_stay_in_their_document(made):
    folder, _, _, shards = made
    texts = labels.Texts(toy_tokenizer(), shards)
    documents = (folder / "corpus.txt").read_text().split("\n\n")
    for row in range(0, 1200, 37):
        context = texts.around(row)
        marked = context.partition("«")[2].partition("»")[0]
        assert marked == texts.token(row).strip()
        assert any(context.replace("«", "").replace("»", "") in document for document in documents)


def test_labels_say_where_a_latent_fires_or_what_it_makes_the_model_say():
    assert labels.label(["tea", " tea", "Tea", "cup"], [" sun"]) == "on “tea”"
    assert labels.label(["tea", "cup", "tea", "cup", "sun"], []) == "on “tea”, “cup”"
    assert labels.label(["a", "b", "c", "d"], [" sun", "sun", " moon"]) == "towards “sun”, “moon”"
    assert labels.label(["a", "b", "c", "d"], []) == ""


def test_promoted_tokens_are_those_of_the_models_own_head():
    model = toy()
    rows = model.get_output_embeddings().weight[[5, 9]] / model.model.norm.weight
    found = labels.promoted(model, toy_tokenizer(), rows * 3, count=3)
    logits = model.get_output_embeddings()(rows * 3 * model.model.norm.weight)
    assert [row[0] for row in found] == [toy_tokenizer().decode([int(i)]) for i in logits.argmax(-1)]


def test_quality_equals_a_second_implementation(made):
    _, recipe, bank, shards = made
    model, tokenizer = toy(), toy_tokenizer()
    encoder, site = bank.encoder("layers.0"), "layers.0"
    x = torch.cat(list(shards.in_order(site, 500, shards.training))).float()
    texts = recipe.read_texts(recipe.unrelated)
    found = quality(model, tokenizer, encoder, site, x, texts)
    assert found["explained"] == pytest.approx(
        1 - float((x - encoder.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()), abs=1e-5
    )
    assert found["l0"] == pytest.approx(4, abs=0.5) and found["explained"] > found["control"] + 0.1
    losses = {}
    for name, make in {"plain": None, "mean": lambda a: x.mean(0).expand_as(a), "own": encoder.reconstruct}.items():
        handle = make and model.model.layers[0].register_forward_hook(lambda m, a, out, make=make: make(out))
        total, count = 0.0, 0
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        losses[name] = total / count
        if handle:
            handle.remove()
    expected = 1 - (losses["own"] - losses["plain"]) / (losses["mean"] - losses["plain"])
    assert found["recovered"] == pytest.approx(expected, abs=1e-3) and found["kl"] > 0
    assert not model.model.layers[0]._forward_hooks


def test_an_encoder_that_keeps_everything_loses_nothing():
    """x is written as its positive and negative parts."""
    eye = torch.eye(32)
    encoder = ReLU(encoder=torch.cat((eye, -eye)), bias=torch.zeros(64), decoder=torch.cat((eye, -eye)))
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    found = quality(toy(), toy_tokenizer(), encoder, "layers.0", x, ["the sun rises slowly", "why"])
    assert found["explained"] == pytest.approx(1) and found["recovered"] == pytest.approx(1, abs=1e-4)
    assert found["kl"] == pytest.approx(0, abs=1e-5) and found["dead"] == 0 and found["dense"] == 1


def test_latents_are_selected_by_their_correlation_with_labelled_texts(made):
    """Beside a table of readings made by hand, all encoders together."""
    _, _, bank, _ = made
    model, tokenizer = toy(), toy_tokenizer()
    found = select(model, tokenizer, bank, WITH_TEA, WITHOUT, count=8)
    readings = {}
    for id in IDS:
        rows = []
        for text in WITH_TEA + WITHOUT:
            with sl.record(model, [site := id.partition("#")[0]]) as tape:
                model(tokenizer(text, return_tensors="pt")["input_ids"])
            rows.append(bank.encoder(id).encode(tape[site][0][1][0, 1:]).mean(0))
        readings |= {f"{id}/{i}": column for i, column in enumerate(torch.stack(rows).T.numpy())}
    label = [1.0] * len(WITH_TEA) + [0.0] * len(WITHOUT)
    score = {name: np.corrcoef(z, label)[0, 1] if z.std() else 0.0 for name, z in readings.items()}
    best = sorted(score.values(), reverse=True)[:8]
    np.testing.assert_allclose([value for _, value in found], best, atol=1e-4)
    assert best[0] > 0.6 and all(score[concept.id] == pytest.approx(value, abs=1e-4) for concept, value in found)


def test_what_was_measured_is_in_the_bank_and_its_card(made):
    _, recipe, bank, shards = made
    found = bank.provenance["quality"]
    assert list(found) == IDS and bank.card.count(latents_table(found)) == 1
    x = torch.cat(list(shards.in_order("layers.0", 500, shards.training))).float()
    own, twin = (
        fit({"a": run}, shards.source("layers.0", seed=0), steps=4 * shards.training // 128)["a"]
        for run in recipe.encoders[0].runs.values()
    )
    assert not torch.equal(own.encoder, twin.encoder)
    expected = representation.stability(own, twin, x)
    assert found["layers.0"]["stability"] == pytest.approx(expected.mcc, abs=1e-6)
    assert found["layers.0"]["stability_control"] == pytest.approx(expected.control, abs=1e-6)
    assert "stability" not in found["layers.1"] and list(bank.encoders) == IDS
    probes = found["layers.1#wide"]["probes"]["tea"]
    selected = select(toy(), toy_tokenizer(), bank, WITH_TEA, WITHOUT, count=100)
    best = [score for concept, score in selected if concept.encoder == "layers.1#wide"][:5]
    assert [score for _, score in probes["best"]] == pytest.approx(best, abs=1e-3) and len(best) == 5
    assert probes["latents"].keys() == probes["control"].keys() == {"1", "5", "20"}


def test_followers_are_the_tokens_that_come_behind_a_latent_in_held_out_documents(made):
    """Counted again, token by token."""
    _, _, bank, shards = made
    encoder = bank.encoder("layers.1#wide")
    found = followers(encoder, shards, "layers.1")
    rows = shards.load(len(shards.entries) - 1, ["layers.1", "ids", "documents", "positions"])
    held = rows["documents"] >= shards.kept_documents
    x, ids, documents, positions = (rows[name][held] for name in ("layers.1", "ids", "documents", "positions"))
    z = encoder.encode(x.float())
    pairs = [r for r in range(len(ids) - 1) if documents[r + 1] == documents[r] and positions[r + 1] == positions[r] + 1]
    usual = Counter(int(ids[r + 1]) for r in pairs)
    expected = {}
    for i in range(z.shape[1]):
        own = Counter(int(ids[r + 1]) for r in pairs if z[r, i] > 0)
        fired = own.total()
        if 4 <= fired <= 0.5 * len(pairs):
            scores = {t: n / fired * math.log(n / fired * len(pairs) / usual[t]) for t, n in own.items()}
            best = sorted((t for t in scores if scores[t] > 0), key=lambda t: (-scores[t], t))[:8]
            if best:
                expected[i] = best, sum(scores[t] for t in best)
    assert found.keys() == expected.keys() and len(found) > 3
    for i, (best, weight) in expected.items():
        assert list(found[i].tokens) == best and found[i].weight == pytest.approx(weight)


def test_a_latent_that_writes_its_tokens_is_verified_and_one_that_writes_others_is_not():
    """Each latent writes the head's row of one token; half of them are said to be followed by the one most unlike it."""
    model, tokenizer = toy(), toy_tokenizer()
    rows, strange = torch.nn.functional.normalize(model.get_output_embeddings().weight[:24].float(), dim=-1).chunk(2)
    zero = torch.zeros(len(rows))
    encoder = ReLU(encoder=rows, bias=zero, decoder=rows, decoder_bias=torch.zeros(rows.shape[1]))
    concepts = [sl.Concept(name=f"layers.1/{i}", encoder="layers.1", index=i, natural=(0.0, 4.0)) for i in range(12)]
    bank = sl.ConceptBank(
        "rows", concepts, {"layers.1": encoder}, base=sl.BaseModel.of(model), sites={"layers.1": SiteFacts(width=rows.shape[1])}
    )
    unlike = (rows @ strange.T).argmin(-1).tolist()
    said = {f"layers.1/{i}": Followers((i if i % 2 else 12 + unlike[i],), 1.0) for i in range(12)}
    texts = [" ".join(WORDS[i : i + 6]) for i in range(8)]
    found = verify(model, tokenizer, bank, said, texts)
    assert all(found[f"layers.1/{i}"].holds for i in range(1, 12, 2))
    assert not any(found[f"layers.1/{i}"].holds for i in range(0, 12, 2))
    assert all(sum(getattr(one, by) for one in found.values()) <= 3 for by in ("random", "swapped"))
    prompts = opened(tokenizer, texts, model.device)
    with sl.steer(model, bank, {"layers.1/3": sl.Add(2.0)}):
        moved = next_tokens(model, prompts)
    gain = float((moved - next_tokens(model, prompts))[3])
    assert found["layers.1/3"].gain == pytest.approx(gain, rel=1e-4) and gain > 0.1


def test_the_card_says_what_the_corpus_was_made_of(made, tmp_path):
    _, _, bank, shards = made
    assert f"{shards.training:,} tokens" in bank.card and "| corpus.txt | not stated | 160 | 100.0% |" in bank.card
    lines = [
        {"text": "abc", "source": "books", "licence": "public domain"},
        {"text": "defgh", "source": "manuals", "licence": "PSF-2.0"},
        {"text": "ab", "source": "books", "licence": "public domain"},
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = sources([tmp_path / "corpus.jsonl"])
    assert [(row["source"], row["licence"], row["documents"], row["share"]) for row in found] == [
        ("books", "public domain", 2, 0.5),
        ("manuals", "PSF-2.0", 1, 0.5),
    ]


def test_what_moving_a_latent_did_is_kept_with_it(made):
    _, _, bank, _ = made
    quality = bank.provenance["quality"]
    for id in IDS:
        own = [c.effects["verified"] for c in bank.concepts.values() if c.encoder == id and "verified" in c.effects]
        assert quality[id].get("moved", 0) == len(own)
        assert quality[id].get("verified", 0) == sum(one["holds"] for one in own)
    assert any("verified" in c.effects for c in bank.concepts.values())
    for concept in bank.concepts.values():
        assert concept.label.startswith("before") == concept.effects.get("verified", {}).get("holds", False)


def test_a_bank_of_latents_is_measured_again_on_ordinary_text(made, tmp_path):
    """Beside a bank of the same encoders, of which it finds everything."""
    _, recipe, bank, _ = made
    model, tokenizer = toy(), toy_tokenizer()
    reread = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank"))
    found = evaluate_encoders(model, tokenizer, reread, recipe, against=bank)
    texts = recipe.read_texts(recipe.unrelated)
    x = tokens(model, tokenizer, texts, ["layers.1"], what="")["layers.1"]
    encoder = bank.encoder("layers.1#wide")
    expected = quality(model, tokenizer, encoder, "layers.1", x, texts)
    line = found["layers.1#wide"]
    assert {key: line[key] for key in expected} == expected and line["tokens"] == len(x)
    assert (
        line["stability"] == pytest.approx(1, abs=1e-6)
        and line["probes"] == bank.provenance["quality"]["layers.1#wide"]["probes"]
    )
    table = latents_table(found)
    assert all(said in table for said in ("layers.1#wide", "found by another seed", "tea", "a random dictionary"))


def test_the_command_line_measures_what_the_library_measures(made, tmp_path):
    folder, recipe, bank, _ = made
    toy().save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    saved, figures = bank.save_pretrained(tmp_path / "bank"), tmp_path / "figures.json"
    options = {"--recipe": folder / "recipe.toml", "--model": tmp_path / "model", "--against": saved, "--out": figures}
    command = [sys.executable, "-m", "steerlib", "eval", saved, *(part for option in options.items() for part in option)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = json.loads(figures.read_text()), evaluate_encoders(toy(), toy_tokenizer(), bank, recipe, against=bank)
    assert found.keys() == expected.keys()
    for id, line in expected.items():
        for name in ("explained", "control", "recovered", "kl", "stability"):
            assert found[id][name] == pytest.approx(line[name], abs=1e-4), (id, name)


def test_a_recipe_is_read_without_its_corpus_where_nothing_is_trained(made, tmp_path):
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("work", "corpus.txt"))
    with pytest.raises(errors.BadRecipe, match="corpus.txt"):
        TextEncoderRecipe.from_file(tmp_path / "recipe.toml")
    assert TextEncoderRecipe.from_file(tmp_path / "recipe.toml", to_train=False).attributes == ("tea.jsonl",)


def test_the_command_line_shows_what_the_maker_measured(made, tmp_path):
    _, _, bank, _ = made
    folder = bank.save_pretrained(tmp_path / "bank")
    command = [sys.executable, "-m", "steerlib", "eval", str(folder), "--stored", "--out", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0 and latents_table(bank.provenance["quality"]) in done.stdout, done.stderr
    assert json.loads((tmp_path / "figures.json").read_text()) == bank.provenance["quality"]


# -- transcoders ---------------------------------------------------------------------------------------------

TRANSCODERS = f"""{RECIPE.partition("[[encoders]]")[0]}
[[encoders]]
site = "layers.1.mlp"
reads = "layers.1.mlp.in"
kind = "topk"
skip = true
seeds = 2
latents = 48
k = 4
batch = 128
rate = 0.01

[[encoders]]
site = "layers.1.mlp"
reads = "layers.0"
name = "far"
kind = "jumprelu"
sparsity = 0.05
latents = 40
batch = 128
rate = 0.01
"""
READS = {"layers.1.mlp": "layers.1.mlp.in", "layers.1.mlp#far": "layers.0"}


@pytest.fixture(scope="module")
def transcoders(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transcoders")
    shutil.copytree(made[0], folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("work"))
    (folder / "recipe.toml").write_text(TRANSCODERS)
    recipe = TextEncoderRecipe.from_file(folder / "recipe.toml")
    bank = sl.train(toy(), recipe, tokenizer=toy_tokenizer(), work=folder / "work")
    (activations,) = (folder / "work").glob("*/activations")
    return folder, recipe, bank, Shards(activations, held_out=0.1)


def test_transcoders_of_a_recipe_read_at_one_site_and_write_at_another(transcoders, tmp_path):
    folder, recipe, bank, shards = transcoders
    assert {id: facts.reads for id, facts in bank.encoders.items()} == READS
    again = sl.train(toy(), recipe, tokenizer=toy_tokenizer(), work=folder / "work")  # from its checkpoints
    first, second = bank.save_pretrained(tmp_path / "a"), again.save_pretrained(tmp_path / "b")
    assert (first / "bank.json").read_bytes() == (second / "bank.json").read_bytes()
    reread = sl.ConceptBank.from_pretrained(first)
    reread.verify()
    model, ids = toy(), torch.arange(3, 13)[None]
    for id, reads in READS.items():
        encoder: Any = reread.encoder(id)
        with sl.record(model, [reads, "layers.1.mlp"]) as tape:
            model(ids)
        (_, x), (_, before) = tape[reads][0], tape["layers.1.mlp"][0]
        z = encoder.encode(x)
        i = int((z > 0).sum((0, 1)).argmax())
        edit = sl.steer(model, reread, {f"{id}/{i}": sl.Set(2.0, unit="raw")}, allow_ood=True)
        with edit, sl.record(model, ["layers.1.mlp"]) as tape:
            model(ids)
        expected = before + (2.0 - z[..., i])[..., None] * encoder.decoder[i].float()
        torch.testing.assert_close(tape["layers.1.mlp"][0][1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("id", READS)
def test_quality_of_a_transcoder_is_that_of_what_it_writes(transcoders, id):
    _, recipe, bank, shards = transcoders
    model, tokenizer, encoder = toy(), toy_tokenizer(), bank.encoder(id)
    x, y = (torch.cat(list(shards.in_order(site, 500, shards.training))).float() for site in (READS[id], "layers.1.mlp"))
    found = bank.provenance["quality"][id]
    assert found["explained"] == pytest.approx(representation.explained_variance(y, encoder.reconstruct(x)), abs=1e-6)
    assert found["explained"] > 0.1 and ("stability" in found) == (id == "layers.1.mlp")
    block, seen, losses = model.model.layers, {}, {}
    source = block[1].mlp.register_forward_pre_hook if id == "layers.1.mlp" else block[0].register_forward_hook
    source(lambda module, args, *out: seen.update(x=out[0] if out else args[0]))
    makers = {"plain": None, "mean": lambda: y.mean(0), "own": lambda: encoder.reconstruct(seen["x"])}
    for name, make in makers.items():
        handle = make and block[1].mlp.register_forward_hook(lambda m, a, out, make=make: make().expand_as(out))
        total, count = 0.0, 0
        for text in recipe.read_texts(recipe.unrelated):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        losses[name] = total / count
        if handle:
            handle.remove()
    expected = 1 - (losses["own"] - losses["plain"]) / (losses["mean"] - losses["plain"])
    assert found["recovered"] == pytest.approx(expected, abs=1e-3)
    again = evaluate_encoders(model, tokenizer, bank, recipe)[id]
    assert again["kl"] == pytest.approx(found["kl"], abs=1e-6) and again["probes"].keys() == {"tea"}


def test_a_transcoder_that_copies_what_it_reads_loses_nothing():
    """What block 0 puts out is what block 1 is given."""
    nothing = torch.zeros(4, 32)
    copy = Transcoder(encoder=nothing, bias=torch.zeros(4), decoder=nothing, threshold=torch.zeros(4), skip=torch.eye(32))
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    texts = ["the sun rises slowly", "why"]
    found = quality(toy(), toy_tokenizer(), copy, "layers.1.in", x, texts, reads="layers.0", y=x)
    assert found["explained"] == pytest.approx(1) and found["recovered"] == pytest.approx(1, abs=1e-5) and found["dead"] == 1


def test_a_transcoder_that_would_read_what_is_not_there_yet_is_refused(transcoders, tmp_path):
    folder, recipe, _, _ = transcoders
    spec = replace(recipe.encoders[0], reads="layers.1")
    with pytest.raises(errors.BadRecipe, match="a site before 'layers.1.mlp'"):
        sl.train(toy(), replace(recipe, encoders=(spec,)), tokenizer=toy_tokenizer(), work=tmp_path)
    assert not list(tmp_path.glob("*/activations"))
    refused = {
        "of batchtopk, jumprelu, relu, topk": ('"jumprelu"', '"gated"'),
        "reads beside skip": ('reads = "layers.1.mlp.in"', ""),
    }
    for said, change in refused.items():
        (folder / "wrong.toml").write_text(TRANSCODERS.replace(*change))
        with pytest.raises(errors.BadRecipe, match=said):
            TextEncoderRecipe.from_file(folder / "wrong.toml")


# -- what is refused -----------------------------------------------------------------------------------------

REFUSED = {
    "a corpus for encoders": ('corpus = ["corpus.txt"]', ""),
    "unknown fields": ('kind = "topk"', 'kinds = "topk"'),
    "positive numbers of tokens": ("tokens = 1200", "tokens = 0"),
    "found none": ('corpus = ["corpus.txt"]', 'corpus = ["other.txt"]'),
    "each name once": ('name = "wide"', ""),
    "seeds of 1 or more": ("seeds = 2", "seeds = 0"),
    "expected tea.json beside": ('"tea.jsonl"', '"tea.json"'),
    "4 texts or more of each": ('"tea.jsonl"', '"few.jsonl"'),
}
"""What is said, and the change of the recipe."""


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(tmp_path, said):
    (tmp_path / "corpus.txt").write_text("the sun")
    (tmp_path / "unrelated.jsonl").write_text('{"text": "the sun"}')
    write_tea(tmp_path)
    (tmp_path / "few.jsonl").write_text('{"text": "tea", "label": 1}\n{"text": "sun", "label": 0}')
    (tmp_path / "recipe.toml").write_text(RECIPE.replace(*REFUSED[said], 1))
    with pytest.raises(errors.BadRecipe, match=said):
        TextEncoderRecipe.from_file(tmp_path / "recipe.toml")
