"""The outputs of a trained network: logits, top-1 accuracy and negative log-likelihood."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from workers.batches import evaluation_batches
from workers.data import DataSet


@torch.inference_mode()
def predict(
    network: nn.Module, dataset: DataSet, indices: np.ndarray, *, device: str, batch_size: int = 256, num_loader_workers: int = 0
) -> np.ndarray:
    """Logits `(len(indices), num_classes)`, float32, of the un-augmented images in the order of `indices`.

    The network runs in evaluation mode; the modes of its modules are restored.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        batches = evaluation_batches(dataset, indices, device=device, batch_size=batch_size, num_workers=num_loader_workers)
        return torch.cat([network(batch.images).float() for batch in batches]).cpu().numpy()
    finally:
        for module, was_training in modes:
            module.training = was_training


def top1_pct(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images `(N, K), (N,)` whose largest logit is that of their label, in percent."""
    return float(100 * (logits.argmax(axis=1) == labels).mean())


def mean_nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood of the labels under the softmax of the logits, in nats."""
    from scipy.special import log_softmax

    return float(-log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels].mean())
