"""Files and folders appear whole or not at all."""

import errno
import os

import pytest
import torch

from sae import files
from sae.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError), files.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert files.read_json(path) == {"a": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_failed_folder_leaves_the_old_folder(tmp_path):
    with files.atomic_folder(tmp_path / "x", marker="one") as folder:
        files.write_text(folder / "one", "1")
    with pytest.raises(ValueError), files.atomic_folder(tmp_path / "x", marker="one") as folder:
        files.write_text(folder / "two", "2")
        raise ValueError
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["one"]
    with files.atomic_folder(tmp_path / "x", marker="one") as folder:
        files.write_text(folder / "three", "3")
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["three"]


def write_folder(path):
    with files.atomic_folder(path, marker="ours") as folder:
        files.write_text(folder / "ours", "1")


def test_a_pipe_or_a_device_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is no regular file"):
        files.write_json(tmp_path / "pipe", {})
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_of_something_else_or_a_file_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    write_folder(tmp_path / "thesis")  # an empty folder is
    (tmp_path / "thesis" / "ours").rename(tmp_path / "thesis" / "chapter")
    with pytest.raises(UserError, match="not empty and not ours to replace"):
        write_folder(tmp_path / "thesis")
    with pytest.raises(UserError, match="is a file"):
        write_folder(tmp_path / "thesis" / "chapter")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        write_folder(tmp_path / "thesis" / "chapter" / "deeper")
    assert names(tmp_path) == ["thesis"] and names(tmp_path / "thesis") == ["chapter"]


def test_a_link_to_a_folder_stays_and_its_target_is_replaced(tmp_path):
    write_folder(tmp_path / "real")
    (tmp_path / "real" / "more").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_folder(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and names(tmp_path) == ["link", "real"]
    assert names(tmp_path / "real") == ["ours"]


def test_a_folder_that_cannot_take_its_name_gives_it_back_to_the_old_one(tmp_path, monkeypatch):
    write_folder(tmp_path / "x")
    (tmp_path / "x" / "old").write_text("old")
    real, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 3:  # the file in the folder, the old folder away, the new one in
            raise PermissionError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match="not writable"):
        write_folder(tmp_path / "x")
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["old", "ours"]


def test_a_full_disk_is_one_line_that_names_the_path(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a\.safetensors: no space left") as caught:
        files.write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(3)})
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_tensors_for_torch_load_are_written_whole_and_twice_the_same(tmp_path):
    tensors = {"a": torch.arange(6).reshape(2, 3).T, "b": torch.tensor(0.5)}
    files.write_torch(tmp_path / "a.pt", tensors)
    files.write_torch(tmp_path / "b.pt", tensors)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    read = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(read["a"], tensors["a"]) and read["a"].is_contiguous() and names(tmp_path) == ["a.pt", "b.pt"]


def test_a_real_file_size_limit_is_the_same_line(tmp_path):
    """RLIMIT_FSIZE in a child process: the operating system itself refuses the bytes."""
    import subprocess
    import sys

    code = (
        "import resource, signal, sys, torch\n"
        "from sae import files\n"
        "from sae.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    files.write_bytes(sys.argv[1], b'x' * 5000)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "big")], capture_output=True, text=True)
    assert "no space left" in done.stdout, done.stderr
    assert names(tmp_path) == []


def test_lines_ignore_and_drop_a_torn_tail(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = files.Lines(path)
    lines.add({"step": 1, "loss": float("nan")})
    lines.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert files.read_lines(path) == [{"step": 1, "loss": None}]
    lines = files.Lines(path)
    lines.add({"step": 2})
    lines.close()
    assert [line["step"] for line in files.read_lines(path)] == [1, 2]


def test_broken_json_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="no such file"):
        files.read_json(tmp_path / "b.json")


def test_lines_are_parted_by_newlines_alone(tmp_path):
    row = {"text": "a\u2028b\u2029c\x85d\x0ce"}
    lines = files.Lines(tmp_path / "l.jsonl")
    lines.add(row)
    lines.add(row)
    lines.close()
    with (tmp_path / "l.jsonl").open("ab") as file:
        file.write("日".encode()[:1])  # torn inside a character
    assert files.read_lines(tmp_path / "l.jsonl") == [row, row]


@pytest.mark.parametrize(
    "content,says",
    [
        ("[]", "holds list, not a JSON object"),
        ("{}", "has no 'a'"),
        ('{"format": 3}', "format 3 is newer than this version reads"),
        ('{"format": "x"}', "format is 'x', not a number"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
    ],
)
def test_json_of_another_shape_is_one_line(tmp_path, content, says):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        files.read_json_object(tmp_path / "a.json", ("a",), newest=2)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_removed_loses_its_name_before_anything_in_it(tmp_path, monkeypatch):
    """A kill in the middle must not leave half a checkpoint under a checkpoint's name."""
    import shutil

    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "a").write_text("a")
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)  # killed here
    files.remove_folder(tmp_path / "step")
    assert not (tmp_path / "step").exists() and len(list(tmp_path.glob(".tmp-step-*"))) == 1
    monkeypatch.undo()
    files.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
    files.remove_folder(tmp_path / "nothing")
