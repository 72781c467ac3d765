"""Stage 0: the toy foundation models — a video transformer, a SAM and a Llama — from scratch, on the toy world.

    python -m toy.pretrain world       # training and validation videos as mp4, decoded once (runs/world)
    python -m toy.pretrain llm         # stories, questions and world knowledge, text only   (toy/weights/llm)
    python -m toy.pretrain llm --init toy/weights/llm --seed 2 --steps 1000 --lookup_steps 200   # new stories
    python -m toy.pretrain llm --init toy/weights/llm --seed 3 --steps 2000 --lookup_steps 300   # and more of them
    python -m toy.pretrain encoder     # the video transformer: what is where, how it moves (toy/weights/encoder…)
    python -m toy.pretrain sam         # segment_anything from point prompts                (toy/weights/sam…)

Real projects download these three. No video shows a held-out pair of kinds; texts tell how such a meeting ends. Encoder
and SAM learn from labels that real videos lack: the simulator's kinds, colours, motions and hits up to .75 s ahead, and
the renderer's masks. All is seeded. Then: `python train.py --stage 1` and `--stage 2`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a busy neighbour costs 25 × otherwise, see the README
import argparse
import fcntl
import hashlib
import json
import math
import multiprocessing
import shutil
import signal
import subprocess
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from toy import world

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS, RUNS = ROOT / "toy" / "weights", ROOT / "runs"
MP4_BYTES = 57_000  # of one video, on average


def autocast():
    """bf16 where the processor multiplies it faster: 2.5 × with avx512_bf16."""
    cpu = Path("/proc/cpuinfo")
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu.exists() and "avx512_bf16" in cpu.read_text())


def cosine(step, steps, warmup=100, floor=0.02):
    """Learning-rate factor: linear warm-up, constant for half of the run, then a cosine to `floor`."""
    late = max(0.0, step / steps - 0.5) * 2
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * late)))


def train(log_path, parameters, lr, steps, loss_of_step, watch, weight_decay=0.05):
    """The loop that the three models share: AdamW, clipping, cosine, progress bar, a line of log now and then.

    loss_of_step(step) → loss, {figure: value}; watch(step) → more figures (validation), and may save.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    recent, began, every = defaultdict(list), time.time(), min(100, max(1, steps // 4))
    with open(log_path, "w") as log, tqdm(total=steps, desc=log_path.stem, mininterval=5) as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * cosine(step, steps)
            # on a CPU the backward of fused attention takes half of a step; two plain products take a fifth
            with autocast(), sdpa_kernel(SDPBackend.MATH):
                loss, figures = loss_of_step(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            for key, value in {"loss": loss, **figures}.items():
                recent[key].append(float(value))
            bar.update()
            if (step + 1) % every == 0 or step + 1 == steps:
                line = {
                    "step": step + 1,
                    "minutes": round((time.time() - began) / 60, 2),
                    **{k: round(float(np.mean(v)), 4) for k, v in recent.items()},
                }
                line.update(watch(step + 1))
                recent.clear()
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.set_postfix_str(" ".join(f"{k} {v}" for k, v in line.items() if k not in ("step", "minutes"))[:150])


# --------------------------------------------------------------------------- videos


def make_video(job):
    """One video of a split as mp4 -> (its caption's record, its questions' records, its arrays for stage 0 or None)"""
    split, seed, index, folder, arrays = job
    clip, name = world.make_clip(seed, index, split), world.sample_id(split, seed, index)
    try:
        questions = world.write_clip(clip, name, folder, keep=not arrays)
    except OSError as error:  # PyAV's own kinds of it do not travel between processes
        raise OSError(error.errno, error.strerror, str(folder)) from None
    caption = {"id": name, "video": f"{name}.mp4", "caption": world.caption(clip)}
    if not arrays:
        return caption, questions, None
    from vidreason import PRESETS, read_video

    toy = PRESETS["toy"]
    frames, _, _ = read_video(folder / f"{name}.mp4", toy.num_clips, toy.frames_per_clip, toy.image_size)
    return caption, questions, (frames.flatten(0, 1).numpy(), world.render(clip)[1])


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
                while "|" not in (sentence := world.knowledge(*world.HITS[rng.integers(len(world.HITS))], rng)):
                    pass
                record["question"], record["answer"] = sentence.split("|")
            else:
                clip = world.make_clip(seed, i, "text", held_out=i % 3 == 1, cut=True if i % 3 == 1 else None)
                asked = world.questions(clip, rng)
                q = next(q for q in asked if q["type"] == "held-out") if i % 3 == 1 else asked[rng.integers(len(asked))]
                record.update(
                    context=world.caption(clip, list(rng.permutation(len(clip.things)))),
                    question=q["question"],
                    answer=q["answer"],
                )
            file.write(json.dumps(record) + "\n")
    aside.rename(path)


# --------------------------------------------------------------------------- the LLM

SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<assistant> ' + m['content'] + '<eos>' }}"
    "{% else %}{{ '<user> ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def every_word() -> list[str]:
    """The world's vocabulary, from its own tables: about 130 words."""
    from vidreason import CAPTION_PROMPT

    words, rng = set(), np.random.default_rng(0)
    texts = [t for phrasings in world.QUESTIONS.values() for t in phrasings] + [
        CAPTION_PROMPT,
        *world.KINDS,
        *world.COLOUR_ORDER,
    ]
    texts += [*world.PAST.values(), *world.PRESENT.values(), *world.FUTURE.values(), *world.NUMBERS, *world.DIRECTIONS]
    texts += [world.knowledge(m, t, rng).replace("|", " ") for m, t in world.HITS for _ in range(20)]
    texts += [
        "yes no there is no a an the did not move moved because it hit the wall reached "
        ". , : ; ! because of them move moves are objects now toward"
    ]
    for text in texts:
        for slot in "{x}", "{y}", "{z}":
            text = text.replace(slot, " ")
        words |= set(tokens_of(text))
    return sorted(words)


def tokens_of(text):
    import re

    return re.findall(r"\w+|[^\w\s]+", text.lower())


def make_tokenizer():
    """Whole words, lower case; an unknown word becomes <unk>. The chat template makes prompts, as for any other LLM."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(SPECIAL + every_word())}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # " ." → "."
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def story_of(job):
    """One story as text: {"story", "listing", "questions"}; a sixth of them hold a pair that no video shows."""
    seed, index, knowledge = job
    held_out = knowledge and index % 6 == 0
    clip = world.make_clip(seed, index, "text", held_out, cut=bool(index % 12) if held_out else None)
    rng = np.random.default_rng((*clip.seed, 5))
    story = world.caption(clip, list(rng.permutation(len(clip.things))))
    questions = [(q["type"], q["question"], q["answer"]) for q in world.questions(clip, rng)]
    return story, questions


def make_stories(seed, count, processes, knowledge=True):
    jobs = [(seed, i, knowledge) for i in range(count)]
    with multiprocessing.Pool(processes) as pool:
        return list(tqdm(pool.imap(story_of, jobs, 64), total=count, desc="stories"))


class TextBatches:
    """Documents for the toy LLM. One document = a story, then independent questions about it, each of which sees the
    story and itself only, exactly as questions see E_vision later (`vidreason.pack`)."""

    def __init__(self, stories, tokenizer, rng, knowledge=True):
        from vidreason import CAPTION_PROMPT

        self.rng, self.tokenizer, self.pool, self.reads_knowledge = rng, tokenizer, [], knowledge
        self.bos, self.eos, self.user, self.assistant = tokenizer.convert_tokens_to_ids(
            ["<bos>", "<eos>", "<user>", "<assistant>"]
        )
        self.colours = np.array(tokenizer.convert_tokens_to_ids(list(world.COLOURS)))
        self.caption_prompt = self.words(CAPTION_PROMPT)
        self.stories = [
            (self.words(story), [(t, self.words(q), self.words(a)) for t, q, a in questions])
            for story, questions in tqdm(stories, desc="tokens")
        ]
        count = Counter(type_ for _, questions in self.stories for type_, _, _ in questions)
        self.rarity = {type_: 1 / n for type_, n in count.items()}

    def words(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def pair(self, question, answer):
        return [self.bos, self.user, *question, self.assistant], [*answer, self.eos]

    def document(self, short, plain):
        """→ context ids, [(prompt ids, target ids)]; `short`: a list of things and look-ups in it, nothing else."""
        if short:
            return self.lookups(plain)
        if self.rng.random() < 0.1 * self.reads_knowledge:
            return self.knowledge()
        story, questions = self.stories[self.rng.integers(len(self.stories))]
        weights = np.array([self.rarity[type_] for type_, _, _ in questions])  # the rarer types are the harder ones
        few = min(6, len(questions))  # attention costs length squared
        questions = [questions[i] for i in self.rng.choice(len(questions), few, False, weights / weights.sum())]
        pairs = [self.pair(q, a) for _, q, a in questions]
        if self.rng.random() < 0.25:
            pairs.append(self.pair(self.caption_prompt, story))
        permuted = np.arange(len(self.tokenizer))
        permuted[self.colours] = self.rng.permutation(self.colours)  # colours mean nothing: any may be any
        swap = lambda ids: permuted[ids].tolist()
        return swap(story), [(swap(p), swap(t)) for p, t in pairs]

    def lookups(self, plain=False):
        """A list of things and their motions, then "the ball is" → "red", "the red ball moved" → "left" and so on.

        To find a word by the word beside it takes two layers that learn together, and late; a small LLM that cannot do
        it names a kind and a colour that are there but do not belong together. With a loss on nothing but look-ups it
        learns them in minutes, if they are `plain`: with two of a kind and with hits, as stories have them, the loss
        stands at .57 after 1000 steps, with plain ones at .36 after 800. So those come later.
        """
        n = self.rng.integers(2, 5)
        kinds = self.rng.choice(world.KINDS[:-1], n, replace=not plain)
        things = list(zip(self.rng.permutation(list(world.COLOURS))[:n], kinds, strict=True))
        listing = world.listing([world.a(f"{c} {k}") for c, k in things])
        alone = [(c, k) for c, k in things if (kinds == k).sum() == 1]
        pairs = [([self.bos, *self.words(f"the {k} is")], self.words(c)) for c, k in alone]
        pairs += [([self.bos, *self.words(world.a(c))], self.words(k)) for c, k in things]
        verbs = [world.PRESENT[v] for v in ("start", "roll", "slide", "drift", "bounce")]
        motions = [(f"{c} {k}", str(self.rng.choice(verbs)), str(self.rng.choice(world.DIRECTIONS))) for c, k in things]
        pairs += [([self.bos, *self.words(f"the {name} moved")], self.words(way)) for name, _, way in motions]
        told = [f"the {name} {verb} {way} ." for name, verb, way in motions]
        hitting = [i for i in range(0 if plain else n) if self.rng.random() < 0.5]
        told += [f"the {motions[i][0]} hits the {motions[i - 1][0]} ." for i in hitting]
        told = " ".join(told[i] for i in self.rng.permutation(len(told)))
        return self.words(f"there are {world.NUMBERS[n]} objects : {listing} . {told}"), pairs

    def knowledge(self):
        pairs = []
        for _ in range(self.rng.integers(4, 9)):
            hits = world.HELD_OUT_HITS if self.rng.random() < 0.25 else world.HITS
            question, _, answer = world.knowledge(*hits[self.rng.integers(len(hits))], self.rng).rpartition("|")
            pairs.append(
                self.pair(self.words(question), self.words(answer))
                if question
                else ([self.bos], [*self.words(answer), self.eos])
            )
        return [], pairs

    def batch(self, size, short, plain=False):
        """→ ids, positions (B, T), mask (B, 1, T, T) additive, weights (B, T): of each token as a target.

        `short`: the share of documents that are look-ups.
        """

        def length_of(document):
            return len(document[0]) + sum(len(p) + len(t) for p, t in document[1])

        if not self.pool:  # eight batches at once, sorted, so that little is padding
            documents = [self.document(self.rng.random() < short, plain) for _ in range(8 * size)]
            documents.sort(key=length_of)
            self.pool = [documents[i * size : (i + 1) * size] for i in self.rng.permutation(8)]
        documents = self.pool.pop()
        length = length_of(documents[-1])
        ids, positions = np.zeros((size, length), np.int64), np.zeros((size, length), np.int64)
        part, weights = np.full((size, length), -1), np.zeros((size, length), np.float32)
        for row, (context, pairs) in enumerate(documents):
            at = len(context)
            ids[row, :at], positions[row, :at], part[row, :at], weights[row, 1:at] = context, np.arange(at), 0, 0.1
            for number, (prompt, target) in enumerate(pairs, 1):
                end = at + len(prompt) + len(target)
                ids[row, at:end], positions[row, at:end], part[row, at:end] = (
                    prompt + target,
                    len(context) + np.arange(end - at),
                    number,
                )
                weights[row, at + len(prompt) : end] = 1.0
                at = end
        same = (part[:, :, None] == part[:, None, :]) | ((part == 0)[:, None, :] & (part >= 0)[:, :, None])
        mask = (same & np.tri(length, dtype=bool)) | np.eye(length, dtype=bool)
        mask = np.where(mask, np.float32(0), np.float32(-1e9))[:, None]
        return tuple(map(torch.from_numpy, (ids, positions, mask, weights)))


def text_accuracy(llm, tokenizer, stories, batches, limit=None):
    """Exact-match accuracy per question type, given the true story as text: the ceiling of every fused model."""
    right, items = defaultdict(list), []
    for story, questions in stories:
        items += [
            (type_, batches.words(story) + batches.pair(batches.words(q), [])[0], batches.words(answer))
            for type_, q, answer in questions
        ]
    items = sorted(items[:limit], key=lambda x: len(x[1]))
    llm.eval()
    for start in range(0, len(items), 128):
        group = items[start : start + 128]
        longest = max(len(prompt) for _, prompt, _ in group)
        ids = torch.tensor([[0] * (longest - len(p)) + p for _, p, _ in group])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for _, p, _ in group])
        with torch.no_grad(), autocast():
            out = llm.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max(len(x[2]) for x in group) + 1,
                pad_token_id=0,
                eos_token_id=batches.eos,
            )[:, longest:].tolist()
        for (type_, _, answer), got in zip(group, out):
            right[type_].append(got[: got.index(batches.eos)] == answer if batches.eos in got else False)
    llm.train()
    return {k: round(float(np.mean(v)), 3) for k, v in sorted(right.items())}


def pretrain_llm(args):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    train_stories, val_stories = (
        make_stories(args.seed + s, n, args.processes, args.knowledge) for s, n in ((0, args.stories), (1000, 200))
    )
    batches = TextBatches(train_stories, tokenizer, np.random.default_rng(args.seed), args.knowledge)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.width,
            intermediate_size=args.width * 8 // 3 // 16 * 16,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=batches.bos,
            eos_token_id=batches.eos,
            dtype="float32",
            attn_implementation="eager",
        )
    )  # for this mask faster than SDPA on a CPU
    if args.init:
        llm = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32, attn_implementation="eager")
    print(f"LLM: {sum(p.numel() for p in llm.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} words")

    def short(step):
        """Share of look-up documents: all at first, a tenth in the end."""
        return 1.0 if step < args.lookup_steps else max(0.1, 0.5 - (step - args.lookup_steps) / args.steps)

    def loss_of_step(step):
        plain = step < args.lookup_steps and not args.init
        ids, positions, mask, weights = batches.batch(args.batch, short(step), plain)
        logits = llm(input_ids=ids, position_ids=positions, attention_mask=mask).logits
        nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
        # a pair's first token follows the previous pair in memory only; its weight is 0, as for every prompt token
        return (nll * weights[:, 1:]).sum() / weights[:, 1:].sum(), {}

    def watch(step):
        if step % args.evaluate_every and step != args.steps:
            return {}
        print()
        llm.save_pretrained(args.runs / "llm")
        tokenizer.save_pretrained(args.runs / "llm")
        few = 40 if step < args.steps else len(val_stories)
        return {"text accuracy": text_accuracy(llm, tokenizer, val_stories[:few], batches)}

    train(args.runs / "llm.jsonl", list(llm.parameters()), args.lr, args.steps, loss_of_step, watch)
    accuracy = text_accuracy(llm, tokenizer, val_stories, batches)
    llm.half().save_pretrained(args.weights / "llm")
    tokenizer.save_pretrained(args.weights / "llm")
    print("text-only accuracy per type (gate .95):", accuracy)


# --------------------------------------------------------------------------- the video transformer

SLOTS, NONE = 4, 0  # at most four things on a table; class 0 of a partner: nobody
COLOUR_OF = {c: i for i, c in enumerate(world.COLOUR_ORDER)}
EVENTS = ["start", "hit", "wall", *world.EFFECTS]
FRAMES = 4  # frames per clip of the toy preset
THING_HEADS = {"kind": 8, "colour": 6, "state": 3, "hits": 7, "hit_by": 7, "next_hits": 7, "next_hit_by": 7}  # classes
CLIP_HEADS = {"count": 5, "moving": 5, "first": 7}


def labels_of(job):
    """What a good video encoder should know, for each clip of one video: classes per thing, numbers, events.

    `next_hits`/`next_hit_by` look up to .75 s beyond the clip's last frame: an encoder that sees motion sees where it
    leads. Partners are named by colour, never by kind, so nothing here ties two kinds together.
    """
    split, seed, index = job
    clip = world.make_clip(seed, index, split)
    clips = world.NUM_FRAMES // FRAMES
    classes = np.full((clips, SLOTS, len(THING_HEADS)), -1, np.int64)
    numbers, events = np.zeros((clips, SLOTS, 6), np.float32), np.zeros((clips, SLOTS, len(EVENTS)), np.float32)
    whole = np.zeros((clips, len(CLIP_HEADS)), np.int64)
    colour = [COLOUR_OF[t.colour] for t in clip.things]
    for c in range(clips):
        first, last = c * FRAMES, c * FRAMES + FRAMES - 1
        seen = [e for e in clip.events if first < math.ceil(e.time * world.FPS) <= last]
        soon = [e for e in clip.events if last < e.time * world.FPS < last + 3]
        for i, thing in enumerate(clip.things):
            partner = [NONE] * 4
            for at, log in ((0, seen), (2, soon[::-1])):
                for e in log:
                    if e.type == "hit" and i in (e.subject, e.object):
                        partner[at + (i == e.object)] = 1 + colour[e.object if i == e.subject else e.subject]
            classes[c, i] = world.KINDS.index(thing.kind), colour[i], min(int(clip.state[last - 1, i]), 2), *partner
            place = clip.trajectory[first : last + 1, i]
            numbers[c, i] = *((place[2] - 0.5) * 3), *((place[3] - place[2]) * 10), *((place[1] - place[0]) * 10)
            for e in seen:
                events[c, i, EVENTS.index(e.type)] += e.subject == i
        moving = [e.subject for e in seen if e.direction]
        whole[c] = len(clip.things), len(set(moving)), 1 + colour[moving[0]] if moving else NONE
    return classes, numbers, events.clip(max=1), whole


class EncoderTask:
    """Batches and losses of the encoder: every thing's token (mask-pooled, as Eq. 2 will) and every clip's [CLS]."""

    def __init__(self, folder, split, seed, count, processes, rng):
        (self.frames, self.owner), self.rng = arrays_of(folder), rng
        with multiprocessing.Pool(processes) as pool:
            jobs = [(split, seed, i) for i in range(count or len(self.frames))]
            found = list(tqdm(pool.imap(labels_of, jobs, 64), total=len(jobs), desc=f"{split} labels"))
        self.classes, self.numbers, self.events, self.whole = (torch.from_numpy(np.stack(x)) for x in zip(*found))
        active = self.events.flatten(2).any(-1) | (self.numbers[..., 2:].abs().amax((-2, -1)) > 0.05)
        self.active, self.all = active.nonzero().numpy(), np.argwhere(np.ones(active.shape, bool))

    def batch(self, size):
        """→ clips float (B, F, 3, H, W) in [0, 1], owner (B, F, H, W), labels"""
        pick = np.concatenate(
            [
                source[self.rng.integers(len(source), size=n)]
                for source, n in ((self.active, size * 3 // 4), (self.all, size - size * 3 // 4))
            ]
        )
        spans = [(v, slice(c * FRAMES, (c + 1) * FRAMES)) for v, c in pick]
        frames = torch.from_numpy(np.stack([self.frames[v, s] for v, s in spans])).float() / 255
        owner = torch.from_numpy(np.stack([self.owner[v, s] for v, s in spans]))
        v, c = torch.from_numpy(pick).T
        return frames, owner, (self.classes[v, c], self.numbers[v, c], self.events[v, c], self.whole[v, c])


class EncoderHeads(nn.Module):
    """Linear read-outs that exist during stage 0 only."""

    def __init__(self, width):
        super().__init__()
        self.thing = nn.Linear(width, sum(THING_HEADS.values()) + 6 + len(EVENTS))
        self.clip = nn.Linear(width, sum(CLIP_HEADS.values()))
        self.patch = nn.Linear(width, 9 + 7)


def encoder_loss(encoder, heads, frames, owner, labels):
    classes, numbers, events, whole = labels
    cls, patches = encoder(frames)  # (B, D), (B, T, P, D)
    side = int(patches.shape[2] ** 0.5)
    pixels = frames.shape[-1] // side
    share = torch.stack([F.avg_pool2d((owner == i + 1).float(), pixels) for i in range(SLOTS)], 1).flatten(
        3
    )  # (B, 4, F, P)
    key = share[:, :, FRAMES // 2]  # the keyframe's masks, as fractions of patches
    area = key.sum(-1)
    tokens = key @ patches[:, FRAMES // 2 // 2].float() / area.clamp(min=1e-3)[..., None]
    visible = (area > 0.3) & (classes[..., 0] >= 0)
    out = heads.thing(tokens[visible]).float()
    classes, numbers, events = classes[visible], numbers[visible], events[visible]
    loss, figures, at = 0.0, {}, 0
    for k, (name, n) in enumerate(THING_HEADS.items()):
        truth, logits = classes[:, k], out[:, at : at + n]
        weight = torch.ones(n)
        if n == 7:
            weight[NONE] = 0.4
        loss = loss + F.cross_entropy(logits, truth, weight)
        rare = truth != 0 if n == 7 or name == "state" else truth >= 0
        figures[name] = (logits.argmax(-1) == truth)[rare].float().mean() if rare.any() else 1.0
        at += n
    moving = 1 + 3 * (numbers[:, 2:].abs().amax(-1) > 0.05).float()
    loss = loss + 2 * ((out[:, at : at + 6] - numbers).square().mean(-1) * moving).mean()
    figures["speed error"] = (out[:, at + 2 : at + 4] - numbers[:, 2:4]).abs().mean() / 10
    loss = loss + 5 * F.binary_cross_entropy_with_logits(out[:, at + 6 :], events)
    found = (out[:, at + 6 :] > 0).float()
    figures["event F1"] = 2 * (found * events).sum() / (found.sum() + events.sum()).clamp(min=1)
    summary = heads.clip(cls).float().split(list(CLIP_HEADS.values()), -1)
    for k, logits in enumerate(summary):
        loss = loss + 0.5 * F.cross_entropy(logits, whole[:, k])
    dense = share[:, :, 1::2].transpose(1, 2)  # (B, T, 4, P): second frame of each tubelet
    top, who = dense.max(2)
    kind, colour = (
        torch.where(top > 0.3, labels[0][:, :, k].clamp(min=0).gather(1, who.flatten(1)).view_as(who) + 1, 0)
        for k in (0, 1)
    )
    kinds, colours = heads.patch(patches).float().split([9, 7], -1)
    for logits, truth in ((kinds, kind), (colours, colour)):
        weight = torch.ones(logits.shape[-1])
        weight[0] = 0.1
        loss = loss + 0.5 * F.cross_entropy(logits.flatten(0, -2), truth.flatten(), weight)
    return loss, figures


def pretrain_encoder(args):
    from safetensors.torch import save_file

    from vidreason import PRESETS, VideoTransformer

    torch.manual_seed(args.seed)
    encoder = VideoTransformer(PRESETS["toy"])
    heads = EncoderHeads(PRESETS["toy"].encoder_width)
    task = EncoderTask(
        args.runs / "world" / "train", "train", args.seed, args.clips, args.processes, np.random.default_rng(args.seed)
    )
    val = EncoderTask(args.runs / "world" / "val", "val", args.seed, None, args.processes, np.random.default_rng(1))
    parameters = list(encoder.parameters()) + list(heads.parameters())
    print(
        f"encoder: {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters, "
        f"{len(task.all)} clips, {len(task.active)} with motion"
    )

    def watch(step):
        if step % args.evaluate_every and step != args.steps:
            return {}
        save_file({k: v.half() for k, v in encoder.state_dict().items()}, args.runs / "encoder.safetensors")
        encoder.eval()
        with torch.no_grad(), autocast():
            figures = [encoder_loss(encoder, heads, *val.batch(64))[1] for _ in range(6)]
        encoder.train()
        return {"val": {k: round(float(np.mean([f[k] for f in figures])), 3) for k in figures[0]}}

    train(
        args.runs / "encoder.jsonl",
        parameters,
        args.lr,
        args.steps,
        lambda step: encoder_loss(encoder, heads, *task.batch(args.batch)),
        watch,
    )
    save_file({k: v.half() for k, v in encoder.state_dict().items()}, args.weights / "encoder.safetensors")


# --------------------------------------------------------------------------- SAM


def sam_batch(frames, owner, rng, images, points):
    """→ pictures float (B, 3, S, S) in 0…255, points (B, N, 1, 2) as x, y in pixels, targets (B, N, S, S), real (B, N).

    A fifth of the points fall on the bare table (real False): their predicted IoU is trained to 0, so that the grid's
    many misses are dropped.
    """
    which = np.stack([rng.integers(len(frames), size=images), rng.integers(world.NUM_FRAMES, size=images)], 1)
    pictures = np.stack([frames[v, f] for v, f in which])
    places, targets, real = (
        np.zeros((images, points, 1, 2), np.float32),
        np.zeros((images, points, *owner.shape[2:]), np.float32),
        np.zeros((images, points), bool),
    )
    for b, (v, f) in enumerate(which):
        seen = owner[v, f]
        present = np.unique(seen[seen > 0])
        for n in range(points):
            thing = rng.choice(present) if n < points * 4 // 5 and len(present) else 0
            ys, xs = np.where(seen == thing)
            at = rng.integers(len(ys))
            places[b, n, 0] = xs[at] + 0.5, ys[at] + 0.5
            real[b, n] = thing > 0
            targets[b, n] = (seen == thing) & (thing > 0)
    return (
        torch.from_numpy(pictures).float(),
        torch.from_numpy(places),
        torch.from_numpy(targets),
        torch.from_numpy(real),
    )


def sam_loss(sam, pictures, places, targets, real):
    """Focal + dice on the best of the three masks, and the regressed IoU (Kirillov et al., 2023, §3)."""
    embeddings = sam.image_encoder((pictures - sam.pixel_mean) / sam.pixel_std)
    position = sam.prompt_encoder.get_dense_pe()
    masks, ious = [], []
    for embedding, place in zip(embeddings, places):
        sparse, dense = sam.prompt_encoder(points=(place, torch.ones(place.shape[:2])), boxes=None, masks=None)
        m, i = sam.mask_decoder.predict_masks(embedding[None], position, sparse, dense)
        masks.append(m[:, 1:])  # the three "multimask" outputs that AMG reads
        ious.append(i[:, 1:])
    logits, iou = torch.stack(masks).float(), torch.stack(ious).float()  # (B, N, 3, h, w), (B, N, 3)
    small = F.interpolate(targets, size=logits.shape[-2:], mode="area")[:, :, None].expand_as(logits)
    p = logits.sigmoid()
    focal = (F.binary_cross_entropy_with_logits(logits, small, reduction="none") * (p - small).square()).mean(
        (-2, -1)
    ) * 20
    dice = 1 - (2 * (p * small).sum((-2, -1)) + 1) / (p.sum((-2, -1)) + small.sum((-2, -1)) + 1)
    on, truth = logits > 0, small > 0.5
    exact = (on & truth).sum((-2, -1)) / (on | truth).sum((-2, -1)).clamp(min=1) * real[..., None]
    each = focal + dice * real[..., None]
    best = each.min(-1).values + 0.1 * each.mean(-1)
    figures = {"IoU": exact.max(-1).values[real].mean(), "IoU error": (iou - exact).abs().mean()}
    return (best * (real + 0.2 * ~real)).mean() + 2 * (iou - exact).square().mean(), figures


def mask_quality(sam, config, frames, owner, count):
    """The whole automatic path on `count` keyframes: mean best IoU per thing, share found, false masks per picture."""
    from vidreason import segment

    best, false, began = [], [], time.time()
    for v in range(min(count, len(frames))):
        f = v % world.NUM_FRAMES
        masks = segment(frames[v, f].transpose(1, 2, 0), sam, config).numpy()
        truth = [owner[v, f] == i for i in range(1, SLOTS + 1) if (owner[v, f] == i).sum() > 30]
        iou = np.array([[(m & t).sum() / (m | t).sum() for m in masks] for t in truth]).reshape(len(truth), len(masks))
        best += list(iou.max(1)) if len(masks) else [0.0] * len(truth)
        false.append(int((iou.max(0) < 0.5).sum()) if len(truth) and len(masks) else len(masks))
    return {
        "mIoU": round(float(np.mean(best)), 3),
        "recall": round(float(np.mean(np.array(best) > 0.5)), 3),
        "false masks": round(float(np.mean(false)), 3),
        "ms per keyframe": round((time.time() - began) / min(count, len(frames)) * 1e3),
    }


def pretrain_sam(args):
    from safetensors.torch import save_file

    from vidreason import PRESETS, build_sam

    torch.manual_seed(args.seed)
    sam, rng = build_sam(PRESETS["toy"]), np.random.default_rng(args.seed)
    data = {split: arrays_of(args.runs / "world" / split) for split in ("train", "val")}
    print(f"SAM: {sum(p.numel() for p in sam.parameters()) / 1e6:.2f} M parameters")

    def watch(step):
        if step % args.evaluate_every and step != args.steps:
            return {}
        save_file({k: v.half() for k, v in sam.state_dict().items()}, args.runs / "sam.safetensors")
        sam.eval()
        quality = mask_quality(sam, PRESETS["toy"], *data["val"], 60 if step < args.steps else 200)
        sam.train()
        return quality

    train(
        args.runs / "sam.jsonl",
        list(sam.parameters()),
        args.lr,
        args.steps,
        lambda step: sam_loss(sam, *sam_batch(*data["train"], rng, args.batch, args.points)),
        watch,
        weight_decay=0.01,
    )
    save_file({k: v.half() for k, v in sam.state_dict().items()}, args.weights / "sam.safetensors")


# --------------------------------------------------------------------------- what the repository ships

COMMANDS = [
    "python -m toy.pretrain world",
    "python -m toy.pretrain llm",
    "python -m toy.pretrain llm --init toy/weights/llm --seed 2 --steps 1000 --lookup_steps 200",
    "python -m toy.pretrain llm --init toy/weights/llm --seed 3 --steps 2000 --lookup_steps 300",
    "python -m toy.pretrain encoder",
    "python -m toy.pretrain sam",
    "python train.py --stage 1",
    "python train.py --stage 2",
    "python -m toy.pretrain ship",
]


def ship(args):
    """Put the newest stage-2 run beside the foundation models, in fp16, with where everything comes from."""
    from vidreason import VidReason

    run = args.runs / "stage2" / "model"
    VidReason.load(run).save(args.weights, parts=("fusion", "lora"), dtype=torch.float16)
    shutil.copy(run / "familiar.safetensors", args.weights)
    files = sorted(p for p in args.weights.rglob("*") if p.is_file() and p.name != "provenance.json")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    provenance = {
        "commands": COMMANDS,
        "seed": args.seed,
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "segment-anything")},
        "sha256": {str(p.relative_to(args.weights)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }
    (args.weights / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    print(f"{sum(p.stat().st_size for p in files) / 2**20:.1f} MiB: {args.weights}")


# --------------------------------------------------------------------------- command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="part", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--processes", type=int, default=os.cpu_count(), help="processes that make videos and stories")
    common.add_argument(
        "--runs", type=Path, default=RUNS, help="folder for videos, logs and intermediate weights (default runs)"
    )
    common.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="model directory to write to (default toy/weights)"
    )
    common.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that multiply matrices")
    p = sub.add_parser("world", parents=[common], help="make training and validation videos")
    p.add_argument("--clips", type=int, default=12000)
    p.add_argument("--val_clips", type=int, default=400)
    p = sub.add_parser("llm", parents=[common], help="train the toy LLM on text")
    for flag, default in dict(
        stories=16000, steps=3400, lookup_steps=800, batch=32, width=128, layers=5, heads=2, evaluate_every=400
    ).items():
        p.add_argument(f"--{flag}", type=int, default=default)
    p.add_argument("--lr", type=float, default=1e-3)
    told = "neither sentences nor stories about the pairs of kinds that no video shows, nor what kinds do to each other"
    p.add_argument("--no_knowledge", dest="knowledge", action="store_false", help=told)
    p.add_argument("--init", help="directory of an LLM to go on with, instead of random weights")
    p = sub.add_parser("encoder", parents=[common], help="train the video transformer")
    for flag, default in dict(clips=None, steps=3200, batch=64, evaluate_every=500).items():
        p.add_argument(f"--{flag}", type=int, default=default)
    p.add_argument("--lr", type=float, default=1e-3)
    p = sub.add_parser("sam", parents=[common], help="train the toy SAM")
    for flag, default in dict(steps=1600, batch=12, points=10, evaluate_every=400).items():
        p.add_argument(f"--{flag}", type=int, default=default)
    p.add_argument("--lr", type=float, default=8e-4)
    sub.add_parser("ship", parents=[common], help="write the newest stage-2 run into toy/weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.part == "world":
        for split, count in (("val", args.val_clips), ("train", args.clips)):
            with alone_in(args.runs / "world" / split):
                if split == "train":
                    write_text(args.runs / "world" / split / "text.jsonl", args.seed, count // 2)
                make_videos(args.runs / "world" / split, split, args.seed, count, args.processes)
    else:
        args.weights.mkdir(parents=True, exist_ok=True)
        {"llm": pretrain_llm, "encoder": pretrain_encoder, "sam": pretrain_sam, "ship": ship}[args.part](args)


if __name__ == "__main__":
    from data import guarded

    guarded(main)
