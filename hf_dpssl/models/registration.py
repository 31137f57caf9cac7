"""What this package adds to its model classes where it is installed: AutoConfig, AutoModel, and its own push_to_hub."""

from __future__ import annotations

import importlib

from transformers import AutoConfig, AutoModel


def push_to_hub(self, repo_id: str, **options):
    """Publish in the layout of `hf-dpssl push`, see `hf_dpssl.push_to_hub`."""
    # By the package's public name: models import nothing above them.
    return importlib.import_module("hf_dpssl").push_to_hub(self, repo_id, **options)


def register(config_class: type, model_class: type) -> None:
    """AutoConfig and AutoModel find the classes, which write `auto_map` and publish as `hf-dpssl push` does."""
    AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(config_class, model_class)
    config_class.register_for_auto_class("AutoConfig")
    model_class.register_for_auto_class("AutoModel")
    model_class.push_to_hub = push_to_hub
