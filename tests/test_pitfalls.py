"""Where a simpler reading of a pipeline goes wrong: loops that write in place, videos as rows, shared parts, odd schedulers."""

import copy
import gc
import weakref
from typing import Any

import diffusers
import pytest
import torch
from test_beside import bank_for, steered
from test_pipelines import PIPELINES, pipe_of, plain, site_of, traces
from tiny_pipelines import WITH_TEXT, run

import steerlib as sl
from steerlib import errors
from steerlib.hooks.diffusers.calls import asking
from steerlib.passes import DenoisingPass, Grid
from steerlib.steering import masks
from steerlib.steering.reading import Note, NoteReader
from steerlib.steering.shares import Gated

d: Any = diffusers
MID = "unet.mid_block.attentions.0"


class Loop(d.DiffusionPipeline):
    """A pipeline of one's own: `copies` halves at once, or one after the other, latents changed in place."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, copies=0, backwards=False):
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(3)
        for _i, t in enumerate(self.scheduler.timesteps):
            texts = torch.ones(max(1, copies), 3, 16)
            if copies:
                e = self.unet(latents.repeat(copies, 1, 1, 1), t, encoder_hidden_states=texts).sample[-1:]
            else:
                cond, negative = texts, texts * 0
                order = ((cond, negative), (negative, cond))[backwards]
                e, e2 = (self.unet(latents, t, encoder_hidden_states=text).sample for text in order)
                e = e + 3 * (e2 - e)
            latents[:] = self.scheduler.step(e, t, latents).prev_sample
        return latents


@pytest.fixture(scope="module")
def loop():
    parts = PIPELINES["sd1"].build()
    return Loop(parts.unet, parts.scheduler)


def test_halves_called_apart_are_told_apart_where_latents_change_in_place(loop):
    for backwards in (False, True):
        with sl.record(loop, [MID]) as tape:
            loop(backwards=backwards)
        assert [state.branches for state, _ in tape[MID]] == [("cond",), ("uncond",)][:: -1 if backwards else 1] * 3


def test_an_unknown_layout_of_guidance_is_refused_rather_than_guessed(loop):
    bank = bank_for(loop, MID, 16)
    with pytest.raises(errors.Unanswerable, match="which half of guidance"), sl.steer(loop, bank, {"a": 1.0}, branch="cond"):
        loop(copies=3)
    with sl.steer(loop, bank, {"a": 1.0}):
        loop(copies=3)


def test_a_loop_around_a_bare_denoiser_knows_the_noise_but_not_the_half():
    pipe = PIPELINES["flux"].build()
    block = "transformer.transformer_blocks.0:image"
    bank = bank_for(pipe, block, 16)
    with sl.record(pipe, [block]) as tape:
        run(pipe, guidance=False)
    kept = []
    handle = pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: kept.append(kwargs), with_kwargs=True)
    run(pipe, guidance=False)
    handle.remove()
    with torch.no_grad(), sl.record(pipe, [block]) as bare:
        for given in kept:
            pipe.transformer(**given)
    assert [s.progress for s, _ in bare[block]] == pytest.approx([s.progress for s, _ in tape[block]], abs=1e-6)
    assert [s.step for s, _ in bare[block]] == [0, 1, 2] and bare[block][0][0].branches is None
    unknown = pytest.raises(errors.Unanswerable, match="the source of the pipeline")
    with unknown, torch.no_grad(), sl.steer(pipe, bank, {"a": 1.0}, branch="uncond"):
        pipe.transformer(**kept[0])


# -- videos ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "latent, count, expected",
    [((16, 40, 64), 16 * 20 * 32, (16, 20, 32)), ((4, 8, 16), 4 * 4 * 8, (4, 4, 8)), ((1, 9, 15), 5 * 8, (1, 5, 8)),
     ((9, 32, 32), 5 * 16 * 16, (5, 16, 16)), ((1, 16, 32), 7, None)],
)  # fmt: skip
def test_tokens_lie_as_the_least_patch_over_time_has_them(latent, count, expected):
    found = Grid(*latent).of(count)
    assert found == (None if expected is None else Grid(*expected))


def test_a_video_looked_at_frame_by_frame_is_masked_frame_by_frame_and_tokens_over_time_are_refused():
    state = DenoisingPass(0.5, images=2, prompts=2, branches=("uncond", "cond"), grid=Grid(16, 16, 16))
    left = masks.Box(0.0, 0.0, 0.5, 1.0).share(state, torch.zeros(4 * 16, 256, 8), "a")
    assert left.shape == (64, 256) and left[0].view(16, 16).tolist() == [[1.0] * 8 + [0.0] * 8] * 16
    with pytest.raises(errors.Unanswerable, match="cannot be laid over"):
        masks.Box(0.0, 0.0, 0.5, 1.0).share(state, torch.zeros(512, 16, 8), "a")


def test_the_mask_of_a_video_lies_right_where_frames_divide_by_four():
    pipe, block = pipe_of("wan"), "transformer.blocks.1"
    bank = bank_for(pipe, block, 16)
    given = PIPELINES["wan"].call(pipe, steps=1, height=32, width=64) | {"num_frames": 13}
    with sl.record(pipe, [block]) as before:
        pipe(**given | {"generator": torch.Generator().manual_seed(0)})
    with sl.steer(pipe, bank, {"a": sl.Add(1.0, mask=(0.0, 0.0, 0.5, 1.0))}), sl.record(pipe, [block]) as after:
        pipe(**given | {"generator": torch.Generator().manual_seed(0)})
    (state, x), (_, y) = before[block][0], after[block][0]
    grid = state.grid
    assert grid is not None and grid.frames == 4
    moved = (x != y).any(-1)[0].view(4, -1, grid.width // 2)
    half = grid.width // 4
    assert moved[..., :half].all() and not moved[..., half:].any()


def test_a_mask_of_frames_is_packed_as_the_autoencoder_packs_them():
    state = DenoisingPass(0.5, images=1, branches=("cond",), grid=Grid(6, 2, 2), film=21)
    frames = ((torch.arange(21) >= 9) & (torch.arange(21) < 20)).float()
    x = torch.zeros(1, 6 * 4, 8)
    expected = [0.0, 0.0, 0.0, 1.0, 1.0, 0.75]
    for given in (frames, frames[:, None, None].expand(21, 4, 4), frames[None, :, None, None], torch.tensor(expected)):
        assert masks.Weights(given).share(state, x, "a").view(6, 4)[:, 0].tolist() == expected
    halved = masks.Weights(frames).share(state, torch.zeros(1, 3 * 4, 8), "a")  # a patch takes two latent frames together
    assert halved.view(3, 4)[:, 0].tolist() == [0.0, 0.5, 0.875]
    with pytest.raises(errors.BadEdit, match="1, 6 .of the latent. or 21 frames, got 20"):
        masks.Weights(torch.ones(20, 2, 2)).share(state, x, "a")
    picture = DenoisingPass(0.5, images=1, branches=("cond",), grid=Grid(1, 4, 4))
    with pytest.raises(errors.BadEdit, match=r"\[height, width\].*got \[33\]"):
        masks.Weights(torch.ones(33)).share(picture, torch.zeros(1, 16, 8), "a")


def test_a_pipeline_tells_how_many_frames_its_latent_holds():
    pipe, block = pipe_of("wan"), "transformer.blocks.1"
    bank, given = bank_for(pipe, block, 16), PIPELINES["wan"].call(pipe_of("wan"), steps=1)
    mask = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    with sl.record(pipe, [block]) as before:
        pipe(**given | {"generator": torch.Generator().manual_seed(0)})
    with sl.steer(pipe, bank, {"a": sl.Add(1.0, mask=mask)}), sl.record(pipe, [block]) as after:
        pipe(**given | {"generator": torch.Generator().manual_seed(0)})
    (state, x), (_, y) = before[block][0], after[block][0]
    assert state.grid is not None and state.grid.frames == 3 and state.film == 9
    moved = (y - x)[0].norm(dim=-1).view(state.grid.frames, -1).mean(1)
    torch.testing.assert_close(moved / moved.max(), torch.tensor([0.0, 1.0, 2 / 3]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("edit", [sl.Add([0.0, 3.0]), sl.Add(1.0)])
def test_slices_of_an_autoencoder_take_their_images_amounts(edit):
    pipe, site = WITH_TEXT["sd_with_text"].build(), "vae.decoder.mid_block"
    bank = bank_for(pipe, site, 8)
    given = PIPELINES["sd1"].call(pipe, batch=2, steps=1) | {
        "output_type": "pt",
        "prompt_embeds": None,
        "prompt": ["cup", "sun"],
    }
    given |= {"negative_prompt_embeds": None, "negative_prompt": ["fog"] * 2}

    def made():
        with sl.steer(pipe, bank, {"a": edit}):
            return pipe(**given | {"generator": [torch.Generator().manual_seed(k) for k in (0, 1)]}).images

    whole = made()
    pipe.vae.enable_slicing()
    torch.testing.assert_close(made(), whole, rtol=1e-4, atol=1e-4)


def test_a_concept_read_on_other_tokens_cannot_gate_or_foretell():
    state = DenoisingPass(0.5, images=1, branches=("cond",), grid=Grid(1, 16, 16))
    noted = DenoisingPass(0.5)
    noted.notes["key"] = torch.zeros(1, 64)
    with pytest.raises(errors.Unanswerable, match="'b' is read on 64 tokens and its edit acts on 16"):
        NoteReader("key", "b")(torch.zeros(1, 16, 8), noted)
    gate = Gated(sl.Gate("a", above=0.0), Note("key", None), "unet.down_blocks.0.attentions.0", "a")
    state.notes["key"] = torch.zeros(1, 256)
    with pytest.raises(errors.Unanswerable, match="the gate on 'a' is read on 256 tokens"):
        gate.weight(torch.zeros(1, 64, 16), state)


# -- prompts ---------------------------------------------------------------------------------------------------


class Asks:
    """Encodes as pipelines do that rewrite a prompt before they read it."""

    def __call__(self, prompt, negative_prompt=None, prompt_2=None):
        self.found = []
        self.encode_prompt(prompt_2 or prompt)
        self.encode_prompt(negative_prompt)
        return self.found

    def encode_prompt(self, prompt):
        self._read([f"describe: {text.lower().strip()}" for text in ([prompt] if isinstance(prompt, str) else prompt)])

    def _read(self, prompt):
        self.found.append(asking(self))


@pytest.mark.parametrize("wanted, unwanted", [("a hill", "Fog"), (["a", "b"], ["Fog ", "blur,  haze"])])
def test_a_negative_prompt_is_known_after_it_was_rewritten(wanted, unwanted):
    assert Asks()(wanted, unwanted) == [("cond",), ("uncond",)]
    assert Asks()("a hill", "Fog", prompt_2="Fog")[0] == ("cond",)  # the same text as both: wanted


def test_a_word_can_only_be_asked_of_attention_to_the_text_and_within_what_is_read():
    pipe = WITH_TEXT["sd_with_text"].build()
    bank, block = bank_for(pipe, MID, 16), "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    given: Any = {"num_inference_steps": 1, "height": 16, "width": 32, "output_type": "latent"}
    itself, cut = (sl.Add(1.0, mask=sl.Word("red", at=f"{block}.{name}")) for name in ("attn1", "attn2"))
    with pytest.raises(errors.Unanswerable, match="does not look at text"), sl.steer(pipe, bank, {"a": itself}):
        pipe("red cup", **given)
    with pytest.raises(errors.BadEdit, match="among the 16 tokens"), sl.steer(pipe, bank, {"a": cut}):
        pipe("cup " * 16 + "red", **given)


def test_masks_on_tokens_of_the_prompt_are_refused_even_where_their_number_fits():
    pipe = pipe_of("sd3")
    bank = bank_for(pipe, "transformer.transformer_blocks.0:text", 16)
    with pytest.raises(errors.Unanswerable, match="are the prompt's"):
        sl.steer(pipe, bank, {"a": sl.Add(1.0, mask=(0.0, 0.0, 0.5, 1.0))})


def test_rows_with_texts_of_other_lengths_in_front_of_the_image_are_refused():
    pipe, block = pipe_of("lumina2"), "transformer.layers.0"
    bank, box = bank_for(pipe, block, 16), (0.0, 0.0, 0.5, 1.0)
    with sl.record(pipe, [block]) as before:
        run(pipe, steps=1)
    with sl.steer(pipe, bank, {"a": sl.Add(1.0, mask=box)}), sl.record(pipe, [block]) as after:
        run(pipe, steps=1)
    state: Any = before[block][0][0]
    moved = (before[block][0][1] != after[block][0][1]).any(-1)[0]
    grid = state.grid.of(len(moved) - state.texts)
    assert state.texts == 7 and not moved[:7].any()
    assert (
        moved[7:].view(grid.height, grid.width).int().tolist()
        == [[1] * (grid.width // 2) + [0] * (grid.width // 2)] * grid.height
    )
    with pytest.raises(errors.Unanswerable, match="cannot be laid over"):
        steered(pipe, bank, {"a": sl.Add(1.0, mask=box)}, batch=2, steps=1)


# -- time ------------------------------------------------------------------------------------------------------


def test_schedulers_that_do_not_count_in_training_steps_are_followed_by_their_own():
    pipe = PIPELINES["sd1"].build()
    pipe.scheduler = d.IPNDMScheduler()
    bank = bank_for(pipe, site_of("sd1"), 16)
    with sl.steer(pipe, bank, {"a": sl.Add(1.0, when=sl.Window(0.0, 0.5))}) as session, sl.record(pipe, [MID]) as tape:
        run(pipe, steps=4)
    assert [state.progress for state, _ in tape[MID]] == [0.0, 0.25, 0.5, 0.75] and session.report().lines[0].acted == 2


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_a_run_is_replayed_onto_itself_where_a_noise_level_is_asked_about_twice(name):
    pipe = PIPELINES["sd1"].build()
    pipe.scheduler = getattr(d, name)()
    bank = bank_for(pipe, MID, 16)
    with sl.record(pipe, bank, ["a"]) as tape:
        made = run(pipe, steps=4)
    assert 1 in {state.visit for state, _ in tape["a"]}
    torch.testing.assert_close(steered(pipe, bank, {"a": sl.Patch(tape)}, steps=4), made, rtol=1e-3, atol=1e-3)


def test_a_tape_of_both_halves_is_not_laid_over_a_pass_of_an_unknown_one():
    pipe = pipe_of("sd1")
    bank = bank_for(pipe, MID, 16)
    with sl.record(pipe, bank, ["a"]) as tape:
        run(pipe)
    with pytest.raises(errors.Unanswerable, match="both halves"), sl.steer(pipe, bank, {"a": sl.Patch(tape)}), torch.no_grad():
        pipe.unet(torch.randn(1, 4, 16, 32), 500, encoder_hidden_states=torch.randn(1, 7, 16))


# -- what is shared, and what is left --------------------------------------------------------------------------


def test_pipelines_that_share_a_denoiser_are_steered_together_each_by_its_own_session():
    pipe = WITH_TEXT["sd_with_text"].build()
    other = d.StableDiffusionPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    bank, before = bank_for(pipe, MID, 16), traces(pipe)
    given: Any = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    with sl.steer(pipe, bank, {"a": 1.0}, branch="cond") as session, sl.record(other, [MID]) as tape:
        other("red cup", **given)
    assert len(tape[MID]) == 2 and session.report().lines[0].acted == 2  # the same module, asked by the other's call
    assert traces(pipe) == before


def test_a_pipeline_is_freed_after_it_was_steered_and_a_tape_keeps_none():
    pipe = PIPELINES["sd1"].build()
    gone = weakref.ref(pipe.unet)
    with sl.steer(pipe, bank_for(pipe, MID, 16), {"a": 1.0}), sl.record(pipe, [MID]) as tape:
        run(pipe)
    assert len(tape[MID]) == 3
    del pipe
    for _ in range(2):  # first the pipeline, then what was kept for it
        gc.collect()
    assert gone() is None


def test_a_session_outlives_a_run_in_inference_mode():
    pipe = PIPELINES["sd1"].build()
    bank = bank_for(pipe, MID, 16)
    expected = steered(pipe, bank, {"a": 1.0})
    with torch.inference_mode():
        steering = sl.attach(pipe, bank)
        steering.set({"a": 1.0})
        assert torch.equal(run(pipe), expected)
    assert torch.equal(run(pipe), expected)
    steering.set({"a": 2.0})
    assert not torch.equal(run(pipe), expected)
    steering.detach()
    assert torch.equal(run(pipe), plain("sd1"))


def test_a_copy_of_a_steered_model_is_not_steered():
    pipe = PIPELINES["sd1"].build()
    with sl.steer(pipe, bank_for(pipe, MID, 16), {"a": 1.0}):
        copied = copy.deepcopy(pipe.unet)
    pipe.unet = copied
    assert torch.equal(run(pipe), plain("sd1"))


def test_amounts_of_prompts_reach_the_autoencoder():
    pipe = WITH_TEXT["sd_with_text"].build()
    bank = bank_for(pipe, "vae.decoder.in", 4)
    given: Any = {"num_images_per_prompt": 2, "num_inference_steps": 1, "height": 16, "width": 16, "output_type": "pt"}

    def make(edits):
        seeds = [torch.Generator().manual_seed(k) for k in range(4)]
        with sl.steer(pipe, bank, edits):
            return pipe(["red cup", "old boat"], generator=seeds, **given).images

    nothing, second = make({}), make({"a": [0.0, 3.0]})
    assert [torch.equal(a, b) for a, b in zip(nothing, second, strict=True)] == [True, True, False, False]


def test_names_that_mean_nothing_are_refused():
    pipe = pipe_of("sd1")
    for name, why in ((f"{MID}:text", "one stream"), (f"{MID}.transformer_blocks.0.attn1.heads.9", "2 heads|8 heads|heads")):
        with pytest.raises(errors.UnknownSite, match=why):
            bank_for(pipe, name, 16)
    assert not any(name.startswith("unet.down_blocks.0.update") for name in sl.hosts.host_for(pipe).sites())
    with pytest.raises(errors.WrongWidth, match="steer its output"):
        steered(pipe, bank_for(pipe, "unet.down_blocks.0.update", 8), {"a": 1.0})


def test_a_pipeline_without_a_denoiser_or_a_scheduler_says_what_to_do():
    class Decoder(d.DiffusionPipeline):
        def __init__(self, vae):
            super().__init__()
            self.register_modules(vae=vae)

    with pytest.raises(errors.UnsupportedTarget, match="steer the pipelines it is made of"):
        sl.record(Decoder(PIPELINES["sd1"].build().vae), [MID]).__enter__()
