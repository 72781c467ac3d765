"""infer.py as its user meets it: a process with arguments, an exit code and two streams."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_llm, tiny_tokenizer
from PIL import Image
from safetensors.torch import save_file

import infer as program
import vidreason
from infer import TOY, explain, looked_at, main, parse, places
from vidreason import REASON_PROMPT, VideoTransformer, VidReason, build_sam

ROOT = Path(__file__).resolve().parent.parent


def save_random(config, folder):
    torch.manual_seed(0)
    VidReason(config, VideoTransformer(config), build_sam(config), tiny_llm(), tiny_tokenizer()).save(folder)
    return folder


@pytest.fixture(scope="module")
def weights(config, tmp_path_factory):
    return save_random(config, tmp_path_factory.mktemp("model"))


def infer(capsys, *arguments):
    """infer.py inside this process -> (exit code, stdout, stderr)."""
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def processes(videos, weights):
    """A few calls as real processes, two at a time: most of each is imports."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}

    def start(name):
        command = [sys.executable, ROOT / "infer.py", videos[name], "why ?", "--model", weights]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        return done.returncode, done.stdout, done.stderr

    names = ["missing", "empty", "text", "truncated", "folder", "good"]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(start, names), strict=True))


def assert_one_error_line(code, out, err):
    assert code == 2 and out == ""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and " (" in lines[0] and "): " in lines[0]


@pytest.mark.parametrize("name", ["missing", "empty", "text", "truncated", "folder"])
def test_a_bad_file_is_one_line_and_exit_code_2(processes, name):
    assert_one_error_line(*processes[name])


@pytest.mark.parametrize("name", ["plain", "broken_off", "sound"])
def test_more_bad_files(capsys, videos, weights, name):
    assert_one_error_line(*infer(capsys, videos[name], "why ?", "--model", weights))


def test_other_mistakes(capsys, videos, weights):
    good = videos["good"]
    assert_one_error_line(*infer(capsys, good, "why ?", "--model", videos["folder"]))
    assert_one_error_line(*infer(capsys))
    for options in (["--top_p", "1.5"], ["--temperature", "0"], ["--beams", "2", "--top_p", "0.5"], ["--beams", "x"]):
        assert_one_error_line(*infer(capsys, good, "why ?", "--model", weights, *options))
    for options in (["--beams", "0"], ["--max_new_tokens", "0"], ["-q", " "]):
        assert_one_error_line(*infer(capsys, good, "--model", weights, *options))


def test_a_process_streams_what_json_says(processes, capsys, videos, weights):
    code, out, err = processes["good"]
    assert code == 0 and err == ""
    code, json_out, err = infer(capsys, videos["good"], "why ?", "--json", "--model", weights)
    answer = json.loads(json_out)
    assert code == 0 and err == "" and answer["answer"].split() == out.split() and answer["answer"]
    assert answer["question"] == "why ?" and answer["unfamiliar"] is False


def test_default_question_and_decoding(capsys, videos, weights):
    call = (capsys, videos["good"], "--model", weights)
    assert json.loads(infer(*call, "--json")[1])["question"] == REASON_PROMPT
    assert infer(*call, "--beams", "3")[1].strip()
    sampled = [infer(*call, "--top_p", "0.9", "--temperature", "1.5", "--seed", seed)[1] for seed in (7, 7, 8)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len(infer(*call, "--max_new_tokens", "2")[1].split()) <= 2


def test_predictions_are_sorted_and_confidences_are_shares(capsys, videos, weights):
    call = (capsys, videos["good"], "what will happen next ?", "--task", "predict", "--model", weights)
    result = json.loads(infer(*call, "--json")[1])
    confidences = [event["confidence"] for event in result["predictions"]]
    assert 1 <= len(confidences) <= 3 and confidences == sorted(confidences, reverse=True)
    assert all(0 <= c <= 1 for c in confidences) and sum(confidences) <= 1.002
    assert result["unsure"] == (confidences[0] < 0.5) and all(event["because"] for event in result["predictions"])
    text = infer(*call)[1]
    assert text.startswith("1. ") and "because: " in text


def test_a_strange_clip_is_announced(capsys, videos, weights):
    known = {"mean": torch.full((16,), 100.0), "whiten": torch.eye(16), "limit": torch.tensor(1.0)}
    save_file(known, weights / "familiar.safetensors")
    try:
        code, out, err = infer(capsys, videos["good"], "why ?", "--json", "--model", weights)
    finally:
        (weights / "familiar.safetensors").unlink()
    assert code == 0 and json.loads(out)["unfamiliar"] is True
    assert err.startswith("note: ") and len(err.splitlines()) == 1


# ------------------------------------------------------------------------------------- several clips and questions


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the clips a.mp4 and b.mp4 and the file notes, in which the program is called."""
    for name in ("a.mp4", "b.mp4", "notes"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "line, clips, questions",
    [
        (["a.mp4", "why?"], ["a.mp4"], ["why?"]),
        (["a.mp4"], ["a.mp4"], [None]),
        (["a.mp4", "--json", "why?"], ["a.mp4"], ["why?"]),
        (["a.mp4", "b.mp4"], ["a.mp4", "b.mp4"], [None]),
        (["a.mp4", "b.mp4", "why"], ["a.mp4", "b.mp4"], ["why"]),
        (["a.mp4", "b.mp4", "-q", "why?", "-q", "what next?"], ["a.mp4", "b.mp4"], ["why?", "what next?"]),
        (["-q", "why?", "a.mp4", "--json", "b.mp4"], ["a.mp4", "b.mp4"], ["why?"]),
        (["a.mp4", "notes"], ["a.mp4", "notes"], [None]),  # an existing file is a clip, whatever its name
        (["a.mp4", "a.mp4#t=1,2"], ["a.mp4", "a.mp4#t=1,2"], [None]),
        (["a.mp4", "c.mp4"], ["a.mp4", "c.mp4"], [None]),  # a typing error is no question
        (["a.mp4", "my clip.MOV"], ["a.mp4", "my clip.MOV"], [None]),
        (["a.mp4", "c.xyz"], ["a.mp4", "c.xyz"], [None]),
        (["a.mp4", "nowhere/c"], ["a.mp4", "nowhere/c"], [None]),
        (["a.mp4", "does it stop before 3.5 s or after 4.25"], ["a.mp4"], ["does it stop before 3.5 s or after 4.25"]),
        (["a.mp4", "explain."], ["a.mp4"], ["explain."]),
        (["why?"], ["why?"], [None]),  # refused for want of such a video
    ],
)
def test_clips_are_told_from_questions(here, line, clips, questions):
    args = parse(line)
    assert (args.clips, args.questions) == (clips, questions)


@pytest.mark.parametrize(
    "line",
    [
        ["a.mp4", "why?", "what next?"],
        ["a.mp4", "why?", "b.mp4"],
        ["a.mp4", "why?", "-q", "what next?"],
        ["a.mp4", ""],
        ["a.mp4", "-q", "why?", "-q", ""],
        ["a.mp4", "b.mp4", "why?", "--explain", "out.png"],
        ["a.mp4", "-q", "why?", "-q", "what next?", "--explain", "out.png"],
        ["a.mp4", "--interactive", "--explain", "out.png"],
        ["a.mp4", "--task", "predict", "--top_p", "0.5"],
        ["a.mp4", "--task", "predict", "--temperature", "0.5"],
        ["a.mp4", "--task", "predict", "--beams", "2"],
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(here, capsys, line, monkeypatch):
    monkeypatch.setattr(VidReason, "load", lambda *_: pytest.fail("the model was loaded"))
    code, out, err = infer(capsys, *line)
    assert_one_error_line(code, out, err)
    assert "(command line)" in err


def count_calls(monkeypatch, name):
    """The method of VidReason runs as ever, and what it is called with is noted -> list of arguments."""
    method, calls = getattr(VidReason, name), []

    def noted(*arguments, **options):
        calls.append(arguments)
        return method(*arguments, **options)

    monkeypatch.setattr(VidReason, name, noted)
    return calls


def test_several_clips_and_questions_load_once_and_look_once(capsys, videos, weights, monkeypatch):
    clips, questions = [videos["good"], videos["wide"]], ["why ?", "what will happen next ?"]
    alone = []
    for clip in clips:
        for question in questions:
            alone.append(infer(capsys, clip, question, "--json", "--model", weights)[1])
    loaded, seen = count_calls(monkeypatch, "load"), count_calls(monkeypatch, "perceive")
    call = (capsys, *clips, "-q", questions[0], "-q", questions[1], "--model", weights)
    code, out, err = infer(*call, "--json")
    assert (code, err) == (0, "") and out == "".join(alone)
    assert len(loaded) == 1 and [str(video) for _, video in seen] == [str(clip) for clip in clips]

    answers = [json.loads(line)["answer"] for line in alone]
    blocks = [block.split("\n", 1) for block in infer(*call)[1].rstrip("\n").split("\n\n")]
    heads = [f"{clips[0]}: {question}" for question in questions]
    heads += [f"{clips[1]}: {question}" for question in questions]
    assert [head for head, _ in blocks] == heads
    assert [text.split() for _, text in blocks] == [answer.split() for answer in answers]


def test_without_a_question_the_clip_heads_its_answer(capsys, videos, weights):
    lines = infer(capsys, videos["good"], videos["wide"], "--task", "predict", "--model", weights)[1].splitlines()
    heads = [line for line in lines if line in (str(videos["good"]), str(videos["wide"]))]
    assert heads == [str(videos["good"]), str(videos["wide"])] and sum(line.startswith("1. ") for line in lines) == 2


@pytest.mark.parametrize("bad", ["missing", "broken_off"])  # one is found before the model is loaded, one after
def test_a_bad_clip_costs_only_its_own_answers(capsys, videos, weights, bad):
    good = infer(capsys, videos["good"], "why ?", "--json", "--model", weights)[1]
    wide = infer(capsys, videos["wide"], "why ?", "--json", "--model", weights)[1]
    line = [videos["good"], videos[bad], videos["wide"], "why ?", "--json", "--model", weights]
    code, out, err = infer(capsys, *line)
    assert code == 2 and out == good + wide
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and str(videos[bad]) in err


def test_clips_are_checked_before_the_model_is_loaded(capsys, videos, weights, monkeypatch):
    monkeypatch.setattr(VidReason, "load", lambda *_: pytest.fail("the model was loaded"))
    code, out, err = infer(capsys, videos["missing"], videos["empty"], "why ?", "--model", weights)
    assert code == 2 and out == "" and [line[:7] for line in err.splitlines()] == ["error: "] * 2


def test_a_seed_gives_the_same_answer_in_every_place(capsys, videos, weights):
    call = (capsys, videos["good"], "--json", "--model", weights, "--temperature", "1.5", "--seed", "7")
    alone = infer(*call, "why ?")[1]
    assert infer(*call, "-q", "what next ?", "-q", "why ?", "-q", "why ?")[1].splitlines()[1:] == [alone.strip()] * 2
    assert infer(*call[:-1], "8", "why ?")[1] != alone


def test_object_tokens_are_counted_over_keyframes(capsys, videos, weights):
    result = json.loads(infer(capsys, videos["good"], "why ?", "--json", "--model", weights)[1])
    masks = VidReason.load(weights).perceive(videos["good"]).masks
    assert result["object_tokens"] == sum(map(len, masks)) > 1 and "objects" not in result


# --------------------------------------------------------------------------------------------------- --interactive


def type_lines(monkeypatch, *lines):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(map(str, lines)).encode())))


def test_a_conversation_loads_once_and_changes_the_clip(capsys, videos, weights, monkeypatch):
    call = (capsys, "--json", "--model", weights)
    good, wide = (infer(*call, videos[name], "why ?")[1] for name in ("good", "wide"))
    loaded, seen = count_calls(monkeypatch, "load"), count_calls(monkeypatch, "perceive")
    type_lines(monkeypatch, "why ?", " why ?", videos["wide"], "why ?", "", "not read ?")
    assert infer(*call, videos["good"], "--interactive") == (0, good + good + wide, "")
    assert len(loaded) == 1 and len(seen) == 2

    type_lines(monkeypatch, "why ?")
    first = infer(*call, videos["good"], "what next ?")[1]
    assert infer(*call, videos["good"], "what next ?", "--interactive")[1] == first + good


def test_a_conversation_survives_a_wrong_name(capsys, videos, weights, monkeypatch):
    good = infer(capsys, videos["good"], "why ?", "--json", "--model", weights)[1]
    type_lines(monkeypatch, videos["missing"], "why ?")
    code, out, err = infer(capsys, videos["good"], "--interactive", "--json", "--model", weights)
    assert code == 2 and out == good and err.startswith("error: no such video") and len(err.splitlines()) == 1
    type_lines(monkeypatch, "why ?", videos["good"], "why ?")
    code, out, err = infer(capsys, videos["broken_off"], "--interactive", "--json", "--model", weights)
    assert code == 2 and out == good and [line[:7] for line in err.splitlines()] == ["error: "] * 2


def test_each_of_several_clips_answers_in_a_conversation(capsys, videos, weights, monkeypatch):
    type_lines(monkeypatch, "why ?")
    out = infer(capsys, videos["good"], videos["wide"], "--interactive", "--model", weights)[1]
    heads = [block.splitlines()[0] for block in out.strip().split("\n\n")]
    assert heads == [f"{videos['good']}: why ?", f"{videos['wide']}: why ?"]


def test_in_a_pipe_ctrl_c_ends_without_a_traceback_and_a_terminal_is_prompted(videos, weights, tmp_path):
    endless = VidReason.load(weights)
    endless.llm.lm_head.weight.data[endless.tokenizer.eos_token_id] = 0  # some other word is always likelier
    endless.save(tmp_path / "endless")
    options = ["--interactive", "--model", tmp_path / "endless", "--max_new_tokens", "1000000"]
    command = [sys.executable, ROOT / "infer.py", videos["good"], *options]

    ours, theirs = pty.openpty()
    start = partial(subprocess.Popen, command, preexec_fn=hear_ctrl_c)
    at_terminal = start(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    piped = start(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        shown = read_until(ours, b"> ")
        os.write(ours, b"why ?\n")
        shown += read_until(ours, b"why ?\r\n")  # the terminal's echo
        shown += read_until(ours, b" ")  # a first word of the answer
        at_terminal.send_signal(signal.SIGINT)
        shown += read_until(ours, b"> ")
        os.write(ours, b"\n")
        assert at_terminal.wait(60) == 0 and shown.startswith(b"Ask a question") and b"Traceback" not in shown

        piped.stdin.write(b"why ?\nwhy ?\n")
        piped.stdin.flush()
        assert piped.stdout.read(1)
        piped.send_signal(signal.SIGINT)
        assert piped.wait(60) == 130 and piped.stderr.read() == b""
    finally:
        at_terminal.kill()
        piped.kill()
        os.close(ours)


def hear_ctrl_c():
    """Programs that are started in the background, as these tests may be, are deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_until(descriptor, end):
    """What a terminal shows, up to the end; fails when the program leaves before, or does not say it in two minutes."""
    shown = b""
    deadline = time.monotonic() + 120
    while not shown.endswith(end):
        left = deadline - time.monotonic()
        assert left > 0 and select.select([descriptor], [], [], left)[0], shown[-300:]
        shown += os.read(descriptor, 1)
    return shown


# --------------------------------------------------------------------------------------------- what an answer imports

NOT_FOR_AN_ANSWER = {
    "matplotlib": "draws: --explain, loss.png, ablations",
    "openai": "the teacher and the judge",
    "sacrebleu": "BLEU",
    "rouge_score": "ROUGE-L",
    "nltk": "WUPS",
    "pebble": "kills workers whose decoder hangs, while features are made",
    "data": "training and evaluation",
    "train": "training",
    "evaluate": "tables",
    "toy": "the toy world; an answer needs its weights only",
    "nbformat": "notebooks",
    "torch.utils.tensorboard": "curves",
}


@pytest.fixture(scope="module")
def modules(videos, weights):
    """What is imported by --help and by an answer, each in a process of its own -> two lists of names."""
    tell = "import gc, sys\nfrom infer import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n"
    tell += "    assert not stop.code\nfrozen = gc.isenabled() and gc.get_freeze_count() > 100_000\n"
    tell += "print('modules', frozen, *sys.modules)"

    def names(*arguments):
        command = [sys.executable, "-c", tell, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return done.stdout.splitlines()[-1].split()[1:]

    return names("--help"), names(videos["good"], "why ?", "--model", weights)


def test_an_answer_imports_nothing_that_only_training_or_tables_need(modules):
    _, (frozen, *names) = modules
    assert "vidreason" in names and not {name for name in NOT_FOR_AN_ANSWER if name in names}
    assert frozen == "True"  # the garbage collector is back, and leaves what was imported alone


def test_help_imports_no_library_and_shows_examples(modules, capsys):
    (_, *names), _ = modules
    assert not {"torch", "transformers", "numpy", "vidreason"} & set(names)
    text = infer(capsys, "--help")[1]
    assert text.count("    python infer.py ") >= 8 and "nothing more happens" in " ".join(text.split())


# -------------------------------------------------------------------------------------------------------- --explain


@pytest.mark.parametrize("ending", ["png", "jpg", "svg", "pdf"])
def test_explain_makes_a_picture_beside_the_answer(capsys, videos, weights, tmp_path, ending):
    call = (capsys, videos["wide"], "why ?", "--model", weights)
    picture = tmp_path / f"out.{ending}"
    assert infer(*call, "--explain", picture) == infer(*call)
    assert list(tmp_path.iterdir()) == [picture]
    magic = {"png": b"\x89PNG", "jpg": b"\xff\xd8\xff", "svg": b"<?xml", "pdf": b"%PDF"}
    assert picture.read_bytes().startswith(magic[ending])
    if ending in ("png", "jpg"):
        width, height = Image.open(picture).size
        assert 1000 < width < 1600 and 400 < height < 1000 and np.asarray(Image.open(picture)).std() > 10


def test_explain_wraps_long_words_and_works_with_the_other_options(capsys, videos, weights, tmp_path):
    call = (capsys, videos["good"], "--model", weights, "--explain", tmp_path / "out.png")
    height = {}
    for question in ("why $5 ?", "why did it cost $5 and then $6 ? " * 20):
        answer = json.loads(infer(*call, question, "--json")[1])["answer"]
        assert answer
        width, height[question] = Image.open(tmp_path / "out.png").size
        assert width < 1600
    assert len({*height.values()}) == 2
    code, out, err = infer(*call, "--task", "predict")
    assert code == 0 and err == "" and out.startswith("1. ")


def test_explain_without_a_single_mask(capsys, config, videos, tmp_path):
    folder = save_random(replace(config, sam_iou_threshold=99.0, num_clips=5), tmp_path / "model")
    capsys.readouterr()  # saving shows its progress
    call = (capsys, videos["good"], "why ?", "--json", "--model", folder)
    code, out, err = infer(*call, "--explain", tmp_path / "out.png")
    assert code == 0 and err == "" and json.loads(out)["object_tokens"] == 0
    assert Image.open(tmp_path / "out.png").size[0] > 1000


def test_a_picture_that_cannot_be_written_is_said_before_the_slow_work(capsys, videos, weights, monkeypatch, tmp_path):
    monkeypatch.setattr(VidReason, "load", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "old.png").write_text("old")
    for name in ("out.gif", "out", "folder.png", "nowhere/out.png", "old.png/out.png"):
        call = (capsys, videos["good"], "why ?", "--model", weights)
        assert_one_error_line(*infer(*call, "--explain", tmp_path / name))
    assert_one_error_line(*infer(capsys, videos["missing"], "--explain", tmp_path / "old.png"))
    assert (tmp_path / "old.png").read_text() == "old" and len([*tmp_path.iterdir()]) == 2


def test_shares_are_of_this_answer_and_none_goes_to_a_masked_token(model, videos, monkeypatch):
    features = model.perceive(videos["good"])
    shares = looked_at(model, features, "why ?", "the ball hit the egg")
    assert shares.shape == features.times.shape and shares.min() > 0 and shares.sum().item() == pytest.approx(1)
    assert torch.equal(shares, looked_at(model, features, "why ?", "the ball hit the egg"))
    assert not torch.allclose(shares, looked_at(model, features, "why ?", "a red box"), atol=1e-6)

    def without_token_5(features):
        z_vision, times, key_mask = collate(features)
        return z_vision, times, key_mask & (torch.arange(key_mask.shape[1]) != 5)

    collate = vidreason.collate_features
    monkeypatch.setattr(vidreason, "collate_features", without_token_5)
    shares = looked_at(model, features, "why ?", "the ball hit the egg")
    assert shares[5] == 0 and shares.sum().item() == pytest.approx(1)


def test_every_share_is_drawn_under_its_own_picture(model, videos, monkeypatch, tmp_path):
    features = model.perceive(videos["good"])
    features.masks[1] = features.masks[1][:0]  # a keyframe without objects between two that have some
    keep = ~(features.is_object & (features.times == 1.5))
    features = replace(features, **{name: getattr(features, name)[keep] for name in ("z_vision", "times", "is_object")})
    shares, drawn = looked_at(model, features, "why ?", "the ball hit the egg").tolist(), []
    monkeypatch.setattr(program, "draw_bars", lambda axes, *bars: drawn.append(bars))
    explain(model, features, "why ?", "the ball hit the egg", tmp_path / "out.png")
    assert [whole for whole, _, _ in drawn] == [f"all of part {i}" for i in (1, 2, 3, 4)]
    assert [bars[0] for _, _, bars in drawn] == pytest.approx(shares[:4])
    numbered = {}
    for _, numbers, bars in drawn:
        numbered |= zip(numbers, bars[1:], strict=True)
    assert numbered == pytest.approx(dict(enumerate(shares[4:], 1))) and list(drawn[1][1]) == []


def change_without(model, features, question):
    """How much log P of the answer changes without the token that was looked at most, and without the least."""
    answer = model.answer(features, question)
    shares = looked_at(model, features, question, answer)
    keep = [torch.arange(len(shares)) != token for token in (shares.argmax(), shares.argmin())]
    less = [replace(features, z_vision=features.z_vision[k], times=features.times[k]) for k in keep]
    whole, most, least = (model.option_logprobs(f, question, [answer])[0] for f in (features, *less))
    return torch.stack([most - whole, least - whole]).abs()


def test_an_answer_changes_more_without_what_was_looked_at_most():
    """The shipped model, ten clips; for one question of each type about every clip run this file as a script."""
    torch.set_num_threads(1)
    model = VidReason.load(TOY)
    clips = sorted((ROOT / "toy" / "clips").glob("*.mp4"))[:10]
    changes = torch.stack([change_without(model, model.perceive(clip), "why?") for clip in clips])
    most, least = changes.T
    assert (most > least).sum() >= 8 and most.sum() > 3 * least.sum(), changes


def test_numbers_stand_near_their_masks_and_apart():
    masks = np.zeros((4, 96, 96), bool)
    masks[0, 10:20, 10:20] = masks[1, 12:20, 10:20] = True  # nearly the same
    masks[2, 80:, 80:] = True  # in a corner
    masks[3] = True  # the whole picture
    found = [*places(masks)]
    for mask, (own, place) in zip(masks, found):
        assert mask[own[1], own[0]] and 0 < min(place) and max(place) < 96 and np.hypot(*(place - own)) < 30
    numbers = np.array([place for _, place in found])
    apart = np.hypot(*(numbers[:, None] - numbers[None]).transpose(2, 0, 1)) + 99 * np.eye(4)
    assert apart.min() > 9


if __name__ == "__main__":
    rows = [json.loads(line) for line in (ROOT / "toy" / "clips" / "samples.jsonl").read_text().splitlines()]
    asked, model, wins = {(row["video"], row["type"]): row["question"] for row in rows}, VidReason.load(TOY), 0
    videos = {video for video, _ in asked}
    seen = {video: model.perceive(ROOT / "toy" / "clips" / video) for video in videos}
    for (video, _), question in asked.items():
        most, least = change_without(model, seen[video], question)
        wins += bool(most > least)
    print(f"of {len(asked)} answers {wins} change more without the most looked-at token than without the least")
