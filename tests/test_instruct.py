"""data.instruct against a local server of the chat-completions protocol that misbehaves as real ones do."""

import argparse
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import write_video
from PIL import Image

from data import instruct
from data.benchmarks import read_samples
from data.endpoint import NoReply, chat
from data.instruct import ask_teacher, finished, read_reply
from data.program import guarded
from vidreason import PREDICT_PROMPT, REASON_PROMPT, VidReasonError

ROOT = Path(__file__).resolve().parent.parent
STEPS = ["The table gets brighter because a lamp comes up.", "Step 2: The lamp goes on because nobody stops it."]
GOOD = {"explanation": STEPS, "prediction": "The table will be white."}


def say(content, finish="stop", refusal=None):
    """Body of a 200; content: text, or what is put into JSON."""
    content = content if isinstance(content, str) or content is None else json.dumps(content)
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}
    choice["message"]["refusal"] = refusal
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
    return 200, {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}


def fault(status, code=None, **headers):
    return status, {"error": {"message": f"fault {status}", "type": "t", "code": code}}, headers


class Teacher(ThreadingHTTPServer):
    """plan: number of a clip -> what to answer the first, second, … time; the last stands for all others.

    An answer is what say or fault returns, or seconds to sleep. A clip is known by the size of its pictures.
    """

    daemon_threads, request_queue_size = True, 64

    def __init__(self, plan=(), delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.delay, self.greeting = dict(plan), delay, say("ok")
        self.seen, self.wrong, self.busy, self.most = defaultdict(list), [], 0, 0
        self.lock, self.url = threading.Lock(), f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def clip_of(self, body):
        """Checks what a chat request with images must be -> number of its clip."""
        (text, *images), start = body["messages"][0]["content"], "data:image/jpeg;base64,"
        for part in (  # the paper's wording, both parts
            "First, provide a step-by-step causal explanation of the events.",
            "Second, predict what is most likely to happen immediately after the clip ends.",
        ):
            assert text["type"] == "text" and part in text["text"]
        assert [part["type"] for part in images] == ["image_url"] * len(images) and body["model"] == "m"
        assert all(part["image_url"]["url"].startswith(start) for part in images)
        pictures = [Image.open(io.BytesIO(b64decode(p["image_url"]["url"][len(start) :]))) for p in images]
        assert all(picture.format == "JPEG" and picture.width == picture.height for picture in pictures)
        levels = [np.asarray(picture).mean() for picture in pictures]
        assert np.allclose(levels, [7.5 + 12 * i for i in (1, 3, 5, 7)], atol=3)  # the right frames, in order
        assert "seen at 0.2, 0.8, 1.2, 1.8 seconds" in text["text"]
        return (pictures[0].width - 64) // 2


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self.reply(fault(404))
        if isinstance(body["messages"][0]["content"], str):
            server.last = body
            return self.reply(server.greeting)
        try:
            clip = server.clip_of(body)
        except Exception as error:  # a thread cannot fail a test
            server.wrong.append(repr(error))
            return self.reply(fault(400))
        with server.lock:
            server.seen[clip].append((time.monotonic(), body["messages"], self.headers["Authorization"]))
            plan = server.plan.get(clip, [say(GOOD)])
            answer = plan[min(len(server.seen[clip]), len(plan)) - 1]
            late = isinstance(answer, float)
            server.busy += not late  # the client gives up on it, it is none of the requests under way
            server.most = max(server.most, server.busy)
        if late:
            return time.sleep(answer)
        time.sleep(server.delay)
        with server.lock:
            server.busy -= 1
        self.reply(answer)

    def reply(self, answer):
        status, body, headers = answer if len(answer) == 3 else (*answer, {})
        if not status:
            return self.connection.close()
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the client has given up

    def log_message(self, *arguments):
        pass


@pytest.fixture
def teacher(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    made = []

    def start(*arguments, **options):
        made.append(Teacher(*arguments, **options))
        return made[-1]

    yield start
    for server in made:
        server.shutdown()
        server.server_close()


def clips(folder, numbers):
    folder.mkdir()
    for n in numbers:
        write_video(folder / f"{n}.mp4", n=8, size=(96, 64 + 2 * n))  # the teacher sees the centre square
    return folder


def command(url, videos, out, *more):
    words = ["--videos", videos, "--teacher", url, "--model", "m", "--out", out, "--frames", 4]
    return ["data/instruct.py", *map(str, [*words, "--concurrency", 3, *more])]


def run(monkeypatch, capsys, *arguments):
    """data.instruct in this process -> (exit code, its one line of error or its output)"""
    monkeypatch.setattr(sys, "argv", command(*arguments))
    try:
        guarded(instruct.main)
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err.splitlines()[-1]
    return 0, capsys.readouterr().out


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


MISBEHAVIOUR = {
    3: [say("Sure! Here you go."), say({"explanation": STEPS}), say(GOOD)],
    4: [fault(429, Retry_After=1), say(GOOD)],
    5: [say(None, refusal="I cannot help with that.")],
    6: [say("The", "content_filter")],
    7: [fault(500), fault(503), say(GOOD)],
    8: [30.0],
    9: [say({**GOOD, "prediction": "..."})],
    10: [fault(400, "content_filter")],
    11: [fault(400)],
    12: [say(f"<think>a {{ b }}</think>```json\n{json.dumps(GOOD)}\n```")],
    13: [(200, b"<html>busy</html>")],
    14: [(0, b"")],
}


def gaps(server, clip):
    """Seconds between the requests about a clip."""
    times = [time_of_request for time_of_request, _, _ in server.seen[clip]]
    return np.diff(times).tolist()


def test_what_teachers_do(teacher, tmp_path, monkeypatch, capsys):
    """Malformed replies, rate limits, refusals, faults and time-outs in one run; the next one asks about the rest."""
    server = teacher(MISBEHAVIOUR, delay=0.2)
    videos, out = clips(tmp_path / "videos", range(2, 15)), tmp_path / "new" / "made.jsonl"
    (videos / "cut.mp4").write_bytes((videos / "13.mp4").read_bytes()[:-2000])
    (videos / "gone.mp4").symlink_to(videos / "nowhere")
    more = ("--tries", 3, "--timeout", 1, "--price", 2, 10)
    code, told = run(monkeypatch, capsys, server.url, videos, out, *more)
    assert code == 0 and not server.wrong, told + str(server.wrong)
    assert "5 done, 3 refused, 5 failed, 2 unreadable" in told and "10 records in all" in told
    assert "15 to ask about: very roughly" in told and f"${15 * ((200 + 300 * 4) * 2 + 250 * 10) / 1e6:.2f}" in told
    replies = 5 + 2 + 2 + 3  # good ones, useless before a good one, refusals with a reply, useless ones of 9
    assert f"{replies * 1100 / 1e6:.3g} M tokens, ${replies * (1000 * 2 + 100 * 10) / 1e6:.2f}" in told

    assert {n: len(requests) for n, requests in server.seen.items()} == {
        2: 1, 3: 3, 4: 2, 5: 1, 6: 1, 7: 3, 8: 3, 9: 3, 10: 1, 11: 1, 12: 1, 13: 1, 14: 3,
    }  # fmt: skip
    assert 2 <= server.most <= 3  # side by side, and bounded
    for requests in server.seen.values():
        assert {key for _, _, key in requests} == {"Bearer secret"}
    assert gaps(server, 4)[0] >= 1  # Retry-After; back-off alone would have waited half a second
    first, second = gaps(server, 7)
    assert 0.3 < first - 0.2 < 0.75 <= second - 0.2 + 0.01  # exponential, with up to a quarter of jitter
    asked = server.seen[3][2][1]
    assert [m["role"] for m in asked] == ["user", "assistant", "user", "assistant", "user"]
    assert asked[1]["content"] == "Sure! Here you go." and "no JSON object" in asked[2]["content"]

    failed = {row["video"]: (row["kind"], row["reason"]) for row in rows(tmp_path / "new" / "made.failed.jsonl")}
    kinds = {name: kind for name, (kind, _) in failed.items()}
    assert kinds == {
        "5.mp4": "refused", "6.mp4": "refused", "10.mp4": "refused", "8.mp4": "failed", "9.mp4": "failed",
        "11.mp4": "failed", "13.mp4": "failed", "14.mp4": "failed", "cut.mp4": "unreadable", "gone.mp4": "unreadable",
    }  # fmt: skip
    assert "I cannot help" in failed["5.mp4"][1] and "3 tries of 1 s: ReadTimeout" in failed["8.mp4"][1]
    assert "no such video" in failed["gone.mp4"][1] and "different sentences" in failed["9.mp4"][1]

    before, server.plan, server.seen = out.read_bytes(), {}, defaultdict(list)
    code, told = run(monkeypatch, capsys, server.url, videos, out, *more)
    assert code == 0 and out.read_bytes().startswith(before)
    assert "5 videos are done, 10 to ask about" in told
    assert sorted(server.seen) == [5, 6, 8, 9, 10, 11, 13, 14]  # what has failed, nothing else
    assert {row["video"] for row in rows(tmp_path / "new" / "made.failed.jsonl")} == {"cut.mp4", "gone.mp4"}
    samples = read_samples(out, videos)
    assert len(samples) == 26 == len({s.id for s in samples})
    for n in range(2, 15):
        why, what = [s for s in samples if s.video == f"{n}.mp4"]
        assert (why.question, what.question) == (REASON_PROMPT, PREDICT_PROMPT)
        assert why.answer == f"1. {STEPS[0]}\n2. The lamp goes on because nobody stops it."
        assert what.answer == GOOD["prediction"] and (videos / why.video).exists()


def test_a_killed_run_goes_on(teacher, tmp_path, monkeypatch, capsys):
    server = teacher(delay=0.15)
    videos, out = clips(tmp_path / "videos", range(2, 17)), tmp_path / "made.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "data.instruct", *command(server.url, videos, out)[1:]]
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out.exists() and len(out.read_bytes().splitlines()) >= 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = out.read_bytes()
    there = {row["video"] for row in rows(out)}
    assert 3 <= len(there) < 15 and before.endswith(b"\n")
    time.sleep(0.5)  # requests that are still under way
    server.seen = defaultdict(list)
    line = before.splitlines(keepends=True)[0].replace(b'"id": "', b'"id": "never/')
    out.write_bytes(before + line + line[:40])  # a kill inside a write: one of two records, and half a line
    code, told = run(monkeypatch, capsys, server.url, videos, out)
    assert code == 0 and f"{len(there)} videos are done, {15 - len(there)} to ask about" in told
    assert out.read_bytes().startswith(before) and b"never" not in out.read_bytes()
    expected = [f"{n}.mp4#explain" for n in range(2, 17)] + [f"{n}.mp4#predict" for n in range(2, 17)]
    assert sorted(row["id"] for row in rows(out)) == sorted(expected)
    assert sorted(f"{n}.mp4" for n in server.seen) == sorted({f"{n}.mp4" for n in range(2, 17)} - there)
    assert len(read_samples(out, videos)) == 30


def test_finished_at_every_byte(tmp_path):
    """Wherever a kill cuts the file, whole pairs of records stay and nothing else."""
    origin = {"teacher": "m", "frames": 8}
    out = tmp_path / "made.jsonl"

    def line(name, part):
        return json.dumps({**origin, "id": f"{name}#{part}", "video": name, "answer": "é"}) + "\n"

    pairs = []
    for name in ("a.mp4", "b #predict.mp4", "c.mp4"):
        pair = line(name, "explain") + line(name, "predict")
        pairs.append(pair.encode())
    whole, head = b"".join(pairs), json.dumps(origin)[:-1].encode()
    ends = {0: set(), len(pairs[0]): {"a.mp4"}, len(pairs[0] + pairs[1]): {"a.mp4", "b #predict.mp4"}}
    ends[len(whole)] = {"a.mp4", "b #predict.mp4", "c.mp4"}
    for cut in range(len(whole) + 1):
        out.write_bytes(whole[:cut])
        end = max(e for e in ends if e <= cut)
        assert finished(out, head) == ends[end] and out.read_bytes() == whole[:end]
    for other in (b'{"id": 1, "answer": "x"}\n', b'{"id": 1, "ans', whole.replace(b'"m"', b'"gpt"'), whole + b"{}"):
        out.write_bytes(other)
        with pytest.raises(VidReasonError, match=r"made\.jsonl, line \d"):
            finished(out, head)
        assert out.read_bytes() == other  # somebody else's file is left as it is


@pytest.mark.parametrize(
    "reply",
    [
        "", "I'm sorry, I can't.", "{", "[]", "{}", {"explanation": STEPS}, {**GOOD, "explanation": "one text"},
        {**GOOD, "explanation": []}, {**GOOD, "explanation": STEPS[:1]},
        {**GOOD, "explanation": [f"{STEPS[0]} {i}" for i in range(21)]},
        {**GOOD, "explanation": [STEPS[0], STEPS[0]]}, {**GOOD, "explanation": [*STEPS, 5]},
        {**GOOD, "explanation": [*STEPS, "x" * 601]}, {**GOOD, "prediction": None}, {**GOOD, "prediction": " "},
        {**GOOD, "prediction": STEPS[0]}, {"explanation": ["...", "..."], "prediction": "..."},
        json.dumps(GOOD)[:-1],
    ],
)  # fmt: skip
def test_replies_of_no_use(reply):
    with pytest.raises(ValueError):
        read_reply(reply if isinstance(reply, str) else json.dumps(reply))


def dies(path, frames):
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(path, frames):
    time.sleep(600)


@pytest.mark.parametrize("decoder, patience, says", [(dies, 300, "the decoder died"), (hangs, 1, "more than 1 s")])
def test_some_files_kill_or_hang_their_decoder(decoder, patience, says, monkeypatch):
    monkeypatch.setattr(instruct, "show", decoder)
    context, args = multiprocessing.get_context("forkserver"), argparse.Namespace(frames=4)
    outcome = ask_teacher(Path("a.mp4"), args, "", context, patience)
    assert outcome.kind == "unreadable" and says in outcome.reason and "a.mp4" in outcome.reason


def test_mistakes_of_the_user_are_one_line(teacher, tmp_path, monkeypatch, capsys):
    server = teacher({2: [fault(429, "insufficient_quota")]})
    videos, out = clips(tmp_path / "videos", [2]), tmp_path / "made.jsonl"
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.jsonl").write_text('{"id": 1, "answer": "x"}\n')
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"

    def error(says, *arguments, greeting=None):
        server.greeting = greeting or say("ok")
        start = time.monotonic()
        code, line = run(monkeypatch, capsys, *arguments)
        assert code == 2 and re.match(r"error: .+ \(.+\): \w+", line), line
        assert says in line and "secret" not in line, line
        return time.monotonic() - start

    assert error("cannot reach the endpoint", nowhere, videos, out) < 5  # no back-off for a wrong address
    error("cannot reach the endpoint", "localhost:8000/v1", videos, out)
    error("--api_key_env", server.url, videos, out, greeting=fault(401))
    error("check the model's name", server.url, videos, out, greeting=fault(404))
    error("no videos", server.url, tmp_path / "empty", out)
    error("no videos", server.url, tmp_path / "nowhere", out)
    error("check the path", server.url, videos, tmp_path / "other.jsonl" / "made.jsonl")
    error("check the path", server.url, videos, tmp_path / "empty")
    error("other.jsonl, line 1", server.url, videos, tmp_path / "other.jsonl")
    error("--price", server.url, videos, out, "--price", "cheap", "dear")
    error("top up the account", server.url, videos, out, "--tries", 1)
    server.plan = {2: [fault(400)]}
    error("no video gave records, for example: Error code: 400", server.url, videos, out)
    assert out.read_bytes() == b"" and (tmp_path / "other.jsonl").read_text() == '{"id": 1, "answer": "x"}\n'


def test_a_broken_teacher_stops_the_run(teacher, tmp_path, monkeypatch, capsys):
    """What no video can help is not asked about every video."""
    server = teacher({n: [fault(400)] for n in range(2, 12)})
    monkeypatch.setattr(instruct, "STREAK", 4)
    videos, out = clips(tmp_path / "videos", range(2, 12)), tmp_path / "made.jsonl"
    code, line = run(monkeypatch, capsys, server.url, videos, out)
    assert code == 2 and "4 videos failed in a row" in line and sum(map(len, server.seen.values())) <= 4 + 3


def test_max_videos_only_adds(teacher, tmp_path, monkeypatch, capsys):
    server, videos, out = teacher(), clips(tmp_path / "videos", range(2, 8)), tmp_path / "made.jsonl"
    for n in (2, 5):
        code, told = run(monkeypatch, capsys, server.url, videos, out, "--max_videos", n)
        assert code == 0 and len(rows(out)) == 2 * n
    assert sorted(map(len, server.seen.values())) == [1] * 5
    code, told = run(monkeypatch, capsys, "http://127.0.0.1:9/v1", videos, out, "--max_videos", 5)
    assert code == 0 and "0 to ask about" in told  # nothing to do needs no teacher


def test_chat_alone(teacher):
    """What a judge needs: text in, (text, usage, model) out, options passed on."""
    server = teacher()
    server.greeting = say("7")
    messages = [{"role": "user", "content": "?"}]
    assert chat(server.url + "/chat/completions", "m", messages, temperature=0)[:2] == ("7", (1000, 100))
    assert server.last == {"model": "m", "messages": messages, "temperature": 0}
    server.greeting = say("7", refusal="no")
    with pytest.raises(NoReply, match="no") as caught:
        chat(server.url, "m", messages)
    assert caught.value.refused and caught.value.usage == (1000, 100)
