"""npz files of strangers: numbers are read as they are; what holds more, or says that it does, is one line."""

import io
import random
import resource
import struct
import zipfile

import numpy as np
import pytest
import torch

from sae.errors import UserError
from sae.formats import checks


def npy(array, shape=None):
    """The bytes of a .npy file, under a header that may say another shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"shape": array.shape if shape is None else shape, "fortran_order": False, "descr": array.dtype.str}
    )
    return file.getvalue() + array.tobytes()


def packed(path, members, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def refused(path, why):
    """One line that names the file, and no memory taken: an allocation of many GB would fail here, or be seen."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=why) as error:
        checks.npz(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_as_they_are(tmp_path, save):
    given = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(1000), "c": np.float32(3),
             "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "none": np.zeros((0, 4))}  # fmt: skip
    save(tmp_path / "a.npz", **given)
    found = checks.npz(tmp_path / "a.npz")
    assert set(found) == set(given)
    assert all(torch.equal(found[name], torch.from_numpy(np.array(array))) for name, array in given.items())


def test_python_objects_are_refused_unread(tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("was run",)

    np.savez(tmp_path / "a.npz", W_enc=np.array([Trap()], dtype=object))
    refused(tmp_path / "a.npz", "W_enc.npy holds Python objects")


def test_a_header_that_says_more_than_follows_takes_no_memory(tmp_path):
    data = npy(np.zeros(8, np.float32), shape=(1 << 20, 1 << 20))
    refused(packed(tmp_path / "a.npz", {"W_enc.npy": data}), "says that it is .* which it is not")


@pytest.mark.parametrize("shape", [(4,), (0,), (-8,), (-2, -4)])
def test_a_header_of_another_shape_than_follows(tmp_path, shape):
    refused(packed(tmp_path / "a.npz", {"W_enc.npy": npy(np.zeros(8, np.float32), shape)}), "no npz of numbers")


def test_a_member_that_says_more_than_the_file_holds(tmp_path):
    """Its size stands twice in a zip, in the directory at the end as well; the array's header fits it."""
    n = 1 << 28
    path = packed(tmp_path / "a.npz", {"W_enc.npy": npy(np.zeros(8, np.float32), shape=(n,))})
    with zipfile.ZipFile(path) as archive:
        true = archive.infolist()[0].file_size
    said = struct.pack("<I", true + 4 * (n - 8))
    whole = path.read_bytes().replace(struct.pack("<II", true, true), struct.pack("<I", true) + said)
    path.write_bytes(whole)
    refused(path, "say they unpack")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    zeros = np.zeros(1 << 25, np.float32)  # 128 MB in 130 KB
    np.savez_compressed(tmp_path / "a.npz", W_enc=zeros)
    del zeros
    refused(tmp_path / "a.npz", "say they unpack to 134")


def test_members_that_share_their_bytes(tmp_path):
    """A bomb by overlap: each entry of the directory names the same data."""
    path = packed(tmp_path / "a.npz", {"a.npy": npy(np.zeros(4000, np.float32))})
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry, tail = data[start:end], bytearray(data[end:])
    many = 50
    tail[8:12] = struct.pack("<HH", many, many)
    tail[12:16] = struct.pack("<I", many * len(entry))
    path.write_bytes(data[:start] + entry * many + bytes(tail))
    refused(path, "say they unpack")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: packed(path, {"hello.txt": b"hello"}),
        lambda path: packed(path, {"W_enc.npy": npy(np.array(["a", "b"]))}),
        lambda path: path.write_bytes(npy(np.zeros(4))),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 and nothing else"),
        lambda path: path.mkdir(),
    ],
    ids=["zip of texts", "strings", "one array", "empty", "no zip", "folder"],
)
def test_what_is_no_npz_of_numbers(tmp_path, write):
    write(tmp_path / "a.npz")
    refused(tmp_path / "a.npz", "no npz of numbers")


def test_a_missing_one_is_missing(tmp_path):
    refused(tmp_path / "a.npz", "is missing")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_cut_or_damaged_anywhere_it_is_one_line_or_arrays(tmp_path, save):
    save(tmp_path / "a.npz", a=np.random.default_rng(0).standard_normal((8, 8)), b=np.zeros(5))
    whole, path, chance = (tmp_path / "a.npz").read_bytes(), tmp_path / "b.npz", random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        else:
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(bytes(data))
        try:
            checks.npz(path)
        except UserError as error:
            assert "\n" not in str(error)
