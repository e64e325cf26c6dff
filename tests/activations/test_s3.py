"""A store in a bucket of a real S3 server, which the test starts: built, killed, verified, mended, read."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sae.activations import build, windows
from sae.activations.manifest import read_manifest
from sae.activations.store import Store
from sae.activations.verify import bad_shards, faults
from sae.errors import UserError
from sae.places import Place
from tests.activations.planted import HOOK, acts_of, make, token_of
from tests.activations.test_store import contents, process, whole

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import logging, time
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(600)
"""
pytestmark = [
    pytest.mark.xdist_group("s3"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of aiobotocore and its kin
]


@pytest.fixture(scope="module")
def bucket():
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    import fsspec

    fsspec.filesystem("s3").mkdir("goldengate")
    yield "s3://goldengate"
    server.kill()
    server.communicate()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


def there(place):
    return {name: place.read(name) for name in place.names()}


def test_a_store_in_a_bucket_has_the_bytes_of_one_on_disk_and_feeds_training(bucket, tmp_path):
    make(tmp_path / "acts")
    store = make(f"{bucket}/acts")
    assert there(store.place) == contents(tmp_path / "acts")
    assert torch.equal(whole(store)["acts"], acts_of(whole(store)["tokens"]))
    source = windows.StoreSource(store, store.sources)
    batch = next(windows.windows(source, 32, 100, seed=0))
    local = Store.open(tmp_path / "acts")
    same = next(windows.windows(windows.StoreSource(local, local.sources), 32, 100, seed=0))
    assert torch.equal(token_of(batch.acts[HOOK]), token_of(same.acts[HOOK]))


def test_a_harvest_into_a_bucket_that_was_killed_goes_on(bucket, tmp_path):
    make(tmp_path / "acts", 160)
    place = Place(f"{bucket}/killed")
    one = process(place.url, 160, pause=0.05)
    deadline = time.monotonic() + 60
    while not any(name.startswith("shard-") for name in place.names()) and time.monotonic() < deadline:
        time.sleep(0.1)
    one.kill()
    one.communicate()
    assert ".lock-harvest.json" in place.names()
    calls = []
    store = make(place.url, 160, each=lambda: calls.append(1))  # a dead process of this machine holds no lease
    assert 0 < len(calls) < 16 * 3
    assert there(store.place) == contents(tmp_path / "acts")


def test_damage_in_a_bucket_is_refused_by_name_and_mended_alone(bucket):
    store = make(f"{bucket}/damaged")
    place, before = store.place, there(store.place)
    name = "shard-00001.safetensors"
    place.write(name, [before[name][:-1]])
    with pytest.raises(UserError, match=r"s3://goldengate/damaged/shard-00001.safetensors: has .* bytes, the manifest"):
        whole(Store.open(place.url))
    assert [fault.file for fault in faults(place)] == [name]
    manifest = read_manifest(place)
    build.without(place, manifest, 0, set(bad_shards(place, manifest, 0)))
    make(place.url)
    assert there(place) == before


def test_a_bucket_that_is_not_there_is_one_line(bucket):
    with pytest.raises(UserError, match="s3://no-such-bucket/acts") as caught:
        make("s3://no-such-bucket/acts")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not an activation store"):
        Store.open("s3://no-such-bucket/acts")


def test_a_local_cache_in_front_of_a_bucket_is_an_address_too(bucket):
    store = make(f"{bucket}/cached")
    through = Store.open(f"simplecache::{bucket}/cached")
    assert torch.equal(whole(through)["acts"], whole(store)["acts"])
