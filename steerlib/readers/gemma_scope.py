"""Gemma Scope (Lieberum et al. 2024, 2408.05147): JumpReLU encoders and transcoders in `params.npz`, untested on releases.

W_enc [D, n], b_enc [n], W_dec [n, D], b_dec [D], threshold [n]; the bias is not taken off the input. Layer, place and model
are in the names of repository and folder (`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`). Embedding encoders read
embeddings before Gemma's factor, the root of the width; here they read them after it, as transformers gives them.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..encoders import JumpReLU, Transcoder
from . import files
from .foreign import Foreign, Found
from .table import Table

FILES = ("params.npz",)
TENSORS = Table(read="w_enc b_enc w_dec b_dec threshold")
PLACES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "hook_mlp_out"}


def units(path: Path) -> list[Path]:
    """Folders of one encoder each."""
    return files.units(path, *FILES)


def read(path: Path, title: str, *, ignore: Iterable[str] = ()) -> Foreign:
    """Every encoder in a folder. `ignore` names arrays that this reader does not know and that readings do not depend on."""
    titles = {folder: f"{title}/{folder.relative_to(path)}" if path.is_dir() else title for folder in units(path)}
    return Foreign(found=[_found(folder, name, tuple(ignore)) for folder, name in titles.items()])


def _found(folder: Path, title: str, ignore: tuple[str, ...]) -> Found:
    arrays = {name.lower(): tensor for name, tensor in files.arrays(folder / FILES[0]).items()}
    TENSORS.check_tensors(folder, arrays, ignore)
    found: dict[str, Any] = {"encoder": files.turned(arrays, "w_enc"), "decoder": files.part(arrays, "w_dec", 2)}
    found |= {name: files.part(arrays, theirs, 1) for name, theirs in (("bias", "b_enc"), ("decoder_bias", "b_dec"))}
    found["threshold"] = files.part(arrays, "threshold", 1)
    repository, layer = re.search(r"gemma-scope-(\w+)-(pt|it)-(\w+)", title), re.search(r"layer_(\d+)", title)
    block, place = layer[1] if layer else "", repository[3] if repository else ""
    if "embedding" in title:
        found = _after_the_factor(found)
    transcodes = place == "transcoders"
    return Found(
        encoder=Transcoder(**found) if transcodes else JumpReLU(**found),
        hook="hook_embed" if "embedding" in title else f"blocks.{block}.{PLACES.get(place, '')}" if block else "",
        reads=f"blocks.{block}.ln2.hook_normalized" if transcodes else "",
        tag=re.sub(r"[^\w.-]", "-", "-".join(folder.parts[-2:]), flags=re.ASCII),
        base=f"google/gemma-2-{repository[1]}{'-it' if repository[2] == 'it' else ''}" if repository else "",
    )


def _after_the_factor(found: dict[str, Any]) -> dict[str, Any]:
    factor = torch.tensor(found["encoder"].shape[1]).sqrt()
    scaled = {"encoder": found["encoder"] / factor, "decoder": found["decoder"] * factor}
    return {**found, **scaled, "decoder_bias": found["decoder_bias"] * factor}
