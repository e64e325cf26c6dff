"""The metrics log and wandb: no step doubled or missing over kills, and no server that can do more than cost a warning.

The servers are real ones on loopback, wandb is real, and where it matters so are the processes and the signals.
"""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sae import files
from sae.errors import UserError
from sae.recipe import LogRecipe
from sae.run import train, train_many
from sae.training import follower
from sae.training.log import Log
from tests.training.test_training import planted, recipe

ROOT = Path(__file__).parent.parent.parent
FAULTS = ["refused", "reset", "hang", "truncated", 429, 500, 401]


# ---- a server --------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """As much of wandb's server as a run needs; `fault` is what it does instead, from a call named `since` on."""

    daemon_threads, block_on_close = True, False

    def __init__(self, fault=None, since=""):
        self.fault, self.since = fault, since
        self.stopped = False
        self.rows = {}  # of wandb-history.jsonl, by run and offset
        self.times_sent = {}  # by run and step
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        if fault == "refused":
            self.server_close()

    def handle_error(self, request, client_address):
        pass

    def steps(self, run):
        return [self.rows[run][offset]["_step"] for offset in sorted(self.rows.get(run, {}))]

    def stop(self):
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format, *args):
        pass

    def reply(self, value, code=200, length=None):
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = json.loads(body) if body.startswith(b"{") else {}
        operation = re.match(r"\s*(?:query|mutation)\s+(\w+)", asked.get("query", ""))
        call = operation[1] if operation else self.path
        if server.since in call:
            server.since = ""
            if server.fault == "hang":
                server.closing.wait()
            if server.fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if server.fault in ("hang", "reset"):
                self.close_connection = True
                self.connection.close()
                return
            if server.fault == "truncated":
                self.close_connection = True
                return self.reply({"data": None}, length=500)
            if server.fault is not None:
                return self.reply({"error": "no"}, server.fault)
        if call.endswith("/file_stream"):
            self.take(call.split("/")[-2], asked.get("files") or {})
            return self.reply({"exitcode": None, "limits": {}, "stopped": server.stopped})
        self.reply({"data": self.answer(call, asked.get("variables") or {})})

    do_GET = do_PUT = do_POST

    def take(self, run, streams):
        sent = streams.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for offset, line in enumerate(sent["content"], sent["offset"]):
            row = json.loads(line)
            self.server.rows.setdefault(run, {})[offset] = row
            times = self.server.times_sent.setdefault(run, {})
            times[row["_step"]] = times.get(row["_step"], 0) + 1

    def answer(self, call, given):
        project = {"id": "p", "name": "goldengate-sae", "entity": {"id": "e", "name": "me"}}
        rows = self.server.rows.get(given.get("name"), {})
        bucket = {
            "id": "b",
            "name": given.get("name"),
            "displayName": "run",
            "config": "{}",
            "historyLineCount": len(rows),
        }
        last = json.dumps(rows[max(rows)]) if rows else "{}"
        more = {"eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]", "summaryMetrics": last, "tags": [],
                "historyTail": json.dumps([last]), "wandbConfig": '{"t": 1}'}  # fmt: skip
        upload = [{"name": name, "uploadUrl": f"{self.server.url}/{name}"} for name in given.get("files") or []]
        return {
            "RunResumeStatus": {"model": {**project, "bucket": bucket | more if rows else None}},
            "UpsertBucket": {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": not rows}},
            "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": upload}},
        }.get(call, {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}})


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Start a server; it is wandb's in this process and in those that it starts."""
    servers = []

    def start(fault=None, since=""):
        servers.append(Server(fault, since))
        monkeypatch.setenv("WANDB_BASE_URL", servers[-1].url)
        return servers[-1]

    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb's own"))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(follower, "_gave_up", -follower.IMPATIENT)
    yield start
    for server in servers:
        server.stop()


# ---- runs ------------------------------------------------------------------------------------------------


def log(folder, mode="off", done_tokens=0, **recipe):
    made = Log(folder, {"seed": 0, **recipe}, wandb=mode, every=1)
    made.done_tokens = done_tokens
    return made


def write(one, steps):
    """Lines of steps of 10 tokens each."""
    for step in steps:
        one.done_tokens += 10
        one._write(step, {"losses/mse_loss": 1 / (step + 1), "metrics/l0": float("inf")})


def written(folder):
    return [line["step"] for line in files.read_lines(folder / "metrics.jsonl")]


def kill(one):
    """End a log as a kill of training does: without a word."""
    one.lines.close()
    one.wandb.process.stdin.close()
    one.wandb.listener.join()
    one.wandb.process.wait()
    one.wandb.process.stdout.close()


def wait_until(true, seconds=15):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def run_id(folder):
    return files.read_json(folder / "wandb.json")["id"]


TRAIN = (
    "import sys\n"
    "from tests.training.test_log import slow_training\n"
    "slow_training(sys.argv[1], sys.argv[2], sys.argv[3] == 'resume', float(sys.argv[4]))\n"
    "print('trained')\n"
)


def slow_training(out, mode, resume, pause):
    """117 steps of at least `pause` s, a checkpoint each half second; called in processes of its own."""
    step = Log.step

    def slowed(self, *given):
        time.sleep(pause)
        step(self, *given)

    Log.step = slowed
    made = replace(recipe(out, tokens=30_000, save_every=0.5), log=LogRecipe(every=5, wandb=mode))
    train(made, planted(2000)[0], progress=False, resume=resume)


def start_training(out, mode, resume=False, pause=0.03):
    command = [sys.executable, "-c", TRAIN, str(out), mode, "resume" if resume else "begin", str(pause)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def offline_steps(folder):
    """The steps in the newest offline folder, read as `wandb sync` does: a log of LevelDB's with protocol buffers."""
    from wandb.proto import wandb_internal_pb2 as pb

    newest = max((folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    assert newest == (folder / "wandb" / "latest-run").resolve()
    data = next(newest.glob("*.wandb")).read_bytes()
    at, record, steps = 7, b"", []
    while at + 7 <= len(data):
        if 32_768 - at % 32_768 < 7:  # padding at the end of a block
            at += 32_768 - at % 32_768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            one = pb.Record.FromString(record)
            record = b""
            if one.WhichOneof("record_type") == "history":
                steps.append(one.history.step.num)
    return steps


# ---- metrics.jsonl ---------------------------------------------------------------------------------------


def test_after_a_resume_later_lines_are_gone_and_time_goes_on(tmp_path):
    with log(tmp_path) as one:
        one.began -= 100
        write(one, range(6))
    with log(tmp_path, done_tokens=40) as one:
        assert written(tmp_path) == [0, 1, 2, 3]
        write(one, range(4, 8))
    assert written(tmp_path) == list(range(8))
    times = [line["time"] for line in files.read_lines(tmp_path / "metrics.jsonl")]
    assert times == sorted(times) and times[0] > 100 and times[-1] < 101


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    with log(tmp_path) as one:
        write(one, range(3))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole[:-9])
    with log(tmp_path, done_tokens=30) as one:
        write(one, [3])
    assert written(tmp_path) == [0, 1, 3]


@pytest.mark.parametrize("garbage", [b"\0\0\0", b'{"step": 1', b"\xff", b"[1]", b'{"step": 1, "tokens": 20}'])
def test_a_damaged_line_is_named_with_its_file(tmp_path, garbage):
    with log(tmp_path) as one:
        write(one, range(3))
    lines = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    lines[1] = garbage
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not .*Mend or delete that line") as refused:
        log(tmp_path, done_tokens=30).__enter__()
    assert "\n" not in str(refused.value)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join(lines)


def test_a_synced_log_is_on_disk(tmp_path, monkeypatch):
    synced = []
    with log(tmp_path) as one:
        write(one, range(3))
        monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle)))
        one.sync()
    assert synced == [(tmp_path / "metrics.jsonl").stat()]


# ---- wandb without faults --------------------------------------------------------------------------------


def test_a_run_keeps_its_id_unless_another_recipe_begins_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("sae.training.log.Follower", lambda folder, run_id, *more: ids.append(run_id))
    monkeypatch.delenv("WANDB_MODE")
    ids = []
    for given in ({}, {}, {"done_tokens": 10, "every": 2}, {"lr": 1}, {"done_tokens": 10}):
        with log(tmp_path, "offline", **given):
            pass
    assert ids[0] == ids[1] == ids[2] != ids[3] == ids[4]


def test_wandb_is_not_started_where_the_environment_disables_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with log(tmp_path, "online") as one:
        assert one.wandb is None


def test_the_newest_offline_folder_has_every_step_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")  # it outranks the recipe
    one = log(tmp_path, "online").__enter__()
    write(one, range(30))
    wait_until(lambda: list(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    kill(one)
    with log(tmp_path, "online", done_tokens=200) as one:
        write(one, range(20, 40))
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    assert offline_steps(tmp_path) == written(tmp_path) == list(range(40))
    assert [record.getMessage() for record in caplog.records] == ["wandb: " + str(tmp_path) + ": its process ended. "
        "Training does not need it; metrics.jsonl has everything."]  # fmt: skip


@pytest.mark.parametrize(("server_has", "resumed_at"), [(12, 20), (30, 20), (30, 0), (0, 20)])
def test_a_resumed_run_gives_the_server_what_it_lacks_and_nothing_twice(tmp_path, serve, server_has, resumed_at):
    server = serve()
    files.write_json(tmp_path / "wandb.json", {"id": "mine", "recipe": {"seed": 0}})
    server.rows["mine"] = {offset: {"_step": offset} for offset in range(server_has)}
    with log(tmp_path) as one:
        write(one, range(30))
    with log(tmp_path, "online", done_tokens=10 * resumed_at) as one:
        write(one, range(resumed_at, 40))
    assert server.steps("mine") == written(tmp_path) == list(range(40))
    assert server.times_sent["mine"] == dict.fromkeys(range(server_has, 40), 1)


# ---- wandb with faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["refused", "reset", "hang", 401])
def test_a_faulty_server_costs_one_warning_and_a_bounded_time(tmp_path, serve, monkeypatch, caplog, fault):
    monkeypatch.setattr(follower, "START", 2.0)
    serve(fault)
    began = time.monotonic()
    with log(tmp_path, "online") as one:
        assert time.monotonic() - began < 0.5
        write(one, range(30))
    assert time.monotonic() - began < 8
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"wandb: {tmp_path}: ") and "\n" not in warning
    assert warning.endswith(". Training does not need it; metrics.jsonl has everything.")
    assert written(tmp_path) == list(range(30))


def test_a_wandb_that_never_ends_is_ended_and_the_next_is_waited_for_less(tmp_path, serve, monkeypatch, caplog):
    monkeypatch.setattr(follower, "PATIENCE", 2.0)
    serve("hang", since="file_stream")
    for name, within in (("a", 3), ("b", 2)):
        one = log(tmp_path / name, "online").__enter__()
        write(one, range(5))
        began = time.monotonic()
        one.__exit__(None)
        assert time.monotonic() - began < within
        assert one.wandb.process.poll() is not None
    told = [re.search(r"(a|b): the server has not taken everything after (\d) s", text) for text in caplog.messages]
    assert [found and found.groups() for found in told] == [("a", "2"), ("b", "1")]


def test_without_a_login_nobody_is_asked(tmp_path, serve, monkeypatch, caplog):
    serve()
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with log(tmp_path, "online") as one:
        write(one, range(3))
    assert "No API key configured. Use `wandb login` to log in. Training does not need it" in caplog.text


def test_a_broken_id_costs_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "wandb.json").write_text("{")
    with log(tmp_path, "offline") as one:
        write(one, range(3))
    (warning,) = caplog.messages
    assert "wandb.json: not valid JSON" in warning and written(tmp_path) == [0, 1, 2]


# ---- in processes of their own ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("since", ["", "file_stream"], ids=["from the start", "from the first figures"])
@pytest.mark.parametrize("fault", FAULTS)
def test_training_ends_well_whatever_the_server_does(tmp_path, serve, fault, since):
    if fault == "refused" and since:
        pytest.skip("a server that refuses connections cannot begin to later")
    serve(fault, since)
    began = time.monotonic()
    out, said = start_training(tmp_path / "run", "online").communicate(timeout=60)
    assert out == "trained\n"
    assert time.monotonic() - began < 40
    assert (tmp_path / "run" / "sae" / "feature_stats.safetensors").exists()
    assert written(tmp_path / "run") == list(range(0, 117, 5))
    assert re.fullmatch(r"wandb: \S+run: [^\n]+; metrics\.jsonl has everything\.\n", said), said


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_training_killed_and_resumed_has_every_step_once(tmp_path, serve, mode):
    server, folder = serve(), tmp_path / "run"
    killed = start_training(folder, mode)
    wait_until(lambda: list(folder.glob("checkpoints/step-*")) and len(written(folder)) > 12, 60)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    process = start_training(folder, mode, resume=True)
    assert process.communicate(timeout=60) == ("trained\n", "")
    assert written(folder) == list(range(0, 117, 5))
    assert written(folder) == (server.steps(run_id(folder)) if mode == "online" else offline_steps(folder))


def test_a_killed_training_leaves_no_process_behind(tmp_path, serve):
    serve("hang")
    with log(tmp_path, "online") as one:
        follows = one.wandb.process.pid
        children = f"/proc/{follows}/task/{follows}/children"
        wait_until(lambda: Path(children).read_text())
        (service,) = Path(children).read_text().split()
        kill(one)
        wait_until(lambda: not Path(f"/proc/{service}").exists() or "Z" in Path(f"/proc/{service}/stat").read_text())
        one.wandb = None


@pytest.mark.slow
def test_the_stop_button_on_wandbs_page_stops_training_in_order(tmp_path, serve):
    server = serve()
    server.stopped = True
    slow = start_training(tmp_path / "run", "online", pause=0.3)  # wandb looks every 15 s
    said = slow.communicate(timeout=60)[1]
    assert "Stopped: stopped and saved" in said and list(tmp_path.glob("run/checkpoints/step-*"))


def test_saes_that_train_together_have_a_run_each(tmp_path, serve, caplog):
    server = serve()
    made = [replace(recipe(tmp_path / name, tokens=5_000), log=LogRecipe(every=5, wandb="online")) for name in "ab"]
    train_many(made, planted(2000)[0], progress=False)
    for name in "ab":
        assert server.steps(run_id(tmp_path / name)) == written(tmp_path / name) == [0, 5, 10, 15]
    assert run_id(tmp_path / "a") != run_id(tmp_path / "b") and not caplog.records
