"""The command line `hf-dpssl`: commands.py is the table; one file per subcommand, which parses before it imports.

errors.py turns what a user can mend into one line and an exit code. May import every room."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
