"""How good answers are: accuracy, precision, recall, F1, ROC-AUC, exact match."""

import collections
import re
import string
from collections.abc import Sequence

import numpy as np

from batiste.tasks.config import HeadConfig
from batiste.tasks.examples import Example
from batiste.tasks.rows import Encoded, first_pieces
from batiste.tasks.step import Answers

ARTICLES = re.compile(r"\b(a|an|the)\b")


def measure(
    head: HeadConfig, examples: Sequence[Example], encoded: Encoded, answers: Answers
) -> dict[str, float]:
    """Every metric of a head over the examples that have a label for it, by its name; "examples" is
    their number, of "tags" that of words."""
    own = [index for index, example in enumerate(examples) if head.name in example.labels]
    labels = [examples[index].labels[head.name] for index in own]
    if head.kind == "similarity":
        return similarity_metrics(answers.said[head.name][own], np.array(labels, bool))
    if head.kind == "span":
        texts = [span_text(head, examples[index], encoded.reads[index], said)
                 for index, said in zip(own, answers.said[head.name][own], strict=True)]
        golden = [[examples[index].context[start:end] for start, end in label]
                  for index, label in zip(own, labels, strict=True)]
        return answer_metrics(texts, golden)
    if head.kind == "multilabel":
        told_BY = np.array([[name in label for name in head.classes] for label in labels])
        return multilabel_metrics(told_BY, answers.said[head.name][own])
    places = {name: index for index, name in enumerate(head.classes)}
    if head.kind == "sequence":
        told, logits = np.array([places[label] for label in labels]), answers.said[head.name][own]
        return class_metrics(told, logits)
    # A word that was cut off is a mistake: nothing was said of it.
    told, rows = [], []
    for index, label in zip(own, labels, strict=True):
        for token, name in zip(
                first_pieces(examples[index].text, encoded.reads[index]), label, strict=True):
            if name is not None:
                told.append(places[name])
                rows.append(np.full(len(head.classes), np.nan) if token is None
                            else answers.said[head.name][index, token])
    return class_metrics(np.array(told), np.array(rows))


def class_metrics(told: np.ndarray, logits_BY: np.ndarray) -> dict[str, float]:
    """Of one class each; logits that are NaN are of what nothing was said.

    roc_auc is of each class against the others, the mean over the classes that are told, and left
    out where all are of one.
    """
    metrics = _scikit_learn()
    silent = np.isnan(logits_BY).any(axis=1)
    said = np.where(silent, -1, np.argmax(np.nan_to_num(logits_BY), axis=1))
    classes = list(range(logits_BY.shape[1]))
    found = {"examples": len(told), "accuracy": metrics.accuracy_score(told, said)}
    found |= _precision_recall_f1(metrics, told, said, labels=classes)
    shifted = np.nan_to_num(logits_BY) - np.nan_to_num(logits_BY).max(axis=1, keepdims=True)
    p_BY = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    areas = [metrics.roc_auc_score(told == each, p_BY[:, each])
             for each in classes if 0 < (told == each).sum() < len(told)]
    return found | ({"roc_auc": float(np.mean(areas))} if areas else {})


def multilabel_metrics(told_BY: np.ndarray, logits_BY: np.ndarray) -> dict[str, float]:
    """Of any number of classes each; said is what has a logit above 0, all right an exact match."""
    metrics, said_BY = _scikit_learn(), logits_BY > 0
    found = {"examples": len(told_BY), "exact_match": metrics.accuracy_score(told_BY, said_BY)}
    found |= _precision_recall_f1(metrics, told_BY, said_BY, labels=None)
    areas = [metrics.roc_auc_score(told, logits) for told, logits in zip(told_BY.T, logits_BY.T)
             if 0 < told.sum() < len(told)]
    return found | ({"roc_auc": float(np.mean(areas))} if areas else {})


def _precision_recall_f1(metrics, told, said, labels) -> dict[str, float]:
    found = {}
    for average in ("micro", "macro"):
        values = metrics.precision_recall_fscore_support(
            told, said, labels=labels, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            found[f"{name}_{average}"] = float(value)
    return found


def similarity_metrics(x_B2D: np.ndarray, told: np.ndarray) -> dict[str, float]:
    """roc_auc of the cosines of what belongs together against what does not, if there is both;
    retrieval: how often a text's own second text is the nearest of all second texts."""
    cosines_BS = x_B2D[:, 0] @ x_B2D[:, 1].T
    own = np.flatnonzero(told)
    found = {"examples": len(told)}
    if len(own):
        found["retrieval"] = float((cosines_BS[own].argmax(axis=1) == own).mean())
    if 0 < len(own) < len(told):
        found["roc_auc"] = float(
            _scikit_learn().roc_auc_score(told, np.diagonal(cosines_BS)))
    return found


def best_span(logits_TY: np.ndarray, longest: int) -> tuple[int, int]:
    """The first and last token of the largest sum of logits; first <= last < first + longest."""
    starts, ends = logits_TY[:, 0].astype(np.float64), logits_TY[:, 1].astype(np.float64)
    sums = starts[:, None] + ends[None]
    apart = np.arange(len(ends))[None] - np.arange(len(starts))[:, None]
    sums = np.where((apart >= 0) & (apart < longest), sums, -np.inf)
    first, last = np.unravel_index(np.argmax(sums), sums.shape)
    return int(first), int(last)


def span_text(head: HeadConfig, example: Example, read, logits_TY: np.ndarray) -> str:
    """The characters of an example's context that the best span of tokens covers."""
    first, last = best_span(logits_TY[: len(read.tokens)], head.given("longest"))
    return example.context[read.spans[first][0]:read.spans[last][1]]


def answer_metrics(said: Sequence[str], golden: Sequence[Sequence[str]]) -> dict[str, float]:
    """exact_match and f1 over words, of the golden answer that fits best (SQuAD, arXiv:1606.05250).

    Both disregard case, punctuation, articles and white space.
    """
    exact = [max(float(_plain(text) == _plain(each)) for each in answers)
             for text, answers in zip(said, golden, strict=True)]
    f1 = [max(_overlap(_plain(text), _plain(each)) for each in answers)
          for text, answers in zip(said, golden, strict=True)]
    return {"examples": len(said), "exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


def _plain(text: str) -> list[str]:
    kept = "".join(each for each in text.lower() if each not in string.punctuation)
    return ARTICLES.sub(" ", kept).split()


def _overlap(said: list[str], golden: list[str]) -> float:
    common = sum((collections.Counter(said) & collections.Counter(golden)).values())
    if not said or not golden:
        return float(said == golden)
    return 2 * common / (len(said) + len(golden))


def _scikit_learn():
    try:
        import sklearn.metrics
    except ImportError:
        raise ValueError(
            "metrics of tasks need scikit-learn: pip install 'batiste[eval]'") from None
    return sklearn.metrics
