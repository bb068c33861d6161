"""What a report says of each edit: its own counts, in whatever company, with a legend; on small real models."""

import random
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import two_directions
from tiny_models import tiny

import steerlib as sl
from steerlib.bank.concept_bank import SiteFacts
from steerlib.encoders import JumpReLU, TopK, Transcoder
from steerlib.errors import OutOfRange
from steerlib.steering.report import COLUMNS, Report

NAMES = "abcdefgh"
IDS = torch.tensor([[3, 5, 7, 9, 11], [0, 0, 3, 5, 7]])
EDITS = {
    "a": sl.Add(1.0, when=sl.Steps(2, 4)),
    "b": sl.Add(0.5),
    "c": sl.Ablate(tokens="generated"),
    "d": sl.Set(1.5, tokens=slice(1, 3)),
    "e": sl.Scale(0.5, gate=sl.Gate("h", above=0.0)),
    "f": sl.Add(0.5, mask=torch.tensor([1.0, 0.0, 1.0])),
    "g": sl.Add([1.0, 0.0], when=sl.Steps(0, 1)),
}
"""One kind of share each."""


@pytest.fixture
def llama():
    model = tiny("llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def bank_of(model, norm: float | None = 20.0, natural=None):
    """Orthogonal directions, so that none moves another's reading."""
    rows = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0][: len(NAMES)]
    concepts = [sl.Concept(name=name, encoder="layers.0", index=i, natural=natural) for i, name in enumerate(NAMES)]
    sites = {"layers.0": SiteFacts(width=32, norm=norm)}
    return sl.ConceptBank("own", concepts, {"layers.0": sl.Directions(rows)}, base=sl.BaseModel.of(model), sites=sites)


def write(model):
    with torch.no_grad():
        model.generate(IDS, attention_mask=(IDS > 0).long(), max_new_tokens=6, do_sample=False)


def reported(model, bank, edits):
    with sl.steer(model, bank, edits) as session:
        write(model)
    return {one.concept: one for one in session.report().lines}


def same(one, other):
    """The same counts; figures that are measured differ by what the texts differ in."""
    counts = ("passes", "acted", "tokens", "seen", "capped", "why")
    assert {name: getattr(one, name) for name in counts} == {name: getattr(other, name) for name in counts}


@pytest.mark.parametrize("seed", range(4))
def test_an_edit_counts_for_itself_in_any_company(llama, seed):
    bank = bank_of(llama)
    some = random.Random(seed).sample(sorted(EDITS), 4) if seed else sorted(EDITS)
    found = reported(llama, bank, {name: EDITS[name] for name in some})
    assert len({(one.acted, one.tokens) for one in found.values()}) > 1
    for name in set(some) - {"e"}:  # a gate's openings follow the text
        same(found[name], reported(llama, bank, {name: EDITS[name]})[name])


def test_an_edit_counts_for_itself_beside_other_sessions(llama):
    bank = bank_of(llama)
    with sl.steer(llama, bank, {"b": EDITS["b"]}) as outer, sl.steer(llama, bank, {"a": EDITS["a"], "d": EDITS["d"]}) as inner:
        write(llama)
    for name, one in {one.concept: one for one in (*outer.report().lines, *inner.report().lines)}.items():
        same(one, reported(llama, bank, {name: EDITS[name]})[name])


def test_counts_by_hand(llama):
    """A padded batch: 5 and 3 tokens of prompt, 5 new ones that are read; steps 2 and 3 are one token each."""
    found = reported(llama, bank_of(llama), EDITS)
    assert [(found[n].acted, found[n].passes, found[n].tokens, found[n].seen) for n in "abcd"] == [
        (2, 6, 2, 10), (6, 6, 9, 10), (5, 6, 5, 10), (1, 6, 2, 10),
    ]  # fmt: skip
    assert found["b"].change == pytest.approx(0.5 / 20) and found["c"].left == pytest.approx(0, abs=1e-4)
    assert found["d"].largest == pytest.approx(1.5, abs=1e-5)


@pytest.mark.parametrize("cap", [20.0, 2.0])
def test_what_was_cut_is_said_of_the_edit_that_was_cut(llama, cap):
    """Never more than all of it, also of rows that are padded; a removal beside it is not cut."""
    bank = bank_of(llama, cap)
    edits = {"a": sl.Add(4.0, when=sl.Steps(1, 3)), "b": sl.Ablate(), "d": sl.Add(0.1, when=sl.Steps(4, 5))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutOfRange)
        found = reported(llama, bank, edits)
        alone = reported(llama, bank, {"a": 4.0})
    assert [found[name].capped for name in "abd"] == [float(cap < 4), 0.0, 0.0] and alone["a"].capped == float(cap < 4)
    longest = min(4.0, 0.35 * cap) / cap
    assert alone["a"].change == pytest.approx(longest) and found["a"].change == pytest.approx(longest, rel=1e-4)


def test_what_was_cut_at_planning_is_said(llama):
    bank = bank_of(llama, natural=(-1.0, 1.0))
    for edit, capped, said in ((sl.Set(5.0), 1.0, "capped at its natural values"), (sl.Add(9.0), 1.0, "is capped at 7.0")):
        with pytest.warns(OutOfRange, match=said), sl.steer(llama, bank, {"a": edit}) as session, torch.no_grad():
            llama(IDS[:1])
        assert session.report().lines[0].capped == capped and said in str(session) and said in session._repr_html_()
    with sl.steer(llama, bank, {"a": 9.0}, allow_ood=True) as session:
        write(llama)
    assert session.report().lines[0].capped == 0 and "is capped" not in str(session)


def test_readings_are_those_of_the_concept_whatever_reads_it(llama):
    """Of latents what they have in the code, whether or not their encoder reads it again: never 0 for want of a reading."""
    g = torch.Generator().manual_seed(0)
    rows: dict[str, Any] = {name: torch.randn(12, 32, generator=g) for name in ("encoder", "decoder")}
    rows["bias"] = torch.zeros(12)
    kinds = {
        "layers.0": TopK(**rows, k=3),
        "layers.0#own": JumpReLU(**rows, threshold=torch.zeros(12)),
        "layers.1.mlp": Transcoder(**rows, threshold=torch.zeros(12)),
    }
    sites = {site: SiteFacts(width=32, norm=1.0) for site in ("layers.0", "layers.1.mlp", "embed")}
    bank = sl.ConceptBank(
        "kinds", [], kinds, base=sl.BaseModel.of(llama), sites=sites, reads={"layers.1.mlp": "embed"}
    )  # fmt: skip
    for name in (f"{id}/4" for id in kinds):
        with sl.steer(llama, bank, {name: sl.Set(3.0)}, allow_ood=True) as session, torch.no_grad():
            llama(IDS[:1])
        assert session.report().lines[0].largest == pytest.approx(3.0)
        with sl.steer(llama, bank, {name: 3.0}, allow_ood=True) as session, torch.no_grad():
            llama(IDS[:1])
        assert session.report().lines[0].largest == (None if "own" not in name else pytest.approx(4, abs=1))


def test_a_concept_has_one_row_however_many_places_it_has(llama):
    g = torch.Generator().manual_seed(0)
    sites = ("layers.0", "layers.1")
    encoders = {site: sl.Directions(torch.randn(2, 32, generator=g)) for site in sites}
    parts = (sl.Part(encoder="layers.0", index=1, unit=0.5), sl.Part(encoder="layers.1", index=0, unit=2.0))
    tone = sl.Concept(name="tone", encoder="layers.0", index=0, parts=parts)
    facts = {site: SiteFacts(width=32, norm=10.0) for site in sites}
    bank = sl.ConceptBank("lever", [tone], encoders, base=sl.BaseModel.of(llama), sites=facts)
    with sl.steer(llama, bank, {"tone": sl.Set(0.1, tokens="prompt"), "layers.1/1": sl.Ablate()}) as session:
        write(llama)
    report = session.report()
    assert [one.site for one in report.lines] == ["layers.0", "layers.0", "layers.1", "layers.1"]
    tone, other = report.concepts
    assert (tone.site, tone.acted, tone.passes, tone.tokens, tone.seen) == ("2 sites", 1, 6, 4, 10)
    assert tone.largest == max(one.largest for one in report.lines[:3] if one.largest) and other == report.lines[3]
    assert str(report).count("tone ") == 1 and "of several sites" in str(report) and session._repr_html_().count("<tr>") == 3


def test_the_legend_explains_every_column_that_is_shown(llama):
    with sl.steer(llama, two_directions(llama), {"a": sl.Ablate(), "b": 1.0}) as session:
        write(llama)
    report = session.report()
    assert "a: unit and range not measured: sl.calibrate(model, bank, ['a'], judge=…)" in str(report).splitlines()
    head = report.cells()[0]
    assert "left" in head and "off range" not in head  # nothing is known of natural ranges
    assert all(f"{name}: " in report.legend() for name in head[2:]) and "off range: " not in report.legend()
    full = replace(report.lines[0], off_range=0.36, change=0.1)
    assert set(Report((full,), True).cells()[0]) == set(COLUMNS) and max(map(len, str(report).splitlines())) <= 120
