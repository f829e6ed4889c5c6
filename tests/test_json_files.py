"""JSON of strangers: a value of the kind that was asked for, or one line that names file and key."""

import json
import os

import pytest

from batiste.data.json_files import MAX_DEPTH, parse_json, read_json

KIND = {"name": str, "sizes": list[int], "scale": float, "deep": ({"inner": bool | None}, int),
        "left_out": int | None, "by_name": dict[str, int | str]}
GOOD = {"name": "a", "sizes": [1, 2], "scale": 3, "deep": {}, "by_name": {"x": 1, "y": "z"},
        "other": [None, {"anything": 1e3}]}
MISTYPED = {
    "name is missing; expected a text": {"name": ...},
    "name=3: expected a text": {"name": 3},
    "name=a list: expected a text": {"name": [1]},
    "sizes[1]='2': expected a whole number": {"sizes": [1, "2"]},
    "sizes[0]=true: expected a whole number": {"sizes": [True]},
    "sizes[0]=1.5: expected a whole number": {"sizes": [1.5]},
    "sizes[0]=9223372036854775808: expected a whole number": {"sizes": [2**63]},
    "sizes=null: expected a list, of a whole number each": {"sizes": None},
    "scale=false: expected a number": {"scale": False},
    "deep=a list: expected an object or a whole number": {"deep": []},
    "deep=null: expected an object or a whole number": {"deep": None},
    "deep.inner=0: expected true or false or null": {"deep": {"inner": 0}},
    "left_out='': expected a whole number or null": {"left_out": ""},
    "by_name.y=a list: expected a whole number or a text": {"by_name": {"x": 1, "y": []}},
}
BROKEN = {
    "": "no JSON", "{": "no JSON", "[1, 2]": "a list: expected an object", "nul": "no JSON",
    '{"a": 1, "a": 2}': "'a' is there twice", '{"a": NaN}': "NaN is no finite number",
    '{"a": 1e999}': "1e999 is no finite number", '{"a": %s}' % ("9" * 5000): "5000 digits",
    "[" * (MAX_DEPTH + 5) + "]" * (MAX_DEPTH + 5): "nested more than", "[" * 100_000: "nested more",
    '{"a":' * 100_000: "nested more than", '{"a": "\\ud800"}': "not UTF-8",
    '{"\\udfff": 1}': "not UTF-8",
}


def test_what_has_the_kind_is_returned():
    assert parse_json(json.dumps(GOOD), "here", KIND) == GOOD
    assert parse_json(b"\xef\xbb\xbf[1]", "here", list) == [1]
    assert parse_json('"\\ud83d\\ude00"', "here", str) == "\U0001f600"
    assert parse_json('{"long": 1000000000000000019884624838656}', "here")["long"] > 10**30 - 1
    assert parse_json("[NaN, -Infinity]", "here", list[float], allow_nan=True)[1] == -float("inf")


@pytest.mark.parametrize("expected", MISTYPED)
def test_a_wrong_type_is_named(expected):
    changed = {key: value for key, value in (GOOD | MISTYPED[expected]).items() if value is not ...}
    with pytest.raises(ValueError) as refused:
        parse_json(json.dumps(changed), "dir/config.json", KIND)
    line = str(refused.value)
    assert line.startswith("dir/config.json: ") and expected in line and "\n" not in line


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:16])
def test_what_is_broken_is_one_line(text):
    with pytest.raises(ValueError) as refused:
        parse_json(text, "dir/config.json")
    line = str(refused.value)
    assert line.startswith("dir/config.json: ") and BROKEN[text] in line
    assert "\n" not in line and len(line) < 200 and type(refused.value) is ValueError


def test_files_are_bounded_and_regular(tmp_path):
    path = tmp_path / "some.json"
    for data, expected in ((b"{}" + b" " * 100, "more than 50 bytes"), (b"{\xff}", "not UTF-8")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=expected):
            read_json(path, max_bytes=50)
    os.mkfifo(tmp_path / "pipe.json")  # Opened, it would wait for a writer for ever.
    for name in ("none.json", "pipe.json", "."):
        with pytest.raises(ValueError, match="no such file, or not a regular one"):
            read_json(tmp_path / name)
