"""Quad data and the command that makes the table of context modules on it, at a size of seconds."""

import json
from dataclasses import replace
from itertools import combinations

import pytest
import quads
import torch
from quads import CONCEPTS, PAIRS, Autoencoder, Size, factors, render, with_module

from steerlib.training.fit.contexts import OBSERVED, ContextFit

TINY = Size(
    side=8, pictures=64, hidden=4, latents=12, compared=64, fit=ContextFit(inner=2, outer=2, steps=4, batch=8, warmup=2)
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_an_intervention_moves_its_concept_and_in_a_system_what_follows_and_nothing_else():
    plain, done = (factors(4000, do, generator(), dependent=True) for do in ((), ("first",)))
    moved = {name: float((done[name] - plain[name]).mean()) for name in plain}
    assert moved["first"] == pytest.approx(quads.SHIFT, abs=0.05) and done["first"].std() == pytest.approx(
        quads.SPREAD, rel=0.05
    )
    assert moved["third"] == pytest.approx(0.9 * quads.SHIFT / 2**0.5, abs=0.05)  # one cause
    assert moved["colour"] == pytest.approx(0.5 * moved["third"] / 3**0.5, abs=0.05)  # by way of the third, of two causes
    assert moved["second"] == moved["fourth"] == 0
    free, alone = (factors(4000, do, generator(), dependent=False) for do in ((), ("first",)))
    assert all(torch.equal(free[name], alone[name]) == (name != "first") for name in CONCEPTS)


def test_each_quadrant_shows_its_own_hue_and_the_centre_its_size():
    values = {name: torch.zeros(2) for name in (*CONCEPTS, "shape", "angle")}
    for k, name in enumerate(CONCEPTS[:4]):
        image = render({**values, name: torch.tensor([0.0, 2.0])}, 8)
        changed = (image[0] != image[1]).any(0)
        assert changed[0, 0].item() == (k == 0) and changed[0, 7].item() == (k == 1)
        assert changed[7, 0].item() == (k == 2) and changed[7, 7].item() == (k == 3)
    small, large = render({**values, "size": torch.tensor([-2.0, 2.0]), "colour": torch.full((2,), 1.0)}, 32)
    assert ((large != small).any(0).float().mean() > 0.05) and small.min() >= 0 and large.max() <= 1


def test_nine_pairs_are_held_out():
    assert len({*PAIRS}) == 9 and {*PAIRS} <= {*combinations(CONCEPTS, 2)}
    assert {name for pair in PAIRS for name in pair} == {*CONCEPTS}


def test_pictures_of_64_pixels_are_drawn_and_learned_from():
    large = TINY._replace(side=64, fit=replace(TINY.fit, steps=1))
    data = {name: quads.pictures(8, (), 64, 0, dependent=True) for name in (OBSERVED, *CONCEPTS)}
    drawn = with_module(large, data, 0).draws(2, ("first",), 0)
    assert drawn.shape == (2, 3, 64, 64) and drawn.min() >= 0 and drawn.max() <= 1


def test_in_frozen_mode_only_the_module_learns_and_fine_tuned_all_do():
    around = Autoencoder(TINY, 0, module=False)
    data = {name: torch.rand(16, 3, 8, 8, generator=generator()) for name in (OBSERVED, *CONCEPTS)}
    for learns in ("module", "late"):
        model = with_module(TINY, data, 1, around, learns)
        kept = {name: torch.equal(model.state_dict()[name], tensor) for name, tensor in around.state_dict().items()}
        del kept["spread"]  # of the noise that it has without a module
        assert all(kept.values()) if learns == "module" else not any(kept.values())


def test_the_command_goes_on_and_ends_with_figures_of_every_method_and_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quads, "Size", lambda **given: TINY._replace(**{k: v for k, v in given.items() if k == "compared"}))
    quads.main(only="independent", seeds=1, side=8, steps=4, count=64, out=tmp_path)
    own = tmp_path / "8-4-64"
    before = (own / "independent-0.json").read_bytes()
    assert (own / "independent.png").stat().st_size > 100
    monkeypatch.setattr(quads, "measured", lambda *_, **__: pytest.fail("was measured already"))
    quads.main(only="independent", seeds=1, side=8, steps=4, count=64, out=tmp_path)
    assert (own / "independent-0.json").read_bytes() == before
    assert json.loads((own / "independent-0-linear.json").read_text()).keys() == {"linear"}
    found = json.loads((own / "quads.json").read_text())
    methods = {"base", "pooled", "end to end", "frozen", "shuffled", "linear", "fine-tuned"}
    assert found["runs"]["independent"][0].keys() == methods
    assert all(0 < value < 9 for figures in found["runs"]["independent"][0].values() for value in figures.values())
    shown = capsys.readouterr().out
    assert (
        all(f"| {method} |" in shown for method in methods)
        and "0.063, 0.081" in shown
        and "5 seeds" not in shown
        and "rate" not in shown
    )


def test_the_command_trains_some_methods_alone_beside_the_base(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quads, "Size", lambda **given: TINY._replace(**{k: v for k, v in given.items() if k == "compared"}))
    quads.main(only="dependent", seeds=1, side=8, steps=4, rate=0.01, count=64, method=["end to end"], out=tmp_path)
    shown = capsys.readouterr().out
    assert "| base |" in shown and "| end to end |" in shown and "| frozen |" not in shown and "pooled level" not in shown
    assert {path.name for path in (tmp_path / "8-4-64-0.01").glob("d*.json")} == {
        "dependent-0-base.json",
        "dependent-0-end to end.json",
    }


def test_the_table_says_by_how_much_a_method_is_below_the_base_and_whether_bars_are_reached():
    def run(by: float) -> dict[str, dict[str, float]]:
        far = {"base": 0.4, "pooled": 0.3, "end to end": 0.1, "frozen": 0.32, "shuffled": 0.35}
        return {method: {"concept": by * v / 2, "composition": by * v, "bits": 1.0} for method, v in far.items()}

    size = {"side": 32, "pictures": 2000, "hidden": 32, "fit": {"steps": 9, "batch": 64, "rate": 0.003}}
    shown = quads.table({"runs": {"independent": [run(0.5), run(1.5)]}, "size": size, "machine": "m", "torch": "t"})
    assert "| end to end | 0.050 (0.025–0.075) | 0.100 (0.050–0.150) | 75% | 1.000 | 0.063, 0.081 | 72% |" in shown
    assert "- end to end at least 50.0% below the base: yes" in shown and "fine-tuned at" not in shown
    assert "- frozen at least 25.0% below the base: **no**" in shown  # 20 %
    assert "pooled level (0.150 to 0.450): yes; at 0.350" in shown and "2 seeds" in shown
    assert "9 steps of 64 at a rate of 0.003, and" in shown
    low = {**run(1.0), "shuffled": run(0.5)["shuffled"]}
    shown = quads.table({"runs": {"dependent": [low]}, "size": {**size, "side": 64}, "machine": "m", "torch": "t"})
    assert "pooled level (0.300 to 0.300): **no**" in shown and "One seed; lower" in shown and "pixels" not in shown
