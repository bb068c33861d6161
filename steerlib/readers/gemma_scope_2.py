"""Gemma Scope 2: JumpReLU encoders and transcoders in `params.safetensors` with `config.json`, untested on releases.

w_enc [D, n], b_enc [n], w_dec [n, D2], b_dec [D2], threshold [n], affine_skip_connection [D, D2]; the bias is not taken off the
input. `hf_hook_point_in` and `hf_hook_point_out` name modules.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..encoders import JumpReLU, Transcoder
from . import files
from .foreign import Foreign, Found, refuse
from .table import Table

FILES = ("params.safetensors", "config.json")
SETTINGS = Table(
    read="hf_hook_point_in hf_hook_point_out model_name affine_connection width",
    aside="l0 type",
    only={"architecture": ("jump_relu",), "apply_b_dec_to_input": (False, None)},
)
"""Which `type` it is, shapes and hook points say too."""
TENSORS = Table(read="w_enc b_enc w_dec b_dec threshold affine_skip_connection")


def units(path: Path) -> list[Path]:
    """Folders of one encoder each."""
    return files.units(path, *FILES)


def read(path: Path, title: str, *, ignore: Iterable[str] = ()) -> Foreign:  # noqa: ARG001
    """Every encoder in a folder. `ignore` names settings that this reader does not know and that readings do not depend on."""
    return Foreign(found=[_found(folder, tuple(ignore)) for folder in units(path)])


def _found(folder: Path, ignore: tuple[str, ...]) -> Found:
    config, tensors = files.settings(folder / FILES[1]), files.safetensors(folder / FILES[0])
    SETTINGS.check(folder, {"architecture": None, **config}, ignore)
    TENSORS.check_tensors(folder, tensors, ignore)
    if getattr(tensors.get("w_dec"), "ndim", 2) == 3:
        refuse(folder, "a transcoder that writes at several layers", "read transcoders of one layer")
    files.check_sides(folder, tensors, "w_enc", (None, config.get("width")))
    found: dict[str, Any] = {"encoder": files.turned(tensors, "w_enc"), "decoder": files.part(tensors, "w_dec", 2)}
    found |= {ours: files.part(tensors, theirs, 1) for ours, theirs in (("bias", "b_enc"), ("decoder_bias", "b_dec"))}
    found["threshold"] = files.part(tensors, "threshold", 1)
    hook, out = str(config.get("hf_hook_point_in", "")), str(config.get("hf_hook_point_out") or "")
    transcodes = out not in ("", hook)
    has_skip = "affine_skip_connection" in tensors
    if has_skip and not transcodes or bool(config.get("affine_connection", has_skip)) != has_skip:
        refuse(folder, "an encoder whose settings and tensors differ on a linear part beside it", "download it again")
    if has_skip:
        found["skip"] = files.turned(tensors, "affine_skip_connection")
    return Found(
        encoder=Transcoder(**found) if transcodes else JumpReLU(**found),
        hook=out if transcodes else hook,
        reads=hook if transcodes else "",
        tag=re.sub(r"[^\w.-]", "-", folder.name, flags=re.ASCII),
        base=str(config.get("model_name", "")),
    )
