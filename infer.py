"""One clip, one question, one answer.

    python infer.py clip.mp4 "why?"                     # streams the answer
    python infer.py clip.mp4                            # explains step by step what happened (the paper's prompt)
    python infer.py clip.mp4 --task predict             # three next events, each with a confidence, best first
    python infer.py clip.mp4 "why?" --explain out.png   # draws what was found in the clip and where the model looked
    python infer.py clip.mp4 "why?" --json              # one JSON object, for machines
    python infer.py clip.mp4 "why?" --model runs/mine   # another model directory than the toy's
    python infer.py clip.mp4 "why?" --top_p 0.9 --temperature 0.7 --seed 1

A mistake of yours is one line on stderr, "error: <what> (<where>): <what to do>", and exit code 2.
"""

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: spinning threads cost 25x when another program is busy

import argparse
import json
import math
import sys
import textwrap
import warnings
from pathlib import Path

TOY = Path(__file__).resolve().parent / "toy" / "weights"
UNSURE = 0.5  # below this confidence the best prediction is called a guess
PICTURES = (".png", ".jpg", ".svg", ".pdf")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (command line): see python infer.py --help")


def fail(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def parse(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", help="any file that FFmpeg reads; film.mp4#t=3,8 is its seconds 3 to 8")
    parser.add_argument("question", nargs="?", help="left out: the paper's prompt for the task")
    parser.add_argument(
        "--task", choices=["reason", "predict"], default="reason", help="explain, or say what comes next"
    )
    parser.add_argument("--model", default=TOY, help="model directory (default: the toy's)")
    where = "draw what the model found and where it looked for this answer: a .png, .jpg, .svg or .pdf"
    parser.add_argument("--explain", type=Path, metavar="PICTURE", help=where)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--beams", type=int, default=1, help="beam search with so many beams")
    parser.add_argument(
        "--top_p", type=float, help="nucleus sampling: the most likely words that make up this probability"
    )
    parser.add_argument("--temperature", type=float, help="below 1 plays safe, above 1 takes risks; turns sampling on")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer (default: the model's)")
    args = parser.parse_intermixed_args(arguments)  # the question may stand behind the options
    if args.beams < 1 or (args.max_new_tokens is not None and args.max_new_tokens < 1):
        parser.error("--beams and --max_new_tokens must be 1 or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error("--top_p must be above 0 and at most 1")
    if args.temperature is not None and args.temperature <= 0:
        parser.error("--temperature must be above 0; leave it out for the most likely answer")
    if args.beams > 1 and (args.top_p or args.temperature):
        parser.error("--beams searches, --top_p and --temperature sample: choose one")
    if args.explain:
        check_picture(args.explain)
    return args


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
        print(answer)
    return {"answer": answer}


def predict(model, features, question, args):
    """The three likeliest next events; the confidence of each is its share of the likelihood of all that was found."""
    from vidreason import CAPTION_PROMPT

    length = {"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {}
    beams = max(8, args.beams)
    found = model.answer_batch([features], [question], beams=beams, answers=beams, **length)
    texts = [text for text in dict.fromkeys(found) if text]
    shares = model.option_logprobs(features, question, texts).softmax(0).tolist() if texts else []
    because = model.answer(features, CAPTION_PROMPT, **length)  # what the model saw is all it has to go by
    ranked = sorted(zip(shares, texts, strict=True), reverse=True)[:3]
    events = [{"event": text, "confidence": round(share, 3), "because": because} for share, text in ranked]
    unsure = not events or events[0]["confidence"] < UNSURE
    if not args.json:
        for i, event in enumerate(events, 1):
            print(f"{i}. {event['event']}   (confidence {event['confidence']:.2f})")
        print(f"because: {because}")
        if unsure:
            print("unsure: no event is clearly the likeliest")
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


def main(arguments=None):
    args = parse(arguments)
    warnings.filterwarnings("ignore")  # advice of libraries to programmers, not to users
    import torch
    import transformers

    from vidreason import PREDICT_PROMPT, REASON_PROMPT, VidReason, VidReasonError, check_video

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gpu = torch.cuda.is_available()
    question = args.question or (PREDICT_PROMPT if args.task == "predict" else REASON_PROMPT)
    try:
        check_video(args.video)  # a typo should not cost the minutes that a large model takes to load
        device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
        model = VidReason.load(args.model, device, dtype)
        torch.manual_seed(args.seed)
        features = model.perceive(args.video)
        stranger = unfamiliar(features, args.model)
        if stranger:
            print(
                "note: this clip looks unlike those the model was trained on; do not trust its answer", file=sys.stderr
            )
        result = (predict if args.task == "predict" else reason)(model, features, question, args)
        if args.explain:
            best = result["predictions"][0]["event"] if result.get("predictions") else result.get("answer", "")
            explain(model, features, question, best, args.explain)
    except VidReasonError as error:
        fail(error)
    except torch.OutOfMemoryError:
        fail(f"out of memory ({args.model}): use fewer --beams, a shorter --max_new_tokens or a smaller model")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if args.json:
        objects = int(features.is_object.sum())
        print(
            json.dumps(
                {"video": args.video, "question": question, **result, "objects": objects, "unfamiliar": stranger}
            )
        )


if __name__ == "__main__":
    main()
