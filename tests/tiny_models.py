"""Every architecture of transformers at toy size: the library's own classes, random weights, no network.

A configuration is shrunk by the names of its fields, which transformers shares between families. What that rule cannot
know (a size that must follow from others, a list that must name both kinds of layer) is in `GIVEN`, one line a family.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES: dict[int, str] = {
    0: "pad_token_id decoder_start_token_id num_kv_shared_layers",
    1: "bos_token_id n_group topk_group attn_layer_offset indexer_kv_heads num_codebooks",
    2: """eos_token_id num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers num_key_value_heads attn_layer_period num_experts_per_tok num_experts_per_token moe_topk moe_k
        n_shared_experts""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts
        mamba_n_heads linear_num_heads linear_num_key_heads linear_num_value_heads index_n_heads indexer_n_heads rotary_dim
        time_step_rank ngram_size split_ngram_parts""",
    8: """head_dim d_kv dim_head attention_head_size qk_nope_head_dim qk_rope_head_dim v_head_dim linear_head_dim
        linear_key_head_dim linear_value_head_dim index_head_dim indexer_head_dim indexer_compress_ratio state_size
        mamba_d_state chunk_size mamba_chunk_size hidden_size_per_layer_input""",
    16: "q_lora_rank kv_lora_rank mamba_d_head sliding_window indexer_budget index_topk",
    32: """hidden_size n_embd d_model dim emb_dim embed_dim embedding_dim embedding_size hidden_dim word_embed_proj_dim
        moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_experts_intermediate_size
        attention_hidden_size lru_width mamba_d_ssm shape_embed_dim pronunciation_embed_dim ple_embed_dim""",
    64: """intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner dff ffn_hidden_size
        max_position_embeddings n_positions max_seq_len n_ctx""",
    128: """vocab_size vocab_size_per_layer_input shape_vocab_size pronunciation_vocab_size encoder_hash_byte_group_vocab
        ngram_vocab_size_base""",
}
"""Field names by toy size."""
TINY = {name: size for size, names in SIZES.items() for name in names.split()} | {"is_decoder": True}

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"fill": True},
    {"fill": True, "num_key_value_heads": 4},
)
"""Tried in turn: as the family has it; without grouped queries; with sizes given that it leaves at None; both."""

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
ZAMBA = {"attention_hidden_size": 64, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
GIVEN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "falcon_h1": {"mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8), "attn_layers": ("local", "lsh")},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA,
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beyond the rule."""

MOST = 5_000_000


class CannotBuild(Exception):
    """No variant of this architecture's toy configuration builds and runs here; says why."""


def tiny(model_type: str, auto: Any = AutoModelForCausalLM, **given: Any) -> Any:
    """A model of this type with fewer than 5 million parameters, seeded, in evaluation mode."""
    reasons = []
    for variant in VARIANTS:
        try:
            return _built(model_type, auto, variant | GIVEN.get(model_type, {}) | given)
        except Exception as error:  # whatever a foreign class raises
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split()):.160}")
    raise CannotBuild(f"{model_type}: {reasons[0]}")


def _built(model_type: str, auto: Any, given: dict[str, Any]) -> Any:
    cls = auto._model_mapping[CONFIG_MAPPING[model_type]]
    config = CONFIG_MAPPING[model_type]()
    if not isinstance(config, cls.config_class):  # the decoder of a larger model
        config = cls.config_class()
    config = shrunk(config, **given)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > MOST:
        raise ValueError(f"{size:,} parameters at toy size")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = cls(config).eval()
    ids = torch.arange(3, 13).view(2, 5)
    with torch.no_grad():
        model(ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {}))
    return model


def shrunk(config: Any, *, fill: bool = False, sizes: dict[str, Any] = TINY, **given: Any) -> Any:
    """The same configuration with toy sizes at every depth and one layer of each kind; `fill` gives sizes left at None."""
    fields = vars(config)
    new: dict[str, Any] = {
        n: sizes[n] for n, old in fields.items() if n in sizes and (isinstance(old, int) or (fill and old is None))
    }
    for name in ("layer_types", "layers_block_type"):
        if isinstance(fields.get(name), list):
            kinds = list(dict.fromkeys(fields[name]))
            new[name] = kinds if len(kinds) > 1 else kinds * 2
            new["num_hidden_layers"] = len(new[name])
    new |= {name: value for name, value in given.items() if name in fields}
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    new |= {name: shrunk(part, fill=fill, sizes=sizes, **given) for name, part in parts.items() if part is not None}
    return type(config)(**new)


WORDS = """? . the sun moon rises falls slowly now why red blue tea cup yes stone bird sings here there old new house garden
    door river boat walks runs sleeps green white black cold warm rain snow wind hill road town bread milk salt fish tree leaf
    song drum book page glass lamp chair table""".split()  # noqa: SIM905


def toy_writer() -> Any:
    """A toy model of the toy tokenizer's words whose answers are as long as they may be."""
    model = tiny("llama", vocab_size=len(WORDS) + 3)
    model.generation_config.eos_token_id = None
    return model


def toy_tokenizer() -> Any:
    """A token a word; what it does not know is the first word. Requests end in a full stop."""
    words = models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | {f"▁{w}": i + 3 for i, w in enumerate(WORDS)}, unk_token="▁?")
    tokenizer: Any = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    template = "{% for m in messages %}{{ m['content'] }} . {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
