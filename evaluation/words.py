"""Open answers (§4.3.2): BLEU, ROUGE, METEOR, CIDEr, BERTScore, WUPS."""

import importlib
import itertools
import re
import shutil
from functools import cache
from types import SimpleNamespace

import numpy as np

from evaluation.choice import words
from vidreason import VidReasonError


def bleu_rouge(said, truths):
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    streams = [*itertools.zip_longest(*truths)]  # sacrebleu wants the first references of all, then the second …
    scores = {}
    for n in (1, 2, 3, 4):
        bleu = BLEU(max_ngram_order=n, tokenize="none", smooth_method="none", force=True)
        scores[f"BLEU-{n}"] = bleu.corpus_score(said, streams).score / 100
    rouge = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=str.split))  # its own keeps a-z and digits only
    scores["ROUGE-L"] = np.mean([rouge.score_multi(t, s)["rougeL"].fmeasure for s, t in zip(said, truths, strict=True)])
    return scores


def coco(name, said, truths):
    """COCO's own METEOR (1.5, a Java program that comes with the package) or CIDEr."""
    scorer = getattr(importlib.import_module(f"pycocoevalcap.{name.lower()}.{name.lower()}"), name.title())
    if name == "METEOR" and not shutil.which("java"):
        raise ImportError("METEOR needs Java: install a Java runtime (on Debian: apt install default-jre-headless)")
    if name == "CIDEr" and len(said) < 2:
        raise ImportError("CIDEr weighs words by how rare they are among the references: give two questions or more")
    return {name: scorer().compute_score(dict(enumerate(truths)), {i: [s] for i, s in enumerate(said)})[0]}


def bertscore(model, predictions, references):
    import bert_score
    from transformers import AutoConfig

    full = [i for i, p in enumerate(predictions) if p.strip()]  # bert_score fails on nothing; nothing scores 0
    texts = [predictions[i] for i in full], [references[i] for i in full]
    try:  # for a known model the layer that the metric's authors chose
        layers = bert_score.model2layers.get(str(model)) or AutoConfig.from_pretrained(model).num_hidden_layers
        f1 = bert_score.score(*texts, model_type=str(model), num_layers=layers)[2].sum() if full else 0
    except OSError as error:
        raise ImportError(f"BERTScore needs the model {model}: give --bert_model a folder that holds one") from error
    return {"BERTScore": f1 / len(predictions)}


NEXT_OE_STOPWORDS = frozenset((  # its stopwords.txt, which is not NLTK's: "not", "on", "up" and their like count
    "i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his "
    "himself she she's her hers herself it it's its itself they them their theirs themselves what which who whom this "
    "that that'll these those am is are was were be been being have has had having do does did doing a an the and but "
    "if or because as until while to from of at for with about into through during again further then here there when "
    "where why how all any each most other some such only own so than too very s t can will just don don't should "
    "should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't "
    "haven haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't "
    "weren weren't won won't wouldn wouldn't "
).split())  # fmt: skip
WORDNET_TAGS = {"NN": "n", "JJ": "a", "VB": "v", "RB": "r"}


@cache
def word_similarity(a, b):
    """Wu-Palmer similarity of two words' first senses, from 0 to 1."""
    from nltk.corpus import wordnet

    first, second = wordnet.synsets(a), wordnet.synsets(b)
    if a == b or not first or not second:
        return float(a == b)
    # NLTK since 3.6 also joins a noun with a verb at a root above both, which costs the published scores a point
    return first[0].wup_similarity(second[0], simulate_root=first[0].pos() == "v") or 0.0


@cache
def lemma_of(word, tag):
    from nltk import PorterStemmer, WordNetLemmatizer, pos_tag
    from nltk.corpus import wordnet

    tag = tag or WORDNET_TAGS.get(pos_tag([word])[0][1][:2], "n")
    found = (WordNetLemmatizer().lemmatize(word, tag), PorterStemmer().stem(word))
    return next((lemma for lemma in found if wordnet.synsets(lemma)), word)


def wups(said, truth, equal=False):
    """NExT-OE's WUPS@0 of two short answers (its eval_oe.py and metrics.py, and pywsd's lemmatize_sentence, which they
    call): every word with its nearest of the other answer, multiplied, the lower of both directions. A word that is
    near none is left out, as there. equal: lemmas without stop words must be equal, as for its yes-or-no questions and
    counts. ImportError if NLTK's data are not there."""
    from nltk import TreebankWordTokenizer, pos_tag

    def lemmas(text):
        sentences = re.split(r"(?<=[.!?])\s+", text)  # the tokenizer parts a full stop from the last word only
        tagged = pos_tag([token for s in sentences for token in TreebankWordTokenizer().tokenize(s)])
        found = [lemma_of(word.lower(), WORDNET_TAGS.get(tag[:2])) for word, tag in tagged]
        return [lemma for lemma in found if lemma not in NEXT_OE_STOPWORDS]

    def one_way(words, others):
        near = [max((word_similarity(word, other) for other in others), default=0) for word in words]
        return float(np.prod([n for n in near if n])) if any(near) else 0.0

    try:
        said, truth = lemmas(said), lemmas(truth)
        return float(said == truth) if equal else min(one_way(said, truth), one_way(truth, said))
    except LookupError as error:  # NLTK's, of a screenful
        need = "python -m nltk.downloader wordnet averaged_perceptron_tagger_eng"
        raise ImportError(f"WUPS needs WordNet and a tagger: {need}") from error


def open_ended(predictions, references, bert_model="roberta-large"):
    """§4.3.2: BLEU-1…4, ROUGE-L, METEOR, CIDEr, BERTScore (F1), and matches; `references`: one text or a list for each.

    All from 0 to 1, but CIDEr, whose customary scale ends at 10. As in COCO's evaluation the n-gram metrics read lower
    case without punctuation, and BLEU is unsmoothed. What cannot be computed is None, and "missing" says what to do.
    """
    references = [[r] if isinstance(r, str) else list(r) for r in references]
    if not predictions or len(predictions) != len(references) or not all(references):
        raise VidReasonError("every prediction needs a reference (open-ended answers): check that the files match")
    said, truths = [words(p).strip() for p in predictions], [[words(r).strip() for r in rs] for rs in references]
    pairs = [*zip(predictions, references, strict=True)]
    bare = lambda text: re.sub(r"\b(?:an?|the) ", "", words(text))
    scores = {
        "exact": np.mean([p.strip() in [r.strip() for r in rs] for p, rs in pairs]),
        "normalised": np.mean([bool(bare(p).strip()) and bare(p) in map(bare, rs) for p, rs in pairs]),
    }
    missing, bleu = {}, ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
    for names, library, metric in (
        (bleu, "sacrebleu rouge-score", lambda: bleu_rouge(said, truths)),
        (["METEOR"], "pycocoevalcap", lambda: coco("METEOR", said, truths)),
        (["CIDEr"], "pycocoevalcap", lambda: coco("CIDEr", said, truths)),
        (["BERTScore"], "bert-score", lambda: bertscore(bert_model, predictions, references)),
    ):
        try:
            scores |= metric()
        except ImportError as error:  # one with a name is Python's own
            why = f"{', '.join(names)}: pip install {library}" if error.name else str(error)
            scores |= dict.fromkeys(names)
            missing |= dict.fromkeys(names, why)
    scores = {name: None if value is None else round(float(value), 4) for name, value in scores.items()}
    return {**scores, "n": len(predictions), "missing": missing}
