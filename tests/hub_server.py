"""A stand-in for the Hugging Face hub on this machine: repositories in memory, its library's protocol."""

import base64
import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest


class Hub(http.server.BaseHTTPRequestHandler):
    repositories: dict[str, dict[str, dict[str, bytes]]]  # name -> commit -> file -> content, in order

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
        else:
            name, rest = "/".join(parts[:2]), parts[2:]
        commits = self.repositories.get(name)
        if not commits:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        kind, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = commits[commit]
        if kind == "resolve":
            content = files["/".join(rest[2:])]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._send(200, content, {"ETag": etag, "X-Repo-Commit": commit})
        if kind == "tree":
            entries = [(path, len(content), hashlib.sha1(content)) for path, content in files.items()]
            return self._send_json(
                [
                    {"type": "file", "path": p, "size": n, "oid": digest.hexdigest()}
                    for p, n, digest in entries
                ]
            )
        siblings = [{"rfilename": path} for path in files]
        return self._send_json({"id": name, "sha": commit, "siblings": siblings})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            document = json.loads(body)
            name = "/".join(filter(None, (document.get("organization"), document["name"])))
            self.repositories.setdefault(name, {})
            return self._send_json({"url": f"http://{self.headers['Host']}/{name}"})
        if self.path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in names]
            return self._send_json({"files": modes})
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        commit = hashlib.sha1(body).hexdigest()
        self.repositories[name][commit] = files
        self._send_json(
            {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{commit}", "commitOid": commit}
        )

    def _send_json(self, document: object) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path: Path):
    """A hub, and an empty cache; gives its repositories, and closes what comes after `hub.stop()`."""
    from huggingface_hub import constants

    handler = type("BoundHub", (Hub,), {"repositories": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_standin")

    def stop() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    handler.stop = staticmethod(stop)
    yield handler
    if thread.is_alive():
        stop()
