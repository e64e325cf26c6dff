"""A Hugging Face Hub on the loopback: what huggingface_hub asks for repositories of models, and every way to fail.

    with running() as hub:                       hub.url is an endpoint
        hub.add("user/repo", {"a/cfg.json": b"{}"})
        hub.faults.append(("GET", "/resolve/", 500))

Repositories are branches of commits, commits are files by name; content goes as "regular" files in the commit itself.
A fault is (method, part of the path, what happens): a status; "gated", as the Hub says it; "hang" until the end; "cut"
in the middle of the body; "reset" before an answer; a function, whose value is the answer. `asked` has every request
about repositories, in order.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants


@dataclass
class Commit:
    files: dict[str, bytes]
    message: str = ""

    @property
    def sha(self) -> str:
        content = [(name, hashlib.sha1(data).hexdigest()) for name, data in sorted(self.files.items())]
        return hashlib.sha1(json.dumps([self.message, content]).encode()).hexdigest()


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, dict[str, list[Commit]]] = field(default_factory=dict)
    """Of each repository its branches, of each its commits, the newest last."""
    private: set[str] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)
    faults: list[tuple[str, str, int | str | Callable[[], object]]] = field(default_factory=list)
    token: str | None = None
    """Where set, whoever writes has to have it."""
    over: threading.Event = field(default_factory=threading.Event)

    def add(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Another commit with these files beside those of the last; its hash."""
        commits = self.repos.setdefault(repo, {}).setdefault(branch, [])
        commits.append(Commit({**(commits[-1].files if commits else {}), **files}, f"commit {len(commits)}"))
        return commits[-1].sha

    def commit(self, repo: str, revision: str) -> Commit | None:
        branches = self.repos[repo]
        known = {one.sha: one for commits in branches.values() for one in commits}
        return branches[revision][-1] if revision in branches else known.get(revision)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo][branch][-1].files

    def downloads(self) -> list[str]:
        """Names of the files whose content was sent, in order."""
        return [path.split("/resolve/")[1].split("/", 1)[1] for method, path in self.asked
                if method == "GET" and "/resolve/" in path]  # fmt: skip


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = self.command.replace("HEAD", "GET")
        matching = ((answer, re.fullmatch(pattern, path)) for known, pattern, answer in ROUTES if known == method)
        answer, found = next((one for one in matching if one[1]), (None, None))
        if answer is None:  # what huggingface_hub asks besides
            return self.say(404, {"error": "Not Found"})
        self.hub.asked.append((self.command, path))
        for method, part, fault in self.hub.faults:
            if method == self.command and part in path:
                return self.fail(fault, found.groups())
        answer(self, *found.groups(), body)

    do_GET = do_HEAD = do_POST = handle_one

    def fail(self, fault: int | str | Callable[[], object], parts: tuple[str, ...]) -> None:
        if fault == "hang":
            self.hub.over.wait(30)
            self.close_connection = True
        elif fault == "reset":
            self.close_connection = True
        elif fault == "gated":
            self.say(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif fault == "cut":
            self.cut = True
            resolve(self, *parts, b"")
        elif callable(fault):
            self.say(200, fault())
        else:
            self.say(fault, {"error": f"fault {fault}"})

    def say(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if getattr(self, "cut", False):
            self.close_connection = True
            data = data[: len(data) // 2]
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def missing(answer: Answer, repo: str) -> bool:
    if repo in answer.hub.repos:
        return False
    answer.say(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
    return True


def found(answer: Answer, repo: str, revision: str) -> Commit | None:
    """The commit, where repository and revision are there; else they have been answered for."""
    if missing(answer, repo):
        return None
    commit = answer.hub.commit(repo, revision)
    if commit is None:
        answer.say(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
    return commit


def info(answer: Answer, repo: str, revision: str | None, _: bytes) -> None:
    if commit := found(answer, repo, revision or "main"):
        siblings = [{"rfilename": name} for name in commit.files]
        answer.say(200, {"id": repo, "sha": commit.sha, "siblings": siblings, "tags": []})


def resolve(answer: Answer, repo: str, revision: str, name: str, _: bytes) -> None:
    if not (commit := found(answer, repo, revision)):
        return
    if name not in commit.files:
        return answer.say(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
    data = commit.files[name]
    headers = {"ETag": f'"{git_hash(data)}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-", answer.headers.get("Range") or "")
    if asked and int(asked[1]):
        headers["Content-Range"] = f"bytes {asked[1]}-{len(data) - 1}/{len(data)}"
        return answer.send(206, data[int(asked[1]) :], headers)
    answer.send(200, data, headers)


def allowed(answer: Answer) -> bool:
    if answer.hub.token is None or answer.headers.get("Authorization") == f"Bearer {answer.hub.token}":
        return True
    answer.say(403, {"error": "You don't have the rights to create a model under this namespace"})
    return False


def create(answer: Answer, body: bytes) -> None:
    if not allowed(answer):
        return
    asked = json.loads(body)
    repo = f"{asked['organization'] or 'user'}/{asked['name']}"
    if repo in answer.hub.repos:
        return answer.say(409, {"error": "You already created this model repo", "url": f"{answer.hub.url}/{repo}"})
    answer.hub.add(repo, {".gitattributes": b""})
    if asked.get("visibility") == "private" or asked.get("private"):
        answer.hub.private.add(repo)
    answer.say(200, {"url": f"{answer.hub.url}/{repo}"})


def branch(answer: Answer, repo: str, name: str, _: bytes) -> None:
    if missing(answer, repo) or not allowed(answer):
        return
    if name in answer.hub.repos[repo]:
        return answer.say(409, {"error": "Reference already exists"})
    answer.hub.repos[repo][name] = list(answer.hub.repos[repo]["main"])
    answer.say(200, {})


def preupload(answer: Answer, repo: str, revision: str, body: bytes) -> None:
    if not (commit := found(answer, repo, revision)) or not allowed(answer):
        return
    names = [one["path"] for one in json.loads(body)["files"]]
    files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False,
              "oid": git_hash(commit.files[name]) if name in commit.files else None} for name in names]  # fmt: skip
    answer.say(200, {"files": files})


def commit(answer: Answer, repo: str, revision: str, body: bytes) -> None:
    if not (last := found(answer, repo, revision)) or not allowed(answer):
        return
    lines = [json.loads(line) for line in body.splitlines()]
    header, files = lines[0]["value"], dict(last.files)
    if header.get("parentCommit") not in (None, last.sha):
        return answer.say(412, {"error": "A commit has happened since. Please refresh and try again."})
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "deletedFile":
            del files[value["path"]]
        else:
            return answer.say(400, {"error": f"no {line['key']} here"})
    answer.hub.repos[repo][revision].append(Commit(files, header["summary"]))
    made = answer.hub.repos[repo][revision][-1].sha
    answer.say(200, {"commitUrl": f"{answer.hub.url}/{repo}/commit/{made}", "commitOid": made})


def validated(answer: Answer, body: bytes) -> None:
    """The header of a README.md, as the Hub would read it."""
    import yaml

    content = json.loads(body)["content"].split("---\n")
    try:
        errors = [] if isinstance(yaml.safe_load(content[1]), dict) else [{"message": "no mapping"}]
    except yaml.YAMLError as error:
        errors = [{"message": str(error)}]
    answer.say(400 if errors else 200, {"errors": errors, "warnings": []})


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", rf"/api/models/{NAME}(?:/revision/(.+))?", info),
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", resolve),
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", validated),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", branch),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", preupload),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", commit),
]


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A Hub on a port of its own."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (Answer,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(hub: Hub, monkeypatch, cache) -> None:
    """Have huggingface_hub of this process ask `hub`, with a cache and a token of the test's own.

    It reads its environment once, at import: what it made of it is what has to be changed.
    """
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def environment(hub: Hub, cache) -> dict[str, str]:
    """The same for a process that is started."""
    return {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1"}  # fmt: skip
