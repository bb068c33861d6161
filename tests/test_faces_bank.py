"""The shipped bank of an autoencoder: its export to diffusers, its training, the whole in small, and what its latents do."""

import json
import re
from pathlib import Path

import pytest
import torch
from vae import run, shipped
from vae.__main__ import bank as make_bank
from vae.objectives import unlikely
from vae.run import QUICK, Size, train
from vae.tiny import Plain, convolutions, empty, exported
from vae.worlds import WORLDS

import steerlib as sl
from steerlib import errors
from steerlib.bank.autoencoders import posterior
from steerlib.evaluation.decoders import decoding
from steerlib.evaluation.interventions import Decoder
from steerlib.origins import source_of

ROOT = Path(__file__).parent.parent
SEEN = Size(pictures=1500, told=150)
"""Faces that the judge of these tests is found from, and others."""

# -- how it is made ----------------------------------------------------------------------------------------------------


def random_plain(channels):
    torch.manual_seed(1)
    plain = Plain(3, 4, channels)
    for conv in convolutions(plain):
        assert conv.bias is not None
        torch.nn.init.normal_(conv.bias, std=0.3)
    return plain


def test_what_is_exported_to_diffusers_reads_and_draws_the_same():
    plain = random_plain((4, 6, 8, 8, 8, 8))
    vae, x = exported(plain, empty(3, 4, (4, 6, 8, 8, 8, 8))), torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        z, found = plain.encode(x).mean, vae.encode(2 * x - 1).latents
        assert found.shape == (5, 4, 1, 1) and float(z.std()) > 0.05
        torch.testing.assert_close(found.flatten(1), z, atol=1e-5, rtol=1e-4)
        y = plain.decode(3 * z)
        torch.testing.assert_close((vae.decode(3 * found).sample + 1) / 2, y, atol=1e-5, rtol=1e-4)
        assert float((y[0] - y[1]).abs().max()) > 1e-3


def test_training_that_was_cut_off_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "KEPT", 2)
    x, size, ticks = torch.rand(20, 3, 32, 32), QUICK._replace(steps=5, batch=4), []

    def loss():
        return lambda model, x, _: unlikely(model.decode(model.encode(x).rsample()), x)

    def cut():
        ticks.append(1)
        if len(ticks) == 4:
            raise KeyboardInterrupt

    whole, parts = (random_plain((2, 2, 2, 2, 2, 2)) for _ in range(2))
    train(whole, x, loss, size)
    with pytest.raises(KeyboardInterrupt):
        train(parts, x, loss, size, tick=cut, kept=tmp_path / "kept.pt")
    again, ticks = random_plain((2, 2, 2, 2, 2, 2)), []
    train(again, x, loss, size, tick=lambda: ticks.append(1), kept=tmp_path / "kept.pt")
    assert len(ticks) == 5  # two of them for steps that were there already
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_command_makes_the_bank_in_small(tmp_path, monkeypatch):
    """Trained for a few steps, not trained again, steered as the card says; tables between their marks."""
    monkeypatch.setattr(shipped, "SIZE", shipped.SIZE._replace(pictures=40, told=24, batch=8, moved=3))
    readme = tmp_path / "README.md"
    readme.write_text("".join(f"<!-- begin: {part} -->\nstale\n<!-- end: {part} -->\n" for part in ("bank", "faces-latents")))
    how = {"out": tmp_path / "faces", "work": tmp_path / "work", "steps": 11, "readme": [readme], "threads": 1}
    make_bank(**how)
    monkeypatch.setattr(shipped, "train", lambda *_, **__: pytest.fail("it was there"))
    make_bank(**how)
    made = sl.ConceptBank.from_pretrained(tmp_path / "faces")
    made.verify()
    text = readme.read_text()
    assert "stale" not in text and f"| faces | **`{shipped.NAME}`** | " in text and "| faces | beta-TC-VAE | " in text
    assert {f"{name}.png" for name in made.concepts} == {path.name for path in (tmp_path / "faces").glob("*.png")}
    with pytest.raises(errors.BadBank, match="takes no prompt"):
        source_of(made)


# -- what it does ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bank():
    return sl.ConceptBank.from_pretrained(shipped.NAME)


@pytest.fixture(scope="module")
def vae(bank):
    return shipped.loaded(bank.file(shipped.MODEL))


def test_the_bank_is_whole_and_small_and_carries_its_model(bank, vae):
    bank.verify()
    assert sum(path.stat().st_size for path in bank.folder.rglob("*") if path.is_file()) < 3e6
    assert set(bank.fits(vae).values()) == {"same weights"}
    config = json.loads((bank.file(shipped.MODEL) / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderTiny" and "_name_or_path" not in config


def test_the_example_of_the_card_runs_as_it_is_and_moves_one_latent(bank, vae):
    (code,) = re.findall(r"```python\n(.*?)```", bank.card, re.DOTALL)
    found: dict = {}
    exec(code, found)
    (name,) = re.findall(r'\{"(z\d)": 2\.0\}', code)
    z = torch.zeros(1, shipped.SIZE.latents, 1, 1)
    z[0, bank[name].index] = 2 * bank[name].unit
    torch.testing.assert_close(found["face"], vae.decode(z).sample.detach(), atol=1e-4, rtol=1e-4)


def test_a_latent_moves_the_factor_of_its_label_most_and_random_directions_move_it_less(bank, vae):
    """On faces drawn here, read by a judge that knows true faces alone."""
    held = WORLDS["faces"].pictures(WORLDS["faces"].values(60, 77))
    read = shipped.judge(SEEN)
    assert min(read.right.values()) > 0.9
    seen = shipped.moved(vae, bank, held, read)
    told = {name: bank[name].label.partition(" (")[0] for name in bank.concepts}
    assert len({*told.values()}) >= 4
    for name, factor in told.items():
        own = {one: abs(change.mean) for one, change in seen.each[name].items()}
        rest = max(value for one, value in own.items() if one != factor)
        assert own[factor] > 0.7 and own[factor] > 3 * rest, (name, own)
        assert seen.chance[factor] < 0.75 * own[factor], (name, seen.chance[factor])


def test_nothing_moves_without_an_amount_and_a_passive_latent_moves_little(bank, vae):
    x = 2 * WORLDS["faces"].pictures(WORLDS["faces"].values(8, 5)) - 1
    with torch.no_grad():
        z = posterior(vae.encode(x)).mean
    decoder = Decoder(vae, decoding(vae), bank)
    first = next(iter(bank.concepts))
    assert torch.equal(decoder(z, {first: sl.Add(0.0)}), decoder(z))
    assert set(bank.provenance["passive"]) | set(bank.concepts) == {f"z{k}" for k in range(shipped.SIZE.latents)}


@pytest.mark.parametrize("path", ["scripts/vae/README.md", "concept_banks/README.md"])
def test_tables_of_the_readmes_are_of_the_bank(bank, path):
    studied, text = ((ROOT / name).read_text() for name in ("scripts/vae/README.md", path))
    parts = {name: part for name, part in shipped.tables(bank, studied).items() if f"begin: {name} " in text}
    assert len(parts) == 1
    for name, part in parts.items():
        assert f"<!-- begin: {name} -->\n{part}\n<!-- end: {name} -->" in text
