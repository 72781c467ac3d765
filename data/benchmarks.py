"""The benchmarks: how each stores its questions and replies, and what its table has for rows.

One dataset is one block below: its readers, then `register(Benchmark(...))`. data/README.md has the recipe for another.
"""

import json
import re
import zlib
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from data.records import (
    Place,
    ReadFile,
    Sample,
    as_paths,
    csv_table,
    index_of,
    jsonl_lines,
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

PROMPTS = {  # protocol -> how a question with options is put when the model is to write its choice
    "direct": "{question}\n{options}\nAnswer with the letter of the right option and nothing else.",
    "cot": "{question}\n{options}\nThink step by step. End with the line: Therefore, the final answer is: LETTER",
}


# --------------------------------------------------------------------------- what a benchmark is


def by_category(sample: Sample) -> tuple[str, ...]:
    """The rows of the table that a sample counts in, where the benchmark's own table has a row per category."""
    return (sample.category or "other",)


def film_of(video: str | None) -> str:
    """The whole film, not the span of it that a question is about."""
    return split_span(video)[0]


def own_id(sample: Sample) -> str:
    """The question alone: it belongs together with no other."""
    return sample.id


def exact(said: Any, sample: Sample) -> bool:
    """Whether an open answer is right: word for word, as ActivityNet-QA's eval.py has it."""
    return said in (sample.answer, *sample.also_right)


def no_remark(row: dict) -> str:
    """Nothing stands below a row of the table."""
    return ""


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Pairs (where, row) of a result file that is one JSON value: a list, or an object whose members are the rows."""
    rows = load(path)
    return numbered(rows.items() if isinstance(rows, dict) else rows)


PairsOf = Callable[[Any, Path], Iterable[tuple[str, Any]]]


@dataclass(frozen=True)
class Benchmark:
    """All that is particular to one dataset; what a block leaves out is as most datasets have it."""

    name: str  # on the command line
    about: str  # a line: what it is, and whose files are read
    read_file: ReadFile = read_records  # an annotation file and its Place -> Samples
    groups: Callable[[Sample], tuple[str, ...]] = by_category  # the rows of the table that a sample counts in

    # what counts as right, and how it is counted
    same: Callable[[Any, Sample], bool] = exact  # whether an open answer is right
    resampled: Callable[[str | None], str] = film_of  # a video -> what intervals resample as a whole
    line_of: Callable[[Sample], str] = own_id  # questions of one line: --limit takes all of them or none
    whole_lines: str = ""  # the row, and headline, that counts lines of which every question is right
    measures_words: bool = True  # BLEU and its like beside open answers
    wups: bool = False  # NExT-OE's score of open answers
    wups_equal: tuple[str, ...] = ()  # the categories for which it wants equal lemmas

    # replies of other systems
    formats: dict[str, PairsOf] = field(default_factory=dict)  # --format -> a row of such a file -> (sample id, reply)
    reply_rows: Callable[[Path], Iterable[tuple[str, Any]]] = json_rows  # such a file -> (where, row)
    replies_hold_questions: bool = False  # read_file reads them: how the questions were put then

    # replies of our model
    prompts: dict[str, str] = field(default_factory=lambda: PROMPTS)  # protocol -> the words around options
    exam: Callable | None = None  # for a set that makes its videos: (options, model, folder) -> summary, items
    add_options: Callable[[ArgumentParser], None] | None = None  # its command line; None: --annotations and the rest
    note: str = ""  # what readers of the table must know
    remark: Callable[[dict], str] = no_remark  # a row of the table -> a line below it; "": none

    def read(self, paths: str | Path | Iterable[str | Path], videos: str | Path = ".") -> list[Sample]:
        """Samples of one annotation file or several, their ids distinct."""
        return read_files(self.read_file, paths, videos)


BENCHMARKS: dict[str, Benchmark] = {}  # name -> block


def register(benchmark: Benchmark) -> Benchmark:
    """Make a benchmark known to train.py (--data NAME:FILE) and evaluate.py."""
    BENCHMARKS[benchmark.name] = benchmark
    return benchmark


# --------------------------------------------------------------------------- training's way in


def read_samples(spec: str | Path, videos: str | Path = ".") -> list[Sample]:
    """Training's way in: FILE (.jsonl, .csv or .tar of records), or BENCHMARK:FILE for one of BENCHMARKS.

    Either may end in @WEIGHT. `videos` is the folder that video names are relative to. A question with a truth per
    option is asked option by option. VidReasonError names file and line (or record) of what cannot be used.
    """
    path, weight = split_weight(spec)
    benchmark = RECORDS
    name, colon, rest = path.partition(":")
    if colon and name in BENCHMARKS:
        benchmark, path = BENCHMARKS[name], rest
    samples = benchmark.read(path, videos)
    if benchmark is not RECORDS:  # records name a video as it lies
        samples = locate(samples, videos)

    questions = []
    for sample in samples:
        questions += per_option(sample)
    if weight != 1:
        questions = [replace(question, weight=weight) for question in questions]
    return questions


def split_weight(spec: str | Path) -> tuple[str, float]:
    """'nextqa:train.csv@2.5' -> ('nextqa:train.csv', 2.5): an epoch shows each of its videos 2.5 times."""
    match = re.fullmatch(r"(.+)@(\d*\.?\d+)", str(spec))  # not "*", which shells take for a pattern
    if not match:
        return str(spec), 1.0
    path, weight = match[1], float(match[2])
    if not weight:
        raise VidReasonError(f"weight 0 ({spec}): leave the file out instead")
    return path, weight


# --------------------------------------------------------------------------- another system's replies


def owners_of_formats() -> dict[str, Benchmark]:
    """All that --format may name -> the benchmark that has it. Replies to any may be stored in the format of any."""
    owners = {}
    for benchmark in BENCHMARKS.values():
        owners |= dict.fromkeys(benchmark.formats, benchmark)
    return owners


def read_predictions(paths: str | Path | Iterable[str | Path], format: str) -> dict[str, Any]:
    """Another system's replies as its result files hold them -> {sample id: index, text, or a word per option}.

    Golds and verdicts in those files are not read; NExT-QA's eval_mc.py and VLM4D's statistics believe them.
    """
    owner = owners_of_formats()[format]
    pairs_of = owner.formats[format]
    predictions = {}
    for path in as_paths(paths):
        place = Place([path])
        with naming(path, place):
            for row in place(owner.reply_rows(path)):
                for name, reply in pairs_of(row, path):
                    if name in predictions:
                        raise ValueError(f"{name} is answered twice")
                    predictions[name] = reply
    return predictions


def as_asked(benchmark: Benchmark, samples: list[Sample], reply_files: Iterable) -> tuple[list[Sample], list[str]]:
    """Questions may have been reworded after a system had answered them; then its result files tell how they were put.

    -> the samples as the result files have them where they do, and the ids of those that differ.
    """
    asked = {sample.id: sample for sample in benchmark.read(reply_files)}
    reworded, changed = [], []
    for sample in samples:
        then = replace(asked.get(sample.id, sample), video=sample.video)
        reworded.append(then)
        if then != sample:
            changed.append(sample.id)
    return reworded, changed


# --------------------------------------------------------------------------- NExT-QA


def nextqa_fields(row: dict, folders: dict[str, str]) -> dict:
    """What both of its versions have; qid counts within a video."""
    video, qid = text(row["video"]), text(row["qid"])
    file = f"NExTVideo/{folders[video]}.mp4" if folders else f"{video}.mp4"
    return {"id": f"{video}_{qid}", "video": file, "question": text(row["question"]), "category": text(row["type"])}


def nextqa_groups(sample: Sample) -> tuple[str, ...]:
    """Its own table counts TP (what came before) as TN, and has C, T and D above the types."""
    kind = "TN" if sample.category == "TP" else sample.category
    return kind, sample.category[0]


def read_nextqa(path: Path, place: Place) -> Iterator[Sample]:
    """`answer` counts a0 ... a4 from zero."""
    folders = load_beside(path, "map_vid_vidorID.json")
    for row in place(csv_table(path)):
        options = [row[f"a{i}"] for i in range(5)]
        yield Sample(**nextqa_fields(row, folders), **multiple_choice(options, int(row["answer"])))


def nextqa_pairs(row: tuple[str, dict], path: Path) -> Iterator[tuple[str, Any]]:
    """{"<video>_<qid>": {"prediction": index}}"""
    name, reply = row
    yield name, reply["prediction"]


register(Benchmark(
    name="nextqa",
    about="NExT-QA, multiple choice (doc-doc/NExT-QA, dataset/nextqa/*.csv): `answer` counts a0 … a4 from zero.",
    read_file=read_nextqa,
    groups=nextqa_groups,
    formats={"nextqa": nextqa_pairs},
))  # fmt: skip


def read_nextqa_oe(path: Path, place: Place) -> Iterator[Sample]:
    """Half the test set has a second right answer, in a file beside it."""
    folders = load_beside(path, "map_vid_vidorID.json")
    second_answers = load_beside(path, f"add_reference_answer_{path.stem}.json")
    for row in place(csv_table(path)):
        second = second_answers.get(row["video"], {}).get(row["qid"])
        also_right = (text(second),) if second else ()
        yield Sample(**nextqa_fields(row, folders), answer=text(row["answer"]), also_right=also_right)


def nextqa_oe_pairs(row: tuple[str, dict], path: Path) -> Iterator[tuple[str, Any]]:
    """{video: {qid: text}}"""
    video, replies = row
    for qid, reply in replies.items():
        yield f"{video}_{qid}", reply


register(Benchmark(
    name="nextqa-oe",
    about="NExT-QA, open-ended (doc-doc/NExT-OE, dataset/nextqa/*.csv); half the test set has a second right answer.",
    read_file=read_nextqa_oe,
    groups=nextqa_groups,
    formats={"nextqa-oe": nextqa_oe_pairs},
    wups=True,
    wups_equal=("DB", "DC"),  # yes or no, counts
))  # fmt: skip


def read_nextgqa(path: Path, place: Place) -> Iterator[Sample]:
    """As NExT-QA's file, but `answer` is the right option's text. When it is seen (gsub_*.json) is not asked for."""
    folders = load_beside(path, "map_vid_vidorID.json")
    for row in place(csv_table(path)):
        row["video"] = row["video_id"]
        options = [text(row[f"a{i}"]) for i in range(5)]
        chosen = multiple_choice(options, index_of(text(row["answer"]), options))
        yield Sample(**nextqa_fields(row, folders), **chosen)


register(Benchmark(
    name="nextgqa",
    about="NExT-GQA, its multiple choice (doc-doc/NExT-GQA, datasets/nextgqa/*.csv): `answer` is an option's text.",
    read_file=read_nextgqa,
    groups=nextqa_groups,
    formats={"nextgqa": nextqa_pairs},
))  # fmt: skip


# --------------------------------------------------------------------------- ActivityNet-QA

ACTIVITYNET_TYPES = "motion,spatial relation,temporal relation,yes/no,color,object,location,number,other".split(",")


def read_activitynetqa(path: Path, place: Place) -> Iterator[Sample]:
    """Questions (*_q.json) are joined by id with the answers (*_a.json) beside them or also given.

    Files have ActivityNet's v_ before an id that may itself begin with v_.
    """
    questions = load(path)
    if "question" not in questions[0]:
        return  # answers: the file of their questions reads them
    beside = path.with_name(path.name.replace("_q.", "_a."))
    answers = {}
    for other in {*place.paths, beside} - {path}:
        if other.exists():
            answers |= {row["question_id"]: row for row in load(other) if "answer" in row}

    for row in place(numbered(questions)):
        name, video = row["question_id"], f"v_{row['video_name']}.mp4"
        if name not in answers:
            raise ValueError(f"no answer to {name} in {beside.name} or another file that was given")
        kind = ACTIVITYNET_TYPES[range(9).index(answers[name]["type"])]
        yield Sample(name, video, text(row["question"]), text(answers[name]["answer"]), category=kind)


def activitynetqa_groups(sample: Sample) -> tuple[str, ...]:
    """Its own table has a row Free: all types but the first three."""
    free = sample.category in ACTIVITYNET_TYPES[3:]
    return (sample.category, "free") if free else (sample.category,)


def activitynetqa_pairs(row: dict, path: Path) -> Iterator[tuple[str, Any]]:
    """[{"question_id", "answer"}]"""
    yield row["question_id"], row["answer"]


register(Benchmark(
    name="activitynetqa",
    about="ActivityNet-QA (MILVLG/activitynet-qa, dataset/*_q.json), joined by id with the *_a.json beside it or also "
    "given.",
    read_file=read_activitynetqa,
    groups=activitynetqa_groups,
    formats={"activitynetqa": activitynetqa_pairs},
))  # fmt: skip


# --------------------------------------------------------------------------- CLEVRER


def read_clevrer(path: Path, place: Place) -> Iterator[Sample]:
    """The host's list of scenes, or CLEVRER-Humans' {scene: questions}."""
    scenes = load(path)
    if isinstance(scenes, dict):
        scenes = [{"scene_index": int(number), **scene} for number, scene in scenes.items()]
    for scene in place(numbered(scenes)):
        number = scene["scene_index"]
        thousand = number // 1000 * 1000
        file = scene.get("video_filename") or f"video_{number:05d}.mp4"
        video = f"video_{thousand:05d}-{thousand + 1000:05d}/{file}"
        questions = ((f"scene {number}, question {i}", row) for i, row in enumerate(scene["questions"]))
        for row in place(questions):
            yield clevrer_sample(f"{number}_{row['question_id']}", video, row)


def clevrer_sample(name: str, video: str, row: dict) -> Sample:
    """A descriptive question has one word as answer; of any other's options none, some or all are right."""
    question, kind = text(row["question"]), row["question_type"]
    if kind == "descriptive" or not row["choices"]:
        return Sample(name, video, question, text(row["answer"]), category=kind)

    options, truths = [], []
    for choice in sorted(row["choices"], key=lambda choice: choice["choice_id"]):
        options.append(text(choice["choice"]))
        truths.append({"correct": True, "wrong": False}[choice["answer"]])
    right = [option for option, truth in zip(options, truths, strict=True) if truth]
    answer = " and ".join(right) or "none of them"
    return Sample(name, video, question, answer, options, category=kind, option_truths=tuple(truths))


def clevrer_groups(sample: Sample) -> tuple[str, ...]:
    """Beside each type, all questions with options together."""
    return (sample.category, "multiple choice") if sample.options else (sample.category,)


def clevrer_pairs(scene: dict, path: Path) -> Iterator[tuple[str, Any]]:
    """What CLEVRER's executor/get_results.py writes: choices as a list of "correct" and "wrong", in their order."""
    for question in scene["questions"]:
        reply = question.get("answer")
        words = {choice["choice_id"]: choice["answer"] for choice in question.get("choices", ())}
        if words:
            reply = [words.get(i) for i in range(max(words) + 1)]
        yield f"{scene['scene_index']}_{question['question_id']}", reply


register(Benchmark(
    name="clevrer",
    about="CLEVRER (the host's train.json and validation.json; CLEVRER-Humans' {scene: questions}).",
    read_file=read_clevrer,
    groups=clevrer_groups,
    formats={"clevrer": clevrer_pairs},
))  # fmt: skip


# --------------------------------------------------------------------------- VCR


def vcr_text(tokens: list, objects: list[str]) -> str:
    """Tags are lists of places in `objects`, from zero; they read person1, car4: counted from one, as in *_orig."""
    words = []
    for token in tokens:
        if isinstance(token, list):
            kinds = [objects[i] if i < len(objects) else "person" for i in token]  # some tags exceed it
            token = " and ".join(f"{kind}{i + 1}" for kind, i in zip(kinds, token, strict=True))
        words.append(token)
    return re.sub(r" (?=[.,?!;:]|'\w|n't\b)", "", " ".join(words))


def read_vcr(path: Path, place: Place) -> Iterator[Sample]:
    """A line is two questions, Q->A and, with its gold answer said, QA->R. Q->AR is no question of its own."""
    for line in place(jsonl_lines(path)):
        row = json.loads(line)
        say = partial(vcr_text, objects=row["objects"])
        question, video = say(row["question"]), f"vcr1images/{row['img_fn']}"
        for mode, kind in (("Q->A", "answer"), ("QA->R", "rationale")):
            chosen = multiple_choice(map(say, row[f"{kind}_choices"]), row[f"{kind}_label"])
            yield Sample(f"{row['annot_id']}/{mode}", video, question, category=mode, **chosen)
            question += f" {chosen['answer']}"


def vcr_line(sample: Sample) -> str:
    """The line of the file that a question is of."""
    return sample.id.rpartition("/")[0]


register(Benchmark(
    name="vcr",
    about="VCR (rowanz/r2c, dataloaders/vcr.py): a line is two questions, Q->A and, with its gold answer said, QA->R.",
    read_file=read_vcr,
    line_of=vcr_line,
    whole_lines="Q->AR",
))  # fmt: skip


# --------------------------------------------------------------------------- Test of Time

TOT_QUESTION = "In which order do the two events of the video happen?"


def read_tot(path: Path, place: Place) -> Iterator[Sample]:
    """The relation is in the id.

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
        options = [f" {relation} ".join(events[::-1])]
        options.insert(gold, f" {relation} ".join(events))
        chosen = multiple_choice(options, gold)
        yield Sample(name, f"videos/{name}.mp4", TOT_QUESTION, category=relation, **chosen)


register(Benchmark(
    name="tot",
    about="Test of Time's synthetic pairs (bpiyush/TestOfTime, package/datasets/synthetic.py); the relation is in the "
    "id.",
    read_file=read_tot,
))  # fmt: skip


# --------------------------------------------------------------------------- VLM4D


def vlm4d_half(row: dict, path: Path) -> str:
    """Ids count from 1 in each half of VLM4D, so that "real" or "synthetic" must become part of them."""
    match = re.search(r"videos_(real|synthetic)/", row.get("video") or "")
    match = match or re.search(r"(real|synthetic)_mc", f"{path.parent.name}/{path.name}")
    if not match:
        raise ValueError("neither its video nor the file's name (real_mc…, synthetic_mc…) says which half it is of")
    return match[1]


def vlm4d_category(half: str, id: str, gold: str) -> str:
    """Those of its acc_final_statistics.py."""
    if half == "synthetic":
        return "synthetic FP" if f"{gold.lower()} ".startswith("no ") else "synthetic directional"
    number = int(id.rpartition("_")[2])
    return "real ego-centric" if number > 922 else "real exo-centric"


def read_vlm4d(path: Path, place: Place) -> Iterator[Sample]:
    """`answer` is an option's text or number; a result file has it as `ground_truth_answer`."""
    for row in place(numbered(load(path))):
        gold = text(row["answer"] if "answer" in row else row["ground_truth_answer"])
        half = vlm4d_half(row, path)
        options = [text(row["choices"][letter]) for letter in sorted(row["choices"])]
        kind = vlm4d_category(half, row["id"], gold)
        video = row["video"].rpartition("/main/")[2] if row.get("video") else None  # stored as a download address
        chosen = multiple_choice(options, index_of(gold, options))
        yield Sample(f"{half}_{row['id']}", video, text(row["question"]), category=kind, **chosen)


def vlm4d_groups(sample: Sample) -> tuple[str, ...]:
    """The halves above their categories."""
    half = sample.category.split()[0]
    return sample.category, half


def vlm4d_pairs(row: dict, path: Path) -> Iterator[tuple[str, Any]]:
    """[{"id", "response", ...}]: the reply as the system gave it."""
    yield f"{vlm4d_half(row, path)}_{row['id']}", row["response"]


def vlm4d_judged_pairs(row: dict, path: Path) -> Iterator[tuple[str, Any]]:
    """What VLM4D's judge took from a reply, "B: left": the letter alone if its words are no option's (it rewords)."""
    letter, _, words = row["extracted_answer"].partition(": ")
    options = [str(option) for option in row["choices"].values()]
    reply = row["extracted_answer"] if words in options else letter
    yield f"{vlm4d_half(row, path)}_{row['id']}", reply


register(Benchmark(
    name="vlm4d",
    about="VLM4D (ShijieZhou-UCLA/VLM4D, data/*_mc.json; its result files, too): `answer` is an option's text or "
    "number.",
    read_file=read_vlm4d,
    groups=vlm4d_groups,
    formats={"vlm4d": vlm4d_pairs, "vlm4d-judged": vlm4d_judged_pairs},
    replies_hold_questions=True,
))  # fmt: skip


# --------------------------------------------------------------------------- Video-Holmes


def read_video_holmes(path: Path, place: Place) -> Iterator[Sample]:
    """Question ids may start again with each film."""
    for row in place(numbered(load(path))):
        name, video = f"{row['video ID']}_{row['Question ID']}", f"{row['video ID']}.mp4"
        letters = sorted(row["Options"])
        options = [row["Options"][letter] for letter in letters]
        chosen = multiple_choice(options, index_of(row["Answer"].strip(), letters))
        yield Sample(name, video, text(row["Question"]), category=row["Question Type"], **chosen)


def video_holmes_pairs(row: dict, path: Path) -> Iterator[tuple[str, Any]]:
    """[{"video ID", "Question ID", "Predicr Answer"}], sic"""
    yield f"{row['video ID']}_{row['Question ID']}", row["Predicr Answer"]


register(Benchmark(
    name="video-holmes",
    about="Video-Holmes (TencentARC/Video-Holmes, *_Video-Holmes.json); question ids may start again with each film.",
    read_file=read_video_holmes,
    formats={"video-holmes": video_holmes_pairs},
))  # fmt: skip


# --------------------------------------------------------------------------- any other set, in our own layout


def record_pairs(line: str, path: Path) -> Iterator[tuple[str, Any]]:
    """{"id", "prediction"}: an option's index from zero, a reply in words, or for CLEVRER a list of words."""
    row = json.loads(line)
    yield str(row["id"]), row["prediction"]


RECORDS = register(Benchmark(
    name="jsonl",
    about="Our own layout (see data/records.py); WebVid's .csv and .tar shards become it.",
    formats={"jsonl": record_pairs},
    reply_rows=jsonl_lines,
))  # fmt: skip
