"""Halves of guidance and streams of blocks are told right, or refused, in every class that diffusers exports."""

import importlib
import pkgutil
from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from kindred_pipelines import asked, built, evidence, exported, told
from tiny_pipelines import PIPELINES
from torch import nn

import steerlib as sl
from steerlib import errors
from steerlib.hooks.diffusers import guidance
from steerlib.hooks.source import Streams, streams_of
from steerlib.hosts import host_for

d: Any = diffusers

# -- halves of guidance, over every pipeline -------------------------------------------------------------------

UNSHOWN = ["TextToVideoZeroPipeline", "UniDiffuserPipeline"]
"""Pipelines whose call shows no halves: a helper of the first does, those of the second are refused where it is guided."""
BUILT = """
ChromaImg2ImgPipeline Flux2KleinInpaintPipeline FluxImg2ImgPipeline
FluxInpaintPipeline HunyuanVideoPipeline LTXImageToVideoPipeline Lumina2Pipeline PixArtAlphaPipeline PixArtSigmaPAGPipeline
QwenImageImg2ImgPipeline QwenImageInpaintPipeline SanaPAGPipeline SanaPipeline StableDiffusion3ControlNetInpaintingPipeline
StableDiffusion3Img2ImgPipeline StableDiffusion3PAGImg2ImgPipeline StableDiffusion3PAGPipeline
StableDiffusionControlNetPipeline StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline StableDiffusionPAGPipeline
StableDiffusionPanoramaPipeline StableDiffusionSAGPipeline StableDiffusionXLControlNetImg2ImgPipeline
StableDiffusionXLControlNetInpaintPipeline StableDiffusionXLControlNetPAGImg2ImgPipeline
StableDiffusionXLImg2ImgPipeline StableDiffusionXLPAGInpaintPipeline StableDiffusionXLPAGPipeline WanVideoToVideoPipeline
ZImageImg2ImgPipeline ZImageInpaintPipeline
""".split()  # noqa: SIM905
"""Pipelines that build from the parts of the toy pipelines and run."""


def passes_of(pipe, **given):
    """For each pass of each denoiser the halves that the host tells, and those that what it is given shows."""
    host: Any = host_for(pipe)
    sites = [next(site for site in host.sites() if site.startswith(f"{name}.")) for name in host.denoisers]
    shown: dict[str, list[Any]] = {name: [] for name in host.denoisers}

    def look(name):
        return lambda m, args, kwargs: shown[name].append([rows for v in (*args, *kwargs.values()) for rows in told(v)])

    handles = [pipe.components[n].register_forward_pre_hook(look(n), with_kwargs=True) for n in host.denoisers]
    try:
        with torch.no_grad(), sl.record(pipe, sites) as tape:
            pipe(**given)
    finally:
        for handle in handles:
            handle.remove()
    for name, site in zip(host.denoisers, sites, strict=True):
        yield from zip([state.branches for state, _ in tape[site]], shown[name], strict=True)


@pytest.mark.parametrize("name", BUILT)
def test_each_half_is_the_one_whose_prompt_the_denoiser_is_given(name):
    pipe, tiny = built(name)
    try:
        passes = list(passes_of(pipe, **asked(pipe, tiny)))
    except Exception:  # it wants a picture
        passes = list(passes_of(pipe, **asked(pipe, tiny, pictures=True)))
    seen = Counter[str]()
    for halves, shown in passes:
        assert halves is not None and shown
        each = len(shown[0]) // len(halves)
        assert [half for half in halves for _ in range(each)] == shown[0]
        seen.update(halves)
    assert seen["cond"] and (seen["uncond"] or evidence(type(pipe)) == "one pass")


def test_every_exported_pipeline_shows_its_halves_or_is_refused():
    found = {name: evidence(cls) for name, cls in exported().items()}
    assert len(found) > 200 and sorted(name for name, how in found.items() if not how) == UNSHOWN


class Turned(d.StableDiffusionPipeline):
    """A user's own loop: the prompt first, under other names."""

    @torch.no_grad()
    def __call__(self, prompt_embeds, negative_prompt_embeds, order=0):  # type: ignore[override]
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(2)
        for t in self.scheduler.timesteps:
            if order == 0:
                both = torch.cat([prompt_embeds, negative_prompt_embeds])
                c, u = self.unet(torch.cat([x, x]), t, encoder_hidden_states=both).sample.chunk(2)
            elif order == 1:
                u, c = (self.unet(x, t, encoder_hidden_states=e).sample for e in (negative_prompt_embeds, prompt_embeds))
            else:
                u, c = self._one(x, t, negative_prompt_embeds), self._one(x, t, prompt_embeds)
            x = self.scheduler.step(u + 3 * (c - u), t, x).prev_sample
        return x

    def _one(self, x, t, prompt_embeds):
        return self.unet(x, t, encoder_hidden_states=prompt_embeds.clone()).sample


class Silent(d.StableDiffusionPipeline):
    """A user's own loop whose names say nothing of the halves."""

    @torch.no_grad()
    def __call__(self, prompt_embeds, negative_prompt_embeds, order=0):  # type: ignore[override]
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(2)
        rows = (negative_prompt_embeds.clone(), prompt_embeds.clone())
        for t in self.scheduler.timesteps:
            if order == 0:
                a, b = self.unet(x.repeat(2, 1, 1, 1), t, encoder_hidden_states=torch.cat(rows)).sample.split(1)
            else:
                a, b = (self.unet(x, t, encoder_hidden_states=prompt_embeds).sample for prompt_embeds in rows)
            x = self.scheduler.step(a + 3 * (b - a), t, x).prev_sample
        return x


def own(cls):
    return cls(**PIPELINES["sd1"].build().components, requires_safety_checker=False)


EMBEDS = {"prompt_embeds": torch.ones(1, 7, 16), "negative_prompt_embeds": -torch.ones(1, 7, 16)}


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_users_own_loop_is_read_as_well(order):
    for halves, shown in passes_of(own(Turned), **EMBEDS, order=order):
        assert halves is not None and list(halves) == shown[0]


@pytest.mark.parametrize("order", [0, 1])
def test_a_loop_that_does_not_show_its_halves_is_refused(order):
    pipe, site = own(Silent), "unet.mid_block.attentions.0"
    bank = sl.ConceptBank.from_directions({"a": torch.ones(16)}, site=site, base=pipe)
    with pytest.raises(errors.Unanswerable, match="GUIDANCE"), sl.steer(pipe, bank, {"a": 1.0}, branch="uncond"):
        pipe(**EMBEDS, order=order)
    with sl.steer(pipe, bank, {"a": 1.0}):
        pipe(**EMBEDS, order=order)


def test_what_disagrees_with_itself_shows_nothing():
    def loop(negative_embeds, prompt_embeds, model):
        text, uncond = model(torch.cat([negative_embeds, prompt_embeds])).chunk(2)
        return text - uncond

    assert guidance.stacked(loop.__code__) == {}


# -- streams, over every module --------------------------------------------------------------------------------


def modules():
    """Every module class of diffusers' models that has a forward of its own, without weights."""
    for found in pkgutil.walk_packages(d.models.__path__, "diffusers.models."):
        if "flax" in found.name:
            continue
        space = importlib.import_module(found.name)
        for cls in vars(space).values():
            if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == found.name and "forward" in vars(cls):
                yield bare(cls)


def bare(cls: type) -> Any:
    module: Any = object.__new__(cls)
    nn.Module.__init__(module)
    return module


def test_streams_are_where_diffusers_own_table_has_them_and_in_every_block_that_it_lacks():
    from diffusers.hooks._helpers import TransformerBlockRegistry

    agreed, apart = 0, []
    for module in modules():
        streams = streams_of(module)
        if streams is not None and None not in streams[:2] and type(module).__name__.endswith(("Block", "Layer")):
            apart.append(type(module).__name__)
        try:
            known = TransformerBlockRegistry.get(type(module))
        except ValueError:
            continue
        if known.return_encoder_hidden_states_index is not None:
            expected = (known.return_hidden_states_index, known.return_encoder_hidden_states_index)
            assert streams is not None and streams[:2] == expected, type(module)
            agreed += 1
    assert agreed >= 15 and len(apart) >= 35
    assert {"OvisImageTransformerBlock", "BriaTransformerBlock", "LongCatImageSingleTransformerBlock"} <= {*apart}


class Own(nn.Module):
    """A block of one's own, with names that say nothing."""

    def forward(self, a, b):
        return b + 1, a + 1


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = d.models.transformers.transformer_flux.FluxTransformerBlock(8, 1, 8)

    def forward(self, hidden_states):
        return self.block(hidden_states=hidden_states, encoder_hidden_states=hidden_states, temb=torch.zeros(1, 8))


def test_subclasses_renamed_and_wrapped_blocks_keep_their_streams():
    block = d.models.transformers.transformer_flux.FluxTransformerBlock
    renamed = type("FSDPFluxTransformerBlock", (block,), {})  # as fully_shard makes them
    assert streams_of(bare(renamed)) == streams_of(bare(block)) == streams_of(Inner()) == Streams(1, 0)


def test_a_bare_module_is_never_read_at_the_first_of_several_tensors():
    x, model = torch.zeros(1, 3, 8), nn.ModuleDict({"own": Own(), "inner": Inner()})
    model.forward = lambda x: (model["own"](x, x), model["inner"](x))  # type: ignore[method-assign]
    with pytest.raises(errors.WrongWidth, match="own:0 or own:1"), sl.steer(model, bank_at(model, "own"), {"a": 1.0}):
        model(x)
    plain = model(x)
    for site, at in (("own:1", (0, 1)), ("inner", (1, 1)), ("inner:image", (1, 1)), ("inner:text", (1, 0))):
        with sl.steer(model, bank_at(model, site), {"a": 1.0}):
            after = model(x)
        moved = [(k, j) for k in (0, 1) for j in (0, 1) if not torch.equal(after[k][j], plain[k][j])]
        assert moved == [at]
    with pytest.raises(errors.UnknownSite, match="gives one stream"):
        host_for(model).site("own:text")


def bank_at(model, site):
    return sl.ConceptBank.from_directions({"a": torch.ones(8)}, site=site, base=model)
