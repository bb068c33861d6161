"""Banks with noise levels: concepts are moved near their own level unless an edit says otherwise."""

import json
from functools import cache

import pytest
import torch
from tiny_pipelines import PIPELINES, run

import steerlib as sl
from steerlib.bank.manifest import SiteFacts
from steerlib.encoders import Directions
from steerlib.errors import ConflictingEdits, CorruptBank
from steerlib.schedules import windows

SITE, LEVELS = "unet.mid_block.attentions.0", ("899", "500", "100")
SPANS = {"899": (0.0, 0.3005), "500": (0.3005, 0.7), "100": (0.7, 1.0)}


def test_windows_meet_half_way_between_levels():
    assert windows([0.25]) == [sl.Window()]
    found = windows([1 - int(level) / 1000 for level in LEVELS])
    assert [(w.start, w.stop) for w in found] == [pytest.approx(span) for span in SPANS.values()]


@cache
def parts():
    pipe = PIPELINES["sd1"].build()
    with sl.record(pipe, [SITE]) as tape:
        run(pipe, steps=1)
    width = tape[SITE][0][1].shape[-1]
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    encoders = {f"{SITE}@{level}": Directions(row[None]) for level, row in zip(LEVELS, rows, strict=True)}
    names = dict(zip(("early", "middle", "late"), encoders, strict=True))
    concepts = [sl.Concept(name=name, encoder=id, index=0) for name, id in names.items()]
    spans = dict(zip(LEVELS, windows([0.101, 0.5, 0.9]), strict=True))
    base = sl.ConceptBank.from_directions({"a": rows[0]}, site=SITE, base=pipe).base
    return pipe, sl.ConceptBank("levels", concepts, encoders, base=base, sites={SITE: SiteFacts(width=width)}, levels=spans)


def moved(edits):
    """Progress of the passes that edits change at their site."""
    pipe, bank = parts()
    with sl.record(pipe, [SITE]) as plain:
        run(pipe, steps=10)
    with sl.steer(pipe, bank, edits), sl.record(pipe, [SITE]) as tape:
        run(pipe, steps=10)
    return [float(state.progress) for (state, x), (_, y) in zip(tape[SITE], plain[SITE], strict=True) if not torch.equal(x, y)]


def test_a_concept_is_moved_in_the_window_of_its_level():
    found = moved({"late": 5.0})
    assert found and min(found) >= 0.7
    early = moved({"early": 5.0})
    assert min(early) < 0.1  # what is changed early stays changed


def test_an_edit_that_says_when_is_obeyed():
    assert min(moved({"late": sl.Add(5.0, when=sl.Window())})) < 0.1


def test_the_middle_level_and_its_window_given_by_hand_are_the_same():
    pipe, bank = parts()
    with sl.steer(pipe, bank, {"middle": 5.0}):
        default = run(pipe, steps=10)
    with sl.steer(pipe, bank, {"middle": sl.Add(5.0, when=bank.levels["500"])}):
        by_hand = run(pipe, steps=10)
    assert torch.equal(default, by_hand) and not torch.equal(default, run(pipe, steps=10))


def test_a_concept_of_several_levels_moves_each_in_its_own_window():
    pipe, bank = parts()
    first, *others = (bank[name] for name in ("early", "middle", "late"))
    whole = sl.Concept(
        name="whole", encoder=first.encoder, index=0, parts=tuple(sl.Part(encoder=c.encoder, index=0, unit=1.0) for c in others)
    )
    bank = bank.with_concepts([*bank.concepts.values(), whole])

    def made(edits):
        with sl.steer(pipe, bank, edits):
            return run(pipe, steps=10)

    each = made({"early": 2.0, "middle": 2.0, "late": 2.0})
    assert torch.equal(made({"whole": 2.0}), each) and torch.equal(made({"whole": sl.Add(2.0, when=sl.Window())}), each)
    assert torch.equal(
        made({"whole": sl.Add(2.0, when=sl.Window(0.5, 1.0))}),
        made({"middle": sl.Add(2.0, when=sl.Window(0.5, 0.7)), "late": 2.0}),
    )
    steps = made({"whole": sl.Add(2.0, when=sl.PerStep((1.0, 1.0, 0.0)))})
    assert torch.equal(steps, made({"early": sl.Add(2.0, when=sl.Steps(0, 2))}))


def test_a_concept_is_held_in_the_window_of_its_level_alone():
    """While it is, nothing else is moved any more, so that there is nothing to take back."""
    pipe, bank = parts()

    def made(**options):
        with sl.steer(pipe, bank, {"early": 5.0}, **options):
            return run(pipe, steps=10)

    free = made()
    torch.testing.assert_close(made(do="hold", hold=["late"]), free)
    wide = bank.with_concepts(name="wide", levels={})
    with sl.steer(pipe, wide, {"early": sl.Add(5.0, when=sl.Window(0.0, 0.3))}, do="hold", hold=["late"]):
        assert (run(pipe, steps=10) - free).abs().max() > 1e-3


def test_values_may_be_given_along_one_direction_at_times_that_do_not_meet():
    pipe, bank = parts()
    row = bank.encoder(bank["early"].encoder)
    same = sl.ConceptBank(
        "same", [*bank.concepts.values()], dict.fromkeys(bank.encoders, row), base=bank.base, sites=bank.sites
    )
    apart = {name: sl.Set(1.0, when=span) for name, span in (("early", sl.Window(0.0, 0.5)), ("late", sl.Window(0.5, 1.0)))}
    with sl.steer(pipe, same, apart):
        run(pipe, steps=4)
    with pytest.raises(ConflictingEdits, match="'early', 'late'"):
        sl.steer(pipe, same, apart | {"late": sl.Set(1.0, when=sl.Window(0.4, 1.0))}).__enter__()


def test_levels_come_back_from_a_folder(tmp_path):
    bank = parts()[1]
    opened = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank"))
    assert opened.levels == bank.levels and opened.window_of(opened["late"]) == bank.levels["100"]
    assert opened.with_concepts(list(opened.concepts.values())).levels == bank.levels


@pytest.mark.parametrize("levels", [{"1": [0.5, 0.2]}, {"1": [0.1]}, {"1": ["a", "b"]}, {"1": 3}, [1], {"1": [0.0, 2.0]}])
def test_levels_that_are_no_spans_are_refused(tmp_path, levels):
    path = parts()[1].save_pretrained(tmp_path / "bank") / "bank.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"levels": levels}))
    with pytest.raises(CorruptBank):
        sl.ConceptBank.from_pretrained(tmp_path / "bank")


def test_a_gate_is_read_where_the_edit_acts_if_its_concept_has_a_part_there():
    pipe, own = parts()
    early = "unet.down_blocks.0.attentions.0"
    with sl.record(pipe, [early, SITE]) as tape:
        run(pipe, steps=1)
    sizes = {site: tape[site][0][1].shape[1:] for site in (early, SITE)}
    assert sizes[early][0] != sizes[SITE][0]  # read there, it would not fit here
    g = torch.Generator().manual_seed(2)
    rows = {f"{site}#gate": torch.randn(1, sizes[site][1], generator=g) for site in (early, SITE)}
    encoders = {id: Directions(row) for id, row in rows.items()}
    encoders[SITE] = Directions(torch.randn(1, sizes[SITE][1], generator=g))
    part = sl.Part(encoder=f"{SITE}#gate", index=0, unit=1.0)
    concepts = [
        sl.Concept(name="moved", encoder=SITE, index=0),
        sl.Concept(name="both", encoder=f"{early}#gate", index=0, parts=(part,)),
        sl.Concept(name="here", encoder=f"{SITE}#gate", index=0),
    ]
    facts = {site: SiteFacts(width=size[1]) for site, size in sizes.items()}
    bank = sl.ConceptBank("gates", concepts, encoders, base=own.base, sites=facts)

    def made(gate):
        with sl.steer(pipe, bank, {"moved": sl.Add(5.0, gate=gate and sl.Gate(gate, above=0.0))}):
            return run(pipe, steps=3)

    assert torch.equal(made("both"), made("here")) and not torch.equal(made("here"), made(None))
