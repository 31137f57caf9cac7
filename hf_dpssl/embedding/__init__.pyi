from .embedder import ImageEmbedder as ImageEmbedder
from .embedding_job import EmbedJob as EmbedJob
from .embedding_job import embed_images as embed_images
from .embeddings_table import EmbeddingsTable as EmbeddingsTable
from .embeddings_table import search_images as search_images
from .encoder_evaluation import measure_encoder as measure_encoder
from .feature_extractors import FeatureExtractor as FeatureExtractor
from .feature_extractors import load_extractor as load_extractor
