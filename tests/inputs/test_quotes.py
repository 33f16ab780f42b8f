"""Which text a prompt puts in quotes."""

from __future__ import annotations

import pytest

from rlt2i.inputs.quotes import quoted_texts

NONE: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign "OPEN" and "CLOSED"', ("OPEN", "CLOSED")),
        ('"A""B"', ("A", "B")),
        ("no quotes, it's plain", NONE),
        ('one " only', NONE),
        ('an empty "" one', NONE),
        ('a blank " \u200b\u00a0" one', NONE),
        ('empty "" before "OPEN"', ("OPEN",)),
        ('sign saying" OPEN "in red', ("OPEN",)),
        # Escaped and doubled, as JSON and CSV write them.
        (r'a sign \"OPEN\" in red', ("OPEN",)),
        (r'a sign \\"OPEN\\" in red', ("OPEN",)),
        ('a sign ""OPEN"" in red', ("OPEN",)),
        ('"a sign ""OPEN"" in red"', ("OPEN",)),
        ('"a sign that says ""OPEN"""', ("OPEN",)),
        ('"""OPEN"""', ("OPEN",)),
        # TeX's quotes, and two apostrophes typed for one sign.
        ("a sign ``OPEN'' and ``IT'S ON''", ("OPEN", "IT'S ON")),
        ("a sign ''OPEN'' in red", ("OPEN",)),
        ("a sign `x`, ``y`` and ``OPEN", NONE),
        ("a 5'10'' man and a 6'2'' man", NONE),
        ("19'' \"TV\" 20''", ("TV",)),
        # Inches.
        ('an 18" pizza with the text "HOT"', ("HOT",)),
        ('a 4" x 6" card "HI", 12"-wide', ("HI",)),
        ('a 5\' 11" man with "HI"', ("HI",)),
        ('a 2\u00bd" nail and "HI"', ("HI",)),
        ('an 18\u201d pizza \u201cHOT\u201d', ("HOT",)),
        ('a 12" ruler', NONE),
        ('"ROUTE 66" and "OPEN"', ("ROUTE 66", "OPEN")),
        ('"ROUTE 66" beside an 18" pizza', ("ROUTE 66",)),
        ('a 27" monitor showing "27" in red', ("27",)),
        ('an ad "18" TV" in red', ('18" TV',)),
        ('reads "1984" and "2001".', ("1984", "2001")),
        # Typographic pairs of several languages.
        ("\u201cOPEN\u201d and \u201cSHUT\u201d", ("OPEN", "SHUT")),
        ("\u201eOFFEN\u201c, \u201eOTWARTE\u201d", ("OFFEN", "OTWARTE")),
        ("\u00ab Ouvert \u00bb et \u00abFerm\u00e9\u00bb", ("Ouvert", "Ferm\u00e9")),
        ("\u00bbOffen\u00ab, \u00bb\u00d6ppet\u00bb, \u201d\u00d6ppet\u201d", ("Offen", "\u00d6ppet", "\u00d6ppet")),
        ("\u5199\u7740\u300c\u5f00\u95e8\u300d\u548c\u300e\u8425\u4e1a\u300f", ("\u5f00\u95e8", "\u8425\u4e1a")),
        ("\u300c\u5916\u300c\u5185\u300d\u5916\u300d", ("\u5916\u300c\u5185\u300d\u5916",)),
        ("\uff02\uff2f\uff30\uff25\uff2e\uff02", ("\uff2f\uff30\uff25\uff2e",)),
        ("\u201cHe said \"hi\"\u201d", ('He said "hi"',)),
        ('mixed \u201cOPEN" now', ("OPEN",)),
        ('mixed "OPEN\u201d now', ("OPEN",)),
        ("\u201c\u201d, then \"OPEN\"", ("OPEN",)),
    ],
)  # fmt: skip
def test_quoted_texts_by_hand(prompt, texts):
    assert tuple(quote.text for quote in quoted_texts(prompt)) == texts


def test_single_quotes_count_when_asked_for_and_apostrophes_never():
    prompt = "the dog's bowl with 'No Dogs' and \u2018Keep Out\u2019 and \"it's 'mine'\""
    assert [quote.text for quote in quoted_texts(prompt)] == ["it's 'mine'"]
    assert [quote.text for quote in quoted_texts(prompt, single=True)] == ["No Dogs", "Keep Out", "it's 'mine'"]


def test_the_place_of_a_quote_is_in_the_prompt():
    prompt = r"a sign \"OPEN\", a \u201eSchild\u201c"
    for quote in quoted_texts(prompt):
        assert quote.text in prompt[quote.start : quote.end]
        assert quote.text not in prompt[: quote.start] + prompt[quote.end :]
