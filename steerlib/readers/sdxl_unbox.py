"""sdxl-unbox (Surkov et al. 2024, 2410.22366) and Concept Steerers (Kim and Ghadiyaram 2025, 2501.19066): TopK encoders in
`state_dict.pth` with `config.json`, untested on releases.

encoder.weight [n, D], latent_bias [n], decoder.weight [D, n], pre_bias [D], which is taken off the input; `mean.pt`, where it
is there, holds the mean activation that the demo steers in units of. Folders start with the path of a module, from the
pipeline. Encoders of a denoiser are for what a block adds to its input, its `.update`; those of a text encoder for its output.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoders import TopK
from ..errors import CorruptBank
from . import files
from .foreign import Foreign, Found, refuse
from .table import Table

FILES = ("state_dict.pth", "config.json", "mean.pt")
SETTINGS = Table(read="n_dirs_local d_model k", aside="auxk dead_steps_threshold auxk_coef")
TENSORS = Table(read="encoder.weight decoder.weight latent_bias pre_bias", aside="stats_last_nonzero")


def units(path: Path) -> list[Path]:
    """Folders of one encoder each."""
    return files.units(path, *FILES[:2])


def read(path: Path, title: str, *, ignore: Iterable[str] = ()) -> Foreign:  # noqa: ARG001
    """Every encoder in a folder. `ignore` names settings that this reader does not know and that readings do not depend on."""
    return Foreign(found=[_found(folder, tuple(ignore)) for folder in units(path)])


def _found(folder: Path, ignore: tuple[str, ...]) -> Found:
    config, saved = files.settings(folder / FILES[1]), files.pickled(folder / FILES[0])
    state = saved.get("state_dict") if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        raise CorruptBank(f"expected a state dict under 'state_dict' in {FILES[0]}")
    SETTINGS.check(folder, config, ignore)
    TENSORS.check_tensors(folder, state, ignore)
    files.check_sides(folder, state, "encoder.weight", (config.get("n_dirs_local"), config.get("d_model")))
    parts: dict[str, Any] = {"encoder": files.part(state, "encoder.weight", 2), "bias": files.part(state, "latent_bias", 1)}
    parts |= {"decoder": files.turned(state, "decoder.weight"), "decoder_bias": files.part(state, "pre_bias", 1)}
    hook, tag = _hook(folder)
    encoder = TopK(**parts, k=files.whole(config, "k"), centred=True, statistics=_statistics(folder / FILES[2]))
    update = ".update" if hook.startswith(("unet.", "transformer.")) else ""
    return Found(encoder=encoder, hook=hook + update, tag=tag)


def _hook(folder: Path) -> tuple[str, str]:
    """The module's path and the rest of the name of this folder or the one above."""
    for name in (folder.resolve().name, folder.resolve().parent.name):
        if found := re.fullmatch(r"([A-Za-z][\w.]*?)_(k\d+_hidden\d+.*)", name, re.ASCII):
            if re.search(r"\.\d+\.\d+$", found[1]) and found[1].startswith("text_encoder"):
                refuse(folder, "made for the outputs of two text encoders side by side", "read one made for a single module")
            return found[1], re.sub(r"[^\w.-]", "-", found[2], flags=re.ASCII)
    return "", ""


def _statistics(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        return {}
    mean = files.pickled(path)
    unit = files.part({"mean": mean}, "mean", 1)
    return {"unit": torch.where(unit > 0, unit, 1.0)}
