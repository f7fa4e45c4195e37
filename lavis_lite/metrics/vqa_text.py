"""How answers are cleaned before they are compared: the rules of the official VQA evaluation (visualqa.org)."""

from __future__ import annotations

import re

NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = frozenset({"a", "an", "the"})
# Periods and commas have rules of their own besides; apostrophes, colons and the like stay.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Each is written back where one of its apostrophes is missing. Words that mean something else without it ("well",
# "its", "hell") are not among them.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_WITHOUT_ONE = {
    word[: match.start()] + word[match.end() :]: word
    for word in CONTRACTIONS.split()
    for match in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the official table has this one the other way round
_GROUPED_DIGITS = re.compile(r"\d,\d")
# The end of a sentence; a decimal's point has a digit behind it.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # so many and no more: the official script passes a flag where a count belongs


def normalise(answer: str) -> str:
    """An answer as it is compared: lower case, without articles and punctuation, numbers as digits, contractions with
    their apostrophes: "The Two dogs, weren't" -> "2 dogs weren't", "1,000" -> "1000", "3.5." -> "3.5".
    """
    return without_articles(without_punctuation(one_line(answer)))


def one_line(answer: str) -> str:
    """Line breaks and tabs as blanks, none of them at the ends."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(answer: str) -> str:
    """Punctuation goes, or becomes a blank where it stands between two words; periods go, but for decimal points.

    In an answer with a number such as 1,000 all of it goes.
    """
    joined = _GROUPED_DIGITS.search(answer) is not None
    text = answer
    for mark in PUNCTUATION:
        apart = mark + " " in answer or " " + mark in answer
        text = text.replace(mark, "" if apart or joined else " ")
    return _PERIOD.sub("", text, count=_MOST_PERIODS)


def without_articles(answer: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes where contractions lack one."""
    words = (NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(_WITHOUT_ONE.get(word, word) for word in words if word not in ARTICLES)
