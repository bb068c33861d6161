"""With `[readers]`: a concept is written as a control vector in GGUF, and read again."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import steerlib as sl
from steerlib.readers import repeng

model = nn.ModuleDict({"layers": nn.ModuleList([nn.Identity(), nn.Identity()])})
vector = torch.tensor([3.0, 4.0])
bank = sl.ConceptBank.from_directions({"calm": vector}, site="layers.1", base=model)
with tempfile.TemporaryDirectory() as folder:
    read = sl.read_bank(repeng.write(bank, "calm", Path(folder) / "calm.gguf"))
concept = read["calm"]
assert read.site_of(concept) == "layers.1" and torch.equal(concept.unit * read.rows(concept).write[0], vector)
