"""How a host is found, what it loads, where it counts tokens; and that an entry of each registry is all that is needed."""

from typing import Any

import diffusers
import pytest
import torch
from test_beside import bank_for
from test_families import assert_moved
from tiny_models import shrunk, tiny, toy_tokenizer
from tiny_pipelines import ALL, PIPELINES
from torch import nn
from transformers import AutoModelForImageTextToText, ViTConfig, ViTModel, WhisperConfig, WhisperForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import steerlib as sl
from steerlib import errors, hosts
from steerlib.hooks.diffusers.families import DENOISERS, GUIDANCE, Denoiser
from steerlib.hooks.diffusers.host import PipelineHost
from steerlib.hooks.modules import ModuleHost
from steerlib.hooks.transformers.families import FAMILIES, Family
from steerlib.hosts import host_for

d: Any = diffusers


# -- where there are tokens to count ---------------------------------------------------------------------------


def counted(target, *names):
    host = host_for(target)
    return [host.counts_tokens(host.site(name)) for name in names]


def test_tokens_are_counted_where_text_is_read_and_not_in_a_tower_that_sees():
    llava = tiny("llava", AutoModelForImageTextToText)
    tower = next(name for name, m in llava.named_modules() if name and getattr(m, "main_input_name", "") == "pixel_values")
    inside = next(name for name, m in llava.named_modules() if name.startswith(tower + ".") and isinstance(m, nn.Linear))
    assert counted(llava, "embed", "layers.1", "layers.1.attn.heads.0", "norm", "lm_head") == [True] * 5
    assert counted(llava, tower, inside) == [False, False]
    assert counted(tiny("llama"), "layers.1", "model.layers.0.mlp.up_proj") == [True, True]


def test_tokens_are_counted_where_a_model_of_speech_writes():
    whisper = WhisperForConditionalGeneration(shrunk(WhisperConfig(), max_source_positions=16, num_mel_bins=8))
    assert counted(whisper, "encoder.layers.0", "decoder.layers.0") == [False, True]


def test_a_model_that_only_sees_has_no_tokens_and_a_plain_module_has():
    assert counted(ViTModel(shrunk(ViTConfig(), image_size=8, patch_size=4)), "embeddings") == [False]
    assert counted(nn.Sequential(nn.Linear(2, 2)), "0") == [True]


def test_of_a_pipeline_only_the_text_encoder_has_tokens_to_count():
    pipe = ALL["sd_with_text"].build()
    names = ("unet.mid_block", "vae.decoder", "text_encoder.layers.0", "text_encoder")
    assert counted(pipe, *names) == [False, False, True, True]
    assert counted(PIPELINES["flux"].build(), "transformer.transformer_blocks.0:text") == [False]


# -- loading by name -------------------------------------------------------------------------------------------


def test_what_is_loaded_is_a_model_with_its_tokenizer_or_a_pipeline(tmp_path):
    llama, pipe = tiny("llama"), PIPELINES["ddpm"].build()
    llama.save_pretrained(tmp_path / "llama")
    toy_tokenizer().save_pretrained(tmp_path / "llama")
    pipe.save_pretrained(tmp_path / "ddpm")
    model, tokenizer = sl.load(str(tmp_path / "llama"), dtype=torch.bfloat16)
    assert type(model) is type(llama) and model.dtype == torch.bfloat16 and tokenizer("sun").input_ids and not model.training
    found, none = sl.load(str(tmp_path / "ddpm"))
    assert type(found) is type(pipe) and none is None and found.unet.dtype == torch.float32
    assert sl.load(str(tmp_path / "ddpm"), dtype=torch.bfloat16)[0].unet.dtype == torch.bfloat16
    with pytest.raises(errors.MissingExtra, match="pip install --no-deps no-such-package"):
        sl.load("package:no_such_package/a.gguf")


def test_a_pipeline_is_loaded_from_the_hub_and_what_else_is_there_is_left_to_others(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)  # diffusers calls an object made at import
    pipe = PIPELINES["ddpm"].build()
    pipe.save_pretrained(tmp_path / "ddpm")
    hub.add("org/ddpm", {str(p.relative_to(tmp_path / "ddpm")): p for p in (tmp_path / "ddpm").rglob("*") if p.is_file()})
    hub.add("org/llama", {"config.json": b"{}"})
    found, _ = sl.load("org/ddpm")
    assert all(torch.equal(a, b) for a, b in zip(found.unet.parameters(), pipe.unet.parameters(), strict=True))
    assert [PipelineHost.opens(id) for id in ("org/ddpm", "org/llama", "org/nothing", "no id")] == [True, False, False, False]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert [PipelineHost.opens(id) for id in ("org/ddpm", "org/other")] == [True, False]


# -- one entry, and no edit elsewhere --------------------------------------------------------------------------


class OddLayer(LlamaDecoderLayer):
    """Attends in a module whose name says nothing."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        del self.self_attn
        self.glance = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, **_):
        hidden_states = hidden_states + self.glance(hidden_states)
        return hidden_states + self.mlp(hidden_states)


class OdderLayer(OddLayer):
    """Of the same family."""


@pytest.mark.parametrize("block", [OddLayer, OdderLayer])
def test_a_family_of_language_models_is_one_entry(monkeypatch, block):
    torch.manual_seed(0)
    model = tiny("llama")
    for i in range(2):
        model.model.layers[i] = block(model.config, i)
    with pytest.raises(errors.UnknownSite):
        host_for(model).site("layers.1.attn")
    monkeypatch.setitem(FAMILIES, "OddLayer", Family(attn="glance"))
    other = type(model)(model.config).eval()  # sites are read off a model once
    other.model.layers = model.model.layers
    assert host_for(other).site("layers.1.attn").module == "model.layers.1.glance"
    assert_moved(other, "layers.1.attn", ["layers.0", "layers.1.in"])


class Floor(nn.Module):
    """Gives text and image, in this order."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden_states, encoder_hidden_states):
        return encoder_hidden_states, hidden_states + torch.tanh(self.mix(hidden_states) + encoder_hidden_states.mean(1, True))


class Tower(nn.Module):
    """A denoiser that is given the share of the image, with names of its own for everything."""

    def __init__(self):
        super().__init__()
        self.floors = nn.ModuleList(Floor() for _ in range(2))
        self.config = {"height": 2}

    def forward(self, canvas, done, text):
        x = canvas.flatten(2).transpose(1, 2)
        for floor in self.floors:
            text, x = floor(hidden_states=x, encoder_hidden_states=text)
        return x.transpose(1, 2).reshape(canvas.shape)


class TowerPipeline(d.DiffusionPipeline):
    """Stacks the half with the prompt first, under names that do not say so."""

    def __init__(self, tower, scheduler):
        super().__init__()
        self.register_modules(tower=tower, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self):
        latents = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
        text = torch.cat((torch.ones(1, 3, 8), torch.zeros(1, 3, 8)))
        self.scheduler.set_timesteps(4)
        for _i, t in enumerate(self.scheduler.timesteps):
            a, b = self.tower(torch.cat((latents, latents)), 1 - t / 1000, text).chunk(2)
            latents = self.scheduler.step(b + 2 * (a - b), t, latents).prev_sample
        return latents


def test_a_denoiser_is_one_entry_and_an_order_of_guidance_another(monkeypatch):
    torch.manual_seed(0)
    pipe = TowerPipeline(Tower(), d.DDIMScheduler())
    with pytest.raises(errors.UnsupportedTarget, match="a denoiser"):
        host_for(pipe)
    facts = Denoiser(
        lists=("floors",),
        noise=lambda done, _: 1 - done,
        time=("done",),
        sample=("canvas",),
        identity=("height",),
    )
    monkeypatch.setitem(DENOISERS, "Tower", facts)
    guided = {"a": sl.Add(1.0, branch="cond")}
    with (
        pytest.raises(errors.Unanswerable, match="GUIDANCE"),
        sl.steer(pipe, bank_for(pipe, "tower.floors.1:image", 8), guided),
    ):
        pipe()
    monkeypatch.setitem(GUIDANCE, "TowerPipeline.__call__", {2: ("cond", "uncond")})
    host, site = host_for(pipe), "tower.floors.1:image"
    assert {site, "tower.floors.0:text"} <= {*host.sites()} and host.fingerprint() == {"tower": {"class": "Tower", "height": 2}}
    assert host.order(host.site("tower.floors.0:image")) < host.order(host.site(site))
    bank = bank_for(pipe, site, 8)
    with sl.record(pipe, [site]) as before:
        plain = pipe()
    with sl.steer(pipe, bank, {"a": sl.Add(2.0, when=sl.Window(0.0, 0.3))}, branch="cond"), sl.record(pipe, [site]) as after:
        assert not torch.equal(pipe(), plain)
    (state, x), (_, y) = before[site][0], after[site][0]
    assert state.branches == ("cond", "uncond") and state.grid == (1, 4, 4)
    torch.testing.assert_close(y[:1], x[:1] + 2 * bank.rows(bank["a"]).write[0])
    assert torch.equal(y[1:], x[1:])
    times = pipe.scheduler.timesteps.tolist()
    assert [s.progress for s, _ in before[site]] == pytest.approx([1 - t / 1000 for t in times])
    with sl.record(pipe, [site]) as tape:  # without a pipeline's call the time is what the denoiser is given
        for t in times:
            pipe.tower(torch.ones(1, 8, 4, 4), torch.tensor(1 - t / 1000), torch.ones(1, 3, 8))
    assert [s.progress for s, _ in tape[site]] == pytest.approx([1 - t / 1000 for t in times], abs=1e-6)


class Machine:
    """A model of a library of one's own: no module, but it has one."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


class MachineHost(ModuleHost):
    def __init__(self, target: Any):
        super().__init__(target.net)

    @classmethod
    def opens(cls, source):
        return source.endswith(".machine")

    @classmethod
    def load(cls, source, **kwargs):
        return Machine(), None


def test_a_host_is_one_class_and_one_entry(monkeypatch):
    with pytest.raises(errors.UnsupportedTarget, match="Machine"):
        host_for(Machine())
    monkeypatch.setitem(hosts.HOSTS, f"{__name__.partition('.')[0]}.Machine", f"{__name__}:MachineHost")
    machine, none = sl.load("my.machine")
    assert isinstance(machine, Machine) and none is None
    bank, x = sl.ConceptBank.from_directions({"a": torch.ones(8)}, site="1", base=machine), torch.ones(1, 3, 4)
    expected = machine.net[2](machine.net[1](machine.net[0](x)) + 2)
    with sl.steer(machine, bank, {"a": 2.0}):
        torch.testing.assert_close(machine.net(x), expected)
    assert not torch.equal(machine.net(x), expected)
