"""What may be chosen of generators and of their samples. No library is imported here: command lines read them."""

OBJECTIVES = ("flow", "epsilon", "v_prediction", "mean_flow")
ARCHITECTURES = ("gpt2", "llama")  # of a token model
FORMATS = ("png", "npz")  # of drawn images
LAYOUTS = ("numbered", "by_class")
DTYPES = ("float32", "bfloat16", "float16")  # of weights and noise
# Of the pipelines' `__call__`, what may be chosen; each pipeline takes some of them.
OPTIONS = (
    "guidance_scale",
    "num_inference_steps",
    "guidance_interval",
    "guidance_rescale",
    "quantize",
    "temperature",
    "top_k",
    "top_p",
)
