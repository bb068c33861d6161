"""Random edits of random hosts against hooks written by hand: a second implementation, from the laws alone.

By hand: `x` of the site, each token's position from its row's first real one, and whether the pass reads prompt or new tokens.
"""

import contextlib
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny_models import tiny
from tiny_pipelines import PIPELINES, run
from torch import nn

import steerlib as sl
from steerlib import encoders
from steerlib.hosts import host_for

CASES, PICTURES, SEED, TOKENS = 200, 24, 20260, 7
FAMILIES = ("llama", "gpt2", "qwen2", "gemma2", "opt", "gpt_neox", "phi", "mistral", "bloom", "falcon")
SIDES = ("", ".in", ".update", ".attn", ".mlp")


@dataclass
class Case:
    """One draw: `seed` makes it again."""

    seed: int
    rng: random.Random = field(init=False)

    def __post_init__(self):
        self.rng = rng = random.Random(self.seed)
        self.family, self.site = rng.choice(FAMILIES), f"layers.{rng.randrange(2)}{rng.choice(SIDES)}"
        self.concepts = rng.choice(("direction", "direction", "relu", "topk"))
        self.verb = rng.choice(("add", "scale", "set", "ablate", "clamp"))
        self.rows, self.is_cached, self.is_padded = rng.choice((1, 2, 3)), rng.random() < 0.5, rng.random() < 0.5
        number = [round(rng.uniform(-2, 2), 2) for _ in range(self.rows)]
        self.amount = number if rng.random() < 0.3 else number[0]
        self.tokens = rng.choice(("all", "all", "prompt", "generated", slice(1, None), slice(2, 5), slice(0, 9)))
        self.when = rng.choice((None, None, (1, 3), (0, 2), (2, None)))
        if self.concepts != "direction":  # their ablations and targets have laws of their own, which test_encoders states
            self.verb = rng.choice(("add", "scale"))

    def edit(self):
        when = None if self.when is None else sl.Steps(*self.when)
        given: dict[str, Any] = {"tokens": self.tokens, "when": when}
        match self.verb:
            case "add":
                return sl.Add(self.amount, **given)
            case "scale":
                return sl.Scale(self.amount, **given)
            case "set":
                return sl.Set(self.amount, **given)
            case "clamp":
                return sl.Clamp(high=self.amount, **given)
        return sl.Ablate(**given)

    def moved(self, z):
        """The change of readings `z[B, N]`; the law of each intervention."""
        a = torch.as_tensor(self.amount, dtype=torch.float32)
        a = a[:, None] if a.ndim else a
        change = {
            "add": a + 0 * z,
            "scale": (a - 1) * z,
            "set": a - z,
            "ablate": -z,
            "clamp": torch.minimum(z, a + 0 * z) - z,
        }[self.verb]
        return change if self.concepts == "direction" else torch.maximum(change, -z)  # latents are never below 0

    def lets_in(self, column, prompt, pads):
        """Whether each token of a pass is edited: `column[N]` counts from the left, `pads[B]` lie before each row's text."""
        position, real = column[None] - pads[:, None], column[None] >= pads[:, None]
        step = (column - prompt + 1).clamp(min=0)[None].expand_as(position)
        if isinstance(self.tokens, slice):
            start, stop, _ = self.tokens.indices(10**6)
            real = real & (position >= start) & (position < stop)
        elif self.tokens != "all":
            real = real & ((step > 0) == (self.tokens == "generated"))
        if self.when is not None:
            real = real & (step >= self.when[0]) & (step < (self.when[1] or 10**6))
        return real


class Hook:
    """What a user would write: the edit at one module, and the count of columns that went by."""

    def __init__(self, case, site, write, encode, prompt, pads):
        self.case, self.site, self.prompt, self.pads = case, site, prompt, pads
        self.encode, self.write, self.column, self.acted = encode, write, 0, False

    def change(self, x):
        columns = torch.arange(self.column, self.column + x.shape[1])
        self.column = self.column + x.shape[1] if self.case.is_cached else 0
        z = self.encode(x)
        moved = self.case.moved(z) * self.case.lets_in(columns, self.prompt, self.pads)
        self.acted |= bool(moved.any())
        return moved[..., None] * self.write

    def on_output(self, module, args, kwargs, output):
        x = output if isinstance(output, torch.Tensor) else output[0]
        base = x - (args[0] if args else kwargs["hidden_states"]) if self.site.side == "update" else x
        y = x + self.change(base)
        return y if isinstance(output, torch.Tensor) else (y, *output[1:])

    def on_input(self, module, args, kwargs):
        if args:
            return (args[0] + self.change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + self.change(kwargs["hidden_states"])}

    @contextlib.contextmanager
    def on(self, module: nn.Module):
        if self.site.side == "input":
            handle = module.register_forward_pre_hook(self.on_input, with_kwargs=True)
        else:
            handle = module.register_forward_hook(self.on_output, with_kwargs=True)
        yield
        handle.remove()


def concept_of(case, model, width, generator):
    """A bank with one concept, and by hand: what reads it, and what one unit of it writes."""
    if case.concepts == "direction":
        d = torch.randn(width, generator=generator)
        return sl.ConceptBank.from_directions({"c": d}, site=case.site, base=model), "c", lambda x: x @ d / d.dot(d), d
    rows, bias = torch.randn(24, width, generator=generator), 0.1 * torch.rand(24, generator=generator)
    out = torch.randn(24, width, generator=generator) / width**0.5
    kinds: Any = encoders.KINDS
    k = {"k": 6} if case.concepts == "topk" else {}
    bank = sl.ConceptBank.from_encoder(
        kinds[case.concepts](encoder=rows, bias=bias, decoder=out, **k), site=case.site, base=model
    )

    def encode(x):
        p = (x @ rows.T + bias).relu()
        if case.concepts == "topk":
            p = p * (p >= p.topk(6).values[..., -1:])
        return p[..., 5]

    return bank, f"{case.site}/5", encode, out[5]


MODELS: dict[str, Any] = {}


def model_of(family):
    if family not in MODELS:
        MODELS[family] = tiny(family)
        MODELS[family].generation_config.eos_token_id = None
        MODELS[family].generation_config.pad_token_id = 0
    return MODELS[family]


@pytest.mark.parametrize("part", range(4))
@torch.no_grad()
def test_a_random_edit_does_what_a_hook_written_by_hand_does(part):
    acted = 0
    for seed in range(SEED + part, SEED + part + CASES, 4):
        case, generator = Case(seed), torch.Generator().manual_seed(seed)
        model = model_of(case.family)
        sites = host_for(model).sites()
        if case.site not in sites:
            continue
        site = sites[case.site]
        bank, name, encode, write = concept_of(case, model, model.config.hidden_size, generator)
        pads = torch.tensor([case.rng.randrange(3) * case.is_padded for _ in range(case.rows)])
        pads -= pads.min()
        ids = torch.randint(3, 60, (case.rows, TOKENS), generator=generator)
        mask = (torch.arange(TOKENS) >= pads[:, None]).long()
        options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "use_cache": case.is_cached}
        options |= {"output_scores": True, "return_dict_in_generate": True}
        hook = Hook(case, site, write, encode, TOKENS, pads)
        with hook.on(model.get_submodule(site.module)):
            expected = model.generate(ids, **options)
        with sl.steer(model, bank, {name: case.edit()}):
            found = model.generate(ids, **options)
        said = f"seed {seed}: {vars(case) | {'rng': None}}"
        assert torch.equal(found.sequences, expected.sequences), said
        torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4, msg=said)
        acted += hook.acted
    assert acted >= 0.6 * CASES / 4  # the others have no such site, or an edit that lets nothing through


PLACES = ("unet.mid_block.attentions.0", "unet.mid_block.resnets.0", "unet.down_blocks.0.attentions.0.transformer_blocks.0")


@torch.no_grad()
def test_a_random_edit_of_a_pipeline_does_what_a_hook_written_by_hand_does():
    """Stacked halves of guidance, amounts by image, and a part of denoising, told from the scheduler's own noise levels."""
    pipe, acted = PIPELINES["sd1"].build(), 0
    for seed in range(SEED, SEED + PICTURES):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        place, verb, batch = rng.choice(PLACES), rng.choice(("add", "scale", "set")), rng.choice((1, 2))
        amount = [rng.uniform(-2, 2) for _ in range(batch)]
        branch, start = rng.choice(("both", "cond", "uncond")), rng.uniform(0, 0.6)
        stop, steps = start + rng.uniform(0.1, 0.4), rng.choice((3, 5))
        d = torch.randn(8 if "down" in place else 16, generator=generator)
        bank = sl.ConceptBank.from_directions({"c": d}, site=place, base=pipe)
        pipe.scheduler.set_timesteps(steps)
        levels = iter([1 - float(t) / pipe.scheduler.config.num_train_timesteps for t in pipe.scheduler.timesteps])
        a = torch.tensor(amount).repeat(2)[:, None]
        halves = torch.tensor([branch != "cond", branch != "uncond"]).float().repeat_interleave(batch)[:, None]
        changed = []

        def hook(module, args, output, d=d, verb=verb, a=a, halves=halves, levels=levels, window=(start, stop), out=changed):
            x = output if isinstance(output, torch.Tensor) else output[0]
            flat = x if x.ndim == 3 else x.flatten(2).mT
            z = flat @ d / d.dot(d)
            moved = {"add": a + 0 * z, "scale": (a - 1) * z, "set": a - z}[verb]
            moved = moved * halves * (window[0] <= next(levels) < window[1])
            out.append(bool(moved.any()))
            y = flat + moved[..., None] * d
            y = y if x.ndim == 3 else y.mT.reshape(x.shape)
            return y if isinstance(output, torch.Tensor) else (y, *output[1:])

        handle = pipe.unet.get_submodule(place.removeprefix("unet.")).register_forward_hook(hook)
        expected = run(pipe, batch=batch, steps=steps)
        handle.remove()
        kind = {"add": sl.Add, "scale": sl.Scale, "set": sl.Set}[verb]
        edit = kind(amount, when=sl.Window(start, stop))
        with sl.steer(pipe, bank, {"c": edit}, branch=branch):
            found = run(pipe, batch=batch, steps=steps)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=f"seed {seed}: {place} {edit} {branch}")
        acted += any(changed)
    assert acted >= PICTURES / 2
