"""Gemma Scope 2: JumpReLU encoders and transcoders in `params.safetensors` with `config.json`, untested on releases.

w_enc [D, n], b_enc [n], w_dec [n, D2], b_dec [D2], threshold [n], affine_skip_connection [D, D2]; the bias is not taken off the
input. `hf_hook_point_in` and `hf_hook_point_out` name modules.
"""

import re
from pathlib import Path
from typing import Any

from ..encoders import JumpReLU, Transcoder
from . import files
from .foreign import Foreign, Found, refuse

FILES = ("params.safetensors", "config.json")


def units(path: Path) -> list[Path]:
    """Folders of one encoder each."""
    return files.units(path, *FILES)


def read(path: Path, title: str) -> Foreign:  # noqa: ARG001
    """Every encoder in a folder."""
    return Foreign(found=[_found(folder) for folder in units(path)])


def _found(folder: Path) -> Found:
    config, tensors = files.settings(folder / FILES[1]), files.safetensors(folder / FILES[0])
    if config.get("architecture") != "jump_relu":
        refuse(folder, f"of architecture {config.get('architecture')!r}", "read JumpReLU encoders")
    if getattr(tensors.get("w_dec"), "ndim", 2) == 3:
        refuse(folder, "a transcoder that writes at several layers", "read transcoders of one layer")
    found: dict[str, Any] = {"encoder": files.turned(tensors, "w_enc"), "decoder": files.part(tensors, "w_dec", 2)}
    found |= {ours: files.part(tensors, theirs, 1) for ours, theirs in (("bias", "b_enc"), ("decoder_bias", "b_dec"))}
    found["threshold"] = files.part(tensors, "threshold", 1)
    hook, out = str(config.get("hf_hook_point_in", "")), str(config.get("hf_hook_point_out") or "")
    transcodes = out not in ("", hook)
    if transcodes and "affine_skip_connection" in tensors:
        found["skip"] = files.turned(tensors, "affine_skip_connection")
    return Found(
        encoder=Transcoder(**found) if transcodes else JumpReLU(**found),
        hook=out if transcodes else hook,
        reads=hook if transcodes else "",
        tag=re.sub(r"[^\w.-]", "-", folder.name, flags=re.ASCII),
        base=str(config.get("model_name", "")),
    )
