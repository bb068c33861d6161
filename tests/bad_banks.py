"""Banks that a stranger broke or forged, one after the other, and whether each is refused or sound."""

import hashlib
import json
import math
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import torch

import steerlib as sl
from steerlib import errors
from steerlib.bank import trust
from steerlib.bank.concept_bank import SiteFacts
from steerlib.encoders import KINDS

Choose = Callable[[int], int]
"""A number from 0 up to, not including, n: what makes a bank bad, drawn by hypothesis or at random."""
Files = dict[str, bytes]
LIMIT = 1.0
"""Seconds of the processor for one bank: those of the clock are also spent on other programs."""
FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect", "ctypes.dlopen")
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "shutil.move")
ODD: tuple[Any, ...] = (
    None, True, 0, 1, 2, -1, 3, 1 << 16, 1 << 31, 1 << 63, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320, "", "a", "concept 0",
    "../x", "/etc/passwd", "C:\\x.json", "sites/../../x.json", "aux.json", "sites/a.pt", "x.json ", "a" * 300, "\x1b[31m",
    "\ud800", "ünï\u202e", "layers.0", "pickle", "directions", "relu", "F32", "I64", "F64", [], {}, [[]], [0], [1, 2], [-1, 5],
    [0, 1 << 40],
    {"a": 1}, {"encoder": "layers.0", "index": 0, "unit": 1.0}, [{"encoder": "layers.0", "index": 9, "unit": 1.0}],
    {"concept": "concept 1"}, {"concept": "concept 1", "above": "x"},
)  # fmt: skip
RAW = (
    b"", b"{", b"[]", b"null", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000, b'{"format": NaN}', b"1" * 5000,
    b'{"format": 1, "format": 1}', b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93.", b"\xff" * 64,
    b"PK\x03\x04" + bytes(60), struct.pack("<Q", 1 << 63) + b"{}", struct.pack("<Q", 100 << 20) + b"{}", b"\xff\xfe{\x00",
    struct.pack("<Q", 2) + b"{}",
)  # fmt: skip
WEIGHTS = ("sites/layers.0.safetensors", "sites/layers.1.safetensors")
OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "relu": ({"unit": torch.ones(3), "high": torch.ones(3)}, {"centred": True}),
    "jumprelu": ({"threshold": torch.ones(3)}, {"norm": "layer"}),
    "topk": ({}, {"k": 2, "threshold": 0.5}),
    "batchtopk": ({}, {"k": 2.0, "threshold": 0.5}),
    "matryoshka": ({}, {"groups": [1, 2], "k": 2.0, "threshold": 0.5}),
    "gated": ({"gate_bias": torch.ones(3), "log_scale": torch.zeros(3)}, {}),
    "transcoder": ({"threshold": torch.ones(3), "skip": torch.eye(4)}, {}),
}
"""What each sparse kind has beside its matrices."""
NUMBERS = (math.nan, math.inf, -math.inf, 1e38, 1e-42, 0.0, -1.0)


def good(folder: Path, kind: str) -> Files:
    """A small bank with something of everything, latents of one kind among it."""
    generator = torch.Generator().manual_seed(0)
    matrices = {name: torch.randn(3, 4, generator=generator) for name in ("encoder", "decoder")}
    own, settings = OWN[kind]
    made = KINDS[kind].from_tensors({**matrices, "bias": torch.zeros(3), "decoder_bias": torch.ones(4), **own}, settings)
    gate = sl.Gate("concept 1", above=0.5, full=1.5)
    concepts = [
        sl.Concept(
            name=f"concept {i}", encoder="layers.0", index=i, unit=0.5, natural=(-1.0, 1.0), range=(-2.0, 2.0), useful=1.0,
            label="a label", examples=("a",), gate=gate if i == 0 else None, present=0.5 if i == 1 else None,
            parts=(sl.Part(encoder="layers.1", index=2 - i, unit=0.25),),
        )
        for i in range(3)
    ]  # fmt: skip
    edges = [sl.Edge(src=f"concept {i}", dst=f"concept {i + 1}", weight=0.5) for i in range(2)]
    bank = sl.ConceptBank(
        "good", concepts, {"layers.0": sl.Directions(torch.randn(3, 4, generator=generator)), "layers.1": made},
        base=sl.BaseModel(id="org/model", fingerprint={"width": 4}), license="apache-2.0", provenance={"seed": 0},
        sites={f"layers.{i}": SiteFacts(width=4, norm=2.0) for i in range(2)}, graph=sl.CausalGraph(edges), card="# good\n",
        reads={"layers.1": "layers.0"} if kind == "transcoder" else None,
    )  # fmt: skip
    bank.save_pretrained(folder)
    names = ("README.md", "bank.json", "concepts.jsonl", "graph.safetensors", "hashes.safetensors", *WEIGHTS)
    return {name: (folder / name).read_bytes() for name in names}


def from_bytes(draw: bytes) -> Choose:
    """Choices made by two bytes each, and by nothing when they are used up."""
    pairs = iter(range(0, len(draw), 2))
    return lambda n: int.from_bytes(draw[(at := next(pairs, len(draw))) : at + 2], "little") % n


# -- what strangers do ---------------------------------------------------------------------------------------


def spoilt(files: Files, choose: Choose) -> Files:
    """Some files changed in one to three ways; in half of the cases hashes are made true again, as a publisher could."""
    files = dict(files)
    for _ in range(1 + choose(3)):
        name = sorted(files)[choose(len(files))]
        files[name] = MOVES[choose(len(MOVES))](name, files[name], choose)
    return sealed(files) if choose(2) else files


def flip(name: str, data: bytes, choose: Choose) -> bytes:
    if not data:
        return data
    at = choose(len(data))
    return data[:at] + bytes([data[at] ^ 1 << choose(8)]) + data[at + 1 :]


def cut(name: str, data: bytes, choose: Choose) -> bytes:
    return data[: choose(len(data) + 1)]


def grow(name: str, data: bytes, choose: Choose) -> bytes:
    return data + bytes(choose(3) * 8) + RAW[choose(len(RAW))][:64]


def replace(name: str, data: bytes, choose: Choose) -> bytes:
    return RAW[choose(len(RAW))]


def number(name: str, data: bytes, choose: Choose) -> bytes:
    """Another float in the data of a tensor, or anywhere in another file."""
    if len(data) < 16:
        return data
    at = choose(len(data) // 4) * 4
    return data[:at] + struct.pack("<f", NUMBERS[choose(len(NUMBERS))]) + data[at + 4 :]


def edit(name: str, data: bytes, choose: Choose) -> bytes:
    """Another value in the JSON of a manifest, of a line, of a header."""
    try:
        if name.endswith(".safetensors"):
            length = int.from_bytes(data[:8], "little")
            text = changed(json.loads(data[8 : 8 + length]), choose)
            return len(text).to_bytes(8, "little") + text + data[8 + length :]
        if name.endswith(".jsonl"):
            lines = data.splitlines() or [b"{}"]
            at = choose(len(lines))
            return b"\n".join([*lines[:at], changed(json.loads(lines[at]), choose), *lines[at + choose(2) :]])
        return changed(json.loads(data), choose)
    except (ValueError, IndexError, AttributeError, RecursionError):
        return flip(name, data, choose)


def changed(value: Any, choose: Choose) -> bytes:
    """JSON with one member, however deep, changed, removed, renamed or doubled."""
    places: list[tuple[Any, Any]] = []
    level = [value]
    while level:
        item = level.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        places += [(item, key) for key in keys]
        level += [item[key] for key in keys]
    if not places:
        return json.dumps(ODD[choose(len(ODD))]).encode()
    item, key = places[choose(len(places))]
    way = choose(4)
    if way == 1 and isinstance(item, dict):
        del item[key]
    elif way == 2 and isinstance(item, dict):
        item[str(ODD[choose(len(ODD))])] = item.pop(key)
    elif way == 3:
        other, place = places[choose(len(places))]
        item[key] = json.loads(json.dumps(other.get(place) if isinstance(other, dict) else other[place : place + 1]))
    else:
        item[key] = ODD[choose(len(ODD))]
    return json.dumps(value).encode()


MOVES = (flip, cut, grow, replace, number, edit, edit, edit)


def sealed(files: Files) -> Files:
    """True sizes and hashes for whatever the files are now, where `bank.json` can still be read."""
    try:
        manifest = json.loads(files["bank.json"])
        for name in manifest["files"]:
            data = files[name]
            blocks = b"".join(hashlib.sha256(data[i : i + trust.BLOCK]).digest() for i in range(0, len(data), trust.BLOCK))
            record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            manifest["files"][name] = record | ({"blocks": trust.group_hashes(blocks)} if name.startswith("sites/") else {})
        return {**files, "bank.json": json.dumps(manifest).encode()}
    except (KeyError, TypeError, ValueError, RecursionError):
        return files


# -- what becomes of it --------------------------------------------------------------------------------------


class Court:
    """Opens bad banks in a folder of its own and raises where one does harm."""

    def __init__(self):
        memory = Path("/dev/shm")  # where it exists: disks take longer than the reader
        self._scratch = tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)
        scratch = Path(self._scratch.name)
        self.folder, self.again = scratch / "bank", scratch / "again"
        (self.folder / "sites").mkdir(parents=True)
        self.banks = [good(scratch / kind, kind) for kind in OWN]
        self.counts = {"refused": 0, "sound": 0}
        self.slowest = 0.0
        self._allowed = (str(scratch), os.devnull)
        self._harm: list[str] = []
        self._watching = False
        sys.addaudithook(self._audit)
        self.try_one(lambda n: 0)  # what is imported late is imported now
        self.counts = {"refused": 0, "sound": 0}

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in FORBIDDEN or (writes or event in WRITES) and not str(arguments[0]).startswith(self._allowed):
            self._harm.append(f"{event} {arguments!r:.200}")

    def try_one(self, choose: Choose) -> str:
        """Make one bad bank and open it; `refused` or `sound`."""
        files = spoilt(self.banks[choose(len(self.banks))], choose)
        for name, data in files.items():
            (self.folder / name).write_bytes(data)
        start = process_time()
        outcome = self.opened()
        seconds = process_time() - start
        self.slowest = max(self.slowest, seconds)
        self.counts[outcome] += 1
        assert seconds < LIMIT, f"took {seconds:.1f} s"
        return outcome

    def opened(self) -> str:
        """Whatever is not refused has to be a bank in every respect, and the same when written and read again."""
        self._watching = True
        try:
            bank = sl.ConceptBank.from_pretrained(self.folder)
            bank.verify()
            repr(bank)
            rows = {name: bank.rows(bank[name]) for name in (*bank, *(f"{id}/0" for id in bank.encoders))}
        except errors.SteerlibError:
            return "refused"
        finally:
            self._watching = False
            harm, self._harm = self._harm, []
            assert not harm, harm
        manifest = json.loads((self.folder / "bank.json").read_bytes())
        for name, record in manifest["files"].items():
            assert hashlib.sha256((self.folder / name).read_bytes()).hexdigest() == record["sha256"], name
        assert all(math.isfinite(c.unit) and c.unit > 0 and c.name.isprintable() for c in bank.concepts.values())
        assert all(tensor.isfinite().all() for found in rows.values() for tensor in (found.read, found.bias, found.write))
        assert all(math.isfinite(edge.weight) and {edge.src, edge.dst} <= set(bank) for edge in bank.graph.edges)
        again = sl.ConceptBank.from_pretrained(bank.save_pretrained(self.again))
        assert list(again.concepts.values()) == list(bank.concepts.values()) and again.graph.edges == bank.graph.edges
        assert again.encoders.keys() == bank.encoders.keys() and again.card == bank.card and again.base == bank.base
        return "sound"
