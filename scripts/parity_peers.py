"""What each peer makes of its own files, for `parity.py`: codes and outputs of encoders, logits of models it steers."""

# pyright: reportMissingImports=false
import importlib
import json
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import steerlib as sl
from steerlib.readers import lm_eval as lm_eval_files
from steerlib.readers import repeng as repeng_files

CHECKOUTS = Path("checkouts")
"""Where clones of those lie that are no packages."""
D, N, K, WIDTH = 6, 12, 3, 8
Peer = tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""Format, codes and outputs."""
CASES: dict[str, Callable[[Path], Peer]] = {}


def whole(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).float()


def given_whole_weights(module: nn.Module) -> Any:
    """Weights whose sums are exact, so that ties are ties."""
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.copy_(whole(*tensor.shape).abs() if name == "threshold" else whole(*tensor.shape))
            if name in ("W_dec", "decoder.weight"):  # a row of zeros has no length
                tensor[tensor == 0] = 1
    return module


# -- SAELens -------------------------------------------------------------------------------------------------

SAELENS = {
    "standard": {},
    "standard-layer-norm": {"normalize_activations": "layer_norm"},
    "standard-rescaled": {"normalize_activations": "constant_norm_rescale"},
    "standard-average": {"normalize_activations": "expected_average_only_in"},
    "standard-uncentred": {"apply_b_dec_to_input": False},
    "standard-bfloat16": {"dtype": "bfloat16"},
    "topk": {"k": K},
    "topk-lengths": {"k": K, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {},
    "gated": {},
    "transcoder": {"d_out": 4, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": 4, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": 4, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": 4, "apply_b_dec_to_input": False},
}
TRAINED = {
    "batchtopk": {"k": K},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [4, N], "rescale_acts_by_decoder_norm": False},
}


def saelens(name: str, settings: dict[str, Any], folder: Path) -> Peer:
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_class(name.partition("-")[0])
    hooks = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
    metadata = SAEMetadata(model_name="gpt2", **(hooks if "d_out" in settings else {"hook_name": "blocks.3.hook_resid_post"}))
    given_whole_weights(sae_class(config_class(d_in=D, d_sae=N, metadata=metadata, **settings))).save_model(folder)
    sae = SAE.load_from_disk(folder)
    return "saelens", sae.encode, sae


def saelens_trained(name: str, settings: dict[str, Any], folder: Path) -> Peer:
    from sae_lens import SAE
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_training_class(name)
    metadata = SAEMetadata(model_name="gpt2", hook_name="blocks.3.hook_resid_pre")
    sae = given_whole_weights(sae_class(config_class(d_in=D, d_sae=N, metadata=metadata, **settings)))
    sae.topk_threshold.fill_(2.0)
    sae.save_inference_model(folder)
    loaded = SAE.load_from_disk(folder)
    return "saelens", loaded.encode, loaded


for name, settings in SAELENS.items():
    CASES[f"saelens-{name}"] = lambda folder, n=name, s=settings: saelens(n, s, folder)
for name, settings in TRAINED.items():
    CASES[f"saelens-{name}"] = lambda folder, n=name, s=settings: saelens_trained(n, s, folder)


# -- sparsify, and what grew from it -------------------------------------------------------------------------


def dense(indices: Tensor, values: Tensor) -> Tensor:
    return values.new_zeros(len(values), N).scatter(-1, indices, values)


def sparsify_coder(width: int, **settings: Any) -> Any:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    return SparseCoder(width, SparseCoderConfig(num_latents=N, k=K, **settings))


def sparsify(folder: Path, **settings: Any) -> Peer:
    from sparsify import SparseCoder

    given_whole_weights(sparsify_coder(D, **settings)).save_to_disk(folder / "layers.3.mlp")
    coder = SparseCoder.load_from_disk(folder / "layers.3.mlp")

    def codes(x: Tensor) -> Tensor:
        found = coder.encode(x)
        return dense(found.top_indices, found.top_acts)

    return "sparsify", codes, lambda x: coder(x).sae_out


CASES["sparsify-topk"] = lambda folder: sparsify(folder)
CASES["sparsify-transcoder"] = lambda folder: sparsify(folder, transcode=True)
CASES["sparsify-skip-transcoder"] = lambda folder: sparsify(folder, transcode=True, skip_connection=True)


def checkout(repository: str, file: str) -> Any:
    """A module of a repository that is no package."""
    path = CHECKOUTS / repository / file
    if not path.is_file():
        raise ImportError(f"no {repository}/{file} in --checkouts")
    root = str(CHECKOUTS / repository)
    name = file.removesuffix(".py").replace("/", ".")
    for known in [module for module in sys.modules if module.split(".")[0] == name.split(".")[0]]:
        del sys.modules[known]
    sys.path.insert(0, root)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(root)


def saeuron(folder: Path, **settings: Any) -> Peer:
    module = checkout("SAeUron", "SAE/sae.py")
    sae = given_whole_weights(module.Sae(D, module.SaeConfig(num_latents=N, k=K, **settings)))
    sae.save_to_disk(folder / "unet.up_blocks.1.attentions.1")
    sae = module.Sae.load_from_disk(folder / "unet.up_blocks.1.attentions.1")

    def codes(x: Tensor) -> Tensor:
        found = sae.select_topk(sae.pre_acts(sae.preprocess_input(x[None])[0]))
        return dense(found.top_indices, found.top_acts)

    return "saeuron", codes, lambda x: sae(x[None]).sae_out


CASES["saeuron"] = lambda folder: saeuron(folder, batch_topk=True)
CASES["saeuron-unit-norm"] = lambda folder: saeuron(folder, input_unit_norm=True)


def unbox(repository: str, file: str, block: str, folder: Path, **settings: Any) -> Peer:
    module = checkout(repository, file)
    arguments = {"n_dirs_local": N, "d_model": D, "k": K, "auxk": 4, "dead_steps_threshold": 10, **settings}
    folder = folder / f"{block}_k{K}_hidden{N}_auxk4_bs8_lr0.0001" / "final"
    given_whole_weights(module.SparseAutoencoder(**arguments)).save_to_disk(str(folder))
    sae = module.SparseAutoencoder.load_from_disk(str(folder))
    return "sdxl-unbox", sae.encode, lambda x: sae(x)[0]


CASES["sdxl-unbox"] = lambda folder: unbox("sdxl-unbox", "SAE/sae.py", "unet.down_blocks.2.attentions.1", folder)
CASES["concept-steerers"] = lambda folder: unbox(
    "steerers", "training/k_sparse_autoencoder.py", "text_encoder.text_model.encoder.layers.9", folder, auxk_coef=0.03125
)


# -- dictionary_learning -------------------------------------------------------------------------------------


def dictionary_learning(name: str, folder: Path, **settings: Any) -> Peer:
    from dictionary_learning import dictionary, utils
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    modules = (dictionary, top_k, batch_top_k, matryoshka_batch_top_k)
    cls = next(getattr(module, name) for module in modules if name in vars(module))
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": N, "layer": 3, "lm_name": "EleutherAI/pythia-70m"}
    folder.mkdir(parents=True, exist_ok=True)
    config = {"trainer": trainer | ({"k": K} if "k" in settings else {}), "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    coder = given_whole_weights(cls(D, N, **settings))
    if "k" in settings:
        coder.threshold.fill_(2.0)
    torch.save(coder.state_dict(), folder / "ae.pt")
    loaded, _ = utils.load_dictionary(str(folder), "cpu")
    return "dictionary-learning", loaded.encode, loaded


CASES |= {
    f"dictionary_learning-{name}": lambda folder, n=name, s=settings: dictionary_learning(n, folder, **s)
    for name, settings in {
        "AutoEncoder": {},
        "AutoEncoderNew": {},
        "GatedAutoEncoder": {},
        "JumpReluAutoEncoder": {},
        "AutoEncoderTopK": {"k": K},
        "BatchTopKSAE": {"k": K},
        "MatryoshkaBatchTopKSAE": {"k": K, "group_sizes": [4, N - 4]},
    }.items()
}


# -- layouts that SAELens reads, and no package here writes --------------------------------------------------


def gemma_scope(folder: Path) -> Peer:
    """In the documented layout; SAELens reads `params.npz` under its own names."""
    from sae_lens import SAE

    place = folder / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_71"
    place.mkdir(parents=True)
    arrays = {"W_enc": whole(D, N), "b_enc": whole(N), "W_dec": whole(N, D), "b_dec": whole(D), "threshold": whole(N).abs()}
    plain: Any = {name: tensor.numpy() for name, tensor in arrays.items()}
    np.savez(place / "params.npz", **plain)
    sae = SAE.from_dict({"architecture": "jumprelu", "d_in": D, "d_sae": N, "apply_b_dec_to_input": False, "metadata": {}})
    with np.load(place / "params.npz") as archive:
        sae.load_state_dict({name: torch.tensor(archive[name]) for name in archive.files})
    return "gemma-scope", sae.encode, sae


def gemma_scope_2(folder: Path) -> Peer:
    """In the documented layout, a transcoder with a linear part."""
    from sae_lens.saes import JumpReLUSkipTranscoder

    config = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-1b-pt",
        "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output",
        "affine_connection": True,
    }
    arrays = {"w_enc": whole(D, N), "b_enc": whole(N), "w_dec": whole(N, D), "b_dec": whole(D), "threshold": whole(N).abs()}
    arrays["affine_skip_connection"] = whole(D, D)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    own = {"architecture": "jumprelu_skip_transcoder", "d_in": D, "d_sae": N, "d_out": D, "apply_b_dec_to_input": False}
    sae = JumpReLUSkipTranscoder.from_dict({**own, "metadata": {}})
    state = {name.replace("w_", "W_"): tensor for name, tensor in arrays.items() if "affine" not in name}
    sae.load_state_dict({**state, "W_skip": arrays["affine_skip_connection"].T.contiguous()})
    return "gemma-scope-2", sae.encode, sae


CASES |= {"gemma-scope": gemma_scope, "gemma-scope-2": gemma_scope_2}


# -- vectors, compared by what they do to a model ------------------------------------------------------------


def tiny() -> Any:
    """A Llama of a few thousand weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {
        "hidden_size": WIDTH,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 16,
    }
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(10)[None]).logits


def steered(model: Any, bank: Any, edits: Any) -> Tensor:
    with sl.steer(model, bank, edits):
        return logits(model)


def beside(folder: Path) -> Path:
    """Where what a peer made of a folder's files is kept."""
    return folder.with_name(f"{folder.name}.safetensors")


def repeng(folder: Path) -> str:
    numpy: Any = np
    numpy.float_ = np.float64  # a name of NumPy 1, of which repeng 0.4.0 makes an annotation
    from repeng import ControlModel, ControlVector

    model, folder = tiny(), folder / "repeng"
    vector = ControlVector("llama", {layer: torch.randn(WIDTH).numpy() for layer in (1, 2, 3)})
    folder.mkdir(parents=True, exist_ok=True)
    vector.export_gguf(folder / "calm.gguf")
    bank = sl.read_bank(folder / "calm.gguf", base=model)
    ours = steered(model, bank, {"calm": 1.5})
    repeng_files.write(bank, "calm", folder / "again.gguf")
    same = (folder / "again.gguf").read_bytes() == (folder / "calm.gguf").read_bytes()
    back = ControlVector.import_gguf(folder / "again.gguf") == vector
    (folder / "again.gguf").unlink()
    control = ControlModel(model, [1, 2, 3])
    control.set_control(vector, 1.5)
    save_file(
        {f"calm@layers.{layer}": torch.tensor(row) for layer, row in vector.directions.items()},
        beside(folder),
        {"format": "repeng"},
    )
    return f"logits {float((logits(control) - ours).abs().max()):.1e}  repeng reads ours {back}  same bytes {same}"


def svec(folder: Path) -> str:
    vectors = checkout("activation-steering", "activation_steering/steering_vector.py")
    leash = sys.modules["activation_steering.leash_layer"].LeashLayer
    model, folder = tiny(), folder / "svec"
    vector = vectors.SteeringVector("llama", {layer: torch.randn(WIDTH).numpy() for layer in (1, 2)}, {1: 0.5, 2: 0.5})
    vector.save(str(folder / "refuse.svec"))
    ours = steered(model, sl.read_bank(folder / "refuse.svec", base=model), {"refuse": 1.5})
    for layer, row in vector.directions.items():
        model.model.layers[layer] = leash(model.model.layers[layer], layer)
        model.model.layers[layer].attention_type = "full_attention"
        model.model.layers[layer].steer(torch.tensor(1.5 * row)[None], torch.eye(WIDTH), use_ooi_preventive_normalization=False)
    leash.condition_layers, leash.behavior_layers = dict.fromkeys(range(4), False), {1: True, 2: True}
    rows = {f"refuse@layers.{layer}.in": torch.tensor(row) for layer, row in vector.directions.items()}
    save_file(rows, beside(folder), {"format": "svec"})
    return f"logits {float((logits(model) - ours).abs().max()):.1e}"


def lm_eval(folder: Path, kind: str) -> str:
    from lm_eval.models import hf_steered
    from transformers import PreTrainedTokenizerFast

    model, folder = tiny(), folder / f"lm-eval-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "csv":
        encoder = given_whole_weights(sparsify_coder(WIDTH))
        encoder.save_to_disk(folder / "coders" / "layers.1")
        rows = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,sae_id,description\n"
        (folder / "steer.csv").write_text(f"{rows}sparsify,clamp,coders,layers.1,3,2.5,,,calm\n")
    else:
        rows = {"layers.1": ("clamp", 2.5), "layers.2": ("add", -1.5), "layers.3.mlp": ("add", 2.0)}
        saved = {
            hook: {"steering_vector": torch.randn(WIDTH), "steering_coefficient": value, "action": action}
            | ({"bias": torch.randn(WIDTH)} if action == "clamp" else {})
            for hook, (action, value) in rows.items()
        }
        torch.save(saved, folder / "steer.pt")
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.pad_token = tokenizer.eos_token = "a"
    steered_model: Any = hf_steered.SteeredModel
    with chdir(folder):
        peer: Any = steered_model(model, f"steer.{kind}", tokenizer=tokenizer, device="cpu")
        bank = sl.read_bank(f"steer.{kind}", "lm-eval", base=model)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        theirs = peer.forward(input_ids=tokens).logits
    save_file({"tokens": tokens, "logits": theirs, **model.state_dict()}, beside(folder), {"format": "lm-eval"})
    return f"logits {float((steered(model, bank, lm_eval_files.edits(bank)) - theirs).abs().max()):.1e}"


VECTORS: dict[str, Callable[[Path], str]] = {
    "repeng": repeng,
    "svec": svec,
    "lm-eval-csv": lambda folder: lm_eval(folder, "csv"),
    "lm-eval-pt": lambda folder: lm_eval(folder, "pt"),
}
