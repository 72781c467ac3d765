"""Reading a multiple-choice reply: which option do these words choose?"""

import re

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


def words(text):
    """Lower case, no punctuation, one space between words and at either end, so that a search finds whole words."""
    return " " + " ".join(re.findall(r"[^\W_]+", str(text).casefold())) + " "


def mentions(text, options):
    """Indices of the options that `text` says and does not negate; of equal options the first."""
    text, found = words(text), []
    for said in sorted({words(o) for o in options}, key=len, reverse=True):  # "not moving" does not say "moving"
        pieces = text.split(said)
        if said.strip() and not all(NEGATION.search(p + " ") for p in pieces[:-1]):
            same = {str(o).strip(): i for i, o in reversed([*enumerate(options)]) if words(o) == said}
            found += same.values()  # more than one where only punctuation tells options apart: 1 and -1
        text = " | ".join(pieces)
    return found


def claimed(tail, options):
    """Which option the `tail` behind a cue names: its index, -1 for none of them or several, None for no claim."""
    tail = tail[FILLER.match(tail).end() :]
    opening = [i for i, o in enumerate(options) if words(o).strip() and words(tail).startswith(words(o))]
    opening = max(opening, key=lambda i: (len(words(options[i])), -i), default=None)
    letter, rest = LETTER.match(tail), tail[1:]
    if opening is not None and (not letter or len(words(options[opening])) > 3):
        return opening
    if not letter or letter[1] in "AIai" and re.match(r"\s+(?!(?:because|since|as|or|and|is)\b)\w", rest):
        found = mentions(SENTENCE.split(tail)[0], options)  # "A man …" starts with no letter
        return found[0] if len(found) == 1 else None
    index = ord(letter[1].upper()) - ord("A")
    others = re.findall(r"(?:\b(?:or|and)|[,/&])\W*(?:option\s+)?([A-Z])\b(?!['’])", rest.split("\n")[0])
    others += re.findall(r"^\W*\n\W*([A-Z])\W*$", rest)
    if index >= len(options) or set(others) - {letter[1].upper()}:
        return -1  # "A or C"
    said = SENTENCE.split(rest.lstrip(" .:)*$"))[0]
    named = mentions(said, options)
    if len(named) == 1 and words(options[named[0]]) != words(options[index]):
        if len(said.split()) <= len(words(options[named[0]]).split()) + 2:
            return -1  # "A: left" where A is "right"; a whole sentence about something else is an explanation
    return index


def extract_choice(reply, options):
    """The option that a model's reply chooses → its index, or None: unparsable, which counts as wrong.

    An explicit final answer, the last one; else a letter that stands alone; else the only option that is mentioned, be
    it in the conclusion. `options` come without their letters. Held against VLM4D's verdicts, which are an LLM's,
    cross-checked by hand.
    """
    reply = re.sub(r"<think>.*?(?:</think>|$)", "", reply, flags=re.DOTALL)
    for cue in reversed([*CUE.finditer(reply)][-20:]):
        choice = claimed(reply[cue.end() :][:2000], options)
        if choice is not None or cue["final"]:
            return None if choice == -1 else choice
    labels = [*LABEL.finditer(reply)]
    if labels:  # several: the reply repeats the list of options
        choice = claimed(reply[labels[-1].start() :][:2000], options) if len({m[1] for m in labels}) == 1 else None
        return None if choice == -1 else choice
    found = mentions(reply, options)
    if len(found) != 1:  # the reasoning weighs several, the conclusion may name one
        found = mentions(CONCLUSION.split(reply)[-1], options) if CONCLUSION.search(reply) else []
    return found[0] if len(found) == 1 and not REFUSAL.search(reply) else None


def yes_or_no(said):
    """per_option's two options → bool; None: unparsed"""
    index = extract_choice(said, ["yes", "no"]) if isinstance(said, str) else said
    return None if index is None else index == 0
