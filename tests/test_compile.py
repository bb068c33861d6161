"""A compiled model: sockets keep their place, contents change, nothing is compiled anew."""

import threading

import pytest
import torch
from conftest import two_directions
from tiny_models import tiny
from tiny_pipelines import PIPELINES, run

import steerlib as sl
from steerlib import errors
from steerlib.encoders import JumpReLU, TopK

IDS = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))
BACKEND = "aot_eager"  # traces and functionalises like inductor, without its minutes of code generation


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def attached():
    model = tiny("llama")
    bank = two_directions(model)
    return model, bank, sl.attach(model, bank)


def logits(model, **kwargs):
    with torch.no_grad():
        return model(IDS, use_cache=False, **kwargs).logits


SETTINGS = [
    {"a": 2.0}, {"a": -1.0, "b": 0.5}, {"b": sl.Set(1.5)}, {"a": sl.Ablate(), "b": sl.Clamp(0.0, 0.1)}, {"a": [1.0, -3.0]},
    {"a": sl.Scale(2.0)}, {"a": sl.Add(2.0, tokens=slice(1, 3))}, {"a": sl.Add(2.0, tokens="generated")}, {},
]  # fmt: skip


def test_changing_settings_on_a_compiled_model_recompiles_nothing_and_equals_eager(attached):
    model, bank, steering = attached
    expected = []
    for edits in SETTINGS:
        steering.set(edits)
        expected.append(logits(model))
    steering.clear()
    model.compile(backend=BACKEND)
    logits(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        for edits, eager in zip(SETTINGS, expected, strict=True):
            steering.set(edits)
            torch.testing.assert_close(logits(model), eager, atol=1e-5, rtol=0)
        with sl.steer(model, bank, {"a": 2.0}):
            steering.clear()
            torch.testing.assert_close(logits(model), expected[0], atol=1e-5, rtol=0)
    assert not torch.allclose(expected[0], expected[1])


def test_a_compiled_model_swaps_nothing_and_says_why(attached):
    model, _, steering = attached
    model.compile(backend=BACKEND)
    logits(model)
    with pytest.raises(errors.Unanswerable, match="swaps.*one that is not compiled"):
        steering.set({"a": sl.Swap("b")})


def test_generation_on_a_compiled_model(attached):
    """Prompt and new tokens, schedules over steps and padded rows, with a static cache."""
    model, _, steering = attached
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.cat((torch.zeros(2, 2, dtype=torch.long), IDS), 1)
    mask = (ids > 0).long()

    def write():
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation="static")

    settings = [
        {"a": 3.0}, {"a": sl.Add(4.0, tokens="generated")}, {"a": sl.Add(4.0, tokens="prompt")}, {"a": [4.0, 0.0]},
        {"a": sl.Set(3.0, when=sl.Ramp(sl.Steps(0, 6)))}, {"b": sl.Add(3.0, when=sl.Steps(2, 5))}, {},
    ]  # fmt: skip
    expected = []
    for edits in settings:
        steering.set(edits)
        expected.append(write())
    steering.clear()
    model.compile(backend=BACKEND)
    write()
    write()
    with torch.compiler.set_stance("fail_on_recompile"):
        for edits, eager in zip(settings, expected, strict=True):
            steering.set(edits)
            assert torch.equal(write(), eager), edits
    assert len({tuple(e.flatten().tolist()) for e in expected}) >= 5


@pytest.mark.parametrize("site", ["layers.0", "layers.1.in", "layers.1.update"])
def test_latents_on_a_compiled_model(site):
    model = tiny("llama", initializer_range=0.4)
    g = torch.Generator().manual_seed(0)
    rows, back = (torch.randn(12, 32, generator=g) / 6 for _ in range(2))
    bank = sl.ConceptBank.from_encoder(
        JumpReLU(encoder=rows, decoder=back, bias=torch.zeros(12), threshold=torch.rand(12)), site=site, base=model
    )
    one, two = f"{site}/3", f"{site}/8"
    settings = [
        {one: sl.Set(2.0)}, {one: -0.5, two: sl.Ablate()}, {two: sl.Ablate(tokens="all")}, {one: [2.0, -1.0]},
        {two: sl.Scale(3.0)}, {},
    ]  # fmt: skip
    expected, steering = [], sl.attach(model, bank, allow_ood=True)
    for edits in settings:
        steering.set(edits)
        expected.append(logits(model))
    assert len({float(e.sum()) for e in expected}) == len(settings)
    steering.clear()
    model.compile(backend=BACKEND)
    logits(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        for edits, eager in zip(settings, expected, strict=True):
            steering.set(edits)
            torch.testing.assert_close(logits(model), eager, atol=1e-4, rtol=1e-4)
    with pytest.raises(errors.Unanswerable, match="exact=True.*compiled"):
        steering.set({one: sl.Ablate(exact=True)})


def test_competing_latents_on_a_compiled_model_need_their_threshold():
    model = tiny("llama")
    encoder = TopK(encoder=torch.eye(32), decoder=torch.eye(32), bias=torch.zeros(32), k=3, threshold=0.1)
    bank = sl.ConceptBank.from_encoder(encoder, site="layers.0", base=model)
    steering = sl.attach(model, bank)
    model.compile(backend=BACKEND)
    before = logits(model)
    with pytest.raises(errors.Unanswerable, match="exact=False"):
        steering.set({"layers.0/1": sl.Set(1.0)})
    steering.set({"layers.0/1": 1.0})  # what only adds need not be read
    assert not torch.equal(logits(model), before)
    steering.detach()


def test_attaching_to_a_compiled_model_is_refused_with_the_way_out():
    model = tiny("llama")
    bank = two_directions(model)
    model.compile(backend=BACKEND)
    logits(model)
    for attempt in (lambda: sl.attach(model, bank), lambda: sl.steer(model, bank, {"a": 1.0}).__enter__()):
        with pytest.raises(errors.CompiledModel, match="sl.attach"):
            attempt()
    with pytest.raises(errors.CompiledModel, match="sl.attach"), sl.record(model, ["layers.0"]):
        pass


def test_recording_where_compiled_code_runs_is_refused(attached):
    model, bank, steering = attached
    model.compile(backend=BACKEND)
    logits(model)
    for read in (bank, ["layers.0"]):
        with pytest.raises(errors.CompiledModel, match="recorded"), sl.record(model, read):
            pass
    steering.set({"a": 1.0})


def test_a_compiled_wrapper_is_refused_with_the_way_out():
    model = tiny("llama")
    wrapped = torch.compile(model, backend=BACKEND)
    with pytest.raises(errors.CompiledModel, match="model itself"):
        sl.steer(wrapped, two_directions(model), {"a": 1.0})


def test_a_report_tells_what_compiled_code_did(attached):
    model, _, steering = attached
    model.compile(backend=BACKEND)
    logits(model)
    steering.set({"a": 1.0, "b": sl.Add(1.0, tokens=slice(0, 2))})
    logits(model)
    logits(model)
    line = steering.report().lines[0]
    assert steering.report().ran and (line.passes, line.acted, line.seen, line.tokens) == (2, 2, 12, 12)


def test_a_function_compiled_around_the_model_before_is_steered():
    model = tiny("llama")
    bank = two_directions(model)
    around = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend=BACKEND)
    with torch.no_grad():
        plain = around(IDS)
        with sl.steer(model, bank, {"a": 2.0}):
            torch.testing.assert_close(around(IDS), logits(model), atol=1e-5, rtol=0)
            assert not torch.equal(around(IDS), plain)
        assert torch.equal(around(IDS), plain)


def test_what_needs_python_at_every_pass_is_refused_when_compiled(attached):
    model, _, steering = attached
    model.compile(backend=BACKEND)
    logits(model)
    with pytest.raises(errors.Unanswerable, match="compiled"):
        steering.set({"a": sl.Add(1.0, gate=sl.Gate("b", above=0.0))})
    with pytest.raises(errors.Unanswerable, match="room for"):
        steering.set({"a": [1.0] * 65})


def test_a_second_thread_on_a_compiled_model_is_busy(attached):
    model, bank, steering = attached
    model.compile(backend=BACKEND)
    steering.set({"a": 1.0})
    caught = []

    def other():
        try:
            with sl.steer(model, bank, {"b": 1.0}):
                pass
        except errors.ModelBusy as error:
            caught.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert caught
    expected = logits(model)
    steering.clear()
    assert not torch.equal(logits(model), expected)


def test_gradients_flow_through_compiled_edits(attached):
    model, _, steering = attached
    steering.set({"a": sl.Set(1.0)})
    model.compile(backend=BACKEND)
    model(IDS, use_cache=False).logits.square().mean().backward()
    grad = model.get_input_embeddings().weight.grad
    assert grad is not None and grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.real
def test_the_real_model_compiled_after_attaching_equals_eager_without_recompiling(real):
    model, tokenizer = real
    shipped = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
    batch = tokenizer(["How are you today?", "Hello"], return_tensors="pt", padding=True, padding_side="left")
    steering = sl.attach(model, shipped)
    useful = shipped["cooking"].useful or 0.0
    settings = [{"cooking": useful}, {"music": sl.Set(1.0), "cooking": -0.5 * useful}, {}]

    def logits():
        with torch.no_grad():
            return model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=1).logits

    try:
        eager = [(steering.set(edits), logits())[1] for edits in settings]
        steering.clear()
        model.compile(backend="eager")  # the code torch traced, without minutes of code generation
        logits()
        with torch.compiler.set_stance("fail_on_recompile"):
            for edits, expected in zip(settings, eager, strict=True):
                steering.set(edits)
                torch.testing.assert_close(logits(), expected, atol=1e-3, rtol=1e-4)
    finally:
        model._compiled_call_impl = None
        steering.detach()


# -- pipelines -------------------------------------------------------------------------------------------------

IMAGE_SETTINGS = [
    {"a": 1.0}, {"a": sl.Add([1.0, -1.0], when=sl.Window(0.0, 0.5))}, {"a": sl.Add(2.0, when=sl.Ramp(sl.Steps(0, 2)))},
    {"b": sl.Set(1.0), "a": sl.Ablate()}, {"a": sl.Scale(2.0)}, {},
]  # fmt: skip
BLOCKS = {
    "flux": "transformer.transformer_blocks.1:image",
    "sd1": "unet.mid_block.attentions.0.transformer_blocks.0",
    "wan": "transformer.blocks.1",
    "qwenimage": "transformer.transformer_blocks.0:image",
}


def test_means_of_tokens_are_moved_in_a_compiled_denoiser():
    pipe = PIPELINES["sd1"].build()
    bank = sl.ConceptBank.from_directions({"a": torch.randn(16)}, site="unet.mid_block.attentions.0.update.mean", base=pipe)
    plain = run(pipe)
    with sl.steer(pipe, bank, {"a": 2.0}):
        due = run(pipe)
    steering = sl.attach(pipe, bank)
    pipe.unet.compile(backend=BACKEND)
    for edits, expected in (({"a": 2.0}, due), ({}, plain)):
        steering.set(edits)
        torch.testing.assert_close(run(pipe), expected, atol=1e-4, rtol=1e-4)
    assert (due - plain).abs().max() > 1e-2
    steering.detach()


@pytest.mark.parametrize("whole", [False, True], ids=["repeated blocks", "whole denoiser"])
@pytest.mark.parametrize("family", BLOCKS)
def test_a_compiled_denoiser_equals_eager_and_recompiles_nothing(family, whole):
    if whole and family != "sd1":
        pytest.skip("the denoiser has a cache context of its own, which is no part of one graph")
    pipe = PIPELINES[family].build()
    a, b = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    bank = sl.ConceptBank.from_directions({"a": a, "b": b}, site=BLOCKS[family], base=pipe)
    expected = []
    for edits in IMAGE_SETTINGS:
        with sl.steer(pipe, bank, edits):
            expected.append(run(pipe, batch=2))
    steering = sl.attach(pipe, bank)
    denoiser = pipe.unet if family == "sd1" else pipe.transformer
    if whole:
        denoiser.compile(backend=BACKEND)
    else:
        denoiser.compile_repeated_blocks(fullgraph=True, backend=BACKEND)
    run(pipe, batch=2)
    with torch.compiler.set_stance("fail_on_recompile"):
        for edits, eager in zip(IMAGE_SETTINGS, expected, strict=True):
            if whole and "Steps" in str(edits):
                with pytest.raises(errors.Unanswerable, match="Window"):
                    steering.set(edits)
                continue
            steering.set(edits)
            torch.testing.assert_close(run(pipe, batch=2), eager, atol=1e-4, rtol=1e-4)
    steering.set({"a": 1.0})
    with pytest.raises(errors.Unanswerable, match="need Python"):
        steering.set({"a": sl.Add(1.0, branch="cond")})
    assert not torch.allclose(expected[0], expected[-1], atol=1e-3)


def test_a_denoiser_compiled_already_is_refused():
    pipe = PIPELINES["sd1"].build()
    bank = sl.ConceptBank.from_directions({"a": torch.randn(16)}, site=BLOCKS["sd1"], base=pipe)
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend=BACKEND)
    with pytest.raises(errors.CompiledModel, match="attach"), sl.steer(pipe, bank, {"a": 1.0}):
        pass
    other = PIPELINES["sd1"].build()
    bank = sl.ConceptBank.from_directions({"a": torch.randn(16)}, site=BLOCKS["sd1"], base=other)
    other.unet = torch.compile(other.unet, backend=BACKEND)
    with pytest.raises(errors.CompiledModel, match="attach"):
        sl.steer(other, bank, {"a": 1.0})


def test_texts_packed_by_position_ids_are_counted_as_in_eager_code():
    """The last token of each text is no pad, and positions begin anew with each."""
    model = tiny("llama")
    bank = two_directions(model, "layers.0")
    ids, places = torch.tensor([[3, 4, 5, 6, 7]]), torch.tensor([[0, 1, 2, 0, 1]])
    edits = ({"a": sl.Add(2.0, tokens=slice(1, 2))}, {"a": 2.0})

    def run(session):
        with torch.no_grad():
            return [session.set(edit) and model(ids, position_ids=places, use_cache=False).logits for edit in edits]

    steering = sl.attach(model, bank)
    eager = run(steering)
    model.compile(backend="eager", dynamic=False)
    torch.testing.assert_close(run(steering), eager, atol=1e-5, rtol=0)
    steering.detach()
