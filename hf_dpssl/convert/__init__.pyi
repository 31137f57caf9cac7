from .autoencoder_importers import import_autoencoder as import_autoencoder
from .encoder_importers import import_checkpoint as import_checkpoint
from .exports import export as export
