"""Open answers (§4.3.2): BLEU, ROUGE, METEOR, CIDEr, BERTScore in `open_ended`; WUPS apart, for NExT-OE asks it."""

import importlib
import itertools
import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace

import numpy as np

from evaluation.choice import plain_words
from vidreason import VidReasonError

# --------------------------------------------------------------------------- metrics of libraries


def bleu_rouge(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU-1 to 4, unsmoothed, and ROUGE-L, of plain words."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    streams = list(itertools.zip_longest(*references))  # the first references of all, then the second ones
    scores = {}
    for n in (1, 2, 3, 4):
        bleu = BLEU(max_ngram_order=n, tokenize="none", smooth_method="none", force=True)
        scores[f"BLEU-{n}"] = bleu.corpus_score(predictions, streams).score / 100

    rouge = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=str.split))  # its own keeps a-z and digits only
    per_answer = []
    for prediction, texts in zip(predictions, references, strict=True):
        per_answer.append(rouge.score_multi(texts, prediction)["rougeL"].fmeasure)
    return scores | {"ROUGE-L": np.mean(per_answer)}


def coco(name: str, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """COCO's own METEOR (1.5, a Java program that comes with the package) or CIDEr."""
    module = importlib.import_module(f"pycocoevalcap.{name.lower()}.{name.lower()}")
    if name == "METEOR" and not shutil.which("java"):
        raise ImportError("METEOR needs Java: install a Java runtime (on Debian: apt install default-jre-headless)")
    if name == "CIDEr" and len(predictions) < 2:
        raise ImportError("CIDEr weighs words by how rare they are among the references: give two questions or more")
    scorer = getattr(module, name.title())()
    score, _ = scorer.compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(predictions)})
    return {name: score}


def bertscore(model: str, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """BERTScore's F1 under `model`, a hub id or a folder; an empty prediction scores 0."""
    import bert_score
    from transformers import AutoConfig

    full = [i for i, prediction in enumerate(predictions) if prediction.strip()]  # bert_score fails on nothing
    texts = [predictions[i] for i in full], [references[i] for i in full]
    try:
        layers = bert_score.model2layers.get(str(model))  # for a known model the layer that the metric's authors chose
        layers = layers or AutoConfig.from_pretrained(model).num_hidden_layers
        f1 = bert_score.score(*texts, model_type=str(model), num_layers=layers)[2].sum() if full else 0
    except OSError as error:
        raise ImportError(f"BERTScore needs the model {model}: give --bert_model a folder that holds one") from error
    return {"BERTScore": f1 / len(predictions)}


# --------------------------------------------------------------------------- WUPS

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
def word_similarity(a: str, b: str) -> float:
    """Wu-Palmer similarity of two words' first senses, from 0 to 1."""
    from nltk.corpus import wordnet

    first, second = wordnet.synsets(a), wordnet.synsets(b)
    if a == b or not first or not second:
        return float(a == b)
    # NLTK since 3.6 also joins a noun with a verb at a root above both, which costs the published scores a point
    return first[0].wup_similarity(second[0], simulate_root=first[0].pos() == "v") or 0.0


@cache
def lemma_of(word: str, tag: str | None) -> str:
    """The word as WordNet has it; tag: one of WordNet's parts of speech, None: the word alone tells it."""
    from nltk import PorterStemmer, WordNetLemmatizer, pos_tag
    from nltk.corpus import wordnet

    if not tag:
        tag = WORDNET_TAGS.get(pos_tag([word])[0][1][:2], "n")
    for lemma in (WordNetLemmatizer().lemmatize(word, tag), PorterStemmer().stem(word)):
        if wordnet.synsets(lemma):
            return lemma
    return word


def lemmas_of(text: str) -> list[str]:
    """What pywsd's lemmatize_sentence makes of a text, without NExT-OE's stop words."""
    from nltk import TreebankWordTokenizer, pos_tag

    tokens = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):  # the tokenizer parts a full stop from the last word only
        tokens += TreebankWordTokenizer().tokenize(sentence)
    lemmas = [lemma_of(word.lower(), WORDNET_TAGS.get(tag[:2])) for word, tag in pos_tag(tokens)]
    return [lemma for lemma in lemmas if lemma not in NEXT_OE_STOPWORDS]


def near_in(lemmas: list[str], others: list[str]) -> float:
    """Every word's similarity to its nearest of the others, multiplied. A word that is near none is left out."""
    nearest = []
    for lemma in lemmas:
        similarities = [word_similarity(lemma, other) for other in others]
        nearest.append(max(similarities, default=0))
    return float(np.prod([one for one in nearest if one])) if any(nearest) else 0.0


def wups(prediction: str, reference: str, equal: bool = False) -> float:
    """NExT-OE's WUPS@0 of two short answers, from 0 to 1 (its eval_oe.py and metrics.py, and what they call).

    Every word with its nearest of the other answer, multiplied, the lower of both directions. equal: lemmas without
    stop words must be equal, as for its yes-or-no questions and counts. ImportError if NLTK's data are not there.
    """
    try:
        predicted, wanted = lemmas_of(prediction), lemmas_of(reference)
        if equal:
            return float(predicted == wanted)
        return min(near_in(predicted, wanted), near_in(wanted, predicted))
    except LookupError as error:  # NLTK's, of a screenful
        need = "python -m nltk.downloader wordnet averaged_perceptron_tagger_eng"
        raise ImportError(f"WUPS needs WordNet and a tagger: {need}") from error


# --------------------------------------------------------------------------- all of them


def without_articles(text: str) -> str:
    """Plain words without a, an, the."""
    return re.sub(r"\b(?:an?|the) ", "", plain_words(text))


def is_exact(prediction: str, references: list[str]) -> bool:
    """Letter for letter."""
    return prediction.strip() in [reference.strip() for reference in references]


def is_normalised(prediction: str, references: list[str]) -> bool:
    """Equal but for case, punctuation and articles; nothing is equal to nothing."""
    bare = without_articles(prediction)
    return bool(bare.strip()) and bare in [without_articles(reference) for reference in references]


def open_ended(
    predictions: list[str], references: list[str | list[str]], bert_model: str = "roberta-large"
) -> dict[str, float | int | dict | None]:
    """§4.3.2: BLEU-1 to 4, ROUGE-L, METEOR, CIDEr, BERTScore (F1), and matches; `references`: a text or a list each.

    All from 0 to 1, but CIDEr, whose customary scale ends at 10. As in COCO's evaluation the n-gram metrics read lower
    case without punctuation, and BLEU is unsmoothed. What cannot be computed is None, and "missing" says what to do.
    """
    references = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    if not predictions or len(predictions) != len(references) or not all(references):
        raise VidReasonError("every prediction needs a reference (open-ended answers): check that the files match")

    pairs = list(zip(predictions, references, strict=True))
    scores = {
        "exact": np.mean([is_exact(*pair) for pair in pairs]),
        "normalised": np.mean([is_normalised(*pair) for pair in pairs]),
    }
    plain_predictions = plain_texts(predictions)
    plain_references = [plain_texts(texts) for texts in references]
    missing = {}
    for names, library, metric in (
        (["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"], "sacrebleu rouge-score", bleu_rouge),
        (["METEOR"], "pycocoevalcap", partial(coco, "METEOR")),
        (["CIDEr"], "pycocoevalcap", partial(coco, "CIDEr")),
    ):
        add_metric(scores, missing, names, library, partial(metric, plain_predictions, plain_references))
    add_metric(scores, missing, ["BERTScore"], "bert-score", partial(bertscore, bert_model, predictions, references))

    rounded = {name: None if score is None else round(float(score), 4) for name, score in scores.items()}
    return {**rounded, "n": len(predictions), "missing": missing}


def plain_texts(texts: list[str]) -> list[str]:
    """Each text as the n-gram metrics read it."""
    return [plain_words(text).strip() for text in texts]


def add_metric(scores: dict, missing: dict, names: list[str], library: str, metric: Callable[[], dict]):
    """Add what `metric` gives under `names`; what cannot be computed becomes None, and `missing` says why."""
    try:
        scores |= metric()
    except ImportError as error:
        needs_library = bool(error.name)  # one with a name is Python's own
        why = f"{', '.join(names)}: pip install {library}" if needs_library else str(error)
        scores |= dict.fromkeys(names)
        missing |= dict.fromkeys(names, why)
