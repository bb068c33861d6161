"""Files from strangers: each is refused with a reason, or is a bank in every respect."""

import json
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bad_banks import Court, from_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_bank import edit_manifest, make

import steerlib as sl
from steerlib import errors
from steerlib.bank import trust

ROOT = Path(__file__).parent.parent
DRAWN, MANY = 2_000, 20_000
WEIGHTS = "sites/layers.0-40-late-23-dir.safetensors"


@pytest.fixture
def saved(tmp_path):
    return make().save_pretrained(tmp_path / "bank")


def seal(folder, name):
    """True hashes for whatever a file is now."""
    blocks = trust.block_hashes(folder / name)
    edit_manifest(folder, lambda m: m["files"][name].update(trust.describe(folder / name), blocks=trust.group_hashes(blocks)))


@pytest.fixture(scope="module")
def court():
    return Court()


@pytest.mark.filterwarnings("ignore:.*that bank.json does not list:steerlib.errors.SteeringWarning")
@settings(max_examples=DRAWN, deadline=None, database=None, derandomize=True)
@given(st.binary(min_size=8, max_size=48))
def test_no_bad_bank_crashes_hangs_reaches_out_or_gets_in(court, draw):
    court.try_one(from_bytes(draw))


def test_nor_does_one_of_many_more_made_without_the_shape_checker_of_tests():
    command = [sys.executable, ROOT / "scripts" / "fuzz_banks.py", "--count", str(MANY)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    refused, sound = map(int, re.findall(r"(\d+) (?:refused|sound)", done.stdout))
    assert refused > 0.9 * MANY and sound > 0.02 * MANY, done.stdout


def test_a_reader_that_forgets_to_check_is_found_out(court, monkeypatch):
    monkeypatch.setattr("steerlib.bank.hub.check_whole", lambda *_: None)
    monkeypatch.setattr(trust.Tensors, "_check_cover", lambda *_: None)
    with pytest.raises(AssertionError):
        for seed in range(2000):
            court.try_one(random.Random(seed).randrange)


# -- names and places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "../x.json", "a/../../x.json", "/etc/x.json", "C:\\x.json", "D:x.json", "\\\\host\\x.json", "a\\..\\x.json", "x\0.json",
    "x.json.", "x.json ", "con.json", "sites/AUX.safetensors", "lpt1.png", "x" * 300 + ".json", "a//x.json", "./x.json", "",
    "sites/../x.json", ".hidden.json", "a/b/c/d.json", "x.pkl", "x.pt", "x.bin", "x.py", "x.npy", "~/x.json", "a*.json",
    "ünï.json", "sites./x.json",
])  # fmt: skip
def test_a_name_that_leaves_the_folder_on_some_system_is_refused(name):
    with pytest.raises(errors.CorruptBank, match="plain relative name"):
        trust.checked_name(name)


def test_names_that_differ_by_case_alone_are_refused(saved):
    edit_manifest(saved, lambda m: m["files"].update({"Graph.safetensors": m["files"]["graph.safetensors"]}))
    with pytest.raises(errors.CorruptBank, match="differ by more than case"):
        sl.ConceptBank.from_pretrained(saved)


@pytest.mark.filterwarnings("ignore:.*that bank.json does not list:steerlib.errors.SteeringWarning")
@pytest.mark.parametrize("name", ["bank.json", "concepts.jsonl", "README.md", WEIGHTS])
def test_a_link_out_of_the_folder_is_refused_and_one_within_is_not(saved, tmp_path, name):
    outside = tmp_path / "outside"
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    with pytest.raises(errors.CorruptBank, match="links to a place outside"):
        bank = sl.ConceptBank.from_pretrained(saved)
        bank.rows(bank["concept 0"])
    outside.rename(saved / "inside")
    (saved / name).unlink()
    (saved / name).symlink_to(saved / "inside")
    sl.ConceptBank.from_pretrained(saved).verify()


@pytest.mark.parametrize("put", [os.mkdir, getattr(os, "mkfifo", os.mkdir)])
def test_what_is_no_file_is_not_opened(saved, put):
    (saved / WEIGHTS).unlink()
    put(saved / WEIGHTS)
    bank = sl.ConceptBank.from_pretrained(saved)
    with pytest.raises(errors.CorruptBank, match="missing"):
        bank.rows(bank["concept 0"])


# -- limits --------------------------------------------------------------------------------------------------


def test_a_manifest_of_too_many_bytes_files_or_levels_is_refused(saved):
    before = (saved / "bank.json").read_bytes()
    (saved / "bank.json").write_bytes(before + b" " * trust.MAX_MANIFEST)
    with pytest.raises(errors.CorruptBank, match="at most 4194304"):
        sl.ConceptBank.from_pretrained(saved)
    (saved / "bank.json").write_bytes(before)
    record = {"size": 1, "sha256": "0" * 64}
    edit_manifest(saved, lambda m: m["files"].update({f"{i}.md": record for i in range(trust.MAX_FILES)}))
    with pytest.raises(errors.CorruptBank, match="at most 4096 files"):
        sl.ConceptBank.from_pretrained(saved)
    (saved / "bank.json").write_bytes(before)
    deep: dict = {}
    for _ in range(trust.MAX_DEPTH):
        deep = {"a": deep}
    edit_manifest(saved, lambda m: m.update(provenance=deep))
    with pytest.raises(errors.CorruptBank, match="nested deeper"):
        sl.ConceptBank.from_pretrained(saved)


def test_a_line_too_long_and_a_label_too_long_are_refused(saved):
    for label, match in (("x" * (trust.MAX_LINE + 1), "a line of more than"), ("x" * (1 << 15), "short texts")):
        line = {"name": "a", "encoder": "layers.0@late#dir", "index": 0, "label": label}
        (saved / "concepts.jsonl").write_text(json.dumps(line))
        edit_manifest(saved, lambda m: m["files"].update({"concepts.jsonl": trust.describe(saved / "concepts.jsonl")}))
        with pytest.raises(errors.CorruptBank, match=match):
            sl.ConceptBank.from_pretrained(saved)


def header(**tensors):
    """A safetensors file with this header and 64 bytes of data."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


def entry(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(("data", "match"), [
    (b"", "no valid"),
    (struct.pack("<Q", 1 << 63) + b"{}", "no valid"),
    (struct.pack("<Q", 100 << 20) + b"{}", "no valid"),
    (struct.pack("<Q", 10_000) + b"{}", "no valid"),
    (struct.pack("<Q", 2) + b"[]", "named tensors"),
    (header(a=entry("F32", [16], 0, 64), b=entry("F32", [8], 32, 64)), "overlap"),
    (header(a=entry("F32", [8], 32, 64)), "overlap or leave a gap"),
    (header(a=entry("F32", [8], 0, 32)), "belong to no tensor"),
    (header(a=entry("F32", [-16], 0, 64)), "does not fit"),
    (header(a=entry("F32", [1 << 62, 4], 0, 64)), "does not fit"),
    (header(a=entry("F32", [0, 1 << 62], 0, 0)), "does not fit"),
    (header(a=entry("F32", [1 << 33] * 2, 0, 64)), "does not fit"),
    (header(a=entry("F32", [1] * 9, 0, 4)), "does not fit"),
    (header(a=entry("F32", [16], 0, 1 << 70)), "does not fit"),
    (header(a=entry("I8", [64], 0, 64)), "does not fit"),
    (header(a=entry("F32", [16.0], 0, 64)), "does not fit"),
    (header(a=entry("F32", True, 0, 64)), "does not fit"),
    (header(**{str(i): entry("F32", [0], 0, 0) for i in range(trust.MAX_TENSORS + 1)}), "at most 10000"),
])  # fmt: skip
def test_a_header_that_lies_is_refused(saved, data, match):
    (saved / "graph.safetensors").write_bytes(data)
    edit_manifest(saved, lambda m: m["files"].update({"graph.safetensors": trust.describe(saved / "graph.safetensors")}))
    with pytest.raises(errors.CorruptBank, match=match):
        sl.ConceptBank.from_pretrained(saved)


# -- meaning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("src", "dst", "weight", "match"), [
    ([0, 1, 2], [1, 2, 0], [1.0, 1.0, 1.0], "without cycles"),
    ([0], [0], [1.0], "without cycles"),
    ([0, 0], [1, 1], [1.0, 1.0], "two"),
    ([0], [9], [1.0], "does not have"),
    ([-1], [1], [1.0], "does not have"),
    ([0], [1], [float("nan")], "not finite"),
    ([0.5], [1.0], [1.0], "columns"),
    ([0, 1], [1], [1.0], "columns"),
    ([[0]], [[1]], [[1.0]], "columns"),
])  # fmt: skip
def test_a_graph_that_makes_no_sense_is_refused(saved, src, dst, weight, match):
    columns = {"src": src, "dst": dst, "weight": weight}
    save_file({key: torch.tensor(values) for key, values in columns.items()}, saved / "graph.safetensors")
    edit_manifest(saved, lambda m: m["files"].update({"graph.safetensors": trust.describe(saved / "graph.safetensors")}))
    with pytest.raises(errors.CorruptBank, match=match):
        sl.ConceptBank.from_pretrained(saved)


@pytest.mark.parametrize("fields", [
    {"trust_remote_code": True}, {"auto_map": {"AutoModel": "x--y.z"}}, {"custom_pipeline": "org/evil"},
    {"__class__": "os.system"},
])  # fmt: skip
def test_fields_that_made_others_run_code_are_kept_as_data(saved, fields):
    edit_manifest(saved, lambda m: m.update(fields))
    bank = sl.ConceptBank.from_pretrained(saved)
    bank.verify()
    assert bank.extra == fields


@pytest.mark.filterwarnings("ignore:.*that bank.json does not list:steerlib.errors.SteeringWarning")
def test_a_pickle_beside_a_bank_or_named_as_a_part_of_it_is_never_opened(saved, monkeypatch):
    import pickle

    monkeypatch.setattr(pickle, "loads", lambda *_: 1 / 0)
    monkeypatch.setattr(torch, "load", lambda *_, **__: 1 / 0)
    (saved / "weights.pkl").write_bytes(pickle.dumps({"a": 1}))
    sl.ConceptBank.from_pretrained(saved).verify()
    torch.save({"decoder": torch.ones(3, 32)}, saved / WEIGHTS)
    seal(saved, WEIGHTS)
    bank = sl.ConceptBank.from_pretrained(saved)
    with pytest.raises(errors.CorruptBank):
        bank.rows(bank["concept 0"])


def test_what_a_terminal_would_obey_is_shown_as_what_it_is(saved):
    bank = sl.ConceptBank.from_pretrained(saved)
    concepts = [
        c if i else __import__("dataclasses").replace(c, present=None, label="\x1b[2Jgone")
        for i, c in enumerate(bank.concepts.values())
    ]  # noqa: E501
    assert "\x1b" not in repr(bank.with_concepts(concepts)) and "\ufffd[2Jgone" in repr(bank.with_concepts(concepts))


def test_a_missing_folder_is_not_made(tmp_path):
    with pytest.raises(errors.BadBank):
        sl.ConceptBank.from_pretrained(tmp_path / "none")
    assert not list(Path(tmp_path).iterdir())
