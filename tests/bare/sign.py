"""With `[sign]`: a bank is signed, and opened by who has the public key; another key is refused."""

import tempfile
from pathlib import Path

import torch
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

import steerlib as sl

model = nn.Sequential(nn.Identity())
bank = sl.ConceptBank.from_directions({"a": torch.ones(2)}, site="0", base=model)
with tempfile.TemporaryDirectory() as folder:
    paths = {}
    for name in ("mine", "other"):
        key = Ed25519PrivateKey.generate()
        paths[name] = Path(folder) / f"{name}.pem", Path(folder) / f"{name}.pub"
        private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        paths[name][0].write_bytes(private)
        paths[name][1].write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    bank.save_pretrained(Path(folder) / "bank", key=paths["mine"][0])
    opened = sl.ConceptBank.from_pretrained(Path(folder) / "bank")
    opened.verify(paths["mine"][1])
    try:
        opened.verify(paths["other"][1])
    except sl.errors.WrongSignature:
        pass
    else:
        raise AssertionError("expected another key to be refused")
