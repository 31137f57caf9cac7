"""Other codes' checkpoints in (importers), other libraries' formats out (exports).

Read encoder_importers.py and exports.py first; pickled_tensors.py reads strangers' files without running them. May
import rooms up to hub."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
