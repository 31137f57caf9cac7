"""What may be chosen of views and streams. No library is imported here: command lines read their choices."""

MODES = ("fused", "exact")  # colours as one matrix, or exactly as torchvision v2
AUGMENTATIONS = ("natural", "imagenet", "textures", "faces", "digits", "digits-on-photos")
STREAM_READINGS = ("shards", "whole")
