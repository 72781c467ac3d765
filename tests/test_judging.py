"""Replies are read as people read them; metrics equal hand computations; judges and rankers can be checked."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from test_data import ROOT

from evaluation.choice import extract_choice, yes_or_no
from evaluation.judge import judge, judge_prompt
from evaluation.people import human_sheet, read_rankings
from evaluation.score import compare, print_comparison, sign_test
from evaluation.words import bertscore, bleu_rouge, coco, open_ended
from vidreason import VidReasonError

REPLIES = Path(__file__).parent / "fixtures" / "vlm4d_replies.jsonl"
OPTIONS = ["left", "right", "not moving", "no man there"]


# --------------------------------------------------------------------------- multiple-choice replies


def test_extractor_agrees_with_people():
    """285 of the 81 720 judged replies of VLM4D. On all of them: 98.6 % decided, 99.91 % of those as published."""
    rows = [json.loads(line) for line in REPLIES.read_text().splitlines()]
    chosen = [(extract_choice(r["reply"], r["options"]), r) for r in rows]
    decided = [(str(r["options"][i]) == str(r["truth"])) == r["correct"] for i, r in chosen if i is not None]
    assert len(rows) == 285 and len(decided) >= 0.95 * len(rows) and sum(decided) >= 0.99 * len(decided)
    assert not any(r["correct"] for i, r in chosen if i is None and len(r["reply"]) < 20)  # a short reply is not lost


@pytest.mark.parametrize(
    "reply, choice",
    [
        ("The answer is (B)", 1),
        ("Final answer: b", 1),
        (r"so \boxed{C}", 2),
        (r"$\boxed{\text{C}}$", 2),
        (r"The final answer is: $\mathbf{A}$.", 0),
        ("The answer is most likely option C.", 2),
        ("The correct option is A's neighbour", None),
        ('{"answer": "D"}', 3),
        ('{"answer": "right"}', 1),
        ("<think>the answer is A</think>\n<answer>B</answer>", 1),
        ("<think>so the answer is A", None),  # cut off while it thought
        ("The answer is A. Wait: the answer is B.", 1),  # the last one wins
        ("The answer is A, which is left. That answer is consistent.", 0),
        ("Therefore, the final answer is: $B$", 1),
        ("The answer, therefore, is: A.", 0),
        ("The answer is A because he goes left and not right", 0),
        ("The best option is: **Right**", 1),
        ("A", 0),
        ("(b)", 1),
        ("**B**", 1),
        ("Some thoughts.\n\nB", 1),
        ("B: right", 1),
        ("B. A man turns", 1),
        ("A - left", 0),
        ("A man walks left", 0),  # by its text
        ("A man walks", None),
        ("Based on the video", None),
        ("Answer: A man walks right.", 1),
        ("Left is where the dog stays. The answer is that he goes right.", 1),  # the sentence that answers decides
        ("The answer is a man", None),
        ("the answer is e.g. left", 0),
        ("I", None),
        ("Answer: E", None),
        ("Therefore, the final answer is: $LETTER", None),
        ("If he turns, the answer is A. The final answer is: unknown", None),
        ("A or B", None),
        ("Answer: A or B", None),
        ("Answer: C\nD", None),
        ("A: left\nB: right\nC: not moving", None),  # the list
        ("B: left", None),  # contradicts itself
        ("not B", None),
        ("The answer is not (B)", None),
        ("not left", None),
        ("it isn't moving left", None),
        ("he is not moving", 2),
        ("left or right", None),
        ("He comes from the left. Therefore, he moves to the right.", 1),
        ("He comes from the left. Therefore, he moves on. Right?", 1),
        ("He goes left, then right.", None),
        ("It is impossible to say if he turns left.", None),
        ("<think>He turns.\nThe answer is A.\n</think>\nB", 1),  # thoughts of several lines
        ("A: left\nB: right", None),
        ("B: goes to left", None),  # a label
        ("B: he always goes to left", 1),  # an explanation
        ("He moves left. Therefore, he wins.", 0),  # a conclusion need not repeat it
        ("Left or right? Thus left at first. Hence, right.", 1),  # of conclusions the last
        ("", None),
    ],
)
def test_extractor(reply, choice):
    """Fails if one of these ways to state a choice, or none, is read as another one."""
    assert extract_choice(reply, OPTIONS) == choice


@pytest.mark.parametrize(
    "reply, options, choice",
    [
        ("the answer is A man", ["a dog", "A man", "x"], 1),
        ("It shows a red ball.", ["ball", "red ball", "blue ball"], 1),
        ("two", ["two", "two", "three"], 0),  # equal options: the first
        ("2", [1, 2, 3], 1),  # JSON ints
        ('{"answer": 2}', [1, 2, 3], 1),
        ("1", [1, -1], None),  # punctuation alone tells them apart
        ("2-4-5-1-3", ["2-4-5-3-1", "2-4-5-1-3"], 1),
        ("e", ["a", "b", "c", "d", "e"], 4),
        ("The answer is", ["", "bad"], None),
        ("The answer is a", ["x", "a"], 0),  # a letter first, but:
        ("The answer is A dog", ["it", "a cat", "A dog", "A dog"], 2),
        ("The answer is A dog rather than a cat", ["a cat", "A dog"], 1),  # what comes first is claimed
        ("The answer is 4 rather than 2", ["2", "4"], 1),
        ("It shows a ball.", ["ball", "a ball"], 1),  # the longer one, whatever their order in the alphabet
    ],
)
def test_extractor_with_awkward_options(reply, options, choice):
    """Fails if options that contain or equal one another, or are numbers, are confused."""
    assert extract_choice(reply, options) == choice


@pytest.mark.parametrize(
    "reply, choice",
    [
        ("答案是B", 1),
        ("答案：B", 1),
        ("正确答案是：C", 2),
        ("选B", 1),
        ("我选择C。", 2),
        ("答案为 A", 0),
        ("选项B是正确的", 1),
        ("答案是B选项", 1),
        ("It's not A but B", 1),
        ("It is not A, but B.", 1),
        ("Neither A nor B is right; C is", 2),
        ("not left but right", 1),
        ("I'd go with C", 2),
        ("I would go with option C.", 2),
        ("I'll choose (C).", 2),
        ("Option D is wrong because nobody hides. Therefore B", 1),
        ("Option D is wrong. Therefore, B.", 1),
        ("<|begin_of_box|>B<|end_of_box|><|user|>", 1),
        ("<|begin_of_box|>B<|end_of_box|>", 1),
        ("A\n\nThe man starts at the right and goes on.", 0),
        ("A\nThe man starts.", 0),
        ("B\nExplanation: he turns.", 1),
        ("Option C: not moving", 2),
        ("Option C: he stands still", 2),
        ("Option C", 2),
        ('{"choice": 2}', 2),
        ('{"answer": "B"}', 1),
        ('{"choice": "C"}', 2),
        ("{'answer': 'C'}", 2),
        ('{"choice": 7}', None),
        ("The answer is not A. It is C.", 2),
        ("The answer isn't A. It's C.", 2),
        ("Réponse : C", 2),
        ("La réponse est C.", 2),
        ("Ответ: C", 2),
        ("Правильный ответ — C", 2),
        ("Antwort: C", 2),
        ("Die Antwort ist C.", 2),
        ("Respuesta: C", 2),
        ("La respuesta es C", 2),
        ("Risposta: C", 2),
        ("Resposta: C", 2),
        ("답: C", 2),
        ("정답은 C입니다", 2),
        ("答えはCです", 2),
        ("C、he stands", 2),
        ("C、人没有动", 2),
        ("Ｂ", 1),
        ("（B）", 1),
        ("My choice: C", 2),
        ("I pick B.", 1),
        ("It must be C.", 2),
        ("It should be B", 1),
        ("So the answer: C", 2),
        ("C.", 2),
        ("**C**", 2),
        ("C is correct.", 2),
        ("C is the correct answer.", 2),
        ("B is wrong, C is right.", 2),
        ("The correct one is C", 2),
        ("Definitely C.", 2),
        ("I think it's B", 1),
        ("I believe the answer would be B", 1),
        ("B, because he turns", 1),
        ("B - right", 1),
        ("[B]", 1),
        ("Answer B", 1),
        ("answer: (b)", 1),
        ("(B) right", 1),
        ("Choose B", 1),
        ("Option B is correct", 1),
        ("It's A.", 0),
        ("I'm going with A.", 0),
        ("not A", None),
        ("I would not choose C", None),
        ("I wouldn't go with C", None),
        ("A or B", None),
        ("It is not B", None),
        ("Neither A nor B", None),
        ("It's a man.", None),
        ("None of the above", None),
        ("Both A and B", None),
        ("It's A or B", None),
        ("I can't choose C over D", None),
        ("Not C but left", 0),
        ("He goes right, not left", 1),
        ("right rather than left", None),
        ("Answer: None", None),
        ("E", None),
        ("I'd go with E", None),
    ],
)
def test_plain_ways_to_state_a_choice(reply, choice):
    """Fails if one of these is left undecided, or read as a choice where none is stated."""
    assert extract_choice(reply, OPTIONS) == choice


@pytest.mark.parametrize(
    "reply, choice",
    [
        ("Yesterday he went", None),
        ('He said "yes" and left', None),
        ("The sign reads “No” here", None),
        ('"Yes"', 0),
        ('The answer is "no".', 1),
        ("Yes.", 0),
        ("No, he does not.", 1),
        ("nothing", None),
        ("eyes", None),
        ('He shouts "no". Yes, it moves.', 0),
        ('Answer: "yes"', 0),
        ("He says 'yes' loudly", None),
    ],
)
def test_yes_counts_as_a_word_of_one_s_own(reply, choice):
    """Fails if "yes" counts inside another word, or where somebody in the video says it."""
    assert extract_choice(reply, ["yes", "no"]) == choice


@pytest.mark.parametrize(
    "reply, truth", [("Yes.", True), ("no", False), ("perhaps", None), (0, True), (1, False), (None, None)]
)
def test_a_choice_of_yes_or_no(reply, truth):
    """Fails if yes and no change places, or a reply that is neither, or an index, is read as a text."""
    assert yes_or_no(reply) is truth


def test_a_choice_does_not_hang_on_the_order_of_a_set():
    """Fails if options of equal length are searched in an order that another start of Python changes."""
    code = "from evaluation.choice import extract_choice as f; print(f('not C A', 'ABC'), f('not A: B', 'ABC'))"
    command = [sys.executable, "-c", code]
    choices = set()
    for seed in range(6):
        env = {**os.environ, "PYTHONHASHSEED": str(seed)}
        choices.add(subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True).stdout)
    assert len(choices) == 1


@pytest.mark.parametrize("reply", ["\n", "the answer is ", "A ", "(", "not left ", "is A or "])
def test_extractor_survives_degenerate_replies(reply):
    start = time.perf_counter()
    extract_choice(reply * (50000 // len(reply)), OPTIONS)
    assert time.perf_counter() - start < 5


# --------------------------------------------------------------------------- open-ended answers


def test_open_ended_by_hand(monkeypatch):
    pytest.importorskip("sacrebleu")
    for name in ("pycocoevalcap.cider.cider", "pycocoevalcap.meteor.meteor", "bert_score"):
        monkeypatch.setitem(sys.modules, name, None)
    found = open_ended(["On the mat sat the cat!", "A dog"], ["the cat sat on the mat", ["a dog", "one dog"]])
    # 8 of 8 words; of 5 + 1 pairs "on the", "the mat", "the cat" and "a dog"; of 4 triples "on the mat"; no 4 in a row
    assert found["BLEU-1"] == 1 and found["BLEU-2"] == round((4 / 6) ** 0.5, 4)
    assert found["BLEU-3"] == round((4 / 6 * 1 / 4) ** (1 / 3), 4) and found["BLEU-4"] == 0
    assert found["ROUGE-L"] == round((3 / 6 + 1) / 2, 4)  # "on the mat" of 6; all
    assert found["exact"] == 0 and found["normalised"] == 0.5 and found["n"] == 2
    assert found["CIDEr"] is None and "ROUGE-L" not in found["missing"]
    short = bleu_rouge(["a b"], [["a b c d", "x"]])  # the nearer reference is x
    assert short["BLEU-1"] == pytest.approx(1) and short["ROUGE-L"] == pytest.approx(2 * 2 / (2 + 4))
    assert bleu_rouge(["a b"], [["a b c d"]])["BLEU-1"] == pytest.approx(np.exp(1 - 4 / 2))
    assert bleu_rouge(["шар"], [["шар"]])["ROUGE-L"] == 1


def test_cider_by_hand():
    pytest.importorskip("pycocoevalcap")
    found = coco("CIDEr", ["red ball", "", "blue egg"], [["red ball"], ["green box"], ["blue egg rolls"]])
    # idf log 3 throughout. First: 1- and 2-grams equal, no longer ones: (1 + 1 + 0 + 0) / 4 · 10. Second: nothing.
    # Third: cosines 2/√6 and 1/√2, one bigram fewer: the Gaussian of width 6.
    third = (2 / 6**0.5 + 1 / 2**0.5) / 4 * 10 * np.exp(-1 / 72)
    assert found["CIDEr"] == pytest.approx((5 + 0 + third) / 3)
    with pytest.raises(ImportError, match="two questions"):
        coco("CIDEr", ["red"], [["red"]])


@pytest.mark.skipif(not shutil.which("java"), reason="METEOR is a Java program")
def test_meteor_by_hand():
    pytest.importorskip("pycocoevalcap")
    found = coco("METEOR", ["blue egg qqq"], [["green box", "blue egg zzz"]])
    # P = R = 2/3 with the better reference; two matches in one chunk: METEOR 1.5's penalty 0.6 · (1/2)^0.2
    assert found["METEOR"] == pytest.approx(2 / 3 * (1 - 0.6 * 0.5**0.2))


def test_bertscore(tmp_path):
    """A random BERT of two layers stands in for roberta-large, which only a download brings."""
    pytest.importorskip("bert_score")
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    vocabulary = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on mat a dog runs".split()
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=64).save_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(tmp_path)

    def score(said, truths):
        return float(bertscore(tmp_path, said, truths)["BERTScore"])

    assert score(["the cat sat"], [["the cat sat"]]) == pytest.approx(1)
    assert 0 < score(["the cat sat"], [["a dog runs on"]]) < 0.99
    # the best of two references; nothing is 0
    assert score(["the cat sat", " "], [["a dog runs on", "the cat sat"], ["a dog"]]) == pytest.approx(0.5)
    with pytest.raises(ImportError, match="--bert_model"):
        bertscore(tmp_path / "nowhere", ["a"], [["b"]])


def small_wordnet(folder):
    """NLTK's data in its own layout: WordNet with a dog, a cat and what runs, and a tagger that knows these words."""
    at, tagger = folder / "corpora" / "wordnet", folder / "taggers" / "averaged_perceptron_tagger_eng"
    at.mkdir(parents=True)
    tagger.mkdir(parents=True)
    known = {
        "noun": {"thing": "", "animal": "thing", "dog": "animal", "cat": "animal"},
        "verb": {"act": "", "move": "act", "run": "move"},
    }
    for name in ("noun", "verb", "adj", "adv"):
        text, offset = "  1 WordNet 3.0 Copyright 2006\n", {}
        for word, above in known.get(name, {}).items():
            offset[word] = len(text)
            link = f"001 @ {offset[above]:08d} {name[0]} 0000" if above else "000"
            text += f"{offset[word]:08d} 03 {name[0]} 01 {word} 0 {link} {'00 ' * (name == 'verb')}| \n"
        (at / f"data.{name}").write_text(text)
        index = [f"{word} {name[0]} 1 0 1 0 {offset[word]:08d}  \n" for word in sorted(offset)]
        (at / f"index.{name}").write_text("  1 header\n" + "".join(index))
        (at / f"{name}.exc").write_text("")
    (at / "index.sense").write_text("")
    (at / "lexnames").write_text("".join(f"{i:02d}\tx\t1\n" for i in range(45)))
    tags = {
        "dog": "NN",
        "dogs": "NNS",
        "cat": "NN",
        "animal": "NN",
        "a": "DT",
        "runs": "VBZ",
        "moves": "VBZ",
        "two": "CD",
    }
    for part, value in {"weights": {}, "tagdict": tags, "classes": sorted({*tags.values()})}.items():
        (tagger / f"averaged_perceptron_tagger_eng.{part}.json").write_text(json.dumps(value))


def test_wups_by_hand(tmp_path):
    """NExT-OE's score. Its own result file gives its published 14.76, 14.90, 46.60 and 21.48 with the whole WordNet."""
    small_wordnet(tmp_path)
    cases = [  # type, answer, what was said, score
        ("CW", "a dog", "dog", 1),  # "a" does not count
        ("CW", "cat", "Dogs", 2 * 2 / (3 + 3)),  # both one step below animal, which is the second from the top
        ("CH", "the animal", "dog", 2 * 2 / (2 + 3)),
        ("TN", "moves", "runs", 2 * 2 / (2 + 3)),  # verbs likewise
        ("TC", "dog", "runs", 0),  # a noun and a verb: nothing above both, one way at least
        ("TC", "dog", "A dog. Two", 1),  # sentences
        ("DL", "two dogs", "dog", 1),  # its quirk: a word that is near none is left out
        ("DC", "two dogs", "dog", 0),  # numbers, yes and no: all lemmas must be equal
        ("DC", "two dogs", "two dog", 1),
        ("DB", "yes", "", 0),
    ]
    rows = [f"v,1,1,1,q,{answer},{i},{kind}" for i, (kind, answer, _, _) in enumerate(cases)]
    (tmp_path / "val.csv").write_text("\n".join(["video,frame_count,width,height,question,answer,qid,type", *rows]))
    (tmp_path / "said.json").write_text(json.dumps({"v": {str(i): case[2] for i, case in enumerate(cases)}}))

    def score(folder):
        files = ["--annotations", tmp_path / "val.csv", "--predictions", tmp_path / "said.json"]
        command = [sys.executable, "evaluate.py", "nextqa-oe", *files, "--out", tmp_path / "out.json"]
        env = {**os.environ, "NLTK_DATA": str(folder), "HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((tmp_path / "out.json").read_text())

    shown, found = score(tmp_path)
    assert [item["wups"] for item in found["items"]] == pytest.approx([case[3] for case in cases])
    types = found["summary"]["by_type"]
    assert types["C"]["wups"] == pytest.approx((1 + 2 / 3 + 0.8) / 3) and types["TN"]["wups"] == pytest.approx(0.8)
    assert f"WUPS@0 {100 * found['summary']['wups']:.2f}: C 82.22, CH 80.00" in shown
    shown, found = score(tmp_path / "nowhere")
    assert "wups" not in found["summary"] and "WUPS needs WordNet and a tagger: python -m nltk.downloader" in shown


def test_missing_libraries_are_named(monkeypatch):
    for name in ("sacrebleu.metrics", "pycocoevalcap.cider.cider", "pycocoevalcap.meteor.meteor", "bert_score"):
        monkeypatch.setitem(sys.modules, name, None)
    found = open_ended(["The cat.", "a dog"], ["cat", "a dog"])
    assert (found["exact"], found["normalised"]) == (0.5, 1)
    assert found["BLEU-4"] is found["METEOR"] is found["CIDEr"] is found["BERTScore"] is None
    assert found["missing"]["CIDEr"] == "CIDEr: pip install pycocoevalcap"
    assert "sacrebleu" in found["missing"]["ROUGE-L"] and "bert-score" in found["missing"]["BERTScore"]
    with pytest.raises(VidReasonError, match="needs a reference"):
        open_ended(["a"], [])


# --------------------------------------------------------------------------- an LLM as the judge

SERVER = """
import json, re, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
asked = {}
GOOD = {"factual_grounding": 7, "logical_coherence": 8, "insightfulness": 3}
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def send(self, code, body, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for k, v in {"content-type": "application/json", "content-length": len(body), **headers}.items():
            self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self): self.send(200, asked)
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/v1/chat/completions" and body["temperature"] == 0
        prompt = body["messages"][0]["content"]
        case = re.search("Response: ([^ \\\\n]*)", prompt)[1]
        n = asked[case] = asked.get(case, 0) + 1
        say = lambda text: self.send(200, {"id": "1", "object": "chat.completion", "created": 0,
            "model": body["model"] + "-dated", "choices": [{"index": 0, "finish_reason": "stop",
            "message": {"role": "assistant", "content": text}}]})
        good = "```json\\n" + json.dumps(GOOD) + "\\n```"
        later = {"retry-after": "0.01"}
        if case == "busy" and n < 3: return self.send(429, {"error": {"message": "slow down"}}, **later)
        if case == "broken" and n < 2: return self.send(500, b"oops")
        if case == "slow" and n < 2 or case == "hang": time.sleep(2.5)
        if case == "always-busy": return self.send(429, {"error": {"message": "slow down"}}, **later)
        if case == "refused": return self.send(401, {"error": {"message": "bad key"}})
        if case == "too-long": return self.send(400, {"error": {"message": "too long"}})
        if case == "garbage": return self.send(200, b"<html>no")
        if case == "empty": return self.send(200, {"choices": []})
        if case == "null": return say(None)
        if case == "words": return say("I would give it a 7.")
        if case == "eleven": return say(json.dumps({**GOOD, "insightfulness": 11}))
        if case == "half": return say(json.dumps({**GOOD, "insightfulness": 7.5}))
        if case == "lacking": return say(json.dumps({"factual_grounding": 7}))
        if case == "second-try" and n < 2: return say("hm")
        if case == "best": return say(json.dumps(dict.fromkeys(GOOD, 10)))
        say(good)
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def server():
    """Another process that speaks the chat-completions protocol; the first word of the response says how it behaves."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    process.kill()
    process.wait()


def asked(url):
    return json.loads(urllib.request.urlopen(url).read())


def judged(url, cache, *cases, **options):
    items = [{"id": c, "question": "why {x}?", "reference": "it fell", "answer": c} for c in cases]
    return judge(items, url, "some-model", cache, timeout=1.5, tries=3, **options)


def test_judge_scores_and_reruns_for_nothing(server, tmp_path):
    cases = ("plain", "best", "busy", "broken", "slow", "second-try")
    found = judged(server, tmp_path, *cases)
    assert found["n"] == 6 and not found["failed"] and found["served_by"] == ["some-model-dated"]
    assert found["factual_grounding"] == round((5 * 7 + 10) / 6, 3) and found["insightfulness"] == round(25 / 6, 3)
    assert found["verdicts"]["best"]["logical_coherence"] == 10
    before = asked(server)
    assert before["busy"] == 3 and before["broken"] == before["slow"] == before["second-try"] == 2
    assert judged(server, tmp_path, *cases) == found and asked(server) == before
    judged(server, tmp_path, "plain", "new")
    assert asked(server) == {**before, "new": 1}
    kept = [json.loads(p.read_text()) for p in tmp_path.glob("*.json")]
    assert len(kept) == 7 and all(k["model"] == "some-model" and "why {x}?" in k["prompt"] for k in kept)
    twins = [{"id": i, "question": "?", "reference": "", "answer": "twin"} for i in (1, 2)]
    assert judge(twins, server, "some-model", tmp_path)["n"] == 2 and asked(server)["twin"] == 1
    judge(twins, server, "other-model", tmp_path)  # a verdict belongs to its judge
    assert asked(server)["twin"] == 2


def test_judge_lists_failures_and_never_scores_them(server, tmp_path):
    bad = ["hang", "always-busy", "too-long", "empty", "null", "words", "eleven", "half", "lacking", "garbage"]
    found = judged(server, tmp_path, *bad, "best")
    assert sorted(found["failed"]) == sorted(bad) and found["n"] == 1 and found["factual_grounding"] == 10
    assert "Timeout" in found["failed"]["hang"] and "429" in found["failed"]["always-busy"]
    assert "1 to 10" in found["failed"]["eleven"] and found["failed"]["words"].startswith("malformed")
    assert len([*tmp_path.glob("*.json")]) == 1  # what is no score is not kept either
    counts = asked(server)
    assert counts["hang"] == counts["always-busy"] == counts["words"] == 3 and counts["too-long"] == 1  # bounded
    assert judged(server, tmp_path, "words")["factual_grounding"] is None


def test_judge_that_cannot_work_says_so(server, tmp_path):
    with pytest.raises(VidReasonError, match="bad key"):
        judged(server, tmp_path, "refused")
    with pytest.raises(VidReasonError, match="cannot reach the endpoint"):
        judged("http://127.0.0.1:9/v1", tmp_path, "plain")
    with pytest.raises(VidReasonError, match="two with one id"):
        judged(server, tmp_path, "plain", "plain")


def test_the_judge_from_the_command_line(server, tmp_path):
    """Another system's open answers: words counted, then judged; the rerun asks nothing and gives the same."""
    rows = [{"id": i, "video": "v", "question": f"q{i}?", "answer": "it fell down here"} for i in range(3)]
    said = [{"id": i, "prediction": w} for i, w in enumerate(["plain thing", "best it fell down here", "words"])]
    for name, found in (("asked", rows), ("said", said)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
    command = [sys.executable, "evaluate.py", "jsonl", "--annotations", tmp_path / "asked.jsonl"]
    command += ["--predictions", tmp_path / "said.jsonl", "--judge_url", server, "--judge_model", "some-model"]
    command += ["--judge_cache", tmp_path / "kept", "--out", tmp_path / "out.json"]
    outs = []
    for _ in range(2):
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outs.append(json.loads((tmp_path / "out.json").read_text()))
        assert "BLEU-1" in done.stdout and "2 answers, 1 not judged" in done.stdout
    assert outs[0] == outs[1] and asked(server)["plain"] == 1
    summary, items = outs[0]["summary"], outs[0]["items"]
    assert summary["judge"]["insightfulness"] == 6.5 and items[1]["judge"]["logical_coherence"] == 10
    assert 0 < summary["open_ended"]["BLEU-1"] < 1 and summary["open_ended"]["n"] == 3


def test_judge_prompt_has_the_papers_axes():
    prompt = judge_prompt("why?", "it {fell}", "it flew")
    for text in ("Factual Grounding", "Logical Coherence", "Insightfulness"):
        assert text.lower().replace(" ", "_") in prompt
    assert "1 to 10" in prompt.replace("\n", " ") and "it {fell}" in prompt and "it flew" in prompt


# --------------------------------------------------------------------------- people as the judges


def sheet_of(folder, **options):
    clip = ROOT / "toy" / "clips" / "red-pin-stops-10.mp4"
    questions = [{"id": f"secret-{i}", "question": f"why <{i}>?", "video": clip} for i in range(12)]
    answers = {f"model-{m}": {q["id"]: f"{m} says {q['id'][-1]}" for q in questions} for m in "xyz"}
    human_sheet(questions, answers, folder, **options)
    return (folder / "index.html").read_text(), json.loads((folder / "key.json").read_text())


def test_human_sheet_is_blind_random_and_seeded(tmp_path):
    page, key = sheet_of(tmp_path / "a")
    assert "model-" not in page and "secret" not in page and page.count("data:video/mp4;base64,") == 12
    assert "why &lt;3&gt;?" in page and not (tmp_path / "a" / "clips").exists()
    orders = {tuple(q["models"].values()) for q in key["questions"].values()}
    assert len(orders) > 2 and all(sorted(o) == ["model-x", "model-y", "model-z"] for o in orders)
    for name, q in key["questions"].items():  # each letter stands beside its model's answer
        for letter, model in q["models"].items():
            line = page.split(f'data-q="{name}" data-letter="{letter}">')[1].split("</label>")[1]
            assert line.startswith(f"<b>{letter}</b> {model[-1]} says {q['id'][-1]}<")
    assert sheet_of(tmp_path / "b") == (page, key) and sheet_of(tmp_path / "c", seed=1)[1] != key
    assert len(sheet_of(tmp_path / "d", count=5)[1]["questions"]) == 5
    page, _ = sheet_of(tmp_path / "e", embed=1000)
    assert 'src="clips/q1.mp4"' in page and (tmp_path / "e" / "clips" / "q12.mp4").exists()


def test_rankings_become_wins_and_losses(tmp_path):
    _, key = sheet_of(tmp_path)
    rank = {"model-x": 1, "model-y": 3, "model-z": 3}

    def fill(name, ranks_of, **changes):
        ranks = {q: {x: ranks_of(i, m) for x, m in found["models"].items()}
                 for i, (q, found) in enumerate(key["questions"].items())}  # fmt: skip
        path = tmp_path / name
        path.write_text(json.dumps({"sheet": key["sheet"], "annotator": name, "ranks": ranks, **changes}))
        return path

    plain = fill("plain", lambda i, m: rank[m])
    xy, xz, yz = read_rankings(tmp_path / "key.json", [plain])
    assert (xy["model"], xy["against"], xy["win"], xy["n"]) == ("model-x", "model-y", 1, 12)
    assert xz["win"] == 1 and xy["p"] == 2 / 2**12
    assert (yz["win"], yz["tie"], yz["loss"], yz["p"]) == (0, 1, 0, 1)
    # two of three rank y just above x in the first nine questions: the majority counts, not by how much
    other = [fill(f"{k}", lambda i, m: 1 if (m == "model-y") == (i < 9) else 2) for k in range(2)]
    xy = read_rankings(tmp_path / "key.json", [plain, *other])[0]
    assert (xy["win"], xy["loss"], xy["n"]) == (0.25, 0.75, 12) and xy["p"] == sign_test(3, 9)
    half = fill("half", lambda i, m: 1, ranks={"q1": {"A": 1, "B": 2}})  # unfinished counts as far as it goes
    assert [r["n"] for r in read_rankings(tmp_path / "key.json", [half])] == [1]
    for changes, says in (({"sheet": "x"}, "another sheet"), ({"ranks": {"q99": {"A": 1}}}, "filled-in")):
        with pytest.raises(VidReasonError, match=says):
            read_rankings(tmp_path / "key.json", [fill("bad", lambda i, m: 1, **changes)])


def test_sign_test():
    assert sign_test(0, 0) == 1 and sign_test(3, 3) == 1
    assert sign_test(1, 8) == sign_test(8, 1) == 2 * (1 + 9) / 2**9
    assert sign_test(10000, 10400) == pytest.approx(0.00520, abs=2e-5)  # normal: z = 399 / √20400


# --------------------------------------------------------------------------- comparing result files


def result_file(path, right, **changes):
    same = {"options": None, "gold": "t", **changes}
    items = [
        {"id": str(i), "video": f"v{i // 4}", "type": "ab"[i % 2], "question": f"q{i}", "correct": bool(r), **same}
        for i, r in enumerate(right)
    ]
    path.write_text(json.dumps({"summary": {}, "items": items}))
    return path


def test_compare(tmp_path, capsys):
    right = np.random.default_rng(0).random((2, 400)) < [[0.5], [0.6]]
    a, b = (result_file(tmp_path / name, r) for name, r in zip("ab", right, strict=True))
    found = compare(a, b)
    only_a, only_b = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    assert (found["only_first_right"], found["only_second_right"]) == (only_a, only_b) and found["n"] == 400
    assert found["difference"] == pytest.approx((only_b - only_a) / 400) and found["accuracy"][0] == right[0].mean()
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    assert found["p"] == sign_test(only_a, only_b) and found["by_type"]["a"]["n"] == 200
    back = compare(b, a)
    assert back["difference"] == -found["difference"] and back["p"] == found["p"]
    same = compare(a, a)
    assert same["difference"] == 0 and same["interval"] == [0, 0] and same["p"] == 1
    print_comparison(found)
    assert f"{found['difference']:+.3f}" in capsys.readouterr().out
    # where all questions about a video go alike there are fewer facts, so the interval is wider
    whole = result_file(tmp_path / "whole", np.repeat(right[1, :100], 4))
    none = result_file(tmp_path / "none", np.zeros(400))
    once = result_file(tmp_path / "once", np.tile(right[1, :100], 4))

    def width(path):
        return np.ptp(compare(none, path)["interval"])

    assert width(whole) > 1.5 * width(once)


def test_compare_refuses_other_questions(tmp_path):
    a = result_file(tmp_path / "a", [1, 0, 1])
    other = ({"question": "else"}, {"options": ["a"]}, {"gold": "u"}, {"video": "v9"})
    for right, changes in (([1, 0, 1, 1], {}), ([1, 0], {}), *(([1, 0, 1], changes) for changes in other)):
        with pytest.raises(VidReasonError, match="questions differ"):
            compare(a, result_file(tmp_path / "b", right, **changes))
    with pytest.raises(VidReasonError, match="two with one id"):
        compare(a, result_file(tmp_path / "twice", [1, 0, 1], id="1"))
    (tmp_path / "text").write_text("{}")
    with pytest.raises(VidReasonError, match="no result file"):
        compare(a, tmp_path / "text")


# --------------------------------------------------------------------------- all replies that people judged


def agreement(folder):
    """VLM4D's processed_outputs_paper_results: how often the extractor decides, and then judges as published."""
    decided, agreed, replies = 0, 0, 0
    for path in sorted(Path(folder).rglob("*.json")):
        for row in json.loads(path.read_text()):
            options = [str(row["choices"][letter]) for letter in sorted(row["choices"])]
            choice = extract_choice(row["response"] or "", options)
            replies += 1
            if choice is not None:
                decided += 1
                agreed += (options[choice] == str(row["ground_truth_answer"])) == row["correct"]
    return f"{replies} replies: {decided / replies:.4f} decided, {agreed / decided:.4f} of these as people judged them"


if __name__ == "__main__":
    print(agreement(sys.argv[1]))
