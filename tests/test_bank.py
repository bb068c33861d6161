"""The bank on disk: round trips, laziness, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import two_directions
from safetensors.torch import save_file
from tiny_models import tiny

import steerlib as sl
from steerlib import errors
from steerlib.bank import hub, trust
from steerlib.bank.concept_bank import SiteFacts

WIDTH, MANY = 576, 3000


def make(count=3, width=32, base=None):
    """A bank with everything in it."""
    generator = torch.Generator().manual_seed(0)
    encoder = sl.Directions(torch.randn(count, width, generator=generator), torch.linspace(-1, 1, count))
    concepts = [
        sl.Concept(
            name=f"concept {i}", encoder="layers.0@late#dir", index=i, unit=0.5 + i, natural=(-1.5, 2.0), range=(-3.0, 4.0),
            useful=2.0, beyond="worn", label=f"number {i}, ünïcode", source="made up", examples=("a", "b"),
            effects={"score": 0.25}, present=None if i else 0.5, match_norm=True,
            parts=(sl.Part(encoder="layers.0@late#dir", index=count - 1 - i, unit=0.25),),
            gate=sl.Gate("concept 0", above=0.5, full=1.5) if i else sl.Gate("concept 0"),
        )
        for i in range(count)
    ]  # fmt: skip
    edges = [sl.Edge(src="concept 0", dst="concept 1", weight=0.5)] if count > 1 else []
    return sl.ConceptBank(
        "made", concepts, {"layers.0@late#dir": encoder}, base=base or sl.BaseModel(id="org/model", weights="abc"),
        sites={"layers.0": SiteFacts(width=width, norm=3.0)}, graph=sl.CausalGraph(edges), card="# made\n",
        license="apache-2.0", provenance={"seed": 0},
    )  # fmt: skip


def test_pictures_of_the_card_come_along(saved, tmp_path):
    bank = sl.ConceptBank.from_pretrained(saved).with_concepts(pictures={"effects.png": b"\x89PNG"})
    again = sl.ConceptBank.from_pretrained(bank.with_concepts(list(bank.concepts.values())).save_pretrained(tmp_path / "new"))
    assert again.pictures == bank.pictures == {"effects.png": b"\x89PNG"} and again.card == bank.card
    (tmp_path / "new" / "effects.png").write_bytes(b"\x89PNF")
    with pytest.raises(errors.CorruptBank, match="effects.png is not the file"):
        sl.ConceptBank.from_pretrained(tmp_path / "new")


def with_pipeline(folder):
    """A bank that comes with a folder of files of its own."""
    held = {"model_index.json": b"{}", "unet/weights.safetensors": bytes(9), "tokenizer/merges.txt": b"a b"}
    for name, data in held.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return make().with_concepts(files={"pipeline": folder})


def test_a_pipeline_in_its_folder_is_listed_hashed_copied_and_checked(tmp_path):
    bank = with_pipeline(tmp_path / "pipe")
    folder = bank.save_pretrained(tmp_path / "bank")
    again = sl.ConceptBank.from_pretrained(folder)
    assert again.file("pipeline") == folder / "pipeline" and again.file("other") is again.file("pipe") is None
    assert again.file("pipeline/unet/weights.safetensors") == folder / "pipeline" / "unet" / "weights.safetensors"
    changed = again.with_concepts([c for c in again.concepts.values()], card="# new")
    assert contents(changed.save_pretrained(tmp_path / "copy") / "pipeline") == contents(tmp_path / "pipe")
    again.save_pretrained(folder)
    assert contents(folder / "pipeline") == contents(tmp_path / "pipe"), "also where it is saved over itself"
    flip(folder / "pipeline" / "unet" / "weights.safetensors", 3)
    opened = sl.ConceptBank.from_pretrained(folder)  # opening reads no pipeline
    for use in (opened.verify, lambda: opened.file("pipeline"), lambda: opened.save_pretrained(tmp_path / "more")):
        with pytest.raises(errors.CorruptBank, match="pipeline/unet/weights.safetensors is not the file"):
            use()


@pytest.mark.parametrize(("name", "error"), [("concepts.jsonl", "writes itself"), ("pipe/model.bin", "plain relative name")])
def test_files_that_a_bank_may_not_hold_are_refused_when_it_is_saved(name, error, tmp_path):
    (tmp_path / "there").write_bytes(b"x")
    with pytest.raises(errors.BadBank, match=error):
        make().with_concepts(files={name: tmp_path / "there"}).save_pretrained(tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_files_that_nothing_lists_are_said(saved, tmp_path):
    bank = sl.ConceptBank.from_pretrained(saved)
    for name in (".gitattributes", "notes.txt", "pipeline/model.json"):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text("{}")
    with pytest.warns(errors.SteeringWarning, match="2 files that bank.json does not .*: notes.txt, pipeline/model.json; to"):
        bank.verify()


def test_a_flipped_bit_in_the_pipeline_of_a_shipped_bank_is_found(tmp_path):
    shipped = sl.ConceptBank.from_pretrained("scenes-32").folder
    assert shipped is not None
    shutil.copytree(shipped, tmp_path / "scenes-32")
    weights = tmp_path / "scenes-32" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    flip(weights, weights.stat().st_size // 2)
    with pytest.raises(errors.CorruptBank, match="pipeline/unet/diffusion_pytorch_model.safetensors is not .*its bytes differ"):
        sl.ConceptBank.from_pretrained(tmp_path / "scenes-32").verify()


@pytest.mark.parametrize("name", sorted(hub.shipped()))
def test_shipped_banks_list_all_their_files(name):
    folder = hub.shipped()[name]
    listed = json.loads((folder / "bank.json").read_text())["files"]
    assert trust.strays(folder, {*listed, "bank.json"}) == []


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture
def saved(tmp_path):
    return make().save_pretrained(tmp_path / "bank")


def test_a_bank_comes_back_as_it_was(saved):
    bank, again = make(), sl.ConceptBank.from_pretrained(saved)
    assert list(again.concepts.values()) == list(bank.concepts.values())
    assert (again.name, again.base, again.sites, again.license) == (bank.name, bank.base, bank.sites, bank.license)
    assert again.graph.edges == bank.graph.edges and again.card == bank.card and again.provenance == bank.provenance
    assert again.encoders == bank.encoders
    for name in bank:
        assert all(torch.equal(a, b) for a, b in zip(again.rows(again[name])[:4], bank.rows(bank[name])[:4], strict=True))
    again.verify()


def test_what_a_concept_does_not_have_is_not_written():
    assert sl.Concept(name="a", encoder="e", index=0).to_dict() == {"name": "a", "encoder": "e", "index": 0}
    gated = sl.Concept(name="a", encoder="e", index=0, present=0.0, gate=sl.Gate("b", above=0.0))
    assert gated.to_dict()["gate"] == {"concept": "b", "above": 0.0} and gated.to_dict()["present"] == 0.0
    for gate in (
        sl.Gate("b"),
        sl.Gate("b", below=-1.0),
        sl.Gate("b", above=-1.0, below=0.0),
        sl.Gate("b", above=0.0, full=0.5),
    ):
        concept = sl.Concept(name="a", encoder="e", index=0, gate=gate)
        assert sl.Concept.from_dict(json.loads(json.dumps(concept.to_dict(), allow_nan=False))) == concept


def spread(model):
    """`tone` at two sites, gated by `topic`, whose threshold is stored; it grows with its tokens."""
    generator = torch.Generator().manual_seed(2)
    parts = (sl.Part(encoder="layers.1", index=1, unit=0.3),)
    return sl.ConceptBank(
        "spread",
        [
            sl.Concept(name="topic", encoder="layers.0", index=0, present=0.0),
            sl.Concept(name="tone", encoder="layers.0", index=1, unit=0.2, parts=parts, gate=sl.Gate("topic"), match_norm=True),
        ],
        {f"layers.{i}": sl.Directions(torch.randn(2, 32, generator=generator)) for i in range(2)},
        base=sl.BaseModel.of(model), sites={f"layers.{i}": SiteFacts(width=32, norm=9.0) for i in range(2)},
    )  # fmt: skip


def test_a_concept_of_several_sites_steers_from_disk_as_from_memory(tmp_path):
    model, ids = tiny("llama"), torch.arange(3, 13).view(2, 5)
    bank = spread(model)
    again = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank"))
    again.verify()
    seen = []
    for each in (bank, again):
        with torch.no_grad(), sl.steer(model, each, {"tone": 2.0}):
            seen.append(model(ids).logits)
    with torch.no_grad():
        assert torch.equal(*seen) and not torch.equal(seen[0], model(ids).logits)


def test_same_bank_same_bytes(saved, tmp_path):
    again = sl.ConceptBank.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert contents(saved) == contents(again)


def test_a_bank_is_replaced_whole_and_nothing_else_is_overwritten(saved, tmp_path):
    make(2).save_pretrained(saved)
    assert len(sl.ConceptBank.from_pretrained(saved)) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(errors.BadBank, match="other things"):
        make().save_pretrained(tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"dear"}


def test_a_save_that_breaks_off_leaves_the_old_bank(saved, monkeypatch):
    before = contents(saved)
    monkeypatch.setattr(trust, "block_hashes", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(2).save_pretrained(saved)
    assert contents(saved) == before and list(saved.parent.iterdir()) == [saved]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make(MANY, WIDTH).save_pretrained(tmp_path_factory.mktemp("large") / "bank")


def bytes_read(action):
    """Bytes that a process reads from files while it does something, by the kernel's count."""

    def count():
        return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line).split()[1])

    before = count()
    result = action()
    return result, count() - before


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel counts bytes read on Linux only")
def test_opening_reads_no_weights_and_steering_one_concept_reads_its_rows(large):
    weights = (large / "sites").iterdir().__next__().stat().st_size
    text = (large / "concepts.jsonl").stat().st_size + (large / "bank.json").stat().st_size
    bank, opened = bytes_read(lambda: sl.ConceptBank.from_pretrained(large))
    assert opened < 2 * text + 100_000 < weights
    _, steered = bytes_read(lambda: bank.rows(bank["concept 1234"]))
    assert steered < 500_000
    _, whole = bytes_read(bank.verify)  # the control: the counter sees a whole file
    assert whole > weights


def test_rows_equal_those_of_the_whole_encoder(large):
    lazy, whole = sl.ConceptBank.from_pretrained(large), make(MANY, WIDTH)
    for i in (0, 28, 29, 1234, MANY - 1):
        name = f"concept {i}"
        assert torch.equal(lazy.rows(lazy[name]).write, whole.rows(whole[name]).write)
        assert torch.equal(lazy.rows(lazy[name]).bias, whole.rows(whole[name]).bias)


# -- tampering -----------------------------------------------------------------------------------------------


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_an_altered_row_is_found_when_read_and_others_still_serve(large, tmp_path):
    folder = tmp_path / "bank"
    shutil.copytree(large, folder)
    file = next((folder / "sites").iterdir())
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    flip(file, header + 2000 * WIDTH * 4 + 5)
    bank = sl.ConceptBank.from_pretrained(folder)
    bank.rows(bank["concept 3"])
    with pytest.raises(errors.CorruptBank, match="altered"):
        bank.rows(bank["concept 2000"])
    with pytest.raises(errors.CorruptBank, match="truncated or altered"):
        sl.ConceptBank.from_pretrained(folder).verify()


@pytest.mark.parametrize("name", ["concepts.jsonl", "graph.safetensors", "hashes.safetensors", "README.md", "sites"])
def test_every_altered_or_missing_file_is_found(saved, name):
    path = next((saved / name).iterdir()) if name == "sites" else saved / name
    flip(path, -1)
    with pytest.raises(errors.CorruptBank):
        sl.ConceptBank.from_pretrained(saved).verify()
    path.unlink()
    with pytest.raises(errors.CorruptBank, match="missing|truncated"):
        sl.ConceptBank.from_pretrained(saved).verify()


def test_a_truncated_file_is_found_before_it_is_used(saved):
    file = next((saved / "sites").iterdir())
    file.write_bytes(file.read_bytes()[:-8])
    bank = sl.ConceptBank.from_pretrained(saved)
    with pytest.raises(errors.CorruptBank, match="truncated"):
        bank.rows(bank["concept 0"])


def reseal(folder, name):
    """Write honest hashes for a dishonest file: what a malicious publisher could do."""
    manifest = json.loads((folder / "bank.json").read_text())
    blocks = trust.block_hashes(folder / name)
    hashes = {name: torch.frombuffer(bytearray(blocks), dtype=torch.uint8).reshape(-1, 32)}
    save_file(hashes, folder / "hashes.safetensors")
    for file in (name, "hashes.safetensors"):
        manifest["files"][file] = trust.describe(folder / file)
    manifest["files"][name]["blocks"] = trust.group_hashes(blocks)
    (folder / "bank.json").write_text(json.dumps(manifest))


def test_values_that_are_not_finite_are_found_in_the_rows_read_and_all_in_verify(saved):
    file = next((saved / "sites").iterdir())
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    data = bytearray(file.read_bytes())
    data[header + 32 * 4 : header + 32 * 4 + 4] = np.float32("nan").tobytes()
    file.write_bytes(data)
    reseal(saved, file.relative_to(saved).as_posix())
    bank = sl.ConceptBank.from_pretrained(saved)
    bank.rows(bank["concept 0"])
    with pytest.raises(errors.CorruptBank, match="not finite"):
        bank.rows(bank["concept 1"])
    with pytest.raises(errors.CorruptBank, match="not finite"):
        sl.ConceptBank.from_pretrained(saved).verify()


def edit_manifest(folder, change):
    manifest = json.loads((folder / "bank.json").read_text())
    change(manifest)
    (folder / "bank.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("change", "error", "match"), [
    (lambda m: m.update(format=2), errors.UnknownFormat, "format 1"),
    (lambda m: m.pop("encoders"), errors.CorruptBank, "encoders"),
    (lambda m: m["encoders"]["layers.0@late#dir"].update(file="../../etc/passwd"), errors.CorruptBank, "plain relative"),
    (lambda m: m["encoders"]["layers.0@late#dir"].update(file="sites/x.pt"), errors.CorruptBank, "plain relative"),
    (lambda m: m["encoders"]["layers.0@late#dir"].update(kind="pickle"), errors.CorruptBank, "unknown kind"),
    (lambda m: m["files"].update({"C:\\x.json": {}}), errors.CorruptBank, "plain relative"),
    (lambda m: m["base_model"].update(colour="red"), errors.CorruptBank, "colour"),
])  # fmt: skip
def test_a_manifest_that_cannot_be_trusted_is_refused(saved, change, error, match):
    edit_manifest(saved, change)
    with pytest.raises(error, match=match):
        sl.ConceptBank.from_pretrained(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"format": NaN}', '{"format": 1, "format": 1}', "[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(saved, text):
    (saved / "bank.json").write_text(text)
    with pytest.raises(errors.BadBank):
        sl.ConceptBank.from_pretrained(saved)


def test_unknown_optional_fields_are_kept(saved, tmp_path):
    edit_manifest(saved, lambda m: m.update(colour="red"))
    sl.ConceptBank.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "bank.json").read_text())["colour"] == "red"


@pytest.mark.parametrize("values", [
    {"unit": 0.0}, {"unit": -1.0}, {"index": -1}, {"index": 1.5}, {"name": 3}, {"range": [1.0]}, {"natural": "wide"},
])  # fmt: skip
def test_a_concept_with_impossible_values_is_refused(values):
    with pytest.raises(errors.CorruptBank, match="expected"):
        sl.Concept.from_dict({"name": "a", "encoder": "e", "index": 0, **values})


@pytest.fixture
def lines(tmp_path):
    """A bank on disk, and what rewrites the fields of a line of its `concepts.jsonl`, sealing it anew."""
    folder = spread(tiny("llama")).save_pretrained(tmp_path / "spread")

    def rewrite(line, **fields):
        path = folder / "concepts.jsonl"
        concepts = [json.loads(text) for text in path.read_text().splitlines()]
        concepts[line].update(fields)
        path.write_text("".join(json.dumps(concept) + "\n" for concept in concepts))
        edit_manifest(folder, lambda manifest: manifest["files"].update({path.name: trust.describe(path)}))
        return folder

    return rewrite


PART = {"encoder": "layers.1", "index": 1, "unit": 0.3}


@pytest.mark.parametrize(("fields", "match"), [
    ({"parts": [PART | {"index": -1}]}, "whole indices for 'tone'"),
    ({"parts": [PART, PART | {"index": 1.0}]}, "int|whole indices for 'tone'"),
    ({"parts": [PART | {"index": True}]}, "whole indices for 'tone'"),
    ({"parts": [PART | {"index": "1"}]}, "int|whole indices for 'tone'"),
    ({"parts": [PART | {"unit": float("nan")}]}, "NaN is no number"),
    ({"parts": [PART | {"unit": "wide"}]}, "expected"),
    ({"parts": [PART | {"unit": 0.0}]}, "positive units"),
    ({"parts": [PART | {"unit": -0.3}]}, "positive units"),
    ({"parts": [PART | {"encoder": ["layers.1"]}]}, "expected"),
    ({"parts": [PART | {"colour": "red"}]}, "colour"),
    ({"parts": [{"encoder": "layers.1"}]}, "index"),
    ({"parts": [5]}, "expected a concept's fields"),
    ({"parts": 5}, "expected a concept's fields"),
    ({"parts": [PART | {"encoder": "layers.9"}]}, "'tone' has a part in 'layers.9', which the bank does not have"),
    ({"gate": {"concept": "topics"}}, "'tone' is gated by 'topics', which the bank does not have"),
    ({"gate": {"concept": ["topic"]}}, "expected"),
    ({"gate": {"concept": "topic", "above": "high"}}, "expected a concept's fields"),
    ({"gate": {"concept": "topic", "above": 1.0, "below": 0.0}}, "above < below"),
    ({"gate": {"concept": "topic", "full": 1.0}}, "grows from a finite above"),
    ({"gate": {"concept": "topic", "colour": "red"}}, "colour"),
    ({"gate": "open"}, "expected a concept's fields"),
    ({"match_norm": "yes"}, "expected"),
    ({"present": "often"}, "expected"),
    ({"present": ""}, "expected"),
])  # fmt: skip
def test_parts_and_gates_with_impossible_values_are_refused(lines, fields, match):
    with pytest.raises(errors.CorruptBank, match=match):
        sl.ConceptBank.from_pretrained(lines(1, **fields))


def test_a_number_too_large_for_a_part_or_a_gate_is_refused(lines):
    """JSON has no infinity, but 1e999 reads as one."""
    for fields in (
        {"parts": [PART | {"unit": 1e300 * 1e9}]},
        {"gate": {"concept": "topic", "above": 0.0, "full": 1e300 * 1e9}},
    ):
        folder = lines(1, **fields)
        path = folder / "concepts.jsonl"
        path.write_text(path.read_text().replace("Infinity", "1e999"))
        edit_manifest(folder, lambda manifest, path=path: manifest["files"].update({path.name: trust.describe(path)}))
        with pytest.raises(errors.CorruptBank, match="finite"):
            sl.ConceptBank.from_pretrained(folder)


def test_a_part_beyond_the_end_of_its_encoder_is_found_when_read_and_by_verify(lines):
    bank = sl.ConceptBank.from_pretrained(lines(1, parts=[PART | {"index": 2}]))
    bank.rows(bank["tone"])
    with pytest.raises(errors.CorruptBank, match="has 2 rows of 'decoder', asked for 2 to 3"):
        bank.rows(bank["tone"].places[1])
    with pytest.raises(errors.CorruptBank, match="'layers.1' does not fit its concepts"):
        bank.verify()
    whole = spread(tiny("llama"))
    beyond = [sl.Concept(name="tone", encoder="layers.0", index=1, parts=(sl.Part(encoder="layers.1", index=2, unit=1.0),))]
    with pytest.raises(errors.CorruptBank, match="'layers.1' does not fit its concepts"):
        whole.with_concepts([whole["topic"], *beyond]).verify()


def test_a_bank_that_gates_by_a_concept_it_lost_is_not_made():
    bank = spread(tiny("llama"))
    with pytest.raises(errors.CorruptBank, match="gated by 'topic', which the bank does not have"):
        bank.with_concepts([bank["tone"]])


# -- names and models ----------------------------------------------------------------------------------------


def test_a_name_resolves_as_folder_then_shipped_bank_then_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.BadBank, match="expected a folder, a shipped bank"):
        sl.ConceptBank.from_pretrained("no such bank")
    make().save_pretrained(tmp_path / "mine")
    assert sl.ConceptBank.from_pretrained("mine").name == "made"


def test_a_bank_that_is_shipped_is_one_more_folder(tmp_path, monkeypatch):
    """Put beside the others, it is listed, opened by its name and steered with; no list has to be changed."""
    make().save_pretrained(tmp_path / "one-more")
    monkeypatch.setattr(hub, "files", lambda _: tmp_path)
    assert [found.name for found in sl.list_banks(local_files_only=True)] == ["one-more"]
    bank = sl.ConceptBank.from_pretrained("one-more")
    assert bank.name == "made" and len(bank) == 3


def test_a_bank_in_the_hub_cache_opens_offline(tmp_path):
    """The real client, on a cache laid out as it lays it out."""
    home = tmp_path / "models--org--made"
    make().save_pretrained(home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    bank = sl.ConceptBank.from_pretrained("org/made", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(bank.rows(bank["concept 1"]).write, make().rows(make()["concept 1"]).write)


def test_unknown_concepts_are_answered_with_the_nearest(saved):
    bank = sl.ConceptBank.from_pretrained(saved)
    with pytest.raises(errors.UnknownConcept, match="did you mean 'concept 1'"):
        bank["concpt 1"]
    assert bank["layers.0@late#dir/1"] is bank["concept 1"]
    assert bank.find("number 2")[0].name == "concept 2" and not bank.find("zebra")


def test_a_bank_for_another_architecture_is_refused_and_other_weights_give_a_notice():
    model, other = tiny("llama"), tiny("gpt2")
    bank = make(base=sl.BaseModel.of(model, id="org/tiny"))
    with pytest.raises(errors.WrongModel, match="org/tiny"):
        sl.steer(other, bank, {"concept 0": 1.0})
    with sl.steer(model, bank, {"concept 0": 0.1}):
        pass
    fine_tuned = tiny("llama")
    with torch.no_grad():
        fine_tuned.lm_head.weight.add_(1.0)
    with pytest.warns(errors.OtherWeights, match="other weights"), sl.steer(fine_tuned, bank, {"concept 0": 0.1}):
        pass
    half = tiny("llama").to(torch.bfloat16)
    with sl.steer(half, bank, {"concept 0": 0.1}):  # the same weights in half precision: no notice
        pass


def test_vectors_of_the_wrong_width_are_refused():
    model = tiny("llama")
    with pytest.raises(errors.WrongWidth, match="32"):
        sl.ConceptBank.from_directions({"a": torch.ones(31)}, site="layers.0", base=model)
    wrong = make(width=16, base=sl.BaseModel.of(model))
    with pytest.raises(errors.WrongWidth, match="width 16"), torch.no_grad(), sl.steer(model, wrong, {"concept 0": 0.1}):
        model(torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(errors.CorruptBank, match="finite"):
        sl.ConceptBank.from_directions({"a": torch.full((32,), torch.nan)}, site="layers.0", base=model)


def test_unknown_sites_are_answered_with_the_nearest():
    with pytest.raises(errors.UnknownSite, match="did you mean 'layers.1.attn'"):
        sl.ConceptBank.from_directions({"a": torch.ones(32)}, site="layers.1.atn", base=tiny("llama"))


def test_what_cannot_be_steered_is_said():
    with pytest.raises(errors.UnsupportedTarget, match="torch.nn.Module"):
        sl.steer("gpt2", make(), {})


def test_edits_that_make_no_sense_are_refused_before_anything_happens():
    model = tiny("llama")
    bank = two_directions(model)
    with pytest.raises(errors.BadEdit, match="expected"):
        sl.steer(model, bank, {"a": float("inf")})
    with pytest.raises(errors.UnknownConcept, match="It has: a, b"):
        sl.steer(model, bank, {"c": 1.0})


def test_one_sees_what_a_bank_holds():
    text = repr(make())
    assert "2 concepts for org/model, 1 edges" in text and "concept 2" in text and "safe -3.00 to +4.00" in text
    assert text.endswith("gates: concept 0")
    assert os.linesep not in make()["concept 0"].label


def test_a_copy_takes_what_is_given_in_place_of_its_own_and_leaves_the_bank_alone():
    bank = make()
    others = {"layers.0@late#dir": sl.Directions(2 * torch.eye(32)[:3])}
    facts: dict = {"card": "# mine", "license": "mit", "provenance": {"a": 1}, "extra": {"b": 2}, "base": sl.BaseModel(id="x")}
    copy = bank.with_concepts(encoders=others, graph=sl.CausalGraph(), levels={"late": sl.Window(0.0, 0.5)}, **facts)
    assert {key: getattr(copy, key) for key in facts} == facts and copy.concepts == bank.concepts and not len(copy.graph)
    assert torch.equal(copy.rows(copy["concept 1"]).write, 2 * torch.eye(32)[1:2]) and copy.window_of(copy["concept 1"])
    assert bank.card == "# made\n" and len(bank.graph) == 1 and bank.window_of(bank["concept 1"]) is None
    assert not torch.equal(bank.rows(bank["concept 1"]).write, copy.rows(copy["concept 1"]).write)
    with pytest.raises(TypeError, match="colour"):
        bank.with_concepts(colour="red")


def test_a_bank_is_a_collection_of_names(saved):
    bank = sl.ConceptBank.from_pretrained(saved)
    names = ["concept 0", "concept 1", "concept 2"]
    assert list(bank) == list(bank.keys()) == bank._ipython_key_completions_() == names and len(bank) == 3
    assert "concept 1" in bank and "concept 9" not in bank and dict(bank) == bank.concepts
    assert bank.encoder_facts is bank.encoders and bank.count("layers.0@late#dir") == 3


def test_whatever_the_size_of_a_bank_its_text_fits_a_screen():
    many = [sl.Concept(name=f"<b>{i}</b>", encoder=f"layers.{i % 40}", index=i, label="x\n" * 500) for i in range(100)]
    latents = [sl.Concept(name=f"layers.{i % 40}/{i}", encoder=f"layers.{i % 40}", index=i) for i in range(100, 6800)]
    gates = [sl.Concept(name=f"gate {i}", encoder="layers.0", index=i, present=0.5) for i in range(6800, 6900)]
    encoders = {f"layers.{i}": sl.Directions(torch.ones(7000, 1)) for i in range(40)}
    sites = {site: SiteFacts(width=1) for site in encoders}
    text = repr(sl.ConceptBank("large", [*many, *latents, *gates], encoders, base=sl.BaseModel(), sites=sites))
    assert len(text.splitlines()) <= 30 and len(text) < 5000
    assert "and 80 more" in text and "6,700 latents in 40 encoders" in text and "gates: gate 6800," in text
    page = sl.ConceptBank("<i>", many, encoders, base=sl.BaseModel(), sites=sites)._repr_html_()
    assert "&lt;b&gt;0&lt;/b&gt;" in page and "<b>" not in page and "<i>" not in page and page.count("<tr>") == 21


def test_the_text_of_a_concept_has_five_lines():
    text = repr(sl.Concept(
        name="tone", encoder="layers.1", index=7, unit=0.25, range=(-1.0, 2.0), useful=1.5, beyond="worn\nout",
        label="warm\x1b", parts=(sl.Part(encoder="layers.2", index=0, unit=1.0),), gate=sl.Gate("topic"),
        examples=("a" * 300, "b"),
    ))  # fmt: skip
    assert len(text.splitlines()) == 5 and len(text) < 400 and "\x1b" not in text
    assert "layers.1/7, unit 0.25" in text and "useful +1.50  safe -1.00 to +2.00, 1 more places, gated by 'topic'" in text


def test_places_of_a_concept_have_as_many_units_of_natural_values_as_itself():
    part = sl.Part(encoder="layers.1", index=1, unit=0.5)
    concept = sl.Concept(name="tone", encoder="layers.0", index=2, unit=0.25, natural=(-1.0, 2.0), parts=(part,))
    own, other = concept.places
    assert (own.id, own.unit, own.natural) == ("layers.0/2", 0.25, (-1.0, 2.0))
    assert (other.id, other.unit, other.natural) == ("layers.1/1", 0.5, (-2.0, 4.0))
    assert sl.Concept(name="tone", encoder="layers.0", index=2, parts=(part,)).places[1].natural is None
    bank = spread(tiny("llama"))
    place = bank["tone"].places[1]
    assert torch.equal(bank.rows(place).write, bank.encoder("layers.1").rows([1]).write)
    assert (
        bank.site_of(place) == bank.read_at(place) == "layers.1" and bank.window_of(place) is None and not bank.competes(place)
    )


@pytest.mark.parametrize(("gate", "shares"), [
    (sl.Gate("a", above=0.0), [0, 0, 1, 1]),
    (sl.Gate("a", below=0.5), [1, 1, 0, 0]),
    (sl.Gate("a", above=-1.0, below=1.0), [0, 1, 1, 0]),
    (sl.Gate("a", above=0.0, full=1.0), [0, 0, 0.5, 1]),
])  # fmt: skip
def test_a_gate_lets_through_what_its_bounds_say(gate, shares):
    assert gate.passed(torch.tensor([-1.0, 0.0, 0.5, 1.0])).tolist() == shares
