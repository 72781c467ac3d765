"""The toy world on disk: clips as mp4 with their captions, questions and texts.

    python -m toy.world --clips 20 --seed 7 --out /tmp/world      # mp4 clips + samples.jsonl
"""

import argparse
import fcntl
import json
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from toy import draw, language, world
from toy.world import Clip


def sample_id(split, seed, index, held_out=False) -> str:
    return f"{split}-{seed}-{index:05d}" + ("-held-out" if held_out else "")


def title(clip: Clip) -> str:
    """A file name that a person can tell apart: what is about to meet, or what became of the last thing affected."""
    if clip.next_hit:
        words = f"{clip.things[clip.next_hit.subject].name} nears {clip.things[clip.next_hit.object].name}"
    else:
        last = [e for e in clip.visible if e.type in world.EFFECTS or e.type == "start"][-1]
        words = f"{clip.things[last.subject].name} {language.PRESENT[last.type]}"
    return words.replace(" ", "-")


def write_clip(clip: Clip, name: str, folder: Path, keep: bool = False) -> list[dict]:
    """Write one mp4 and return its records, one per question. keep: an mp4 of that name is this one."""
    path = folder / f"{name}.mp4"
    if not (keep and path.exists()):
        draw.write_mp4(path, draw.render(clip)[0])
    log = [{k: v for k, v in vars(e).items() if v is not None} for e in clip.visible]
    things = [t.name for t in clip.things]
    return [
        {"id": f"{name}-{i}", "video": f"{name}.mp4", **q, "things": things, "events": log}
        for i, q in enumerate(language.questions(clip))
    ]


MP4_BYTES = 57_000  # of one video, on average


def make_video(job):
    """One video of a split as mp4 -> (its caption's record, its questions' records, its arrays for stage 0 or None)"""
    split, seed, index, folder, arrays = job
    clip, name = world.make_clip(seed, index, split), sample_id(split, seed, index)
    try:
        questions = write_clip(clip, name, folder, keep=not arrays)
    except OSError as error:  # PyAV's own kinds of it do not travel between processes
        raise OSError(error.errno, error.strerror, str(folder)) from None
    caption = {"id": name, "video": f"{name}.mp4", "caption": language.caption(clip)}
    if not arrays:
        return caption, questions, None
    from vidreason import PRESETS, read_video

    toy = PRESETS["toy"]
    frames, _, _ = read_video(folder / f"{name}.mp4", toy.num_clips, toy.frames_per_clip, toy.image_size)
    return caption, questions, (frames.flatten(0, 1).numpy(), draw.render(clip)[1])


def make_videos(folder: Path, split: str, seed: int, count: int, processes: int, arrays: bool = True):
    """In `folder`: mp4 files, samples.jsonl (questions), captions.jsonl, and with `arrays` frames.npy and owner.npy.

    frames (count, 16, 3, 96, 96) and owner (count, 16, 96, 96), both uint8, are for stage 0 only. Every file is whole
    or not there, and captions.jsonl comes last. Without arrays, mp4 files that are there are kept, so that a killed
    run goes on and a small world can grow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = (count, world.NUM_FRAMES, world.SIZE, world.SIZE)
    names = ["samples.jsonl", "captions.jsonl"]
    if arrays:
        names = ["frames.npy", "owner.npy", *names]
        frames = np.lib.format.open_memmap(folder / "frames.npy.part", "w+", np.uint8, (*shape[:2], 3, *shape[2:]))
        owner = np.lib.format.open_memmap(folder / "owner.npy.part", "w+", np.uint8, shape)
    jobs = [(split, seed, i, folder, arrays) for i in range(count)]
    workers = ProcessPoolExecutor(
        min(processes, count),
        multiprocessing.get_context("forkserver"),  # a fork of a process with threads may hang
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is for the one that waits for them
    )
    try:
        made = workers.map(make_video, jobs, chunksize=8)
        with open(folder / "samples.jsonl.part", "w") as samples, open(folder / "captions.jsonl.part", "w") as captions:
            for i, (caption, questions, pixels) in enumerate(tqdm(made, total=count, desc=f"{split} videos")):
                captions.write(json.dumps(caption) + "\n")
                samples.writelines(json.dumps(question) + "\n" for question in questions)
                if arrays:
                    frames[i], owner[i] = pixels
    finally:
        workers.shutdown(cancel_futures=True)
    for name in names:
        (folder / f"{name}.part").rename(folder / name)


def arrays_of(folder: Path):
    """-> what make_videos left for stage 0: frames (n, 16, 3, 96, 96) and owner (n, 16, 96, 96), uint8, on disk"""
    from vidreason import VidReasonError

    try:
        return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("frames", "owner")]
    except OSError as error:
        raise VidReasonError(
            f"no arrays for stage 0 ({error.filename}): run `python -m toy.pretrain world`; a world that train.py "
            "made for itself has none"
        ) from error


@contextmanager
def alone_in(folder: Path):
    """One process at a time writes a world; what a killed one left half-written is cleared away."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system opens it when the process ends, however it ends
        for leftover in folder.glob("*.part*"):
            leftover.unlink()
        yield


def videos_in(folder: Path) -> int:
    """How many videos of a split are ready: the lines of captions.jsonl."""
    path = folder / "captions.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def make_training_world(folder: Path, count: int, processes: int):
    """What stages 1 and 2 need of the training split's first `count` videos, unless it is there; no arrays.

    They are the first videos of any larger world, byte for byte. VidReasonError: it cannot be written.
    """
    from vidreason import VidReasonError

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


def write_text(path, seed, count):
    """Text-only records for stage 2: what the LLM already knows, so that adapting to video does not overwrite it.

    A third are world knowledge, two thirds are questions about stories, half of these about pairs that no video shows.
    """
    rng = np.random.default_rng((seed, 11))
    aside = path.with_name(f"{path.name}.part")
    with open(aside, "w") as file:
        for i in tqdm(range(count), desc="texts"):
            record = {"id": f"text-{i}"}
            if i % 3 == 0:
                sentence = ""
                while "|" not in sentence:
                    hit = language.HITS[rng.integers(len(language.HITS))]
                    sentence = language.knowledge(*hit, rng)
                record["question"], record["answer"] = sentence.split("|")
            else:
                clip = world.make_clip(seed, i, "text", held_out=i % 3 == 1, cut=True if i % 3 == 1 else None)
                asked = language.questions(clip, rng)
                q = next(q for q in asked if q["type"] == "held-out") if i % 3 == 1 else asked[rng.integers(len(asked))]
                record.update(
                    context=language.caption(clip, list(rng.permutation(len(clip.things)))),
                    question=q["question"],
                    answer=q["answer"],
                )
            file.write(json.dumps(record) + "\n")
    aside.rename(path)



def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20, help="how many clips to make (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="which stream of clips; the same seed makes the same clips")
    parser.add_argument(
        "--split", choices=["train", "val", "test"], default="train", help="disjoint streams (default train)"
    )
    parser.add_argument(
        "--held_out",
        type=int,
        default=0,
        metavar="N",
        help="N more clips, of the kind pairs that no training video shows",
    )
    parser.add_argument(
        "--titles", action="store_true", help="name files after what happens in them instead of by number"
    )
    parser.add_argument("--gif", action="store_true", help="write each clip as an animated picture too")
    parser.add_argument("--out", type=Path, required=True, help="folder for the mp4 files and samples.jsonl")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    aside = args.out / "samples.jsonl.part"
    with open(aside, "w") as file:
        for i, held_out in tqdm(
            [(i, False) for i in range(args.clips)] + [(i, True) for i in range(args.held_out)], desc="clips"
        ):
            clip = world.make_clip(args.seed, i, args.split, held_out, cut=True if held_out else None)
            name = f"{title(clip)}-{i}" if args.titles else sample_id(args.split, args.seed, i, held_out)
            if args.gif:
                draw.write_gif(args.out / f"{name}.gif", draw.render(clip)[0])
            file.writelines(json.dumps(record) + "\n" for record in write_clip(clip, name, args.out))
    aside.rename(args.out / "samples.jsonl")
    print(f"{args.clips + args.held_out} clips and their questions: {args.out}")


if __name__ == "__main__":
    main()
