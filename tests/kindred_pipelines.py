"""Every pipeline class that diffusers exports, built from the parts of the toy pipelines where those fit, and called.

Prompts are embeddings of ones and negative prompts of minus ones, so that what a denoiser is given tells each row's half.
"""

import ast
import inspect
import re
import typing
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import diffusers
import torch
from tiny_pipelines import PIPELINES, STRENGTH, Tiny, seeded
from torch import Tensor, nn

from steerlib.hooks.diffusers import guidance
from steerlib.hooks.source import function_of, names_in

d: Any = diffusers
OURS = (nn.Module, d.SchedulerMixin)
SIZE = 32


@cache
def exported() -> dict[str, type]:
    """All pipeline classes of diffusers, by name."""
    with warnings.catch_warnings(action="ignore"):  # of what the library imports
        found = {name: getattr(d, name, None) for name in dir(d)}
    return {
        n: c
        for n, c in found.items()
        if isinstance(c, type) and issubclass(c, d.DiffusionPipeline) and c is not d.DiffusionPipeline
    }


@cache
def donors() -> dict[str, Any]:
    return {name: tiny.build() for name, tiny in PIPELINES.items()}


def controlled(parts: dict[str, Any]) -> Any:
    return d.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16))


MADE = {
    "ControlNetModel": controlled,
    "SD3ControlNetModel": lambda parts: d.SD3ControlNetModel.from_transformer(parts["transformer"], num_layers=1),
    "FluxControlNetModel": lambda parts: d.FluxControlNetModel.from_transformer(
        parts["transformer"], num_layers=1, num_single_layers=1
    ),
    "QwenImageControlNetModel": lambda parts: d.QwenImageControlNetModel.from_transformer(parts["transformer"], num_layers=1),
    "UNetMotionModel": lambda parts: d.UNetMotionModel.from_unet2d(parts["unet"], MADE["MotionAdapter"](parts)),
    "MotionAdapter": lambda _: d.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
    ),
}
"""Parts that toy pipelines lack, by their class."""


def fitting(cls: type, tiny: str, *, fresh: bool = False) -> dict[str, Any] | None:
    """What to build a class with from the parts of a toy pipeline; None where something is missing."""
    parts, given = (PIPELINES[tiny].build() if fresh else donors()[tiny]).components, {}
    try:
        hints = typing.get_type_hints(cls.__init__)
    except Exception:
        return None
    for name, parameter in [*inspect.signature(cls.__init__).parameters.items()][1:]:
        hint = hints.get(name, object)
        classes = [c for c in (typing.get_args(hint) or (hint,)) if isinstance(c, type)]
        if name == "scheduler":
            given[name] = parts[name]
        elif "safety" in name:
            given[name] = None
        elif not any(issubclass(c, OURS) and c.__module__.startswith("diffusers.") for c in classes):
            if parameter.default is inspect.Parameter.empty:
                given[name] = None
        elif isinstance(parts.get(name), tuple(classes)):
            given[name] = parts[name]
        elif made := next((MADE[c.__name__] for c in classes if c.__name__ in MADE), None):
            given[name] = made(parts)
        elif parameter.default is inspect.Parameter.empty:
            return None
    return given


def shared(cls: type, tiny: str) -> int:
    """How many parts, and names of prompts, a class has in common with a toy pipeline."""
    given, taken = fitting(cls, tiny), inspect.signature(cls.__call__).parameters
    named = sum(name in taken for name in PIPELINES[tiny].prompt) - 2 * ("pooled_prompt_embeds" in taken and tiny == "sd1")
    return -99 if given is None else sum(isinstance(part, OURS) for part in given.values()) + named


OPTIONS = {"requires_safety_checker": False, "add_watermarker": False}


@cache
def built(name: str) -> tuple[Any, Tiny]:
    """A pipeline of a class, and the toy pipeline whose parts it has; raises `LookupError` where none fits."""
    cls = exported()[name]
    tiny = max(PIPELINES, key=lambda tiny: shared(cls, tiny))
    if (given := fitting(cls, tiny, fresh=True)) is None:
        raise LookupError(f"no toy pipeline has the parts of {name}")
    taken = inspect.signature(cls.__init__).parameters
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = cls(**given | {k: v for k, v in OPTIONS.items() if k in taken})
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipe, PIPELINES[tiny]


def asked(pipe: Any, tiny: Tiny, *, pictures: bool = False, guidance: bool = True) -> dict[str, Any]:
    """What to call a pipeline with; with `pictures` also the optional ones that its signature names."""
    taken = inspect.signature(type(pipe).__call__).parameters
    given = {k: v for k, v in tiny.call(pipe, steps=2, height=SIZE, width=SIZE, guidance=guidance).items() if k in taken}
    for name in [n for n in given if "embeds" in n]:
        value = -1.0 if name.startswith("negative") else 1.0
        given[name] = (
            [torch.full_like(x, value) for x in given[name]]
            if isinstance(given[name], list)
            else torch.full_like(given[name], value)
        )
    picture, film = torch.rand(1, 3, SIZE, SIZE, generator=seeded(1)), torch.rand(9, 3, SIZE, SIZE, generator=seeded(1))
    inputs = {
        "image": picture, "control_image": picture, "image_2": picture, "conditioning_frames": [picture], "video": film,
        "mask_image": torch.ones(1, 1, SIZE, SIZE), "control_mask": torch.ones(1, 1, SIZE, SIZE), "strength": 1.0,
        "padding_mask_crop": None, "num_frames": 9, "guidance_scale": STRENGTH, "pag_scale": 3.0, "image_guidance_scale": 1.5,
        "mask": torch.ones(1, 1, SIZE, SIZE), "_auto_resize": False,
    }  # fmt: skip
    required = {n for n, p in taken.items() if p.default is inspect.Parameter.empty}
    wanted = {"strength", "pag_scale", "_auto_resize"} | (
        {"image", "control_image", "video", "mask_image", "control_mask"} if pictures else set()
    )
    for name in taken:
        if name not in given and name in inputs and (name in wanted or name in required):
            given[name] = inputs[name]
    if "guidance_scale" in taken and "guidance_scale" not in given and "true_cfg_scale" not in given:
        given["guidance_scale"] = STRENGTH
    return given


def told(value: Any) -> Iterator[list[str]]:
    """What a denoiser's input tells of the half of each row."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from told(inner)
    elif isinstance(value, (list, tuple)):
        rows = [label for inner in value for label in told(inner[None] if isinstance(inner, Tensor) else inner)]
        if rows and len(rows) == len(value):
            yield [row[0] for row in rows]
    elif isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
        rows = value.flatten(1)
        if bool(((rows == 1) | (rows == -1)).all()) and bool((rows == rows[:, :1]).all()):
            yield ["cond" if row[0] > 0 else "uncond" for row in rows]


# -- what a class's source shows -------------------------------------------------------------------------------


def evidence(cls: type) -> str:
    """How a class tells its halves: `stacked`, `apart`, `guider`, `one pass` without guidance, `parts` of other pipelines;
    empty where nothing shows it, so that it is refused."""
    call = inspect.unwrap(cls.__call__)
    if not inspect.isfunction(call):
        return "parts"
    source = inspect.getsource(call)
    if "guider" in source:
        return "guider"
    if guidance.stacked(call.__code__, cls):
        return "stacked"
    components = "|".join(n for n in inspect.signature(cls.__init__).parameters if "vae" not in n) + "|current_model"
    halves = {half for node in called(call, components) if (half := half_of(node, function_of(call.__code__)))}
    if halves == {"cond", "uncond"}:
        return "apart"
    if guidance.speaks_of_none(call.__code__) or "negative" not in source.split('"""')[-1]:
        return "one pass"
    return "parts" if re.search(r"self\.\w+_pipe\w*\(", source) else ""


def called(call: Any, components: str) -> Iterator[ast.Call]:
    for node in ast.walk(function_of(call.__code__) or ast.Pass()):
        if isinstance(node, ast.Call) and re.fullmatch(rf"(self\.)?({components})", ast.unparse(node.func)):
            yield node


def half_of(node: ast.Call, function: Any) -> Any:
    given = [guidance.kinds({*names_in(value)}, guidance.PASSED) for value in (*node.args, *(k.value for k in node.keywords))]
    return "uncond" if "uncond" in map(guidance.only, given) else guidance.only(frozenset(h for found in given for h in found))
