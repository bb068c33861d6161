"""What SAELens writes in `cfg.json`: which settings readings depend on, which not, and what older files call them."""

import re
from collections.abc import Mapping
from typing import Any

from ..bank import trust
from ..errors import CorruptBank
from .table import Table

SETTINGS_FILE = "cfg.json"
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
OWN = "steerlib"
"""The part of `metadata` that only steerlib writes."""
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
METADATA = Table(read=f"{MODEL} {OWN}", aside=ABOUT, only={"hook_head_index_out": (None,)})
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


def parsed(text: str, said: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`cfg.json` in the words of version 6; `said` is what a list of releases says in its place."""
    cfg = trust.strict_json(text.encode(), SETTINGS_FILE)
    if not isinstance(cfg, dict):
        raise CorruptBank(f"expected an object in {SETTINGS_FILE}, got {type(cfg).__name__}")
    cfg |= said or {}
    if not isinstance(cfg.get("metadata"), dict):
        cfg = _before_6(cfg)
    cfg["metadata"] = {**cfg["metadata"], **{key: value for key, value in (said or {}).items() if key in METADATA.read}}
    objects = (cfg.get("activation_fn_kwargs"), cfg["metadata"].get("model_from_pretrained_kwargs"))
    if not all(isinstance(given, dict | None) for given in objects):
        raise CorruptBank(f"expected arguments as JSON objects in {SETTINGS_FILE}, got {objects!r:.200}")
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
