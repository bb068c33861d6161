"""Other libraries' files: what a reader makes of them computes what the library computed; nothing in them is run."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny

import steerlib as sl
from steerlib.bank.concept_bank import SiteFacts
from steerlib.bank.concepts import Concept
from steerlib.encoders import BatchTopK, Directions, JumpReLU, Matryoshka, ReLU, TopK, Transcoder
from steerlib.errors import BadBank, CorruptBank, SteeringWarning, UnknownFormat, UnknownSite, WrongWidth
from steerlib.readers import FORMATS, hookpoints, lm_eval, repeng, saelens
from steerlib.readers.foreign import Foreign, Found

FOREIGN = Path(__file__).parent / "fixtures" / "foreign"
KEPT = sorted(FOREIGN.glob("*.safetensors"))
"""What the libraries themselves made of the files beside it (scripts/parity.py)."""


def format_of(kept):
    with safe_open(kept, "pt") as file:
        return file.metadata()["format"]


ENCODERS = [kept for kept in KEPT if format_of(kept) not in ("repeng", "svec", "lm-eval")]
SAELENS = [kept for kept in ENCODERS if format_of(kept) == "saelens"]


def options_of(kept) -> Any:
    """What the files leave open."""
    return {"scaling": 1} if "average" in kept.stem else {}


def only(bank) -> Any:
    (id,) = bank.encoders
    return bank.encoder(id)


def named(kept):
    return pytest.mark.parametrize("kept", kept, ids=lambda path: path.stem)


# -- against the libraries' own files and outputs -----------------------------------------------------------------


@named(ENCODERS)
def test_codes_and_outputs_are_those_of_the_library_that_wrote_the_files(kept):
    encoder, peer = only(sl.read_bank(kept.with_suffix(""), format_of(kept), **options_of(kept))), load_file(kept)
    rounded = "bfloat16" in kept.stem  # the library computes in bfloat16 too
    for kind in ("whole", "real"):
        if rounded and kind == "real":
            continue
        z = encoder.encode(peer[f"{kind}.x"])
        torch.testing.assert_close(z, peer[f"{kind}.z"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder.reconstruct(peer[f"{kind}.x"]), peer[f"{kind}.y"], rtol=2e-5, atol=2e-5)


def is_exact(kept):
    folded = ("norm", "rescaled", "lengths", "gated", "Gated", "-AutoEncoder.", "saelens-batchtopk")
    return not any(word in f"{kept.stem}." for word in folded)


@named([kept for kept in ENCODERS if is_exact(kept)])
def test_on_whole_numbers_codes_are_the_same_bits_also_where_a_potential_equals_its_threshold(kept):
    encoder, peer = only(sl.read_bank(kept.with_suffix(""), format_of(kept), **options_of(kept))), load_file(kept)
    ties = encoder.potential(peer["whole.x"]) == encoder.thresholds()
    assert ties.any() and torch.equal(encoder.encode(peer["whole.x"]), peer["whole.z"])


@named(KEPT)
def test_the_format_is_found_out_and_the_bank_survives_a_disk(kept, tmp_path):
    folder = kept.with_suffix("")
    source = next(p for p in folder.glob("steer.*")) if format_of(kept) == "lm-eval" else folder
    options: Any = {"models": {"coders": folder / "coders"}} if source.suffix == ".csv" else options_of(kept)
    bank = sl.read_bank(source, **options)
    assert bank.provenance["format"] == format_of(kept)
    again = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank"))
    again.verify()
    for id in bank.encoders:
        name = f"{id}/1" if bank.encoder(id).rows([0]).is_sparse else next(iter(bank))
        (*ours, norm), (*stored, again_norm) = bank.rows(bank[name]), again.rows(again[name])
        torch.testing.assert_close(stored, ours)
        assert norm == again_norm


@named(SAELENS)
@pytest.mark.parametrize("through", ["memory", "disk"])
def test_saelens_files_return_bit_by_bit(kept, through, tmp_path):
    bank = sl.read_bank(kept.with_suffix(""), "saelens", **options_of(kept))
    if through == "disk":
        bank = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank"))
    (folder,) = saelens.write(bank, tmp_path / "again")
    for name in saelens.FILES:
        assert (folder / name).read_bytes() == (kept.with_suffix("") / name).read_bytes()


def kinds():
    torch.manual_seed(0)
    tensors: Any = {"encoder": torch.randn(6, 4), "bias": torch.randn(6), "decoder": torch.randn(6, 4)}
    biased: Any = {**tensors, "decoder_bias": torch.randn(4)}
    yield ReLU(**tensors)
    yield TopK(**biased, k=2, centred=True)
    yield JumpReLU(**biased, threshold=torch.rand(6), norm="layer")
    yield BatchTopK(**biased, k=2, threshold=0.5)
    yield Matryoshka(**biased, k=2, threshold=0.5, groups=[2, 4])
    yield Transcoder(**biased, threshold=torch.rand(6), skip=torch.randn(4, 4))


@pytest.mark.parametrize("encoder", [*kinds()], ids=lambda encoder: encoder.kind)
def test_our_own_encoders_are_written_for_saelens_and_read_back(encoder, tmp_path):
    reads = "layers.2.mlp.in" if encoder.kind == "transcoder" else ""
    saelens.write(encoder, tmp_path / "sae", site="layers.2.mlp", reads=reads, model="gpt2")
    bank = sl.read_bank(tmp_path / "sae")
    assert bank.encoders["layers.2.mlp"].reads == reads
    x = torch.randn(8, 4)
    assert bank.base.id == "gpt2"
    assert torch.equal(only(bank).encode(x), encoder.encode(x))
    assert torch.equal(only(bank).reconstruct(x), encoder.reconstruct(x))


def test_what_saelens_has_no_place_for_is_not_written(tmp_path):
    transcoder: Any = [*kinds()][-1]
    transcoder.k = 2
    for encoder in (Directions(torch.eye(2)), transcoder):
        with pytest.raises(BadBank, match="SAELens has no"):
            saelens.write(encoder, tmp_path / "sae")


# -- layouts that no library here writes: an independent formula --------------------------------------------------


def test_llama_scope_reads_raw_activations_as_its_library_reads_scaled_ones(tmp_path):
    torch.manual_seed(0)
    E, b, W, c = torch.randn(8, 4), torch.randn(8), torch.randn(4, 8), torch.randn(4)
    names = {"encoder.weight": E, "encoder.bias": b, "decoder.weight": W, "decoder.bias": c}
    params = {
        "d_model": 4, "act_fn": "jumprelu", "jump_relu_threshold": 0.75, "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 29.0, "out": 3.0},
        "hook_point_in": "blocks.5.mlp.hook_in", "hook_point_out": "blocks.5.hook_mlp_out",
    }  # fmt: skip
    (tmp_path / "checkpoints").mkdir()
    save_file(names, tmp_path / "checkpoints" / "final.safetensors")
    (tmp_path / "hyperparams.json").write_text(json.dumps(params))
    bank = sl.read_bank(tmp_path)
    assert bank.encoders["layers.5.mlp"].reads == "layers.5.mlp.in"
    x, s_in, s_out = 20 * torch.randn(16, 4), 2 / 29.0, 2 / 3.0
    length = (W * s_in / s_out).norm(dim=0)  # of decoder rows; latents are counted in rows of length 1
    p = ((x * s_in) @ E.T + b) / s_in * length
    kept = torch.where(p > 0.75, p, 0)
    assert (kept > 0).any() and not torch.equal(kept > 0, p > 0)
    torch.testing.assert_close(only(bank).encode(x), kept)
    torch.testing.assert_close(only(bank).reconstruct(x), (kept * s_in / length) @ W.T / s_out + c / s_out)
    (tmp_path / "hyperparams.json").write_text(json.dumps({**params, "sparsity_include_decoder_norm": False}))
    p = ((x * s_in) @ E.T + b) / s_in
    torch.testing.assert_close(only(sl.read_bank(tmp_path)).encode(x), torch.where(p > 0.75, p, 0))


def gemma(folder, D=4, **more):
    torch.manual_seed(0)
    arrays = {"W_enc": torch.randn(D, 8), "b_enc": torch.randn(8), "W_dec": torch.randn(8, D), "b_dec": torch.randn(D)}
    folder.mkdir(parents=True)
    arrays |= {"threshold": torch.rand(8)}
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in arrays.items()}, **more)
    return arrays


@pytest.mark.parametrize(("place", "site"), [("res", "layers.7"), ("mlp", "layers.7.mlp"), ("att", "layers.7.attn.heads")])
def test_gemma_scope_says_where_it_belongs_by_the_names_of_its_folders(place, site, tmp_path):
    gemma(tmp_path / f"gemma-scope-9b-it-{place}" / "layer_7" / "width_16k" / "average_l0_9")
    bank = sl.read_bank(tmp_path / f"gemma-scope-9b-it-{place}", folder="layer_7")
    assert list(bank.encoders) == [site] and bank.base.id == "google/gemma-2-9b-it"


def test_gemma_scope_widths_of_one_layer_are_told_apart(tmp_path):
    for width in ("width_16k", "width_65k"):
        gemma(tmp_path / "gemma-scope-2b-pt-res" / "layer_7" / width / "average_l0_9")
    ids = set(sl.read_bank(tmp_path, "gemma-scope").encoders)
    assert ids == {"layers.7#width_16k-average_l0_9", "layers.7#width_65k-average_l0_9"}


def test_gemma_scope_embeddings_are_read_behind_the_factor(tmp_path):
    a = gemma(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_9")
    embeddings, e = only(sl.read_bank(tmp_path)), torch.randn(16, 4)
    p = e @ a["W_enc"] + a["b_enc"]
    z = torch.where(p > a["threshold"], p, 0)
    torch.testing.assert_close(embeddings.encode(2 * e), z)  # width 4: the factor is 2
    torch.testing.assert_close(embeddings.reconstruct(2 * e), 2 * (z @ a["W_dec"] + a["b_dec"]))


def test_gemma_scope_transcoders_ask_where_the_normalised_input_is(tmp_path):
    gemma(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_7" / "width_16k" / "average_l0_9")
    with pytest.raises(UnknownSite, match="reads="):
        sl.read_bank(tmp_path)
    bank = sl.read_bank(tmp_path, reads="layers.7.mlp.in")
    assert bank.encoders["layers.7.mlp"].reads == "layers.7.mlp.in"


def test_saelens_before_version_6(tmp_path):
    torch.manual_seed(0)
    W, b, V, c = torch.randn(4, 8), torch.randn(8), torch.randn(8, 4), torch.randn(4)
    ones = torch.ones(8)
    save_file({"W_enc": W, "b_enc": b, "W_dec": V, "b_dec": c, "scaling_factor": ones}, tmp_path / "sae_weights.safetensors")
    cfg = {"hook_point": "blocks.1.hook_resid_pre", "d_in": 4, "d_sae": 8, "dtype": "float32", "model_name": "gpt2-small"}
    cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "normalize_activations": False}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.warns(SteeringWarning, match="does not say whether it was trained on gpt2-small with .* centred"):
        sl.read_bank(tmp_path)
    bank, x = sl.read_bank(tmp_path, centred=False), torch.randn(16, 4)
    p = (x - c) @ W + b
    z = torch.where(p >= p.topk(2).values[:, 1:], p, 0).clamp(min=0)
    torch.testing.assert_close(bank.encoder("layers.1.in").encode(x), z)


def test_an_autoencoder_of_dictionary_learning_may_keep_the_lengths_of_its_rows():
    folder = FOREIGN / "dictionary_learning-AutoEncoder"
    plain, state = only(sl.read_bank(folder, normalize_decoder=False)), torch.load(folder / "ae.pt", weights_only=True)
    unit = only(sl.read_bank(folder))
    assert torch.equal(plain.decoder, state["decoder.weight"].T)
    torch.testing.assert_close(unit.decoder.norm(dim=-1), torch.ones(12))


def test_encoders_of_updates_are_steered_in_mean_activations(tmp_path):
    folder = tmp_path / "unbox"
    shutil.copytree(FOREIGN / "sdxl-unbox", folder)
    (config,) = folder.rglob("config.json")
    mean = torch.rand(12)
    mean[0] = 0
    torch.save(mean, config.parent / "mean.pt")
    bank, site = sl.read_bank(folder), "unet.down_blocks.2.attentions.1.update"
    assert list(bank.encoders) == [site]
    assert bank[f"{site}/5"].unit == pytest.approx(float(mean[5])) and bank[f"{site}/0"].unit == 1.0


# -- vectors ------------------------------------------------------------------------------------------------------


@named([kept for kept in KEPT if format_of(kept) in ("repeng", "svec")])
def test_a_vector_for_each_layer_is_one_concept_that_moves_them_all(kept):
    bank, peer = sl.read_bank(kept.with_suffix("")), load_file(kept)
    (concept,) = bank.concepts.values()
    moved = {f"{concept.name}@{bank.site_of(p)}": p.unit * bank.rows(p).write[0] for p in concept.places}
    assert moved.keys() == peer.keys()
    for name, vector in peer.items():
        assert torch.equal(moved[name], vector)


def test_control_vectors_return_bit_by_bit(tmp_path):
    bank = sl.read_bank(FOREIGN / "repeng")
    repeng.write(bank, "calm", tmp_path / "calm.gguf")
    assert (tmp_path / "calm.gguf").read_bytes() == (FOREIGN / "repeng" / "calm.gguf").read_bytes()


def test_a_control_vector_is_what_one_unit_adds_after_blocks(tmp_path):
    directions = {"layers.0": Directions(torch.eye(4)), "layers.1.mlp": Directions(torch.eye(4))}
    concepts = [sl.Concept(name="a", encoder="layers.0", index=1, unit=3.0)]
    concepts.append(sl.Concept(name="b", encoder="layers.1.mlp", index=0))
    sites = {site: SiteFacts(width=4) for site in directions}
    bank = sl.ConceptBank("own", concepts, directions, base=sl.BaseModel(id="m"), sites=sites)
    back = sl.read_bank(repeng.write(bank, "a", tmp_path / "a.gguf"))
    assert torch.equal(back.rows(back["a"]).write[0], 3 * torch.eye(4)[1])
    with pytest.raises(BadBank, match="after blocks"):
        repeng.write(bank, "b", tmp_path / "b.gguf")


@named([kept for kept in KEPT if format_of(kept) == "lm-eval"])
def test_a_model_steered_by_lm_evals_files_gives_lm_evals_logits(kept):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 16,
    }
    model, peer = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)).eval(), load_file(kept)
    model.load_state_dict({name: tensor for name, tensor in peer.items() if name not in ("tokens", "logits")})
    folder = kept.with_suffix("")
    (file,) = folder.glob("steer.*")
    options: Any = {"models": {"coders": folder / "coders"}} if file.suffix == ".csv" else {}
    bank = sl.read_bank(file, base=model, **options)
    with torch.no_grad(), sl.steer(model, bank, lm_eval.edits(bank)):
        steered = model(input_ids=peer["tokens"]).logits
    torch.testing.assert_close(steered, peer["logits"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(input_ids=peer["tokens"]).logits, steered)


def test_lm_eval_names_what_it_cannot_find():
    with pytest.raises(BadBank, match="models="):
        sl.read_bank(FOREIGN / "lm-eval-csv" / "steer.csv", "lm-eval")


# -- strangers ----------------------------------------------------------------------------------------------------


class Attack:
    """Unpickled without care, it would touch a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_pickle(thing, path):
    path.write_bytes(pickle.dumps(thing))


@pytest.mark.parametrize(
    ("case", "file"),
    [
        ("dictionary_learning-BatchTopKSAE", "ae.pt"),
        ("sdxl-unbox", "state_dict.pth"),
        ("sdxl-unbox", "mean.pt"),
        ("concept-steerers", "state_dict.pth"),
        ("lm-eval-pt", "steer.pt"),
    ],
)
@pytest.mark.parametrize("save", [torch.save, write_pickle])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(case, file, save, tmp_path):
    shutil.copytree(FOREIGN / case, tmp_path / "there")
    place = next(iter((tmp_path / "there").rglob("config.json")), tmp_path / "there" / "x").parent / file
    touched = tmp_path / "touched"
    save({"state_dict": Attack(touched)}, place)
    with pytest.raises(CorruptBank, match="was not run"):
        sl.read_bank(place if case == "lm-eval-pt" else tmp_path / "there")
    assert not touched.exists()
    pickle.loads(pickle.dumps(Attack(touched)))
    assert touched.exists()  # it would have


def test_an_archive_with_objects_is_refused(tmp_path):
    gemma(tmp_path / "layer_1", more=np.array([Attack(tmp_path / "touched")], dtype=object))
    with pytest.raises(CorruptBank, match="plain arrays"):
        sl.read_bank(tmp_path, site="layers.1")
    assert not (tmp_path / "touched").exists()


def spoilt(tmp_path, change):
    folder = tmp_path / "sae"
    shutil.copytree(FOREIGN / "saelens-jumprelu", folder)
    cfg, tensors = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    change(cfg, tensors)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda cfg, t: cfg.update(architecture="abstopk"), UnknownFormat, "by magnitude"),
        (lambda cfg, t: cfg.update(architecture="matching_pursuit"), UnknownFormat, "one latent after another"),
        (lambda cfg, t: cfg.update(architecture="temporal"), UnknownFormat, "earlier tokens"),
        (lambda cfg, t: cfg.update(architecture="new"), UnknownFormat, "'new'"),
        (lambda cfg, t: cfg.update(normalize_activations="covariance_whitening"), UnknownFormat, "fold"),
        (lambda cfg, t: (cfg.update(architecture="topk", k="3"), t.pop("threshold")), CorruptBank, "'k'"),
        (lambda cfg, t: (cfg.update(architecture="topk", k=13), t.pop("threshold")), CorruptBank, "k=13"),
        (lambda cfg, t: cfg["metadata"].update(hook_name="blocks.1.attn.hook_q"), UnknownSite, "site="),
        (lambda cfg, t: cfg["metadata"].update(hook_name="../../etc/passwd"), CorruptBank, "hook point"),
        (lambda cfg, t: t.pop("threshold"), CorruptBank, "threshold"),
        (lambda cfg, t: t.update(W_dec=t["W_dec"][:3]), CorruptBank, "fit each other"),
        (lambda cfg, t: t.update(W_enc=t["W_enc"].double()), CorruptBank, "float64"),
        (lambda cfg, t: t.update(W_enc=t["W_enc"].long()), CorruptBank, "int64"),
        (lambda cfg, t: t.update(scaling_factor=2 * torch.ones(12)), UnknownFormat, "fine-tuned"),
    ],
)
def test_what_cannot_be_expressed_or_does_not_fit_is_refused_with_words(change, error, words, tmp_path):
    with pytest.raises(error, match=words):
        sl.read_bank(spoilt(tmp_path, change))


@pytest.mark.parametrize(
    ("case", "settings", "words"),
    [
        ("sparsify-topk", {"activation": "groupmax"}, "groupmax"),
        ("sparsify-topk", {"signed": True}, "signed"),
        ("dictionary_learning-AutoEncoder", {"trainer": {"dict_class": "CrossCoder"}}, "CrossCoder"),
        ("gemma-scope-2", {"architecture": "relu"}, "relu"),
    ],
)
def test_kinds_that_are_not_here_are_named(case, settings, words, tmp_path):
    shutil.copytree(FOREIGN / case, tmp_path / "there")
    file = next(path for path in (tmp_path / "there").rglob("*.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(UnknownFormat, match=words):
        sl.read_bank(tmp_path / "there")


def test_a_tensor_that_claims_more_values_than_it_has_is_refused(tmp_path):
    folder = tmp_path / "ae"
    shutil.copytree(FOREIGN / "dictionary_learning-AutoEncoderNew", folder)
    state = torch.load(folder / "ae.pt", weights_only=True)
    state["encoder.weight"] = torch.zeros(1).expand(1 << 24, 1 << 24)
    torch.save(state, folder / "ae.pt")
    with pytest.raises(CorruptBank, match="claims"):
        sl.read_bank(folder)


@pytest.mark.parametrize("name", ["x.gguf", "x.svec"])
def test_vectors_that_are_something_else_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"GGUF" + bytes(40) if name == "x.gguf" else b'{"directions": {"a": [1]}}')
    with pytest.raises(CorruptBank):
        sl.read_bank(tmp_path / name)


# -- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "site"),
    {
        "blocks.15.hook_resid_post": "layers.15",
        "blocks.15.hook_resid_pre": "layers.15.in",
        "blocks.15.hook_mlp_out": "layers.15.mlp",
        "blocks.15.hook_attn_out": "layers.15.attn",
        "blocks.15.attn.hook_z": "layers.15.attn.heads",
        "blocks.15.attn.hook_z#3": "layers.15.attn.heads.3",
        "blocks.15.mlp.hook_in": "layers.15.mlp.in",
        "hook_embed": "embed",
        "layers.5": "layers.5",
        "layers.5.mlp": "layers.5.mlp",
        "layers.5.attention": "layers.5.attn",
        "h.5": "layers.5",
        "embed_tokens": "embed",
        "model.layers.5.output": "layers.5",
        "model.layers.5.self_attn.o_proj.input": "layers.5.attn.heads",
        "model.layers.5.mlp.down_proj": "model.layers.5.mlp.down_proj",
        "model.layers.5.mlp.down_proj.input": "model.layers.5.mlp.down_proj.in",
        "unet.down_blocks.2.attentions.1": "unet.down_blocks.2.attentions.1",
        "text_encoder.text_model.encoder.layers.9": "text_encoder.text_model.encoder.layers.9",
    }.items(),
)
def test_hook_points_in_our_names(hook, site):
    assert hookpoints.site(hook) == site


@pytest.mark.parametrize("site", ["layers.3", "layers.3.in", "layers.3.mlp", "layers.3.attn", "layers.3.attn.heads", "embed"])
def test_our_names_as_hook_points(site):
    assert hookpoints.site(hookpoints.tensor(site)) == site


def test_a_user_says_where_an_encoder_belongs_and_to_what(llama):
    bank = sl.read_bank(FOREIGN / "saelens-standard", site="layers.1.mlp", base="org/model")
    assert list(bank.encoders) == ["layers.1.mlp"] and bank.base.id == "org/model"
    assert sl.read_bank(FOREIGN / "saelens-standard", base=llama).base.fingerprint["hidden_size"] == 32


def test_formats_are_listed_where_none_or_several_fit(tmp_path):
    with pytest.raises(UnknownFormat, match="dictionary-learning, gemma-scope"):
        sl.read_bank(tmp_path)
    for case in ("sparsify-topk", "svec"):
        shutil.copytree(FOREIGN / case, tmp_path / "both", dirs_exist_ok=True)
    with pytest.raises(UnknownFormat, match="sparsify and svec would fit"):
        sl.read_bank(tmp_path / "both")
    with pytest.raises(UnknownFormat, match="got None"):
        sl.read_bank("org/not-there")
    with pytest.raises(UnknownFormat, match="'pickle'"):
        sl.read_bank(tmp_path, "pickle")
    with pytest.raises(BadBank, match="no files of format 'saelens'"):
        sl.read_bank(tmp_path, "saelens")
    with pytest.raises(BadBank, match="inside the bank"):
        sl.read_bank(tmp_path, "saelens", folder="../..")


def test_a_part_of_a_hub_repository_is_read_from_the_cache(tmp_path):
    commit = tmp_path / "models--org--saes" / "snapshots" / ("0" * 40)
    shutil.copytree(FOREIGN / "saelens-jumprelu", commit / "blocks.3")
    (tmp_path / "models--org--saes" / "refs").mkdir()
    (tmp_path / "models--org--saes" / "refs" / "main").write_text("0" * 40)
    bank = sl.read_bank("org/saes", "saelens", folder="blocks.3", cache_dir=tmp_path, local_files_only=True)
    assert bank.name == "saes" and list(bank.encoders) == ["layers.3"]


def test_several_encoders_of_one_folder_make_one_bank(tmp_path):
    for i in (3, 4):
        shutil.copytree(FOREIGN / "sparsify-topk" / "layers.3.mlp", tmp_path / f"layers.{i}")
    shutil.copytree(FOREIGN / "sparsify-transcoder" / "layers.3.mlp", tmp_path / "layers.3.mlp")
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    bank = sl.read_bank(tmp_path)
    assert list(bank.encoders) == ["layers.3", "layers.3.mlp", "layers.4"] and bank.base.id == "EleutherAI/pythia-70m"
    assert bank.encoders["layers.3.mlp"].reads == "layers.3.mlp.in"
    assert bank["layers.4/7"].index == 7
    with pytest.raises(BadBank, match="mapping"):
        sl.read_bank(tmp_path, site="layers.1")
    moved = sl.read_bank(tmp_path, site={"layers.3": "layers.9"})
    assert set(moved.encoders) == {"layers.9", "layers.3.mlp", "layers.4"}


def test_encoders_of_several_widths_do_not_fit_one_site(tmp_path):
    for name, width in (("width_16k", 4), ("width_65k", 6)):
        gemma(tmp_path / "gemma-scope-2b-pt-res" / "layer_7" / name / "average_l0_9", width)
    with pytest.raises(WrongWidth, match="4 and 6"):
        sl.read_bank(tmp_path)


def test_every_format_says_what_it_reads():
    for module in FORMATS.values():
        assert module.__doc__ and module.FILES and module.units(FOREIGN.parent / "nothing-here") == []


def test_a_format_that_was_added_is_found_and_read_like_the_others(tmp_path, monkeypatch):
    """A module with three names is all that a format needs."""
    dummy: Any = ModuleType("dummy")
    dummy.FILES = (".dummy",)
    dummy.units = lambda path: sorted(path.glob("*.dummy")) if path.is_dir() else []
    dummy.read = lambda path, title, scale=1.0: Foreign(
        found=[Found(encoder=Directions(scale * torch.eye(32)), hook="layers.0")],
        concepts=[Concept(name=title.rpartition("/")[2], encoder="layers.0", index=3)],
    )
    monkeypatch.setitem(FORMATS, "dummy", dummy)
    (tmp_path / "a.dummy").touch()
    bank, model = sl.read_bank(tmp_path, scale=2.0, base=tiny("llama")), tiny("llama")
    assert bank.provenance["format"] == "dummy" and list(bank) == [tmp_path.name]
    with sl.record(model, ["layers.0"]) as plain, torch.no_grad():
        model(torch.arange(3, 8)[None])
    with sl.steer(model, bank, {tmp_path.name: 1.5}), sl.record(model, ["layers.0"]) as moved, torch.no_grad():
        model(torch.arange(3, 8)[None])
    change = moved["layers.0"][0][1] - plain["layers.0"][0][1]
    torch.testing.assert_close(change, 3.0 * torch.eye(32)[3].expand_as(change))
    with pytest.raises(BadBank, match="no files of format 'dummy'"):
        sl.read_bank(FOREIGN, format="dummy")


def test_files_of_a_special_case_are_not_read_as_the_format_it_is_a_case_of(tmp_path):
    for name in ("layers.3", "layers.4"):
        shutil.copytree(FOREIGN / "sparsify-topk" / "layers.3.mlp", tmp_path / name)
    cfg = tmp_path / "layers.4" / "cfg.json"
    cfg.write_text(json.dumps({**json.loads(cfg.read_text()), "input_unit_norm": True}))
    with pytest.raises(BadBank, match="several formats"):
        sl.read_bank(tmp_path, "sparsify")
    with pytest.raises(BadBank, match="no files of format 'sparsify'"):
        sl.read_bank(tmp_path / "layers.4", "sparsify")
    assert sl.read_bank(tmp_path / "layers.4").provenance["format"] == "saeuron"
    assert sl.read_bank(tmp_path / "layers.3").provenance["format"] == "sparsify"


# -- what is exported and read back does the same ------------------------------------------------------------------


IDS = torch.tensor([[3, 1, 2, 5, 4]])


def steered(model, bank, edits, **options):
    """Logits at every token, in every pass."""
    with torch.no_grad(), sl.steer(model, bank, edits, **options):
        return model(IDS).logits


def own_latents(model, norm=5.0, **facts):
    """A bank of a small encoder in the middle of a model, of which two latents have names and units."""
    torch.manual_seed(0)
    encoder = JumpReLU(encoder=torch.randn(6, 32), bias=torch.zeros(6), decoder=torch.randn(6, 32), threshold=torch.rand(6))
    rows = [sl.Concept(name="calm", encoder="layers.0", index=4, unit=0.5, **facts)]
    rows.append(sl.Concept(name="layers.0/2", encoder="layers.0", index=2, unit=0.25, natural=(0.0, 2.0)))
    return sl.ConceptBank.from_encoder(encoder, site="layers.0", base=model, concepts=rows, norm=norm)


def own_vectors(model):
    torch.manual_seed(1)
    vectors = {"calm": {0: torch.randn(32), 1: torch.randn(32)}, "loud": {1: torch.randn(32)}, "deep": {1: torch.randn(32)}}
    bank = sl.ConceptBank.from_directions(vectors, base=model, norm={"layers.0": 4.0, "layers.1": 3.0})
    middles = {"layers.0": [0.25], "layers.1": [-0.5, 0.125, 0.0]}
    encoders: Any = {id: Directions(bank.encoder(id).to_tensors()["decoder"], torch.tensor(z)) for id, z in middles.items()}
    bank = bank.with_concepts(encoders=encoders)
    return bank.with_concepts(
        [replace(c, unit=0.5, parts=tuple(replace(p, unit=0.7) for p in c.parts)) for c in bank.concepts.values()]
    )


WRITTEN: Any = {
    "repeng": (own_vectors, "calm.gguf", ["calm"], {"calm": 2.0}),
    "repeng, a folder": (own_vectors, "folder", None, {"calm": 0.3, "loud": -0.4}),
    "repeng, a target": (own_vectors, "folder", ["loud"], {"loud": sl.Set(0.2)}),
    "repeng, taken away": (own_vectors, "calm.gguf", ["calm"], {"calm": sl.Ablate(tokens="all")}),
    "repeng, capped": (own_vectors, "calm.gguf", ["calm"], {"calm": 9.0}),
    "saelens": (own_latents, "folder", None, {"calm": 2.0, "layers.0/2": sl.Set(1.5), "layers.0/1": 0.5}),
    "saelens, one": (own_latents, "folder", ["calm"], {"calm": 1.5, "layers.0/1": sl.Set(0.5)}),
    "saelens, capped": (own_latents, "folder", None, {"calm": 90.0, "layers.0/2": sl.Set(9.0)}),
}


@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.filterwarnings("ignore::steerlib.errors.OutOfRange")
def test_what_is_exported_and_read_back_changes_every_token_by_the_same(case, llama, tmp_path):
    make, name, concepts, edits = WRITTEN[case]
    bank = make(llama)
    written = bank.export(tmp_path / name, concepts)
    back = sl.read_bank(tmp_path / name, base=llama)
    assert all(path.exists() for path in written) and set(concepts or bank.concepts) <= set(back)
    found = steered(llama, back, edits)
    torch.testing.assert_close(found, steered(llama, bank, edits), rtol=0, atol=1e-6)
    assert ((found - steered(llama, bank, {})).abs().amax(-1) > 1e-4).all()


def test_a_format_that_has_a_writer_is_tried_above():
    assert {case.partition(",")[0] for case in WRITTEN} == {name for name, m in FORMATS.items() if hasattr(m, "export")}


def bound_in(bank, name, **facts):
    return bank.with_concepts([replace(c, **facts) if c.name == name else c for c in bank.concepts.values()])


LOSSES: Any = {
    "a gate": (own_vectors, "calm.gguf", {"gate": sl.Gate("loud", above=0.0)}, "acts where 'loud' shows"),
    "matched norms": (own_vectors, "calm.gguf", {"match_norm": True}, "length of each token"),
    "kept norms": (own_vectors, "calm.gguf", {"keep_norm": True}, "turns tokens and leaves their length as it is"),
    "a part": (
        own_vectors,
        "calm.gguf",
        {"parts": (sl.Part(encoder="layers.1.attn", index=0, unit=1.0),)},
        "at 'layers.1.attn' too",
    ),
    "two readings": (
        own_vectors,
        "calm.gguf",
        {"parts": (sl.Part(encoder="layers.0#added", index=0, unit=1.0),)},
        "several readings at 'layers.0'",
    ),
    "a latent": (own_latents, "calm.gguf", {}, "never goes below 0"),
    "a gate of a latent": (own_latents, "folder", {"gate": sl.Gate("layers.0/2", above=0.0)}, "acts where"),
    "a part of a latent": (
        own_latents,
        "folder",
        {"parts": (sl.Part(encoder="layers.0", index=1, unit=1.0),)},
        "moves 'layers.0/1' too",
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_is_refused_or_said_in_the_file(case, llama, tmp_path):
    make, name, facts, words = LOSSES[case]
    bank = make(llama).add("other", torch.ones(32), site="layers.1.attn").add("more", torch.ones(32), site="layers.0")
    bank = bound_in(bank, "calm", **facts)
    with pytest.raises(BadBank, match=f"{words}.*lossy=True"):
        bank.export(tmp_path / name, ["calm"])
    assert not (tmp_path / name).exists()
    with pytest.warns(SteeringWarning, match=f"is lost: .*{words}"):
        bank.export(tmp_path / name, ["calm"], lossy=True)
    with pytest.warns(SteeringWarning, match=f"written with a loss: .*{words}"):
        back = sl.read_bank(tmp_path / name, base=llama)
    left = [part for part in bank["calm"].parts if make is own_vectors and bank.encoders[part.encoder].site in back.sites]
    plain = bound_in(bank, "calm", gate=None, match_norm=False, keep_norm=False, parts=tuple(left))
    torch.testing.assert_close(steered(llama, back, {"calm": 0.1}), steered(llama, plain, {"calm": 0.1}))


def test_a_window_is_a_loss(tmp_path):
    torch.manual_seed(0)
    encoder = ReLU(encoder=torch.randn(6, 4), bias=torch.zeros(6), decoder=torch.randn(6, 4))
    concept = sl.Concept(name="early", encoder="unet.mid_block@900", index=2)
    about: Any = {
        "base": sl.BaseModel(id="m"),
        "sites": {"unet.mid_block": SiteFacts(width=4)},
        "levels": {"900": sl.Window(0, 0.4)},
    }
    bank = sl.ConceptBank("own", [concept], {concept.encoder: encoder}, **about)
    with pytest.raises(BadBank, match="'early' acts in a window of denoising.*lossy=True"):
        bank.export(tmp_path / "folder")


def test_exports_say_what_is_wrong_with_them(llama, tmp_path):
    bank = own_vectors(llama)
    with pytest.raises(UnknownFormat, match="a format that is written, format= one of repeng, saelens, got 'svec'"):
        bank.export(tmp_path / "x.svec", ["calm"], format="svec")
    with pytest.raises(BadBank, match="a control vector is one concept, got 3"):
        bank.export(tmp_path / "x.gguf")
    with pytest.raises(BadBank, match="expected a list of concepts"):
        bank.export(tmp_path / "x.gguf", "calm")
    with pytest.raises(BadBank, match="'up/down' cannot be the name of a file"):
        bank.rename({"calm": "up/down"}).export(tmp_path / "folder")


def test_units_that_no_line_has_are_a_loss(llama, tmp_path):
    bank = own_latents(llama)
    encoder = replace(only(bank), statistics={"unit": torch.tensor([0.0, 1.0, 2.0, 2.0, 2.0, 2.0])})
    known = bank.with_concepts(encoders={"layers.0": encoder})
    with pytest.raises(BadBank, match="the units of 2 latents of 'layers.0' that have no line"):
        known.export(tmp_path / "folder")
    known.export(tmp_path / "folder", ["calm", "layers.0/3"])
    assert sl.read_bank(tmp_path / "folder", base=llama)["layers.0/3"].unit == 2.0
