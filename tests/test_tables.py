"""No setting of a foreign file is ignored: it changes the reading as its library's formula says, or it is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import steerlib as sl
from steerlib.errors import CorruptBank, UnknownFormat, UnknownSite
from steerlib.readers import FORMATS, saelens
from steerlib.readers.table import Table

FOREIGN = Path(__file__).parent / "fixtures" / "foreign"
PLACES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "saelens": ("saelens-standard", (), "SETTINGS"),
    "saelens-metadata": ("saelens-standard", ("metadata",), "METADATA"),
    "saelens-model": ("saelens-standard", ("metadata", "model_from_pretrained_kwargs"), "LOADED"),
    "sparsify": ("sparsify-topk", (), "SETTINGS"),
    "saeuron": ("saeuron", (), "SETTINGS"),
    "dictionary-learning": ("dictionary_learning-AutoEncoderTopK", ("trainer",), "SETTINGS"),
    "dictionary-learning-buffer": ("dictionary_learning-AutoEncoderTopK", ("buffer",), "BUFFER"),
    "gemma-scope-2": ("gemma-scope-2", (), "SETTINGS"),
    "llama-scope": ("", (), "SETTINGS"),
    "sdxl-unbox": ("sdxl-unbox", (), "SETTINGS"),
    "svec": ("svec", (), "SETTINGS"),
}
"""Where the settings of each format lie: a folder, the way to them in its JSON, and their table."""


def format_of(place) -> str:
    return next(name for name in sorted(FORMATS, key=len, reverse=True) if place.startswith(name))


def table_of(place) -> Table:
    return getattr(FORMATS[format_of(place)], PLACES[place][2])


def llama_scope(folder):
    torch.manual_seed(0)
    shapes = {"encoder.weight": (12, 6), "encoder.bias": (12,), "decoder.weight": (6, 12), "decoder.bias": (6,)}
    (folder / "checkpoints").mkdir(parents=True)
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "checkpoints" / "final.safetensors")
    params = {
        "hook_point_in": "blocks.5.hook_resid_post", "act_fn": "jumprelu", "jump_relu_threshold": 0.5,
        "d_model": 6, "d_sae": 12, "apply_decoder_bias_to_pre_encoder": False, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 5.0, "out": 5.0},
    }  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(params))


def made(place, folder, change) -> Path:
    """A copy of the files of a format, its settings changed."""
    source, way, _ = PLACES[place]
    shutil.copytree(FOREIGN / source, folder) if source else llama_scope(folder)
    path = next(p for p in sorted(folder.rglob("*")) if p.suffix in (".json", ".svec"))
    whole = settings = json.loads(path.read_text())
    for key in way:
        settings = settings.setdefault(key, {})
    change(settings)
    path.write_text(json.dumps(whole))
    return folder


def read(place, folder, **options) -> Any:
    return sl.read_bank(folder, format_of(place), **options)


def bits(bank) -> Any:
    """All that a bank computes with, and where."""
    encoders = {id: (bank.encoder(id), facts) for id, facts in bank.encoders.items()}
    return [(facts, sorted((n, t.tolist()) for n, t in e.to_tensors().items())) for e, facts in encoders.values()]


def every(part):
    return [pytest.param(place, key, id=f"{place}-{key}") for place in PLACES for key in sorted(getattr(table_of(place), part))]


@pytest.mark.parametrize("place", PLACES)
def test_settings_set_aside_change_nothing_and_unknown_ones_are_refused_until_they_are_named(place, tmp_path):
    plain = bits(read(place, made(place, tmp_path / "plain", lambda s: None)))
    odd = {key: "odd" for key in table_of(place).aside}
    assert bits(read(place, made(place, tmp_path / "aside", lambda s: s.update(odd)))) == plain
    for i, value in enumerate((1, True, "odd", [2], {"a": 1}, 0.5)):
        folder = made(place, tmp_path / f"new{i}", lambda s, value=value: s.update(surprise=value))
        with pytest.raises(UnknownFormat, match=r"surprise=.*ignore=\['surprise'\]"):
            read(place, folder)
        assert bits(read(place, folder, ignore=["surprise"])) == plain
    unset = {f"surprise{i}": value for i, value in enumerate((None, False, 0, "", "none", [], {}))}
    assert bits(read(place, made(place, tmp_path / "unset", lambda s: s.update(unset)))) == plain


@pytest.mark.parametrize(("place", "key"), every("only"))
def test_values_that_no_encoder_computes_are_refused_by_name(place, key, tmp_path):
    for i, value in enumerate(v for v in (True, 3, "odd", "groupmax") if v not in table_of(place).only[key]):
        folder = made(place, tmp_path / str(i), lambda s, value=value: s.update({key: value}))
        with pytest.raises(UnknownFormat, match=f"{key}={value!r}"):
            read(place, folder)


READ: dict[str, dict[str, list[tuple[Any, str]]]] = {
    "sparsify": {
        "k": [(2, ""), (13, "k=13")], "transcode": [(True, "")], "skip_connection": [(True, "skip_connection")],
        "num_latents": [(7, "sides")], "d_in": [(5, "sides")],
    },
    "saeuron": {
        "k": [(2, ""), ("3", "'k'")], "num_latents": [(7, "sides")], "d_in": [(5, "sides")], "input_unit_norm": [(True, "")],
    },
    "dictionary-learning": {
        "dict_class": [("AutoEncoderNew", "AutoEncoder|tensors"), ("CrossCoder", "CrossCoder")], "layer": [(1, "")],
        "lm_name": [("org/other", "")], "submodule_name": [("mlp_out_layer_2", ""), ("nothing/like", "hook point")],
        "k": [(2, "k other")], "activation_dim": [(5, "activation_dim")], "dict_size": [(5, "dict_size")],
    },
    "dictionary-learning-buffer": {"io": [("in", ""), ("in_and_out", "in_and_out")]},
    "gemma-scope-2": {
        "hf_hook_point_in": [("model.layers.2.mlp.input", "")], "hf_hook_point_out": [("model.layers.2.mlp.output", ""),
        ("model.layers.3.pre_feedforward_layernorm.output", "linear part")], "model_name": [("org/other", "")],
        "affine_connection": [(False, "linear part")], "width": [(5, "sides")],
    },
    "llama-scope": {
        "hook_point_in": [("blocks.4.hook_resid_post", "")], "hook_point_out": [("blocks.6.hook_mlp_out", "")],
        "use_decoder_bias": [(False, "")], "apply_decoder_bias_to_pre_encoder": [(True, "")], "d_model": [(5, "sides")],
        "d_sae": [(5, "sides")], "act_fn": [("relu", ""), ("topk", "="), ("gelu", "gelu"), ("batchtopk", "batchtopk")],
        "jump_relu_threshold": [(0.75, ""), ("0.75", "as a number")], "sparsity_include_decoder_norm": [(False, "")],
        "norm_activation": [("token-wise", ""), ("inference", ""), ("batch-wise", "batch-wise"), ("odd", "odd")],
        "dataset_average_activation_norm": [({"in": 2.0, "out": 2.0}, ""), (None, "mean lengths")],
    },
    "sdxl-unbox": {"n_dirs_local": [(5, "sides")], "d_model": [(5, "sides")], "k": [(2, ""), ("3", "'k'")]},
    "svec": {"directions": [({"0": [1.0]}, ""), ([1], "vectors by layer")], "model_type": [("org/other", "")]},
}  # fmt: skip
"""Values of settings that the readers take into account: "" changes what is read or where, "=" does not, words refuse."""


@pytest.mark.parametrize("place", READ)
def test_settings_that_readings_depend_on_change_the_reading_or_are_refused(place, tmp_path):
    assert READ[place].keys() == table_of(place).read, "every setting that a table says is read is tried"
    bank = read(place, made(place, tmp_path / "plain", lambda s: None))
    for key, values in READ[place].items():
        for i, (value, words) in enumerate(values):
            folder = made(place, tmp_path / f"{key}{i}", lambda s, key=key, value=value: s.update({key: value}))
            if words not in ("", "="):
                with pytest.raises((UnknownFormat, CorruptBank), match=words):
                    read(place, folder)
                continue
            found = read(place, folder)
            same = (bits(found), found.base, found.provenance) == (bits(bank), bank.base, bank.provenance)
            assert same == (words == "="), (key, value)


TENSORS = {"saelens": "saelens-gated", "sparsify": "sparsify-topk", "saeuron": "saeuron", "gemma-scope-2": "gemma-scope-2"}


@pytest.mark.parametrize("format", TENSORS)
def test_tensors_that_a_kind_does_not_have_are_refused(format, tmp_path):
    shutil.copytree(FOREIGN / TENSORS[format], tmp_path / "there")
    (file,) = (tmp_path / "there").rglob("*.safetensors")
    save_file({**load_file(file), "W_extra": torch.ones(3)}, file)
    with pytest.raises(UnknownFormat, match=r"tensors W_extra.*ignore=\['W_extra'\]"):
        sl.read_bank(tmp_path / "there", format)
    assert sl.read_bank(tmp_path / "there", format, ignore=["W_extra"]).encoders


# -- SAELens, against its formula ---------------------------------------------------------------------------------


def formula(cfg, t, x):
    """What SAELens computes, written from its documentation: codes and reconstructions."""
    loaded = cfg["metadata"].get("model_from_pretrained_kwargs") or {}
    x = x - x.mean(-1, keepdim=True) if loaded.get("center_writing_weights") else x
    norm, mean, size = cfg["normalize_activations"], torch.zeros(()), torch.ones(())
    if norm == "layer_norm":
        mean, size = x.mean(-1, keepdim=True), (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True)
        x = (x - mean) / (size + 1e-5)
    if norm == "constant_norm_rescale":
        size = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        x = x / size
    u = (x - t["b_dec"] if cfg["apply_b_dec_to_input"] else x) @ t["W_enc"]
    if cfg["architecture"] == "gated":
        z = torch.relu(u * t["r_mag"].exp() + t["b_mag"]) * (u + t["b_gate"] > 0)
    else:
        z = torch.relu(u + t["b_enc"])
    if cfg["architecture"] == "jumprelu":
        z = z * (u + t["b_enc"] > t["threshold"])
    if cfg["architecture"] == "topk":
        p = z * t["W_dec"].norm(dim=-1) if cfg.get("rescale_acts_by_decoder_norm") else z
        z = torch.where(p >= p.topk(cfg["k"]).values[..., -1:], p, 0)
    by = t["W_dec"].norm(dim=-1, keepdim=True) if cfg.get("rescale_acts_by_decoder_norm") else torch.ones(())
    return z, ((z * t.get("finetuning_scaling_factor", torch.ones(()))) @ (t["W_dec"] / by) + t["b_dec"]) * size + mean


def written(folder, case, cfg, metadata, seed=0):
    """Files of a case with settings changed, weights at random."""
    shutil.copytree(FOREIGN / case, folder)
    whole = json.loads((folder / "cfg.json").read_text())
    whole |= cfg
    whole["metadata"] |= metadata
    torch.manual_seed(seed)
    tensors = {name: torch.randn(t.shape) for name, t in load_file(folder / "sae_weights.safetensors").items()}
    tensors |= {"finetuning_scaling_factor": torch.rand(12) + 0.5} if cfg.get("finetuning_scaling_factor") else {}
    (folder / "cfg.json").write_text(json.dumps(whole))
    save_file(tensors, folder / "sae_weights.safetensors")
    return whole, tensors


CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


@pytest.mark.parametrize("metadata", [{}, CENTRED], ids=["plain", "centred"])
@pytest.mark.parametrize("cfg", [
    {}, {"apply_b_dec_to_input": False}, {"normalize_activations": "layer_norm"}, {"finetuning_scaling_factor": True},
    {"architecture": "topk", "k": 3}, {"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True},
    {"architecture": "gated"}, {"architecture": "jumprelu"}, {"normalize_activations": "constant_norm_rescale"},
    {"activation_fn": "relu", "activation_fn_kwargs": {}}, {"k": 5},
], ids=str)  # fmt: skip
def test_what_saelens_files_say_is_computed_as_saelens_does_and_written_back(cfg, metadata, tmp_path):
    case = f"saelens-{cfg.get('architecture', 'standard')}"
    whole, tensors = written(tmp_path / "sae", case, cfg, metadata)
    if metadata and cfg.get("normalize_activations") == "constant_norm_rescale":
        with pytest.raises(UnknownFormat, match="constant_norm_rescale on centred weights"):
            read("saelens", tmp_path / "sae")
        return
    bank, x = read("saelens", tmp_path / "sae"), torch.randn(40, 6) + 2
    (id,) = bank.encoders
    encoder: Any = bank.encoder(id)
    z, y = formula(whole, tensors, x)
    if cfg.get("rescale_acts_by_decoder_norm"):
        assert (z > 0).sum() <= 2 * 40
    torch.testing.assert_close(encoder.encode(x), z, rtol=1e-4, atol=1e-4)
    centred_y = y + (x.mean(-1, keepdim=True) if metadata and cfg.get("normalize_activations") == "layer_norm" else 0)
    torch.testing.assert_close(encoder.reconstruct(x), centred_y, rtol=1e-4, atol=1e-4)
    saelens.write(bank, tmp_path / "again")
    again: Any = read("saelens", tmp_path / "again").encoder(id)
    torch.testing.assert_close(again.encode(x), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.decode(z), encoder.decode(z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("cfg", "metadata", "words"), [
    ({"activation_fn": "tanh-relu"}, {}, "tanh-relu"), ({"activation_fn": "gelu"}, {}, "gelu"),
    ({"activation_fn": "topk"}, {}, "topk"), ({"activation_fn_kwargs": {"postact_fn": "tanh"}}, {}, "postact_fn"),
    ({"architecture": "new"}, {}, "'new'"), ({"architecture": ["standard"]}, {}, "standard"),
    ({"d_in": 7}, {}, "d_in 7"), ({"d_sae": 7}, {}, "d_sae 7"), ({"d_out": 7}, {}, "d_out 7"),
    ({"apply_b_dec_to_input": "yes"}, {}, "apply_b_dec_to_input"), ({"normalize_activations": 3}, {}, "under 3"),
    ({"normalize_activations": "expected_average_only_in"}, {}, "scaling="),
    ({"normalize_activations": "covariance_whitening"}, {}, "whitening"), ({"reshape_activations": "hook_z"}, {}, "hook_z"),
    ({"rescale_acts_by_decoder_norm": True}, {}, "rescale_acts"),
    ({}, {"hook_name": "blocks.1.attn.hook_z"}, "reshape_activations='none'"),
    ({}, {"hook_head_index": 1}, "head 1"), ({}, {"hook_head_index_out": 1}, "hook_head_index_out"),
    ({}, {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": "1"}, "head '1'"),
    ({}, {"hook_name_out": "blocks.3.hook_mlp_out"}, "elsewhere"), ({}, {"hf_hook_name_out": "layers.3.mlp"}, "elsewhere"),
    ({}, {"model_from_pretrained_kwargs": {"load_in_4bit": True}}, "load_in_4bit"),
    ({}, {"model_from_pretrained_kwargs": [1]}, "JSON objects"),
    ({}, {**CENTRED, "model_name": "org/unheard-of"}, "centred=True or False"),
    ({}, {**CENTRED, "hook_name": "blocks.1.hook_mlp_in"}, "centred=True or False"),
    ({"reshape_activations": "hook_z"}, {"hook_name": "blocks.1.attn.hook_z",
      "model_from_pretrained_kwargs": {"fold_value_biases": True}}, "fold_value_biases"),
    ({"reshape_activations": "hook_z"}, {"hook_name": "blocks.1.attn.hook_z",
      "model_from_pretrained_kwargs": {"refactor_factored_attn_matrices": True}}, "refactor"),
], ids=str)  # fmt: skip
def test_what_saelens_files_say_and_nothing_computes_is_refused_by_name(cfg, metadata, words, tmp_path):
    written(tmp_path / "sae", "saelens-standard", cfg, metadata)
    with pytest.raises((UnknownFormat, CorruptBank, UnknownSite), match=words):
        read("saelens", tmp_path / "sae")


@pytest.mark.parametrize(("cfg", "metadata", "site", "base"), [
    ({}, {"hook_name": "blocks.1.hook_resid_pre"}, "layers.1.in", "gpt2"), ({}, {"hf_hook_name": "h.2"}, "layers.2", "gpt2"),
    ({}, {"model_name": "pythia-70m"}, "layers.3", "pythia-70m"), ({}, {"sae_lens_version": "6.0"}, "layers.3", "gpt2"),
    ({}, {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 2}, "layers.1.attn.heads.2", "gpt2"),
    ({"reshape_activations": "hook_z"}, {"hook_name": "blocks.1.attn.hook_z"}, "layers.1.attn.heads", "gpt2"),
    ({}, {"model_from_pretrained_kwargs": {"checkpoint_index": 7}}, "layers.3", "gpt2, checkpoint_index 7"),
    ({}, {"model_from_pretrained_kwargs": {"fold_ln": True, "center_unembed": True}}, "layers.3", "gpt2"),
], ids=str)  # fmt: skip
def test_where_and_of_which_model_saelens_files_say_they_are(cfg, metadata, site, base, tmp_path):
    whole, tensors = written(tmp_path / "sae", "saelens-standard", cfg, metadata)
    bank, x = read("saelens", tmp_path / "sae"), torch.randn(9, 6)
    assert list(bank.encoders) == [site] and bank.base.id == base
    torch.testing.assert_close(bank.encoder(site).encode(x), formula(whole, tensors, x)[0])


def test_a_norm_of_training_and_the_centring_of_a_stream_may_be_said_by_the_reader(tmp_path):
    whole, tensors = written(tmp_path / "a", "saelens-standard", {"normalize_activations": "expected_average_only_in"}, {})
    x, encoder = torch.randn(9, 6) + 1, read("saelens", tmp_path / "a", scaling=0.25).encoder("layers.3")
    z, y = formula(whole, tensors, x * 0.25)
    torch.testing.assert_close(encoder.encode(x), z)
    torch.testing.assert_close(encoder.decode(z), y / 0.25)
    bank = read("saelens", tmp_path / "a", scaling=0.25)
    (again,) = saelens.write(bank, tmp_path / "again")
    torch.testing.assert_close(read("saelens", again).encoder("layers.3").encode(x), z)
    whole, tensors = written(tmp_path / "b", "saelens-standard", {}, {"model_name": "org/unheard-of"})
    found = read("saelens", tmp_path / "b", centred=True).encoder("layers.3")
    torch.testing.assert_close(found.encode(x), formula(whole, tensors, x - x.mean(-1, keepdim=True))[0])
    with pytest.raises(UnknownFormat, match="leave out scaling="):
        read("saelens", tmp_path / "b", scaling=2.0)


def test_what_saelens_list_of_releases_says_of_files_on_the_hub_holds(tmp_path):
    repository = "jbloom/GPT2-Small-SAEs-Reformatted"
    commit = tmp_path / f"models--{repository.replace('/', '--')}" / "snapshots" / ("0" * 40)
    whole, tensors = written(commit / "blocks.3.hook_resid_pre", "saelens-standard", {}, {})
    refs = commit.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    options: Any = {"folder": "blocks.3.hook_resid_pre", "cache_dir": tmp_path, "local_files_only": True}
    x, encoder = torch.randn(9, 6) + 3, sl.read_bank(repository, "saelens", **options).encoder("layers.3")
    torch.testing.assert_close(encoder.encode(x), formula(whole, tensors, x - x.mean(-1, keepdim=True))[0])
