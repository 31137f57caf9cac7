"""Imported by the process from which the tests' training scripts are forked: what they all need, once.

Libraries and rooms, the decoded digits, the templates of cards and a first plot with its fonts. Nothing here draws a
random number.
"""

from __future__ import annotations

import gc
import importlib
import io

LIBRARIES = [
    "diffusers.guiders", "diffusers.optimization", "diffusers.pipelines.onnx_utils",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete", "evaluate", "matplotlib.backends.backend_agg",
    "sklearn.datasets", "torch.utils.flop_counter", "torch.utils.serialization", "torch_fidelity", "torchmetrics.image",
    "torchvision", "transformers.pipelines",
]  # fmt: skip
ROOMS = [
    "autoencoder.adversarial_term", "autoencoder.perceptual", "autoencoder.training", "contrastive.backbone_check",
    "contrastive.warm_start", "convert.autoencoder_importers", "embedding.embedding_job", "evaluation.loading",
    "evaluation.reconstruction", "latent_training.generation_monitor", "latent_training.latent_run",
    "generation.pipeline_vq_token", "latent_training.token_alignment", "hub.model_card", "runs.contrastive_arguments",
    "runs.training_loop",
]  # fmt: skip

gc.disable()
for name in [*LIBRARIES, *(f"hf_dpssl.{room}" for room in ROOMS)]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:  # an optional library, or a place of an older version of one
        pass

from repeated_work import keep_decoded_digits  # noqa: E402

from hf_dpssl.data.image_data import load_images  # noqa: E402
from hf_dpssl.data.image_table import ImageTable  # noqa: E402
from hf_dpssl.hub.checkpoint_facts import KINDS  # noqa: E402
from hf_dpssl.hub.model_card import _templates  # noqa: E402
from hf_dpssl.runs.plots import plot_curves  # noqa: E402

keep_decoded_digits()
data = load_images("digits")
for split in (data.train, data.evaluation):
    ImageTable(data, split, 16).preload(2**30, show_progress=False)
for kind in KINDS:
    _templates().get_template(f"{kind}.md")
plot_curves([{"step": step, "loss": 0.5} for step in range(2)], io.BytesIO(), title="fonts")
gc.collect()
gc.enable()
gc.freeze()  # what is here stays: collections in the children need not look at it again
