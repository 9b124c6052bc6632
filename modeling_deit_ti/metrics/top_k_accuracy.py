"""Top-k accuracy as an `evaluate` metric that loads from disk: `evaluate.load("accuracy")` needs the network."""

# `evaluate` parses these lines to check what is installed, and expects one import per line.
import datasets
import evaluate
import numpy as np


class TopKAccuracy(evaluate.Metric):
    """
    Share of images whose true label is among the k labels that the model ranks highest.

    Inputs of `compute`:
        predictions (integers of shape `(N, >= k)`): label ids, most likely first.
        references (integers of shape `(N,)`): true label ids.
        k (`int`, *optional*, defaults to 1)

    Returns:
        `dict` with `accuracy`, between 0 and 1.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of images whose true label is among the k labels ranked highest.",
            citation="",
            inputs_description="predictions: ranked label ids (N, >= k); references: label ids (N,); k: int",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, k=1):
        hits = np.asarray(predictions)[:, :k] == np.asarray(references)[:, None]
        return {"accuracy": float(hits.any(axis=1).mean())}
