"""SAELens, all versions' `cfg.json` with `sae_weights.safetensors`, read and written.

W_enc [D, n], b_enc [n] (gated: b_gate, b_mag, r_mag), W_dec [n, D], b_dec [D], threshold [n], W_skip [D2, D]. Numerics follow
SAELens 6.54: b_dec is taken off the input where `apply_b_dec_to_input`; `layer_norm` and `constant_norm_rescale` act at
inference, `expected_average_only_in` does not.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..bank import trust
from ..bank.concept_bank import ConceptBank
from ..encoders import BatchTopK, Encoder, Gated, JumpReLU, Matryoshka, ReLU, Sparse, TopK, Transcoder
from ..encoders.base import Norm
from ..errors import BadBank, CorruptBank, SteeringWarning
from . import files, hookpoints
from .foreign import Foreign, Found, refuse
from .table import UNSET, Table

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
OLD = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""Names before 6.0, when there was no `metadata` either."""
UNKNOWN = {
    "abstopk": "a TopK by magnitude, whose latents may be negative",
    "matching_pursuit": "matching pursuit, which encodes one latent after another",
    "temporal": "a temporal autoencoder, which attends to earlier tokens",
}
MODEL = """hook_name hook_name_out hf_hook_name hf_hook_name_out hook_head_index model_name model_from_pretrained_kwargs
    sae_lens_version sae_lens_training_version"""
ABOUT = """context_size dataset_path dataset_trust_remote_code disable_concat_sequences exclude_special_tokens hook_layer
    hook_point_layer model_class_name neuronpedia_id prepend_bos seqpos_slice sequence_separator_token training_architecture
    training_architecture_details"""
TRAINING = """act_store_device adam_beta1 adam_beta2 autocast autocast_lm aux_loss_coefficient b_dec_init_method
    cached_activations_path checkpoint_path compile_llm compile_sae dead_feature_threshold dead_feature_window
    decoder_heuristic_init decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init device dtype
    eval_batch_size_prompts eval_every_n_wandb_logs expansion_factor feature_sampling_window finetuning_method
    finetuning_tokens from_pretrained_path hook_eval hook_point_eval init_encoder_as_decoder_transpose is_dataset_tokenized
    jumprelu_bandwidth jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_ste_to_input jumprelu_tanh_scale
    l0_coefficient l0_warm_up_steps l1_coefficient l1_warm_up_steps llm_compilation_mode log_activations_store_to_wandb
    log_optimizer_state_to_wandb log_to_wandb logger lp_norm lr lr_decay_steps lr_end lr_scheduler_name lr_warm_up_steps
    matryoshka_widths model_kwargs mse_loss_normalization n_batches_in_buffer n_checkpoints n_eval_batches n_eval_seqs
    n_restart_cycles new_cached_activations_path noise_scale normalize_sae_decoder output_path pre_act_loss_coefficient
    resume resume_from_checkpoint run_name sae sae_compilation_mode save_final_checkpoint
    scale_sparsity_penalty_by_decoder_norm seed store_batch_size store_batch_size_prompts streaming target_l0
    tokens_per_buffer topk_threshold_lr total_training_tokens train_batch_size train_batch_size_tokens training_tokens
    use_cached_activations use_ghost_grads use_matryoshka_aux_loss use_sparse_activations verbose wandb_entity wandb_id
    wandb_log_frequency wandb_project"""
SETTINGS = Table(
    read="""architecture d_in d_sae d_out k apply_b_dec_to_input normalize_activations reshape_activations metadata
        rescale_acts_by_decoder_norm activation_fn activation_fn_kwargs finetuning_scaling_factor """ + MODEL,
    aside=ABOUT + " " + TRAINING,
)  # fmt: skip
METADATA = Table(read=MODEL, aside=ABOUT, only={"hook_head_index_out": (None,)})
LOADED = Table(
    read="center_writing_weights fold_ln fold_value_biases refactor_factored_attn_matrices",
    aside="""center_unembed dtype torch_dtype device device_map n_devices move_to_device default_prepend_bos first_n_layers
        default_padding_side trust_remote_code local_files_only cache_dir token attn_implementation low_cpu_mem_usage
        use_safetensors tokenizer revision checkpoint_index checkpoint_value n_checkpoints""",
)  # fmt: skip
"""How TransformerLens loaded the model, `model_from_pretrained_kwargs`."""
PROCESSED = {"fold_ln": "hook_normalized", "fold_value_biases": "hook_z", "refactor_factored_attn_matrices": "hook_z"}
"""What TransformerLens changes in a model's weights, and the end of the only hook points whose values change by it."""
STREAM = re.compile(r"blocks\.\d+\.hook_(resid_pre|resid_mid|resid_post|mlp_out|attn_out)|hook_(pos_)?embed")
"""Hook points whose mean over the width `center_writing_weights` takes off."""
INSIDE = re.compile(r"blocks\.\d+\.(attn\.hook_(z|q|k|v|pattern)|mlp\.hook_(in|pre|post)|ln[12]\.hook_normalized)")
"""Hook points behind a norm, whose values are the same."""
LAYER_NORM = re.compile(
    r"(.*/)?(distil)?(gpt2|gpt-neo|gpt-j|pythia|opt-|bloom|gelu-|solu-|attn-only|tiny-stories|stablelm|santacoder|mpt|phi-[12])",
    re.IGNORECASE,
)
RMS_NORM = re.compile(r"(.*/)?(meta-)?(llama|gemma|mistral|mixtral|qwen|yi-|phi-3|deepseek|code ?llama)", re.IGNORECASE)
"""Models by name: TransformerLens centres the writing weights of those with layer norms alone."""
CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
RELEASES: dict[str, dict[str, Any]] = {
    "jbloom/GPT2-Small-SAEs-Reformatted": CENTRED,
    "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8": CENTRED,
    "tommmcgrath/gpt2-small-mlp-out-saes": CENTRED,
    "JoshEngels/Mistral-7B-Residual-Stream-SAEs": {"normalize_activations": "constant_norm_rescale"},
}
"""What SAELens' list of releases says of files on the Hub in place of what they say themselves."""


def units(path: Path) -> list[Path]:
    """Folders of one encoder each."""
    return files.units(path, *FILES)


def read(
    path: Path, title: str, *, ignore: Iterable[str] = (), centred: bool | None = None, scaling: float | None = None
) -> Foreign:
    """Every encoder in a folder.

    Args:
        ignore: settings and tensors that this reader does not know and that readings do not depend on.
        centred: whether it was trained on a stream whose mean TransformerLens had taken off (default: as the files say).
        scaling: what activations were multiplied by in training, where the files say "expected_average_only_in" and not by
            how much; 1: as SAELens reads them.
    """
    said = next((own for release, own in RELEASES.items() if title.startswith(f"{release}/")), {})
    return Foreign(found=[_found(folder, said, tuple(ignore), centred, scaling) for folder in units(path)])


def _found(
    folder: Path, said: Mapping[str, Any], ignore: tuple[str, ...], centred: bool | None, scaling: float | None
) -> Found:
    text = files.text(folder / FILES[0])
    cfg = parsed(text, said)
    metadata = cfg["metadata"]
    _check(folder, cfg, ignore)
    tensors, dtypes = _tensors(folder, cfg, ignore)
    made = _encoder(folder, cfg, tensors, scaling)
    hook, out = _hook(folder, metadata, "hook_name"), _hook(folder, metadata, "hook_name_out")
    encoder = of_centred(made) if _is_centred(folder, cfg, centred) else made
    is_changed = encoder is not made or bool(cfg.get("finetuning_scaling_factor")) or scaling not in (None, 1)
    transcodes = isinstance(encoder, Transcoder)
    return Found(
        encoder=encoder,
        hook=out if transcodes else hook,
        reads=hook if transcodes else "",
        tag=re.sub(r"[^\w.-]", "-", folder.name, flags=re.ASCII),
        base=_base(metadata),
        source={} if is_changed else {"cfg": text, "dtypes": dtypes},
    )


def _hook(folder: Path, metadata: Mapping[str, Any], key: str) -> str:
    """The hook point; the path of a module, where there is one, says more."""
    head, hook = metadata.get("hook_head_index"), str(metadata.get(f"hf_{key}") or metadata.get(key) or "")
    if head is None or not hook:
        return hook
    if type(head) is not int or not hook.endswith("hook_z"):
        refuse(folder, f"made for head {head!r:.20} of {hook!r:.80}", "heads are parts of hook_z alone; give site=")
    return f"{hook}#{head}"


def _base(metadata: Mapping[str, Any]) -> str:
    """The model, with its checkpoint where it is not the last one."""
    loaded = metadata.get("model_from_pretrained_kwargs") or {}
    marks = [
        f"{key} {loaded[key]}" for key in ("revision", "checkpoint_index", "checkpoint_value") if loaded.get(key) is not None
    ]
    return ", ".join([str(metadata.get("model_name") or ""), *marks])


def parsed(text: str, said: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`cfg.json` in the words of version 6; `said` is what a list of releases says in its place."""
    cfg = trust.strict_json(text.encode(), FILES[0])
    if not isinstance(cfg, dict):
        raise CorruptBank(f"expected an object in {FILES[0]}, got {type(cfg).__name__}")
    cfg |= said or {}
    if not isinstance(cfg.get("metadata"), dict):
        cfg = _before_6(cfg)
    cfg["metadata"] = {**cfg["metadata"], **{key: value for key, value in (said or {}).items() if key in METADATA.read}}
    objects = (cfg.get("activation_fn_kwargs"), cfg["metadata"].get("model_from_pretrained_kwargs"))
    if not all(isinstance(given, dict | None) for given in objects):
        raise CorruptBank(f"expected arguments as JSON objects in {FILES[0]}, got {objects!r:.200}")
    return cfg


def _before_6(cfg: Mapping[str, Any]) -> dict[str, Any]:
    cfg = {OLD.get(key, key): value for key, value in cfg.items() if isinstance(key, str)}
    cfg |= {"metadata": {key: cfg[key] for key in METADATA.read if key in cfg}}
    cfg.setdefault("architecture", "standard")
    cfg.setdefault("apply_b_dec_to_input", True)
    cfg.setdefault("reshape_activations", "hook_z" if "hook_z" in str(cfg.get("hook_name")) else "none")
    if cfg.get("activation_fn") == "topk" and cfg["architecture"] == "standard":
        cfg["architecture"] = "topk"
    if cfg["architecture"] == "topk":
        cfg["k"] = (cfg.get("activation_fn_kwargs") or {}).get("k", cfg.get("k"))
    if isinstance(cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if cfg["normalize_activations"] else "none"
    return cfg


def _check(folder: Path, cfg: Mapping[str, Any], ignore: tuple[str, ...]) -> None:
    """Raise for everything in a `cfg.json` that would change a reading and that nothing here computes."""
    architecture, metadata = cfg.get("architecture"), cfg["metadata"]
    if str(architecture) not in TENSORS:
        refuse(folder, UNKNOWN.get(str(architecture), f"of architecture {architecture!r}"), f"there are {', '.join(TENSORS)}")
    SETTINGS.check(folder, cfg, ignore)
    METADATA.check(folder, metadata, ignore, "in its metadata")
    loaded = metadata.get("model_from_pretrained_kwargs") or {}
    LOADED.check(folder, loaded, ignore, "among the arguments of its model")
    function, hook, reshaped = cfg.get("activation_fn"), str(metadata.get("hook_name")), cfg.get("reshape_activations")
    if function not in (None, "relu", *(("topk",) if architecture == "topk" else ())):
        refuse(folder, f"of activation {function!r} and architecture {architecture!r}", "ReLU, and TopK alone, are read")
    if others := {key: v for key, v in (cfg.get("activation_fn_kwargs") or {}).items() if key != "k" and v not in UNSET}:
        refuse(folder, f"of activation_fn_kwargs {others!r:.80}", "TopK of k positive potentials is read")
    if cfg.get("rescale_acts_by_decoder_norm") and architecture != "topk":
        refuse(folder, f"of rescale_acts_by_decoder_norm and architecture {architecture!r}", "fold the lengths with SAELens")
    if cfg.get("apply_b_dec_to_input", True) not in (True, False):
        refuse(folder, f"of apply_b_dec_to_input={cfg['apply_b_dec_to_input']!r:.40}", "true and false are read")
    out = metadata.get("hf_hook_name_out") or metadata.get("hook_name_out")
    if architecture in KINDS and out not in (None, "", hook, metadata.get("hf_hook_name")):
        refuse(folder, f"of architecture {architecture!r} that writes elsewhere than it reads, {out!r:.80}", "read transcoders")
    is_heads = hook.endswith("hook_z") and metadata.get("hook_head_index") is None
    if reshaped not in (None, "hook_z" if is_heads else "none"):
        refuse(folder, f"of reshape_activations={reshaped!r:.40} at {hook!r:.80}", "all heads side by side are read at hook_z")
    for key, place in PROCESSED.items():
        if loaded.get(key) and hook.endswith(place):
            refuse(folder, f"made for {hook!r:.80} of a model loaded with {key}", "train on the model as it is")


def _is_centred(folder: Path, cfg: Mapping[str, Any], given: bool | None) -> bool:
    """Whether activations lack their mean over the width, as those of TransformerLens' centred weights do."""
    metadata, is_old = cfg["metadata"], "hook_name" in cfg
    hook, model = str(metadata.get("hook_name")), str(metadata.get("model_name"))
    loaded, is_stream = metadata.get("model_from_pretrained_kwargs"), bool(STREAM.fullmatch(hook))
    if given is None and loaded is None and is_old and is_stream and LAYER_NORM.match(model):
        warnings.warn(
            f"{folder.name} does not say whether it was trained on {model} with TransformerLens' centred weights, as was usual "
            "before SAELens 3.19; it is read as trained on the plain model. centred=True or False says which",
            SteeringWarning,
            stacklevel=6,
        )
    centred = given
    if given is None:
        asked = bool((loaded or {}).get("center_writing_weights")) and not INSIDE.fullmatch(hook)
        centred = asked and not RMS_NORM.match(model)
        if centred and not (is_stream and LAYER_NORM.match(model)):
            refuse(
                folder,
                f"made for {hook!r:.80} of {model!r:.80} with centred weights",
                "whether its activations lack their mean is known of residual streams of models with layer norms; "
                "say centred=True or False",
            )
    if centred and cfg.get("normalize_activations") == "constant_norm_rescale":
        refuse(folder, "of constant_norm_rescale on centred weights", "fold the centring into the weights first")
    return bool(centred)


def of_centred(encoder: Sparse) -> Sparse:
    """The encoder that reads of x what `encoder` reads of x without its mean over the width."""
    if encoder.norm == "layer":
        return encoder  # takes the mean off itself
    read = encoder.encoder.float()
    shift = 0 if not encoder.centred or encoder.decoder_bias is None else read @ encoder.decoder_bias.float()
    changed: dict[str, Any] = {"encoder": read - read.mean(-1, keepdim=True), "bias": encoder.bias.float() - shift}
    if isinstance(encoder, Gated):
        changed["gate_bias"] = encoder.gate_bias.float() - shift
        changed["bias"] = encoder.bias.float() - shift * encoder.log_scale.float().exp()
    return replace(encoder, **changed, centred=False)


def _tensors(folder: Path, cfg: Mapping[str, Any], ignore: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, and their types as they are stored; factors on what latents write are in the decoder."""
    tensors = files.safetensors(folder / FILES[1])
    dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in sorted(tensors.items())}
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
        dtypes["threshold"] = dtypes.pop("log_threshold")
    factors = [tensors.pop(name) for name in ("scaling_factor", "finetuning_scaling_factor") if name in tensors]
    is_fine_tuned = bool(cfg.get("finetuning_scaling_factor"))
    factors = [f for f in factors if is_fine_tuned or not torch.allclose(f, torch.ones_like(f))]
    if factors and not is_fine_tuned:
        refuse(folder, "fine-tuned by a factor on each latent that its cfg.json denies", "set finetuning_scaling_factor there")
    if is_fine_tuned and (len(factors) != 1 or factors[0].shape != tensors["W_dec"].shape[:1]):
        raise CorruptBank(
            f"expected a factor on each latent in {folder.name!r}, which was fine-tuned by one, got {len(factors)}"
        )
    Table(read=" ".join(TENSORS[cfg["architecture"]].values())).check_tensors(folder, tensors, ignore)
    for factor in factors:
        tensors["W_dec"] = tensors["W_dec"].float() * factor.float()[:, None]
    return tensors, dtypes


def _encoder(folder: Path, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], scaling: float | None) -> Sparse:
    architecture, norm = cfg["architecture"], cfg.get("normalize_activations") or "none"
    if str(norm) not in NORMS:
        refuse(folder, f"made for activations under {norm!r}", "fold the normalisation into the weights with SAELens first")
    if scaling is not None and norm != "expected_average_only_in":
        refuse(folder, f"made for activations under {norm!r}, to be read with scaling=", "leave out scaling=")
    if norm == "expected_average_only_in" and scaling is None:
        refuse(
            folder,
            f"made for activations under {norm!r} times a number that the files do not hold",
            "say it, scaling=root(width) / mean length; scaling=1 reads as SAELens does",
        )
    names = TENSORS[architecture]
    found: dict[str, Any] = {ours: _part(tensors, ours, theirs) for ours, theirs in names.items()}
    claimed = {key: cfg.get(key) for key in ("d_sae", "d_in", "d_out")}
    sides = {"d_sae": len(found["encoder"]), "d_in": found["encoder"].shape[1], "d_out": found["decoder"].shape[1]}
    if wrong := [f"{key} {claimed[key]!r:.20}" for key in sides if claimed[key] not in (None, sides[key])]:
        raise CorruptBank(f"{FILES[0]} of {folder.name!r} claims {', '.join(wrong)}, its tensors have {sides}")
    if norm == "expected_average_only_in" and scaling not in (None, 1):
        found = _scaled(folder, found, scaling)
    transcodes = architecture not in KINDS
    if transcodes and (NORMS[norm] or cfg.get("apply_b_dec_to_input")):
        refuse(folder, f"a transcoder under {norm!r} or with its bias taken off its input", "fold it into the weights first")
    if transcodes:
        found.setdefault("threshold", torch.zeros(len(found["encoder"])))
        return Transcoder(**found)
    others: dict[str, Any] = {"centred": bool(cfg.get("apply_b_dec_to_input", True)), "norm": NORMS[norm]}
    if architecture == "topk":
        others["k"] = files.whole(cfg, "k")
        others["rescaled"] = bool(cfg.get("rescale_acts_by_decoder_norm"))
    return KINDS[architecture](**found, **others)


def _scaled(folder: Path, found: Mapping[str, Any], by: float) -> dict[str, Any]:
    """Weights that were trained on activations times a number, for the activations themselves."""
    if not (isinstance(by, int | float) and 0 < by < inf):
        refuse(folder, f"to be read with scaling={by!r:.40}", "give a positive number")
    changed = {"encoder": found["encoder"] * by, "decoder": found["decoder"] / by, "decoder_bias": found["decoder_bias"] / by}
    return {**found, **changed}


def _part(tensors: Mapping[str, Tensor], ours: str, theirs: str) -> Tensor:
    if ours in TURNED:
        return files.turned(tensors, theirs)
    return files.part(tensors, theirs, 2 if ours in ("decoder", "skip") else 1)


# -- writing -------------------------------------------------------------------------------------------------


def write(source: ConceptBank | Encoder, folder: str | Path, *, site: str = "", reads: str = "", model: str = "") -> list[Path]:
    """Write an encoder, or each of a bank in a folder of its own where there are several, as SAELens does.

    What was read from SAELens is written back bit by bit, but a TopK that counts in lengths of its decoder rows, which is
    written as the same code in rows of length 1, and weights into which
    something was folded when they were read. `site`, `reads` and `model` are for an encoder alone.
    """
    if isinstance(source, Encoder):
        return [_write(source, Path(folder), {}, _metadata(site, reads, model))]
    if bound := [c.name for c in source.concepts.values() if c.gate is not None or c.match_norm or c.keep_norm]:
        raise BadBank(
            f"SAELens has no gates and no matched or kept norms, and {bound[0]!r} has; write encoders alone: bank.encoder(id)"
        )
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
