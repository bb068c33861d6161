"""SAELens, all versions' `cfg.json` with `sae_weights.safetensors`, read and written.

W_enc [D, n], b_enc [n] (gated: b_gate, b_mag, r_mag), W_dec [n, D], b_dec [D], threshold [n], W_skip [D2, D]. Numerics follow
SAELens 6.54: b_dec is taken off the input where `apply_b_dec_to_input`; `layer_norm` and `constant_norm_rescale` act at
inference, `expected_average_only_in` does not.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..bank import trust
from ..bank.concept_bank import ConceptBank
from ..encoders import BatchTopK, Encoder, Gated, JumpReLU, Matryoshka, ReLU, Sparse, TopK, Transcoder
from ..encoders.base import Norm
from ..errors import BadBank, CorruptBank
from . import files, hookpoints
from .foreign import Foreign, Found, refuse

FILES = ("cfg.json", "sae_weights.safetensors")
BASIC = {"encoder": "W_enc", "bias": "b_enc", "decoder": "W_dec", "decoder_bias": "b_dec"}
JUMP, SKIP = {"threshold": "threshold"}, {"skip": "W_skip"}
TENSORS: dict[str, dict[str, str]] = {
    "standard": BASIC,
    "topk": BASIC,
    "jumprelu": BASIC | JUMP,
    "gated": BASIC | {"bias": "b_mag", "gate_bias": "b_gate", "log_scale": "r_mag"},
    "transcoder": BASIC,
    "skip_transcoder": BASIC | SKIP,
    "jumprelu_transcoder": BASIC | JUMP,
    "jumprelu_skip_transcoder": BASIC | JUMP | SKIP,
}
"""Architectures: our names of tensors -> SAELens'."""
KINDS: dict[str, type[Sparse]] = {"standard": ReLU, "topk": TopK, "jumprelu": JumpReLU, "gated": Gated}
TURNED = ("encoder",)
NORMS: dict[str, Norm] = {
    "none": "",
    "expected_average_only_in": "",
    "layer_norm": "layer",
    "constant_norm_rescale": "length",
}
OLD = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
"""Names before 6.0, when there was no `metadata` either."""
UNKNOWN = {
    "abstopk": "a TopK by magnitude, whose latents may be negative",
    "matching_pursuit": "matching pursuit, which encodes one latent after another",
    "temporal": "a temporal autoencoder, which attends to earlier tokens",
}


def units(path: Path) -> list[Path]:
    """Folders of one encoder each."""
    return files.units(path, *FILES)


def read(path: Path, title: str) -> Foreign:  # noqa: ARG001
    """Every encoder in a folder."""
    return Foreign(found=[_found(folder) for folder in units(path)])


def _found(folder: Path) -> Found:
    text = files.text(folder / FILES[0])
    cfg, tensors = parsed(text), _tensors(folder / FILES[1])
    encoder, metadata = _encoder(folder, cfg, tensors), cfg["metadata"]
    head = "" if metadata.get("hook_head_index") is None else f"#{metadata['hook_head_index']}"
    hook, out = _hook(metadata, "hook_name") + head, _hook(metadata, "hook_name_out")
    transcodes = isinstance(encoder, Transcoder)
    return Found(
        encoder=encoder,
        hook=out if transcodes else hook,
        reads=hook if transcodes else "",
        tag=re.sub(r"[^\w.-]", "-", folder.name, flags=re.ASCII),
        base=str(metadata.get("model_name") or ""),
        source={"cfg": text, "dtypes": {name: str(t.dtype).removeprefix("torch.") for name, t in sorted(tensors.items())}},
    )


def _hook(metadata: Mapping[str, Any], key: str) -> str:
    """The hook point; the path of a module, where there is one, says more."""
    return str(metadata.get(f"hf_{key}") or metadata.get(key) or "")


def parsed(text: str) -> dict[str, Any]:
    """`cfg.json` in the words of version 6."""
    cfg = trust.strict_json(text.encode(), FILES[0])
    if not isinstance(cfg, dict):
        raise CorruptBank(f"expected an object in {FILES[0]}, got {type(cfg).__name__}")
    if isinstance(cfg.get("metadata"), dict):
        return cfg
    cfg = {OLD.get(key, key): value for key, value in cfg.items() if isinstance(key, str)}
    cfg |= {"metadata": {key: cfg.get(key) for key in ("hook_name", "hook_head_index", "model_name")}}
    cfg.setdefault("architecture", "standard")
    cfg.setdefault("apply_b_dec_to_input", True)
    if cfg.get("activation_fn") == "topk":
        cfg |= {"architecture": "topk", "k": (cfg.get("activation_fn_kwargs") or {}).get("k", cfg.get("k"))}
    if isinstance(cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if cfg["normalize_activations"] else "none"
    return cfg


def _tensors(path: Path) -> dict[str, Tensor]:
    tensors = files.safetensors(path)
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if (factor := tensors.pop("scaling_factor", None)) is not None and not torch.allclose(factor, torch.ones_like(factor)):
        refuse(path, "fine-tuned by a factor on each latent", "load it with SAELens 5 and fold the factor into W_dec")
    return tensors


def _encoder(folder: Path, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Encoder:
    architecture, norm = cfg.get("architecture"), cfg.get("normalize_activations") or "none"
    if architecture not in TENSORS:
        refuse(folder, UNKNOWN.get(str(architecture), f"of architecture {architecture!r}"), f"there are {', '.join(TENSORS)}")
    if norm not in NORMS:
        refuse(folder, f"made for activations under {norm!r}", "fold the normalisation into the weights with SAELens first")
    names = TENSORS[architecture]
    found: dict[str, Any] = {ours: _part(tensors, ours, theirs) for ours, theirs in names.items()}
    transcodes = architecture not in KINDS
    if transcodes and NORMS[norm]:
        refuse(folder, f"a transcoder under {norm!r}, which SAELens does not undo", "fold it into the weights first")
    if transcodes:
        found.setdefault("threshold", torch.zeros(len(found["encoder"])))
        return Transcoder(**found)
    others: dict[str, Any] = {"centred": bool(cfg.get("apply_b_dec_to_input", True)), "norm": NORMS[norm]}
    if architecture == "topk":
        others["k"] = files.whole(cfg, "k")
        others["rescaled"] = bool(cfg.get("rescale_acts_by_decoder_norm"))
    return KINDS[architecture](**found, **others)


def _part(tensors: Mapping[str, Tensor], ours: str, theirs: str) -> Tensor:
    if ours in TURNED:
        return files.turned(tensors, theirs)
    return files.part(tensors, theirs, 2 if ours in ("decoder", "skip") else 1)


# -- writing -------------------------------------------------------------------------------------------------


def write(source: ConceptBank | Encoder, folder: str | Path, *, site: str = "", reads: str = "", model: str = "") -> list[Path]:
    """Write an encoder, or each of a bank in a folder of its own where there are several, as SAELens does.

    What was read from SAELens is written back bit by bit, but a TopK that counts in lengths of its decoder rows, which is
    written as the same code in rows of length 1. `site`, `reads` and `model` are for an encoder alone.
    """
    if isinstance(source, Encoder):
        return [_write(source, Path(folder), {}, _metadata(site, reads, model))]
    known, written = source.provenance.get("encoders", {}), []
    for id, facts in sorted(source.encoders.items()):
        place = Path(folder) if len(source.encoders) == 1 else Path(folder) / Path(facts.file).stem
        kept = known.get(id, {}) if source.provenance.get("format") == "saelens" else {}
        written.append(_write(source.encoder(id), place, kept, _metadata(facts.site, facts.reads, source.base.id)))
    return written


def _metadata(site: str, reads: str, model: str) -> dict[str, str]:
    hooks = {"hook_name": hookpoints.tensor(reads), "hook_name_out": hookpoints.tensor(site)}
    return {"model_name": model, **(hooks if reads else {"hook_name": hookpoints.tensor(site)})}


def _write(encoder: Encoder, folder: Path, kept: Mapping[str, Any], metadata: Mapping[str, Any]) -> Path:
    if not isinstance(encoder, Sparse):
        raise BadBank(f"SAELens has no encoder of kind {encoder.kind!r}; write directions with readers.repeng.write")
    architecture = _architecture(encoder)
    cfg = _cfg(encoder, architecture, metadata)
    if kept and _same(original := parsed(kept["cfg"]), cfg):
        architecture, cfg = original["architecture"], None
    ours = _ours(encoder)
    tensors = {theirs: ours[name].T if name in TURNED else ours[name] for name, theirs in TENSORS[architecture].items()}
    dtypes = kept.get("dtypes", {})
    tensors = {n: t.to(files.STORED.get(dtypes.get(n), t.dtype)).contiguous() for n, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILES[1])
    (folder / FILES[0]).write_bytes((kept["cfg"] if cfg is None else json.dumps(cfg)).encode())
    return folder


def _same(original: Mapping[str, Any], cfg: Mapping[str, Any]) -> bool:
    """Whether an original `cfg.json` still says what an encoder is."""
    rescaled = {bool(c.get("rescale_acts_by_decoder_norm")) for c in (original, cfg)}
    exact = ("d_in", "d_sae", "k", "d_out", "apply_b_dec_to_input")
    kin = str(original.get("architecture")).removeprefix("jumprelu_") == cfg["architecture"].removeprefix("jumprelu_")
    norms = NORMS.get(original.get("normalize_activations") or "none") == NORMS[cfg["normalize_activations"]]
    exactly = all(original.get(key, cfg.get(key)) == cfg.get(key) for key in exact)
    return kin and norms and len(rescaled) == 1 and exactly


def _architecture(encoder: Sparse) -> str:
    if not isinstance(encoder, Transcoder):
        return next((name for name, kind in KINDS.items() if isinstance(encoder, kind)), "jumprelu")
    if encoder.k is not None or encoder.centred or encoder.norm:
        raise BadBank("SAELens has no transcoder that keeps the k largest, is centred, or normalises")
    jumps = bool((encoder.threshold != 0).any())
    return ("jumprelu_" if jumps else "") + ("" if encoder.skip is None else "skip_") + "transcoder"


def _ours(encoder: Sparse) -> dict[str, Tensor]:
    """All tensors that SAELens has a place for."""
    tensors = encoder.to_tensors()
    tensors.setdefault("decoder_bias", torch.zeros(encoder.decoder.shape[1], dtype=encoder.decoder.dtype))
    if isinstance(encoder, BatchTopK | Matryoshka):
        tensors["threshold"] = encoder.thresholds()
    return tensors


def _cfg(encoder: Sparse, architecture: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    cfg = {
        "d_in": encoder.encoder.shape[1],
        "d_sae": len(encoder.encoder),
        "dtype": str(encoder.encoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": encoder.centred,
        "normalize_activations": next(name for name, norm in NORMS.items() if norm == encoder.norm),
        "reshape_activations": "hook_z" if str(metadata.get("hook_name")).endswith("hook_z") else "none",
        "metadata": {"sae_lens_version": "6.54.12", **metadata},
        "architecture": architecture,
    }
    if isinstance(encoder, TopK):
        cfg |= {"k": encoder.k, "rescale_acts_by_decoder_norm": encoder.rescaled}
    return cfg | ({"d_out": encoder.decoder.shape[1]} if isinstance(encoder, Transcoder) else {})
