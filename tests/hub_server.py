"""A Hub of our own on localhost: it speaks the calls that huggingface_hub uses to create a
repository, to upload a folder and to download a file, and keeps every commit."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_" + "a" * 34


class Hub:
    """Repositories: name -> {"private": bool, "commits": [(hash, {path: bytes})]}."""

    def __init__(self):
        self.repositories: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}  # uploaded by git-lfs, by their SHA-256
        self.calls: list[str] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Add files to a repository, which is made where it is missing; returns the hash."""
        repository = self.repositories.setdefault(name, {"private": False, "commits": []})
        before = repository["commits"][-1][1] if repository["commits"] else {}
        now = {**before, **files}
        digest = hashlib.sha1(repr(sorted(now)).encode() + b"".join(now.values())).hexdigest()
        repository["commits"].append((digest, now))
        return digest

    def files(self, name: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """(hash, files) of a revision."""
        commits = self.repositories[name]["commits"] or [("0" * 40, {})]
        if revision == "main":
            return commits[-1]
        return next((commit for commit in commits if commit[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self):
        self.path = unquote(self.path.partition("?")[0])
        self.hub.calls.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        else:
            body = self.rfile.read(length)
        parts = self.path.strip("/").split("/")
        writes = self.command in ("POST", "PUT") and parts[0] != "blob"
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Invalid credentials"}, 401)
        elif parts[:3] == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts[:2] == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif parts[0] == "blob":
            self.hub.blobs[parts[1]] = body
            self._send(200, b"")
        elif parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:], body)
        elif parts[2:] == ["info", "lfs", "objects", "batch"] or parts[-1] == "batch":
            self._batch(json.loads(body))
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._json({"error": f"unknown call {self.command} {self.path}"}, 500)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _create(self, request: dict) -> None:
        name = "/".join(filter(None, (request.get("organization"), request["name"])))
        if name in self.hub.repositories:
            self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            return
        self.hub.repositories[name] = {
            "private": request.get("visibility") == "private",
            "commits": [],
        }
        self._json({"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def _api(self, name: str, rest: list[str], body: bytes) -> None:
        if name not in self.hub.repositories:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["preupload"]:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in files
            ]
            self._json({"files": modes})
        elif rest[:1] == ["commit"]:
            digest = self.hub.commit(name, self._committed(body))
            self._json(
                {
                    "commitUrl": f"{self.hub.url}/{name}/commit/{digest}",
                    "commitOid": digest,
                    "success": True,
                }
            )
        elif rest[:1] == ["tree"]:
            _, files = self.hub.files(name, rest[1])
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
                for path, data in files.items()
            ]
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        else:
            digest, files = self.hub.files(name)
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "sha": digest, "siblings": siblings, "private": False})

    def _committed(self, body: bytes) -> dict[str, bytes]:
        files = {}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        return files

    def _batch(self, request: dict) -> None:
        objects = [
            {
                "oid": blob["oid"],
                "size": blob["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/blob/{blob['oid']}"}},
            }
            for blob in request["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get(name)
        is_ours = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository["private"] and not is_ours):
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        found = self.hub.files(name, revision)
        if found is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        digest, files = found
        headers = {"X-Repo-Commit": digest}
        if path not in files:
            self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
            return
        tag = hashlib.sha256(files[path]).hexdigest()
        self._send(200, files[path], {**headers, "ETag": f'"{tag}"'})

    def _json(self, content: dict, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
