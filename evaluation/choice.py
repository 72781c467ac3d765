"""Reading a multiple-choice reply: which option do these words choose?"""

import re
from dataclasses import dataclass
from typing import Any

CUE = re.compile(
    r"""\\boxed|<answer>|["']answer["']\s*:|\b(?P<final>final\s+)?(?:answer|option|choice)\b[*_"'\s]*(?:,\s*\w+,\s*)?"""
    r"(?:is|are|(?:would|must|should)\s+be|[:=])",
    re.IGNORECASE,
)
FILLER = re.compile(r"(?:[\W_]|\b(?:text|math\w\w|boxed|most|likely|option|choice|answer|letter)\b)*", re.IGNORECASE)
LETTER = re.compile(r"([A-Za-z])(?![^\W_]|['’]\w|\.\w\.)")  # not the A of "Answer", "A's" or "a.m."
LABEL = re.compile(r"^[^\w\n]*([A-Za-z])(?:\s*[-–—:.)\]*]+\s|[^\w\n]*$)", re.MULTILINE)  # a line "B", "(B)", "B: left"
SENTENCE = re.compile(r"[.!?](?:\s|$)|\n")
CONCLUSION = re.compile(r"\b(?:therefore|thus|hence|in conclusion)\b", re.IGNORECASE)
NEGATION = re.compile(r" (?:not|never|no|nor|neither|t)(?: \w+){0,2} $")  # t: of "isn't"
REFUSAL = re.compile(r"\b(?:cannot|can't|unable|impossible|not possible|insufficient|not enough)\b|\$LETTER", re.I)


@dataclass(frozen=True)
class Claim:
    """What the words behind a cue claim to be the answer; option None: none of the options, or several of them."""

    option: int | None


def plain_words(text: Any) -> str:
    """Lower case, no punctuation, one space between words and at either end, so that a search finds whole words."""
    return " " + " ".join(re.findall(r"[^\W_]+", str(text).casefold())) + " "


def mentions(text: str, options: list) -> list[int]:
    """Indices of the options that `text` says and does not negate; of equal options the first."""
    text = plain_words(text)
    mentioned = []
    different = dict.fromkeys(plain_words(option) for option in options)
    for wanted in sorted(different, key=len, reverse=True):
        pieces = text.split(wanted)
        if wanted.strip() and not all(NEGATION.search(piece + " ") for piece in pieces[:-1]):
            mentioned += first_of_each(options, wanted)
        text = " | ".join(pieces)  # taken out, longest first: "not moving" does not say "moving"
    return mentioned


def first_of_each(options: list, wanted: str) -> list[int]:
    """Indices of the options of these plain words: several where only punctuation tells options apart, 1 and -1."""
    index_of_text = {}
    for i in reversed(range(len(options))):
        if plain_words(options[i]) == wanted:
            index_of_text[str(options[i]).strip()] = i  # of equal options the first stays
    return list(index_of_text.values())


def opening_option(tail: str, options: list) -> int | None:
    """The option whose words `tail` begins with; of several the longest."""
    tail = plain_words(tail)
    opening = None
    for i, option in enumerate(options):
        wanted = plain_words(option)
        longer = opening is None or len(wanted) > len(plain_words(options[opening]))
        if wanted.strip() and tail.startswith(wanted) and longer:
            opening = i
    return opening


def other_letters(rest: str) -> list[str]:
    """The letters that are named beside a first one: "or C", "/ C", or alone on the next line."""
    others = re.findall(r"(?:\b(?:or|and)|[,/&])\W*(?:option\s+)?([A-Z])\b(?!['’])", rest.split("\n")[0])
    return others + re.findall(r"^\W*\n\W*([A-Z])\W*$", rest)


def contradicts(rest: str, option: Any, options: list) -> bool:
    """Whether the words behind a letter are another option's: "A: left" where A is "right"."""
    label = SENTENCE.split(rest.lstrip(" .:)*$"))[0]
    mentioned = mentions(label, options)
    if len(mentioned) != 1:
        return False
    named = plain_words(options[mentioned[0]])
    is_label = len(label.split()) <= len(named.split()) + 2  # a whole sentence about something else is an explanation
    return named != plain_words(option) and is_label


def claimed(tail: str, options: list) -> Claim | None:
    """Which option the `tail` behind a cue names; None: it claims nothing."""
    tail = tail[FILLER.match(tail).end() :]
    rest = tail[1:]
    letter = LETTER.match(tail)
    opening = opening_option(tail, options)
    if opening is not None and (not letter or len(plain_words(options[opening])) > 3):
        return Claim(opening)

    is_article = letter and letter[1] in "AIai" and re.match(r"\s+(?!(?:because|since|as|or|and|is)\b)\w", rest)
    if not letter or is_article:  # "A man ..." starts with no letter
        mentioned = mentions(SENTENCE.split(tail)[0], options)
        return Claim(mentioned[0]) if len(mentioned) == 1 else None

    capital = letter[1].upper()
    index = ord(capital) - ord("A")
    if index >= len(options) or set(other_letters(rest)) - {capital}:  # "A or C"
        return Claim(None)
    if contradicts(rest, options[index], options):
        return Claim(None)
    return Claim(index)


def extract_choice(reply: str, options: list) -> int | None:
    """The option that a model's reply chooses -> its index, or None: unparsable, which counts as wrong.

    An explicit final answer, the last one; else a letter that stands alone; else the only option that is mentioned, be
    it in the conclusion. `options` come without their letters. Held against VLM4D's verdicts, which are an LLM's,
    cross-checked by hand.
    """
    reply = re.sub(r"<think>.*?(?:</think>|$)", "", reply, flags=re.DOTALL)
    cues = list(CUE.finditer(reply))
    for cue in reversed(cues[-20:]):
        claim = claimed(reply[cue.end() :][:2000], options)
        if claim:
            return claim.option
        if cue["final"]:
            return None

    labels = list(LABEL.finditer(reply))
    if labels:
        if len({label[1] for label in labels}) > 1:  # the reply repeats the list of options
            return None
        claim = claimed(reply[labels[-1].start() :][:2000], options)
        return claim.option if claim else None

    mentioned = mentions(reply, options)
    if len(mentioned) != 1 and CONCLUSION.search(reply):  # the reasoning weighs several, the conclusion may name one
        mentioned = mentions(CONCLUSION.split(reply)[-1], options)
    if len(mentioned) != 1 or REFUSAL.search(reply):
        return None
    return mentioned[0]


def yes_or_no(reply: str | int) -> bool | None:
    """per_option's two options -> bool; None: unparsed"""
    index = extract_choice(reply, ["yes", "no"]) if isinstance(reply, str) else reply
    return None if index is None else index == 0
