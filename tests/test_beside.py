"""Steering beside what diffusers can do with a pipeline: schedulers, caches, offloading, compiling, adapters."""

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.group_offloading import apply_group_offloading
from diffusers.hooks.hooks import HookRegistry, ModelHook
from test_pipelines import PIPELINES, pipe_of, plain, seen, site_of, traces
from tiny_pipelines import WITH_TEXT, run

import steerlib as sl
from steerlib import errors
from steerlib.bank import SiteFacts


def bank_for(pipe, site, width, names="ab"):
    """Random directions at a site."""
    drawn = torch.randn(len(names), width, generator=torch.Generator().manual_seed(1))
    return sl.ConceptBank.from_directions(dict(zip(names, drawn, strict=True)), site=site, base=pipe)


def steered(pipe, bank, edits, **options):
    with sl.steer(pipe, bank, edits):
        return run(pipe, **options)


# -- schedulers ------------------------------------------------------------------------------------------------

FLOW = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
NOISE = ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"]
NOISE += ["UniPCMultistepScheduler", "PNDMScheduler", "LCMScheduler"]


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("name", NOISE + FLOW)
def test_a_window_opens_on_the_noise_level_under_every_scheduler(name, steps):
    """The same span of noise, however many steps fall into it, also where a level is asked about twice (Heun)."""
    pipe = PIPELINES["sd1" if name in NOISE else "sd3"].build()
    if name in NOISE:
        pipe.scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    else:
        pipe.scheduler = getattr(diffusers, name)()
    site, width = site_of("sd1" if name in NOISE else "sd3"), 16
    bank, acted = bank_for(pipe, site, width), []
    with sl.record(pipe, [site]) as tape:
        before = run(pipe, steps=steps, height=16, width=16)
    with sl.steer(pipe, bank, {"a": sl.Add(2.0, when=sl.Window(0.4, 0.7))}), sl.record(pipe, [site]) as steered_tape:
        after = run(pipe, steps=steps, height=16, width=16)
    levels = {round(float(t), 4) for t in pipe.scheduler.timesteps}
    for (state, x), (_, y) in zip(tape[site], steered_tape[site], strict=True):
        assert min(abs(1000 * (1 - state.progress) - t) for t in levels) < 1e-2
        if 0.4 <= state.progress < 0.7:
            acted.append(state.progress)
            assert not torch.equal(x, y)
        elif not acted:
            assert torch.equal(x, y)
    assert acted and not torch.equal(before, after)
    assert {state.step for state, _ in tape[site]} <= set(range(len(levels)))


# -- caches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["cache", "hook"])
def test_first_block_cache_at_threshold_0_changes_nothing_and_stays_when_steering_ends(first):
    pipe = PIPELINES["flux"].build()
    bank = bank_for(pipe, "transformer.transformer_blocks.1:image", 16)
    expected = steered(pipe, bank, {"a": 2.0})
    if first == "cache":
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        found = steered(pipe, bank, {"a": 2.0})
    else:
        with sl.steer(pipe, bank, {"a": 2.0}):
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
            found = run(pipe)
    assert torch.equal(found, expected)
    calls, block = [], pipe.transformer.transformer_blocks[1]
    count = block.norm1.register_forward_hook(lambda *_: calls.append(1))
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    run(pipe, steps=6)
    skipping = len(calls)
    with sl.steer(pipe, bank, {"a": 2.0}) as session:
        run(pipe, steps=6)
    assert len(calls) == 2 * skipping < 2 * 12  # steered or not, the cache skips as often
    assert session.report().lines[0].passes == skipping  # and a socket inside it is skipped with its block
    run(pipe, steps=6)
    assert len(calls) == 3 * skipping
    count.remove()
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe), plain("flux"))


@pytest.mark.parametrize(
    "config",
    ["PyramidAttentionBroadcastConfig", "MagCacheConfig", "TaylorSeerCacheConfig", "SeaCacheConfig"],
)
def test_other_caches_go_on_beside_an_edit_of_nothing(config):
    pipe = PIPELINES["flux"].build()
    bank, made = bank_for(pipe, "transformer.transformer_blocks.1:image", 16), getattr(diffusers, config)
    options = {
        "PyramidAttentionBroadcastConfig": {"spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: 500},
        "SeaCacheConfig": {"threshold": 0.25},
        "MagCacheConfig": {"mag_ratios": [1.0] * 6, "num_inference_steps": 6},
        "TaylorSeerCacheConfig": {"cache_interval": 2, "disable_cache_before_step": 1},
    }[config]
    pipe.transformer.enable_cache(made(**options))
    expected = run(pipe, steps=6)
    assert torch.equal(steered(pipe, bank, {"a": 0.0}, steps=6), expected)
    moved = steered(pipe, bank, {"a": 3.0}, steps=6)
    assert not torch.equal(moved, expected) and torch.equal(steered(pipe, bank, {"a": 3.0}, steps=6), moved)
    assert torch.equal(run(pipe, steps=6), expected)


# -- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["offload", "hook"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_group_offloading_changes_nothing(family, level, first):
    pipe, site = PIPELINES[family].build(), site_of(family)
    bank, device = bank_for(pipe, site, 16), torch.device("cpu")
    expected = steered(pipe, bank, {"a": 2.0})
    denoiser = pipe.unet if family == "sd1" else pipe.transformer

    def offload():
        more: Any = {"num_blocks_per_group": 1} if level == "block_level" else {}
        apply_group_offloading(denoiser, onload_device=device, offload_device=device, offload_type=level, **more)

    if first == "offload":
        offload()
        assert torch.equal(steered(pipe, bank, {"a": 2.0}), expected)
    else:
        with sl.steer(pipe, bank, {"a": 2.0}):
            offload()
            assert torch.equal(run(pipe), expected) and torch.equal(run(pipe), expected)
    assert torch.equal(run(pipe), plain(family)) and torch.equal(steered(pipe, bank, {"a": 2.0}), expected)


def test_layerwise_casting_changes_nothing_but_the_weights():
    pipe = PIPELINES["sd1"].build()
    bank = bank_for(pipe, site_of("sd1"), 16)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = run(pipe)
    assert torch.equal(steered(pipe, bank, {"a": 0.0}), cast) and not torch.equal(steered(pipe, bank, {"a": 2.0}), cast)


@pytest.mark.parametrize("order", ["before", "after"])
def test_hooks_of_accelerate_that_come_and_go_between_calls_leave_steering_in_place(order):
    """Model offloading takes its hooks off every component after each call and puts them on again."""
    from accelerate.hooks import ModelHook as Offload
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    pipe = PIPELINES["sd1"].build()
    site = site_of("sd1")
    bank, expected = bank_for(pipe, site, 16), None
    expected = steered(pipe, bank, {"a": 2.0})
    if order == "before":
        add_hook_to_module(pipe.unet, Offload())
    with sl.steer(pipe, bank, {"a": 2.0}):
        for _ in range(2):
            if order == "after":
                add_hook_to_module(pipe.unet, Offload())
            assert torch.equal(run(pipe), expected)
            remove_hook_from_module(pipe.unet)
            add_hook_to_module(pipe.unet, Offload())
    remove_hook_from_module(pipe.unet)
    assert torch.equal(run(pipe), plain("sd1"))


def test_a_hook_of_accelerate_on_the_very_block_survives():
    """Sequential offloading puts hooks on blocks with weights of their own, such as those of Wan."""
    from accelerate.hooks import ModelHook as Offload
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    class Counting(Offload):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    pipe, hook = PIPELINES["wan"].build(), Counting()
    bank = bank_for(pipe, "transformer.blocks.0", 16)
    expected, block = steered(pipe, bank, {"a": 2.0}), pipe.transformer.blocks[0]
    with sl.steer(pipe, bank, {"a": 2.0}):
        add_hook_to_module(block, hook)
        assert torch.equal(run(pipe), expected)
    assert hook.calls == 2 and torch.equal(run(pipe), plain("wan")) and hook.calls == 4
    assert torch.equal(steered(pipe, bank, {"a": 2.0}), expected) and hook.calls == 6
    remove_hook_from_module(block)
    assert torch.equal(run(pipe), plain("wan")) and hook.calls == 6


# -- other hooks of diffusers ----------------------------------------------------------------------------------


def test_a_socket_leaves_from_under_another_hook_without_disturbing_it():
    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return (output[0], 2 * output[1])

    pipe = PIPELINES["flux"].build()
    block = pipe.transformer.transformer_blocks[0]
    before = traces(pipe)
    registry = HookRegistry.check_if_exists_or_initialize(block)
    with sl.steer(pipe, bank_for(pipe, "transformer.transformer_blocks.0:image", 16), {"a": 2.0}):
        registry = HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(Doubling(), "doubling")
        both = run(pipe)
    alone = run(pipe)
    assert not torch.equal(both, alone) and not torch.equal(alone, plain("flux"))
    registry.remove_hook("doubling")
    assert torch.equal(run(pipe), plain("flux")) and before[2] == traces(pipe)[2]


# -- adapters and other ways to use a denoiser -----------------------------------------------------------------


@pytest.mark.parametrize("first", ["lora", "hook"])
def test_a_lora_may_be_loaded_before_or_after(first):
    from peft import LoraConfig

    pipe = PIPELINES["sd1"].build()
    bank, config = bank_for(pipe, site_of("sd1"), 16), LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    if first == "lora":
        pipe.unet.add_adapter(config)
        adapted = run(pipe)
        found = steered(pipe, bank, {"a": 2.0})
    else:
        with sl.steer(pipe, bank, {"a": 2.0}):
            pipe.unet.add_adapter(config)
            found = run(pipe)
        adapted = run(pipe)
    again = steered(pipe, bank, {"a": 2.0})
    assert torch.equal(found, again) and not torch.equal(found, adapted) and not torch.equal(adapted, plain("sd1"))


@pytest.mark.parametrize("name", WITH_TEXT)
def test_image_to_image_inpainting_and_control_networks_keep_the_laws(name):
    pipe = WITH_TEXT[name].build()
    site = next(iter(WITH_TEXT[name].sites))
    bank, before, traced = bank_for(pipe, site, 16), run(pipe, batch=2), traces(pipe)
    assert torch.equal(steered(pipe, bank, {"a": 0.0}, batch=2), before)
    with sl.steer(pipe, bank, {"a": [2.0, 0.0]}), sl.record(pipe, [site]) as tape:
        found = run(pipe, batch=2)
    assert torch.equal(found[1], before[1]) and not torch.equal(found[0], before[0])
    times = list(dict.fromkeys(pipe.scheduler.timesteps.tolist()))
    for state, _ in tape[site]:
        assert state.branches == ("uncond", "cond") and min(abs(1000 * (1 - state.progress) - t) for t in times) < 1e-3
    assert tape[site][0][0].step == 0 and traces(pipe) == traced


def test_several_images_of_a_prompt_take_the_prompts_amount_or_each_its_own():
    pipe = WITH_TEXT["sd_with_text"].build()
    bank = bank_for(pipe, site_of("sd1"), 16)

    def make(edits):
        seeds = [torch.Generator().manual_seed(k) for k in range(4)]
        with sl.steer(pipe, bank, edits):
            return pipe(
                ["red cup", "old boat"], num_images_per_prompt=2, num_inference_steps=2, height=16, width=16, generator=seeds,
                output_type="latent",
            ).images  # fmt: skip

    nothing, by_prompt, by_image = make({}), make({"a": [0.0, 2.0]}), make({"a": [0.0, 2.0, 0.0, 0.0]})
    same = [torch.equal(a, b) for a, b in zip(nothing, by_prompt, strict=True)]
    assert same == [True, True, False, False]
    assert [torch.equal(a, b) for a, b in zip(nothing, by_image, strict=True)] == [True, False, True, True]
    with pytest.raises(errors.RowMismatch, match="3"):
        make({"a": [0.0, 1.0, 2.0]})


def test_image_prompts_and_other_attention_leave_the_laws_as_they_are():
    """An IP-Adapter brings processors of its own; an attention backend other kernels."""
    pipe, g = PIPELINES["sd1"].build(), torch.Generator().manual_seed(0)
    bank = bank_for(pipe, site_of("sd1"), 16)
    with diffusers.models.attention_dispatch.attention_backend("native"):
        assert torch.equal(steered(pipe, bank, {"a": 0.0}), run(pipe))
    proj = {"proj.weight": torch.randn(64, 8, generator=g), "proj.bias": torch.zeros(64), "norm.weight": torch.ones(16)}
    names = [name for name in pipe.unet.attn_processors if "attn2" in name]
    modules = [pipe.unet.get_submodule(name.removesuffix(".processor")) for name in names]
    ip = {
        f"{2 * i + 1}.to_{part}_ip.weight": torch.randn(m.to_k.out_features, 16, generator=g)
        for i, m in enumerate(modules)
        for part in "kv"
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": proj | {"norm.bias": torch.zeros(16)}, "ip_adapter": ip}], False)
    given = PIPELINES["sd1"].call(pipe) | {"ip_adapter_image_embeds": [torch.randn(2, 1, 8, generator=g)]}

    def make(edits):
        given["generator"] = torch.Generator().manual_seed(0)
        with sl.steer(pipe, bank, edits):
            return pipe(**given).images

    nothing = make({})
    assert torch.equal(make({"a": 0.0}), nothing) and not torch.equal(make({"a": 2.0}), nothing)


@pytest.mark.filterwarnings("ignore")  # torch says that these modules will be replaced
def test_quantised_weights_are_steered():
    pipe = PIPELINES["sd1"].build()
    bank = bank_for(pipe, site_of("sd1"), 16)
    pipe.unet = torch.ao.quantization.quantize_dynamic(pipe.unet, {torch.nn.Linear}, dtype=torch.qint8)
    nothing, site = run(pipe), site_of("sd1")
    assert torch.equal(steered(pipe, bank, {"a": 0.0}), nothing) and not torch.equal(nothing, plain("sd1"))
    with sl.record(pipe, [site]) as before:
        run(pipe, steps=1)
    with sl.steer(pipe, bank, {"a": 2.0}), sl.record(pipe, [site]) as after:
        run(pipe, steps=1)
    expected = before[site][0][1] + 2.0 * bank.rows(bank["a"]).write[0]
    torch.testing.assert_close(after[site][0][1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="offloading by accelerate needs an accelerator")
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("first", ["offload", "hook"])
def test_offloading_by_accelerate_changes_nothing(how, first):
    pipe = PIPELINES["sd1"].build()
    bank = bank_for(pipe, site_of("sd1"), 16)
    if first == "offload":
        getattr(pipe, how)()
    steering = sl.attach(pipe, bank)
    if first == "hook":
        getattr(pipe, how)()
    nothing = run(pipe)
    steering.set({"a": 2.0})
    once, twice = run(pipe), run(pipe)
    assert torch.equal(once, twice) and not torch.equal(once, nothing)
    steering.detach()
    assert torch.equal(run(pipe), nothing)


def test_half_precision_pipelines_are_steered_in_their_own_dtype():
    pipe = PIPELINES["sd1"].build().to(dtype=torch.bfloat16)
    bank, site = bank_for(pipe, site_of("sd1"), 16), site_of("sd1")
    given = {k: v.to(torch.bfloat16) if isinstance(v, torch.Tensor) else v for k, v in PIPELINES["sd1"].call(pipe).items()}
    with sl.steer(pipe, bank, {"a": 2.0, "b": sl.Set(0.0)}), sl.record(pipe, [site]) as tape:
        made = pipe(**given).images
    assert made.dtype == tape[site][0][1].dtype == torch.bfloat16


# -- composition -----------------------------------------------------------------------------------------------


def test_each_step_may_have_a_strength_of_its_own():
    pipe, site = pipe_of("sd1"), site_of("sd1")
    bank = bank_for(pipe, site, 16)
    (_, first), *_ = seen("sd1", {"a": 1.0})[0]
    edits = {"a": sl.Add(2.0, when=sl.PerStep((0.5, 0.0)))}
    with sl.steer(pipe, bank, edits) as session, sl.record(pipe, [site]) as tape:
        made = run(pipe)
    once = steered(pipe, bank, {"a": sl.Add(1.0, when=sl.Steps(0, 1))})
    torch.testing.assert_close(made, once)
    assert session.report().lines[0].acted == 1 and len(tape[site]) == 3 and len(first) == 2


def test_nested_sessions_equal_one():
    pipe = pipe_of("flux")
    bank = bank_for(pipe, site_of("flux"), 16)
    one = steered(pipe, bank, {"a": 1.0, "b": sl.Set(0.5)})
    with sl.steer(pipe, bank, {"a": 1.0}):
        two = steered(pipe, bank, {"b": sl.Set(0.5)})
    torch.testing.assert_close(one, two)


def test_the_users_callback_stays_the_users():
    pipe, seen_steps = pipe_of("sd1"), []
    bank = bank_for(pipe, site_of("sd1"), 16)
    given = PIPELINES["sd1"].call(pipe) | {"callback_on_step_end": lambda p, i, t, k: seen_steps.append(i) or k}
    with sl.steer(pipe, bank, {"a": 1.0}):
        pipe(**given)
    assert seen_steps == [0, 1, 2]


def test_a_held_concept_keeps_what_an_unsteered_twin_reads_on_the_same_latent():
    """At a later site of the same pass: the twin is the denoiser without edits on the very input of the steered pass."""
    pipe, later = pipe_of("sd1"), "unet.up_blocks.1"
    first = site_of("sd1")
    a = bank_for(pipe, first, 16)
    with sl.record(pipe, [later]) as tape:
        run(pipe, steps=1)
    width = tape[later][0][1].shape[-1]
    d = torch.randn(1, width, generator=torch.Generator().manual_seed(3))
    bank = sl.ConceptBank(
        "two",
        [*a.concepts.values(), sl.Concept(name="late", encoder=later, index=0)],
        {first: a.encoder(first), later: sl.Directions(d)},
        base=a.base,
        sites={first: a.sites[first], later: SiteFacts(width=width)},
    )
    plain_reading, moved, held = [], [], []
    for edits, options, into in (
        ({}, {}, plain_reading),
        ({"a": 3.0}, {}, moved),
        ({"a": 3.0}, {"do": "hold", "hold": ["late"]}, held),
    ):
        with sl.steer(pipe, bank, edits, **options), sl.record(pipe, bank, ["late"]) as tape:
            run(pipe, steps=3)
        into += [z for _, z in tape["late"]]
    torch.testing.assert_close(held[0], plain_reading[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(moved[0], plain_reading[0], atol=1e-2)


def placed(pipe, **facts):
    """A cause, a place that half of the tokens are, and what follows the cause there; the reading of the place."""
    site = site_of("sd1")
    bank = bank_for(pipe, site, 16, "abcd")
    with sl.record(pipe, bank, ["b"]) as tape:
        run(pipe, steps=1)
    _, z = tape["b"][0]
    there = sl.Gate("b", above=float(z.median()))
    concepts = [replace(bank["c"], gate=there), replace(bank["a"], **facts), bank["b"], bank["d"]]
    graph = sl.CausalGraph([sl.Edge(src="a", dst="c", weight=1.0)])
    made = bank.with_concepts(concepts, name="placed", graph=graph)
    return made, there, z > there.above


def test_a_cause_is_not_written_where_its_follower_is_held():
    pipe = pipe_of("sd1")
    bank, _, inside = placed(pipe)
    site = site_of("sd1")
    with sl.record(pipe, [site]) as plain:
        run(pipe, steps=1)
    with sl.steer(pipe, bank, {"a": 2.0}, do="hold"), sl.record(pipe, [site]) as tape:
        run(pipe, steps=1)
    changed = (tape[site][0][1] != plain[site][0][1]).any(-1)
    assert torch.equal(changed, ~inside) and inside.any()
    with sl.steer(pipe, bank, {"a": 2.0}, do="hold", free=["c"]), sl.record(pipe, [site]) as tape:
        run(pipe, steps=1)
    assert (tape[site][0][1] != plain[site][0][1]).any(-1).all()


def test_a_cause_of_the_same_place_is_written_there_and_what_is_held_is_held_there():
    pipe = pipe_of("sd1")
    there = placed(pipe)[1]
    bank, _, inside = placed(pipe, gate=there)
    with sl.record(pipe, bank, ["a", "c"]) as plain:
        run(pipe, steps=1)
    with sl.steer(pipe, bank, {"a": 2.0}, do="hold"), sl.record(pipe, bank, ["a", "c"]) as tape:
        run(pipe, steps=1)
    moved, followed = (tape[name][0][1] - plain[name][0][1] for name in ("a", "c"))
    torch.testing.assert_close(followed, torch.zeros_like(followed), rtol=0, atol=1e-4)
    assert (moved[inside].abs() > 0.1).all() and (moved[~inside] == 0).all()


def test_what_others_hold_between_them_needs_no_hold_of_its_own():
    """Three directions in a plane: values of one factor, whose differences add up to nothing."""
    pipe, site = pipe_of("sd1"), site_of("sd1")
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    plane = {"a": rows[0], "b": rows[1], "c": rows[2], "ab": -rows[0] - rows[1]}
    bank = sl.ConceptBank.from_directions(plane, site=site, base=pipe)
    names = [*plane]
    with sl.record(pipe, bank, names) as plain:
        run(pipe, steps=1)
    with (
        sl.steer(pipe, bank, {"c": 3.0}, do="hold", hold=["a", "b", "ab"], allow_ood=True),
        sl.record(pipe, bank, names) as tape,
    ):
        run(pipe, steps=1)
    for name in names:
        moved = (tape[name][0][1] - plain[name][0][1]).abs().max()
        assert moved > 0.1 if name == "c" else moved < 1e-3, name


def test_gates_read_where_the_concept_shows_in_the_image():
    pipe = pipe_of("sd1")
    site = site_of("sd1")
    bank = bank_for(pipe, site, 16)
    with sl.record(pipe, bank, ["b"]) as tape:
        run(pipe)
    _, z = tape["b"][0]
    middle = float(z.median())
    (state, x), *_ = seen("sd1")[0]
    with (
        sl.steer(pipe, bank, {"a": sl.Add(1.0, gate=sl.Gate("b", above=middle))}),
        sl.record(pipe, [site]) as after,
    ):
        run(pipe)
    changed = (after[site][0][1] != x).any(-1)
    assert torch.equal(changed, z > middle) and changed.any() and not changed.all()
