"""Text encoders and autoencoders of pipelines, replays of recorded runs, and guiders."""

from importlib import import_module
from typing import Any

import pytest
import torch
from test_beside import bank_for, steered
from test_pipelines import PIPELINES, pipe_of, seen, site_of, traces
from tiny_pipelines import WITH_TEXT, autoencoder, quantizer, run

import steerlib as sl
from steerlib import errors
from steerlib.bank import SiteFacts
from steerlib.passes import TracedPass
from steerlib.steering import masks


def words(pipe, edits: Any = None, bank=None, **options) -> Any:
    """An image of a prompt in words; with `edits`, steered."""
    given = {"prompt": "red cup", "negative_prompt": "old table", "num_inference_steps": 2, "height": 16, "width": 32}
    given |= {"output_type": "latent", "generator": torch.Generator().manual_seed(0)} | options
    if bank is None:
        return pipe(**given).images
    with sl.steer(pipe, bank, edits):
        return pipe(**given).images


# -- text encoders ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    pipe = WITH_TEXT["sd_with_text"].build()
    return pipe, bank_for(pipe, "text_encoder.layers.1", 16)


@pytest.mark.parametrize("branch, wanted", [("cond", [True, False]), ("uncond", [False, True]), ("both", [True, True])])
def test_a_prompt_and_its_negative_are_told_apart_in_the_text_encoder(texts, branch, wanted):
    pipe, bank = texts
    site = "text_encoder.layers.1"
    with sl.record(pipe, [site]) as before:
        plain = words(pipe)
    with sl.steer(pipe, bank, {"a": 2.0}, branch=branch), sl.record(pipe, [site]) as after:
        made = words(pipe)
    moved = [not torch.equal(x, y) for (_, x), (_, y) in zip(before[site], after[site], strict=True)]
    assert moved == wanted and [state.branches for state, _ in before[site]] == [("cond",), ("uncond",)]
    assert not torch.equal(made, plain)
    expected = before[site][0][1] + 2.0 * bank.rows(bank["a"]).write[0]
    if branch == "cond":
        torch.testing.assert_close(after[site][0][1], expected)


def test_a_concept_of_the_prompt_is_redirected_before_the_denoiser_sees_it(texts):
    """The image is the one that embeddings moved by hand give."""
    pipe, bank = texts
    with torch.no_grad():
        ids = pipe.tokenizer("red cup", padding="max_length", max_length=16, return_tensors="pt").input_ids
        bare = pipe.text_encoder.encoder.layers[1].register_forward_hook(
            lambda m, args, out: out + 3.0 * bank.rows(bank["a"]).write[0]
        )
        embeds = pipe.text_encoder(ids)[0]
        bare.remove()
    by_hand = words(pipe, prompt=None, prompt_embeds=embeds)
    with sl.steer(pipe, bank, {"a": 3.0}, branch="cond"):
        assert torch.equal(words(pipe), by_hand)


def test_paths_from_before_transformers_5_lead_to_the_same_place(texts):
    pipe, _ = texts
    with sl.record(pipe, ["text_encoder.text_model.encoder.layers.1", "text_encoder.layers.1"]) as tape:
        words(pipe)
    old, new = tape.values()
    assert torch.equal(old[0][1], new[0][1])


# -- autoencoders ----------------------------------------------------------------------------------------------


def test_a_latent_is_perturbed_in_a_part_of_the_picture_before_it_is_decoded(texts):
    pipe, _ = texts
    bank, latents = bank_for(pipe, "vae.decoder.in", 4), words(pipe)
    moved = latents.clone()
    moved[..., : latents.shape[-1] // 2] += (2.0 * bank.rows(bank["a"]).write[0])[
        :, None, None
    ] * pipe.vae.config.scaling_factor
    with sl.steer(pipe, bank, {"a": sl.Add(2.0, mask=(0.0, 0.0, 0.5, 1.0))}):
        found = words(pipe, output_type="pt")
    # the shift is added behind post_quant_conv, so decode by hand from there
    with torch.no_grad():
        z = pipe.vae.post_quant_conv(latents / pipe.vae.config.scaling_factor)
        z[..., : z.shape[-1] // 2] += (2.0 * bank.rows(bank["a"]).write[0])[:, None, None]
        expected = (pipe.vae.decoder(z) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_encoders_input_is_manipulated_pixel_by_pixel():
    vae, x = autoencoder().eval(), torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    bank = sl.ConceptBank.from_directions({"red": torch.tensor([1.0, 0.0, 0.0])}, site="encoder.in", base=vae)
    shown = x.clone()
    shown[:, 0] += 0.5
    with torch.no_grad(), sl.steer(vae, bank, {"red": 0.5}):
        steered_latent = vae.encode(x).latent_dist.mean
    with torch.no_grad():
        torch.testing.assert_close(steered_latent, vae.encode(shown).latent_dist.mean)


def test_activations_of_one_decoding_are_patched_into_another(texts):
    """All of a block's activations, and no more: what comes after it is as in the other run."""
    pipe, site = texts[0], "vae.decoder.mid_block"
    bank = bank_for(pipe, site, 8)
    with sl.record(pipe, [site, "vae.decoder"]) as tape:
        other = words(pipe, output_type="pt", prompt="old boat")
    plain = words(pipe, output_type="pt")
    whole = words(pipe, {"a": sl.Patch(tape)}, bank, output_type="pt")
    torch.testing.assert_close(whole, other)
    left = words(pipe, {"a": sl.Patch(tape, mask=(0.0, 0.0, 0.5, 1.0))}, bank, output_type="pt")
    assert not torch.allclose(left, plain, atol=1e-4) and not torch.allclose(left, other, atol=1e-4)


def test_discrete_codes_are_swapped_before_they_are_decoded(texts):
    pipe = WITH_TEXT["sd_with_text"].build()
    torch.manual_seed(0)
    pipe.vae = quantizer().eval()
    pipe.vae.register_to_config(scaling_factor=1.0)
    bank = bank_for(pipe, "vae.quantize", 4)
    latents = [torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    with torch.no_grad():
        codes = [pipe.vae.quantize(z)[0] for z in latents]
        with sl.record(pipe, ["vae.quantize"]) as tape:
            pipe.vae.decode(latents[1])
        with sl.steer(pipe, bank, {"a": sl.Patch(tape, mask=(0.5, 0.0, 1.0, 1.0))}):
            swapped = pipe.vae.decode(latents[0]).sample
        by_hand = torch.cat((codes[0][..., :8], codes[1][..., 8:]), dim=-1)
        expected = pipe.vae.decode(by_hand, force_not_quantize=True).sample
    torch.testing.assert_close(swapped, expected, atol=1e-5, rtol=1e-4)


def test_masks_over_tiles_are_refused():
    pipe = WITH_TEXT["sd_with_text"].build()
    bank = bank_for(pipe, "vae.decoder.in", 4)
    pipe.vae.enable_tiling()
    with pytest.raises(errors.Unanswerable, match="cannot be laid over"):
        words(pipe, {"a": sl.Add(1.0, mask=(0.0, 0.0, 0.5, 1.0))}, bank, output_type="pt")


# -- replays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", [sl.Window(0.0, 0.5), sl.Ramp(sl.Window(0.0, 1.0), 0.0, 1.0)])
def test_a_text_encoder_has_no_progress_for_a_window_to_open_on(texts, when):
    pipe, bank = texts
    with pytest.raises(errors.Unanswerable, match="reads the prompt before there is any progress"):
        sl.steer(pipe, bank, {"a": sl.Add(1.0, when=when)})


@pytest.mark.parametrize("family", ["sd1", "flux", "wan"])
def test_a_recorded_run_is_replayed_at_each_noise_level_and_half_of_guidance(family):
    """Patching a concept's own readings changes nothing; another run's are read afterwards."""
    pipe, site = pipe_of(family), site_of(family)
    bank = bank_for(pipe, site, 16)
    with sl.record(pipe, bank, ["a"]) as own:
        made = run(pipe)
    torch.testing.assert_close(steered(pipe, bank, {"a": sl.Patch(own)}), made, rtol=1e-3, atol=1e-3)
    with sl.steer(pipe, bank, {"b": 2.0}), sl.record(pipe, bank, ["a"]) as other:
        run(pipe)
    with sl.steer(pipe, bank, {"a": sl.Patch(other)}), sl.record(pipe, bank, ["a"]) as after:
        run(pipe)
    for (state, wanted), (same, found) in zip(other["a"], after["a"], strict=True):
        assert state.branches == same.branches
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_tokens_where_a_concept_fires_are_replaced_by_those_of_another_run():
    """Detect and replace: everywhere else nothing changes, and what takes a token's place is what the other run had there."""
    pipe, site = pipe_of("sd1"), site_of("sd1")
    bank, (first, *_) = bank_for(pipe, site, 16), seen("sd1")[0]
    with sl.steer(pipe, bank, {"b": 3.0}), sl.record(pipe, [site]) as other:
        run(pipe)
    with sl.record(pipe, bank, ["a"]) as tape:
        run(pipe)
    z = tape["a"][0][1]
    gate = sl.Gate("a", above=float(z.median()))
    with sl.steer(pipe, bank, {"a": sl.Patch(other, gate=gate)}) as session, sl.record(pipe, [site]) as after:
        run(pipe)
    fires = z > z.median()
    found = after[site][0][1]
    assert torch.equal(found[~fires], first[1][~fires]) and fires.any()
    torch.testing.assert_close(found[fires], other[site][0][1][fires])
    assert 0 < session.report().lines[0].tokens < 3 * found.shape[1]


def test_a_tape_that_cannot_be_replayed_says_why():
    pipe, site = pipe_of("sd1"), site_of("sd1")
    bank = bank_for(pipe, site, 16)
    with sl.record(pipe, bank, ["a"]) as tape:
        run(pipe, guidance=False)
    with pytest.raises(errors.BadEdit, match="same guidance"):
        steered(pipe, bank, {"a": sl.Patch(tape)})
    with pytest.raises(errors.BadEdit, match="same size"):
        steered(pipe, bank, {"a": sl.Patch(tape)}, guidance=False, height=16, width=16)
    with pytest.raises(errors.BadEdit, match="does not hold 'b'"):
        sl.steer(pipe, bank, {"b": sl.Patch(tape)})
    traced = traces(pipe)
    assert traced == traces(pipe_of("sd1"))


# -- lengths ---------------------------------------------------------------------------------------------------


def test_turning_a_token_keeps_its_length_where_it_acts():
    pipe, site = pipe_of("sd1"), site_of("sd1")
    bank = bank_for(pipe, site, 16)
    with sl.record(pipe, [site]) as before:
        run(pipe, steps=1)
    with (
        sl.steer(pipe, bank, {"a": sl.Add(1.5, branch="uncond", keep_norm=True)}),
        sl.record(pipe, [site]) as after,
    ):
        run(pipe, steps=1)
    (_, x), (_, y) = before[site][0], after[site][0]
    d = bank.rows(bank["a"]).write[0]
    turned = x[0] + 1.5 * d
    torch.testing.assert_close(y[0], turned * x[0].norm(dim=-1, keepdim=True) / turned.norm(dim=-1, keepdim=True))
    assert torch.equal(y[1], x[1])


def test_an_addition_grows_with_each_tokens_own_length_at_every_step():
    pipe, site = pipe_of("sd1"), site_of("sd1")
    plain = bank_for(pipe, site, 16)
    bank = sl.ConceptBank(
        "normed", [*plain.concepts.values()], {site: plain.encoder(site)}, base=plain.base,
        sites={site: SiteFacts(width=16, norm=2.0)},
    )  # fmt: skip
    with sl.record(pipe, [site]) as before:
        run(pipe, steps=1)
    with (
        sl.steer(pipe, bank, {"a": sl.Add(0.1, match_norm=True)}, allow_ood=True),
        sl.record(pipe, [site]) as after,
    ):
        run(pipe, steps=1)
    (_, x), (_, y) = before[site][0], after[site][0]
    torch.testing.assert_close(
        y - x, 0.1 * x.norm(dim=-1, keepdim=True) / 2.0 * bank.rows(bank["a"]).write[0], atol=1e-5, rtol=1e-3
    )


# -- masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sana", "flux", "wan"])
def test_a_mask_of_any_size_is_laid_over_the_tokens_of_each_row(family):
    (state, x), *_ = seen(family, batch=2)[0]
    given = torch.zeros(2, 4, 8)
    given[0, :2], given[1, :, 6:] = 1.0, 0.5  # the upper half of one, a quarter of the other by half
    if family == "wan":
        given = given[:, None].expand(-1, 3, -1, -1)
    (_, y), *_ = seen(family, {"a": sl.Add(1.0, mask=given)}, batch=2)[0]
    grid = state.grid.of(x.shape[1])
    share = torch.nn.functional.interpolate(
        given if family == "wan" else given[:, None], size=(grid.height, grid.width), mode="area"
    )
    moved = (y - x).norm(dim=-1) / sl.ConceptBank.rows(_bank(family), _bank(family)["a"]).write.norm()
    for half, rows in enumerate(moved.chunk(len(state.branches) or 1)):
        expected = share.flatten(1) if family == "wan" else share[:, 0].flatten(1)
        torch.testing.assert_close(rows, expected, atol=2e-3, rtol=1e-3)
        assert half < 2


def _bank(family):
    from test_pipelines import bank_of

    return bank_of(family)


def test_a_mask_is_where_the_image_attends_to_a_word(texts):
    """Attention weights computed anew from the queries and keys of a pass; the negative prompt's half is left alone."""
    pipe, at, site = texts[0], "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2", "unet.mid_block.attentions.0"
    bank, word = bank_for(pipe, site, 16), sl.Word("cup", at=at, above=0.9999)
    with sl.record(pipe, [f"{at}.to_q", f"{at}.to_k", site]) as tape:
        words(pipe)
    with sl.steer(pipe, bank, {"a": sl.Add(1.0, mask=word)}), sl.record(pipe, [site]) as after:
        words(pipe)
    q, k, x = (tape[name][0][1][1] for name in (f"{at}.to_q", f"{at}.to_k", site))  # the second row reads the prompt
    ids = pipe.tokenizer("red cup").input_ids
    (column,) = [i for i, token in enumerate(ids) if token == pipe.tokenizer("cup", add_special_tokens=False).input_ids[-1]]
    heads = [torch.softmax(a @ b.T / a.shape[-1] ** 0.5, dim=-1) for a, b in zip(q.split(2, -1), k.split(2, -1), strict=True)]
    attention = torch.stack(heads).mean(0)[:, column]
    share = (attention >= 0.9999 * attention.max()).float().view(1, 1, 8, 16)
    share = torch.nn.functional.interpolate(share, size=(4, 8), mode="area").flatten()
    moved = (after[site][0][1] - tape[site][0][1]) / bank.rows(bank["a"]).write[0]
    assert torch.equal(after[site][0][1][0], tape[site][0][1][0]) and 0 < share.sum() < len(share)
    torch.testing.assert_close(moved[1].mean(-1), share, atol=1e-3, rtol=1e-3)
    with pytest.raises(errors.BadEdit, match="expected .boat. among the 4 tokens"):
        words(pipe, {"a": sl.Add(1.0, mask=sl.Word("boat", at=at))}, bank)
    with pytest.raises(errors.Unanswerable, match="not before"):
        sl.steer(pipe, bank, {"a": sl.Add(1.0, mask=sl.Word("cup", at=at.replace("down_blocks.0", "up_blocks.1")))})
    assert x.shape[-1] == 16


def test_masks_that_cannot_be_laid_over_the_image_are_refused():
    pipe = pipe_of("flux")
    for wrong in ((0.5, 0.0, 0.5, 1.0), (0.0, 0.0, 2.0, 1.0), (0.0, 1.0), "left", 3.0):
        with pytest.raises(errors.BadEdit, match="box"):
            masks.mask_of(wrong)
    text = bank_for(pipe, "transformer.transformer_blocks.0:text", 16)
    with pytest.raises(errors.Unanswerable, match="mask at a site of image tokens"):
        steered(pipe, text, {"a": sl.Add(1.0, mask=(0.0, 0.0, 0.5, 1.0))})


@pytest.mark.parametrize("family", ["flux2", "chroma"])
def test_blocks_that_keep_text_in_front_of_the_image_are_masked_behind_it(family):
    site = "transformer.single_transformer_blocks.0"
    pipe = pipe_of(family)
    bank = bank_for(pipe, site, 16)
    with sl.record(pipe, [site]) as before:
        run(pipe, steps=1)
    with sl.steer(pipe, bank, {"a": sl.Add(1.0, mask=(0.0, 0.0, 0.5, 1.0))}), sl.record(pipe, [site]) as after:
        run(pipe, steps=1)
    (state, x), (_, y) = before[site][0], after[site][0]
    moved = (x != y).any(-1)[0]
    assert not moved[: state.texts].any() and state.texts == 7
    assert moved[state.texts :].reshape(8, 16).int().tolist() == [[1] * 8 + [0] * 8] * 8


# -- guiders ---------------------------------------------------------------------------------------------------


def test_streams_are_named_and_heads_are_cut_out():
    pipe = pipe_of("flux")
    block = "transformer.transformer_blocks.1"
    names = [f"{block}:image", f"{block}:text", f"{block}.attn:text", f"{block}.attn.heads.1"]
    with sl.record(pipe, [*names, f"{block}.attn.heads"]) as tape:
        run(pipe, steps=1)
    shapes = {name: tuple(tape[name][0][1].shape) for name in tape}
    assert shapes[names[0]] == (1, 128, 16) and shapes[names[1]] == (1, 7, 16) and shapes[names[2]] == (1, 7, 16)
    assert torch.equal(tape[names[3]][0][1], tape[f"{block}.attn.heads"][0][1][..., 8:])
    bank = bank_for(pipe, names[1], 16)
    with sl.steer(pipe, bank, {"a": 1.0}), sl.record(pipe, names[:2]) as after:
        run(pipe, steps=1)
    assert torch.equal(after[names[0]][0][1], tape[names[0]][0][1])
    torch.testing.assert_close(after[names[1]][0][1], tape[names[1]][0][1] + bank.rows(bank["a"]).write[0])


def test_an_update_is_what_a_block_adds_to_its_stream():
    for family, block in (("sd1", "unet.mid_block.attentions.0"), ("flux", "transformer.transformer_blocks.1:image"),
                          ("wan", "transformer.blocks.1"), ("flux", "transformer.transformer_blocks.1:text")):  # fmt: skip
        pipe = pipe_of(family)
        with sl.record(pipe, [f"{block}.in", f"{block}.update", block]) as tape:
            run(pipe, steps=1)
        given, added, whole = (tape[name][0][1] for name in (f"{block}.in", f"{block}.update", block))
        torch.testing.assert_close(given + added, whole)
        bank = bank_for(pipe, f"{block}.update", 16)
        with sl.steer(pipe, bank, {"a": 1.0}), sl.record(pipe, [block]) as after:
            run(pipe, steps=1)
        torch.testing.assert_close(
            after[block][0][1] - whole, bank.rows(bank["a"]).write[0].expand_as(whole), atol=1e-4, rtol=1e-3
        )


def test_a_wrong_name_is_answered_with_the_nearest():
    pipe = pipe_of("flux")
    with pytest.raises(errors.UnknownSite, match=r"transformer\.transformer_blocks\.1:image"):
        sl.ConceptBank.from_directions({"a": torch.randn(16)}, site="transformer.transformer_block.1:image", base=pipe)
    with pytest.raises(errors.UnknownSite, match="has no heads"):
        sl.record(PIPELINES["sd1"].build(), ["unet.mid_block.heads.1"]).__enter__()


# -- reports ---------------------------------------------------------------------------------------------------


def test_a_report_says_how_often_and_on_how_many_tokens_an_edit_acted_and_why_it_did_not():
    pipe, site = pipe_of("sd1"), site_of("sd1")
    bank = bank_for(pipe, site, 16)
    box = (0.0, 0.0, 0.5, 1.0)
    with sl.steer(pipe, bank, {"a": sl.Add(1.0, mask=box, when=sl.Steps(1)), "b": sl.Add(1.0, when=sl.Steps(1))}) as session:
        run(pipe)
    line, other = session.report().lines
    assert (line.passes, line.acted, line.seen) == (3, 2, 3 * 128) and line.tokens == 2 * 64 and other.tokens == 2 * 128
    with sl.steer(pipe, bank, {"a": sl.Add(1.0, when=sl.Window(0.9995, 1.0))}) as late:
        run(pipe)
    assert "waits for Window(start=0.9995, stop=1.0), and the run went from progress 0.33 to 1.00" in str(late)
    with sl.steer(pipe, bank, {"a": sl.Add(1.0, branch="uncond")}) as unguided:
        run(pipe, guidance=False)
    assert "is guidance on?" in str(unguided)
    with sl.steer(pipe, bank, {"a": sl.Add(1.0, gate=sl.Gate("b", above=1e9))}) as shut:
        run(pipe)
    assert "gate on 'b' never opened" in str(shut)


# -- guiders ---------------------------------------------------------------------------------------------------


def test_a_modular_pipelines_guider_tells_which_half_it_asks_for():
    parts, modular = PIPELINES["sdxl"].build(), import_module("diffusers.modular_pipelines")
    blocks = modular.StableDiffusionXLAutoBlocks()
    for unused in ("text_encoder", "ip_adapter"):
        blocks.sub_blocks.pop(unused, None)
    pipe: Any = blocks.init_pipeline()
    pipe.update_components(unet=parts.unet, vae=parts.vae, scheduler=parts.scheduler)
    pipe.set_progress_bar_config(disable=True)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    shapes = ((1, 7, 16), (1, 7, 16), (1, 8), (1, 8))
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k, shape in enumerate(shapes)]

    def make():
        given = dict(zip(names, drawn, strict=True)) | {"num_inference_steps": 3, "height": 32, "width": 64}
        return pipe(**given, output_type="latent", generator=torch.Generator().manual_seed(0), output="images")

    site = site_of("sdxl")
    bank, before = bank_for(pipe, site, 16), traces(pipe)
    with sl.record(pipe, [site]) as tape:
        plain = make()
    assert [state.branches for state, _ in tape[site]] == [("cond",), ("uncond",)] * 3
    assert [state.step for state, _ in tape[site]] == [0, 0, 1, 1, 2, 2]
    for half in (0, 1):
        with sl.steer(pipe, bank, {"a": 1.0}, branch=("cond", "uncond")[half]), sl.record(pipe, [site]) as after:
            made = make()
        moved = [not torch.equal(x, y) for (_, x), (_, y) in zip(tape[site], after[site], strict=True)]
        assert moved[half] and not moved[1 - half] and not torch.equal(made, plain)
    with sl.steer(pipe, bank, {"a": sl.Add(1.0, when=sl.Window(0.9, 1.0), mask=(0.0, 0.0, 0.5, 1.0))}):
        make()
    assert traces(pipe) == before and torch.equal(make(), plain)


def test_a_traced_pass_counts_rows_on_its_own_device():
    """So that compiled code on an accelerator mixes no devices; "meta" is one that every machine has."""
    where = torch.device("meta")
    now = TracedPass(torch.zeros(1, 4, dtype=torch.long, device=where), torch.zeros(1, 4, dtype=torch.long, device=where), None)
    assert now.row(torch.tensor(2, device=where), 8).device == where
