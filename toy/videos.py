"""The toy world on disk: clips as mp4 with their captions, questions and texts.

    python -m toy.world --clips 20 --seed 7 --out /tmp/world      # mp4 clips + samples.jsonl

Three that write a world, each from the parts below it: `main` writes a few clips to look at, `make_training_world` what
stages 1 and 2 learn from, and `make_videos` a whole split, for stage 0 with arrays of its frames and masks. A split is

    NAME.mp4         16 frames, named after its split, seed and index
    captions.jsonl   a line per video: what stage 1 learns to say
    samples.jsonl    a line per question, with its answer and the events that it rests on
    text.jsonl       texts about stories without a video (`write_text`; training only)
    frames.npy, owner.npy    for stage 0 only

Every file is written aside and renamed, so that it is whole or not there, and the same arguments give the same bytes.
"""

import argparse
import fcntl
import json
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from tqdm import tqdm

from toy import draw, language, world
from toy.world import Clip

MP4_BYTES = 57_000  # of one video, on average


def main():
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(index, False) for index in range(args.clips)]
    jobs += [(index, True) for index in range(args.held_out)]
    with written_aside(args.out / "samples.jsonl") as samples:
        for index, held_out in tqdm(jobs, desc="clips"):
            clip = world.make_clip(args.seed, index, args.split, held_out, cut=True if held_out else None)
            if args.titles:
                name = f"{title(clip)}-{index}"
            else:
                name = sample_id(args.split, args.seed, index, held_out)
            if args.gif:
                draw.write_gif(args.out / f"{name}.gif", draw.render(clip)[0])
            write_lines(samples, write_clip(clip, name, args.out))
    print(f"{len(jobs)} clips and their questions: {args.out}")


def parse_arguments() -> argparse.Namespace:
    command = __doc__.partition("\n\nThree")[0]
    parser = argparse.ArgumentParser(description=command, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--clips", type=int, default=20, help="how many clips to make (default 20)")
    add("--seed", type=int, default=0, help="which stream of clips; the same seed makes the same clips")
    add("--split", choices=["train", "val", "test"], default="train", help="disjoint streams (default train)")
    held_out = "N more clips, of the kind pairs that no training video shows"
    add("--held_out", type=int, default=0, metavar="N", help=held_out)
    add("--titles", action="store_true", help="name files after what happens in them instead of by number")
    add("--gif", action="store_true", help="write each clip as an animated picture too")
    add("--out", type=Path, required=True, help="folder for the mp4 files and samples.jsonl")
    return parser.parse_args()


# --------------------------------------------------------------------------- what stages 1 and 2 learn from


def make_training_world(folder: Path, count: int, processes: int):
    """What stages 1 and 2 need of the training split's first `count` videos, unless it is there; no arrays.

    They are the first videos of any larger world, byte for byte. VidReasonError: it cannot be written.
    """
    from vidreason import VidReasonError  # takes seconds, and the command above does without

    if videos_in(folder) >= count:
        return
    try:
        with alone_in(folder):
            if videos_in(folder) < count:  # another process may have made it meanwhile
                write_text(folder / "text.jsonl", 0, max(1, count // 2))
                make_videos(folder, "train", 0, count, processes, arrays=False)
    except OSError as error:
        room = count * MP4_BYTES / 1e6
        raise VidReasonError(
            f"cannot write the toy world: {error.strerror} ({folder}): it takes {room:.1f} MB; make room there, or "
            "give your own --data"
        ) from error


def videos_in(folder: Path) -> int:
    """How many videos of a split are ready: the lines of captions.jsonl."""
    path = folder / "captions.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@contextmanager
def alone_in(folder: Path):
    """One process at a time writes a world; what a killed one left half-written is cleared away."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system opens it when the process ends, however it ends
        for leftover in folder.glob("*.part*"):
            leftover.unlink()
        yield


# --------------------------------------------------------------------------- a split of videos


class VideoJob(NamedTuple):
    """What a worker needs to know to make one video."""

    split: str
    seed: int
    index: int
    folder: Path
    arrays: bool


def make_videos(folder: Path, split: str, seed: int, count: int, processes: int, arrays: bool = True):
    """In `folder`: mp4 files, samples.jsonl (questions), captions.jsonl, and with `arrays` frames.npy and owner.npy.

    frames (count, 16, 3, 96, 96) and owner (count, 16, 96, 96), both uint8, are for stage 0 only. Every file is whole
    or not there, and captions.jsonl comes last. Without arrays, mp4 files that are there are kept, so that a killed
    run goes on and a small world can grow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = ["samples.jsonl", "captions.jsonl"]
    if arrays:
        names = ["frames.npy", "owner.npy", *names]
        videos, side = (count, world.NUM_FRAMES), (world.SIZE, world.SIZE)
        frames = np.lib.format.open_memmap(folder / "frames.npy.part", "w+", np.uint8, (*videos, 3, *side))
        owner = np.lib.format.open_memmap(folder / "owner.npy.part", "w+", np.uint8, (*videos, *side))

    jobs = [VideoJob(split, seed, index, folder, arrays) for index in range(count)]
    with (
        workers(min(processes, count)) as pool,
        open(folder / "samples.jsonl.part", "w") as samples,
        open(folder / "captions.jsonl.part", "w") as captions,
    ):
        made = pool.map(make_video, jobs, chunksize=8)
        for index, video in enumerate(tqdm(made, total=count, desc=f"{split} videos")):
            write_lines(captions, [video.caption])
            write_lines(samples, video.questions)
            if arrays:
                frames[index] = video.frames
                owner[index] = video.owner

    for name in names:
        (folder / f"{name}.part").rename(folder / name)


@contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that work side by side; an error or Ctrl-C here ends them without waiting for jobs not begun."""
    pool = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("forkserver"),  # a fork of a process with threads may hang
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is for the one that waits for them
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class Video(NamedTuple):
    """The records of one video and, for stage 0, its pixels as decoded and whose they are."""

    caption: dict
    questions: list[dict]
    frames: np.ndarray | None = None  # (16, 3, 96, 96) uint8
    owner: np.ndarray | None = None  # (16, 96, 96) uint8


def make_video(job: VideoJob) -> Video:
    """Write one video of a split as mp4."""
    clip = world.make_clip(job.seed, job.index, job.split)
    name = sample_id(job.split, job.seed, job.index)
    try:
        questions = write_clip(clip, name, job.folder, keep=not job.arrays)
    except OSError as error:  # PyAV's own kinds of it do not travel between processes
        raise OSError(error.errno, error.strerror, str(job.folder)) from None
    caption = {"id": name, "video": f"{name}.mp4", "caption": language.caption(clip)}
    if not job.arrays:
        return Video(caption, questions)

    from vidreason import PRESETS, read_video

    toy = PRESETS["toy"]
    path = job.folder / f"{name}.mp4"
    frames, _, _ = read_video(path, toy.num_clips, toy.frames_per_clip, toy.image_size)
    _, owner = draw.render(clip)
    return Video(caption, questions, frames.flatten(0, 1).numpy(), owner)


def arrays_of(folder: Path) -> list[np.ndarray]:
    """-> what make_videos left for stage 0: frames (n, 16, 3, 96, 96) and owner (n, 16, 96, 96), uint8, on disk"""
    from vidreason import VidReasonError

    try:
        return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("frames", "owner")]
    except OSError as error:
        raise VidReasonError(
            f"no arrays for stage 0 ({error.filename}): run `python -m toy.pretrain world`; a world that train.py "
            "made for itself has none"
        ) from error


# --------------------------------------------------------------------------- one clip


def sample_id(split: str, seed: int, index: int, held_out: bool = False) -> str:
    name = f"{split}-{seed}-{index:05d}"
    return f"{name}-held-out" if held_out else name


def title(clip: Clip) -> str:
    """A file name that a person can tell apart: what is about to meet, or what became of the last thing affected."""
    if clip.next_hit:
        mover = clip.things[clip.next_hit.subject]
        target = clip.things[clip.next_hit.object]
        words = f"{mover.name} nears {target.name}"
    else:
        last = [event for event in clip.visible if event.type in world.EFFECTS or event.type == "start"][-1]
        words = f"{clip.things[last.subject].name} {language.PRESENT[last.type]}"
    return words.replace(" ", "-")


def write_clip(clip: Clip, name: str, folder: Path, keep: bool = False) -> list[dict]:
    """Write one mp4 and return its records, one per question. keep: an mp4 of that name is this one."""
    path = folder / f"{name}.mp4"
    if not keep or not path.exists():
        frames, _ = draw.render(clip)
        draw.write_mp4(path, frames)
    things = [thing.name for thing in clip.things]
    events = [known_fields(event) for event in clip.visible]
    records = []
    for number, question in enumerate(language.questions(clip)):
        where = {"id": f"{name}-{number}", "video": f"{name}.mp4"}
        records.append({**where, **question, "things": things, "events": events})
    return records


def known_fields(event: world.Event) -> dict:
    return {field: value for field, value in vars(event).items() if value is not None}


# --------------------------------------------------------------------------- texts without a video


def write_text(path: Path, seed: int, count: int):
    """Text-only records for stage 2: what the LLM already knows, so that adapting to video does not overwrite it.

    A third are world knowledge, two thirds are questions about stories, half of these about pairs that no video shows.
    """
    rng = np.random.default_rng((seed, 11))
    with written_aside(path) as texts:
        for index in tqdm(range(count), desc="texts"):
            if index % 3 == 0:
                record = knowledge_record(rng)
            else:
                record = story_record(seed, index, rng, held_out=index % 3 == 1)
            write_lines(texts, [{"id": f"text-{index}", **record}])


def knowledge_record(rng: np.random.Generator) -> dict:
    """A question about what happens when two kinds meet, with its answer."""
    sentence = ""
    while "|" not in sentence:
        mover, target = language.HITS[rng.integers(len(language.HITS))]
        sentence = language.knowledge(mover, target, rng)
    question, answer = sentence.split("|")
    return {"question": question, "answer": answer}


def story_record(seed: int, index: int, rng: np.random.Generator, held_out: bool) -> dict:
    """A story, a question about it and the answer; held_out: what comes of a pair that no video shows."""
    clip = world.make_clip(seed, index, "text", held_out, cut=True if held_out else None)
    asked = language.questions(clip, rng)
    if held_out:
        (question,) = [question for question in asked if question["type"] == "held-out"]
    else:
        question = asked[rng.integers(len(asked))]
    story = language.caption(clip, list(rng.permutation(len(clip.things))))
    return {"context": story, "question": question["question"], "answer": question["answer"]}


# --------------------------------------------------------------------------- files


@contextmanager
def written_aside(path: Path) -> Iterator[IO[str]]:
    """A text file to write to, which takes its name when all is written."""
    aside = path.with_name(f"{path.name}.part")
    with open(aside, "w") as file:
        yield file
    aside.rename(path)


def write_lines(file: IO[str], records: list[dict]):
    file.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    main()
