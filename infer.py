"""One clip, one question, one answer.

    python infer.py clip.mp4 "why?"                     # streams the answer
    python infer.py clip.mp4                            # explains step by step what happened (the paper's prompt)
    python infer.py clip.mp4 --task predict             # three next events, each with a confidence, best first
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
import sys
import warnings
from pathlib import Path

TOY = Path(__file__).resolve().parent / "toy" / "weights"
UNSURE = 0.5  # below this confidence the best prediction is called a guess


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (command line): see python infer.py --help")


def fail(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def parse(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", help="any file that FFmpeg reads")
    parser.add_argument("question", nargs="?", help="left out: the paper's prompt for the task")
    parser.add_argument(
        "--task", choices=["reason", "predict"], default="reason", help="explain, or say what comes next"
    )
    parser.add_argument("--model", default=TOY, help="model directory (default: the toy's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--beams", type=int, default=1, help="beam search with so many beams")
    parser.add_argument(
        "--top_p", type=float, help="nucleus sampling: the most likely words that make up this probability"
    )
    parser.add_argument("--temperature", type=float, help="below 1 plays safe, above 1 takes risks; turns sampling on")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer (default: the model's)")
    args = parser.parse_args(arguments)
    if args.beams < 1 or (args.max_new_tokens is not None and args.max_new_tokens < 1):
        parser.error("--beams and --max_new_tokens must be 1 or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error("--top_p must be above 0 and at most 1")
    if args.temperature is not None and args.temperature <= 0:
        parser.error("--temperature must be above 0; leave it out for the most likely answer")
    if args.beams > 1 and (args.top_p or args.temperature):
        parser.error("--beams searches, --top_p and --temperature sample: choose one")
    return args


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
