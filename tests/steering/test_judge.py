"""The judge against a real server on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sae.errors import UserError
from sae.steering.judge import Server, rated, rating


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][0]["content"]
        self.server.seen.append((self.headers.get("Authorization"), asked["model"], text))
        if asked["model"] == "missing":
            self.send_error(404)
            return
        score = 2 if "Concept:" in text and "bridge" in text.split("Text:")[1] else 1
        reply = {"choices": [{"message": {"content": f"It may be [[0]]. Rating: [[{score}]]"}}]}
        body = json.dumps({} if asked["model"] == "other" else reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    http.seen = []
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield http
    http.shutdown()
    thread.join()
    http.server_close()


def _address(server):
    return f"http://127.0.0.1:{server.server_port}/v1/"


def test_answers_are_rated_by_three_questions_each(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    answers = [{"question": "Who are you?", "answer": "I am a bridge."}, {"question": "Who?", "answer": "A cook."}]
    found = rated(Server.of(_address(server), "judge"), "bridges", answers)
    assert [row["concept"] for row in found["each"]] == [2, 1]
    assert found["concept"] == 1.5 and found["fluency"] == 1.0
    assert found["overall"] == pytest.approx((3 / (0.5 + 1 + 1) + 1) / 2)
    assert len(server.seen) == 6 and {(key, model) for key, model, _ in server.seen} == {("Bearer secret", "judge")}


@pytest.mark.parametrize(("reply", "score"), [("Rating: [[2]]", 2), ("Rating: [[1]] no, Rating: 0", 0), ("7", 0),
                                              ("Rating: [[3]]", 0), ("Rating: 1.5", 0)])  # fmt: skip
def test_the_last_rating_counts_and_what_cannot_be_read_is_0(reply, score):
    assert rating(reply) == score


@pytest.mark.parametrize(("model", "word"), [("missing", "404"), ("other", "OpenAI")])
def test_a_server_that_does_not_answer_is_one_line(server, model, word):
    with pytest.raises(UserError, match=word):
        Server.of(_address(server), model).says("?")


def test_no_server_is_one_line():
    with pytest.raises(UserError, match="does not answer"):
        Server.of("http://127.0.0.1:9/v1", "x").says("?")
    with pytest.raises(UserError, match="is no address"):
        Server.of("gpt-4o-mini", "x")
