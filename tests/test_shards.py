"""Recording activations: what is kept of which texts, shards on disk, and the order of batches."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import WORDS, tiny, toy_tokenizer

import steerlib as sl
from steerlib.errors import BadRecipe, SiteNotReached, SteeringWarning, UnknownSite
from steerlib.training.record import harvest as harvesting
from steerlib.training.record.activations import reading
from steerlib.training.record.documents import documents, pieces, rendered
from steerlib.training.record.harvest import harvest
from steerlib.training.record.shards import Shards

SITES = ["layers.0", "layers.1.attn"]


def toy(**given):
    return tiny("llama", vocab_size=len(toy_tokenizer()), **given)


def texts(count=300, seed=0):
    """Documents of 2 to 40 known words."""
    chance = np.random.default_rng(seed)
    return [" ".join(chance.choice(WORDS[3:], size=chance.integers(2, 41))) for _ in range(count)]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def everything(shards, names):
    """All rows at once."""
    (found,) = shards.in_order([*names], len(shards)) if len(shards.entries) == 1 else [None]
    if found is None:
        parts = list(shards.in_order([*names], 10**6))
        found = {name: torch.cat([part[name] for part in parts]) for name in names}
    return found


ROWS = 256
"""Tokens a shard of these tests has room for."""
SIZE = 4096 + ROWS * (2 * 32 * 2 + 12)


def record(folder, said=None, model=None, sites=SITES, **how):
    """2,000 tokens of two sites, bf16, in nine shards, unless something else is asked for."""
    given: dict[str, Any] = {"tokens": 2000, "context": 16, "batch": 64, **how}
    with mock.patch.object(harvesting, "SHARD_BYTES", given.pop("shard_bytes", SIZE)):
        return harvest(model or toy(), toy_tokenizer(), texts() if said is None else said, sites, folder, **given)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    torch.set_num_threads(1)
    return record(tmp_path_factory.mktemp("recorded") / "a")


# -- what is recorded ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_activations_are_those_of_a_plain_forward_bit_for_bit(tmp_path):
    model, tokenizer, said = toy(), toy_tokenizer(), texts(12)
    how = {"tokens": 100, "context": 64, "batch": 1, "dtype": "fp32", "seed": None}  # one piece a pass
    shards = record(tmp_path / "a", said, model, ["layers.0", "embed"], **how)
    passes = [tokenizer(text, return_tensors="pt")["input_ids"] for text in said]
    states = [model(ids, output_hidden_states=True).hidden_states for ids in passes]
    found = everything(shards, ["layers.0", "embed", "documents", "positions", "ids"])
    for row in range(100):
        document, position = int(found["documents"][row]), int(found["positions"][row])
        assert passes[document][0, position] == found["ids"][row] and position > 0
        for site, state in zip(("embed", "layers.0"), states[document], strict=False):
            assert torch.equal(found[site][row], state[0, position])


def test_padded_passes_give_the_same_and_only_what_is_to_be_recorded(tmp_path, recorded):
    alone = record(tmp_path / "b", batch=1)
    one, many = (everything(shards, [*SITES, "documents", "positions", "ids"]) for shards in (alone, recorded))
    for name in ("documents", "positions", "ids"):
        assert torch.equal(one[name], many[name])
    for site in SITES:
        torch.testing.assert_close(one[site], many[site], rtol=0.02, atol=1e-3)  # one rounding of bfloat16 apart
    cut = list(pieces(toy_tokenizer(), texts(), 16))
    expected = [(p.document, p.start + i, t) for p in cut for i, t in enumerate(p.ids) if i > 0][:2000]
    assert [*zip(*(many[n].tolist() for n in ("documents", "positions", "ids")), strict=True)] == expected
    assert len(recorded) == 2000 and recorded.width("layers.0") == 32 and recorded.sites == tuple(SITES)
    assert many["layers.0"].dtype == torch.bfloat16


def test_first_and_special_tokens_are_left_out():
    tokenizer = toy_tokenizer()
    said = ["the sun <s> rises </s> now here there"]
    ids = tokenizer(said[0])["input_ids"]
    special = [i for i, t in enumerate(ids) if t in (1, 2)]
    assert len(special) == 2
    (piece,) = pieces(tokenizer, said, 16)
    assert piece.ids == ids and [i for i, kept in enumerate(piece.kept) if not kept] == [0, *special]
    assert [(p.start, p.ids) for p in pieces(tokenizer, said, 4)] == [(0, ids[:4]), (4, ids[4:])]


def test_pieces_begin_with_the_token_that_the_tokenizer_begins_texts_with():
    from tokenizers.processors import TemplateProcessing

    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    said = ["the sun rises now here there"]
    ids = tokenizer(said[0])["input_ids"]
    assert ids[0] == 1 and len(ids) == 7
    first, second = pieces(tokenizer, said, 5)
    assert first.ids == ids[:5] and second.ids == [1, *ids[5:]]
    assert first.start == -1 and second.start == 3 and first.kept == [False, True, True, True, True]


def test_of_a_chat_only_what_messages_say_is_recorded():
    tokenizer = toy_tokenizer()
    chat = [{"role": "user", "content": "why . now ?"}, {"role": "assistant", "content": "the sun ."}]
    assert rendered(tokenizer, chat) == ("why . now ? . the sun . . ", [(0, 11), (14, 23)])
    (piece,) = pieces(tokenizer, [chat], 16)
    assert tokenizer.decode(piece.ids) == "why . now ? . the sun . ."
    assert piece.kept == [False, True, True, True, False, True, True, True, False]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(BadRecipe, match="rewrites what messages say"):
        list(pieces(tokenizer, [chat], 16))


def test_texts_come_from_lists_files_datasets_and_streams(tmp_path):
    said = ["the sun rises", "red tea"]
    (tmp_path / "a.txt").write_text("the sun rises\n\n\nred tea\n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in said))
    datasets = pytest.importorskip("datasets", reason="needs datasets, of the extra dev")
    rows = datasets.Dataset.from_dict({"text": said, "other": ["a", "b"]})
    both = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    for source in (said, tmp_path / "a.txt", str(tmp_path / "b.jsonl"), rows, rows.to_iterable_dataset(), iter(said)):
        assert list(documents(source)) == said
    assert list(documents(both)) == said * 2
    many = texts(50)
    assert sorted(documents(many, seed=3)) == sorted(documents(iter(many), seed=3)) == sorted(many)
    assert list(documents(many, seed=3)) != many != list(documents(iter(many), seed=3))
    for wrong in ("no such file", tmp_path, datasets.DatasetDict(train=rows), [3], [{"texts": "a"}], [[{"role": "user"}]]):
        with pytest.raises(BadRecipe):
            list(documents(wrong))
    with pytest.raises(BadRecipe, match="column text or messages, got other"):
        list(documents(rows.remove_columns("text")))


# -- the pass ------------------------------------------------------------------------------------------------


def test_one_pass_reads_all_sites_and_ends_at_the_deepest(tmp_path):
    model, calls = toy(num_hidden_layers=4), Counter()
    for name in ("model.layers.0", "model.layers.1", "model.layers.2", "model.layers.3", "model.norm", "lm_head"):
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    before, weights = hooks(model), deepcopy(model.state_dict())
    record(tmp_path / "a", texts(8), model, ["layers.0", "layers.1"], tokens=40, context=64, batch=10**4)
    assert calls == {"model.layers.0": 2, "model.layers.1": 2}  # a pass to learn the widths, and one over the texts
    assert hooks(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_nothing_is_left_on_the_model_whatever_happens(tmp_path):
    model = toy()

    def broken():
        yield from texts(40)
        raise OSError("the stream ended")

    with pytest.raises(OSError, match="the stream ended"):
        record(tmp_path / "a", broken(), model, tokens=10**6, seed=None)
    with pytest.raises(UnknownSite):
        record(tmp_path / "b", texts(4), model, ["layers.0", "layers.99"])
    with pytest.raises(SiteNotReached, match="lm_head"):
        record(tmp_path / "b", texts(4), model, ["layers.0", "lm_head"])
    model.model.layers[0].mlp.down_proj.weight.data[0] = float("inf")
    with pytest.raises(BadRecipe, match="finite"):
        record(tmp_path / "b", model=model)
    assert not hooks(model) and "generate" not in vars(model)


@torch.no_grad()
def test_a_pass_in_lower_precision_is_that_of_a_cast_model_and_leaves_the_weights(tmp_path):
    model, ids = toy(), torch.arange(3, 13).view(2, 5)
    cast = deepcopy(model)
    for p in cast.parameters():
        p.data = p.data.bfloat16()
    with reading(model, ["layers.1"], torch.bfloat16) as read:
        found = read(ids, None)["layers.1"]
    with sl.record(cast, ["layers.1"]) as tape:
        cast(ids)
    assert found.dtype == torch.bfloat16 and torch.equal(found, tape["layers.1"][0][1])
    assert all(p.dtype == torch.float32 for p in model.parameters()) and not hooks(model)


@pytest.mark.parametrize("able", [True, False])
def test_passes_compute_in_bf16_where_the_machine_is_fast_at_it(able, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able}, raising=False)
    shards = record(tmp_path / "a", tokens=40)
    assert shards.settings["compute"] == ("torch.bfloat16" if able else "torch.float32") and shards.settings["dtype"] == "bf16"
    assert not harvesting.is_fast(torch.device("cpu"), "fp32")


# -- shards --------------------------------------------------------------------------------------------------


def record_in_another_process(folder):
    code = (
        "import sys; sys.path.insert(0, 'tests'); import torch; torch.set_num_threads(1)\n"
        "from test_shards import *\n"
        f"record({str(folder)!r})"
    )
    root = Path(__file__).parent.parent
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})


def test_a_killed_run_goes_on_behind_the_last_whole_shard(tmp_path, recorded, monkeypatch):
    process = record_in_another_process(tmp_path / "a")
    while not (tmp_path / "a" / "00002.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "a" / "00005.part").write_bytes(b"half of a shard")
    passes = []
    whole = harvesting.Recorder.activations
    monkeypatch.setattr(harvesting.Recorder, "activations", lambda *args: passes.append(1) or whole(*args))
    again = record(tmp_path / "a")
    assert 0 < len(passes) < len(again.entries) == len(recorded.entries) >= 8
    assert {n: b for n, b in contents(tmp_path / "a").items() if not n.endswith(".part")} == contents(recorded.folder)


def test_a_finished_run_does_nothing_again_and_goes_on_with_more_tokens(tmp_path, recorded):
    model, folder = toy(), tmp_path / "a"
    short = record(folder, model=model, tokens=700)
    assert len(short) == 700 and all(entry["bytes"] <= SIZE for entry in short.entries)
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    record(folder, model=model, tokens=700)
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    record(folder, model=model)
    assert contents(folder) == contents(recorded.folder)
    for wrong in ({"tokens": 100}, {"context": 8}, {"seed": 1}, {"dtype": "fp32"}):
        with pytest.raises(BadRecipe):
            record(folder, model=model, **wrong)
    with pytest.raises(BadRecipe, match="other texts"):
        record(folder, texts(seed=1), model)
    model.model.layers[0].mlp.down_proj.weight.data += 1
    with pytest.raises(BadRecipe, match="other model"):
        record(folder, model=model)
    assert contents(folder) == contents(recorded.folder)


def test_texts_that_run_out_are_recorded_with_a_warning(tmp_path):
    with pytest.warns(SteeringWarning, match="of 2000 tokens: the texts ran out"):
        part = record(tmp_path / "a", texts(4))
    assert 0 < len(part) < 2000
    with pytest.raises(BadRecipe, match="give more texts"):
        record(tmp_path / "b", ["red"])


def test_a_missing_or_cut_shard_is_told_and_made_anew(tmp_path, recorded):
    folder = tmp_path / "a"
    record(folder)
    (folder / "00003.safetensors").write_bytes(b"short")
    with pytest.raises(BadRecipe, match="00003"):
        Shards(folder)
    record(folder)
    assert contents(folder) == contents(recorded.folder)
    with pytest.raises(BadRecipe, match="found no index"):
        Shards(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"context": 1},
        {"sites": "layers.0"},
        {"sites": []},
        {"sites": ["layers.0"] * 2},
        {"shard_bytes": 5000},
    ],
)
def test_what_cannot_work_is_refused(wrong, tmp_path):
    with pytest.raises(BadRecipe):
        record(tmp_path / "a", **wrong)
    with pytest.raises(BadRecipe, match="eval"):
        record(tmp_path / "a", model=toy().train())


# -- batches -------------------------------------------------------------------------------------------------

NAMES = ["layers.0", "documents", "positions"]


def keys(batch):
    return [*zip(batch["documents"].tolist(), batch["positions"].tolist(), strict=True)]


def test_every_epoch_gives_every_row_once_in_another_order(recorded):
    stored = everything(recorded, NAMES)
    rows = {key: x for key, x in zip(keys(stored), stored["layers.0"], strict=True)}
    found = list(recorded.batches(NAMES, 0, 100, seed=0, epochs=2, mix=3))
    assert len(found) == 40 and len(rows) == 2000
    given = [key for batch in found for key in keys(batch)]
    assert sorted(given[:2000]) == sorted(given[2000:]) == sorted(rows) and given[:2000] != given[2000:]
    for batch in found:
        assert all(torch.equal(x, rows[key]) for key, x in zip(keys(batch), batch["layers.0"], strict=True))
    assert len(list(recorded.batches("layers.0", 0, 300, epochs=2))) == 13  # whole ones only
    other = next(recorded.batches(NAMES, 0, 100, seed=1, mix=3))
    assert keys(other) != keys(found[0])
    assert torch.equal(next(recorded.batches("layers.0", 0, 100, mix=3)), found[0]["layers.0"])


def test_a_batch_mixes_documents_as_a_shuffle_of_all_would(recorded):
    def distinct(batches):
        return np.mean([len(set(documents.tolist())) for documents in batches])

    stored = everything(recorded, ["documents"])["documents"]
    shuffled = distinct(stored[torch.randperm(2000, generator=torch.Generator().manual_seed(0))].split(50))
    mixed = {mix: distinct(recorded.batches("documents", 0, 50, epochs=1, mix=mix)) for mix in (2, 4, 16)}
    assert mixed[16] == pytest.approx(shuffled, rel=0.05) and mixed[2] < mixed[4] < mixed[16]
    assert distinct(recorded.in_order("documents", 50)) < 0.5 * mixed[2]


def test_it_starts_again_at_any_step_exactly(recorded):
    whole = [batch["layers.0"] for batch in recorded.batches(NAMES, 0, 130, seed=5, epochs=3, mix=2)]
    for step in (1, 7, 15, 31, 45):
        again = list(recorded.batches("layers.0", step, 130, seed=5, epochs=3, mix=2))
        assert len(again) == len(whole) - step and all(map(torch.equal, again, whole[step:]))


def test_encoders_are_fitted_to_one_site_or_from_one_to_another(recorded):
    source = recorded.source("layers.0", seed=4, mix=2)
    assert source.width == 32 and len(source) == recorded.training
    for i in (0, 5):
        assert torch.equal(next(source.batches(i, 100)), next(recorded.batches("layers.0", i, 100, seed=4, mix=2)))
    x, y = next(recorded.source("layers.0", target="layers.1.attn").batches(1, 100))
    both = next(recorded.batches(SITES, 1, 100))
    assert torch.equal(x, both["layers.0"]) and torch.equal(y, both["layers.1.attn"])
    assert not torch.equal(x, y)


def test_memory_holds_no_more_shards_than_are_mixed(recorded, monkeypatch):
    loaded = []
    monkeypatch.setattr(Shards, "load", lambda self, n, names: loaded.append(n) or {n: torch.zeros(ROWS, 1) for n in names})
    batches = recorded.batches("layers.0", 0, 10, mix=3)
    next(batches)
    assert len(loaded) <= 3


def test_held_out_documents_are_in_no_batch(recorded):
    shards = Shards(recorded.folder, held_out=0.1)
    rest = {key for part in shards.in_order(NAMES, 64, start=shards.training) for key in keys(part)}
    trained = {key for batch in shards.batches(NAMES, 0, 50, epochs=3) for key in keys(batch)}
    held, seen = ({document for document, _ in found} for found in (rest, trained))
    assert not held & seen and min(held) > max(seen) and max(held) == shards.documents - 1
    assert len(held) == pytest.approx(0.1 * shards.documents, abs=1.5) and len(trained) == shards.training
    assert len(rest) + shards.training == len(shards) == 2000
    assert recorded.training == 2000
    for wrong in (1.0, -0.1):
        with pytest.raises(BadRecipe):
            Shards(recorded.folder, held_out=wrong)
    for wrong in ({"batch": 0}, {"batch": 2001}, {"mix": 0}, {"start_step": -1}):
        with pytest.raises(BadRecipe):
            recorded.batches("layers.0", **{"start_step": 0, "batch": 10, **wrong})
    with pytest.raises(BadRecipe, match="layers.0"):
        recorded.batches("layers.9", 0, 10)


def test_shards_are_plain_safetensors(recorded):
    entry = recorded.entries[0]
    found = load_file(recorded.folder / entry["file"])
    assert set(found) == {*SITES, "documents", "positions", "ids"} and len(found["ids"]) == entry["rows"] <= ROWS
    index = json.loads((recorded.folder / "index.json").read_text())
    assert index["format"] == 1 and index["settings"]["sites"] == dict.fromkeys(SITES, 32)
