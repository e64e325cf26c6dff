"""What a user sees when something goes wrong with a harvest or a store: every fault is made, every line is recorded.

    python experiments/harvest_faults.py [--out FILE.md]

The bundled host, a small store, the command line in processes of its own; a file system of 24 MB in memory for full
disks (left out where one cannot be mounted). Where a harvest goes on after a fault, its store must have the bytes of
one that was never disturbed; the last column says so.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HOOK = "blocks.1.hook_resid_post"
SMALL = ("text.max_tokens=6k", "activations.shard_rows=1024", f"host.hook={HOOK}", "host.dtype=float32")
RESUMED = "the bytes of an undisturbed harvest"


class Faults:
    def __init__(self, work: Path):
        self.work = work
        self.recipe = work / "recipe.yaml"
        self.recipe.write_text("text: {context: 128}\n")
        self.rows: list[tuple[str, str, str, str]] = []
        self.whole = work / "whole"
        self.sae("harvest", self.whole)

    def start(self, verb: str, store: Path | str, *words: str, **environment: str) -> subprocess.Popen:
        named = [str(self.recipe), f"activations.store={store}", *SMALL] if verb != "verify" else [str(store)]
        command = [sys.executable, "-m", "sae", verb, *named, *words]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
            cwd=self.work,
        )  # fmt: skip

    def sae(self, verb: str, store: Path | str, *words: str, **environment: str) -> tuple[int, str]:
        """Exit code and the last line on stderr."""
        return self.end(self.start(verb, store, *words, **environment))

    def end(self, process: subprocess.Popen) -> tuple[int, str]:
        _, err = process.communicate()
        assert "Traceback" not in err, err
        lines = err.strip().splitlines()
        return process.returncode, lines[-1].replace(str(self.work), "…") if lines else ""

    def note(self, fault: str, seen: tuple[int, str], after: str = "") -> None:
        self.rows.append((fault, str(seen[0]), seen[1], after))
        print(f"{fault} | {seen[0]} | {seen[1]} | {after}", flush=True)

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.whole, self.work / name))

    def same(self, store: Path) -> str:
        """Whether a store has the bytes of the undisturbed one."""
        there, whole = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (store, self.whole))
        assert there == whole, f"{store} is not as the undisturbed one: {sorted(set(there) ^ set(whole))}"
        return RESUMED

    def until_shards(self, store: Path) -> None:
        deadline = time.monotonic() + 120
        while not list(store.glob("shard-*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)


def stopped(f: Faults) -> None:
    for name, sign in (("kill -9", signal.SIGKILL), ("SIGTERM", signal.SIGTERM), ("Ctrl-C", signal.SIGINT)):
        store = f.work / name.replace(" ", "")
        one = f.start("harvest", store)
        f.until_shards(store)
        one.send_signal(sign)
        seen = f.end(one)
        again = f.start("harvest", store)
        err = again.communicate()[1]
        said = next(line for line in err.splitlines() if "are there" in line).rpartition(" · ")[2]
        after = f"the next call says “{said}”; {f.same(store)}"
        f.note(f"{name} between two shards", (seen[0], seen[1] or "(nothing)"), after)
    store = f.work / "two"
    longer = "text.max_tokens=100k"
    one = f.start("harvest", store, longer)
    while not (store / "manifest.json").exists():
        time.sleep(0.02)
    f.note("a second process writes the same store", f.sae("harvest", store, longer))
    one.kill()
    f.end(one)


def ranks(f: Faults) -> None:
    store = f.work / "ranks"
    f.note("rank 0 of 2 has ended, rank 1 has not begun", f.sae("harvest", store, RANK="0", WORLD_SIZE="2"))
    one = f.start("harvest", store, RANK="1", WORLD_SIZE="2")
    time.sleep(4)
    one.kill()
    f.end(one)
    seen = f.sae("harvest", store, RANK="1", WORLD_SIZE="2")
    f.note("rank 1 was killed and is started again alone", seen, f.same(store))
    f.note("RANK without WORLD_SIZE", f.sae("harvest", store, RANK="1"))


@contextlib.contextmanager
def small_disk(f: Faults, megabytes: int):
    folder = f.work / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        folder.rmdir()
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def disk(f: Faults) -> None:
    with small_disk(f, 4) as folder:
        if folder is None:
            print("no file system could be mounted: full disks are left out")
            return
        seen = f.sae("harvest", folder / "acts")
        assert not list(folder.iterdir())
        f.note("the disk cannot hold it", seen, "nothing was written")
    with small_disk(f, 24) as folder:
        store = folder / "acts"
        one = f.start("harvest", store)
        f.until_shards(store)
        with contextlib.suppress(OSError), (folder / "other").open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
        seen = f.end(one)
        (folder / "other").unlink()
        f.sae("harvest", store)
        after = f"with room again, the next call ends with {f.same(store)}"
        f.note("somebody else fills the disk meanwhile", seen, after)
    f.note("a folder that cannot be written", f.sae("harvest", "/proc/acts"))
    f.note("the store's name is that of a file", f.sae("harvest", f.recipe))


def damaged(f: Faults) -> None:
    name = "shard-00002.safetensors"

    def flipped(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    changes: dict[str, Callable[[Path], object]] = {
        "a shard was cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
        "one bit of a shard flipped": flipped,
        "a shard is missing": lambda path: path.unlink(),
        "a shard is another one of this store": lambda path: shutil.copy(f.whole / "shard-00001.safetensors", path),
        "a shard is of another store": lambda path: shutil.copy(f.work / "foreign" / name, path),
    }
    f.sae("harvest", f.work / "foreign", "text.held_out=0.2")
    for number, (fault, change) in enumerate(changes.items()):
        store = f.copy(f"damaged{number}")
        change(store / name)
        f.note(f"{fault}; verify", f.sae("verify", store))
        f.note(f"{fault}; train", f.sae("train", store, f"out={f.work / 'run'}"))
        f.sae("harvest", store, "--repair")
        f.note(f"{fault}; harvest --repair", f.sae("verify", store), f.same(store))
    for file in ("rows-00000.safetensors", "documents-00000.jsonl"):
        store = f.copy(f"damaged-{file}")
        flipped(store / file)
        f.note(f"one bit of {file} flipped; verify", f.sae("verify", store))
    store = f.copy("manifest")
    manifest = store / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"context": 128', '"context": "x"'))
    f.note("the manifest is not as ours are", f.sae("train", store, f"out={f.work / 'run'}"))
    manifest.write_text('{"format": 3}')
    f.note("the manifest is of a later version", f.sae("train", store, f"out={f.work / 'run'}"))


def others(f: Faults) -> None:
    """A host of other weights, and one with another tokenizer, made from small random models."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sae.host import Host

    tokenizer = Host.load("smollm2").tokenizer
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer) + 1))
    for name in ("otherhost", "othertokenizer"):
        model.save_pretrained(f.work / name)
        if name == "othertokenizer":
            tokenizer.add_tokens(["goldengate"])
        tokenizer.save_pretrained(f.work / name)
    run = f"out={f.work / 'run'}"
    f.note("training with another host", f.sae("train", f.whole, run, f"host.name={f.work / 'otherhost'}"))
    store = f.work / "tokenizer"
    f.sae("harvest", store, f"host.name={f.work / 'otherhost'}")
    f.note("a host with another tokenizer; harvest", f.sae("harvest", store, f"host.name={f.work / 'othertokenizer'}"))
    f.note("a host with another tokenizer; train", f.sae("train", store, run, f"host.name={f.work / 'othertokenizer'}"))
    f.note("training at another hook", f.sae("train", f.whole, run, "host.hook=blocks.2.hook_resid_post"))
    f.note("training with another context", f.sae("train", f.whole, run, "text.context=64"))
    f.note("harvesting other text into it", f.sae("harvest", f.whole, "text.held_out=0.3"))
    f.note("another number format", f.sae("harvest", f.whole, "activations.dtype=int8"))


def texts(f: Faults) -> None:
    from sae.host import Host

    ids = Host.load("smollm2").tokenizer("The bridge stands in the fog over the bay. " * 5).input_ids
    lines = {
        "column.jsonl": '{"txt": "a"}',
        "foreign.jsonl": f'{{"text": {[(i * 7919) % 40000 for i in ids]}}}',
        "chat.jsonl": '{"messages": [{"role": "user"}]}',
        "empty.txt": "",
    }
    for name, line in lines.items():
        (f.work / name).write_text(line + "\n")
    store = f.work / "text"
    f.note("a column that is not there", f.sae("harvest", store, "text.source=column.jsonl"))
    f.note("token ids of another tokenizer", f.sae("harvest", store, "text.source=foreign.jsonl"))
    f.note("a chat without content", f.sae("harvest", store, "text.source=chat.jsonl", "text.column=messages"))
    f.note("a source without text", f.sae("harvest", store, "text.source=empty.txt"))
    f.note("a mixture with a file that is not there", f.sae("harvest", store, "text.source={bundled: 1, no.txt: 1}"))
    f.note("a mixture without shares", f.sae("harvest", store, "text.source={bundled: 0}"))
    assert not store.exists(), "nothing may be left behind"
    f.note("a place that needs a package", f.sae("harvest", "gs://bucket/acts"))
    off = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    f.note("a bucket that does not answer", f.sae("harvest", "s3://bucket/acts", **off))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        f = Faults(Path(folder))
        for part in (stopped, ranks, disk, damaged, others, texts):
            part(f)
    lines = ["| fault | exit | what the user sees | afterwards |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in f.rows]
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
