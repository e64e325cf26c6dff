"""A talk with dials: what each command does, and what a terminal shows."""

import signal
import subprocess
import sys
import time

import pytest

from sae import UserError, steer
from sae.chat import Chat
from tests.conftest import make_sae
from tests.test_shipped import FOLDER

HOOK = "blocks.2.hook_resid_post"
SAMPLING = {"max_new_tokens": 8, "temperature": 0.7}


@pytest.fixture
def folder(tmp_path):
    sae = make_sae(hook_name=HOOK)
    sae.labels = {7: "the bridge", 9: "anger"}
    return sae.save(tmp_path / "sae")


@pytest.fixture
def talk(folder, tiny_host):
    return Chat(folder, host=tiny_host, sampling=SAMPLING)


def test_commands_turn_dials_and_say_which(talk):
    assert talk.told() == "All dials are off."
    assert talk.command("/feature 7=5x, 3+=2") == "Dials: 7=5x (the bridge), 3+=2"
    assert talk.command("/strength 1.5") == "Dials: 7=5x (the bridge), 3+=1.5"
    assert talk.command("/feature anger=0x") == "Dials: 7=5x (the bridge), 3+=1.5, 9=0x (anger)"
    assert talk.command("/off 3") == "Dials: 7=5x (the bridge), 9=0x (anger)"
    assert talk.command("/off the bridge") == "Dials: 9=0x (anger)"
    assert talk.command("/off") == "All dials are off."
    assert talk.command("/feature") == "All dials are off."
    assert "/strength 2x" in talk.command("/help")


@pytest.mark.parametrize(
    "line",
    [
        "/feature 7",
        "/feature 96=5x",
        "/feature 7=5y",
        "/strength",
        "/strength 2y",
        "/off 8",
        "/find",
        "/up",
    ],
)
def test_a_wrong_command_is_one_line_and_changes_nothing(talk, line):
    talk.command("/feature 7=5x")
    if line == "/strength":
        talk.command("/off")
    before = talk.told()
    with pytest.raises(UserError) as caught:
        talk.command(line)
    assert "\n" not in str(caught.value)
    assert talk.told() == before


def test_an_answer_is_that_of_the_whole_talk_under_the_dials(talk, tiny_host, folder):
    talk.command("/feature 7=9x")
    pieces = []
    first = talk.say("Who are you?", pieces.append)
    assert "".join(pieces) == first
    with steer(tiny_host, folder, {7: "9x"}):
        assert first == tiny_host.generate("Who are you?", seed=1, **SAMPLING)
    talk.command("/off")
    second = talk.say("And now?", pieces.append)
    said = ["Who are you?", first, "And now?"]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), said, strict=True)]
    assert second == tiny_host.generate(messages, seed=3, **SAMPLING)
    assert talk.command("/new") == "The talk begins anew." and talk.messages == []


def test_an_interrupted_answer_stays_as_far_as_it_came_and_lets_go(talk, tiny_host):
    plain = tiny_host.generate("Hi", temperature=0, max_new_tokens=4)
    talk.command("/feature 7=9x")
    pieces = []

    def write(text):
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("Who are you?", write)
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert tiny_host.generate("Hi", temperature=0, max_new_tokens=4) == plain
    assert talk.say("Go on.", pieces.append)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_in_a_terminal_ctrl_c_stops_the_answer_and_not_the_chat():
    command = [
        sys.executable,
        "-m",
        "sae",
        "chat",
        str(FOLDER),
        "the Golden Gate Bridge=0.87x",
        "--max-new-tokens",
        "400",
    ]
    chat = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert chat.stdin and chat.stdout
    try:
        assert "2202=0.87x" in chat.stdout.readline()
        chat.stdin.write("Tell me a long story.\n")
        chat.stdin.flush()
        time.sleep(8)
        chat.send_signal(signal.SIGINT)
        chat.stdin.write("/off\n/feature nonsense=2\n/quit\n")
        out, errors = chat.communicate(timeout=120)
    finally:
        chat.kill()
    assert chat.returncode == 0, errors
    assert "[stopped]" in out and "All dials are off." in out and "nonsense" in out
    assert "Traceback" not in out + errors
