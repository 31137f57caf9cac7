"""The losses of this package inside the training loops of other libraries, by one changed line.

    criterion = partial(info_nce, temperature=0.5)                        # lightly: instead of NTXentLoss(0.5)
    criterion = over_processes(partial(info_nce, temperature=0.5))        # ... with gather_distributed=True
    loss = SentencePairLoss(model, partial(clip, temperature=0.05))       # sentence-transformers

The losses are functions of two views, so most loops take them as they are. transformers.Trainer needs nothing
from here: SimCLRForPreTraining and MoCoForPreTraining return their loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..models.gather import gather_with_gradient

PairLoss = Callable[[Tensor, Tensor], Tensor]


def over_processes(loss: PairLoss) -> PairLoss:
    """The loss of the views of all processes, with the gradient that DistributedDataParallel needs.

    Args:
        loss: of two views (N, D) each, e.g. `partial(t_simclr, temperature=8, dof=5)`.

    Returns:
        A loss of this process's two views (B, D), B the same everywhere. Every process returns the loss of the
        whole batch; after DDP's mean the gradient is that of one process with the whole batch.
    """

    def global_loss(view_1: Tensor, view_2: Tensor) -> Tensor:
        return loss(gather_with_gradient(view_1), gather_with_gradient(view_2))

    return global_loss


class SentencePairLoss(nn.Module):
    """A loss of two views for SentenceTransformerTrainer, over the batches of all processes.

    Args:
        model: SentenceTransformer.
        loss: of two views (N, D) each; its temperature is 1 / scale of sentence-transformers.

    Relations:
        With `partial(clip, temperature=1 / scale)` it equals MultipleNegativesRankingLoss(model, scale,
        directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction", gather_across_devices=True),
        formerly MultipleNegativesSymmetricRankingLoss. `info_nce` and `t_simclr` also take other anchors as negatives.
    """

    def __init__(self, model: nn.Module, loss: PairLoss):
        super().__init__()
        self.model = model
        self.loss = over_processes(loss)
        self._given = loss

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Loss of a batch of (anchor, positive) columns; labels are not read. ValueError for more or fewer columns."""
        columns = list(sentence_features)
        if len(columns) != 2:
            raise ValueError(f"SentencePairLoss takes the two columns (anchor, positive), got {len(columns)} columns.")
        return self.loss(*(self.model(column)["sentence_embedding"] for column in columns))

    def get_config_dict(self) -> dict[str, Any]:
        """Name and options of the loss, for the model card that sentence-transformers writes."""
        given = self._given
        options = {}
        if isinstance(given, partial):
            options = given.keywords
            given = given.func
        return {"loss": getattr(given, "__name__", type(given).__name__)} | options
