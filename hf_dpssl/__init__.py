"""Distance-preserving self-supervised learning for the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel

from . import matching
from .hub import push_to_hub
from .losses import info_nce, moco, t_simclr
from .modeling_contrastive import ContrastiveConfig, ContrastiveEncoder
from .modeling_contrastive_pretraining import MoCoForPreTraining, SimCLRForPreTraining
from .modeling_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from .modeling_vaegan import VAEGAN, VAEGANConfig
from .modeling_vq import VQAutoencoder, VQConfig
from .pipeline_vq_dit import VQDiTPipeline
from .pipeline_vq_token import VQTokenPipeline
from .quantizer import VectorQuantizer

__version__ = "0.1.0"

AutoConfig.register("dpssl_contrastive", ContrastiveConfig)
AutoConfig.register("dpssl_vq", VQConfig)
AutoModel.register(ContrastiveConfig, ContrastiveEncoder)
AutoModel.register(VQConfig, VQAutoencoder)
AutoConfig.register("dpssl_vaegan", VAEGANConfig)
AutoModel.register(VAEGANConfig, VAEGAN)
for _class in (ContrastiveEncoder, VQAutoencoder, VAEGAN):
    _class.register_for_auto_class("AutoModel")
    _class.config_class.register_for_auto_class("AutoConfig")
for _class in (
    ContrastiveEncoder, SimCLRForPreTraining, MoCoForPreTraining, VQAutoencoder, VAEGAN, VQDiTPipeline, VQTokenPipeline
):  # fmt: skip
    _class.push_to_hub = push_to_hub  # not in their modules, which are copied next to published weights

__all__ = [
    "ContrastiveConfig",
    "ContrastiveEncoder",
    "MoCoForPreTraining",
    "PatchDiscriminator",
    "PatchDiscriminatorConfig",
    "SimCLRForPreTraining",
    "VAEGAN",
    "VAEGANConfig",
    "VQAutoencoder",
    "VQConfig",
    "VQDiTPipeline",
    "VQTokenPipeline",
    "VectorQuantizer",
    "info_nce",
    "matching",
    "moco",
    "t_simclr",
]
