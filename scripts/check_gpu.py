"""What matters most on an accelerator, in one command of a few minutes: `python scripts/check_gpu.py [--out gpu.json]`.

Seven stages: numbers equal the processor's; waits for the device; cost of steered decoding; of one latent of a TopK encoder; of
training steps over the floor of their products; of a compiled model and of a denoiser. Weights are random, in the shape of
SmolLM2-135M where nothing else is said: what is checked is arithmetic and cost, never effect. `--device cpu --quick` tries the
script itself where there is no accelerator. Ends with 1 where a number differs, a wait is added or something is compiled anew.
"""

import copy
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarks import diffusion
from benchmarks.latents import weights
from benchmarks.measurement import Condition, Table, Way, in_turns, machine, over, print_table, report, spread, within
from benchmarks.steering import bank_for, bare_hooks
from transformers import LlamaConfig, LlamaForCausalLM

import steerlib as sl
from steerlib.encoders import TopK
from steerlib.training.fit.encoder_recipe import EncoderRecipe
from steerlib.training.fit.learner import Learner

SHAPE: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
LATENTS, K, ROWS = 16_384, 32, (1, 32)
SIZES = ((576, 18_432, 32), (2048, 65_536, 64))
"""Width, latents and k of the autoencoders that are trained."""
APART = "largest difference, millionths"
OWN = ("steerlib/", "hooks/")


class Device:
    """Where everything runs, and how much of it: `--quick` does less of the same."""

    def __init__(self, name: str, quick: bool):
        self.device, self.quick = torch.device(name), quick
        self.layers, self.tokens, self.batch = (10, 4, 256) if quick else (30, 16, 8192)
        self.dtype = torch.bfloat16

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def model(self, layers: int, dtype: torch.dtype, vocabulary: int = 49_152) -> Any:
        """A Llama of random weights that never ends a text by itself."""
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPE, num_hidden_layers=layers, vocab_size=vocabulary, pad_token_id=0)
        model: Any = LlamaForCausalLM(config)
        model = model.eval().to(self.device, dtype)
        model.generation_config.eos_token_id = None
        return model

    def timed(self, condition: Condition, run: Callable[[], Any]) -> Way:
        """A way whose seconds end when the device has finished."""

        def whole() -> None:
            run()
            self.wait()

        return within(condition, whole)


def ids(rows: int, length: int = 16) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(1))


def write(model: Any, rows: int, new: int, padded: bool = False) -> torch.Tensor:
    """Greedy decoding of exactly so many new tokens."""
    mask = torch.ones_like(tokens := ids(rows))
    if padded:
        mask[0, :5] = 0
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    return model.generate(tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)


def topk_bank(model: Any) -> tuple[sl.ConceptBank, str]:
    """One TopK encoder in the middle of a model, and the latent that is always among its largest."""
    site, width = f"layers.{model.config.num_hidden_layers // 2}", model.config.hidden_size
    encoder = TopK(**{**weights(LATENTS, width), "bias": 1e3 * (torch.arange(LATENTS) == 17)}, k=K)
    return sl.ConceptBank.from_encoder(encoder, site=site, base=model), f"{site}/17"


def text_edits(model: Any) -> dict[str, Condition]:
    """Every kind of edit of text, by name."""
    directions, (latents, latent) = bank_for(model, 2), topk_bank(model)
    edits: dict[str, Mapping[str, Any]] = {
        "add": {"c0": 30.0, "c1": -20.0},
        "an amount a row": {"c0": [30.0, -30.0]},
        "set": {"c0": sl.Set(3.0), "c1": sl.Ablate()},
        "generated tokens": {"c0": sl.Add(30.0, tokens="generated")},
        "a gate": {"c1": sl.Add(30.0, gate=sl.Gate("c0", above=0.0))},
        "a ramp": {"c0": sl.Add(30.0, when=sl.Ramp(sl.Steps(0, 6)))},
        "do='hold'": {"c0": 30.0},
    }
    chosen: dict[str, Condition] = {"plain": nullcontext}
    for name, edit in edits.items():
        held: dict[str, Any] = {"do": "hold", "hold": ("c1",)} if name.startswith("do") else {}
        chosen[name] = partial(sl.steer, model, directions, edit, allow_ood=True, **held)
    return chosen | {"a TopK latent": partial(sl.steer, model, latents, {latent: sl.Set(5.0, unit="raw")}, allow_ood=True)}


@contextmanager
def recorded(model: Any) -> Iterator[None]:
    """Recording two sites."""
    with sl.record(model, ["layers.0", "layers.1"]):
        yield


# -- stages --------------------------------------------------------------------------------------------------


def parity(on: Device) -> tuple[Table, list[str]]:
    """The largest difference between the device and the processor, whose greedy texts have to be the same.

    Convolutions in full precision: by default torch rounds what they read to ten bits, which moves images by 0.17.
    """
    here = on.model(4, torch.float32, 2048).cpu()
    there = copy.deepcopy(here).to(on.device)
    table: Table = {}
    failed = []
    for name, (a, b) in {n: (c, text_edits(there)[n]) for n, c in text_edits(here).items()}.items():
        logits, texts = [], []
        for model, condition in ((here, a), (there, b)):
            with condition(), torch.no_grad():
                texts.append(write(model, 2, 12, padded=True).cpu())
                logits.append(model(ids(2).to(model.device)).logits.cpu())
        apart, same = float((logits[0] - logits[1]).abs().max()), torch.equal(*texts)
        table[f"{name}: logits"] = {APART: apart * 1e6}
        if apart > 1e-4 or not same:
            failed.append(f"{name}: logits {apart:.1e} apart, the same text: {same}")
    for name, (make, sites) in diffusion.PIPELINES.items():
        torch.manual_seed(0)
        pipe = quiet(make())
        chosen = diffusion.conditions(pipe, sites)
        drawn = {what: made(pipe, condition) for what, condition in chosen.items()}
        pipe.to(on.device)
        chosen = diffusion.conditions(pipe, sites)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            far = {what: float((made(pipe, condition) - drawn[what]).abs().max()) for what, condition in chosen.items()}
        table |= {f"{name}, {what}: latents": {APART: apart * 1e6} for what, apart in far.items()}
        failed += [f"{name}, {what}: latents {apart:.1e} apart" for what, apart in far.items() if apart > 1e-3]
    return table, failed


def quiet(pipe: Any) -> Any:
    """A pipeline without bars."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(pipe: Any, condition: Condition) -> torch.Tensor:
    """The latents of an image."""
    with condition():
        return pipe(**diffusion.given(pipe, 1)).images.float().cpu()


def waits(on: Device) -> tuple[Table, list[str]]:
    """How often the host waits for the device in 8 and in 24 new tokens, and which lines of steerlib add to that."""
    model = on.model(4, on.dtype, 2048)
    conditions = text_edits(model) | {"recording": partial(recorded, model)}
    counts = {}
    for name, condition in conditions.items():
        with condition():
            write(model, 2, 4)
            counts[name] = [waited(on, partial(write, model, 2, new)) for new in (8, 24)]
    table: Table = {
        name: {
            "in 8 new tokens": float(few.total()),
            "in 24": float(many.total()),
            "a token, by steerlib": ours(few, many) / 16,
        }
        for name, (few, many) in counts.items()
    }
    added = {name: (ours(few, many), many - few) for name, (few, many) in counts.items()}
    return table, [f"{name}: {n} waits in 16 more tokens, {where}" for name, (n, where) in added.items() if n]


def ours(few: Counter[str], many: Counter[str]) -> int:
    """Waits that lines of steerlib add with more tokens."""
    return sum(n for line, n in (many - few).items() if line.startswith(OWN))


def waited(on: Device, run: Callable[[], Any]) -> Counter[str]:
    """How often torch says that the host waits, by line."""
    if on.device.type != "cuda":
        run()
        return Counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    root = f"{Path(__file__).parent.parent}/"
    return Counter(f"{one.filename.removeprefix(root)}:{one.lineno}" for one in said if "synchronizing" in str(one.message))


def decoding(on: Device, rounds: int) -> Table:
    """Steered over unsteered, by rows and concepts."""
    model, seconds = on.model(on.layers, on.dtype), {}
    for rows in ROWS:
        ways: dict[str, Condition] = {"plain": nullcontext, "plain again": nullcontext}
        for count in (1, 8):
            bank = bank_for(model, count)
            sites = {int(c.encoder.partition(".")[2]): bank.rows(c).write[0].to(on.device) for c in bank.concepts.values()}
            ways[f"bare hook, {count}"] = partial(bare_hooks, model, sites)
            ways[f"steerlib, {count}"] = partial(sl.steer, model, bank, dict.fromkeys(bank.concepts, 1.0))
        run = partial(write, model, rows, on.tokens)
        timed = {name: on.timed(condition, run) for name, condition in ways.items()}
        seconds[f"batch {rows}"] = in_turns(timed, rounds, f"decoding, batch {rows}")
    return over("plain")(seconds)


def latent(on: Device, rounds: int) -> Table:
    """One latent of a TopK encoder set at every token, read beside all others, over unsteered."""
    model, seconds = on.model(on.layers, on.dtype), {}
    bank, name = topk_bank(model)
    edit = {name: sl.Set(0.01, unit="raw")}
    ways: dict[str, Condition] = {"plain": nullcontext, "plain again": nullcontext, "set": partial(sl.steer, model, bank, edit)}
    for rows in ROWS:
        run = partial(write, model, rows, on.tokens)
        timed = {name: on.timed(condition, run) for name, condition in ways.items()}
        seconds[f"batch {rows}"] = in_turns(timed, rounds, f"a latent, batch {rows}")
    return over("plain")(seconds)


def training(on: Device, rounds: int) -> Table:
    """A step of a TopK autoencoder over the product of its encoder alone, which no way of training can leave out."""
    seconds = {}
    for width, latents, k in SIZES[:1] if on.quick else SIZES:
        torch.manual_seed(0)
        x = torch.randn(on.batch, width, device=on.device)
        ways: dict[str, Way] = {}
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            recipe = EncoderRecipe(
                kind="topk", latents=latents, k=k, batch=on.batch, warmup=0.0, decay=0.0, auxk=0.0, normalise="none",
                precision=precision,  # type: ignore[arg-type]
            )  # fmt: skip
            learner = Learner(recipe, x, None, 10**6)
            ways[f"product, {precision}"] = on.timed(nullcontext, partial(product, x.to(dtype), learner))
            ways[f"step, {precision}"] = on.timed(nullcontext, partial(step, learner, x))
        seconds[f"{width} to {latents}, k {k}, batch {on.batch}"] = in_turns(ways, rounds, f"training, {width} to {latents}")
    return {
        what: {p: spread(a / b for a, b in zip(s[f"step, {p}"], s[f"product, {p}"], strict=True)) for p in ("fp32", "bf16")}
        | {f"step, {p}, ms": spread(a * 1e3 for a in s[f"step, {p}"]) for p in ("fp32", "bf16")}
        for what, s in seconds.items()
    }


def step(learner: Learner, x: torch.Tensor) -> None:
    """One step of the optimiser."""
    learner.learn(learner.outcome(x, None, 1), 1)


def product(x: torch.Tensor, learner: Learner) -> None:
    """Every token by every latent."""
    torch.nn.functional.linear(x, learner.weights["encoder"].to(x.dtype))


def compiled(on: Device, rounds: int) -> tuple[Table, list[str]]:
    """A compiled pass: attached and idle, or steered by ever other settings, over a compiled model without sockets."""
    plain = on.model(4 if on.quick else 8, torch.float32, 2048)
    model = copy.deepcopy(plain)
    bank, tokens, failed = bank_for(model, 2), ids(8).to(on.device), []
    settings: list[Any] = [
        {}, {"c0": 30.0}, {"c1": [float(k) for k in range(8)]}, {"c0": sl.Set(3.0), "c1": sl.Ablate()},
        {"c0": sl.Add(20.0, tokens=slice(2, 5))},
    ]  # fmt: skip
    steering = sl.attach(model, bank, allow_ood=True)

    def run(which: Any) -> torch.Tensor:
        with torch.no_grad():
            return which(tokens, use_cache=False).logits

    expected = [run(model) for edits in settings if steering.set(edits)]
    steering.clear()
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # else the model with sockets would run the code of the one without
    backend: Any = {"backend": "aot_eager"} if on.quick else {}
    for one in (plain, model):
        one.compile(**backend)
        run(one)
    at = iter(range(10**9))

    def switch() -> None:
        steering.set(settings[next(at) % len(settings)])
        run(model)

    with torch.compiler.set_stance("fail_on_recompile"):
        for edits, eager in zip(settings, expected, strict=True):
            steering.set(edits)
            if (apart := float((run(model) - eager).abs().max())) > 1e-3:
                failed.append(f"compiled, {edits}: logits {apart:.1e} from those of the model as it is")
        steering.clear()
        ways = {"plain": plain, "plain again": plain, "attached, idle": model}
        timed = {name: on.timed(nullcontext, partial(run, one)) for name, one in ways.items()}
        found = in_turns(timed | {"other settings each time": on.timed(nullcontext, switch)}, rounds * 5, "compiled")
    return over("plain")({"a compiled pass, 8 rows": found}), failed


def drawing(on: Device, rounds: int) -> Table:
    """Eight steps of a denoiser, steered over unsteered."""
    seconds = {}
    for name, (make, sites) in diffusion.PIPELINES.items():
        pipe = quiet(make()).to(on.device)
        run = partial(lambda pipe: pipe(**diffusion.given(pipe, 1)), pipe)
        timed = {what: on.timed(condition, run) for what, condition in diffusion.conditions(pipe, sites).items()}
        seconds[name] = in_turns(timed, rounds, name)
    return over("plain")(seconds)


def stages(on: Device, rounds: int) -> dict[str, Callable[[], Any]]:
    """By the title of its table, what is done."""
    return {
        "device against processor, fp32": partial(parity, on),
        "waits of the host for the device": partial(waits, on),
        "decoding in bf16, steered / unsteered: median (least–most)": partial(decoding, on, rounds),
        f"one of {LATENTS:,} latents of a TopK encoder set, over unsteered": partial(latent, on, rounds),
        "a step of training over its encoder's product: median (least–most)": partial(training, on, rounds),
        "compiled, over compiled without steerlib: median (least–most)": partial(compiled, on, rounds),
        "an image, steered / unsteered: median (least–most)": partial(drawing, on, rounds),
    }


def main(
    device: Annotated[str, typer.Option(help="where to run (default: the accelerator)")] = "",
    rounds: Annotated[int, typer.Option(help="rounds of each comparison")] = 11,
    quick: Annotated[bool, typer.Option(help="small sizes, two rounds: tries the script")] = False,
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON, after every stage")] = None,
) -> None:
    """Check an accelerator, print tables, and end with 1 where something is wrong."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if not device and found is None:
        raise SystemExit("no accelerator is available to torch; --device cpu --quick tries the script")
    on, failed, begun = Device(device or str(found), quick), [], time.monotonic()
    name = torch.cuda.get_device_name() if on.device.type == "cuda" else machine()
    todo, figures = stages(on, 2 if quick else rounds), {}
    for number, (title, stage) in enumerate(todo.items(), 1):
        print(f"stage {number} of {len(todo)}, after {time.monotonic() - begun:.0f} s: {title}", flush=True)
        try:
            result = stage()
        except Exception as error:  # noqa: BLE001 - the stages after it still say something
            failed.append(f"{title}: {type(error).__name__}: {error}")
            continue
        figures[title], wrong = result if isinstance(result, tuple) else (result, [])
        failed += wrong
        if out is not None:
            report({}, out, machine=name, rounds=rounds, **figures)
    for title, rows in figures.items():
        print_table(title, rows)
    print(f"\n{name}, torch {torch.__version__}, {time.monotonic() - begun:.0f} s")
    print("\n".join(["wrong:", *failed]) if failed else "all numbers agree, no wait is added, nothing is compiled anew")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    typer.run(main)
