"""Phrases of a prompt: where they are, in whatever script and characters, and which there are."""

from __future__ import annotations

import unicodedata

import pytest

from rlt2i.inputs.phrases import content_phrases, find_phrase


@pytest.mark.parametrize(
    ("phrase", "text", "found"),
    [
        ("cat", "a cat and a dog", ["cat"]),
        ("cat", "two cats, one Cat's tail", ["cats", "Cat"]),
        ("cat", "a category of bobcat", []),
        ("box", "two boxes beside a box", ["boxes", "box"]),
        ("bus", "three buses", ["buses"]),
        ("knife", "knives and a knife", ["knives", "knife"]),
        ("berry", "berries", ["berries"]),
        ("person", "four people", ["people"]),
        ("hot dog", "a hot  dog and two hot dogs; a dog", ["hot  dog", "hot dogs"]),
        ("HELLO WORLD", 'a sign saying "Hello World"', ["Hello World"]),
        ('"HELLO WORLD"', 'a sign saying "HELLO WORLD"', ["HELLO WORLD"]),
        ("stop!", "a sign: STOP! and stopping", ["STOP!"]),
        ("7", "the numbers 7 and 77", ["7"]),
        ("c++ (old)", "written in C++ (old)", ["C++ (old)"]),
        ("unicorn", "a cat", []),
        ('""', "a cat", []),
        ("  ", "a cat", []),
    ],
)
def test_a_phrase_is_found_where_the_prompt_says_it(phrase, text, found):
    assert [text[start:end] for start, end in find_phrase(phrase, text)] == found


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("A photo of a red cat and two dogs.", ("red", "cat", "two", "dogs")),
        ('A sign saying "The End", in red', ("sign", "The End", "red")),
        ("a cat beside a CAT", ("cat",)),
        ("a well-worn shoe", ("well-worn", "shoe")),
        ("the and of", ()),
        ("", ()),
        ("...", ()),
        ("the dog's bowl with 'No Dogs' on it", ("dog's", "bowl", "No Dogs")),
    ],
)
def test_what_a_prompt_is_about(text, phrases):
    assert content_phrases(text) == phrases


@pytest.mark.parametrize(
    ("phrase", "text", "found"),
    [
        # Scripts without spaces have no boundary of words.
        ("猫", "一只黑色的猫坐在桌子上", ["猫"]),
        ("黑色 的猫", "一只黑色的猫", ["黑色的猫"]),
        ("ネコ", "赤いネコと犬", ["ネコ"]),
        ("ﾈｺ", "赤いネコと犬", ["ネコ"]),  # half width
        ("แมว", "แมวสีดำ", ["แมว"]),
        ("7", "7匹の猫と77", ["7"]),
        ("cat", "黑いcatとcategory", ["cat"]),
        # A cluster of letter and marks is not cut.
        ("ส", "สีดำ", []),
        ("क", "किताब क", ["क"]),
        ("x", "x̂ and x", ["x"]),
        ("हिन्दी", "एक हिन्दी किताब", ["हिन्दी"]),
        # Korean writes its particles onto the word, and other nouns begin alike.
        ("개", "개가 개구리를 본다", ["개"]),
        ("고양이", "빨간 고양이들이 있다", ["고양이"]),
        # Composed and decomposed, curly and straight, wide and plain, visible and not.
        ("caf\u00e9", "a cafe\u0301 by night", ["cafe\u0301"]),
        ("cafe\u0301", "a caf\u00e9 by night", ["caf\u00e9"]),
        ("cafe", "a cafe\u0301", []),
        ("the cat's hat", "The Cat\u2019s\u00a0Hat", ["The Cat\u2019s\u00a0Hat"]),
        ("cat\u2019s", "a cat's tail", ["cat's"]),
        ("\u201cOPEN\u201d", "a sign: Open", ["Open"]),
        ("\uff21\uff22\uff23", "the letters ABC", ["ABC"]),
        ("well-worn", "a well\u2011worn shoe", ["well\u2011worn"]),
        ("grand opening", "Gr\u00adand\u200b Open\u200ding now", ["Gr\u00adand\u200b Open\u200ding"]),
        ("stra\u00dfe", "STRASSE 7", ["STRASSE"]),
        ("wait...", "wait\u2026 what", ["wait\u2026"]),
        # No piece of a word matches elsewhere.
        ("t", "don't write a T", ["T"]),
        ("s", "the cat\u2019s letter S", ["S"]),
        ("ve", "na\u0131\u0308ve", []),
        ("avion", "l\u2019avion rouge", ["avion"]),
        ("\u200b", "a\u200bcat", []),
    ],
)  # fmt: skip
def test_a_phrase_is_found_in_every_script_and_spelling(phrase, text, found):
    assert [text[start:end] for start, end in find_phrase(phrase, text)] == found


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_the_unicode_form_of_phrase_and_prompt_does_not_matter(form):
    prompt = "un \u00e9l\u00e9phant, \u1ec7 \u0e01\u0e33 \uac01 \u304c"
    for phrase in ("\u00c9l\u00e9phant", "\u1ec7", "\u0e01\u0e33", "\uac01", "\u304c"):
        assert len(find_phrase(phrase, unicodedata.normalize(form, prompt))) == 1
        assert len(find_phrase(unicodedata.normalize(form, phrase), prompt)) == 1


def test_a_found_place_says_the_phrase_again():
    """A law over every word of prompts in several scripts, typed as decomposed as Unicode allows."""
    prompts = (
        "a na\u00efve caf\u00e9\u2019s \u201cgrand\u2026 opening\u201d",
        "\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u0451\u0436",
        "\u0e41\u0e21\u0e27 \u0e2a\u0e35",
    )
    for prompt in prompts:
        text = unicodedata.normalize("NFD", prompt)
        for word in prompt.split():
            (place,) = find_phrase(word, text)
            assert find_phrase(text[slice(*place)], word)


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("it's a cat and they don't care", ("cat", "care")),
        ("It\u2019s what we can\u2019t see, I'm sure you'd, they've, we'll", ("see", "sure")),
        ("it\u00b4s a cat, let's see what's there; 'tis the dog\u02bcs", ("cat", "see", "dog\u02bcs")),
        ("o'clock and rock 'n' roll", ("o'clock", "rock", "n", "roll")),
        ("a na\u00efve cafe\u0301", ("na\u00efve", "cafe\u0301")),
        ("caf\u00e9 and cafe\u0301", ("caf\u00e9",)),
        ("\u090f\u0915 \u0939\u093f\u0928\u094d\u0926\u0940", ("\u090f\u0915", "\u0939\u093f\u0928\u094d\u0926\u0940")),
        ('a \\"GRAND OPENING\\" sign', ("GRAND OPENING", "sign")),
        ('a 18" pizza, "HOT"', ("18", "pizza", "HOT")),
        ("\u00abLe Chat\u00bb, \u201eDer Hund\u201c", ("Le Chat", "Der Hund")),
        ("\u200b \u00a0", ()),
    ],
)  # fmt: skip
def test_contractions_quotes_and_marks_of_what_a_prompt_is_about(text, phrases):
    assert content_phrases(text) == phrases


def test_every_content_phrase_is_found_in_its_own_prompt():
    prompt = (
        "The na\u0131\u0308ve cat\u2019s \u201cGrand\u00a0Opening\u201d at the cafe\u0301, 18\u2033 wide, "
        "\u732b\u3068\u72ac, it\u2019s fine\u2026"
    )
    phrases = content_phrases(prompt)
    assert len(phrases) == 8
    assert all(find_phrase(phrase, prompt) for phrase in phrases)
