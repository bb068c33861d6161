"""sparsify 1.x (EleutherAI): TopK encoders and transcoders, a folder with `cfg.json` and `sae.safetensors` for each module.

encoder.weight [n, D], encoder.bias [n], W_dec [n, D], b_dec [D], W_skip [D, D]. An encoder takes b_dec off its input, a
transcoder, which reads what its module is given, does not. Folders have the paths of modules, from the model's body.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..encoders import Encoder, TopK, Transcoder
from . import files
from .foreign import Foreign, Found, refuse
from .table import Table

FILES = ("cfg.json", "sae.safetensors")
SETTINGS = Table(
    read="k transcode skip_connection num_latents d_in",
    aside="expansion_factor normalize_decoder naive_decoder multi_topk",
    only={"activation": ("topk",), "signed": (False, None), "apply_b_dec_to_input": (True,)},
)
TENSORS = Table(read="encoder.weight encoder.bias W_dec b_dec W_skip")


def units(path: Path) -> list[Path]:
    """Folders of one encoder each."""
    return files.units(path, *FILES)


def read(path: Path, title: str, *, ignore: Iterable[str] = ()) -> Foreign:  # noqa: ARG001
    """Every encoder in a folder. `ignore` names settings that this reader does not know and that readings do not depend on."""
    about = path / "config.json"
    model = files.settings(about).get("model", "") if path.is_dir() and about.is_file() else ""
    return Foreign(found=[_found(folder, str(model), tuple(ignore)) for folder in units(path)])


def _found(folder: Path, model: str, ignore: tuple[str, ...]) -> Found:
    cfg, hook = files.settings(folder / FILES[0]), folder.resolve().name
    SETTINGS.check(folder, cfg, ignore)
    parts, k = weights(folder, cfg, ignore), files.whole(cfg, "k")
    transcodes = bool(cfg.get("transcode"))
    if bool(cfg.get("skip_connection")) != ("skip" in parts):
        refuse(folder, f"of skip_connection={cfg.get('skip_connection')!r}, which its tensors deny", "download it again")
    encoder: Encoder
    if transcodes:
        encoder = Transcoder(**parts, threshold=parts["bias"].new_zeros(len(parts["bias"])), k=k)
    elif "skip" in parts:
        refuse(folder, "an autoencoder with a linear part beside it", "read encoders, or transcoders")
    else:
        encoder = TopK(**parts, k=k, centred=True)
    return Found(encoder=encoder, hook=hook, reads=f"{hook}.input" if transcodes else "", base=model)


def weights(folder: Path, cfg: Mapping[str, Any], ignore: Iterable[str] = ()) -> dict[str, Any]:
    """The tensors by our names, of the sides that the settings say."""
    tensors = files.safetensors(folder / FILES[1])
    TENSORS.check_tensors(folder, tensors, ignore)
    files.check_sides(folder, tensors, "encoder.weight", (cfg.get("num_latents") or None, cfg.get("d_in")))
    found: dict[str, Tensor] = {"encoder": files.part(tensors, "encoder.weight", 2), "decoder": files.part(tensors, "W_dec", 2)}
    found |= {ours: files.part(tensors, theirs, 1) for ours, theirs in (("bias", "encoder.bias"), ("decoder_bias", "b_dec"))}
    return found | ({"skip": files.part(tensors, "W_skip", 2)} if "W_skip" in tensors else {})
