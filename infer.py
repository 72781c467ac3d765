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

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: spinning threads cost 25x when another program is busy

import argparse
import atexit
import gc
import json
import math
import sys
import textwrap
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TOY = Path(__file__).resolve().parent / "toy" / "weights"
UNSURE = 0.5  # below this confidence the best prediction is called a guess
CANDIDATES = 8  # that predict chooses three from, unless --beams says how many
PICTURES = (".png", ".jpg", ".svg", ".pdf")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".gif")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (command line): see python infer.py --help")


def say_error(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)


def fail(message):
    say_error(message)
    raise SystemExit(2)


def parse(arguments=None):
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


def write_picture(path, write, keep=True):
    """Written aside and renamed: a half picture never stands under its name."""
    aside = path.with_name(path.name + ".partial")
    try:
        write(aside)
        os.replace(aside, path) if keep else aside.unlink()
    except OSError as error:
        fail(f"picture cannot be written: {error.strerror or error} ({path}): choose another place")


def unfamiliar(features, directory):
    """Whether a clip is unlike those the weights were trained on; False if the model directory cannot tell.

    It can if it holds familiar.safetensors: mean (D_v,), whiten (D_v, D_v) and limit () of the training clips' global
    tokens. The distance is the mean over clips of |(z - mean) @ whiten|.
    """
    from safetensors.torch import load_file

    path = Path(directory) / "familiar.safetensors"
    if not path.exists():
        return False
    known = load_file(path)
    z_global = features.z_vision[~features.is_object].float().cpu()
    return bool(((z_global - known["mean"].float()) @ known["whiten"].float()).norm(dim=1).mean() > known["limit"])


def reason(model, features, question, args):
    """Answer, streaming unless a machine reads -> the fields of the JSON object."""
    from transformers import TextStreamer

    streaming = not args.json and args.beams == 1
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True) if streaming else None
    options = {"beams": args.beams, "top_p": args.top_p, "temperature": args.temperature, "streamer": streamer}
    if args.max_new_tokens:
        options["max_new_tokens"] = args.max_new_tokens
    answer = model.answer(features, question, **options)
    if not args.json and not streaming:
        print(answer, flush=True)
    return {"answer": answer}


def predict(model, features, question, args):
    """The three likeliest next events; the confidence of each is its share of the likelihood of all that was found.

    "Nothing more happens" is not among them unless the model says so by itself.
    """
    from vidreason import CAPTION_PROMPT

    length = {"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {}
    found = model.answer_batch([features], [question], beams=args.beams, answers=args.beams, **length)
    texts = [text for text in dict.fromkeys(found) if text]
    shares = model.option_logprobs(features, question, texts).softmax(0).tolist() if texts else []
    because = model.answer(features, CAPTION_PROMPT, **length)  # what the model saw is all it has to go by
    ranked = sorted(zip(shares, texts, strict=True), reverse=True)[:3]
    events = [{"event": text, "confidence": round(share, 3), "because": because} for share, text in ranked]
    unsure = not events or events[0]["confidence"] < UNSURE
    if not args.json:
        for i, event in enumerate(events, 1):
            print(f"{i}. {event['event']}   (confidence {event['confidence']:.2f})")
        print(f"because: {because}", flush=True)
        if unsure:
            print("unsure: no event is clearly the likeliest", flush=True)
    return {"predictions": events, "unsure": unsure}


def looked_at(model, features, question, answer):
    """Where the queries looked for this answer: the share of each token of Z_vision -> (N_v,), sums to 1.

    The weights of cross-attention (Eq. 3), averaged over layers and heads. Not every query matters to every answer, so
    each counts by the length of the gradient of log P(answer) with respect to its token of E_vision.
    """
    import torch

    from vidreason import Conversation, encode_pair, loss, pack

    e_vision, weights = model.fuse([features], return_weights=True)  # weights (1, layers, heads, N_q, N_v)
    e_vision = e_vision.detach().requires_grad_()
    packed = pack([Conversation([encode_pair(model.tokenizer, question, answer)])], model.config.num_queries)
    (gradient,) = torch.autograd.grad(loss(model.llm, packed.to(model.device), e_vision)[0], e_vision)
    use = gradient[0].float().norm(dim=-1).clamp(min=1e-30)  # an answer of probability 1 has no gradient
    return (use / use.sum()) @ weights[0].detach().float().mean((0, 1))


HOW_TO_READ = (
    "How to read: the video is cut into parts of equal length; each picture is the middle of one, cut to the square "
    "that the model sees. Outlines with numbers are the objects that it found there. The bars say how much it looked "
    "at each of them for this answer, and how much at all frames of the part; all bars together are 100 %. The more it "
    "looked, the thicker the outline. Numbers name outlines: a thing that is seen in two pictures has two. (Measured: "
    "the queries' cross-attention, mean over layers and heads, each query weighted by the gradient of the answer's "
    "log-likelihood.)"
)


def explain(model, features, question, answer, path):
    """Draw the keyframes with their times and masks, and looked_at as bars."""
    from matplotlib.figure import Figure

    shares = looked_at(model, features, question, answer).cpu()
    clips, most = len(features.keyframes), max(map(len, features.masks))
    rows, columns = math.ceil(clips / 4), min(clips, 4)
    width, bars = max(8, 3.2 * columns), 0.3 + 0.2 * (1 + most)  # inches
    wrap = lambda text, size: textwrap.fill(text, int(width * 72 / (0.56 * size)), break_on_hyphens=False)
    head, foot = wrap(f"Question: {question}", 13) + "\n" + wrap(f"Answer: {answer}", 13), wrap(HOW_TO_READ, 9)
    height = rows * (2.9 + bars) + 0.22 * (head.count("\n") + 1) + 0.15 * (foot.count("\n") + 1) + 0.3
    figure = Figure((width, height), dpi=100, layout="constrained")
    figure.suptitle(head, x=0.01, ha="left", size=13, parse_math=False)
    figure.supxlabel(foot, x=0.01, ha="left", size=9)
    panels = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.6, bars] * rows)
    of_objects = shares[clips:].split([len(masks) for masks in features.masks])
    number = 1
    for i, (picture, chart) in enumerate(panels.reshape(rows, 2, columns).swapaxes(1, 2).reshape(-1, 2)):
        if i >= clips:
            picture.set_axis_off()
            chart.set_axis_off()
            continue
        names = range(number, number := number + len(of_objects[i]))
        times = features.frame_times[i].tolist()
        middle, part = times[len(times) // 2], f"part {i + 1}: {times[0]:.1f} to {times[-1]:.1f} s"
        picture.set_title(f"{middle:.1f} s   ({part})", size=11)
        draw_masks(picture, features.keyframes[i], features.masks[i], names, of_objects[i] / shares.max())
        draw_bars(chart, f"all of part {i + 1}", names, [shares[i].item(), *of_objects[i].tolist()])
        chart.set(xlim=(0, 1.25 * shares.max().item()), ylim=(most + 0.6, -0.6))  # one scale, so that bars compare
    write_picture(path, lambda at: figure.savefig(at, format=path.suffix[1:].lower(), bbox_inches="tight"))


def colour(number):
    return f"C{number % 10}"


def draw_masks(axes, keyframe, masks, names, strengths):
    """The picture with outlined masks, a number beside each."""
    import numpy as np

    axes.imshow(keyframe)
    grid = np.arange(-1, len(keyframe) + 1)
    for mask, name, strength, place in zip(masks, names, strengths.tolist(), places(masks.numpy())):
        edge = np.pad(mask, 1).astype(float)  # padded: an outline closes at the border of the picture
        axes.contour(grid, grid, edge, [0.5], colors="white", linewidths=2 + 3 * strength)
        axes.contour(grid, grid, edge, [0.5], colors=[colour(name)], linewidths=0.8 + 2.5 * strength)
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colour(name)}
        axes.annotate(name, *place, ha="center", va="center", size=9, bbox=box, arrowprops={"arrowstyle": "-"})
    axes.set(xticks=[], yticks=[], xlim=(-0.5, len(keyframe) - 0.5), ylim=(len(keyframe) - 0.5, -0.5))


def places(masks):
    """For each mask a pixel of its own, and a place for its number: near, on no mask if there is room, on no number."""
    import numpy as np

    size, taken = masks.shape[-1], []
    turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring = np.concatenate([r * np.stack([np.sin(turns), -np.cos(turns)], 1) for r in np.arange(0.1, 0.6, 0.03) * size])
    for mask in masks:
        pixels = np.argwhere(mask)[:, ::-1]
        own = pixels[((pixels - pixels.mean(0)) ** 2).sum(1).argmin()]
        near = (own + ring)[((own + ring) > 0.05 * size).all(1) & ((own + ring) < 0.95 * size).all(1)]
        near = [p for p in near if all(np.hypot(*(p - other)) > 0.1 * size for other in taken)] or [own]
        x, y = np.array(near).astype(int).T
        free = ~masks.any(0)[y, x]
        taken.append(near[free.argmax()])
        yield own, taken[-1]


def draw_bars(axes, whole, names, shares):
    """How much was looked at the whole part, then at each object, in the colour of its outline."""
    labels, colours = [whole, *(f"object {name}" for name in names)], ["white", *map(colour, names)]
    bars = axes.barh(labels, shares, color=colours, edgecolor="black", hatch=["///", *[""] * len(names)])
    axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=3, size=9)
    axes.tick_params("y", labelsize=9)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


@dataclass
class Clip:
    """What the model saw in a clip."""

    name: str
    features: object  # vidreason.Features
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
            for question in self.args.questions if clip else []:
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

        from vidreason import PREDICT_PROMPT, REASON_PROMPT

        args = self.args
        answer = predict if args.task == "predict" else reason
        prompt = question or (PREDICT_PROMPT if args.task == "predict" else REASON_PROMPT)
        with self.said(clip.name):
            if heading and not args.json:
                print(f"{clip.name}: {question}" if question else clip.name, flush=True)
            torch.manual_seed(args.seed)
            result = answer(self.model, clip.features, prompt, args)
            if args.explain:
                best = result["predictions"][0]["event"] if result.get("predictions") else result.get("answer", "")
                explain(self.model, clip.features, prompt, best, args.explain)
            if args.json:
                tokens = int(clip.features.is_object.sum())
                of_clip = {"object_tokens": tokens, "unfamiliar": clip.unfamiliar}
                print(json.dumps({"video": clip.name, "question": prompt, **result, **of_clip}), flush=True)
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
        if not clips:
            say_error(f"no clip to ask about ({question}): name one first")
        try:
            for clip in clips:
                self.ask(clip, question, heading=len(clips) > 1)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print()  # the answer is broken off, the conversation is not


def lines_of_stdin():
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
