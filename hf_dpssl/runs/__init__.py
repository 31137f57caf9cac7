"""What every run has: flags and recipes, the training loop, checkpoints, processes, results, curves.

Read training_loop.py first, then recipe.py; rehearsal.py and rehearsed_memory.py run a step on a GPU that is not there.
May import models, contrastive, data and evaluation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
