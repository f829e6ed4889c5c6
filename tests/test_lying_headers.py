"""Headers of safetensors and GGUF files that lie are refused before a byte of a tensor is used."""

import json
import pathlib
import struct

import gguf
import numpy as np
import pytest
from mutations import bounded

from batiste.interop import Tensors
from batiste.interop.files import INDEX, SINGLE
from batiste.interop.gguf_header import read_header

TWO = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
       "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}


def file_of(path: pathlib.Path, header: dict | bytes, data: int = 32, length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + bytes(range(data)))


def changed(name: str, **values) -> dict:
    return TWO | {name: TWO[name] | values}


LIES = {
    "negative": (changed("a", data_offsets=[-24, 0]), "data_offsets=.*two numbers of bytes in order"),
    "backwards": (changed("b", data_offsets=[32, 24]), "two numbers of bytes in order"),
    "overlapping": (changed("b", data_offsets=[8, 16]), "'b' at byte 8 overlaps"),
    "gap": (changed("b", dtype="F16", shape=[2], data_offsets=[28, 32]), "'b' at byte 28 follows a gap"),
    "unused end": ({"a": TWO["a"]}, "8 bytes after the last tensor"),
    "out of range": (changed("b", shape=[8], data_offsets=[24, 40]), "cut short: 'b' ends at byte 40"),
    "huge": (changed("b", shape=[2**62, 2**62], data_offsets=[24, 32]), "8 bytes, not those of"),
    "a negative size": (changed("b", shape=[-2, -2]), "none of them negative"),
    "another shape": (changed("a", shape=[3, 3]), "24 bytes, not those of F32"),
    "another dtype": (changed("a", dtype="F16"), "24 bytes, not those of F16"),
    "no dtype": (changed("a", dtype="F31"), "dtype 'F31', which is not known"),
    "a dtype that is a list": (changed("a", dtype=["F32"]), "dtype=a list: expected a text"),
    "sizes that are texts": (changed("a", shape=["2", 3]), r"shape\[0\]='2': expected a whole number"),
    "three offsets": (changed("a", data_offsets=[0, 12, 24]), "two numbers of bytes"),
    "no tensor": ({"a": 3}, "a=3: expected an object"),
    "twice": (b'{"a": %s, "a": %s}' % ((json.dumps(TWO["a"]).encode(),) * 2), "'a' is there twice"),
    "no object": (b"[]", "expected an object"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_header_that_lies_is_refused(lie, tmp_path):
    file_of(tmp_path / SINGLE, TWO)
    assert Tensors(tmp_path).read("a").shape == (2, 3)
    header, expected = LIES[lie]
    file_of(tmp_path / SINGLE, header)
    with pytest.raises(ValueError, match=expected):
        Tensors(tmp_path)


@pytest.mark.parametrize("length", (0, 2**63, 2**64 - 1, 10_000))
def test_a_headers_length_is_bounded(length, tmp_path):
    file_of(tmp_path / SINGLE, TWO, length=length)
    with bounded(), pytest.raises(ValueError, match="not a safetensors file, or cut short|no JSON"):
        Tensors(tmp_path)


def test_an_index_is_held_to(tmp_path):
    (tmp_path / "in").mkdir()
    folder, one, two = tmp_path / "in", "model-1.safetensors", "model-2.safetensors"
    file_of(folder / one, {"a": TWO["a"]}, 24)
    file_of(folder / two, {"b": TWO["b"] | {"data_offsets": [0, 8]}}, 8)
    file_of(tmp_path / "out.safetensors", {"b": TWO["b"] | {"data_offsets": [0, 8]}}, 8)

    def index(weight_map):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return Tensors(folder)

    assert set(index({"a": one, "b": two}).entries) == {"a", "b"}
    for weight_map, expected in (
        ({"a": two, "b": two}, "'a' is in model-2.safetensors, but was found in no file"),
        ({"a": two, "b": one}, "'a' is in model-2.safetensors, but was found in model-1"),
        ({"a": one, "b": "../out.safetensors"}, "expected the name of a .safetensors file in this"),
        ({"a": one, "b": str(tmp_path / "out.safetensors")}, "expected the name of a .safetensors"),
        ({"a": one, "b": None}, "weight_map.b=null: expected a text"),
        ({"a": one, "b": two, "c": two}, "'c' is in model-2.safetensors, but was found in no file"),
        ({"a": one}, None), ({"a": one, "b": "model-3.safetensors"}, "model-3.safetensors is missing"),
    ):
        if expected is None:
            assert set(index(weight_map).entries) == {"a"}
            continue
        with pytest.raises(ValueError, match=expected):
            index(weight_map)
    file_of(folder / two, {"a": TWO["a"]}, 24)
    with pytest.raises(ValueError, match="'a' is in model-1.safetensors too"):
        index({"a": one, "b": two})
    file_of(folder / SINGLE, TWO)  # It counts more than an index that is left of another model.
    assert set(Tensors(folder).entries) == {"a", "b"}


SIZES = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, dims: tuple, kind: int = 0, start: int = 0) -> bytes:
    return (text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
            + struct.pack("<IQ", kind, start))


def gguf_of(keys: bytes = b"", tensors: bytes = b"", counts=(0, 0), version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, counts[1], counts[0]) + keys + tensors
    return head + bytes(-len(head) % 32) + bytes(range(64))


GOOD = gguf_of(text("k") + struct.pack("<IIQ2H", 9, 2, 2, 7, 8),
               tensor("a", (3, 2)) + tensor("b", (4,), start=32), (1, 2))
GGUF_LIES = {
    "an array of 2^40": (gguf_of(text("k") + struct.pack("<IIQ", 9, 4, 2**40), b"", (1, 0)), "numbers"),
    "an array of 2^40 texts": (gguf_of(text("k") + struct.pack("<IIQ", 9, 8, 2**40), b"", (1, 0)),
                               "1,099,511,627,776 texts"),
    "arrays in arrays": (gguf_of(text("k") + struct.pack("<IIQ", 9, 9, 1), b"", (1, 0)),
                         "array of type 9"),
    "a text of 2^63": (gguf_of(struct.pack("<Q", 2**63), b"", (1, 0)), "bytes of 'a key'"),
    "2^60 keys": (gguf_of(counts=(2**60, 0)), "keys, for which"),
    "2^60 tensors": (gguf_of(counts=(0, 2**60)), "tensors, for which"),
    "no type": (gguf_of(text("k") + struct.pack("<I", 77), b"", (1, 0)), "type 77"),
    "a key twice": (gguf_of((text("k") + struct.pack("<IB", 0, 1)) * 2, b"", (2, 0)), "'k' is there twice"),
    "no alignment": (gguf_of(text("general.alignment") + struct.pack("<II", 4, 0), b"", (1, 0)),
                     "general.alignment=0"),
    "2^31 dims": (gguf_of(b"", text("a") + struct.pack("<I", 2**31), (0, 1)), "dims: expected 1 to 4"),
    "a tensor out of range": (gguf_of(b"", tensor("a", (3, 2), start=64), (0, 1)), "ends at byte"),
    "a tensor of 2^60": (gguf_of(b"", tensor("a", (2**60, 2**60)), (0, 1)), "ends at byte"),
    "a size of 0": (gguf_of(b"", tensor("a", (3, 0)), (0, 1)), "expected rows of blocks"),
    "half a block": (gguf_of(b"", tensor("a", (16,), kind=8), (0, 1)), "rows of blocks of 32"),
    "an odd place": (gguf_of(b"", tensor("a", (3,), start=4), (0, 1)), "a multiple of 32"),
    "overlapping": (gguf_of(b"", tensor("a", (10,)) + tensor("b", (4,), start=32), (0, 2)),
                    "'b' overlaps"),
    "a tensor twice": (gguf_of(b"", tensor("a", (3,)) + tensor("a", (4,), start=32), (0, 2)),
                       "'a' is there twice"),
    "a type of tensor": (gguf_of(b"", tensor("a", (3,), kind=999), (0, 1)), "type 999"),
    "a version": (gguf_of(version=2**24 * 3), "version"),
    "another file": (b"FUGG" + GOOD[4:], "does not begin with GGUF"),
    "no text": (gguf_of(struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1), b"", (1, 0)), "UTF-8"),
}


@pytest.mark.parametrize("lie", GGUF_LIES)
def test_a_gguf_header_that_lies_is_refused(lie, tmp_path):
    path = tmp_path / "some.gguf"
    path.write_bytes(GOOD)
    header = read_header(path, SIZES)
    assert header.metadata == {"k": [7, 8]}
    assert [(each.name, each.shape, each.size) for each in header.tensors] == [
        ("a", (2, 3), 24), ("b", (4,), 16)]
    assert np.memmap(path, np.uint8, "r", header.tensors[1].start, (4,)).tolist() == [32, 33, 34, 35]
    data, expected = GGUF_LIES[lie]
    path.write_bytes(data)
    with bounded(5.0, 2**28), pytest.raises(ValueError, match="not a GGUF file.*" + expected):
        read_header(path, SIZES)
