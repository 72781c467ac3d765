"""People as the judges (§4.3.3): a blind ranking sheet, and what the filled-in ones say."""

import base64
import hashlib
import html
import itertools
import json
import shutil
import string
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.program import write_json
from evaluation.score import sign_test
from vidreason import VidReasonError, split_span, write_aside

SHEET = Path(__file__).with_name("sheet.html")


def human_sheet(
    questions: list[dict],
    answers: dict[str, dict[str, str]],
    out: str | Path,
    seed: int = 0,
    count: int = 200,
    embed: float = 50e6,
):
    """§4.3.3: a blind ranking sheet, out/index.html, of `count` random questions; out/key.json tells who is who.

    questions: [{"id", "question", "video": path}]; answers: {model: {id: text}}. Clips of more than `embed` bytes
    together lie beside the page. Annotators get the page (and clips/), never the key.
    """
    out, random = Path(out), np.random.default_rng(seed)
    chosen = chosen_questions(questions, answers, random, count)
    bytes_together = sum(Path(split_span(question["video"])[0]).stat().st_size for question in chosen)
    beside = bytes_together > embed
    (out / "clips" if beside else out).mkdir(parents=True, exist_ok=True)

    sections, key = [], {}
    for number, question in enumerate(tqdm(chosen, desc="sheet"), 1):
        name = f"q{number}"  # neither a file's name nor an id may tell anything
        source = clip_source(question["video"], name, out, beside)
        shuffled = random.permutation(sorted(answers)).tolist()
        models = dict(zip(string.ascii_uppercase, shuffled, strict=False))  # as many letters as there are models
        key[name] = {"id": question["id"], "models": models}
        texts = {letter: answers[model][question["id"]] for letter, model in models.items()}
        sections.append(section(number, name, question["question"], source, texts))

    digest = hashlib.sha256("".join(sections).encode()).hexdigest()[:16]
    write_json(out / "key.json", {"sheet": digest, "questions": key})
    page = SHEET.read_text("utf-8").replace("DIGEST", digest).replace("ROWS", "".join(sections))
    write_aside(out / "index.html", lambda aside: aside.write_text(page, encoding="utf-8"))


def chosen_questions(questions: list[dict], answers: dict, random: np.random.Generator, count: int) -> list[dict]:
    """`count` random ones of the questions that every model answers, in their order."""
    known = []
    for question in questions:
        if all(question["id"] in of_model for of_model in answers.values()):
            known.append(question)
    if not known or not 2 <= len(answers) <= 26:
        raise VidReasonError("no question that two models answer (--human_sheet): give result files of one benchmark")
    drawn = random.permutation(len(known))[:count]
    return [known[i] for i in sorted(drawn)]


def clip_source(video: str | Path, name: str, out: Path, beside: bool) -> str:
    """What the page shows: a copy of the clip in out/clips, or the clip itself in base64; browsers know spans, too."""
    file = split_span(video)[0]
    span = str(video)[len(file) :]
    clip = Path(file)
    if beside:
        source = f"clips/{name}{clip.suffix}"
        shutil.copyfile(clip, out / source)
    else:
        source = f"data:video/{clip.suffix[1:]};base64,{base64.b64encode(clip.read_bytes()).decode()}"
    return source + span


def section(number: int, name: str, question: str, source: str, texts: dict[str, str]) -> str:
    """The page's part about one question; texts: {letter: answer}."""
    ranks = "<option>" + "".join(f"<option>{rank}" for rank in range(1, len(texts) + 1))
    lines = []
    for letter, answer in texts.items():
        choose = f'<label>rank <select data-q="{name}" data-letter="{letter}">{ranks}</select></label>'
        lines.append(f"<li>{choose}<b>{letter}</b> {html.escape(answer)}")
    title = f'<h2>{number}. {html.escape(question)}</h2><video controls src="{source}"></video>'
    return f"<section>{title}<ul>{''.join(lines)}</ul></section>\n"


# --------------------------------------------------------------------------- what people said

WRONG_LAYOUT = (ValueError, KeyError, TypeError, AttributeError)


def read_rankings(key_file: str | Path, filled: list[str | Path]) -> list[dict]:
    """Filled-in sheets -> for each pair of models its win/tie/loss shares and sign test (§4.3.3).

    Of several annotators' rankings of a question the majority counts, so that one question is one trial.
    """
    try:
        key = json.loads(Path(key_file).read_text())
        models_of = {name: question["models"] for name, question in key["questions"].items()}
    except WRONG_LAYOUT as error:
        raise VidReasonError(f"not a sheet's key: {error!r} ({key_file}): give the folder of --human_sheet") from error

    votes = defaultdict(list)  # (question, model, other): +1 won, 0 tied, -1 lost, one for each annotator
    for path in filled:
        try:
            sheet = json.loads(Path(path).read_text())
            if sheet["sheet"] != key["sheet"]:
                raise VidReasonError(f"ranks of another sheet ({path}): give the key.json that was made with it")
            for pair, sign in votes_of(sheet["ranks"], models_of):
                votes[pair].append(sign)
        except WRONG_LAYOUT as error:
            raise VidReasonError(f"not a filled-in sheet: {error!r} ({path}): download it from the page") from error

    table = defaultdict(Counter)
    for (_, model, other), signs in votes.items():
        majority = int(np.sign(sum(signs)))
        table[model, other][majority] += 1
    return [shares_of(model, other, table[model, other]) for model, other in sorted(table)]


def votes_of(ranks: dict, models_of: dict) -> Iterator[tuple[tuple[str, str, str], int]]:
    """One annotator's ranks, {question: {letter: rank}} -> ((question, model, other), who stands above)."""
    for question, rank_of_letter in ranks.items():
        ranked = sorted((models_of[question][letter], rank) for letter, rank in rank_of_letter.items())
        for (model, above), (other, below) in itertools.combinations(ranked, 2):
            yield (question, model, other), int(np.sign(below - above))


def shares_of(model: str, other: str, trials: Counter) -> dict:
    """trials: +1 won, 0 tied, -1 lost -> how many."""
    shares = {}
    for name, sign in (("win", 1), ("tie", 0), ("loss", -1)):
        shares[name] = round(trials[sign] / trials.total(), 4)
    p = sign_test(trials[1], trials[-1])
    return {"model": model, "against": other, **shares, "p": p, "n": trials.total()}
