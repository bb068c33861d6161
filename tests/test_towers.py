"""Every class of transformers that reads more than text: its blocks move by the vector, or the reason is said; prompts end
where the first pass of the decoder does. Then layouts, packed texts, virtual tokens, guidance in `generate()`."""

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import CannotBuild, tiny
from tiny_towers import IDS, bodies, inputs_of, model_of, writers
from torch import nn
from transformers import (
    ContinuousBatchingConfig,
    EncodecConfig,
    GenerationConfig,
    GitConfig,
    GitForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

import steerlib as sl
from steerlib import errors
from steerlib.hosts import host_for

FIRST = ("layers.0", "encoder.layers.0", "decoder.layers.0")


@cache
def call_of(name) -> Any:
    """A model of a class and what it takes, or why there is none."""
    try:
        model = model_of(name)
    except CannotBuild as reason:
        return None, str(reason)
    reasons = []
    for kwargs in inputs_of(model):
        try:
            with torch.no_grad():
                model(**kwargs)
            return model, kwargs
        except Exception as error:  # whatever a foreign class raises
            reasons.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split()):.120}")
    return None, reasons[0] if reasons else f"{name}: reads text alone"


def passes(model, site, run, edits=None):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        if edits is None:
            with sl.record(model, [site]) as tape:
                run()
        else:
            bank, chosen = edits
            with sl.steer(model, bank, chosen), sl.record(model, [site]) as tape:
                run()
    return tape[site]


def vector(width, seed=0):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def bank_at(model, site, width):
    return sl.ConceptBank.from_directions({"a": vector(width)}, site=site, base=model)


# -- towers ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", bodies())
def test_blocks_of_every_class_that_reads_pictures_sound_or_series_move_by_the_vector_or_are_refused(name):
    """Called by keyword. Where there is no text, `tokens=` is refused."""
    model, kwargs = call_of(name)
    if model is None:
        pytest.skip(kwargs)
    host = host_for(model)
    sites = [site for site in FIRST if site in host.sites()]
    if not sites:
        with pytest.raises(errors.UnknownSite, match="any module path"):
            host.site("layers.0")
    for site in sites:
        try:
            plain = passes(model, site, lambda: model(**kwargs))
        except errors.WrongWidth as reason:
            assert "path:BDN" in str(reason)
            continue
        bank = bank_at(model, site, plain[0][1].shape[-1])
        moved = passes(model, site, lambda: model(**kwargs), (bank, {"a": 2.0}))
        torch.testing.assert_close(moved[0][1], plain[0][1] + 2.0 * vector(plain[0][1].shape[-1]), rtol=0, atol=1e-5)
        assert moved[0][0].real is None or host.counts_tokens(host.site(site))
        if not host.counts_tokens(host.site(site)):
            with pytest.raises(errors.Unanswerable, match="tokens="):
                sl.steer(model, bank, {"a": sl.Add(1.0, tokens="prompt")})


def test_how_many_of_these_classes_run_here():
    found = Counter(type(call_of(name)[0]).__name__ != "NoneType" for name in bodies())
    assert found[True] >= 70


SPEECH = "Wav2Vec2Model HubertModel WavLMModel UniSpeechModel UniSpeechSatModel Data2VecAudioModel SEWModel"


@pytest.mark.parametrize("name", SPEECH.split())
def test_the_blocks_of_a_speech_encoder_are_not_its_convolutions(name):
    assert host_for(model_of(name)).site("layers.0").module == "encoder.layers.0"


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("CLIPModel", "text_model.encoder.layers.0"),
        ("FlaubertModel", "layer_norm2.0"),
        ("IdeficsModel", "layers.0"),
        ("LlavaModel", "language_model.layers.0"),
        ("Qwen2_5OmniThinkerModel", "language_model.layers.0"),
        ("Qwen3VLModel", "language_model.layers.0"),
    ],
)
def test_in_models_of_several_towers_blocks_are_those_of_the_text(name, module):
    assert host_for(model_of(name)).site("layers.0").module == module


@pytest.mark.parametrize("name", ["BltModel", "PI0Model", "Sam3TrackerModel"])
def test_where_nothing_tells_which_blocks_are_meant_they_are_listed(name):
    with pytest.raises(errors.UnknownSite, match=r"name one.*layers\.0"):
        host_for(model_of(name)).site("layers.0")


@pytest.fixture(scope="module")
def llava():
    return model_of("LlavaForConditionalGeneration")


def test_a_tower_beside_padded_text_is_not_masked_by_its_pads(llava):
    image = llava.config.image_token_id = 60
    ids = torch.full((2, 20), 5)
    ids[:, 4:] = image
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0  # the last is among the last 17 columns, as many as the tower has patches
    tower = "model.vision_tower.encoder.layers.0"
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def run():
        llava(input_ids=ids, attention_mask=mask, pixel_values=pixels)

    for site in (tower, "model.multi_modal_projector"):
        plain = passes(llava, site, run)[0][1]
        bank = bank_at(llava, site, plain.shape[-1])
        moved = passes(llava, site, run, (bank, {"a": 1.0}))[0][1]
        torch.testing.assert_close(moved - plain, vector(plain.shape[-1]).expand_as(plain), atol=1e-5, rtol=1e-5)
        with pytest.raises(errors.Unanswerable, match="counts tokens of text"):
            sl.steer(llava, bank, {"a": sl.Add(1.0, tokens="generated")})


# -- generate() ------------------------------------------------------------------------------------------------


def texts(model):
    asked = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    asked |= {"decoder_start_token_id": 3} if model.config.is_encoder_decoder else {}
    yield {**asked, "input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    for kwargs in inputs_of(model):
        yield {**asked, **{name: value for name, value in kwargs.items() if name != "decoder_input_ids"}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", writers())
def test_the_prompt_is_what_the_first_pass_reads_in_every_class_that_generates(name):
    """Positions go on without a gap, and everything after the first pass is new; what counts no text refuses `tokens=`."""
    try:
        model = model_of(name)
    except CannotBuild as reason:
        pytest.skip(str(reason))
    host = host_for(model)
    site = next((site for site in ("layers.0", "decoder.layers.0") if site in host.sites()), None)
    if site is None:
        with pytest.raises(errors.UnknownSite):
            host.site("layers.0")
        return
    seen = []
    for kwargs in texts(model):
        try:
            model.generate(**kwargs)
        except Exception as error:  # whatever a foreign class raises without steerlib
            reason = error
            continue
        seen = passes(model, site, lambda kwargs=kwargs: model.generate(**kwargs))
        break
    if not seen:
        pytest.skip(f"{name}: {reason!r:.160}")
    if not host.counts_tokens(host.site(site)):
        return
    states = [state for state, _ in seen]
    prompt = states[0].length
    assert states[0].section == "prompt" and states[0].positions[0].tolist() == list(range(prompt))
    assert all(x.shape[1] == state.length for state, x in seen)
    for step, state in enumerate(states[1:], start=1):
        assert state.steps[0, -1] == step and state.positions[0, -1] == prompt - 1 + step


def moved(model, bank, edits, run, block, **options):
    """For each pass of a block, which rows and tokens an edit moves `[rows][tokens]`."""
    seen = []
    handle = block.register_forward_hook(lambda _, a, out: seen.append((out[0] if isinstance(out, tuple) else out).detach()))
    run()
    plain, seen[:] = list(seen), []
    with sl.steer(model, bank, edits, **options):
        run()
    handle.remove()
    return [((x - y).norm(dim=-1) > 1e-4).int().tolist() for x, y in zip(seen, plain, strict=False)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "virtual"), [("PromptTuningConfig", 4), ("PrefixTuningConfig", 0), ("PromptEncoderConfig", 4)]
)
def test_virtual_tokens_are_part_of_the_prompt(kind, virtual):
    """Those of prefix tuning lie in the cache before the first token that is read, and take the first positions too."""
    peft = pytest.importorskip("peft", reason="needs peft, of the extra dev")
    wrapped = peft.get_peft_model(tiny("llama"), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    bank = bank_at(wrapped, "layers.0", 32)
    inner: Any = host_for(wrapped).model
    block = inner.model.layers[0]
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0  # pads, after the virtual tokens

    def run():
        wrapped.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)

    def first(edit):
        return moved(wrapped, bank, {"a": edit}, run, block)[0]

    real = [1] * virtual + [0, 0, 1, 1, 1]
    assert first(sl.Add(2.0, tokens="generated")) == [[0] * (virtual + 5)] * 2
    assert first(sl.Add(2.0, tokens="prompt")) == [real, [1] * (virtual + 5)]
    assert first(sl.Add(2.0, when=sl.Steps(1, 3))) == [[0] * (virtual + 5)] * 2
    assert first(sl.Add(2.0, tokens=slice(4, 5)))[0] == [0] * virtual + [0, 0, 1, 0, 0]


class Own(LogitsProcessor):
    """Guidance written by a user, under a name that says nothing."""

    def __init__(self, model):
        self.model, self.ids = model, IDS[:1, :2]

    def __call__(self, input_ids, scores):
        self.ids = torch.cat((self.ids, input_ids[:, -1:]), 1)
        return scores + 0.5 * (scores - self.model(self.ids).logits[:, -1])


def test_passes_of_a_users_own_processor_are_not_those_of_the_prompt():
    """What half they are is unknown; transformers' own processor, given by the user, is recognised."""
    model = tiny("llama")
    bank, block = bank_at(model, "layers.0", 32), model.model.layers[0]
    theirs: Any = UnbatchedClassifierFreeGuidanceLogitsProcessor

    def run(make):
        made = LogitsProcessorList([make()])
        model.generate(IDS[:1], max_new_tokens=2, do_sample=False, logits_processor=made, pad_token_id=0)

    def which(branch):
        passes = moved(model, bank, {"a": 2.0}, lambda: run(lambda: theirs(2.0, model, IDS[1:, :2])), block, branch=branch)
        return [any(map(any, rows)) for rows in passes][:2]

    assert which("cond") == [True, False] and which("uncond") == [False, True]
    run(lambda: Own(model))
    with sl.steer(model, bank, {"a": sl.Add(1.0, tokens="generated")}), sl.record(model, ["layers.0"]) as tape:
        run(lambda: Own(model))
    assert [state.section for state, _ in tape["layers.0"]][:2] == ["prompt", "prompt"]
    with pytest.raises(errors.Unanswerable, match="half of guidance"), sl.steer(model, bank, {"a": 1.0}, branch="cond"):
        run(lambda: Own(model))


@pytest.fixture(scope="module")
def musicgen():
    text: Any = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    text.decoder_start_token_id = 0
    sizes: Any = {"upsampling_ratios": [2, 2], "num_residual_layers": 1, "num_lstm_layers": 1, "target_bandwidths": [120.0]}
    audio = EncodecConfig(hidden_size=8, num_filters=4, codebook_size=32, codebook_dim=8, **sizes)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "max_position_embeddings": 64}
    decoder = MusicgenDecoderConfig(vocab_size=32, hidden_size=16, num_codebooks=4, pad_token_id=32, bos_token_id=32, **sizes)
    torch.manual_seed(0)
    model = MusicgenForConditionalGeneration(MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)).eval()
    asked = model.generation_config
    asked.decoder_start_token_id = asked.pad_token_id = asked.bos_token_id = 32
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("edit", "branch", "rows"),
    [([4.0, 0.0], "both", [1, 0, 1, 0]), (4.0, "cond", [1, 1, 0, 0]), (4.0, "uncond", [0, 0, 1, 1])],
)
def test_stacked_rows_of_audio_generation_are_prompts_and_nothings(musicgen, edit, branch, rows):
    bank, block = bank_at(musicgen, "decoder.layers.0", 16), musicgen.decoder.model.decoder.layers[0]
    mask = torch.ones_like(IDS)

    def run():
        musicgen.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=3, do_sample=False, guidance_scale=3.0)

    assert [int(any(row)) for row in moved(musicgen, bank, {"a": edit}, run, block, branch=branch)[0]] == rows


@pytest.mark.filterwarnings("ignore")
def test_continuous_batching_equals_single_requests_or_is_refused():
    model = tiny("llama")
    bank, prompts = bank_at(model, "layers.0", 32), [[3, 5, 7, 9], [4, 6]]
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=127, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    batched = {"generation_config": config, "progress_bar": False, "continuous_batching_config": small}
    for edit in (sl.Add(3.0), sl.Add(3.0, tokens=slice(0, 2))):
        with sl.steer(model, bank, {"a": edit}):
            alone = [model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts]
            got = model.generate_batch(prompts, **batched)
        assert [got[key].generated_tokens for key in sorted(got)] == alone
    for edit in (sl.Add(3.0, tokens="generated"), sl.Add([3.0, 0.0]), sl.Add(3.0, when=sl.Steps(1, 2))):
        refused = pytest.raises(errors.Unanswerable, match="generate_batch")
        with refused, sl.steer(model, bank, {"a": edit}):
            model.generate_batch(prompts, **batched)


def test_texts_packed_by_position_ids_count_from_their_own_first_token():
    """Compiled: in test_compile."""
    model = tiny("llama")
    bank, places = bank_at(model, "layers.0", 32), torch.tensor([[0, 1, 2, 0, 1]])

    def run():
        model(IDS[:1], position_ids=places, use_cache=False)

    cases: Any = ((slice(1, 2), [0, 1, 0, 0, 1]), ("all", [1] * 5))
    for tokens, expected in cases:
        assert moved(model, bank, {"a": sl.Add(4.0, tokens=tokens)}, run, model.model.layers[0]) == [[expected]]


# -- layouts ---------------------------------------------------------------------------------------------------


class Turned(nn.Module):
    """Gives `[rows, width, tokens]`, which nothing shows."""

    def forward(self, x):
        return x.transpose(1, 2) * 1.0


LAYOUTS = {
    "Conv1d": (nn.Sequential(nn.Conv1d(3, 8, 3, padding=1)), "0", (2, 3, 8), lambda v: v[None, :, None]),
    "Conv2d": (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), "0", (2, 3, 8, 8), lambda v: v[None, :, None, None]),
    "Linear": (nn.Sequential(nn.Linear(3, 8)), "0", (2, 8, 3), lambda v: v),
    "Linear of an image": (nn.Sequential(nn.Linear(3, 8)), "0", (2, 8, 8, 3), lambda v: v),
    "said": (nn.Sequential(Turned()), "0:BDN", (2, 8, 8), lambda v: v[None, :, None]),
}


@pytest.mark.parametrize("case", sorted(LAYOUTS))
def test_a_module_moves_along_its_width_whatever_its_axes(case):
    model, site, shape, laid = LAYOUTS[case]
    x, v = torch.randn(shape, generator=torch.Generator().manual_seed(0)), vector(8)
    with torch.no_grad(), sl.steer(model, bank_at(model, site, 8), {"a": 1.0}):
        after = model(x)
    torch.testing.assert_close(after - model(x), laid(v).expand_as(after), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_are_where_torchs_own_blocks_have_them(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x, bank = torch.randn(2, 2, 16), bank_at(model, "layers.0", 16)
    with torch.no_grad(), sl.steer(model, bank, {"a": [1.0, 0.0]}):
        after = model(x)
    rows = ((after - model(x)).norm(dim=-1) > 1e-4).int()
    assert (rows if batch_first else rows.T).tolist() == [[1, 1], [0, 0]]


def test_axes_that_nothing_tells_are_refused_with_the_way_to_say_them():
    model = nn.Sequential(Turned())
    with pytest.raises(errors.WrongWidth, match="path:BDN"), sl.steer(model, bank_at(model, "0", 8), {"a": 1.0}):
        model(torch.randn(2, 8, 8))
    second = nn.ModuleDict({"attend": nn.MultiheadAttention(8, 2), "own": Turned()})
    with pytest.raises(errors.UnknownSite, match="path:NBD"):
        host_for(second).site("own")
    assert host_for(second).site("own:NBD").layout == "NBD" and host_for(second).site("attend").layout == "NBD"


def test_experts_and_routers_have_no_axis_of_rows():
    model = tiny("qwen3_moe")
    for part, width in (("experts", 32), ("gate", 4)):
        place = f"model.layers.1.mlp.{part}"
        with pytest.raises(errors.WrongWidth, match="path:ND"), sl.steer(model, bank_at(model, place, width), {"a": 1.0}):
            model(IDS)
        site = f"{place}:ND"
        plain = passes(model, site, lambda: model(IDS))[0][1]
        after = passes(
            model, site, lambda: model(IDS), (bank_at(model, site, width), {"a": sl.Add([2.0, 0.0], tokens=slice(1, 2))})
        )
        assert ((after[0][1] - plain).norm(dim=-1).reshape(2, 5) > 1e-4).int().tolist() == [[0, 1, 0, 0, 0], [0] * 5]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_cache", [True, False])
def test_an_image_that_a_decoder_puts_in_front_by_itself_is_prompt(use_cache):
    """Git is given text and pixels, and its blocks read four tokens of the image and one for its class before the text."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tower = {**sizes, "hidden_size": 16, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    config: Any = GitConfig(vision_config=tower, vocab_size=60, bos_token_id=1, pad_token_id=0, **sizes)
    config.eos_token_id = None
    model: Any = GitForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 6]])

    def run():
        given = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids), "use_cache": use_cache}
        model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)

    states = [state for state, _ in passes(model, "layers.0", run)]
    assert [state.length for state in states] == ([8, 1, 1] if use_cache else [8, 9, 10])
    for new, state in enumerate(states):
        last = state.steps.expand(1, state.length)[0].tolist()
        assert last == ([new] if use_cache and new else [0] * 8 + [*range(1, new + 1)])
        assert state.positions[0].tolist() == list(range(8 + new))[-state.length :]
