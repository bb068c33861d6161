"""A study of an autoencoder in one command: data read, figures, page, pictures and bank written."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipelines import quantizer
from torch import nn
from torch.distributions import Normal

import steerlib as sl
from steerlib import errors
from steerlib.bank.concepts import Concept
from steerlib.evaluation.circuits import ANY, pairs
from steerlib.evaluation.datasets import Data, read
from steerlib.evaluation.decoders import drawing, predicting
from steerlib.evaluation.interventions import Decoder
from steerlib.evaluation.study import ends_of, lines, of_bank, opened, page, studied, untrained, write

SIDE = 6
SCENES = Path(__file__).parents[1] / "concept_banks" / "scenes-32" / "pipeline"


class Bars(nn.Module):
    """Pictures of a bright row and a bright column, by one latent each; the third says nothing, and its encoder knows that."""

    def __init__(self):
        super().__init__()
        rows = torch.zeros(3, SIDE, SIDE)
        rows[0, :, 0], rows[1, 0, 1:] = 1.0, 1.0
        self.decoder = nn.Sequential(nn.Linear(3, SIDE * SIDE, bias=False), nn.Unflatten(1, (1, SIDE, SIDE)))
        linear: nn.Linear = self.decoder[0]  # type: ignore[assignment]
        linear.weight.data = rows.flatten(1).T.clone()

    def encode(self, x):
        mean = torch.stack([x[:, 0, 1, 0], x[:, 0, 0, 1], 0 * x[:, 0, 0, 0]], -1)
        return Normal(mean, torch.tensor([0.1, 0.1, 1.0]).expand_as(mean))

    def decode(self, z):
        return self.decoder(z)


def bars():
    return Bars().requires_grad_(False)


@pytest.fixture
def data(tmp_path):
    v = np.random.default_rng(0).integers(3, size=(80, 2))
    z = torch.as_tensor(np.concatenate([v - 1, np.zeros((80, 1))], 1)).float()
    path = tmp_path / "bars.npz"
    np.savez(path, images=bars().decode(z).numpy()[:, 0], across=v[:, 0], down=v[:, 1], still=np.ones(80), other=np.arange(5))
    return path


def test_a_study_finds_what_a_decoder_was_made_of_and_writes_it(data, tmp_path):
    found = studied(opened("test_study:bars"), read(data))
    whole = found.figures["coordinates"]
    assert found.figures["passive"] == ["z2"] and whole["dead"] == ()
    assert [label.partition(" (")[0] for label in found.figures["labels"].values()] == ["across", "down"]
    assert whole["modularity"] == pytest.approx(1, abs=1e-5)
    z0, z1 = whole["each"]
    assert z0["focus"] == pytest.approx(1 - np.log(6) / np.log(36), abs=1e-4) and z1["focus"] > z0["focus"]
    real, control = found.figures["disentanglement"], found.figures["shuffled factors"]
    assert real["dci_disentanglement"] > 0.95 and real["infom"] > 0.9 and real["mig"] > 0.9
    assert control["mig"] < 0.2 and control["dci_informativeness"] < 0.6
    plain = found.figures["untrained"]  # the same encoder, which has no weights of its own; a decoder of all pixels at once
    assert plain["disentanglement"] == pytest.approx(real) and plain["coordinates"]["modularity"] < 0.5
    assert any(line.startswith("Untrained: mean relative effect") for line in lines(found.figures))
    written = write(found, tmp_path / "out", "Bars <b>")
    text = written.read_text()
    assert "Bars &lt;b&gt;" in text and "http" not in text and text.count("<tr>") == 4 + 3 + 4 and text.count("<img") == 2
    assert json.loads((tmp_path / "out" / "study.json").read_text())["moved"] == 48
    bank = sl.ConceptBank.from_pretrained(tmp_path / "out" / "bank")
    assert list(bank) == ["z0", "z1"] and bank["z0"].effects["relative"] == z0["relative"]
    assert (tmp_path / "out" / "traversals.png").read_bytes()[:4] == b"\x89PNG"


def test_a_change_of_one_factor_goes_through_the_coordinate_that_draws_it_and_along_its_pixels(data):
    """By hand: a factor of three values moves six pixels, or five, by their difference; each pixel is a channel."""
    given = read(data)
    found = studied(bars(), given).figures
    spread, changes = found["coordinates"]["spread"], found["changes"]
    assert list(changes) == ["across", "down", ANY]
    for (factor, own, other), pixels in zip((("across", "z0", "z1"), ("down", "z1", "z0")), (6, 5), strict=True):
        rows, others = pairs(given.factors, 80, most=48)[factor]
        apart = [abs(given.factors[factor][i] - given.factors[factor][j]) for i, j in zip(rows, others, strict=True)]
        one = changes[factor]
        assert one["pairs"] == 48 and one["relative"] == pytest.approx(np.mean(apart) * np.sqrt(pixels) / spread, rel=1e-5)
        assert one["low"] < one["relative"] < one["high"]
        shares = [one["through"][own], one["through"][other], one["together"]]
        assert [share for share, _ in shares] == pytest.approx([1, 0, 1], abs=1e-5)
        assert abs(one["through"][own][1]) < 0.9  # a random direction of three latents
        moved = {round(share, 4) for share, _ in one["along"].values()}
        assert moved <= {0, round(1 / pixels, 4)} and len(one["along"]) == 8
    both = changes[ANY]["through"]
    assert both["z0"][0] + both["z1"][0] == pytest.approx(1, abs=1e-5) and 0.2 < both["z0"][0] < 0.8


def test_pairs_differ_in_one_factor_alone_and_what_has_none_is_left_out():
    rng = np.random.default_rng(0)
    factors = {"a": rng.integers(3, size=60).tolist(), "c": rng.integers(4, size=60).tolist()}
    found = pairs(factors, 60, most=9, seed=1)
    assert list(found) == ["a", "c", ANY]
    for name in ("a", "c"):
        rows, others = found[name]
        assert 2 <= len(rows) <= 9
        for i, j in zip(rows, others, strict=True):
            assert [key for key, v in factors.items() if v[i] != v[j]] == [name]
    factors["twice"] = [2 * v for v in factors["c"]]
    assert list(pairs(factors, 60, most=9)) == ["a", ANY]  # c and twice never change alone
    rows, others = pairs({"a": factors["a"]}, 60, most=60)["a"]
    assert all(factors["a"][i] != factors["a"][j] for i, j in zip(rows, others, strict=True)) and len(rows) > 20


def test_a_pipeline_from_fixed_noise_is_studied_by_concepts_of_any_bank(tmp_path):
    pipe, _ = sl.load(str(SCENES))
    width = pipe.unet.config.block_out_channels[-1]
    axis = torch.randn(width, generator=torch.Generator().manual_seed(5))
    bank = sl.ConceptBank.from_directions({"a": axis}, site="unet.mid_block", base=pipe)
    prompts = ["a red square at night", "a blue circle by day", "a green cross indoors"]
    found = of_bank(Decoder(pipe, drawing(pipe, num_inference_steps=1, guidance_scale=1.0), bank), prompts)
    (one,), change = found.figures["coordinates"]["each"], found.figures["changes"][ANY]
    assert one["relative"] > 0 and one["control"] > 0 and not one["dead"] and change["relative"] > 0
    assert 0 < abs(change["through"]["a"][0]) < 1 and change["pairs"] == 3
    assert found.bank is None and {*found.pictures} == {"circuit.png", "traversals.png"}
    text = write(found, tmp_path, "Scenes").read_text()
    assert "through coordinates" in text and "along channels" not in text and not (tmp_path / "bank").exists()
    assert lines(found.figures)[0] == "Coordinates: 1; dead, moving nothing: none."
    with pytest.raises(errors.BadEdit, match="three inputs"):
        of_bank(Decoder(pipe, drawing(pipe), bank), prompts[:2])


def test_a_coordinate_is_shown_between_the_ends_of_what_is_known_of_it():
    one = Concept(name="a", encoder="layers.1", index=0, unit=2.0, natural=(-2.0, 6.0), range=(0.0, 1.0))
    assert ends_of(one) == (-1, 3) and ends_of(replace(one, natural=None)) == (0, 1)
    assert ends_of(replace(one, natural=None, range=None)) == (-1, 1)


def test_a_language_models_next_token_is_studied_by_concepts_of_any_bank(llama, bank):
    ids = torch.randint(1, 100, (4, 6), generator=torch.Generator().manual_seed(0))
    found = of_bank(Decoder(llama, predicting(llama), bank), ids, hidden="layers.1")
    each, change = found.figures["coordinates"]["each"], found.figures["changes"][ANY]
    assert [one["name"] for one in each] == list(bank) and all(0 < one["ces"] < 2**0.5 for one in each)
    with torch.no_grad():
        p = llama(ids).logits[:, -1].softmax(-1).sqrt()
    spread = float((p - p.mean(0)).norm(dim=-1).mean())
    assert change["relative"] == pytest.approx(float((p.roll(-1, 0) - p).norm(dim=-1).mean()) / spread, rel=1e-4)
    assert change["control"] == pytest.approx(float((p.roll(-2, 0) - p).norm(dim=-1).mean()) / spread, rel=1e-4)
    assert {*found.pictures} == {"circuit.png"} and "next" not in page(found, "Llama")


def test_an_untrained_copy_has_weights_of_its_own_and_leaves_all_else_alone():
    model, state = Bars(), torch.random.get_rng_state()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    one, again, other = (untrained(model, seed) for seed in (0, 0, 1))
    assert one is not None and again is not None and other is not None
    weight = "decoder.0.weight"
    assert torch.equal(one.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(one.state_dict()[weight], other.state_dict()[weight])
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert not torch.equal(one.state_dict()[weight], kept[weight]) and torch.equal(torch.random.get_rng_state(), state)
    model.scale = nn.Parameter(torch.ones(1))  # nothing says how it was drawn
    assert untrained(model) is None


def test_a_quantiser_is_studied_by_swaps_beside_moves():
    vq = quantizer().eval().requires_grad_(False)
    vq.quantize.embedding.weight.data = 4 * torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = studied(vq, read_of(x))
    codes = found.figures.get("codes", {})
    assert all(name.startswith("code ") and one["relative"] >= 0 for name, one in codes.items())
    assert "undefined" in page(found, "VQ") or found.figures["coordinates"]["modularity"] is not None


def read_of(x):
    return Data(x, {})


def test_files_are_read_as_they_are(data, tmp_path):
    read_back = read(data)
    assert read_back.inputs.shape == (80, 1, SIDE, SIDE) and list(read_back.factors) == ["across", "down"]
    np.savez(
        tmp_path / "d.npz", imgs=np.full((3, 4, 4), 255, np.uint8), latents_classes=np.array([[0, 1, 5], [0, 2, 5], [0, 3, 6]])
    )
    sprites = read(tmp_path / "d.npz")
    assert float(sprites.inputs.max()) == 1.0 and sprites.factors == {"factor 1": [1, 2, 3], "factor 2": [5, 5, 6]}
    np.savez(tmp_path / "e.npz", pictures=np.zeros(3))
    with pytest.raises(errors.BadEdit, match="'?imgs or images"):
        read(tmp_path / "e.npz")
    (tmp_path / "none").mkdir()
    with pytest.raises(errors.BadEdit, match="expected pictures"):
        read(tmp_path / "none")


def test_a_folder_of_an_autoencoder_is_opened_and_another_class_refused(tmp_path):
    quantizer().save_pretrained(tmp_path / "vq")
    assert type(opened(str(tmp_path / "vq"))).__name__ == "VQModel"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(errors.UnsupportedTarget, match="no class of diffusers"):
        opened(str(tmp_path / "other"))
