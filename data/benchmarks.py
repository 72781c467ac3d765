"""The benchmarks: how each stores its questions and replies, and what its table has for rows."""

import json
import re
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

from data.records import (
    Place,
    Sample,
    csv_table,
    index_of,
    jsonl_rows,
    load,
    load_beside,
    locate,
    multiple_choice,
    naming,
    numbered,
    per_option,
    read_files,
    read_records,
    text,
)
from vidreason import VidReasonError, split_span

ACTIVITYNET_TYPES = "motion,spatial relation,temporal relation,yes/no,color,object,location,number,other".split(",")
TOT_QUESTION = "In which order do the two events of the video happen?"


def read_samples(spec, videos=".") -> list[Sample]:
    """Training's way in: FILE (.jsonl, .csv or .tar of records), or BENCHMARK:FILE for one of READERS.

    Either may end in @WEIGHT. `videos` is the folder that video names are relative to. A question with a truth per
    option is asked option by option. VidReasonError names file and line (or record) of what cannot be used.
    """
    spec, weight = split_weight(spec)
    name, colon, path = spec.partition(":")
    if not colon or name not in READERS:
        name, path = "jsonl", spec
    samples = READERS[name](path, videos)
    samples = samples if name == "jsonl" else locate(samples, videos)
    samples = [one for s in samples for one in (per_option(s) if s.options and s.truths else [s])]
    return [replace(s, weight=weight) for s in samples] if weight != 1 else samples


def split_weight(spec):
    """'nextqa:train.csv@2.5' → ('nextqa:train.csv', 2.5): an epoch shows each of its videos 2.5 times."""
    found = re.fullmatch(r"(.+)@(\d*\.?\d+)", str(spec))  # not "*", which shells take for a pattern
    if found and not float(found[2]):
        raise VidReasonError(f"weight 0 ({spec}): leave the file out instead")
    return (found[1], float(found[2])) if found else (str(spec), 1.0)


def nextqa_fields(row, folders):
    video, qid = text(row["video"]), text(row["qid"])  # qid counts within a video
    file = f"NExTVideo/{folders[video]}.mp4" if folders else f"{video}.mp4"
    return {"id": f"{video}_{qid}", "video": file, "question": text(row["question"]), "category": text(row["type"])}


def read_nextqa(path, place):
    """NExT-QA, multiple choice (doc-doc/NExT-QA, dataset/nextqa/*.csv): `answer` counts a0 … a4 from zero."""
    folders = load_beside(path, "map_vid_vidorID.json")
    for row in place(csv_table(path)):
        chosen = multiple_choice([row[f"a{i}"] for i in range(5)], int(row["answer"]))
        yield Sample(**nextqa_fields(row, folders), **chosen)


def read_nextqa_oe(path, place):
    """NExT-QA, open-ended (doc-doc/NExT-OE, dataset/nextqa/*.csv); half the test set has a second right answer."""
    folders, more = (load_beside(path, f) for f in ("map_vid_vidorID.json", f"add_reference_answer_{path.stem}.json"))
    for row in place(csv_table(path)):
        second = more.get(row["video"], {}).get(row["qid"])
        truths = (text(second),) if second else ()
        yield Sample(**nextqa_fields(row, folders), answer=text(row["answer"]), truths=truths)


def read_activitynetqa(path, place):
    """ActivityNet-QA (MILVLG/activitynet-qa, dataset/*_q.json), joined by id with the *_a.json beside it or also given.

    Files have ActivityNet's v_ before an id that may itself begin with v_.
    """
    rows, answers, beside = load(path), {}, path.with_name(path.name.replace("_q.", "_a."))
    if "question" not in rows[0]:
        return  # answers: the file of their questions reads them
    for other in {p for p in (*place.paths, beside) if p.exists()} - {path}:
        answers.update({row["question_id"]: row for row in load(other) if "answer" in row})
    for row in place(numbered(rows)):
        name, video = row["question_id"], f"v_{row['video_name']}.mp4"
        if name not in answers:
            raise ValueError(f"no answer to {name} in {beside.name} or another file that was given")
        kind = ACTIVITYNET_TYPES[range(9).index(answers[name]["type"])]
        yield Sample(name, video, text(row["question"]), text(answers[name]["answer"]), category=kind)


def read_clevrer(path, place):
    """CLEVRER (the host's train.json and validation.json; CLEVRER-Humans' {scene: questions}).

    A descriptive question has one word as answer; of any other's options none, some or all are right.
    """
    scenes = load(path)
    if isinstance(scenes, dict):
        scenes = [{"scene_index": int(scene), **found} for scene, found in scenes.items()]
    for scene in place(numbered(scenes)):
        n = scene["scene_index"]
        folder, file = n // 1000 * 1000, scene.get("video_filename") or f"video_{n:05d}.mp4"
        for q in place((f"scene {n}, question {i}", q) for i, q in enumerate(scene["questions"])):
            name, video = f"{n}_{q['question_id']}", f"video_{folder:05d}-{folder + 1000:05d}/{file}"
            sample = Sample(name, video, text(q["question"]), "", category=q["question_type"])
            if sample.category != "descriptive":
                choices = sorted(q["choices"], key=lambda choice: choice["choice_id"])
                sample.options = [text(choice["choice"]) for choice in choices]
                sample.truths = tuple({"correct": True, "wrong": False}[choice["answer"]] for choice in choices)
                right = (o for o, truth in zip(sample.options, sample.truths, strict=True) if truth)
            sample.answer = " and ".join(right) or "none of them" if sample.options else text(q["answer"])
            yield sample


def vcr_text(tokens, objects):
    """Tags are lists of places in `objects`, from zero; they read person1, car4: counted from one, as in *_orig."""
    kinds = dict(enumerate(objects))  # some tags exceed it
    words = (t if isinstance(t, str) else " and ".join(f"{kinds.get(i, 'person')}{i + 1}" for i in t) for t in tokens)
    return re.sub(r" (?=[.,?!;:]|'\w|n't\b)", "", " ".join(words))


def read_vcr(path, place):
    """VCR (rowanz/r2c, dataloaders/vcr.py): a line is two questions, Q->A and, with its gold answer said, QA->R.

    Q->AR is no question: evaluate.py counts the lines of which both are right.
    """
    for row in map(json.loads, place(jsonl_rows(path))):
        say, video = partial(vcr_text, objects=row["objects"]), f"vcr1images/{row['img_fn']}"
        question = say(row["question"])
        for mode, kind in (("Q->A", "answer"), ("QA->R", "rationale")):
            chosen = multiple_choice(map(say, row[f"{kind}_choices"]), row[f"{kind}_label"])
            yield Sample(f"{row['annot_id']}/{mode}", video, question, category=mode, **chosen)
            question += f" {chosen['answer']}"


def read_tot(path, place):
    """Test of Time's synthetic pairs (bpiyush/TestOfTime, package/datasets/synthetic.py); the relation is in the id.

    The benchmark compares sim(video, sentence) with that of the sentence with its events swapped; to choose one of
    the two sentences is our own version for language models.
    """
    for row in place(csv_table(path)):
        name = text(row["video_id"])
        relation = "before" if "before" in name else "after"
        events = text(row["sentence"]).lower().split(f" {relation} ")
        if len(events) != 2:
            raise ValueError(f"{row['sentence']!r} is not two events with {relation!r} between them")
        gold = zlib.crc32(name.encode()) % 2  # not always the first
        chosen = multiple_choice([f" {relation} ".join(events[:: 1 if i == gold else -1]) for i in range(2)], gold)
        yield Sample(name, f"videos/{name}.mp4", TOT_QUESTION, category=relation, **chosen)


def vlm4d_half(row, path):
    """Ids count from 1 in each half of VLM4D, so that "real" or "synthetic" must become part of them."""
    found = re.search(r"videos_(real|synthetic)/", row.get("video") or "")
    found = found or re.search(r"(real|synthetic)_mc", f"{path.parent.name}/{path.name}")
    if not found:
        raise ValueError("neither its video nor the file's name (real_mc…, synthetic_mc…) says which half it is of")
    return found[1]


def read_vlm4d(path, place):
    """VLM4D (ShijieZhou-UCLA/VLM4D, data/*_mc.json; its result files, too): `answer` is an option's text or number.

    Categories are those of its acc_final_statistics.py.
    """
    for row in place(numbered(load(path))):
        gold, half = text(row["answer"] if "answer" in row else row["ground_truth_answer"]), vlm4d_half(row, path)
        options = [text(row["choices"][letter]) for letter in sorted(row["choices"])]
        kind = "FP" if f"{gold.lower()} ".startswith("no ") else "directional"
        if half == "real":
            kind = "ego-centric" if int(row["id"].rpartition("_")[2]) > 922 else "exo-centric"
        video = row["video"].rpartition("/main/")[2] if row.get("video") else None  # stored as a download address
        chosen = multiple_choice(options, index_of(gold, options))
        yield Sample(f"{half}_{row['id']}", video, text(row["question"]), category=f"{half} {kind}", **chosen)


def read_video_holmes(path, place):
    """Video-Holmes (TencentARC/Video-Holmes, *_Video-Holmes.json); question ids may start again with each film."""
    for row in place(numbered(load(path))):
        letters, name = sorted(row["Options"]), f"{row['video ID']}_{row['Question ID']}"
        chosen = multiple_choice([row["Options"][k] for k in letters], index_of(row["Answer"].strip(), letters))
        yield Sample(name, f"{row['video ID']}.mp4", text(row["Question"]), category=row["Question Type"], **chosen)


READERS = {  # name → read(path or paths, videos=".") -> list[Sample]
    name: partial(read_files, samples_of)
    for name, samples_of in {
        "jsonl": read_records,
        "nextqa": read_nextqa,
        "nextqa-oe": read_nextqa_oe,
        "activitynetqa": read_activitynetqa,
        "clevrer": read_clevrer,
        "vcr": read_vcr,
        "tot": read_tot,
        "vlm4d": read_vlm4d,
        "video-holmes": read_video_holmes,
    }.items()
}
GROUPS = {  # what a question counts in, as the benchmarks' own tables have it
    "nextqa": lambda s: ("TN" if s.category == "TP" else s.category, s.category[0]),
    "activitynetqa": lambda s: (s.category, *["free"] * (s.category in ACTIVITYNET_TYPES[3:])),
    "clevrer": lambda s: (s.category, *["multiple choice"] * bool(s.options)),
    "vlm4d": lambda s: (s.category, s.category.split()[0]),
}
GROUPS["nextqa-oe"] = GROUPS["nextqa"]


def groups_of(benchmark, sample):
    return GROUPS.get(benchmark, lambda s: (s.category or "other",))(sample)


def film_of(video):
    """What intervals resample: the whole film, not the span of it that a question is about."""
    return split_span(video)[0]


def jsonl_prediction(row, path):
    """Ours: {"id", "prediction"}: an option's index from zero, a reply in words, or for CLEVRER a list of words."""
    row = json.loads(row)
    return [(str(row["id"]), row["prediction"])]


def clevrer_prediction(scene, path):
    """What CLEVRER's executor/get_results.py writes: choices as a list of "correct" and "wrong", in their order."""
    for q in scene["questions"]:
        said = {choice["choice_id"]: choice["answer"] for choice in q.get("choices", ())}
        said = [said.get(i) for i in range(max(said) + 1)] if said else q.get("answer")
        yield f"{scene['scene_index']}_{q['question_id']}", said


def vlm4d_judged_prediction(row, path):
    """What VLM4D's judge took from a reply, "B: left": the letter alone if its words are no option's (it rewords)."""
    letter, _, words = row["extracted_answer"].partition(": ")
    said = row["extracted_answer"] if words in map(str, row["choices"].values()) else letter
    return [(f"{vlm4d_half(row, path)}_{row['id']}", said)]


FORMATS = {  # how a result file stores replies: a row, or a member of an object → pairs of id and prediction
    "nextqa": lambda row, path: [(row[0], row[1]["prediction"])],
    "nextqa-oe": lambda row, path: [(f"{row[0]}_{qid}", said) for qid, said in row[1].items()],
    "activitynetqa": lambda row, path: [(row["question_id"], row["answer"])],
    "clevrer": clevrer_prediction,
    "vlm4d": lambda row, path: [(f"{vlm4d_half(row, path)}_{row['id']}", row["response"])],
    "vlm4d-judged": vlm4d_judged_prediction,
    "video-holmes": lambda row, path: [(f"{row['video ID']}_{row['Question ID']}", row["Predicr Answer"])],  # sic
    "jsonl": jsonl_prediction,
}


def read_predictions(paths, format):
    """Another system's replies as its result files hold them → {sample id: index, text, or a word per option}.

    Golds and verdicts in those files are not read; NExT-QA's eval_mc.py and VLM4D's statistics believe them.
    """
    predictions = {}
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        place = Place([path])
        with naming(path, place):
            found = jsonl_rows(path) if format == "jsonl" else load(path)
            found = found if format == "jsonl" else numbered(found.items() if isinstance(found, dict) else found)
            for name, said in (pair for row in place(found) for pair in FORMATS[format](row, path)):
                if name in predictions:
                    raise ValueError(f"{name} is answered twice")
                predictions[name] = said
    return predictions


def as_asked(samples, paths):
    """VLM4D reworded questions after some systems had answered them. → the samples as its result files have them
    where they do, and the ids of those that differ."""
    asked = {s.id: s for s in READERS["vlm4d"](paths)}
    found = [replace(asked.get(s.id, s), video=s.video) for s in samples]
    return found, [new.id for new, old in zip(found, samples, strict=True) if new != old]


PROMPTS = {  # how a question with options is put when the model is to write its choice
    "direct": "{question}\n{options}\nAnswer with the letter of the right option and nothing else.",
    "cot": "{question}\n{options}\nThink step by step. End with the line: Therefore, the final answer is: LETTER",
}
