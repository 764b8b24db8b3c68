"""Files from strangers: what is read, and what is refused."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest

from examples.chorales.data.files import SILENT, load_file
from examples.chorales.data.safe_pickle import load_pickle

PIECE = [[72, 65, 60, 48], [72, 65, 60, 48], [71, 65], [71, 64, 59, 47]]
SPLITS = {"train": [PIECE, PIECE[::-1]], "valid": [PIECE], "test": [PIECE]}


def write(path, value):
    """Write SPLITS-like data in the format that the suffix names."""
    if path.suffix == ".json":
        path.write_text(json.dumps(value))
    else:
        path.write_bytes(pickle.dumps(value, protocol=2))
    return path


def assert_is_splits(splits):
    np.testing.assert_array_equal(splits["train"][0][[0, 3]], [[72, 65, 60, 48], [71, 64, 59, 47]])
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [2, 1, 1]
    assert all(piece.shape == (4, 4) for name in splits for piece in splits[name])


@pytest.mark.parametrize("suffix", [".json", ".pkl", ".pickle"])
def test_json_and_pickle_are_read(tmp_path, suffix):
    assert_is_splits(load_file(write(tmp_path / f"data{suffix}", SPLITS)))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["<i8", ">i4", "f2", "u1"])
def test_pickled_numpy_data_is_read(tmp_path, protocol, dtype):
    """Arrays, object arrays and scalars, as every protocol stores them."""

    def pieces(split):
        array = np.empty(len(split), dtype=object)
        array[:] = [[np.array(step, dtype=dtype) for step in piece] for piece in split]
        return array

    value = {name: pieces(split) for name, split in SPLITS.items()}
    value["train"][0][0] = tuple(np.array(PIECE[0], dtype=dtype))  # a tuple of numpy scalars
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    assert_is_splits(load_file(path))


def test_arrays_survive_exactly():
    values = [np.arange(12, dtype=">i2").reshape(3, 4), np.asfortranarray(np.eye(3)), np.float32(2.5), np.array(True)]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for value, loaded in zip(values, load_pickle(pickle.dumps(values, protocol=protocol)), strict=True):
            np.testing.assert_array_equal(loaded, value)


@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
def test_python_2_pickles_under_both_of_numpys_names_are_read(package):
    """A python 2 pickle of np.array([60, 72]), byte for byte as numpy wrote it, under either module name."""
    data = (
        b"\x80\x02c" + package.encode() + b".multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x10" + struct.pack("<2q", 60, 72) + b"tb."
    )
    np.testing.assert_array_equal(load_pickle(data), [60, 72])


def test_npz_with_silent_voices_is_read(tmp_path):
    grid = np.array([[72, 65, 60, 48], [72, np.nan, 60, 48]], dtype=np.float16)
    pieces = np.empty(1, dtype=object)
    pieces[0] = grid
    np.savez(tmp_path / "data.npz", train=pieces, valid=pieces, test=grid[None])
    splits = load_file(tmp_path / "data.npz")
    for name in splits:
        np.testing.assert_array_equal(splits[name][0], [[72, 65, 60, 48], [72, -1, 60, 48]])


class Evil:
    """Pickles to a call of os.system."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("container", ["pkl", "npz"])
def test_malicious_pickle_is_refused_and_does_not_run(tmp_path, container):
    path, witness = tmp_path / f"data.{container}", tmp_path / "witness"
    if container == "pkl":
        path.write_bytes(pickle.dumps(SPLITS | {"train": Evil(witness)}))
    else:
        array = np.empty(1, dtype=object)
        array[0] = Evil(witness)
        np.savez(path, train=array, valid=array, test=array)
    with pytest.raises(ValueError, match=r"data\.\w+: cannot be read .*refused to load (posix|nt)\.system"):
        load_file(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "numpy.load", "numpy._core.multiarray.fromfile", "functools.partial"]
)
def test_other_names_are_refused(name):
    module, attribute = name.rsplit(".", 1)
    with pytest.raises(pickle.UnpicklingError, match="refused to load"):
        load_pickle(f"c{module}\n{attribute}\n.".encode())


def test_bytes_cannot_become_pointers():
    """numpy.ndarray((1,), "O", bytes) would treat the file's bytes as the address of an object."""
    forged = b"\x80\x02cnumpy\nndarray\n(K\x01\x85cnumpy\ndtype\nX\x01\x00\x00\x00O\x85RC\x08AAAAAAAAtR."
    with pytest.raises(pickle.UnpicklingError, match="direct call"):
        load_pickle(forged)
    crafted = b"\x80\x02cnumpy\ndtype\nX\x05\x00\x00\x00O,i4,\x85R."
    with pytest.raises(pickle.UnpicklingError, match="refused the numpy dtype"):
        load_pickle(crafted)
    state = b"(K\x01K\x01\x85cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R\x89C\x08AAAAAAAAtb."
    array = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R" + state
    with pytest.raises(pickle.UnpicklingError, match="garbled object array"):
        load_pickle(array)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("garbled.json", b'{"train": [', "cannot be read"),
        ("garbled.pkl", b"\x80\x04garbage", "cannot be read"),
        ("empty.pkl", b"", "cannot be read"),
        ("garbled.npz", b"PK\x03\x04garbage", "cannot be read"),
        ("notes.mid", b"MThd", "unknown suffix '.mid'"),
        ("list.json", b"[1, 2]", "expected a mapping"),
        ("part.json", b'{"train": [], "valid": []}', "missing splits: test"),
        ("five.json", b'{"train": [[[1,2,3,4,5]]], "valid": [], "test": []}', r"train\[0\]\[0\]: expected at most 4"),
        ("high.json", b'{"train": [[[200]]], "valid": [], "test": []}', r"train\[0\]\[0\]: 200.0 is not a MIDI pitch"),
        ("text.json", b'{"train": ["abc"], "valid": [], "test": []}', r"train\[0\]: expected a non-empty list"),
    ],
)
def test_wrong_files_are_named_and_explained(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_file(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_file(tmp_path / "none.json")


def test_truncated_npz_member_is_refused(tmp_path):
    member = io.BytesIO()
    np.save(member, np.zeros((1, 4, 4), dtype=np.int64))
    path = tmp_path / "cut.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("train", "valid", "test"):
            archive.writestr(f"{name}.npy", member.getvalue()[:-40])
    with pytest.raises(ValueError, match=r"cut\.npz: cannot be read"):
        load_file(path)


@pytest.mark.parametrize("rest", [0, -1, 0.0, float("nan")])
def test_rests_by_any_sign_are_no_pitch(tmp_path, rest):
    """A 0 for a rest became a pitch of the vocabulary; beside fewer than four voices, a rest was taken for one that sings low."""
    piece = [[72, 67, 60, 48], [72, rest, 60, 48], [rest, rest, rest, rest], rest, [rest, 67, 60], [72, 67, 60, 48]]
    path = tmp_path / "rests.json"
    path.write_text(json.dumps({name: [piece] for name in ("train", "valid", "test")}))
    (grid,) = load_file(path)["train"]
    silent = [SILENT] * 4
    assert grid.tolist() == [piece[0], [72, SILENT, 60, 48], silent, silent, [SILENT, 67, 60, SILENT], piece[0]]
