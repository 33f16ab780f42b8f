"""The normal form of text: what becomes the same, what does not, and where every character came from."""

from __future__ import annotations

import unicodedata

import pytest

from rlt2i.inputs.typography import is_blank, is_invisible, lone_surrogate, normal_form, normalised


@pytest.mark.parametrize(
    ("typed", "plain"),
    [
        ("Grand\u2019s", "grand's"),
        ("Grand\u02bcs", "grand's"),
        ("\u201cOpen\u201d \u201eauf\u201c \u00abouvert\u00bb", '"open" "auf" "ouvert"'),
        ("well\u2011worn \u2013 a\u2014b \u22121", "well-worn - a-b -1"),
        ("wait\u2026", "wait..."),
        ("a\u00a0b\u3000c\u2009d\u202fe\u2028f\u0085g\u000bh\u2800i", "a b c d e f g h i"),
        ("a\u200bb\u200dc\u2060d\ufeffe\u00adf\u200eg\ufe0fh\u0000i\u3164j", "abcdefghij"),
        ("cafe\u0301 a\u0323\u0307 a\u0307\u0323", "caf\u00e9 \u1ea1\u0307 \u1ea1\u0307"),
        ("\uff2f\uff30\uff25\uff2e\uff01\uff1f\uff0d\uff02", 'open!?-"'),
        ("\uff76\uff9e\uff8a\uff9f", "\u30ac\u30d1"),
        ("\u1112\u1161\u11ab", "\ud55c"),
        ("o\ufb03ce \ufb01n", "office fin"),
        ("\U0001d407\U0001d422", "hi"),
        ("STRASSE stra\u00dfe \u03a3\u03a3 \u03c3\u03c2", "strasse strasse \u03c3\u03c3 \u03c3\u03c3"),
        # What looks different stays: this is not NFKC.
        ("\u00bd x\u00b2 H\u2082O \u2122 \u2460", "\u00bd x\u00b2 h\u2082o \u2122 \u2460"),
        ("\u00f8 \u0142 \u4e00 \u30fc", "\u00f8 \u0142 \u4e00 \u30fc"),
    ],
)
def test_the_normal_form_by_hand(typed, plain):
    assert normalised(typed) == plain


def test_every_character_knows_where_it_came_from():
    text = "Caf\u200be\u0301\u2026 \ufb01n"
    form = normal_form(text)
    assert form.text == "caf\u00e9... fin"
    pieces = ["C", "a", "f", "e\u0301", *["\u2026"] * 3, " ", *["\ufb01"] * 2, "n"]
    assert [text[start:end] for start, end in form.origins] == pieces
    assert form.original_range(2, 4) == (2, 6)


def test_the_normal_form_is_its_own_normal_form_and_no_unicode_form_changes_it():
    """Over every script and sign, and a sample of Han and Hangul: a law that no table of ours can forget."""
    regular = [*range(0x3400, 0xD7A4), *range(0x17000, 0x18CD6), *range(0x20000, 0x33480)]
    codes = set(range(0x33480)) - set(regular) | set(regular[::97])
    for character in map(chr, codes):
        if unicodedata.category(character)[0] != "C":
            once = normal_form(character).text
            assert normal_form(once).text == once, hex(ord(character))
            assert normal_form(unicodedata.normalize("NFD", character)).text == once, hex(ord(character))


def test_invisible_characters_and_blank_texts():
    assert all(map(is_invisible, "\u200b\u200c\u200d\u2060\ufeff\u00ad\u202e\ufe0f\u0000\u3164\u034f\U000e0041"))
    assert not any(map(is_invisible, "a \u00a0\u2028\u0301\u0601\u4e00'"))
    assert is_blank(" \u200b\u3000\u2800\ufeff")
    assert not is_blank(" . ")


def test_half_of_a_surrogate_pair_is_found():
    assert lone_surrogate("ab\ud83d") == 2
    assert lone_surrogate("\U0001f600 ok") is None
