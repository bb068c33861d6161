"""Every family of pipelines keeps the same laws; diffusers' own classes at toy size."""

from functools import cache
from typing import Any

import pytest
import torch
from tiny_pipelines import PIPELINES, Streams, run
from torch import nn

import steerlib as sl
from steerlib.hooks.modules import named
from steerlib.hosts import host_for

STEPS = 3


@cache
def pipe_of(family) -> Any:
    return PIPELINES[family].build()


@cache
def plain(family, **options):
    return run(pipe_of(family), steps=STEPS, **options)


def site_of(family, which=0):
    """A block of the family, of the image's stream where it has two."""
    path, streams = list(PIPELINES[family].sites.items())[which]
    return f"{path}:image" if isinstance(streams, Streams) else path


@cache
def bank_of(family):
    """Two directions at the family's first site."""
    site = site_of(family)
    with sl.record(pipe_of(family), [site]) as tape:
        run(pipe_of(family), steps=1)
    width = tape[site][0][1].shape[-1]
    a, b = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    return sl.ConceptBank.from_directions({"a": a, "b": b}, site=site, base=pipe_of(family))


def seen(family, edits=None, site=None, pipe=None, *, branch: Any = "both", **options) -> Any:
    """What passes at a site, and what comes out."""
    pipe, site = pipe or pipe_of(family), site or site_of(family)
    with sl.steer(pipe, bank_of(family), edits or {}, branch=branch), sl.record(pipe, [site]) as tape:
        made = run(pipe, steps=STEPS, **options)
    return tape[site], made


def traces(pipe):
    """All that a session may leave in a pipeline."""
    modules = [m for part in pipe.components.values() if isinstance(part, nn.Module) for m in part.modules()]
    hooks = [[*m._forward_hooks], [*m._forward_pre_hooks]] if (m := modules[0]) else []
    return hooks, [sorted(m.__dict__) for m in modules], [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]


def halves(state, x):
    """A pass's rows by the half of guidance they belong to."""
    names = state.branches or ("cond",)
    return dict(zip(names, x.chunk(len(names)), strict=True))


# -- the contract, over every family ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", PIPELINES)
def test_an_edit_of_nothing_is_bit_identical_and_leaves_nothing(family):
    expected, before = plain(family), traces(pipe_of(family))
    _, made = seen(family, {"a": 0.0, "b": sl.Scale(1.0)})
    assert torch.equal(made, expected) and traces(pipe_of(family)) == before


@pytest.mark.parametrize("family", PIPELINES)
def test_the_site_moves_by_exactly_the_vector_and_every_run_is_the_same(family):
    (first, x), *_ = seen(family)[0]
    after, made = seen(family, {"a": 0.5})
    direction = bank_of(family).rows(bank_of(family)["a"]).write[0]
    torch.testing.assert_close(after[0][1] - x, 0.5 * direction.expand_as(x), rtol=1e-3, atol=1e-4)
    assert not torch.equal(made, plain(family)) and first.grid is not None
    assert torch.equal(seen(family, {"a": 0.5})[1], made)


@pytest.mark.parametrize("family", PIPELINES)
def test_progress_is_the_schedulers_noise_level_however_the_denoiser_is_asked(family):
    pipe = pipe_of(family)
    host: Any = host_for(pipe)
    told: list[float] = []
    asked = [
        pipe.components[name].register_forward_pre_hook(
            lambda m, args, kwargs, name=name: told.append(
                float(torch.as_tensor(_noise(host, name, m, args, kwargs)).reshape(-1)[0])
            ),
            with_kwargs=True,
        )
        for name in host.denoisers
    ]
    try:
        passes, _ = seen(family)
    finally:
        for handle in asked:
            handle.remove()
    times = list(dict.fromkeys(pipe.scheduler.timesteps.tolist()))
    T = pipe.scheduler.config.num_train_timesteps
    for state, _ in passes:
        assert state.progress == pytest.approx(1 - times[state.step] / T, abs=1e-6)
    assert sorted({state.step for state, _ in passes}) == list(range(len(times))) or len(host.denoisers) > 1
    assert sorted({round(1 - noise, 3) for noise in told}) == sorted({round(1 - t / T, 3) for t in times})


def _noise(host, name, module, args, kwargs):
    facts, given = host.denoisers[name], named(module, args, kwargs)
    time = next(given[name] for name in facts.time if given.get(name) is not None)
    return facts.noise(time, host.pipe.scheduler.config.num_train_timesteps)


@pytest.mark.parametrize("family", PIPELINES)
def test_outside_its_window_an_edit_does_exactly_nothing(family):
    before = seen(family)[0]
    middle = before[0][0].progress + 1e-6
    inside = seen(family, {"a": sl.Add(1.0, when=sl.Window(0.0, middle))})[0]
    late = seen(family, {"a": sl.Add(1.0, when=sl.Steps(1))})[0]
    for (state, x), (_, early), (_, later) in zip(before, inside, late, strict=True):
        if state.step == 0:
            assert not torch.equal(x, early) and torch.equal(x, later)
        elif state.step == 1:
            assert not torch.equal(x, later)


@pytest.mark.parametrize("family", [name for name, tiny in PIPELINES.items() if tiny.scale is not None])
@pytest.mark.parametrize("branch, other", [("cond", "uncond"), ("uncond", "cond")])
def test_one_half_of_guidance_is_edited_alone(family, branch, other):
    before, after = (seen(family, edits, branch=branch)[0] for edits in ({}, {"a": 1.0}))
    found = set()
    for (state, x), (same, y) in zip(before, after, strict=True):
        if state.step == 0:
            assert state.branches == same.branches
            for name, rows in halves(state, x).items():
                assert torch.equal(rows, halves(same, y)[name]) is (name == other)
                found.add(name)
    assert found == {"cond", "uncond"}


@pytest.mark.parametrize("family", [name for name, tiny in PIPELINES.items() if tiny.scale is not None])
def test_the_conditional_half_is_the_one_that_reads_the_prompt(family):
    """Without guidance only the prompt is read: its first pass is the conditional half of the guided one."""
    guided, bare = (seen(family, guidance=guidance)[0][0] for guidance in (True, False))
    cond = [halves(state, x)["cond"] for state, x in seen(family)[0] if "cond" in (state.branches or ("cond",))][0]
    assert bare[0].branches in ((), ("cond",)) and guided[0].branches
    torch.testing.assert_close(cond, bare[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", PIPELINES)
def test_a_batch_of_different_amounts_equals_single_runs(family):
    _, both = seen(family, {"a": [1.0, -2.0]}, batch=2)
    _, unsteered = seen(family, batch=2)
    one = seen(family, {"a": 1.0})[1]
    torch.testing.assert_close(both[:1], one, rtol=1e-3, atol=2e-3)
    assert not torch.allclose(both[1], unsteered[1], atol=1e-3)
    mixed = seen(family, {"a": [0.0, -2.0]}, batch=2)[1]
    torch.testing.assert_close(mixed[0], unsteered[0])
    torch.testing.assert_close(mixed[1], both[1], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("family", PIPELINES)
def test_a_box_moves_the_tokens_it_covers_on_images_that_are_not_square(family):
    before = seen(family)[0]
    after = seen(family, {"a": sl.Add(1.0, mask=(0.0, 0.0, 0.5, 1.0))})[0]
    (state, x), (_, y) = before[0], after[0]
    grid = state.grid.of(x.shape[1])
    left = (torch.arange(x.shape[1]) % grid.width + 0.5) / grid.width < 0.5
    assert (y != x).any(-1)[:, left].all() and torch.equal(y[:, ~left], x[:, ~left])


@pytest.mark.parametrize("family", PIPELINES)
def test_nothing_is_left_when_a_run_breaks_off(family):
    pipe, before = pipe_of(family), traces(pipe_of(family))

    def fail(*args):
        raise KeyboardInterrupt

    module = pipe.components[site_of(family).partition(".")[0]].get_submodule(
        site_of(family).partition(".")[2].partition(":")[0]
    )
    handle = module.register_forward_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            seen(family, {"a": 1.0})
    finally:
        handle.remove()
    assert traces(pipe) == before and torch.equal(seen(family)[1], plain(family))
