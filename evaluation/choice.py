"""Reading a multiple-choice reply: which option do these words choose?"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

CUE = re.compile(
    r"""\\boxed|<answer>|<\|begin_of_box\|>|["'](?:answer|choice|option)["']\s*:|"""
    r"""\b(?P<final>final\s+)?(?:answer|option|choice)\b[*_"'\s]*(?:,\s*\w+,\s*)?"""
    r"(?:is|are|(?:would|must|should)\s+be|[:=])|"
    r"\b(?:réponse|respuesta|resposta|risposta|antwort|antwoord|ответ|odpowiedź|cevap)\b[*_\s]*(?:est|es|é|è|ist|is|[:—=-])|"
    r"(?:答案|答え|正解|정답|답)(?:应该|應該)?(?:是|为|為|は|은|는)?\s*:?|(?:选择|選擇|选|選)(?!项|項|擇|择)\s*:?",
    re.IGNORECASE,
)
FILLER = re.compile(r"(?:[\W_]|\b(?:text|math\w\w|boxed|most|likely|option|choice|answer|letter)\b)*", re.IGNORECASE)
LATIN = r"[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # letters and digits of scripts that part words by blanks
LETTER = re.compile(rf"([A-Za-z])(?!{LATIN}|['’]\w|\.\w\.)")  # not the A of "Answer", "A's" or "a.m."
LABEL = re.compile(  # a line "B", "(B)", "B: left", "Option B: left"
    r"^[^\w\n]*(?:option\s+)?([A-Za-z])(?:\s*[-–—:.)\]*]+\s|[^\w\n]*$|\s*、)", re.MULTILINE | re.IGNORECASE
)
STATED = re.compile(  # said of a letter without a cue
    # "I'd go with C", "It must be C.", "Therefore B", "Probably (B)", "Answer B"
    r"\b(?:go(?:ing)?\s+with|choose|pick|select|it['’]s|it\s+is|(?:must|should|would|has\s+to)\s+be|one\s+is|answer|"
    r"therefore|thus|hence|so|definitely|certainly|clearly|probably|likely)[,:]?\s+"
    r"(?:the\s+)?(?:option|choice|answer|letter)?\s*[*(\"'\[]*([A-Z])[*)\"'\]]*\s*(?=[.,;!\n]|$)|"
    # "C is right."; "B, because he turns"
    r"\b(?:option\s+)?\(?([A-Z])\)?\s+is(?:\s+(?:the\s+)?(?:right|correct)(?:\s+\w+)?)?\s*(?=[.!]*\s*$)|"
    r"^\W*([A-Z]),?\s+(?:because|since)\b|"
    r"(?:选项|選項)\s*([A-Z])\s*是?(?:正确|正確|对|對)",
    re.IGNORECASE,
)
CORRECTION = re.compile(r"\bnot\s+[^.;:!?\n]{1,60}?,?\s+but\s+(?:rather\s+|instead\s+)?", re.IGNORECASE)
TAG = re.compile(r"<\|(?!begin_of_box)[^|<>]{1,40}\|>")
QUOTED = re.compile(r"""(?<![:=])(?<!\bis)(\s)(?:["“][^"”\n]*["”]|['‘](?:yes|no)['’])""", re.IGNORECASE)
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
    text = unicodedata.normalize("NFKC", str(text)).casefold()
    return " " + " ".join(re.findall(r"[^\W_]+", text)) + " "


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

    is_article = letter and letter[1] in "AIai" and re.match(r"[ \t]+(?!(?:because|since|as|or|and|is)\b)\w", rest)
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

    An explicit final answer, the last one; else a letter that stands alone; else one that is stated ("I'd go with C");
    else the only option that is mentioned, be it in the conclusion. A bare number under a key, {"choice": 2}, is an
    option's text or else its index from zero. `options` come without their letters. Held against VLM4D's verdicts,
    which are an LLM's, cross-checked by hand.
    """
    reply = tidy(reply, options)
    cues = list(CUE.finditer(reply))
    for cue in reversed(cues[-20:]):
        tail = reply[cue.end() :][:2000]
        claim = claimed(tail, options) or numbered(cue[0], tail, options)
        if claim:
            return claim.option
        if cue["final"]:
            return None

    labels = list(LABEL.finditer(reply))
    if labels:
        if len({label[1] for label in labels}) > 1:  # the reply repeats the list of options
            return None
        claim = claimed(reply[labels[-1].start(1) :][:2000], options)
        return claim.option if claim else None

    stated = stated_letter(reply, options)
    if stated is not None:
        return stated
    mentioned = mentions(reply, options)
    if len(mentioned) != 1 and CONCLUSION.search(reply):  # the reasoning weighs several, the conclusion may name one
        mentioned = mentions(CONCLUSION.split(reply)[-1], options)
    if len(mentioned) != 1 or REFUSAL.search(reply):
        return None
    return mentioned[0]


def tidy(reply: str, options: list) -> str:
    """A reply without its thoughts, a chat template's tags, and what it takes back ("not A but B" is "B")."""
    reply = unicodedata.normalize("NFKC", reply)
    reply = re.sub(r"<think>.*?(?:</think>|$)", "", reply, flags=re.DOTALL)
    reply = CORRECTION.sub("", TAG.sub(" ", reply))
    yes_and_no = {" yes ", " no "}
    if {plain_words(option) for option in options} == yes_and_no:
        reply = QUOTED.sub(r"\1", reply)  # what somebody in the video says
    return reply


def numbered(cue: str, tail: str, options: list) -> Claim | None:
    """{"choice": 2}: the index of an option, from zero."""
    number = re.match(r"\s*(\d{1,2})\s*[,}]", tail)
    if not number or cue[0] not in "\"'":
        return None
    index = int(number[1])
    return Claim(index if index < len(options) else None)


def stated_letter(reply: str, options: list) -> int | None:
    """The option whose letter is stated, the last one; what is denied is not stated."""
    for statement in reversed(list(STATED.finditer(reply))[-20:]):
        letter = statement[statement.lastindex]
        before = plain_words(SENTENCE.split(reply[: statement.start()])[-1])
        index = ord(letter.upper()) - ord("A")
        if letter.isupper() and index < len(options) and not NEGATION.search(before):
            return index
    return None


def yes_or_no(reply: str | int) -> bool | None:
    """per_option's two options -> bool; None: unparsed"""
    index = extract_choice(reply, ["yes", "no"]) if isinstance(reply, str) else reply
    return None if index is None else index == 0
