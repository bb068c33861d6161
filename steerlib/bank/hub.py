"""Where banks come from and go to: a folder, those shipped with steerlib, the Hub.

Of a bank on the Hub, what is up to `SMALL` comes whole. Of a larger one come the descriptions; its weights stay where they are,
and single blocks are fetched when they are first read. They are kept under their own hash, so that revisions share them.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import BadBank, CorruptBank, NoAccess, NotReached, UnknownBank
from .trust import check_whole, checked_files, contained, strict_json

SMALL = 64 << 20
TIMEOUT = 30.0
TRIES = 3
SIGNATURE = "bank.json.sig"
STALE = ["sites/*", "concepts.jsonl", "graph.safetensors", "outcomes.jsonl", "hashes.safetensors", "bank.json", SIGNATURE]
"""What a bank published over another one takes away, unless it has it too; and all that the other one listed."""


def listed(repo_id: str, revision: str | None, token: str | bool | None) -> list[str]:
    """The files that the bank at an id on the Hub lists; none where there is no bank yet."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with tempfile.TemporaryDirectory() as scratch, suppress(EntryNotFoundError, CorruptBank, AttributeError):
        found = hf_hub_download(repo_id, "bank.json", revision=revision, token=token, local_dir=scratch)
        return [*checked_files(strict_json(Path(found).read_bytes(), "bank.json").get("files", {}))]
    return []


@dataclass(frozen=True)
class Home:
    """The files of a bank in a folder, or on the Hub at one commit, whose folder in the cache is `path`.

    `repository` is the id on the Hub, empty for a folder; the other options are those of `from_pretrained`.
    """

    path: Path
    repository: str = ""
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    _sized: dict[str, Path] = field(default_factory=dict)

    @property
    def source(self) -> tuple[str, str | None]:
        """By which name it is opened again, and at which commit of the Hub."""
        if self.repository:
            return self.repository, self.path.name
        return self.path.name if shipped().get(self.path.name) == self.path else str(self.path), None

    def fetch(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Bring files into the cache whole; what does not come as `bank.json` describes it does not stay there."""
        missing = {name: record for name, record in records.items() if not (self.path / name).is_file()}
        if not missing or not self.repository:
            return
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.utils import tqdm
        from tqdm.contrib.concurrent import thread_map

        sizes = [record["size"] for record in missing.values()]
        with asking(self.repository):
            thread_map(self._bring, list(missing), sizes, max_workers=8, desc=f"Fetching {self.repository}", tqdm_class=tqdm)
            with suppress(EntryNotFoundError):  # most banks are not signed
                self._download(SIGNATURE)
        for name, record in missing.items():
            self.check(name, record)

    def check(self, name: str, record: Mapping[str, Any]) -> Path:
        """A file that is here whole and unaltered; one that is not leaves the cache, so that it is fetched anew."""
        with _dropping(self.path, name) if self.repository else nullcontext():
            check_whole(self.path, name, record)
        return self.path / name

    def whole(self, name: str, record: Mapping[str, Any]) -> Path:
        """A file brought here, if it is not yet, and checked."""
        self.fetch({name: record})
        return self.check(name, record)

    def signature(self) -> Path:
        """Where the signature would be, fetched if the Hub has one."""
        if self.repository:
            from huggingface_hub.errors import RemoteEntryNotFoundError

            with asking(self.repository), suppress(RemoteEntryNotFoundError):
                self._download(SIGNATURE)
        return self.path / SIGNATURE

    def _bring(self, name: str, size: int) -> None:
        """Download a file, unless it is of another size than it should be."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        if not self.local_files_only:
            url = hf_hub_url(self.repository, name, revision=self.path.name)
            if (found := get_hf_file_metadata(url, token=self.token).size) not in (None, size):
                raise CorruptBank(
                    f"{name} has {found} bytes on the Hub, bank.json says {size}; tell whoever published {self.repository}"
                )
        self._download(name)

    def _download(self, name: str) -> None:
        from huggingface_hub import hf_hub_download

        options: Any = {"token": self.token, "cache_dir": self.cache_dir, "local_files_only": self.local_files_only}
        hf_hub_download(self.repository, name, revision=self.path.name, library_name="steerlib", **options)

    def read(self, name: str, record: Mapping[str, Any], start: int, stop: int, sha256: str | None) -> bytes:
        """Bytes of a file of at least the right size: from the file if it is here, else from those kept, else from the Hub."""
        if self.repository and not (self.path / name).is_file():
            from huggingface_hub import cached_assets_path

            assets = None if self.cache_dir is None else Path(self.cache_dir) / "assets"
            blocks = cached_assets_path("steerlib", namespace=self.repository, subfolder="blocks", assets_dir=assets)
            kept = blocks / (sha256 or hashlib.sha256(f"{record['sha256']}:{start}-{stop}".encode()).hexdigest())
            if kept.is_file() and _fits(data := kept.read_bytes(), stop - start, sha256):
                return data
            if (found := self._range(name, start, stop)) is not None:
                if _fits(found, stop - start, sha256):
                    with tempfile.TemporaryDirectory(dir=blocks, prefix=".") as scratch:  # written whole or not at all
                        (Path(scratch) / "block").write_bytes(found)
                        (Path(scratch) / "block").replace(kept)
                return found
            self.fetch({name: record})
        if name not in self._sized:
            self._sized[name] = contained(self.path, name)
            if self._sized[name].stat().st_size != record["size"]:
                raise CorruptBank(f"{name} is truncated or has grown; download the bank again")
        with self._sized[name].open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def _range(self, name: str, start: int, stop: int) -> bytes | None:
        """Some bytes of a file on the Hub; nothing where the server sends whole files only."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        if self.local_files_only:
            raise NotReached(f"local_files_only=True; {_uncached(self.repository)}")
        headers = build_hf_headers(token=self.token, library_name="steerlib")
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        options: Any = {"headers": headers, "timeout": TIMEOUT, "follow_redirects": True, "retry_on_exceptions": ()}
        url, left, data = hf_hub_url(self.repository, name, revision=self.path.name), TRIES, b""
        with asking(self.repository):
            while True:
                try:
                    with http_stream_backoff("GET", url, **options) as response:
                        hf_raise_for_status(response)
                        for chunk in response.iter_bytes() if response.status_code == 206 else ():
                            data += chunk
                            if len(data) > stop - start:
                                raise CorruptBank(f"the Hub sent more than the {stop - start} bytes of {name} asked for")
                        return data if response.status_code == 206 else None
                except _broken() as error:
                    left, data = left - 1, b""
                    if not left or isinstance(error, HfHubHTTPError):
                        raise


@dataclass(frozen=True)
class Filed(os.PathLike[str]):
    """The path of a file that a bank lists; the file is fetched and checked when the path is asked for."""

    home: Home
    name: str
    record: Mapping[str, Any]

    def __fspath__(self) -> str:
        return os.fspath(self.home.whole(self.name, self.record))


def _fits(data: bytes, size: int, sha256: str | None) -> bool:
    return len(data) == size and sha256 in (None, hashlib.sha256(data).hexdigest())


@contextmanager
def _dropping(folder: Path, name: str) -> Iterator[None]:
    """Take a file that turns out damaged out of the cache, and never one that the cache only links to."""
    try:
        yield
    except CorruptBank:
        with suppress(CorruptBank):
            contained(folder, name).resolve().unlink()
        with suppress(OSError):
            (folder / name).unlink()
        raise


def _check_blob(path: Path) -> None:
    """The cache names a file by what the Hub says its hash is: SHA-256, or that of git."""
    name, data = Path(os.path.realpath(path)).name, path.read_bytes()
    found = {64: hashlib.sha256(data), 40: hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)}.get(len(name))
    if found is not None and re.fullmatch("[0-9a-f]+", name) and found.hexdigest() != name:
        raise CorruptBank(f"{path.name} is not the file that the Hub has (truncated or altered); download the bank again")


def _broken() -> type[Exception]:
    """The class of all errors of the HTTP client that huggingface_hub uses, of its own answers too."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _uncached(id: str) -> str:
    return f"what is asked for of {id} is not in the cache; run `steerlib pull {id}` online"


@contextmanager
def asking(id: str, otherwise: str = "") -> Iterator[None]:
    """Errors of huggingface_hub as our own, with what to do; `otherwise` is for when the Hub is not reached."""
    from huggingface_hub import errors as hub

    login = "log in with `hf auth login`, or give token="
    try:
        yield
    except hub.GatedRepoError:
        raise NoAccess(f"{id} is gated: ask for access on its page, then {login}") from None
    except hub.RepositoryNotFoundError:
        raise UnknownBank(f"the Hub shows no repository {id}; check the name, or if it is private, {login}") from None
    except hub.RevisionNotFoundError:
        raise UnknownBank(f"{id} has no such revision; give a branch, a tag or a commit it has") from None
    except hub.RemoteEntryNotFoundError as error:
        raise UnknownBank(f"{id} lacks a file of a bank: {str(error).strip().splitlines()[-1]}") from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        first = str(error.__cause__ or error).strip().splitlines()[0]
        raise NotReached(f"the Hub was not reached ({first}); {otherwise or _uncached(id)}") from None
    except hub.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise NoAccess(f"this token may not do that with {id}; {login} that may") from None
        raise NotReached(f"the Hub refused: {str(error).strip().splitlines()[0]}") from None
    except hub.HFValidationError as error:
        raise BadBank(f"expected a Hub id org/name, got {id!r}: {error}") from None
    except (hub.FileMetadataError, _broken()) as error:
        raise NotReached(f"the Hub did not answer as a Hub does ({type(error).__name__}: {error}); try again later") from None


def home_of(name: str | os.PathLike[str], *, revision: str | None = None, **options: Any) -> Home:
    """Where a bank is: a folder that exists, else one shipped with steerlib, else a Hub repository.

    `options` are those of `from_pretrained`.
    """
    if (path := Path(name) if Path(name).is_dir() else shipped().get(str(name))) is not None:
        if revision is not None:
            raise BadBank(f"{str(name)!r} is a folder, which has no revisions; leave out revision={revision!r}")
        return Home(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise BadBank(f"expected a folder, a shipped bank ({', '.join(shipped())}) or a Hub id org/name, got {str(name)!r}")
    from huggingface_hub import hf_hub_download

    with asking(str(name)):
        found = Path(hf_hub_download(str(name), "bank.json", revision=revision, **options))
    with _dropping(found.parent, "bank.json"):
        _check_blob(found)
    return Home(found.parent, str(name), **options)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A bank that can be opened by its `name`: for the model `base_model`, and whether it comes with steerlib."""

    name: str
    base_model: str
    is_shipped: bool


def shipped() -> dict[str, Path]:
    """Folders of the banks that come with steerlib, by name."""
    return {path.parent.name: path.parent for path in sorted(Path(str(files("steerlib.concept_banks"))).glob("*/bank.json"))}


def list_banks(
    base_model: str | None = None, *, token: str | bool | None = None, local_files_only: bool = False
) -> list[Listed]:
    """Banks that can be opened by name: first those shipped with steerlib, then those on the Hub.

    Args:
        base_model: id of a model on the Hub, to list the banks made for it alone.
        token: access token of the Hub (default: that of `hf auth login`); it shows your private banks too.
        local_files_only: list only the shipped ones, without a network.

    Raises:
        NotReached: the Hub did not answer.

    >>> [found.name for found in sl.list_banks(local_files_only=True)]
    ['faces-32-latents', 'scenes-32', 'smollm2-135m-instruct', 'smollm2-135m-latents']
    """
    bases = {name: strict_json((path / "bank.json").read_bytes(), name)["base_model"]["id"] for name, path in shipped().items()}
    found = [Listed(name=name, base_model=base, is_shipped=True) for name, base in bases.items()]
    if not local_files_only:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import get_session

        tags = ["steerlib", *([f"base_model:{base_model}"] if base_model else [])]
        with asking("the list of banks", "local_files_only=True lists those shipped with steerlib"):
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT)  # once: listing would try again and again without a network
            models = list(HfApi(token=token, library_name="steerlib").list_models(filter=tags))
        for model in sorted(models, key=lambda model: model.id):
            bases = [tag.partition(":")[2] for tag in model.tags or () if re.fullmatch(r"base_model:[^:]+", tag)]
            found.append(Listed(name=model.id, base_model=bases[0] if bases else "", is_shipped=False))
    return [bank for bank in found if base_model in (None, bank.base_model)]
