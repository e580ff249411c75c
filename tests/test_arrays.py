"""One file of named arrays: pieces, memory maps, and files that are damaged or made to harm."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gnnet.arrays import ArrayFile

MAGIC = b"gnnet arrays 1\n"
ARRAYS = {"a": ("f4", (10, 3)), "b/c": ("i8", (5,)), "none": ("f2", (0, 7)), "bytes": ("u1", (4097, 2))}


def create(path: Path) -> ArrayFile:
    return ArrayFile.create(path, ARRAYS, {"made of": {"what": "ünicode"}})


def write_header(path: Path, header: bytes, *, body: bytes = b"\0" * 64, length: int | None = None) -> Path:
    length = len(header) if length is None else length
    path.write_bytes(MAGIC + length.to_bytes(8, "little") + header + body)
    return path


def refused_or_read(path: Path) -> None:
    """Nothing but ValueError and FileNotFoundError leaves, and these name the file."""
    try:
        file = ArrayFile(path)
    except (ValueError, FileNotFoundError) as error:
        assert path.name in str(error)
        return
    size = path.stat().st_size
    for name, (kind, shape) in file.arrays.items():
        assert np.dtype(kind).itemsize * np.prod([float(s) for s in shape]) <= size
        if 0 not in shape and len(shape) <= 32:
            file[name].sum()


def test_header_and_arrays_are_of_one_file_though_another_takes_its_place(tmp_path):
    path = tmp_path / "x.gnmap"
    for value, rows in ((1, 10), (2, 5)):
        if rows == 5:
            reader = ArrayFile(path)
        file = ArrayFile.create(path, {"a": ("f4", (rows, 3))}, {})
        file.write("a", 0, np.full((rows, 3), value))
        file.close()
    assert reader["a"].shape == (10, 3) and (reader["a"] == 1).all()
    assert (ArrayFile(path)["a"] == 2).all()


def test_pieces_are_read_back_by_another_reader(tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "deep/down/x.gnmap"
    file = create(path)
    assert not file["a"].any() and file["none"].shape == (0, 7)
    expected = {"a": np.zeros((10, 3), np.float32), "bytes": np.zeros((4097, 2), np.uint8)}
    for start, count in ((7, 3), (0, 2), (4, 0), (1, 3)):  # overlapping, out of order, empty
        rows = generator.normal(size=(count, 3))
        file.write("a", start, rows)
        expected["a"][start : start + count] = rows
    rows = generator.integers(0, 256, (4097, 2))
    file.write("bytes", 0, rows)
    expected["bytes"][:] = rows
    file.write("b/c", 1, np.array([2**62, -1]))
    file.write("a", 0, np.asfortranarray(np.ones((2, 3), np.float64)))
    expected["a"][:2] = 1
    file.flush()
    other = ArrayFile(path)
    assert other.about == {"made of": {"what": "ünicode"}} and other.arrays == ARRAYS
    for name, values in expected.items():
        np.testing.assert_array_equal(other[name], values)
    np.testing.assert_array_equal(other["b/c"], [0, 2**62, -1, 0, 0])
    assert not other["a"].flags.writeable and "a" in other and "d" not in other
    assert [p.name for p in path.parent.iterdir()] == ["x.gnmap"]
    file.close()
    file.close()


def test_a_writer_goes_on_in_an_old_file_and_create_replaces_it(tmp_path):
    path = tmp_path / "x"
    file = create(path)
    file.write("a", 9, np.ones((1, 3)))
    file.close()
    again = ArrayFile(path, writable=True)
    again.write("a", 0, np.full((1, 3), 2))
    again.close()
    assert ArrayFile(path)["a"][:, 0].tolist() == [2, *[0] * 8, 1]
    ArrayFile.create(path, {"z": ("f8", (2,))}, {}).close()
    assert ArrayFile(path).arrays == {"z": ("f8", (2,))}


@pytest.mark.parametrize(("start", "shape"), [(9, (2, 3)), (0, (1, 4)), (0, (1,)), (11, (0, 3))])
def test_rows_that_do_not_fit_are_refused_before_they_are_written(tmp_path, start, shape):
    file = create(tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(ValueError, match=r"of a, which is \(10, 3\)"):
        file.write("a", start, np.ones(shape))
    file.close()
    assert (tmp_path / "x").read_bytes() == before


def test_many_arrays_with_long_offsets_do_not_overwrite_the_header(tmp_path):
    """Offsets have more digits than the zeros that the header's room is reckoned with."""
    arrays = {f"{'n' * 50}{i}": ("f8", (10**i % 1000003, 3)) for i in range(60)}
    file = ArrayFile.create(tmp_path / "x", arrays, {"about": "x" * 4000})
    for name, (_, shape) in arrays.items():
        file.write(name, 0, np.full((1, 3), len(shape)))
        file.write(name, shape[0] - 1, np.full((1, 3), 7.0))
    file.close()
    read = ArrayFile(tmp_path / "x")
    assert read.arrays == arrays and all(read[name][-1].tolist() == [7.0] * 3 for name in arrays)


def test_missing_folder_garbage_and_truncation_name_the_file(tmp_path):
    path = tmp_path / "some.gnmap"
    with pytest.raises(FileNotFoundError, match=r"some\.gnmap does not exist"):
        ArrayFile(path)
    with pytest.raises(FileNotFoundError):
        ArrayFile(tmp_path)
    create(path).close()
    whole = path.read_bytes()
    for kept in (0, 5, len(MAGIC), len(MAGIC) + 8, 300, len(whole) // 2, len(whole) - 4096):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"some\.gnmap .*(no map|cut off|damaged)|header of .*some\.gnmap"):
            ArrayFile(path)
    pickled = b"\x80\x04cos\nsystem\n(S'true'\ntR."
    for other in (pickled, b"PK\x03\x04" + bytes(5000), whole.replace(b"gnnet", b"gmnet")):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"some\.gnmap is no map"):
            ArrayFile(path)


@pytest.mark.parametrize(
    "place",
    [
        ["f4", [-1, 3], 0], ["f4", [4], -8], ["f4", [2**62, 8], 0], ["f4", [2**63, 2], 0], ["f4", [10**40], 0],
        ["f4", [4], 10**40], ["f4", [1.5], 0], ["f4", ["4"], 0], ["f4", 4, 0], ["f4", [True], 0], ["f4", [4], "0"],
        ["O", [1], 0], ["V8", [1], 0], [None, [1], 0], [["f4"], [1], 0], ["f4", [1]], "f4", None, {"f4": 1},
    ],
)  # fmt: skip
def test_headers_that_lie_are_refused(tmp_path, place):
    path = write_header(tmp_path / "lying", json.dumps({"about": {}, "arrays": {"a": place}}).encode())
    with pytest.raises(ValueError, match="lying"):
        ArrayFile(path)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{}", b"null", b'{"about": 3, "arrays": {}}', b'{"about": {}, "arrays": []}', b"\xff\xfe", b"[" * 50000,
     b'{"about": {}, "arrays": {"a": ["f4", [NaN], 0]}}', b'{"about": {}, "arrays": {"a": ["f4", [1e999], 0]}}'],
)  # fmt: skip
def test_headers_of_other_things_are_refused(tmp_path, header):
    path = write_header(tmp_path / "other", header)
    with pytest.raises(ValueError, match="other"):
        ArrayFile(path)
    with pytest.raises(ValueError, match="other"):
        ArrayFile(write_header(path, header, length=2**63))


QUIETLY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["f4", "u1", "O"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["about", "arrays", "a"]), inner),
    max_leaves=12,
)


@QUIETLY
@given(st.data())
@pytest.mark.slow
def test_fuzz_of_damaged_bytes(tmp_path, data):
    path = tmp_path / "fuzzed"
    create(path).close()
    content = bytearray(path.read_bytes()[: data.draw(st.sampled_from([100, 400, 5000, 50000]))])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    refused_or_read(path)


@QUIETLY
@given(PLAIN, st.dictionaries(st.text(max_size=3), PLAIN, max_size=3))
@pytest.mark.slow
def test_fuzz_of_headers(tmp_path, whole, arrays):
    path = tmp_path / "fuzzed"
    for header in (whole, {"about": {}, "arrays": arrays}):
        refused_or_read(write_header(path, json.dumps(header).encode()))


@pytest.mark.skipif(sys.platform != "linux", reason="locks nothing")
def test_a_row_is_claimed_by_one_opening_until_it_is_released(tmp_path):
    first = create(tmp_path / "x")
    second = ArrayFile(tmp_path / "x", writable=True)
    assert first.claim("a", 3) and first.claim("b/c", 0) and not second.claim("a", 3)
    ArrayFile(tmp_path / "x")["a"].sum()  # a mapping that ends, and a file that is closed, free nothing
    assert not second.claim("a", 3) and second.claim("a", 4) and not first.claim("a", 4)
    first.write("a", 3, np.ones((1, 3)))
    first.release("a", 3)
    assert second.claim("a", 3, wait=True) and second["a"][3].all() and not second.claim("b/c", 0)
    first.release()
    assert second.claim("b/c", 0)
    second.release()
    second.close()
    assert first.claim("a", 3) and first.claim("a", 4)
