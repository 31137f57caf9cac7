"""Token generation: a causal language model of transformers draws the codes of a VQAutoencoder, which decodes them.

Tokens: [0, K) the K codes, row by row; then one token per class; last the null token, which starts an image
without class. A sequence is (class or null, code 1, ..., code h*w).

Source: van den Oord et al. 2017, section 3.3 (autoregressive prior over codes); Esser et al. 2021 (VQGAN, section
3.2: transformer over codes, class token first); Ho and Salimans 2022 (classifier-free guidance); Gumbel-max
sampling as in Maddison et al. 2014.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from ..autoencoder import latent_codec
from ..models.call_arguments import Generators, read_generator
from ..models.modeling_vq import VQAutoencoder
from .choices import ARCHITECTURES
from .pipeline_classes import ClassConditionalPipeline


def make_language_model(
    architecture: str,
    *,
    num_layers: int,
    width: int,
    num_heads: int,
    num_codes: int,
    num_classes: int,
    num_tokens: int,
    dropout: float = 0.0,
) -> PreTrainedModel:
    """A causal language model of transformers over codes, classes and the null token, with the library's init.

    Its generation config keeps all but codes from being drawn, so that its own `generate()` draws images too.

    Args:
        architecture: "gpt2" (learned positions, GELU) or "llama" (rotary positions, RMS norm, gated SiLU).
        num_layers, width, num_heads: size of the transformer.
        num_codes: size of the codebook.
        num_classes: 0 for unlabelled data.
        num_tokens: codes of an image.
        dropout: everywhere in gpt2; of the attention weights in llama, which has no other.

    Raises:
        ValueError: an unknown architecture, or a width that the heads do not divide (into even parts for llama).
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {ARCHITECTURES}, got {architecture!r}.")
    if width % num_heads or (architecture == "llama" and width // num_heads % 2):
        even = ", an even number of times for llama" if architecture == "llama" else ""
        raise ValueError(f"width {width} must be a multiple of num_heads {num_heads}{even}.")
    vocabulary = num_codes + num_classes + 1
    options = {"vocab_size": vocabulary, "bos_token_id": vocabulary - 1, "eos_token_id": None, "pad_token_id": None}
    if architecture == "gpt2":
        options |= dict(n_embd=width, n_layer=num_layers, n_head=num_heads, n_positions=num_tokens + 1)
        options |= dict(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
        options |= dict(activation_function="gelu_pytorch_tanh")  # gpt2's own, in one kernel
    else:
        options |= dict(hidden_size=width, num_hidden_layers=num_layers, num_attention_heads=num_heads)
        options |= dict(intermediate_size=32 * -(-width // 12), max_position_embeddings=num_tokens + 1)  # about 8/3
        options |= dict(num_key_value_heads=num_heads, attention_dropout=dropout)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **options))
    model.generation_config.suppress_tokens = list(range(num_codes, vocabulary))
    model.generation_config.max_new_tokens = num_tokens
    return model


def token_sequences(codes: Tensor, labels: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Inputs (B, h*w) and targets (B, h*w), both int64, of next-token prediction on images.

    Args:
        codes: (B, h, w) or (B, h*w) in [0, num_codes).
        labels: (B,) class ids; the null class is the number of classes.
        num_codes: size of the codebook.
    """
    targets = codes.flatten(1)
    return torch.cat([labels[:, None] + num_codes, targets[:, :-1]], dim=1), targets


def code_nats(language_model: PreTrainedModel, codes: Tensor, labels: Tensor, num_codes: int) -> Tensor:
    """Negative log-likelihood (B, h*w) in nats of each code given those before it and the class; arguments as above.

    The softmax runs over the codes alone, as sampling does.
    """
    inputs, targets = token_sequences(codes, labels, num_codes)
    logits = language_model(input_ids=inputs, use_cache=False).logits[..., :num_codes]  # (B, h*w, K)
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


class CodeSampler(LogitsProcessor):
    """Makes greedy `generate()` draw codes: guidance, temperature, top-k, top-p, and Gumbel noise of given generators.

    argmax(log p + Gumbel noise) is a sample of p, so that an image's codes follow from its own generator. With
    guidance the batch holds every image twice, first with its class, then without: both halves get the same scores,
    hence the same code, and one cached pass serves both.

    Args:
        num_codes: the first so many tokens may be drawn.
        generator: one for all images, a list of one per image, or None for torch's global one.
        guidance_scale: s in without + s (with - without), on log-probabilities up to a constant per row; 1 expects a
            batch that is not doubled.
        temperature: divides the scores; 0 takes the most probable code.
        top_k: draw among the so many most probable codes only; None: all.
        top_p: draw among the fewest codes that hold this probability, (0, 1]; None: all.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        num_codes: int,
        generator: Generators = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ):
        if not temperature >= 0:
            raise ValueError(f"temperature must not be negative (0 = most probable codes), got {temperature}.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all {num_codes} codes, got {top_k}.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], or be None for all codes, got {top_p}.")
        self.num_codes = num_codes
        self.generator = generator
        self.guidance_scale = guidance_scale
        self.temperature = temperature
        self.warpers = LogitsProcessorList()
        if temperature not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None and temperature and top_k < num_codes:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p is not None and temperature and top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) whose argmax is the code drawn."""
        others = scores.shape[1] - self.num_codes
        scores = scores[:, : self.num_codes]  # (N, K), or (2N, K) with guidance
        if self.guidance_scale != 1:
            with_class, without = scores.chunk(2)
            scores = torch.lerp(without, with_class, self.guidance_scale)  # (N, K)
        scores = self.warpers(input_ids, scores)
        if self.temperature:
            scores = scores + self._gumbel(scores)
        if self.guidance_scale != 1:
            scores = torch.cat([scores, scores])
        return F.pad(scores, (0, others), value=-torch.inf)

    def _gumbel(self, scores: Tensor) -> Tensor:
        if not isinstance(self.generator, list):
            device = scores.device if self.generator is None else self.generator.device
            noise = torch.empty(scores.shape, device=device).exponential_(generator=self.generator)
            return -noise.log().to(scores.device)
        rows = [torch.empty(self.num_codes, device=g.device).exponential_(generator=g) for g in self.generator]
        return -torch.stack(rows).log().to(scores.device)


class VQTokenPipeline(ClassConditionalPipeline):
    """Class-conditional or unconditional images from a causal language model over the codes of a `VQAutoencoder`.

    Args:
        language_model: any causal language model of transformers with K + number of classes + 1 tokens.
        vae: the autoencoder whose codes it was trained on.
        id2label: {class id: name}; {} or None for a model without classes.
        vae_fingerprint: `vae.fingerprint()` at training time.

    Raises:
        ValueError: the autoencoder is not the one the model was trained on or has no codes, or the model's vocabulary
            or number of positions does not fit.
    """

    model_cpu_offload_seq = "language_model->vae"

    def __init__(
        self,
        language_model: PreTrainedModel,
        vae: VQAutoencoder,
        id2label: dict | None = None,
        vae_fingerprint: str | None = None,
    ):
        super().__init__()
        self._check_vocabulary(language_model, vae, len(id2label or {}))
        self._register(id2label, vae, vae_fingerprint, "language model", language_model=language_model)

    @staticmethod
    def _check_vocabulary(language_model: PreTrainedModel, vae: VQAutoencoder, num_classes: int) -> None:
        """ValueError unless the model's tokens and positions are those of the autoencoder's codes and the classes."""
        if vae.quantizer is None:
            raise ValueError(
                f"this autoencoder (quantizer={vae.config.quantizer!r}) has no codes: take one with a codebook."
            )
        config = language_model.config
        expected = vae.config.num_codes + num_classes + 1
        if config.vocab_size != expected:
            raise ValueError(
                f"the language model has {config.vocab_size} tokens, but {vae.config.num_codes} codes, {num_classes} "
                f"classes and the null token make {expected}: it belongs to another codebook or other classes."
            )
        needed = vae.config.latent_size**2
        positions = getattr(config, "max_position_embeddings", needed)
        if positions < needed:
            raise ValueError(
                f"the language model has {positions} positions, but an image of this autoencoder has "
                f"{needed} codes: it belongs to another image size."
            )

    @property
    def num_tokens(self) -> int:
        """Codes of an image."""
        return self.vae.config.latent_size**2

    @property
    def null_token(self) -> int:
        """The first token of an image without class."""
        return self.vae.config.num_codes + len(self.config.id2label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        num_images: int | None = None,
        return_dict: bool = True,
        *,
        streamer: BaseStreamer | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: one image per id or name; None draws without class.
            guidance_scale: 1 is no guidance; larger values trade diversity for class fidelity.
            temperature: below 1 draws more probable codes; 0 always the most probable one.
            top_k: draw among the so many most probable codes only.
            top_p: draw among the fewest codes that together hold this probability, (0, 1].
            generator: one for all images, or a list of one per image; with a list, each image's codes do not
                depend on the others (up to codes whose scores agree within rounding). Integers are seeds.
            output_type: "pil", "np" (N, H, W, C) in [0, 1], "pt" (N, C, H, W) in [0, 1], or "codes" (N, h, w) int64.
            num_images: number of images without class; 1 by default.
            return_dict: False gives a tuple.
            streamer: of transformers; `put` gets the first tokens, then each next code of all images (with guidance of
                all twice), as they are drawn.

        Returns:
            ImagePipelineOutput with `images`.

        Raises:
            ValueError: an unknown class or output type, an option out of range, or a wrong number of generators.
        """
        self._check_vocabulary(self.language_model, self.vae, len(self.config.id2label))
        self._check_fingerprint(self.vae, self.config.vae_fingerprint, "language model")
        num_codes = self.vae.config.num_codes
        side = self.vae.config.latent_size
        count = 1 if num_images is None else num_images
        ids = [] if class_labels is None else self.class_ids(class_labels)
        first = [self.null_token] * count if class_labels is None else [num_codes + class_id for class_id in ids]
        self._check_request(first, class_labels, num_images, guidance_scale, generator, output_type, "codes")
        guided = guidance_scale > 1 and class_labels is not None
        scale = guidance_scale if guided else 1.0
        sampler = CodeSampler(num_codes, read_generator(generator, len(first)), scale, temperature, top_k, top_p)
        prompt = torch.tensor(first + [self.null_token] * len(first) * guided, device=self._execution_device)[:, None]
        # Without settings of the model's own, such as an end token, which would change images in silence.
        model = copy.copy(self.language_model)
        model.generation_config = GenerationConfig()
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            logits_processor=LogitsProcessorList([sampler]),
            max_new_tokens=self.num_tokens,
            do_sample=False,
            use_cache=True,
            streamer=streamer,
        )
        codes = tokens[: len(first), 1:].unflatten(1, (side, side))  # (N, h, w)
        if output_type == "codes":
            images = codes
        else:
            latent_codec.awaken(self.vae)
            images = self._pictures(self.vae.decode_codes(codes).pixel_values, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
