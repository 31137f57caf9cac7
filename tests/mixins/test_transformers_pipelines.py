"""transformers' own checks of models in its pipelines, run on our folders, loaded by our classes and by stock ones.

TRANSFORMERS_SOURCE is as for test_transformers_mixins.py. Where it is a source distribution, which leaves the cases of
single tasks out, the ones below stand in.
"""

import json
import os
import tempfile
import unittest
from pathlib import Path

import pytest
import transformers
import transformers.utils
from foreign_tests import source_tests, stand_in

source_tests("TRANSFORMERS_SOURCE", "tests/test_pipeline_mixin.py")

from PIL import Image  # noqa: E402
from tiny_checkpoints import encoder_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoImageProcessor,
    ImageClassificationPipeline,
    ImageFeatureExtractionPipeline,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
)

from hf_dpssl import ContrastiveEncoder  # noqa: E402

FOLDER = tempfile.TemporaryDirectory()
CLASSES = (ContrastiveEncoder, TimmWrapperModel, TimmWrapperForImageClassification)
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = FOLDER.name
transformers.utils.direct_transformers_import = lambda folder: transformers
for model_class in CLASSES:  # folders of ours in the places of their tiny models
    folder = Path(FOLDER.name, model_class.config_class.model_type, model_class.__name__)
    encoder_model().encoder.save_pretrained(folder)
    if model_class is TimmWrapperForImageClassification:  # as fine-tuned
        processor = AutoImageProcessor.from_pretrained(folder)
        model_class.from_pretrained(folder, num_labels=2).save_pretrained(folder)
        processor.save_pretrained(folder)
PARTS = {"tokenizer_classes": [], "processor_classes": ["TimmWrapperImageProcessor"]}
Path(FOLDER.name, "reports").mkdir()
SUMMARY = json.dumps({model_class.__name__: PARTS for model_class in CLASSES})
Path(FOLDER.name, "reports", "tiny_model_summary.json").write_text(SUMMARY)


class FeatureCase:
    """Pictures of any size and mode in, a nested list of numbers for each out; as a tensor, or pooled, where asked."""

    kind = ImageFeatureExtractionPipeline

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **others):
        pictures = [Image.new("RGB", (40, 30), "red"), Image.new("L", (9, 70), 128), Image.new("RGBA", (16, 16))]
        return self.kind(model=model, image_processor=image_processor, dtype=dtype, **others), pictures

    def run_pipeline_test(self, pipeline, examples):
        for pooled in (False, True):
            found = pipeline(examples, pool=pooled, return_tensors=True)
            assert len(found) == len(examples) and all(len(one) == 1 and one.isfinite().all() for one in found)
            lists = pipeline(examples[0], pool=pooled)
            assert found[0].tolist() == lists and (found[0].ndim == 2) == pooled


class ClassCase(FeatureCase):
    """Two labels for each picture, whose scores add up to 1."""

    kind = ImageClassificationPipeline

    def run_pipeline_test(self, pipeline, examples):
        for scores in pipeline(examples):
            assert [set(one) for one in scores] == [{"label", "score"}] * 2
            assert sum(one["score"] for one in scores) == pytest.approx(1)


stand_in("tests.pipelines.test_pipelines_image_feature_extraction", ImageFeatureExtractionPipelineTests=FeatureCase)
stand_in("tests.pipelines.test_pipelines_image_classification", ImageClassificationPipelineTests=ClassCase)

from tests.test_pipeline_mixin import PipelineTesterMixin  # noqa: E402

pytestmark = pytest.mark.mixins


class Mixin(PipelineTesterMixin):
    """In the folder from which theirs reads pictures."""

    def setUp(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(os.environ["TRANSFORMERS_SOURCE"])


class ContrastiveEncoderTest(Mixin, unittest.TestCase):
    pipeline_model_mapping = {"image-feature-extraction": ContrastiveEncoder}


class StockClassesTest(Mixin, unittest.TestCase):
    """The same folders without our classes."""

    pipeline_model_mapping = {
        "image-feature-extraction": TimmWrapperModel,
        "image-classification": TimmWrapperForImageClassification,
    }


del Mixin
