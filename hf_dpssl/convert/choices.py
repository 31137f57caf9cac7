"""Formats of an export. No library is imported here: command lines read their choices without waiting for one."""

# format: kinds of checkpoints that it can express
FORMATS = {
    "timm": ("encoder",),
    "vqmodel": ("autoencoder",),
    "dit-pipeline": ("dit",),
    "onnx": ("encoder", "autoencoder", "drift"),
}
