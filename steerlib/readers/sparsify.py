"""sparsify 1.x (EleutherAI): TopK encoders and transcoders, a folder with `cfg.json` and `sae.safetensors` for each module.

encoder.weight [n, D], encoder.bias [n], W_dec [n, D], b_dec [D], W_skip [D, D]. An encoder takes b_dec off its input, a
transcoder, which reads what its module is given, does not. Folders have the paths of modules, from the model's body.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..encoders import Encoder, TopK, Transcoder
from . import files
from .foreign import Foreign, Found, refuse

FILES = ("cfg.json", "sae.safetensors")


def units(path: Path) -> list[Path]:
    """Folders of one encoder each."""
    return files.units(path, *FILES)


def read(path: Path, title: str) -> Foreign:  # noqa: ARG001
    """Every encoder in a folder."""
    about = path / "config.json"
    model = files.settings(about).get("model", "") if path.is_dir() and about.is_file() else ""
    return Foreign(found=[_found(folder, str(model)) for folder in units(path)])


def _found(folder: Path, model: str) -> Found:
    cfg, hook = files.settings(folder / FILES[0]), folder.resolve().name
    if cfg.get("activation", "topk") != "topk" or cfg.get("signed"):
        refuse(folder, f"of activation {cfg.get('activation')!r}, signed {cfg.get('signed')!r}", "read TopK encoders")
    parts, k = weights(folder), files.whole(cfg, "k")
    transcodes = bool(cfg.get("transcode"))
    encoder: Encoder
    if transcodes:
        encoder = Transcoder(**parts, threshold=parts["bias"].new_zeros(len(parts["bias"])), k=k)
    elif "skip" in parts:
        refuse(folder, "an autoencoder with a linear part beside it", "read encoders, or transcoders")
    else:
        encoder = TopK(**parts, k=k, centred=True)
    return Found(encoder=encoder, hook=hook, reads=f"{hook}.input" if transcodes else "", base=model)


def weights(folder: Path) -> dict[str, Any]:
    """The tensors by our names."""
    tensors = files.safetensors(folder / FILES[1])
    found: dict[str, Tensor] = {"encoder": files.part(tensors, "encoder.weight", 2), "decoder": files.part(tensors, "W_dec", 2)}
    found |= {ours: files.part(tensors, theirs, 1) for ours, theirs in (("bias", "encoder.bias"), ("decoder_bias", "b_dec"))}
    return found | ({"skip": files.part(tensors, "W_skip", 2)} if "W_skip" in tensors else {})
