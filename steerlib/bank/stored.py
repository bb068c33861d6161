"""A bank and its files: checked, saved, published."""

import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import BadBank, NotReached, WrongModel
from ..hosts import Host
from . import card, hub, layout, signature
from .bank import Bank
from .manifest import SAID


class Stored(Bank):
    """What checks a bank and writes it; `ConceptBank` sets the attributes."""

    card: str
    license: str
    provenance: dict[str, Any]
    pictures: dict[str, bytes]
    extra: dict[str, Any]

    @property
    def folder(self) -> Path | None:
        """The folder of its files on this machine; None for a bank that was not opened from files."""
        return None if self._shelf.home is None else self._shelf.home.path

    def contents(self) -> dict[str, Any]:
        """The arguments of `ConceptBank` that make this bank; `encoders` are read when needed."""
        own = {key: getattr(self, key) for key in (*SAID, "graph", "card", "pictures")}
        return {**own, "concepts": list(self.concepts.values()), "encoders": self._shelf}

    def check(self, host: Host) -> str:
        """Compare the bank with a model; returns a notice if the weights are not those it was measured on, else "".

        `host` is the model's, `steerlib.hosts.host_for(model)`. Raises `WrongModel` if the architecture is another one.
        """
        model = self.base.id or "a model"
        if differs := self.base.differs(host):
            raise WrongModel(
                f"bank {self.name!r} was made for {model} with {differs}; load that model, or train a bank for this one"
            )
        if self.base.has_weights_of(host):
            return ""
        return (
            f"bank {self.name!r} was measured on other weights of {self.base.id or 'this architecture'}; "
            "effects may differ on a fine-tuned or differently quantised copy"
        )

    def verify(self, key: str | PathLike[str] | None = None) -> None:
        """Check every file, hash, value and reference; files that are still on the Hub are fetched.

        With `key`, the path of an Ed25519 public key in PEM, the signature is checked first. Raises `CorruptBank` at the first
        thing that is wrong, `WrongSignature` if that is the signature.

        >>> bank.verify()
        """
        if key is not None:
            if (home := self._shelf.home) is None:
                raise BadBank("only a bank that was saved has a signature; save it with key=")
            signature.check(home.path / "bank.json", home.signature(), Path(key))
        self._shelf.verify([place for concept in self.concepts.values() for place in concept.at], self.sites)

    def save_pretrained(self, folder: str | PathLike[str], *, key: str | PathLike[str] | None = None) -> Path:
        """Write the bank to a folder, all of it or nothing, in place of an older bank there; returns the folder.

        With `key`, the path of an Ed25519 private key in PEM, it is signed. Raises `BadBank` if the folder holds other things.
        """
        return layout.write(Path(folder), self.contents(), key)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        key: str | PathLike[str] | None = None,
    ) -> str:
        """Publish the bank in one commit, over what was there, and return the commit.

        Its card gets the metadata by which the Hub finds it, and what was measured; a bank without a card gets one.

        Args:
            repo_id: `org/name`; the repository is made if it is not there.
            private: whether a new repository is private (default: as the organisation has it).
            revision: branch to publish on; it is made if it is not there.
            token: access token of the Hub (default: that of `hf auth login`).
            commit_message: what the commit is called.
            key: path of an Ed25519 private key in PEM, to sign the bank with.

        Raises:
            NoAccess: the token may not write there.
            NotReached: the Hub did not answer; nothing was published.
        """
        from huggingface_hub import HfApi

        own, api = self.contents(), HfApi(token=token, library_name="steerlib")
        own["card"] = card.for_hub(self.card, self.name, repo_id, self.base.id, self.license, own["concepts"])
        with tempfile.TemporaryDirectory() as scratch, hub.asking(repo_id, "nothing was published, do it again online"):
            folder = layout.write(Path(scratch) / "bank", own, key)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            options: Any = {"commit_message": commit_message or f"Upload the bank {self.name}", "delete_patterns": hub.STALE}
            try:
                return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, **options).oid
            except RuntimeError as error:  # of one large file, whatever the cause
                raise NotReached(f"{error} ({error.__cause__}); nothing was published, do it again") from None
