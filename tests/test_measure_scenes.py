"""What is measured of concepts of scenes: the tables in closed form, and every figure of a bank that does nothing."""

import measure_scenes
import pytest
import torch
from measure_scenes import Bench, by_factor, damage, table
from scenes import judges
from scenes.experiment import Experiment
from scenes.measures import Cause

import steerlib as sl
from steerlib.bank import SiteFacts


def figures(effect, lost=((0.1, 0.0), (0.4, 0.2), (0.2, 0.1)), unsaid=(0.5, 1.0)):
    said = dict.fromkeys(measure_scenes.CONDITIONS[:-1], [effect, 1.0])
    return {
        "other value said": said,
        "value unsaid": unsaid and [*unsaid],
        "in other words": {"words of the pairs": [0.9, 0.95], "other words": [0.8, 0.95]},
        "removed": {"removed": [0.7, 1.0], "negative prompt": [0.2, 1.0]},
        "one of two": None,
        "self-score": {"auroc": 0.9, "damage and lost": [list(pair) for pair in lost]},
        "chosen": ["Add", 2.5, "mean"],
    }


def test_tables_have_means_and_count_what_reaches_both_bars():
    found = {"night": figures(1.0), "circle": figures(0.8, unsaid=None)}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(found).splitlines()]
    own = dict(zip(lines[0], zip(*lines[2:], strict=True), strict=True))
    assert own["value"] == ("night", "circle", "**mean**", "reach both bars")
    assert own["captions alone"] == ("1.00 / 1.00", "0.80 / 1.00", "0.90 / 1.00", "1 of 2")
    assert own["value unsaid"] == ("0.50 / 1.00", "", "0.50 / 1.00", "0 of 1") and own["words of the pairs"][-1] == "2 of 2"
    assert own["made from the truth"] == ("", "", "", "0 of 0") and own["AUROC"][:3] == ("0.90",) * 3
    assert [line.split("|")[1:3] + line.split("|")[-2:-1] for line in by_factor(found).splitlines()[2:]] == [
        [" scene ", " 1 ", " 1 "],
        [" shape ", " 1 ", " 0 "],
    ]


def test_damage_is_compared_by_ranks_over_all_values_and_amounts_and_within_a_value():
    """b loses ten times as much at a tenth of a's damage: each is in order, both together are not; c loses nothing."""
    a, b = [(1.0, 0.01), (2.0, 0.02), (4.0, 0.03)], [(0.1, 0.1), (0.2, 0.2), (0.4, 0.3)]
    every = {name: figures(1.0, lost=lost) for name, lost in {"a": a, "b": b}.items()}
    assert "over 6 values and amounts -0.54, over the amounts of one value 1.00 on average (of 2" in damage(every)
    assert (
        "over 9 values" in (said := damage(every | {"c": figures(1.0, lost=[(0.1, 0.0)] * 3)}))
        and "1.00 on average (of 2" in said
    )
    assert "value -1.00 on average (of 1" in damage({"a": figures(1.0, lost=[(0.1, 0.2), (0.2, 0.1), (0.4, 0.0)])})


@pytest.mark.parametrize("cause", [Cause("hue", "blue"), Cause("scene", "night")], ids=lambda cause: cause.value)
def test_a_concept_by_nothing_leaves_every_picture_as_it_was(toy, monkeypatch, cause):
    monkeypatch.setattr(measure_scenes, "AMOUNTS", (0.0,))
    monkeypatch.setattr(measure_scenes, "HARMFUL", ())
    facts = {"edit": "Add", "amount": 0.0, "removal": "Set", "removal_amount": 0.0}
    concepts = [
        sl.Concept(name=name, encoder="unet.conv_out", index=k, source="given", effects=facts)
        for k, name in enumerate((cause.value, "stone"))
    ]
    encoder = sl.Directions(torch.eye(2, 3))
    bank = sl.ConceptBank(
        "toy", concepts, {"unet.conv_out": encoder}, base=sl.BaseModel(), sites={"unet.conv_out": SiteFacts(width=3)}
    )
    found = Bench(Experiment(toy, bank, judges.load("scenes"), steps=2), 4, beside=bank).measured(cause)
    said = found["other value said"]
    assert said["captions alone"] == said["amount of a judge"] == said["another concept"] == said["made from the truth"]
    assert {*said} == {*measure_scenes.CONDITIONS} and said["captions alone"][1] == 1.0
    assert found["self-score"]["damage and lost"] == [[pytest.approx(0, abs=0.2), 0.0]]
    assert (found["one of two"] is None) == (cause.factor == "scene") and found["chosen"] == ["Add", 0.0, "given"]
