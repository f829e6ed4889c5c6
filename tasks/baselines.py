"""What a "sequence" head must beat: the class that is most frequent, and a bag of words."""

from collections.abc import Sequence

import numpy as np

from batiste.tasks.config import HeadConfig
from batiste.tasks.examples import Example
from batiste.tasks.metrics import class_metrics

# Inverse strengths of regularization, of which cross-validation on training examples takes one.
STRENGTHS = (1.0, 10.0, 100.0)
FOLDS = 3


def majority(
    head: HeadConfig, train: Sequence[Example], validation: Sequence[Example]
) -> dict[str, float]:
    """The metrics of always saying the most frequent class of the training examples."""
    told, logits_Y = _told(head, train), np.zeros(len(head.classes))
    logits_Y[np.argmax(np.bincount(told, minlength=len(head.classes)))] = 1
    golden = _told(head, validation)
    return class_metrics(golden, np.broadcast_to(logits_Y, (len(golden), len(logits_Y))))


def bag_of_words(
    head: HeadConfig, train: Sequence[Example], validation: Sequence[Example]
) -> dict[str, float]:
    """The metrics of logistic regression on TF-IDF of words, regularized by cross-validation.

    It reads whole texts, with class weights where the head has them.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise ValueError(
            "the bag of words needs scikit-learn: pip install 'batiste[eval]'") from None
    told = _told(head, train)
    weights = "balanced" if head.balanced_loss else None
    if head.class_weights is not None:
        weights = dict(enumerate(head.class_weights))
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+", min_df=2)
    regression = LogisticRegression(max_iter=1000, class_weight=weights)
    grid = {"logisticregression__C": STRENGTHS}
    model = GridSearchCV(make_pipeline(words, regression), grid, cv=FOLDS)
    model.fit(_texts(head, train), told)
    p_BY = np.full((len(_told(head, validation)), len(head.classes)), 1e-9)
    p_BY[:, model.classes_] = model.predict_proba(_texts(head, validation))
    return class_metrics(_told(head, validation), np.log(np.maximum(p_BY, 1e-9)))


def _told(head: HeadConfig, examples: Sequence[Example]) -> np.ndarray:
    return np.array([head.classes.index(example.labels[head.name]) for example in examples
                     if head.name in example.labels])


def _texts(head: HeadConfig, examples: Sequence[Example]) -> list[str]:
    return [f"{example.text} {example.text_pair or ''}" for example in examples
            if head.name in example.labels]
