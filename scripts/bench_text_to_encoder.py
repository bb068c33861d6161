"""The time from text to a trained encoder, beside SAELens' and sparsify's own runs on the same model.

    python scripts/bench_text_to_encoder.py --peers .venv-peers/bin/python [--rounds 3] [--out bench.json]

`bench_sae_train.py` says how to make the peers' environment. One process each, one thread, one at a time; every round runs all
of them, in another order. The clock starts when the model is loaded and stops when the encoder is there: the same documents,
tokens, layer, latents, batch and precision. `steerlib, its own choice` records at the precision that the machine is fast at.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

CONTEXT, BATCH, LATENTS, K, RATE = 128, 4096, 2304, 32, 5e-4

# -- one contestant, in an environment of its own ------------------------------------------------------------


def steerlib(place: Path, layer: int, tokens: int, precision: Any = "fp32") -> Callable[[], Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from steerlib.training.fit.encoder_recipe import EncoderRecipe
    from steerlib.training.fit.run import fit
    from steerlib.training.record.harvest import harvest

    model = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    tokenizer, site = AutoTokenizer.from_pretrained(place / "model"), f"layers.{layer}"
    recipe = EncoderRecipe(kind="topk", latents=LATENTS, k=K, batch=BATCH, rate=RATE, auxk=0.0)

    def run() -> None:
        how: dict[str, Any] = {"dtype": precision, "compute": precision} if precision else {}
        shards = harvest(model, tokenizer, place / "texts.jsonl", [site], "recorded", tokens=tokens, context=CONTEXT, **how)
        fit({site: recipe}, shards.source(site), steps=tokens // BATCH)

    return run


def own_choice(place: Path, layer: int, tokens: int) -> Callable[[], Any]:
    return steerlib(place, layer, tokens, None)


def saelens(place: Path, layer: int, tokens: int) -> Callable[[], Any]:
    from datasets import load_dataset  # type: ignore[import-not-found]
    from sae_lens import (  # type: ignore[import-not-found]
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )

    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=576, d_sae=LATENTS, k=K, aux_loss_coefficient=0.0),
        model_name=str(place / "model"),
        model_class_name="AutoModelForCausalLM",
        hook_name=f"model.layers.{layer}",
        dataset_path="texts",
        is_dataset_tokenized=False,
        streaming=False,
        context_size=CONTEXT,
        training_tokens=tokens,
        store_batch_size_prompts=16,
        n_batches_in_buffer=64,
        train_batch_size_tokens=BATCH,
        lr=RATE,
        device="cpu",
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    texts = load_dataset("json", data_files=str(place / "texts.jsonl"), split="train")
    return LanguageModelSAETrainingRunner(config, override_dataset=texts).run


def sparsify(place: Path, layer: int, tokens: int) -> Callable[[], Any]:
    from datasets import load_dataset  # type: ignore[import-not-found]
    from sparsify import SparseCoderConfig, TrainConfig, Trainer  # type: ignore[import-not-found]
    from sparsify.data import chunk_and_tokenize  # type: ignore[import-not-found]
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    coder = SparseCoderConfig(num_latents=LATENTS, k=K)
    config = TrainConfig(
        coder, batch_size=BATCH // CONTEXT, layers=[layer], optimizer="adam", lr=RATE, log_to_wandb=False, save_every=10**6
    )

    def run() -> None:
        texts = load_dataset("json", data_files=str(place / "texts.jsonl"), split="train")
        pieces = chunk_and_tokenize(texts, tokenizer, max_seq_len=CONTEXT, num_proc=None).select(range(tokens // CONTEXT))
        Trainer(config, pieces, model).fit()

    return run


CONTESTANTS = {
    "steerlib": steerlib,
    "steerlib, its own choice": own_choice,
    "saelens": saelens,
    "sparsify": sparsify,
}


def contest(name: str, place: str, layer: str, tokens: str) -> None:
    """Run one, and print its seconds."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        run = CONTESTANTS[name](Path(place), int(layer), int(tokens))
        start, busy = time.perf_counter(), time.process_time()
        run()
        print("ANSWER " + json.dumps({"seconds": time.perf_counter() - start, "busy": time.process_time() - busy}))


# -- all of them ---------------------------------------------------------------------------------------------


def asked(name: str, python: str, place: Path, layer: int, tokens: int) -> dict[str, float]:
    """What one contestant took."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "WANDB_MODE": "disabled"}
    command = [python, str(Path(__file__).resolve()), "--contest", name, str(place), str(layer), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet})
    for line in done.stdout.splitlines():
        if line.startswith("ANSWER "):
            return json.loads(line.removeprefix("ANSWER "))
    raise SystemExit(f"{name} ended without an answer:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def prepare(source: str, place: Path, tokens: int) -> None:
    """The model as a folder, and documents of about a thousand tokens."""
    from benchmarks.recording import a_text

    import steerlib as sl

    model: Any
    model, tokenizer = sl.load(source)
    config = deepcopy(model.config)
    del config.quantization_config  # of the file that it came from, which transformers would not save
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    named = place / "model" / "tokenizer_config.json"  # the peers' transformers is an older one
    named.write_text(json.dumps(json.loads(named.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    words = a_text(tokenizer, 2 * tokens).split()
    texts = [" ".join(words[i : i + 750]) for i in range(0, len(words), 750)]
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def main() -> None:
    """Print how long each takes, over steerlib's time."""
    import torch
    import typer
    from benchmarks.measurement import SOURCE, machine

    from steerlib.text import progress

    def bench(
        peers: Annotated[str, typer.Option(help="the Python of an environment with the peers")],
        rounds: Annotated[int, typer.Option(help="rounds of the comparison")] = 3,
        tokens: Annotated[int, typer.Option(help="tokens of text")] = 32_768,
        layer: Annotated[int, typer.Option(help="whose output is encoded")] = 15,
        out: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
        source: Annotated[str, typer.Option(help="the model")] = SOURCE,
    ) -> None:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
        with TemporaryDirectory() as folder:
            prepare(source, Path(folder), tokens)
            names = list(CONTESTANTS)
            for r in progress(range(rounds), "rounds"):
                for name in names[r % len(names) :] + names[: r % len(names)]:
                    python = sys.executable if name.startswith("steerlib") else peers
                    found[name].append(asked(name, python, Path(folder), layer, tokens))
        rows: dict[str, Any] = {}
        for name, times in found.items():
            pairs = list(zip(times, found["steerlib"], strict=True))
            ratios = {f"{key} over steerlib's": [mine[key] / own[key] for mine, own in pairs] for key in ("seconds", "busy")}
            columns = {"seconds": [time["seconds"] for time in times], **ratios}
            rows[name] = {key: [round(f(values), 2) for f in (statistics.median, min, max)] for key, values in columns.items()}
            print(f"{name:<26}" + "".join(f"   {key} {v[0]:g} ({v[1]:g}–{v[2]:g})" for key, v in rows[name].items()))
        if out is not None:
            about = {"machine": machine(), "torch": torch.__version__, "rounds": rounds, "tokens": tokens, "layer": layer}
            out.write_text(json.dumps({**about, "from text to encoder": rows}, indent=1) + "\n")

    typer.run(bench)


if __name__ == "__main__":
    contest(*sys.argv[2:]) if sys.argv[1:2] == ["--contest"] else main()
