"""People as the judges (§4.3.3): a blind ranking sheet, and what the filled-in ones say."""

import base64
import hashlib
import html
import itertools
import json
import shutil
import string
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.program import write_json
from evaluation.score import sign_test
from vidreason import VidReasonError, split_span

SHEET = Path(__file__).with_name("sheet.html")


def human_sheet(questions, answers, out, seed=0, count=200, embed=50e6):
    """§4.3.3: a blind ranking sheet, out/index.html, of `count` random questions; out/key.json tells who is who.

    questions: [{"id", "question", "video": path}]; answers: {model: {id: text}}. Clips of more than `embed` bytes
    together lie beside the page. Annotators get the page (and clips/), never the key.
    """
    out, random = Path(out), np.random.default_rng(seed)
    known = [q for q in questions if all(q["id"] in found for found in answers.values())]
    if not known or not 2 <= len(answers) <= 26:
        raise VidReasonError("no question that two models answer (--human_sheet): give result files of one benchmark")
    known = [known[i] for i in sorted(random.permutation(len(known))[:count])]
    beside = sum(Path(split_span(q["video"])[0]).stat().st_size for q in known) > embed
    (out / "clips" if beside else out).mkdir(parents=True, exist_ok=True)
    rows, key = [], {}
    for number, q in enumerate(tqdm(known, desc="sheet"), 1):
        file, name = split_span(q["video"])[0], f"q{number}"  # neither a file's name nor an id may tell anything
        clip, span = Path(file), str(q["video"])[len(file) :]  # browsers know spans, too
        if beside:
            source = f"clips/{name}{clip.suffix}"
            shutil.copyfile(clip, out / source)
        else:
            source = f"data:video/{clip.suffix[1:]};base64,{base64.b64encode(clip.read_bytes()).decode()}"
        shuffled = random.permutation(sorted(answers)).tolist()
        order = {string.ascii_uppercase[i]: model for i, model in enumerate(shuffled)}
        key[name] = {"id": q["id"], "models": order}
        ranks = "<option>" + "".join(f"<option>{r + 1}" for r in range(len(order)))
        lines = (
            f'<li><label>rank <select data-q="{name}" data-letter="{letter}">{ranks}</select></label>'
            f"<b>{letter}</b> {html.escape(answers[model][q['id']])}"
            for letter, model in order.items()
        )
        title = f'<h2>{number}. {html.escape(q["question"])}</h2><video controls src="{source}{span}"></video>'
        rows.append(f"<section>{title}<ul>{''.join(lines)}</ul></section>\n")
    digest = hashlib.sha256("".join(rows).encode()).hexdigest()[:16]
    write_json(out / "key.json", {"sheet": digest, "questions": key})
    page = SHEET.read_text("utf-8").replace("DIGEST", digest).replace("ROWS", "".join(rows))
    (out / "index.partial").write_text(page, encoding="utf-8")
    (out / "index.partial").rename(out / "index.html")


def read_rankings(key_file, filled):
    """Filled-in sheets → for each pair of models its win/tie/loss shares and sign test (§4.3.3).

    Of several annotators' rankings of a question the majority counts, so that one question is one trial.
    """
    try:
        key = json.loads(Path(key_file).read_text())
        names = {q: found["models"] for q, found in key["questions"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VidReasonError(f"not a sheet's key: {error!r} ({key_file}): give the folder of --human_sheet") from error
    votes = defaultdict(list)  # (question, model, other): +1 won, 0 tied, -1 lost, one for each annotator
    for path in filled:
        try:
            sheet = json.loads(Path(path).read_text())
            if sheet["sheet"] != key["sheet"]:
                raise VidReasonError(f"ranks of another sheet ({path}): give the key.json that was made with it")
            for q, given in sheet["ranks"].items():
                for (a, above), (b, below) in itertools.combinations(sorted((names[q][x], given[x]) for x in given), 2):
                    votes[q, a, b].append(int(np.sign(below - above)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise VidReasonError(f"not a filled-in sheet: {error!r} ({path}): download it from the page") from error
    table = defaultdict(Counter)
    for (_, a, b), found in votes.items():
        table[a, b][int(np.sign(sum(found)))] += 1
    found = []
    for (a, b), won in sorted(table.items()):
        shares = {name: round(won[sign] / won.total(), 4) for name, sign in (("win", 1), ("tie", 0), ("loss", -1))}
        found.append({"model": a, "against": b, **shares, "p": sign_test(won[1], won[-1]), "n": won.total()})
    return found
