"""transformers' own checks of model and config classes, run on ours and on one of its own as control.

TRANSFORMERS_SOURCE is the path of transformers' source (its source distribution is enough: `pip download --no-binary
:all: --no-deps transformers`), of the installed version.
"""

import unittest

import pytest
import torch
import transformers
import transformers.utils
from foreign_tests import expect_failures, source_tests, stand_in

source_tests("TRANSFORMERS_SOURCE", "tests/test_modeling_common.py")
pytest.importorskip("parameterized")
stand_in("tests.exporters.test_export", ExportTesterMixin=object)
stand_in("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
COMMON = {"return_dict": False, "output_hidden_states": True, "id2label": {0: "label"}, "problem_type": "regression"}
stand_in("tests.utils.test_configuration_utils", config_common_kwargs=COMMON)

# Their modules look for transformers beside themselves, where a source distribution has no package.
transformers.utils.direct_transformers_import = lambda folder: transformers

from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin  # noqa: E402
from tiny_checkpoints import autoencoder_model, encoder_model, gan_model  # noqa: E402
from transformers import TimmWrapperConfig, TimmWrapperModel  # noqa: E402

from hf_dpssl import (  # noqa: E402
    VAEGAN,
    ContrastiveConfig,
    ContrastiveEncoder,
    MoCoForPreTraining,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    SimCLRForPreTraining,
    VQAutoencoder,
    VQConfig,
)

pytestmark = [
    pytest.mark.mixins,
    pytest.mark.filterwarnings("default:a batch of one pair"),  # which they try, and which warns
]


class Case:
    """What the mixins ask of a model: its config, and inputs of one batch."""

    batch_size = 3
    image_size = 16
    seq_length = num_hidden_layers = hidden_size = num_attention_heads = 2

    def __init__(self, make_config, paired: bool, is_training: bool):
        self.get_config = make_config
        self.paired = paired
        self.is_training = is_training  # whether the output holds a loss

    def prepare_config_and_inputs_for_common(self):
        images = {"pixel_values": torch.rand(self.batch_size, 3, 16, 16) * 2 - 1}
        if self.paired:
            images["paired_pixel_values"] = torch.rand(self.batch_size, 3, 16, 16) * 2 - 1
        return self.get_config(), images


class Mixin(ModelTesterMixin):
    """Switches that stand for: images in, no tokens, no attentions."""

    make_config = None
    paired = False
    has_loss = True
    test_resize_embeddings = False
    test_torch_exportable = False
    has_attentions = False

    def setUp(self):
        self.model_tester = Case(type(self).make_config, self.paired, self.has_loss)

    def test_config(self):
        config_class = type(self.model_tester.get_config())
        ConfigTester(self, config_class, has_text_modality=False, common_properties=[]).run_common_tests()


class VQAutoencoderTest(Mixin, unittest.TestCase):
    all_model_classes = (VQAutoencoder,)
    make_config = staticmethod(lambda: autoencoder_model().config)


class GaussianAutoencoderTest(Mixin, unittest.TestCase):
    all_model_classes = (VQAutoencoder,)
    make_config = staticmethod(
        lambda: VQConfig(image_size=16, encoder_block_out_channels=[8, 16], norm_num_groups=4, quantizer="kl")
    )


class VAEGANTest(Mixin, unittest.TestCase):
    all_model_classes = (VAEGAN,)
    make_config = staticmethod(lambda: gan_model().config)
    has_loss = False


class PatchDiscriminatorTest(Mixin, unittest.TestCase):
    all_model_classes = (PatchDiscriminator,)
    make_config = staticmethod(lambda: PatchDiscriminatorConfig(width=8, image_size=16))
    has_loss = False


class ContrastiveEncoderTest(Mixin, unittest.TestCase):
    all_model_classes = (ContrastiveEncoder,)
    make_config = staticmethod(lambda: encoder_model().config)
    has_loss = False


class MoCoTest(Mixin, unittest.TestCase):
    all_model_classes = (MoCoForPreTraining,)
    make_config = staticmethod(lambda: encoder_model().config)
    paired = True


class SimCLRTest(Mixin, unittest.TestCase):
    all_model_classes = (SimCLRForPreTraining,)
    make_config = staticmethod(lambda: ContrastiveConfig("resnet10t", {"channels": [8, 8, 16, 16]}, projection_dim=4))
    paired = True


class ControlTest(Mixin, unittest.TestCase):
    """transformers' own class around the same network."""

    all_model_classes = (TimmWrapperModel,)
    has_loss = False
    make_config = staticmethod(
        lambda: TimmWrapperConfig(architecture="resnet10t", model_args={"channels": [8, 8, 16, 16]})
    )


del Mixin  # no test by itself

_IMAGES = {"test_model_get_set_embeddings": "images have no token embeddings"}
_ENCODER = {"test_hidden_states_output": "timm's stages are no layers of one size"} | _IMAGES
_INCOMPLETE = {"test_model_weights_reload_no_missing_tied_weights": "checkpoints that lack weights are refused"}
_NO_HIDDEN = {
    "test_hidden_states_output": "hidden states are not given out",
    "test_model_outputs_equivalence": "hidden states are not given out",
    "test_retain_grad_hidden_states_attentions": "hidden states are not given out",
}
_PRETRAINING = _IMAGES | _INCOMPLETE | _NO_HIDDEN
_PRETRAINING |= {"test_correct_missing_keys": "checkpoints that lack weights are refused"}
_TIMM = "the layers are timm's, which checkpoint by themselves and not as a GradientCheckpointingLayer"
_PRETRAINING["test_gradient_checkpointing_enable_disable"] = _TIMM
_BLOCKS = "the blocks are diffusers', which checkpoint by themselves and not as a GradientCheckpointingLayer"
_AUTOENCODER = _IMAGES | _INCOMPLETE | _NO_HIDDEN
_AUTOENCODER |= {"test_gradient_checkpointing_enable_disable": _BLOCKS}
_CODEBOOK = {"test_init_weights_can_init_buffers": "the codebook is a buffer that starts at random"}
expect_failures(ControlTest, _ENCODER)
expect_failures(ContrastiveEncoderTest, _ENCODER | _INCOMPLETE)
_KEYS = "activations of MoCo's key branch, which has no gradient, are not recomputed"
expect_failures(MoCoTest, _PRETRAINING | {"test_peft_gradient_checkpointing_enable_disable": _KEYS})
expect_failures(SimCLRTest, _PRETRAINING)
expect_failures(VAEGANTest, _IMAGES | _INCOMPLETE | _NO_HIDDEN)
expect_failures(PatchDiscriminatorTest, _IMAGES | _INCOMPLETE | _NO_HIDDEN)
expect_failures(GaussianAutoencoderTest, _AUTOENCODER)
expect_failures(VQAutoencoderTest, _AUTOENCODER | _CODEBOOK)
checkpointing = {VQAutoencoderTest: _BLOCKS, GaussianAutoencoderTest: _BLOCKS, MoCoTest: _TIMM, SimCLRTest: _TIMM}
for case, reason in checkpointing.items():  # their parts are counted one by one: left out as a whole
    for kind in ("", "_use_reentrant_false", "_use_reentrant_true"):
        setattr(case, f"test_training_gradient_checkpointing{kind}", unittest.skip(reason)(lambda self: None))
del case
