"""The reader of every text file: lines, encodings, and what it says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlt2i.config.references import ConfigError, parse_yaml, read_yaml
from rlt2i.inputs.textfiles import TextFileError, parse_json, read_lines, read_objects, read_text, split_lines

TEXT = "name: caf\u00e9 \u2013 \u201cOPEN\u201d\nabout: na\u00efve\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (TEXT.encode("utf-16"), ("byte 0 ", "line 1 ", "UTF-16", "iconv -f UTF-16")),
        (TEXT.encode("utf-16-be"), ("byte 0 (0x00) on line 1", "UTF-16")),
        (TEXT.encode("utf-16-le"), ("byte 1 (0x00) on line 1", "UTF-16")),
        (TEXT.encode("utf-32"), ("byte 0 ", "line 1 ", "UTF-32")),
        (TEXT.encode("cp1252"), ("byte 9 (0xe9) on line 1", "cp1252", "iconv -f CP1252")),
        (b"plain\n\xef\xbb\xbf" + "caf\u00e9".encode("cp1252"), ("byte 12 (0xe9) on line 2", "cp1252")),
        (b"\xef\xbb\xbfplain\ncaf\xe9", ("byte 12 (0xe9) on line 2", "cp1252")),
        ("\u4e2d\u6587\u7684\u8bcd".encode("gb18030"), ("byte 0 ", "line 1 ", "East Asian")),
        (b"a cat\n\xed\xa0\xbd", ("byte 6 (0xed) on line 2",)),
        (b"a cat\nnul\0", ("byte 9 (0x00) on line 2",)),
        (b"one\rtwo\rthree", ("carriage returns alone",)),
    ],
)
def test_what_is_not_utf8_names_file_byte_line_and_encoding(tmp_path: Path, content: bytes, words: tuple[str, ...]):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(TextFileError) as caught:
        read_text(path)
    assert str(path) in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(ConfigError, match=str(path)):
        read_yaml(path)


def test_a_folder_is_no_text_file(tmp_path: Path):
    with pytest.raises(TextFileError, match="cannot be read"):
        read_text(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "gone.txt")


def test_lines_keep_their_numbers_and_blank_ones_do_not_count(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n \u200b\n\ufeff two\u2028\nthree".encode())
    lines = read_lines(tmp_path / "a.txt")
    assert [(line.number, line.text) for line in lines] == [(1, "one"), (4, "two"), (5, "three")]
    assert lines[1].where == f"{tmp_path / 'a.txt'}, line 4"


def test_lines_are_cut_at_line_feeds_alone():
    text = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh\r\ni\n"
    assert split_lines(text) == ["a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh", "i"]
    assert split_lines("") == []
    assert split_lines("\n\na") == ["", "", "a"]


def test_rows_that_are_no_objects_are_refused_with_their_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "\u2028"}\n\n[1]\n', encoding="utf-8")
    with pytest.raises(TextFileError, match="line 3: expected an object"):
        read_objects(path)


@pytest.mark.parametrize("text", ['"\\ud83d"', '{"a": ["\\udc00 x"]}', '{"\\ud800": 1}', '{"a": {"b": "x\\ud83dy"}}'])
def test_half_a_character_is_refused_wherever_it_is(text: str):
    with pytest.raises(TextFileError, match=r"a.jsonl, line 3: .* half of a character .* lone surrogate"):
        parse_json(text, "a.jsonl, line 3")
    with pytest.raises(ConfigError, match=r"line 1: .* half of a character"):
        parse_yaml(text)


def test_a_whole_character_may_be_written_as_two_escapes():
    text = json.dumps({"prompt": "\U0001f600"})
    assert "\\ud83d\\ude00" in text
    assert parse_json(text, "here") == parse_yaml(text) == {"prompt": "\U0001f600"}


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "{oops", ""])
def test_json_that_cannot_be_used_is_one_error_with_its_place(text: str):
    with pytest.raises(TextFileError, match=r"^a.jsonl, line 3: not JSON"):
        parse_json(text, "a.jsonl, line 3")
