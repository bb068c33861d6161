"""Banks written once, in format 1, that load for ever: the folders in `golden` are never written again."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from bad_banks import OWN as LATENTS

import steerlib as sl
from steerlib.bank.manifest import FORMAT, SiteFacts
from steerlib.encoders import KINDS

GOLDEN = Path(__file__).parent / "golden"
SEALED = {
    "format-1-directions": "a5ebcca3457063f71afb4b68dd56c455ddffbb71899072f66a1cb0dc674e9c2c",
    "format-1-latents": "d15c3ec54587080c2140ca5728061a5b4ad998068abfbbc6ff84b30c9477fb23",
}
OWN = {**LATENTS, "batchtopk": (LATENTS["batchtopk"][0], {**LATENTS["batchtopk"][1], "norm": "length"})}


def ramp(*shape, start=0.0):
    """start, start + 1/8, start + 2/8, …"""
    return start + torch.arange(torch.Size(shape).numel()).reshape(shape) / 8


def test_the_golden_banks_are_those_that_were_written():
    assert {path.name for path in GOLDEN.iterdir()} == set(SEALED)
    for name, sha256 in SEALED.items():
        assert hashlib.sha256((GOLDEN / name / "bank.json").read_bytes()).hexdigest() == sha256
        sl.ConceptBank.from_pretrained(GOLDEN / name).verify()  # bank.json has the hashes of all the rest


def test_directions_of_format_1_read_as_they_were_written():
    bank = sl.ConceptBank.from_pretrained(GOLDEN / "format-1-directions")
    fingerprint = {"hidden_size": 4, "model_type": "llama"}
    assert bank.base == sl.BaseModel(id="org/model", fingerprint=fingerprint, weights="ab" * 32)
    assert (bank.name, bank.license, bank.extra) == ("golden", "apache-2.0", {"colour": "red"})
    assert bank.sites == {"layers.0": SiteFacts(width=4, norm=3.0), "layers.1": SiteFacts(width=4)}
    assert bank.provenance == {"seed": 0, "nested": {"a": [1, 2]}} and bank.card.endswith("# golden\n")
    assert bank.graph.edges == (sl.Edge(src="tone", dst="topic", weight=0.5),)
    assert list(bank) == ["present", "tone", "topic"] and bank["present"].present == 0.25
    assert bank["tone"] == sl.Concept(
        name="tone", encoder="layers.0@late#dir", index=1, unit=0.5, natural=(-1.5, 2.0), range=(-3.0, 4.0), useful=2.0,
        beyond="worn", label="ünïcode 日本", source="by hand", examples=("a", "b"), effects={"score": 0.25},
        parts=(sl.Part(encoder="layers.1", index=1, unit=0.25),), gate=sl.Gate("present", above=0.5, full=1.5),
    )  # fmt: skip
    assert bank["topic"].match_norm and bank["topic"].gate == sl.Gate("present")
    for i, name in enumerate(bank):
        rows = bank.rows(bank[name])
        assert torch.equal(rows.write, ramp(3, 4, start=0.125)[i : i + 1]) and torch.equal(-rows.bias, ramp(3)[i : i + 1])
    assert torch.equal(bank.rows(bank["layers.1/1"]).write, ramp(2, 4, start=-1.0)[1:])


@pytest.mark.parametrize("kind", OWN)
def test_latents_of_format_1_read_as_they_were_written(kind):
    bank = sl.ConceptBank.from_pretrained(GOLDEN / "format-1-latents")
    own, settings = OWN[kind]
    matrices = {"encoder": ramp(3, 4), "bias": ramp(3), "decoder": ramp(3, 4, start=-1.0), "decoder_bias": ramp(4)}
    expected = KINDS[kind].from_tensors({**matrices, **own}, settings)
    one, other = bank.rows(bank[f"layers.0#{kind}/2"]), expected.rows([2])
    assert torch.equal(one.read, other.read) and torch.equal(one.write, other.write)
    whole = bank.encoder(f"layers.0#{kind}")
    assert whole.settings == expected.settings
    assert all(torch.equal(a, expected.to_tensors()[name]) for name, a in whole.to_tensors().items())


@pytest.mark.parametrize("name", SEALED)
def test_migrating_to_the_newest_format_keeps_what_a_bank_says(name, tmp_path):
    shutil.copytree(GOLDEN / name, tmp_path / "old")
    old = sl.ConceptBank.from_pretrained(tmp_path / "old")
    new = sl.ConceptBank.from_pretrained(old.save_pretrained(tmp_path / "new"))
    assert FORMAT == 1 and list(new.concepts.values()) == list(old.concepts.values()) and new.graph.edges == old.graph.edges
    assert new.encoders == old.encoders and new.base == old.base and new.extra == old.extra
    for id in old.encoders:
        assert all(torch.equal(t, new.encoder(id).to_tensors()[key]) for key, t in old.encoder(id).to_tensors().items())
