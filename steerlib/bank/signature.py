"""A detached signature: Ed25519 over `bank.json`, which holds the SHA-256 of everything else.

`openssl genpkey -algorithm ed25519 -out private.pem` makes a key, `openssl pkey -in private.pem -pubout -out public.pem` the
half that others check with. The signature is 64 bytes, which `openssl pkeyutl -verify -rawin` checks too.
"""

from pathlib import Path
from typing import Any

from ..errors import BadBank, MissingExtra, WrongSignature


def sign(file: Path, signature: Path, private_key: Path) -> None:
    """Write the signature of a file."""
    ed25519, serialization = _library()
    try:
        key = serialization.load_pem_private_key(private_key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise BadBank(f"expected an Ed25519 private key in PEM, without a password, in {private_key.name}: {error}") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise BadBank(f"expected an Ed25519 key, got {type(key).__name__}; `openssl genpkey -algorithm ed25519` makes one")
    signature.write_bytes(key.sign(file.read_bytes()))


def check(file: Path, signature: Path, public_key: Path) -> None:
    """Raise `WrongSignature` unless the holder of this key's other half signed the file."""
    ed25519, serialization = _library()
    from cryptography.exceptions import InvalidSignature

    try:
        key = serialization.load_pem_public_key(public_key.read_bytes())
    except (OSError, ValueError) as error:
        raise BadBank(f"expected an Ed25519 public key in PEM in {public_key.name}: {error}") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise BadBank(f"expected an Ed25519 public key, got {type(key).__name__}")
    if not signature.is_file():
        raise WrongSignature(f"the bank is not signed: it has no {signature.name}; ask its maker, or verify it without a key")
    try:
        key.verify(signature.read_bytes()[:65], file.read_bytes())
    except InvalidSignature:
        raise WrongSignature("bank.json was not signed with this key, or was altered since; do not trust the bank") from None


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise MissingExtra("signatures need cryptography: pip install 'steerlib[sign]'") from None
    return ed25519, serialization
