"""Whose edit it is: every way of running code side by side gives each request what it gets alone, or refuses it."""

import asyncio
import contextlib
import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import diffusers
import pytest
import torch
from conftest import two_directions
from diffusers.hooks import HookRegistry, ModelHook
from tiny_models import tiny
from tiny_pipelines import PIPELINES, WITH_TEXT, run

import steerlib as sl
from steerlib import errors
from steerlib.hooks.copies import StandIn

IDS = torch.tensor([[3, 5, 7, 9]])
MID = "unet.mid_block.attentions.0"


class Text:
    """A small language model, what it writes, and how a request steers it."""

    model: Any
    bank: Any
    alone: dict[str, Any]

    def __init__(self):
        self.model = tiny("llama")
        self.model.generation_config.eos_token_id, self.model.generation_config.pad_token_id = None, 0
        self.bank = two_directions(self.model)

    def call(self) -> Any:
        given = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        return torch.stack(self.model.generate(IDS, **given).logits)


class Image(Text):
    """The same of a pipeline."""

    def __init__(self):
        self.model = PIPELINES["sd1"].build()
        drawn = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
        self.bank = sl.ConceptBank.from_directions({"a": drawn[0], "b": drawn[1]}, site=MID, base=self.model)

    def call(self) -> Any:
        return run(self.model, steps=1)


@pytest.fixture(scope="module", params=[Text, Image])
def place(request):
    """A model, and what each request gets alone."""
    made = request.param()
    made.alone = {}
    for edits in EDITS:
        with entered(made, edits):
            made.alone[str(edits)] = made.call()
    assert len({float(out.sum()) for out in made.alone.values()}) == 3
    return made


EDITS: tuple[dict[str, float] | None, ...] = ({"a": 2.0}, {"a": -1.0, "b": 1.0}, {}, None)
"""Of four requests at a time: two that steer, one that keeps others' edits out, one that asks for nothing."""


def entered(made: Any, edits: Any) -> Any:
    return contextlib.nullcontext() if edits is None else sl.steer(made.model, made.bank, edits)


def safely(made: Any) -> Any:
    try:
        return made.call()
    except errors.NoSession as error:
        return error


def started(target) -> threading.Thread:
    thread = threading.Thread(target=target)
    thread.start()
    return thread


def threads(made: Any, carry=False) -> dict[str, Any]:
    found, together = {}, threading.Barrier(len(EDITS))

    def work(edits):
        with entered(made, edits):
            together.wait(60)
            if carry:
                context = copy_context()
                started(lambda: found.update({str(edits): context.run(safely, made)})).join()
            else:
                found[str(edits)] = safely(made)
            together.wait(60)

    for thread in [started(lambda edits=edits: work(edits)) for edits in EDITS]:
        thread.join()
    return found


def tasks(made: Any, how="here", manager: Any = entered) -> dict[str, Any]:
    async def request(edits, gate):
        with manager(made, edits):
            await gate.wait()
            if how == "pool":  # which carries no context
                return await asyncio.get_running_loop().run_in_executor(None, safely, made)
            return await asyncio.to_thread(safely, made) if how == "thread" else safely(made)

    async def main():
        gate = asyncio.Event()
        waiting = [asyncio.create_task(request(edits, gate)) for edits in EDITS]
        await asyncio.sleep(0)
        gate.set()
        return [await one for one in waiting]

    return dict(zip(map(str, EDITS), asyncio.run(main()), strict=True))


def answer(made: Any, edits: Any, manager: Any = entered) -> Iterator[Any]:
    with manager(made, edits):
        yield "thinking"
        yield safely(made)


def outer(made: Any, edits: Any):
    yield from answer(made, edits)


def generators(made: Any, workers=0, make: Any = answer, fresh=False) -> dict[str, Any]:
    """Advanced in turn: in this thread, by the workers of a pool, or, as servers do, each time in a context of its own."""
    waiting = {str(edits): make(made, edits) for edits in EDITS}
    with ThreadPoolExecutor(max(1, workers)) as pool:

        def step(one):
            job = (copy_context().run, next, one) if fresh else (next, one)
            return pool.submit(*job).result() if workers else job[0](*job[1:])

        for one in waiting.values():
            step(one)
        return {name: step(one) for name, one in waiting.items()}


def async_generators(made: Any, how="thread") -> dict[str, Any]:
    async def streamed(edits):
        with entered(made, edits):
            yield "thinking"
            yield await asyncio.to_thread(safely, made) if how == "thread" else safely(made)

    async def main():
        waiting = {str(edits): streamed(edits) for edits in EDITS}
        for one in waiting.values():
            await anext(one)
        found = {name: await anext(one) for name, one in waiting.items()}
        for one in waiting.values():
            await one.aclose()
        return found

    return asyncio.run(main())


@contextlib.contextmanager
def styled(made: Any, edits: Any):
    with entered(made, edits):
        yield


def stacked(made: Any, edits: Any):
    stack = contextlib.ExitStack()
    stack.enter_context(styled(made, edits))
    return stack


def contexts(made: Any) -> dict[str, Any]:
    """Contexts of one thread, entered in turn."""
    many, found = {str(edits): copy_context() for edits in EDITS}, {}
    sessions = {str(edits): entered(made, edits) for edits in EDITS}
    for name, context in many.items():
        context.run(sessions[name].__enter__)
    for name, context in many.items():
        found[name] = context.run(safely, made)
    for name, context in many.items():
        context.run(sessions[name].__exit__, None, None, None)
    return found


def ways() -> dict[str, Callable[[Any], dict[str, Any]]]:
    """Every way of running code side by side, by name."""
    return {
        "threads": threads,
        "threads that carry the context": lambda made: threads(made, carry=True),
        "tasks": tasks,
        "tasks, to_thread": lambda made: tasks(made, "thread"),
        "tasks, a pool without context": lambda made: tasks(made, "pool"),
        "tasks, context managers": lambda made: tasks(made, "thread", styled),
        "tasks, exit stacks": lambda made: tasks(made, "thread", stacked),
        "generators": generators,
        "generators, a pool of one": lambda made: generators(made, 1),
        "generators, a pool of two": lambda made: generators(made, 2),
        "generators, a context a step": lambda made: generators(made, 1, fresh=True),
        "nested generators": lambda made: generators(made, make=outer),
        "generators, context managers": lambda made: generators(made, make=lambda m, e: answer(m, e, styled)),
        "async generators": lambda made: async_generators(made, "here"),
        "async generators, to_thread": async_generators,
        "contexts": contexts,
    }


WAYS = ways()


@pytest.mark.filterwarnings("ignore::steerlib.errors.Outlived")  # the last session counts plain threads of others as its own
@pytest.mark.parametrize("way", WAYS)
def test_each_request_gets_what_it_gets_alone_or_is_refused(place, way: str):
    found: dict[str, Any] = WAYS[way](place)
    gc.collect()
    carries_none = "without context" in way
    for name in map(str, EDITS):
        is_refused = isinstance(found[name], errors.NoSession)  # only what carries no session of its own
        assert not is_refused or name == "None" or carries_none
        if not is_refused and (name != "None" or not carries_none):  # a plain thread may be served by the last session
            torch.testing.assert_close(found[name], place.alone[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(place.call(), place.alone["None"], rtol=0, atol=0)


def test_a_generator_steers_what_it_runs_and_not_its_consumer(place):
    one = answer(place, EDITS[0])
    next(one)
    assert torch.equal(place.call(), place.alone["None"]) and torch.equal(next(one), place.alone[str(EDITS[0])])
    one.close()


def test_a_context_manager_steers_the_block_of_its_caller(place):
    with styled(place, EDITS[0]):
        assert torch.equal(place.call(), place.alone[str(EDITS[0])])


def test_on_a_shared_model_a_thread_without_a_session_is_plain():
    place, found = Text(), []
    plain = place.call()
    with sl.steer(place.model, place.bank, {"a": 2.0}):
        started(lambda: found.append(place.call())).join()
        sl.share(place.model)
        started(lambda: found.append(place.call())).join()
        steered = place.call()
    assert torch.equal(found[0], steered) and torch.equal(found[1], plain) and not torch.equal(steered, plain)


def test_what_was_at_work_before_a_session_is_not_served_by_it():
    place, found = Text(), []
    before, go = threading.Event(), threading.Event()

    def request():
        before.set()
        go.wait(60)
        found.append(safely(place))

    thread = started(request)
    before.wait(60)
    with sl.steer(place.model, place.bank, {"a": 2.0}):
        go.set()
        thread.join()
        place.call()
    assert isinstance(found[0], errors.NoSession) and "at work before" in str(found[0])


def test_a_recording_sees_the_passes_of_its_own_task(place):
    async def record():
        with sl.record(place.model, place.bank, ["a"]) as tape:
            await asyncio.sleep(0)
            await asyncio.to_thread(place.call)
            return len(tape["a"])

    async def main():
        return await asyncio.gather(record(), record())

    one, two = asyncio.run(main())
    assert one == two == (3 if type(place) is Text else 1)


# -- what outlives its block, and what was lost ------------------------------------------------------------------


def test_a_generation_that_outlives_its_block_is_said():
    place, inside, left = Text(), threading.Event(), threading.Event()

    def streamed(_, scores):
        inside.set()
        left.wait(60)
        return scores

    write = {"max_new_tokens": 3, "logits_processor": [streamed]}
    with pytest.warns(errors.Outlived, match="goes on after it"), sl.steer(place.model, place.bank, {"a": 2.0}) as session:
        thread = started(lambda: place.model.generate(IDS, **write))
        inside.wait(60)
    left.set()
    thread.join()
    assert session.report().ran


def test_a_cell_that_is_run_again_does_not_add_up():
    place = Text()
    with sl.steer(place.model, place.bank, {"a": 1.0}):
        once = place.call()
    kept = []
    for again in (False, True, True):
        with pytest.warns(errors.Outlived, match="sl.detach") if again else contextlib.nullcontext():
            steering = sl.attach(place.model, place.bank)
            steering.set({"a": 1.0})
        kept.append(steering)
        assert torch.equal(place.call(), once)
    sl.steer(place.model, place.bank, {"b": 1.0}).__enter__()
    gc.collect()
    with pytest.warns(errors.Outlived, match="'b'"), sl.steer(place.model, place.bank, {}):
        assert torch.equal(place.call(), once)
    sl.detach(place.model)
    sl.detach(place.model)
    kept[-1].detach()


def left_on(model):
    """Everything that could stay on a model's modules."""
    return [
        (name, sorted(vars(module)), [len(vars(module)[hooks]) for hooks in ("_forward_hooks", "_forward_pre_hooks")])
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("kind", [Text, Image])
def test_detach_removes_whatever_was_lost(kind):
    place = kind()
    model = place.model if kind is Text else place.model.unet
    before, plain = left_on(model), place.call()
    lost = [sl.attach(place.model, place.bank).set({"a": 1.0}), sl.steer(place.model, place.bank, {"b": 1.0}).__enter__()]
    tape = sl.record(place.model, place.bank)
    tape.__enter__()
    assert not torch.equal(place.call(), plain)
    sl.detach(place.model)
    assert left_on(model) == before and torch.equal(place.call(), plain)
    for session in lost:
        session.detach()
    tape.__exit__(None, None, None)
    assert left_on(model) == before


# -- copies ------------------------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", [Text, Image])
@pytest.mark.parametrize("make", [copy.deepcopy, pickled, saved])
def test_a_copy_is_unsteered_and_its_own(kind, make):
    place = kind()
    model = place.model if kind is Text else place.model.unet
    before, plain = left_on(model), place.call()
    with sl.steer(place.model, place.bank, {"a": 2.0}, do="hold"):
        other = make(model)
        assert left_on(other) == before
    if kind is Text:
        assert torch.equal(copy.copy(place).call(), plain)
        place.model = other
    else:
        place.model.unet = other
    assert torch.equal(place.call(), plain)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(place.call(), plain) and left_on(model) == before


def test_a_copy_of_a_module_with_hooks_of_diffusers_is_unsteered_too():
    """Where sockets stand inside those hooks."""
    place = Image()
    module = place.model.unet.mid_block.attentions[0]
    HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), "of the user")
    plain = place.call()
    with sl.steer(place.model, place.bank, {"a": 2.0}):
        assert not torch.equal(place.call(), plain)
        other = copy.deepcopy(place.model.unet)
    refs = other.mid_block.attentions[0]._diffusers_hook._fn_refs
    assert not any(isinstance(kept, StandIn) for ref in refs for kept in vars(ref).values())
    place.model.unet = other
    assert torch.equal(place.call(), plain)


@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_a_users_own_generate_stays(when):
    place, calls = Text(), []

    def assign():
        plain = place.model.generate
        place.model.generate = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
        return place.model.generate

    own = assign() if when == "before" else None
    with sl.steer(place.model, place.bank, {"a": sl.Add(2.0, tokens="generated")}) as session:
        own = assign() if when == "inside" else own
        place.call()
    own = assign() if when == "after" else own
    assert place.model.generate is own and session.report().lines[0].tokens == 2
    place.call()
    assert calls


# -- modules that are shared, or replaced -----------------------------------------------------------------------


def test_siblings_are_steered_as_one():
    pipe = WITH_TEXT["sd_with_text"].build()
    other = diffusers.StableDiffusionPipeline.from_pipe(pipe)
    a, b = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    one = sl.ConceptBank.from_directions({"a": a}, site=MID, base=pipe)
    two = sl.ConceptBank.from_directions({"a": a, "b": b}, site=MID, base=other)
    both = {"a": sl.Set(1.0), "b": sl.Set(2.0)}
    with sl.steer(other, two, both), sl.record(pipe, two) as expected:
        run(pipe, steps=1)
    with sl.steer(pipe, one, {"a": sl.Set(1.0)}), sl.steer(other, two, {"b": sl.Set(2.0)}), sl.record(pipe, two) as tape:
        run(pipe, steps=1)
        with pytest.raises(errors.ConflictingEdits), sl.steer(other, two, {"a": sl.Set(2.0)}):
            pass
        bare = sl.ConceptBank.from_directions({"c": b}, site=MID.removeprefix("unet."), base=pipe.unet)
        with pytest.raises(errors.ConflictingEdits, match="share"), sl.steer(pipe.unet, bare, {"c": sl.Set(2.0)}):
            pass
    for name in both:
        torch.testing.assert_close(tape[name][0][1], expected[name][0][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Text, Image])
def test_a_module_that_is_replaced_inside_a_block_is_said(kind):
    place = kind()
    with pytest.raises(errors.SiteNotReached, match="replaced"), sl.steer(place.model, place.bank, {"a": 2.0}):
        place.call()
        if kind is Text:
            place.model.model.layers[0] = copy.deepcopy(place.model.model.layers[0])
        else:
            place.model.unet = copy.deepcopy(place.model.unet)
        place.call()


def test_edits_that_are_set_in_a_callback_are_reported_as_they_ran():
    place, given = Image(), PIPELINES["sd1"].call
    with sl.steer(place.model, place.bank, {"a": 2.0}) as session:
        place.model(**given(place.model) | {"callback_on_step_end": lambda p, i, t, k: session.set({"a": 1.0 - i}) and k})
    (line,) = session.report().lines
    assert line.acted == line.passes == 3 and session.report().ran
