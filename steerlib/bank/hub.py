"""Where banks come from and go to: a folder, those shipped with steerlib, the Hub.

Of a bank on the Hub, what is up to `SMALL` comes whole. Of a larger one come the descriptions; its weights stay where they are,
and single blocks are fetched when they are first read. They are kept under their own hash, so that revisions share them.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import BadBank, CorruptBank, NoAccess, NotReached, UnknownBank
from .trust import check_whole, contained, strict_json

SMALL = 64 << 20
TIMEOUT = 30.0
TRIES = 3
SIGNATURE = "bank.json.sig"
STALE = ["sites/*", "concepts.jsonl", "graph.safetensors", "hashes.safetensors", "bank.json", SIGNATURE]
"""What a bank published over another one takes away, unless it has it too."""


class Folder:
    """The files of a bank on this machine."""

    def __init__(self, path: Path):
        self.path = path
        self._files: dict[str, Path] = {}

    def fetch(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Bring files here; a folder has what it has."""

    def check(self, name: str, record: Mapping[str, Any]) -> Path:
        """A file that is here whole and unaltered."""
        check_whole(self.path, name, record)
        return self.path / name

    def signature(self) -> Path:
        """Where the signature would be."""
        return self.path / SIGNATURE

    def read(self, name: str, record: Mapping[str, Any], start: int, stop: int, sha256: str | None) -> bytes:  # noqa: ARG002
        """Bytes of a file of which at least the size is right."""
        if name not in self._files:
            path = contained(self.path, name)
            if path.stat().st_size != record["size"]:
                raise CorruptBank(f"{name} is truncated or has grown; download the bank again")
            self._files[name] = path
        with self._files[name].open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


@dataclass(frozen=True)
class Repository:
    """The files of a bank on the Hub at one commit: those in the cache, and the others as they are asked for."""

    id: str
    path: Path
    """The folder of this commit in the cache of huggingface_hub."""
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    @cached_property
    def _local(self) -> Folder:
        return Folder(self.path)

    @cached_property
    def _blocks(self) -> Path:
        from huggingface_hub import cached_assets_path

        assets = None if self.cache_dir is None else Path(self.cache_dir) / "assets"
        return cached_assets_path("steerlib", namespace=self.id, subfolder="blocks", assets_dir=assets)

    def fetch(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Bring files into the cache whole; what does not come as `bank.json` describes it does not stay there."""
        missing = {name: record for name, record in records.items() if not (self.path / name).is_file()}
        if not missing:
            return
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.utils import tqdm
        from tqdm.contrib.concurrent import thread_map

        sizes = [record["size"] for record in missing.values()]
        with asking(self.id, _uncached(self.id)):
            thread_map(self._bring, list(missing), sizes, max_workers=8, desc=f"Fetching {self.id}", tqdm_class=tqdm)
            with suppress(EntryNotFoundError):  # most banks are not signed
                self._download(SIGNATURE)
        for name, record in missing.items():
            self.check(name, record)

    def check(self, name: str, record: Mapping[str, Any]) -> Path:
        """A file that is in the cache whole and unaltered; one that is not leaves the cache, so that it is fetched anew."""
        with _dropping(self.path, name):
            return self._local.check(name, record)

    def signature(self) -> Path:
        """Where the signature is, fetched if there is one."""
        from huggingface_hub.errors import RemoteEntryNotFoundError

        with asking(self.id, _uncached(self.id)), suppress(RemoteEntryNotFoundError):
            return self._download(SIGNATURE)
        return self.path / SIGNATURE

    def _bring(self, name: str, size: int) -> None:
        """Download a file, unless it is of another size than it should be."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        if not self.local_files_only:
            url = hf_hub_url(self.id, name, revision=self.path.name)
            if (found := get_hf_file_metadata(url, token=self.token).size) not in (None, size):
                raise CorruptBank(
                    f"{name} has {found} bytes on the Hub, bank.json says {size}; tell whoever published {self.id}"
                )
        self._download(name)

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                self.id,
                name,
                revision=self.path.name,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
                library_name="steerlib",
            )
        )

    def read(self, name: str, record: Mapping[str, Any], start: int, stop: int, sha256: str | None) -> bytes:
        """Bytes of a file: from the file if it is here, else from those kept, else from the Hub."""
        if (self.path / name).is_file():
            return self._local.read(name, record, start, stop, sha256)
        kept = self._blocks / (sha256 or hashlib.sha256(f"{record['sha256']}:{start}-{stop}".encode()).hexdigest())
        if kept.is_file() and len(data := kept.read_bytes()) == stop - start:
            if sha256 is None or hashlib.sha256(data).hexdigest() == sha256:
                return data
            kept.unlink(missing_ok=True)
        found = self._range(name, start, stop)
        if found is None:
            self.fetch({name: record})
            return self._local.read(name, record, start, stop, sha256)
        if sha256 is None or hashlib.sha256(found).hexdigest() == sha256:
            _keep(found, kept)
        return found

    def _range(self, name: str, start: int, stop: int) -> bytes | None:
        """Some bytes of a file on the Hub; nothing where the server sends whole files only."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        if self.local_files_only:
            raise NotReached(f"local_files_only=True; {_uncached(self.id)}")
        url = hf_hub_url(self.id, name, revision=self.path.name)
        headers = build_hf_headers(token=self.token, library_name="steerlib")
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with asking(self.id, _uncached(self.id)):
            for left in reversed(range(TRIES)):
                try:
                    with http_stream_backoff(
                        "GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True, retry_on_exceptions=()
                    ) as response:
                        hf_raise_for_status(response)
                        if response.status_code != 206:
                            return None
                        data = b""
                        for chunk in response.iter_bytes():
                            data += chunk
                            if len(data) > stop - start:
                                raise CorruptBank(f"the Hub sent more than the {stop - start} bytes of {name} asked for")
                    return data
                except HfHubHTTPError:
                    raise
                except _broken():
                    if not left:
                        raise
        raise AssertionError("the last try returns or raises")


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


def _keep(data: bytes, path: Path) -> None:
    """Write a file whole or not at all, whoever else writes it."""
    handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(fresh).replace(path)
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise


def _uncached(id: str) -> str:
    return f"what is asked for of {id} is not in the cache; run `steerlib pull {id}` online"


@contextmanager
def asking(id: str, otherwise: str) -> Iterator[None]:
    """What goes wrong between us and the Hub, said with what to do about it; `otherwise` is for when it is away."""
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
        raise NotReached(f"the Hub was not reached ({first}); {otherwise}") from None
    except hub.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise NoAccess(f"this token may not do that with {id}; {login} that may") from None
        raise NotReached(f"the Hub refused: {str(error).strip().splitlines()[0]}") from None
    except hub.HFValidationError as error:
        raise BadBank(f"expected a Hub id org/name, got {id!r}: {error}") from None
    except (hub.FileMetadataError, _broken()) as error:
        raise NotReached(f"the Hub did not answer as a Hub does ({type(error).__name__}: {error}); try again later") from None


def home_of(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Folder | Repository:
    """Where a bank is: a folder that exists, else one shipped with steerlib, else a Hub repository."""
    shipped = Path(str(files("steerlib.concept_banks"))) / str(name)
    is_shipped = re.fullmatch(r"[A-Za-z0-9._-]+", str(name)) and (shipped / "bank.json").is_file()
    if Path(name).is_dir() or is_shipped:
        if revision is not None:
            raise BadBank(f"{str(name)!r} is a folder, which has no revisions; leave out revision={revision!r}")
        return Folder(Path(name) if Path(name).is_dir() else shipped)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise BadBank(
            f"expected a folder, a shipped bank ({', '.join(shipped_banks())}) or a Hub id org/name, got {str(name)!r}"
        )
    from huggingface_hub import hf_hub_download

    cache = None if cache_dir is None else str(cache_dir)
    with asking(str(name), _uncached(str(name))):
        found = hf_hub_download(
            str(name), "bank.json", revision=revision, token=token, cache_dir=cache, local_files_only=local_files_only
        )
    with _dropping(Path(found).parent, "bank.json"):
        _check_blob(Path(found))
    return Repository(str(name), Path(found).parent, token, cache, local_files_only)


def publish(
    folder: Path,
    id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str,
) -> str:
    """Upload the folder of a bank in one commit, over what was there; returns the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="steerlib")
    with asking(id, "nothing was published, do it again online"):
        api.create_repo(id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(id, branch=revision, exist_ok=True)
        try:
            done = api.upload_folder(
                repo_id=id, folder_path=folder, revision=revision, commit_message=commit_message, delete_patterns=STALE
            )
        except RuntimeError as error:  # of one large file, whatever the cause
            raise NotReached(f"{error} ({error.__cause__}); nothing was published, do it again") from None
    return done.oid


# -- lists ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A bank that can be opened by name."""

    name: str
    base_model: str
    is_shipped: bool


def shipped_banks() -> list[str]:
    """Names of the banks that come with steerlib."""
    root = Path(str(files("steerlib.concept_banks")))
    return sorted(folder.parent.name for folder in root.glob("*/bank.json"))


def list_banks(
    base_model: str | None = None, *, token: str | bool | None = None, local_files_only: bool = False
) -> list[Listed]:
    """Banks shipped with steerlib and on the Hub, for one base model or all; by name, the shipped ones first."""
    root = Path(str(files("steerlib.concept_banks")))
    bases = {name: strict_json((root / name / "bank.json").read_bytes(), name)["base_model"]["id"] for name in shipped_banks()}
    found = [Listed(name=name, base_model=base, is_shipped=True) for name, base in bases.items()]
    if not local_files_only:
        from huggingface_hub import HfApi

        tags = ["steerlib", *([f"base_model:{base_model}"] if base_model else [])]
        with asking("the list of banks", "local_files_only=True lists those shipped with steerlib"):
            models = list(HfApi(token=token, library_name="steerlib").list_models(filter=tags))
        for model in sorted(models, key=lambda model: model.id):
            bases = [tag.partition(":")[2] for tag in model.tags or () if re.fullmatch(r"base_model:[^:]+", tag)]
            found.append(Listed(name=model.id, base_model=bases[0] if bases else "", is_shipped=False))
    return [bank for bank in found if base_model in (None, bank.base_model)]
