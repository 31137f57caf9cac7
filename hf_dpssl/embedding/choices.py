"""What may be chosen of an encoder and its evaluation. No library is imported here: command lines read it."""

KINDS = ("features", "embeddings")  # of the backbone, or after the head
SPLITS = ("train", "evaluation")
PROTOCOLS = ("knn", "linear", "few_shot", "geometry", "views")
BAD_IMAGES = ("error", "skip")
