"""How many choices a language model is left with for each token, on average."""

import math

import numpy as np

from tersor.core.errors import DataError
from tersor.core.metric import Measurement, Subject, metric
from tersor.core.resampling import Score
from tersor.core.scoring import losses
from tersor.metrics import _scored


def score(subject: Subject) -> Score:
    """Add up each sample's losses and tokens.

    Raises:
        DataError: a label has probability 0, or labels do not fit.
    """
    assert subject.outputs is not None
    assert subject.labels is not None
    nats, tokens = losses(subject.outputs, subject.labels)
    if not math.isfinite(float(nats.sum())):
        raise DataError(
            f"perplexity is infinite: {(~np.isfinite(nats)).sum()} of {nats.size} samples "
            "have a label of probability 0; give logits instead of probabilities"
        )
    kept = tokens > 0
    nats, tokens = nats[kept], tokens[kept]

    def of(draws: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(draws @ nats / (draws @ tokens)))

    return Score(count=nats.size, of=of, bounds=(1, math.inf))


@metric(
    unit="1",
    better="lower",
    needs=("outputs", "labels"),
    score=score,
    tasks=("positions", "tokens"),
)
def perplexity(subject: Subject) -> Measurement:
    """Take exp of the mean cross-entropy of each label, in nats.

    Outputs are logits (N, T, C) with the next tokens (N, T) as labels, negative ones ignored; or
    (N, C) with (N,). Its interval is that of a bootstrap over samples, since the tokens of one go
    together.

    Raises:
        DataError: a label has probability 0, or labels do not fit the outputs.
    """
    found = score(subject)
    assert subject.labels is not None
    tokens = int((subject.labels >= 0).sum())
    how = f"exp of the mean cross-entropy of {tokens} labels"
    return _scored.measured("perplexity", subject, found, how, labels=tokens)
