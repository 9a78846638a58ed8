"""A Hugging Face Hub on this machine: as much of its protocol as huggingface_hub speaks.

Real client code talks to it through HF_ENDPOINT. Large files are redirected to another host name
of this machine, as the Hub redirects to its storage, so that headers go where they should alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
OTHER_COMMIT = "b" * 40
LARGE = ".safetensors"


@dataclass
class Repository:
    """Files by name, and who may read them."""

    files: dict[str, bytes]
    commit: str = COMMIT
    is_gated: bool = False
    is_private: bool = False
    accepted: set[str] = field(default_factory=set)  # tokens that may read it
    card: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """What a client asked."""

    method: str
    path: str
    token: str | None
    range: str | None


class HubServer:
    """The server; what goes wrong is set in its attributes, and can be unset again."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.break_after: list[int] = []  # a transfer each: so many bytes, and the line is dead
        self.stall_after: int | None = None  # so many bytes, and then silence
        self.corrupts = False  # one bit of what large files hold
        self.status = 0  # for every request
        self.says_html = False  # a login page, whatever is asked for
        self.is_over = threading.Event()
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_exception):
        self.is_over.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def transfers(self):
        """The requests that fetched a file's bytes."""
        gets = [each for each in self.requests if each.method == "GET"]
        return [each for each in gets if not each.path.startswith("api/")]


@contextlib.contextmanager
def serving(monkeypatch, folder):
    """A server that huggingface_hub takes for the Hub, with its cache and logins in `folder`.

    The library reads its variables when it is imported, so what it read is replaced.
    """
    from huggingface_hub import close_session, constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH", "AGENT_HARNESSES_PATH"):
        monkeypatch.setattr(constants, name, str(folder / name.lower()), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        try:
            yield server
        finally:
            close_session()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, path, token, self.headers.get("Range")))
        parts = path.split("/")
        if self.hub.status:
            self._send(self.hub.status)
        elif self.hub.says_html:
            self._send(200, b"<html>please log in</html>", {"Content-Type": "text/html"})
        elif parts[0] == "storage":
            self._send_content(self._stored(parts[1]))
        elif parts[:2] == ["api", "models"] and parts[4:5] == ["revision"]:
            self._send_info("/".join(parts[2:4]), "/".join(parts[5:]))
        elif parts[2:3] == ["resolve"]:
            self._send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)
        else:
            self._send(404)

    def _stored(self, digest):
        every = [data for each in self.hub.repositories.values() for data in each.files.values()]
        return next(data for data in every if sha256(data) == digest)

    def _repository(self, name, revision, token):
        """The repository, or None where the refusal has been sent."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.is_private and token not in repository.accepted):
            # As the Hub does, so that nobody can find out which private repositories there are.
            self._send(404 if token else 401, headers={"X-Error-Code": "RepoNotFound"})
        elif revision not in {"main", repository.commit}:
            self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            return repository
        return None

    def _send_info(self, name, revision):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        repository = self._repository(name, revision, token)
        if repository is None:
            return
        siblings = []
        for file, data in repository.files.items():
            entry = {"rfilename": file, "size": len(data), "blobId": git_hash(data)}
            if file.endswith(LARGE):
                entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        info = {
            "id": name,
            "modelId": name,
            "sha": repository.commit,
            "siblings": siblings,
            "cardData": repository.card,
            "gated": "manual" if repository.is_gated else False,
            "private": repository.is_private,
        }
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _send_file(self, name, revision, file, token):
        repository = self._repository(name, revision, token)
        if repository is None:
            return
        if repository.is_gated and token not in repository.accepted:
            self._send(403 if token else 401, headers={"X-Error-Code": "GatedRepo"})
            return
        headers = {"X-Repo-Commit": repository.commit}
        if file not in repository.files:
            self._send(404, headers={**headers, "X-Error-Code": "EntryNotFound"})
            return
        data = repository.files[file]
        if not file.endswith(LARGE):
            self._send(200, data, {**headers, "ETag": f'"{git_hash(data)}"'})
            return
        headers |= {
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{sha256(data)}"',
            "Location": f"http://localhost:{self.hub.port}/storage/{sha256(data)}",
        }
        self._send(302, headers=headers)

    def _send_content(self, data):
        if self.hub.corrupts:
            data = bytes([data[0] ^ 1]) + data[1:]
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        headers = {"Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if asked else 200, data[start:], headers)

    def _send(self, status, body=b"", headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.break_after and self.path.startswith("/storage/"):
            body = body[: self.hub.break_after.pop(0)]
            self.close_connection = True
        if self.hub.stall_after is not None and self.path.startswith("/storage/"):
            self.wfile.write(body[: self.hub.stall_after])
            self.hub.is_over.wait(60)
            self.close_connection = True
            return
        self.wfile.write(body)
