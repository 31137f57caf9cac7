"""Models that pretrain a contrastive encoder: SimCLR, t-SimCLR, MoCo-v2 and t-MoCo-v2.

The four methods are a table, not four classes: kernel {cosine, student_t} x negatives {batch, queue}.

Source: Chen et al. 2020 (SimCLR, MoCo-v2), He et al. 2020 (MoCo), Hu et al., ICLR 2023.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..models.blocks import ProjectionHead, guard_one_pixel_convolutions_
from ..models.call_arguments import ignore_labels
from ..models.complete_weights import draw_after_meta_, load_complete
from ..models.gather import (
    broadcast_,
    deal_out,
    gather_dealt,
    gather_with_gradient,
    gather_without_gradient,
    in_turns,
    is_distributed,
    own_rows,
)
from ..models.modeling_contrastive import ContrastiveConfig, ContrastiveEncoder
from ..models.registration import push_to_hub
from .batch_norm import batch_norms, keep_statistics_in_recomputation_, set_batch_norm_
from .calibration import KernelCalibration
from .isotropy import DIRECTIONS, lejepa, random_directions
from .losses import info_nce, moco, t_simclr
from .momentum import ema_update_, enqueue_

_deal_out = torch.compiler.disable(deal_out)  # it exchanges rows between processes


@dataclass
class ContrastiveOutput(ModelOutput):
    """loss: scalar or None; embeddings, paired_embeddings: (B, projection_dim); features: (B, num_features), pooled."""

    loss: Tensor | None = None
    embeddings: Tensor | None = None
    paired_embeddings: Tensor | None = None
    features: Tensor | None = None


class ContrastivePreTrainedModel(PreTrainedModel):
    """What both pretraining classes share: config, `encoder` as base model, and a head.

    Hidden states are not given out, checkpoints that lack weights are refused, and activations are recomputed by timm.
    """

    config_class = ContrastiveConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    _supports_sdpa = True  # as the encoder
    push_to_hub = push_to_hub
    accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by the accumulation steps

    def __init__(self, config: ContrastiveConfig):
        super().__init__(config)
        self.encoder = ContrastiveEncoder(config)
        guard_one_pixel_convolutions_(self.encoder)
        self.head = self._make_head()
        self.calibration = KernelCalibration(
            kernel=config.kernel,
            temperature=config.temperature,
            perplexity=config.perplexity,
            dof=config.dof,
            learnable_dof=config.learnable_dof,
            free_scale=config.kernel == "student_t" and config.feature_norm == "none",
        )

    def _make_head(self) -> ProjectionHead:
        config = self.config
        width = self.encoder.num_features
        return ProjectionHead(
            width,
            config.projection_hidden_dim or width,
            config.projection_dim,
            config.projection_layers,
            batch_norm=config.projection_batch_norm,
            feature_norm=config.feature_norm,
        )

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """Whether timm can recompute the backbone's activations; every part but MoCo's key branch has a gradient."""
        return self.encoder.supports_gradient_checkpointing

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        self.encoder._set_gradient_checkpointing(enable)
        keep_statistics_in_recomputation_(self.encoder)

    def post_init(self) -> None:
        """As `PreTrainedModel.post_init`; a config that asks for checkpointing has switched it on in the encoder."""
        super().post_init()
        if self.encoder.gradient_checkpointing:
            self._set_gradient_checkpointing()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Reached for the heads only, the encoder has its own: torch's defaults, as in the papers' code.
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        loaded = any(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors)
        if isinstance(module, nn.Linear | nn.BatchNorm1d) and not loaded:
            module.reset_parameters()

    def init_weights(self) -> None:
        """As `PreTrainedModel.init_weights`; a model built on the meta device gets what the constructor draws."""
        draw_after_meta_(self)
        super().init_weights()

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> ContrastivePreTrainedModel:
        """As `PreTrainedModel.from_pretrained`; ValueError when the checkpoint lacks weights of the model."""
        return load_complete(super().from_pretrained, *args, **kwargs)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of encoder and head, for the optimiser."""
        return [*self.encoder.parameters(), *self.head.parameters()]

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Parameters of the kernel, for the optimiser too, without weight decay: learned dof, or none."""
        return list(self.calibration.parameters())

    def _embed(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(pixel_values, return_dict=True).pooler_output
        return features, self.head(features)


class SimCLRForPreTraining(ContrastivePreTrainedModel):
    """SimCLR (kernel="cosine") and t-SimCLR (kernel="student_t"): negatives are the rest of the global batch.

    With sigreg_weight LeJEPA, which has no negatives.
    """

    def __init__(self, config: ContrastiveConfig):
        super().__init__(config)
        set_batch_norm_(self, config.batch_norm, config.batch_norm_splits)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        paired_pixel_values: Tensor | None = None,
        weights: Tensor | None = None,
        step: int | None = None,
        return_loss: bool = True,
        **others,
    ) -> ContrastiveOutput:
        """Embed one view, and with `paired_pixel_values` (the other view, same order) compute the loss.

        Args:
            pixel_values: (B, C, H, W), normalised with the config's mean and std.
            paired_pixel_values: (B, C, H, W), second view of the same images.
            weights: (B,) weight of each pair.
            step: of training, which draws the directions of SIGReg; None: torch's generator goes on.
            return_loss: False embeds `pixel_values` only; by this name transformers.Trainer knows to report eval_loss.
            others: `labels`, which are not read.
        """
        ignore_labels(others)
        if paired_pixel_values is None or not return_loss:
            features, embeddings = self._embed(pixel_values)
            return ContrastiveOutput(embeddings=embeddings, features=features)
        # One pass over both views: batch norm sees 2B images, as in the papers' code.
        features, embeddings = self._embed(torch.cat([pixel_values, paired_pixel_values]))
        embeddings, paired = embeddings.chunk(2)
        loss = self._loss(embeddings, paired, weights, step)
        return ContrastiveOutput(loss, embeddings, paired, features.chunk(2)[0])

    @torch.compiler.disable  # it reads values and gathers: one boundary between two graphs, instead of one at each
    def _loss(self, embeddings: Tensor, paired: Tensor, weights: Tensor | None, step: int | None) -> Tensor:
        """Loss of the batch of all processes, of this one's embeddings (B, projection_dim) twice and weights (B,)."""
        view_1 = gather_with_gradient(embeddings)
        view_2 = gather_with_gradient(paired)
        if self.config.sigreg_weight:
            directions = random_directions(DIRECTIONS, view_1.shape[1], step).to(view_1, non_blocking=True)
            if step is None:  # processes may have drawn apart
                broadcast_(directions)
            return lejepa(view_1, view_2, directions, weight=self.config.sigreg_weight)
        weights = None if weights is None else gather_without_gradient(weights)
        if len(view_1) > 1:  # one pair says nothing about the temperature
            self.calibration.calibrate(view_1, view_2)
        if self.config.kernel == "cosine":
            return info_nce(view_1, view_2, temperature=self.calibration.temperature, weights=weights)
        return t_simclr(
            view_1,
            view_2,
            temperature=self.calibration.temperature,
            dof=self.calibration.dof,
            normalization=self.config.normalization,
            weights=weights,
        )


class MoCoForPreTraining(ContrastivePreTrainedModel):
    """MoCo-v2 (kernel="cosine") and t-MoCo-v2 (kernel="student_t"): negatives are a queue of earlier keys.

    In training mode each forward with two views moves the key encoder and, after the loss, puts the
    keys of all processes into the queue. Only rows that hold a key are used while it fills; the very
    first step takes the keys of its own batch as negatives.
    """

    def __init__(self, config: ContrastiveConfig):
        super().__init__(config)
        if config.normalization == "joint":
            raise ValueError("normalization='joint' needs all pairs of a batch; MoCo's queue takes 'anchor'.")
        if config.sigreg_weight:
            raise ValueError("sigreg_weight needs no negatives, and so no queue: take SimCLRForPreTraining.")
        self.key_encoder = ContrastiveEncoder(config)
        self.key_head = self._make_head()
        self.register_buffer("queue", torch.zeros(config.queue_size, config.projection_dim))
        self.register_buffer("queue_cursor", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.int64))
        self._full = False  # known without reading the device
        set_batch_norm_(self, config.batch_norm, config.batch_norm_splits)
        self.post_init()
        self._copy_query_to_key()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._full = False  # how much of the queue is filled is read again
        super()._load_from_state_dict(*args, **kwargs)

    def _copy_query_to_key(self) -> None:
        # After post_init, which may draw weights: before it, queries and keys would start apart.
        if self.head[0].weight.device.type != "meta":
            self.key_encoder.load_state_dict(self.encoder.state_dict())
            self.key_head.load_state_dict(self.head.state_dict())
        self.train(self.training)

    def train(self, mode: bool = True) -> MoCoForPreTraining:
        """As `nn.Module.train`; the key branch stays without gradient, also after `from_pretrained`."""
        super().train(mode)
        self.key_encoder.requires_grad_(False)
        self.key_head.requires_grad_(False)
        return self

    @torch.compiler.disable  # a momentum that differs from step to step would have everything traced again
    def _move_key_branch(self, momentum: float | None) -> None:
        key_parameters = [*self.key_encoder.parameters(), *self.key_head.parameters()]
        momentum = self.config.momentum if momentum is None else momentum
        ema_update_(key_parameters, self.trainable_parameters(), momentum)

    def _deals_out(self) -> bool:
        """Whether keys are batch-normalised in other company than their queries."""
        return self.training and self.config.batch_norm != "global" and bool(batch_norms(self))

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """Keys (B, projection_dim) of the images that were dealt to this process."""
        splits = self.config.batch_norm_splits if self._deals_out() else 1
        images = in_turns(images, splits)  # neighbours, which the queries' parts keep apart, together
        keys = self.key_head(self.key_encoder(images, return_dict=True).pooler_output)
        return in_turns(keys, len(keys) // splits)

    def _of_one_pair(self, pixel_values: Tensor) -> ContrastiveOutput:
        """Loss 0 with a gradient of 0: a batch norm has no statistics of one image. Nothing moves."""
        warnings.warn("a batch of one pair per process cannot be batch-normalised: it teaches nothing.", stacklevel=3)
        modes = [(module, module.training) for module in self.modules()]
        features, queries = self.eval()._embed(pixel_values)
        for module, mode in modes:
            module.training = mode
        return ContrastiveOutput(0 * queries.sum(), queries, features=features)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        paired_pixel_values: Tensor | None = None,
        momentum: float | None = None,
        return_loss: bool = True,
        **others,
    ) -> ContrastiveOutput:
        """Queries of `pixel_values` (B, C, H, W); with `paired_pixel_values` also keys and the loss.

        Args:
            pixel_values: (B, C, H, W), normalised with the config's mean and std.
            paired_pixel_values: (B, C, H, W), second view of the same images.
            momentum: of this step instead of the config's, e.g. from `momentum_at`.
            return_loss: False embeds `pixel_values` only; by this name transformers.Trainer knows to report eval_loss.
            others: `labels`, which are not read.

        Raises:
            ValueError: in training, when the queue is smaller than the batch of all processes.
        """
        ignore_labels(others)
        paired = paired_pixel_values is not None and return_loss
        if paired and self.training and len(pixel_values) == 1 and batch_norms(self):
            return self._of_one_pair(pixel_values)
        # What no graph can hold comes before all else, where it cuts none in two.
        images = paired_pixel_values
        if paired and self.training:
            self._move_key_branch(momentum)
        if paired and is_distributed() and self._deals_out():
            images = _deal_out(images)
        features, queries = self._embed(pixel_values)
        if not paired:
            return ContrastiveOutput(embeddings=queries, features=features)
        loss, keys = self._loss(queries, self._keys(images))
        return ContrastiveOutput(loss, queries, keys, features)

    @torch.compiler.disable  # it reads values, gathers and enqueues: one boundary between two graphs
    def _loss(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of queries (B, projection_dim), and their keys; `keys` are those of the images that were dealt here."""
        all_keys = gather_dealt(keys) if self._deals_out() else gather_without_gradient(keys)
        keys = own_rows(all_keys)
        if self.training and len(all_keys) > len(self.queue):
            raise ValueError(
                f"queue_size {len(self.queue)} is smaller than the batch of {len(all_keys)} keys of all processes: it "
                "could not hold one batch. Give a larger queue_size or a smaller batch."
            )
        filled = len(self.queue) if self._full else int(self.queue_filled)
        self._full = filled == len(self.queue)
        negatives = self.queue[:filled] if filled else all_keys  # the loss keeps nothing of it for its backward pass
        self.calibration.calibrate_queue(queries, all_keys, negatives)
        loss = moco(
            queries,
            keys,
            negatives,
            kernel=self.config.kernel,
            temperature=self.calibration.temperature,
            dof=self.calibration.dof,
        )
        if self.training:
            enqueue_(self.queue, self.queue_cursor, self.queue_filled, all_keys)
        return loss, keys
