"""Scores of pairs in files while re-ranking goes on: what is left of an evaluation that is ended before its end."""

from __future__ import annotations

import io
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lavis_lite.common import dist
from lavis_lite.common.fingerprint import digest, tensors_digest
from lavis_lite.common.io import atomic_write
from lavis_lite.common.logging import get_logger
from lavis_lite.tasks.gallery import Gallery

logger = get_logger(__name__)


class PairJournal:
    """One rank's scores, some thousands in a file, in the folder `rerank_<label>` of an evaluation.

    The files' names tell what was evaluated: weights, texts, every cosine of ITC, precision and number of processes. An
    evaluation that differs in any of them doesn't read them. Without a folder nothing is kept.

    model: one that is no torch module is evaluated without a journal. loader_args: `EvalArgs`.
    """

    def __init__(self, model: Any, gallery: Gallery, loader_args: Any) -> None:
        self.folder: Path | None = None
        self._writable = True
        if loader_args.folder is not None and isinstance(model, nn.Module):
            self.folder = loader_args.folder / f"rerank_{loader_args.label}"
            self._evaluated = _evaluated(model, gallery, loader_args)
            self._start = f"{self._evaluated}_{dist.rank()}_"

    def load(self) -> tuple[Tensor, Tensor]:
        """Keys int64[pairs] and logits float[pairs, 2] of the pairs that an earlier try has scored."""
        keys, logits = [torch.empty(0, dtype=torch.long)], [torch.empty(0, 2)]
        files = sorted(self.folder.glob("*.npz")) if self.folder else []
        for file in (file for file in files if file.name.startswith(self._start)):
            with np.load(file) as arrays:
                keys.append(torch.from_numpy(arrays["keys"]))
                logits.append(torch.from_numpy(arrays["logits"]))
        if dist.is_main() and files and not any(file.name.startswith(self._evaluated) for file in files):
            logger.warning(
                "the scores in %s aren't used: they are of other weights, texts, precision or number of processes, or "
                "cosines that other batches, threads or hardware rounded differently",
                self.folder,
            )
        return torch.cat(keys), torch.cat(logits)

    def add(self, keys: Tensor, logits: Tensor) -> None:
        """Keep a block's scores. A disk that takes no more is told once, and doesn't end the evaluation."""
        if self.folder is None or not self._writable or not len(keys):
            return
        content = io.BytesIO()
        np.savez(content, keys=keys.numpy(), logits=logits.numpy())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self.folder / f"{self._start}{int(keys[0])}.npz", content.getvalue())
        except OSError as error:
            logger.warning("scores are not kept while they are made: %s", error)
            self._writable = False

    def remove(self) -> None:
        """Remove the files of all ranks, and those of other evaluations of that label; once all ranks have scored."""
        if self.folder is not None and dist.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)


def _evaluated(model: Any, gallery: Gallery, loader_args: Any) -> str:
    """The same digits on all ranks for the same evaluation."""
    # Not by its state dict: to ask for that gives gathered weights back, which the evaluation still needs.
    weights = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    own = tensors_digest({**weights, " similarity": gallery.similarity})
    return digest(repr((dist.gather_objects(own), gallery.rows, gallery.texts, loader_args.precision)))
