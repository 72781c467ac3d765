"""Clips, questions, answers.

    python infer.py clip.mp4 "why?"                     # streams the answer
    python infer.py clip.mp4                            # explains step by step what happened (the paper's prompt)
    python infer.py a.mp4 b.mp4 "why?"                  # several clips: the model is loaded once
    python infer.py a.mp4 b.mp4 -q "why?" -q "what happens next?"       # several questions about each
    python infer.py clip.mp4 --interactive              # reads questions, a line each, until an empty line
    python infer.py clip.mp4 --task predict             # three candidate next events, the likeliest first
    python infer.py clip.mp4 "why?" --explain out.png   # draws what was found in the clip and where the model looked
    python infer.py clip.mp4 "why?" --json              # one JSON object a line, for machines
    python infer.py clip.mp4 "why?" --model runs/mine   # another model directory than the toy's
    python infer.py clip.mp4 "why?" --top_p 0.9 --temperature 0.7 --seed 1

Without -q the last argument is the question, unless it names a file that exists or looks like the name of one.
--interactive: a line that does is the next clip. Ctrl-C stops an answer, and at the prompt the program.

--task predict always names events: it has no way yet to say that nothing more happens, and where nothing does it may
be as sure as elsewhere. Its confidence is an event's share of the likelihood of the candidates that were found, not a
measured frequency of being right.

--json, for each clip and question:
    video, question    as given; without a question, the prompt in its place
    answer             text; with --task predict instead:
    predictions        at most three of {"event": text, "confidence": 0 to 1, "because": what was seen, in words}
    unsure             true if no event has half of the likelihood
    object_tokens      masks that became tokens, over all keyframes: a thing seen in four of them counts four times
    unfamiliar         true if the clip is unlike those that the model was trained on

A mistake of yours is one line on stderr, "error: <what> (<where>): <what to do>", and exit code 2. Among several clips
a bad one costs only its own answers.
"""

from __future__ import annotations  # types are names here: the libraries that they stand for come later, or not at all

import os

# before torch: spinning threads cost 25x when another program is busy
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import atexit
import gc
import json
import math
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vidreason import Features, VidReason

TOY = Path(__file__).resolve().parent / "toy" / "weights"
UNSURE = 0.5  # below this confidence the best prediction is called a guess
CANDIDATES = 8  # that predict chooses three from, unless --beams says how many
PICTURES = (".png", ".jpg", ".svg", ".pdf")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".gif")


# --------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (command line): see python infer.py --help")


def say_error(message):
    one_line = " ".join(str(message).split())
    print(f"error: {one_line}", file=sys.stderr)


def fail(message):
    say_error(message)
    raise SystemExit(2)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, every value checked -> its settings; clips and questions are lists, [None] without question."""
    usage = "python infer.py clip [clip ...] [question] [-q question ...] [options]"
    parser = Parser(usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    video = "any file that FFmpeg reads; film.mp4#t=3,8 is its seconds 3 to 8. Behind it more clips, or one question"
    parser.add_argument("clips", nargs="+", metavar="clip", help=video)
    again = "once for each question about every clip; without a question: the paper's prompt for the task"
    parser.add_argument("-q", "--question", action="append", dest="questions", metavar="QUESTION", help=again)
    parser.add_argument("--interactive", action="store_true", help="then read questions, or other clips, from stdin")
    task = "explain, or name three candidate next events (it names some also where nothing more happens)"
    parser.add_argument("--task", choices=["reason", "predict"], default="reason", help=task)
    parser.add_argument("--model", default=TOY, help="model directory (default: the toy's)")
    where = "draw what the model found and where it looked for this answer: a .png, .jpg, .svg or .pdf"
    parser.add_argument("--explain", type=Path, metavar="PICTURE", help=where)
    parser.add_argument("--json", action="store_true", help="print a JSON object a line instead of text")
    beams = f"beam search with so many beams; for predict also how many candidates (default: 1, predict {CANDIDATES})"
    parser.add_argument("--beams", type=int, help=beams)
    nucleus = "nucleus sampling: the most likely words that make up this probability"
    parser.add_argument("--top_p", type=float, help=nucleus)
    parser.add_argument("--temperature", type=float, help="below 1 plays safe, above 1 takes risks; turns sampling on")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, of each answer anew")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer (default: the model's)")
    args = parser.parse_intermixed_args(arguments)  # the question may stand behind the options
    part_clips_from_question(args, parser)
    check_decoding(args, parser)
    if args.explain:
        if args.interactive or len(args.clips) * len(args.questions) > 1:
            parser.error("--explain draws one answer: give one clip and one question, without --interactive")
        check_picture(args.explain)
    return args


def part_clips_from_question(args, parser):
    """Without -q the last argument is the question, unless it names a clip."""
    if args.questions is None:
        first, *others = args.clips
        args.questions = [None]
        if others and not names_a_clip(others[-1]):
            args.questions = [args.clips.pop()]
    for stray in args.clips[1:]:
        if not names_a_clip(stray):
            parser.error(f"no clip is called '{stray}'; if it is a question, give each of them with -q")
    if any(question is not None and not question.strip() for question in args.questions):
        parser.error("a question is empty; leave it out for the paper's prompt")


def names_a_clip(text):
    """Whether a word on the command line is a file, or looks so much like one that it must be a typing error."""
    path = text.split("#t=")[0]
    if os.path.exists(path) or path.lower().endswith(VIDEOS):
        return True
    one_word = len(path.split()) == 1
    has_suffix = len(Path(path).suffix) > 1  # more than a full stop
    return one_word and (has_suffix or os.path.dirname(path) != "")


def check_decoding(args, parser):
    sampling = args.top_p is not None or args.temperature is not None
    counts = [count for count in (args.beams, args.max_new_tokens) if count is not None]
    if any(count < 1 for count in counts):
        parser.error("--beams and --max_new_tokens must be 1 or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error("--top_p must be above 0 and at most 1")
    if args.temperature is not None and args.temperature <= 0:
        parser.error("--temperature must be above 0; leave it out for the most likely answer")
    if args.task == "predict":
        if args.beams is not None and args.beams < 3:
            parser.error("--task predict chooses three events: give --beams 3 or more")
        args.beams = args.beams or CANDIDATES
    args.beams = args.beams or 1
    if args.beams > 1 and sampling:
        parser.error("--beams and --task predict search, --top_p and --temperature sample: choose one")


def check_picture(path):
    """Fail now, not after the slow work, if no picture can be written there."""
    if path.suffix.lower() not in PICTURES or path.is_dir():
        fail(f"not the name of a picture ({path}): end it in {', '.join(PICTURES)}")
    write_picture(path, Path.touch, keep=False)


def write_picture(path: Path, write: Callable[[Path], object], keep: bool = True):
    """Written aside and renamed: a half picture never stands under its name."""
    aside = path.with_name(path.name + ".partial")
    try:
        write(aside)
        if keep:
            os.replace(aside, path)
        else:
            aside.unlink()
    except OSError as error:
        fail(f"picture cannot be written: {error.strerror or error} ({path}): choose another place")


# --------------------------------------------------------------------------- answers


def unfamiliar(features: Features, directory: Path | str) -> bool:
    """Whether a clip is unlike those the weights were trained on; False if the model directory cannot tell.

    It can if it holds familiar.safetensors: mean (D_v,), whiten (D_v, D_v) and limit () of the training clips' global
    tokens. The distance is the mean over clips of |(z - mean) @ whiten|.
    """
    from safetensors.torch import load_file

    path = Path(directory) / "familiar.safetensors"
    if not path.exists():
        return False
    known = load_file(path)
    z_global = features.z_vision[~features.is_object].float().cpu()  # (N_t, D_v)
    whitened = (z_global - known["mean"].float()) @ known["whiten"].float()
    distance = whitened.norm(dim=1).mean()
    return bool(distance > known["limit"])


def reason(model: VidReason, features: Features, question: str, args) -> dict:
    """Answer, streaming unless a machine reads -> the fields of the JSON object."""
    from transformers import TextStreamer

    streamer = None
    if not args.json and args.beams == 1:
        streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"beams": args.beams, "top_p": args.top_p, "temperature": args.temperature, "streamer": streamer}
    answer = model.answer(features, question, **options, **length_of_answer(args))
    if not args.json and not streamer:
        print(answer, flush=True)
    return {"answer": answer}


def length_of_answer(args) -> dict:
    """The option of generate, if it was given; else the model's own holds."""
    if args.max_new_tokens:
        return {"max_new_tokens": args.max_new_tokens}
    return {}


def predict(model: VidReason, features: Features, question: str, args) -> dict:
    """The three likeliest next events; the confidence of each is its share of the likelihood of all that was found.

    "Nothing more happens" is not among them unless the model says so by itself.
    """
    from vidreason import CAPTION_PROMPT

    length = length_of_answer(args)
    beams = model.answer_batch([features], [question], beams=args.beams, answers=args.beams, **length)
    candidates = [text for text in dict.fromkeys(beams) if text]
    shares = []
    if candidates:
        shares = model.option_logprobs(features, question, candidates).softmax(0).tolist()
    because = model.answer(features, CAPTION_PROMPT, **length)  # what the model saw is all it has to go by
    ranked = sorted(zip(shares, candidates, strict=True), reverse=True)
    events = []
    for share, text in ranked[:3]:
        events.append({"event": text, "confidence": round(share, 3), "because": because})
    unsure = not events or events[0]["confidence"] < UNSURE
    if not args.json:
        print_predictions(events, because, unsure)
    return {"predictions": events, "unsure": unsure}


def print_predictions(events: list[dict], because: str, unsure: bool):
    for i, event in enumerate(events, 1):
        print(f"{i}. {event['event']}   (confidence {event['confidence']:.2f})")
    print(f"because: {because}", flush=True)
    if unsure:
        print("unsure: no event is clearly the likeliest", flush=True)


# --------------------------------------------------------------------------- --explain


def looked_at(model: VidReason, features: Features, question: str, answer: str) -> torch.Tensor:
    """Where the queries looked for this answer: the share of each token of Z_vision -> (N_v,), sums to 1.

    The weights of cross-attention (Eq. 3), averaged over layers and heads. Not every query matters to every answer, so
    each counts by the length of the gradient of log P(answer) with respect to its token of E_vision.
    """
    import torch

    from vidreason import Conversation, encode_pair, loss, pack

    e_vision, weights = model.fuse([features], return_weights=True)  # weights (1, layers, heads, N_q, N_v)
    e_vision = e_vision.detach().requires_grad_()
    pair = encode_pair(model.tokenizer, question, answer)
    packed = pack([Conversation([pair])], model.config.num_queries)
    nll, _ = loss(model.llm, packed.to(model.device), e_vision)
    (gradient,) = torch.autograd.grad(nll, e_vision)  # (1, N_q, D_llm)

    importance = gradient[0].float().norm(dim=-1)  # (N_q,)
    importance = importance.clamp(min=1e-30)  # an answer of probability 1 has no gradient
    of_queries = weights[0].detach().float().mean((0, 1))  # (N_q, N_v)
    return (importance / importance.sum()) @ of_queries


HOW_TO_READ = (
    "How to read: the video is cut into parts of equal length; each picture is the middle of one, cut to the square "
    "that the model sees. Outlines with numbers are the objects that it found there. The bars say how much it looked "
    "at each of them for this answer, and how much at all frames of the part; all bars together are 100 %. The more it "
    "looked, the thicker the outline. Numbers name outlines: a thing that is seen in two pictures has two. (Measured: "
    "the queries' cross-attention, mean over layers and heads, each query weighted by the gradient of the answer's "
    "log-likelihood.)"
)


def explain(model: VidReason, features: Features, question: str, answer: str, path: Path):
    """Draw the keyframes with their times and masks, and looked_at as bars."""
    shares = looked_at(model, features, question, answer).cpu()
    clips = len(features.keyframes)
    most = max(map(len, features.masks))
    of_objects = shares[clips:].split([len(masks) for masks in features.masks])

    figure, panels = sheet(question, answer, clips, bars=1 + most)
    number = 1  # of the next object
    for i, (picture, chart) in enumerate(panels):
        numbers = range(number, number + len(of_objects[i]))
        number = numbers.stop
        times = features.frame_times[i].tolist()
        middle = times[len(times) // 2]
        picture.set_title(f"{middle:.1f} s   (part {i + 1}: {times[0]:.1f} to {times[-1]:.1f} s)", size=11)
        draw_masks(picture, features.keyframes[i], features.masks[i], numbers, of_objects[i] / shares.max())
        draw_bars(chart, f"all of part {i + 1}", numbers, [shares[i].item(), *of_objects[i].tolist()])
        chart.set(xlim=(0, 1.25 * shares.max().item()), ylim=(most + 0.6, -0.6))  # one scale, so that bars compare

    picture_format = path.suffix[1:].lower()
    write_picture(path, lambda aside: figure.savefig(aside, format=picture_format, bbox_inches="tight"))


def sheet(question: str, answer: str, clips: int, bars: int):
    """-> (figure with its texts, for each clip the axes of its picture and those of its chart); four clips a row"""
    from matplotlib.figure import Figure

    rows = math.ceil(clips / 4)
    columns = min(clips, 4)
    width = max(8, 3.2 * columns)  # inches, as are all sizes here but those of letters
    picture_height = 2.6
    chart_height = 0.3 + 0.2 * bars
    head = wrapped(f"Question: {question}", 13, width) + "\n" + wrapped(f"Answer: {answer}", 13, width)
    foot = wrapped(HOW_TO_READ, 9, width)
    height = rows * (picture_height + 0.3 + chart_height)
    height += 0.22 * (head.count("\n") + 1) + 0.15 * (foot.count("\n") + 1) + 0.3

    figure = Figure((width, height), dpi=100, layout="constrained")
    figure.suptitle(head, x=0.01, ha="left", size=13, parse_math=False)
    figure.supxlabel(foot, x=0.01, ha="left", size=9)
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[picture_height, chart_height] * rows)
    panels = []
    for i in range(rows * columns):
        row, column = divmod(i, columns)
        panels.append((axes[2 * row, column], axes[2 * row + 1, column]))
    for picture, chart in panels[clips:]:
        picture.set_axis_off()
        chart.set_axis_off()
    return figure, panels[:clips]


def wrapped(text: str, size: int, width: float) -> str:
    """In lines that fit into `width` inches: letters of `size` points are 0.56 as wide as high."""
    letters = int(width * 72 / (0.56 * size))
    return textwrap.fill(text, letters, break_on_hyphens=False)


def colour(number: int) -> str:
    return f"C{number % 10}"


def draw_masks(axes, keyframe: np.ndarray, masks: torch.Tensor, numbers: range, strengths: torch.Tensor):
    """The picture (S, S, 3) with outlined masks (K', S, S), a number beside each. strengths (K',), from 0 to 1."""
    import numpy as np

    axes.imshow(keyframe)
    side = len(keyframe)
    grid = np.arange(-1, side + 1)
    annotations = places(masks.numpy())
    for mask, number, strength, (own, place) in zip(masks, numbers, strengths.tolist(), annotations, strict=True):
        outline = np.pad(mask, 1).astype(float)  # padded: an outline closes at the border of the picture
        axes.contour(grid, grid, outline, [0.5], colors="white", linewidths=2 + 3 * strength)
        axes.contour(grid, grid, outline, [0.5], colors=[colour(number)], linewidths=0.8 + 2.5 * strength)
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colour(number)}
        line = {"arrowstyle": "-"}
        axes.annotate(number, own, place, ha="center", va="center", size=9, bbox=box, arrowprops=line)
    axes.set(xticks=[], yticks=[], xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5))


def places(masks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each mask a pixel of its own, and a place for its number: near, on no mask if there is room, on no number.

    masks bool (K', S, S) -> pairs of (x, y).
    """
    import numpy as np

    size = masks.shape[-1]
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    directions = np.stack([np.sin(angles), -np.cos(angles)], 1)
    radii = np.arange(0.1, 0.6, 0.03) * size
    steps = np.concatenate([radius * directions for radius in radii])  # nearest first
    on_a_mask = masks.any(0)

    taken = []
    for mask in masks:
        pixels = np.argwhere(mask)[:, ::-1]
        from_centre = pixels - pixels.mean(0)
        own = pixels[(from_centre**2).sum(1).argmin()]

        near = own + steps
        near = near[(near > 0.05 * size).all(1) & (near < 0.95 * size).all(1)]
        near = [place for place in near if is_apart(place, taken, 0.1 * size)]
        if not near:
            near = [own]
        x, y = np.array(near).astype(int).T
        free = ~on_a_mask[y, x]
        place = near[free.argmax()]  # the first of them, or of all
        taken.append(place)
        yield own, place


def is_apart(place: np.ndarray, others: list[np.ndarray], distance: float) -> bool:
    import numpy as np

    return all(np.hypot(*(place - other)) > distance for other in others)


def draw_bars(axes, whole: str, numbers: range, shares: list[float]):
    """How much was looked at the whole part, then at each object, in the colour of its outline."""
    labels = [whole]
    colours = ["white"]
    hatches = ["///"]
    for number in numbers:
        labels.append(f"object {number}")
        colours.append(colour(number))
        hatches.append("")
    bars = axes.barh(labels, shares, color=colours, edgecolor="black", hatch=hatches)
    axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=3, size=9)
    axes.tick_params("y", labelsize=9)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


# --------------------------------------------------------------------------- the program


@dataclass
class Clip:
    """What the model saw in a clip."""

    name: str
    features: Features
    unfamiliar: bool


class Program:
    """Loads the model once and asks it; a clip that cannot be used is said, and costs only its own answers."""

    def __init__(self, args):
        self.args = args
        self.model = None
        self.failures = 0

    def run(self):
        """Every clip is checked before the model is loaded, which may take minutes."""
        from vidreason import check_video

        names = []
        for name in self.args.clips:
            with self.said(name):
                check_video(name)
                names.append(name)
        if not names:
            return
        self.model = load_model(self.args.model)
        if self.args.interactive:
            self.converse(names)
            return
        several = len(self.args.clips) * len(self.args.questions) > 1
        for name in names:
            clip = self.watch(name)
            if not clip:
                continue
            for question in self.args.questions:
                self.ask(clip, question, heading=several)

    @contextmanager
    def said(self, name):
        """What goes wrong with this clip in the block is one line on stderr; the program goes on behind the block."""
        import torch

        from vidreason import VidReasonError

        try:
            yield
        except VidReasonError as error:
            say_error(error)
            self.failures += 1
        except torch.OutOfMemoryError:
            say_error(f"out of memory ({name}): use fewer --beams, a shorter --max_new_tokens or a smaller model")
            self.failures += 1

    def watch(self, name):
        """-> Clip, or None if it cannot be decoded, which has been said."""
        with self.said(name):
            features = self.model.perceive(name)
            clip = Clip(name, features, unfamiliar(features, self.args.model))
            if clip.unfamiliar:
                note = f"note: {name} looks unlike what the model was trained on; do not trust its answer"
                print(note, file=sys.stderr)
            return clip

    def ask(self, clip, question, heading):
        """Answer one question about one clip, the same whatever was asked before."""
        import torch

        args = self.args
        prompt = question or default_prompt(args.task)
        answer = predict if args.task == "predict" else reason
        with self.said(clip.name):
            if heading and not args.json:
                print(f"{clip.name}: {question}" if question else clip.name, flush=True)
            torch.manual_seed(args.seed)
            result = answer(self.model, clip.features, prompt, args)
            if args.explain:
                explain(self.model, clip.features, prompt, best_of(result), args.explain)
            if args.json:
                print_json(clip, prompt, result)
            elif heading:
                print(flush=True)

    def converse(self, names):
        """The questions of the command line, if any, then those of stdin; a line that names a clip changes to it."""
        clips = [clip for clip in map(self.watch, names) if clip]
        for question in filter(None, self.args.questions):
            self.ask_all(clips, question)
        for line in lines_of_stdin():
            if names_a_clip(line):
                clip = self.watch(line)
                clips = [clip] if clip else clips
            else:
                self.ask_all(clips, line)

    def ask_all(self, clips, question):
        """An answer of each clip; Ctrl-C breaks them off."""
        if not clips:
            say_error(f"no clip to ask about ({question}): name one first")
        try:
            for clip in clips:
                self.ask(clip, question, heading=len(clips) > 1)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print()  # the answer is broken off, the conversation is not


def default_prompt(task: str) -> str:
    """The paper's own, for want of a question."""
    from vidreason import PREDICT_PROMPT, REASON_PROMPT

    return PREDICT_PROMPT if task == "predict" else REASON_PROMPT


def best_of(result: dict) -> str:
    """The text that --explain explains: the answer, or the likeliest event if there is any."""
    if result.get("predictions"):
        return result["predictions"][0]["event"]
    return result.get("answer", "")


def print_json(clip: Clip, prompt: str, result: dict):
    row = {
        "video": clip.name,
        "question": prompt,
        **result,
        "object_tokens": int(clip.features.is_object.sum()),
        "unfamiliar": clip.unfamiliar,
    }
    print(json.dumps(row), flush=True)


def lines_of_stdin() -> Iterator[str]:
    """Lines up to an empty one or the end; whoever types them is prompted."""
    typing = sys.stdin.isatty() and sys.stdout.isatty()
    if typing:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 (input then edits lines and remembers them)
        print("Ask a question, or name another clip. An empty line ends.", file=sys.stderr)
    while True:
        try:
            line = input("> " if typing else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def load_model(directory):
    """On the GPU in bfloat16 where there is one. A model that cannot be loaded ends the program."""
    import torch

    from vidreason import VidReason, VidReasonError

    try:
        if torch.cuda.is_available():
            return VidReason.load(directory, "cuda", torch.bfloat16)
        return VidReason.load(directory)
    except VidReasonError as error:
        fail(error)
    except torch.OutOfMemoryError:
        fail(f"out of memory ({directory}): use a smaller model")


def import_libraries():
    """What an answer needs, in three quarters of the time: without looking for garbage in what stays to the end.

    Python would visit all objects of 3000 modules again and again while it makes them, and once more before it leaves.
    """
    if "vidreason" in sys.modules:  # another program calls us: its objects are not ours to freeze
        return
    gc.disable()
    import vidreason  # noqa: F401

    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # what lies frozen at the end counts as leaked to nanobind, which says so on stderr


def main(arguments=None):
    args = parse(arguments)
    warnings.filterwarnings("ignore")  # advice of libraries to programmers, not to users
    try:
        import_libraries()
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        program = Program(args)
        program.run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if program.failures:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
