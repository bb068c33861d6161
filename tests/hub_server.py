"""A small Hub on this machine: what huggingface_hub asks of one to list, download, publish. It counts what it sends.

Repositories are dicts of commits, each a dict from path to bytes, or to the path of a file that is sent as it is read.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 1 << 14
"""Files of at least this size are published through LFS."""


class Hub(ThreadingHTTPServer):
    """Serves until closed; the test changes `repos` and the ways to misbehave as it likes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.sent: Counter[str] = Counter()
        self.requests: list[str] = []
        self.ranges = True
        self.damage: set[str] = set()
        """Paths of which a byte is changed on the way."""
        self.cut: dict[str, int] = {}
        """Paths of which so many bytes are sent before the line goes dead, once."""
        self.slow: dict[str, float] = {}
        """Seconds between pieces of 64 KiB."""
        self.tokens: dict[str, str] = {"secret": "org"}
        self.elsewhere: Hub | None = None
        """Another host, to which the bytes of files are redirected."""
        self.told: list[str] = []
        """Tokens that came with requests for the bytes of files."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo: str, files: Mapping[str, bytes | Path], *, branch="main", private=False, gated=False, tags=()) -> str:
        """A commit on a branch; returns its name."""
        entry = self.repos.setdefault(repo, {"commits": {}, "refs": {}})
        entry.update(private=private, gated=gated, tags=list(tags))
        text = repr([branch, len(entry["commits"]), sorted((path, str(content)[:80]) for path, content in files.items())])
        commit = hashlib.sha1(text.encode()).hexdigest()
        entry["commits"][commit], entry["refs"][branch] = dict(files), commit
        return commit

    def total(self) -> int:
        return sum(self.sent.values())

    def handle_error(self, request, client_address) -> None:
        """Clients that go away in the middle are what some tests are about."""


def turn(monkeypatch, url: str, folder: Path) -> None:
    """Turn the client of this process to another Hub, with empty caches in a folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(folder / "assets"))


def digest(content: bytes | Path) -> str:
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(content).hexdigest()


def size(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format, *args) -> None:
        pass

    def answer(self, value, status=200, **headers) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.server.sent[self.path] += len(body)

    def fail(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while length := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    @property
    def user(self) -> str | None:
        return self.server.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def opened(self, repo: str, revision="main"):
        """The entry and commit asked for, or nothing after an error was sent."""
        entry = self.server.repos.get(repo)
        if entry is None or entry["private"] and self.user is None:
            return self.fail(401, "RepoNotFound")
        if entry["gated"] and self.user is None:
            return self.fail(403, "GatedRepo")
        commit = entry["refs"].get(revision, revision)
        if commit not in entry["commits"]:
            return self.fail(404, "RevisionNotFound")
        return entry, commit

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path == "/api/models":
            return self.listing(parse_qs(url.query).get("filter", []))
        if path == "/api/whoami-v2":
            return self.answer({"name": self.user, "type": "user", "orgs": []}, 200 if self.user else 401)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.info(found[1], found[2] or "main")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?.*", path):
            return self.tree(found[1], found[2])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*found.groups())
        return self.fail(404, "NotFound")

    def listing(self, tags: list[str]) -> None:
        tags = [part for tag in tags for part in tag.split(",")]
        shown = {repo: entry for repo, entry in self.server.repos.items() if not entry["private"] or self.user}
        found = [{"id": repo, "tags": e["tags"]} for repo, e in shown.items() if set(tags) <= set(e["tags"])]
        self.answer(found)

    def info(self, repo: str, revision: str) -> None:
        if opened := self.opened(repo, revision):
            entry, commit = opened
            files = [{"rfilename": path} for path in entry["commits"][commit]]
            shown = {"id": repo, "sha": commit, "private": entry["private"], "tags": entry["tags"], "siblings": files}
            self.answer(shown)

    def tree(self, repo: str, revision: str) -> None:
        if opened := self.opened(repo, revision):
            entry, commit = opened
            files = [
                {"type": "file", "path": path, "size": size(content), "oid": digest(content)[:40]}
                for path, content in entry["commits"][commit].items()
            ]
            self.answer(files)

    def file(self, repo: str, revision: str, path: str) -> None:
        if not (opened := self.opened(repo, revision)):
            return
        entry, commit = opened
        if (content := entry["commits"][commit].get(path)) is None:
            self.fail(404, "EntryNotFound")
            return
        if self.command == "GET" and (token := self.headers.get("Authorization")):
            self.server.told.append(token)
        start, stop = 0, size(content)
        if self.server.elsewhere is not None:
            self.answer({}, 302, **self.facts(content, commit), Location=self.server.elsewhere.url + self.path)
            return
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.server.ranges else None
        if part:
            start, stop = int(part[1]), min(stop, int(part[2]) + 1 if part[2] else stop)
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size(content)}")
        self.send_header("Content-Length", str(stop - start))
        for name, text in self.facts(content, commit).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command == "GET":
            self.pour(path, content, start, stop)

    def facts(self, content: bytes | Path, commit: str) -> dict[str, str]:
        """What the client asks of a file before its bytes."""
        etag, length = f'"{digest(content)}"', str(size(content))
        return {"ETag": etag, "X_Linked_ETag": etag, "X_Linked_Size": length, "X_Repo_Commit": commit}

    def pour(self, path: str, content: bytes | Path, start: int, stop: int) -> None:
        from time import sleep

        cut = self.server.cut.pop(path, None)
        for at in range(start, stop, 1 << 16):
            last = min(stop, at + (1 << 16), *([start + cut] if cut is not None else []))
            if isinstance(content, Path):
                with content.open("rb") as file:
                    file.seek(at)
                    data = file.read(last - at)
            else:
                data = content[at:last]
            if path in self.server.damage and at == start and data:
                data = bytes([data[0] ^ 1]) + data[1:]
            self.wfile.write(data)
            self.server.sent[path] += len(data)
            if cut is not None and last == start + cut:
                self.close_connection = True
                return
            if path in self.server.slow:
                sleep(self.server.slow[path])

    def do_PUT(self) -> None:
        data = self.body()
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_POST(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path, data = unquote(urlsplit(self.path).path), self.body()
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.user is None:
            return self.fail(401, "Unauthorized")
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            refs = self.server.repos[found[1]]["refs"]
            if found[2] in refs:
                return self.answer({"error": "exists"}, 409)
            refs[found[2]] = refs["main"]
            return self.answer({})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = json.loads(data)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LARGE else "regular", "shouldIgnore": False}
                for f in files
            ]
            return self.answer({"files": modes})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/upload/{o['oid']}"}}}
                for o in json.loads(data)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self.commit(found[1], found[2], [json.loads(line) for line in data.splitlines()])
        return self.fail(404, "NotFound")

    def create(self, wanted: dict) -> None:
        repo = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if repo in self.server.repos:
            return self.answer({"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"}, 409)
        self.server.add(
            repo, {".gitattributes": b""}, private=wanted.get("visibility") == "private" or bool(wanted.get("private"))
        )
        return self.answer({"url": f"{self.server.url}/{repo}"})

    def commit(self, repo: str, branch: str, lines: list[dict]) -> None:
        entry = self.server.repos[repo]
        files = dict(entry["commits"][entry["refs"][branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        card = files.get("README.md", b"").decode()
        tags = re.findall(r"(?m)^(?:library_name|base_model): (\S+)$", card)
        tags = [tag if "/" not in tag else f"base_model:{tag}" for tag in tags]
        commit = self.server.add(repo, files, branch=branch, private=entry["private"], tags=tags)
        self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit})
