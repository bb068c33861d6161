"""What `scripts/causes.py` chooses, scales and compares, where the right answer is known."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import causes
import numpy as np
import pytest
import torch
from causes import Push, Study, alike, at_kl, goal, kept, laid, ratio, screened, slopes
from tiny_models import toy_tokenizer, toy_writer

import steerlib as sl
from steerlib.bank.manifest import SiteFacts
from steerlib.encoders import JumpReLU
from steerlib.evaluation.comparison import Unrelated
from steerlib.evaluation.probing import selection

WIDTH, LATENTS, SITES = 32, 12, ("layers.0", "layers.1")
PAIRS = [("why", "the moon sings", "bread"), ("here", "blue snow falls", "the old road"), ("tea", "a warm cup", "cold fish")]


def encoder(seed: int) -> JumpReLU:
    g = torch.Generator().manual_seed(seed)
    rows, often = torch.randn(LATENTS, WIDTH, generator=g), torch.linspace(0.001, 0.1, LATENTS)
    facts = {"unit": torch.rand(LATENTS, generator=g) + 0.5, "frequency": often}
    return JumpReLU(encoder=rows, bias=torch.zeros(LATENTS), decoder=rows, threshold=torch.ones(LATENTS), statistics=facts)


@pytest.fixture
def study() -> Any:
    """What a study measures with, of a toy model and latents drawn at random."""
    model, tokenizer = toy_writer(), toy_tokenizer()
    encoders = {site: encoder(seed) for seed, site in enumerate(SITES, 7)}
    sites = {site: SiteFacts(width=WIDTH, norm=2.0 + seed) for seed, site in enumerate(SITES)}
    bank = sl.ConceptBank("toy", [], encoders, base=sl.BaseModel.of(model), sites=sites)
    return SimpleNamespace(model=model, tokenizer=tokenizer, encoders=encoders, bank=bank)


def length(push: Push, name: str) -> float:
    return push.amounts[name] * push.bank[name].unit * float(push.bank.rows(push.bank[name]).write.norm())


def test_the_slope_of_a_goal_is_what_a_small_push_does(study):
    done = laid(study.model, study.tokenizer, PAIRS)
    slope = slopes(study.model, done, dict.fromkeys(SITES, WIDTH))
    for name in ("layers.0/3", "layers.1/7"):
        change, small = [], 1e-5
        for amount in (small, 2 * small):
            with torch.no_grad(), Push(study.bank, {name: amount}).on(study.model):
                change.append(float(goal(study.model, done).mean()))
        said = study.bank[name].unit * float(study.bank.rows(study.bank[name]).write[0] @ slope[name.partition("/")[0]])
        assert (change[1] - change[0]) / small == pytest.approx(said, rel=0.05) and abs(said) > 1e-3


def test_a_goal_is_the_gain_of_a_token_of_one_answer_over_one_of_the_other(study):
    done = laid(study.model, study.tokenizer, PAIRS)

    def said(request: str, answer: str) -> float:
        """One answer alone, without pads."""
        asked = study.tokenizer(f"{request} . ", add_special_tokens=False, return_tensors="pt")["input_ids"]
        new = study.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores = study.model(torch.cat((asked, new), 1)).logits.log_softmax(-1)[0, asked.shape[1] - 1 : -1]
        return float(scores.gather(1, new.T).mean())

    expected = [said(request, shows) - said(request, lacks) for request, shows, lacks in PAIRS]
    assert goal(study.model, done).detach().tolist() == pytest.approx(expected, abs=1e-4)


def test_screening_takes_the_latents_that_point_along_the_slope_and_fire(study):
    made, slope = study.encoders["layers.0"], torch.zeros(WIDTH)
    slope[0] = 1.0
    rows = made.decoder.clone()
    rows[:, 0] = 0.0
    rows[2], rows[5], rows[9] = 0.1 * slope, 4.0 * slope, 9.0 * slope  # how long a row is does not count
    rows[5, 1] = 3.0
    often = made.statistics["frequency"].clone()
    often[9] = 0.0
    made = replace(made, decoder=rows, statistics={**made.statistics, "frequency": often})
    assert screened({"layers.0": slope}, {"layers.0": made}, each=2) == ["layers.0/2", "layers.0/5"]


def test_what_moves_the_goal_is_kept_and_what_only_goes_with_it_is_not():
    """Latents 0 to 4 read the concept and do nothing; 5 to 9 read it less well and move the goal."""
    random, has = np.random.default_rng(0), torch.arange(24) < 12
    readings = (
        torch.rand(24, 10, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0] * 5 + [0.5] * 5) * has[:, None]
    )
    does = {str(i): random.normal(0.0 if i < 5 else 0.1 * i, 0.1, 12) for i in range(10)}
    going = [str(i) for i in selection(readings, has).topk(5).indices.tolist()]
    assert {*going} == {*"01234"}
    assert kept(does)[:5] == ["9", "8", "7", "6", "5"]
    assert len([name for name in kept({str(i): random.normal(0, 1, 12) for i in range(400)})]) == pytest.approx(10, abs=8)


def test_a_ratio_is_that_of_means_and_finds_what_is_true():
    assert ratio(np.full((4, 1, 8), 3.0), np.full((4, 2, 8), 2.0)) == (1.5, 1.5, 1.5)
    assert ratio(np.full((4, 1, 8), 3.0), np.array([2.0, -2.0])[None, :, None].repeat(4, 0).repeat(8, 2), sizes=True)[0] == 1.5
    random = np.random.default_rng(0)
    drawn = lambda mean, sets: mean + random.normal(0, 0.2, (9, 1, 1)) + random.normal(0, 0.3, (9, sets, 16))  # noqa: E731
    within = [low < 2.0 < high for _, low, high in (ratio(drawn(2.0, 1), drawn(1.0, 1)) for _ in range(20))]
    assert sum(within) >= 16


def test_where_nothing_is_guided_guided_sets_move_as_much_as_random_ones():
    random = np.random.default_rng(1)
    drawn = lambda sets: random.normal(0, 1, (40, sets, 1)) + random.normal(0, 0.2, (40, sets, 16))  # noqa: E731
    value, low, high = ratio(drawn(1), drawn(4), sizes=True)
    assert low < 1.0 < high and 0.7 < value < 1.4
    assert ratio(drawn(1) * 5, drawn(4), sizes=True)[1] > 3


def test_random_latents_fire_about_as_often_at_the_same_sites(study, monkeypatch):
    monkeypatch.setattr(causes, "ALIKE", 5)
    names = ["layers.0/3", "layers.1/7", "layers.0/4"]
    drawn = [alike(names, study.encoders, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len({*map(tuple, drawn)}) > 2
    for found in drawn:
        assert len({*found, *names}) == 6
        for one, other in zip(names, found, strict=True):
            site, other_site = one.partition("/")[0], other.partition("/")[0]
            assert site == other_site and abs(int(one[-1]) - int(other.partition("/")[2])) <= 5


def test_sets_of_latents_and_of_directions_are_brought_to_one_kl(study):
    text = Unrelated(study.model, study.tokenizer, ["the moon rises slowly", "the sun falls", "a bird sings"])
    names = ["layers.0/3", "layers.1/7"]
    banks = study.bank, causes.astray(study.bank, study.encoders, 0)
    pushes = [Study.push(study, names, bank) for bank in banks]
    own, drawn = (bank.rows(bank[names[0]]).write for bank in banks)
    assert not torch.allclose(own, drawn)
    for push in pushes:
        assert [length(push, name) for name in names] == pytest.approx([0.1 * 2.0, 0.1 * 3.0])
        found = Study.scaled(study, push, text, 0.004)
        assert len({round(found.amounts[name] / push.amounts[name], 6) for name in names}) == 1
        assert kl_of(study, found) == pytest.approx(0.004, rel=0.03)


def kl_of(study: Any, push: Push) -> float:
    """The same text once more, by torch's own function and without pads."""
    told, tokens = 0.0, 0
    for text in ["the moon rises slowly", "the sun falls", "a bird sings"]:
        ids = study.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            before = study.model(ids).logits[0, :-1].log_softmax(-1)
            with push.on(study.model):
                after = study.model(ids).logits[0, :-1].log_softmax(-1)
        told += float(torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum"))
        tokens += len(before)
    return told / tokens


@pytest.mark.parametrize("power", [1, 2, 4, 6])
def test_a_kl_is_found_however_it_grows_and_refused_where_it_is_never_reached(power):
    looks = []
    factor = at_kl(0.3, lambda x: looks.append(x) or 0.02 * x**power)
    assert 0.02 * factor**power == pytest.approx(0.3, rel=0.021) and len(looks) <= 12
    with pytest.raises(ValueError, match="expected a KL near 0.3"):
        at_kl(0.3, lambda x: min(0.2, x))


def test_the_table_says_which_bars_are_missed():
    def own(*effects: float) -> dict[str, Any]:
        ways: dict[str, Any] = {}
        for way, sets, names, effect in zip(causes.WAYS, (1, 1, 4, 2), ("bc", "ab", "d", "e"), effects, strict=True):
            ways[way] = {"effects": np.full((sets, 16), effect).tolist(), "amounts": [dict.fromkeys(names, 1.0)] * sets}
        told = {way: {"evidence": value} for way, value in zip(causes.READ, (-1.0, 0.0, 1.0, 0.5), strict=True)}
        settings = {f"{count}, {cost}": ways for count, cost in causes.SETTINGS}
        return {"tried": 36, "kept": ["a", "b"], "settings": settings, "written": told}

    lines = causes.table({"tea": own(0.2, 0.24, -0.05, 0.0), "rain": own(0.2, 0.34, 0.12, 0.0)}).splitlines()
    assert lines[2].startswith("| tea | 2 of 36 | 1 of 2 | +0.200, +0.240, -0.050, +0.000 |")
    assert "| +0.200, +0.290, +0.035, +0.000 |" in lines[4] and lines[4].endswith("| -1.00, +0.00, +1.00, +0.50 |")
    assert lines[-1] == "| 5, 0.3 | 1.45 (1.20 to 1.70) | **no** | 3.41 (2.83 to 4.80) | yes |"
    lines = causes.table({"tea": own(0.1, 0.2, 0.01, 0.0), "rain": own(0.1, 0.2, 0.01, 0.0)}).splitlines()
    assert (
        lines[-1]
        == "| 5, 0.3 | 2.00 (2.00 to 2.00) | yes, with its interval | 20.00 (20.00 to 20.00) | yes, with its interval |"
    )
