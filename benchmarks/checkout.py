"""Makes the checkout importable where the package is not installed, as on a GPU machine without a network.

Importing this module is enough; it is a pytest plugin as well (`-p checkout`, with benchmarks/ on PYTHONPATH).
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("streammerge") is None:
    sys.path.append(str(ROOT))
if importlib.util.find_spec("streammerge.kernels") is None:  # installed, kernels/ is a part of the package
    import streammerge

    streammerge.__path__.append(str(ROOT))
