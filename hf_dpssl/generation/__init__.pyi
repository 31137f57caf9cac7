from .latent_mlp import LatentMLP as LatentMLP
from .pipeline_vq_dit import VQDiTPipeline as VQDiTPipeline
from .pipeline_vq_drift import VQDriftPipeline as VQDriftPipeline
from .pipeline_vq_token import VQTokenPipeline as VQTokenPipeline
from .stock_dit import export_dit_pipeline as export_dit_pipeline
