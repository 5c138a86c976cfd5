"""streammerge.kernels: the device kernels and their plain torch twins (floor 0: imports torch, triton and itself only).

Kept light, relative and unable to raise: with the repository's root on sys.path, a bare `import kernels` from another
library finds this folder. Names resolve on first use. No file is called as a function is: importing it would put the
module in the function's place.
"""

_HOME = dict.fromkeys(("gram_update", "row_gram", "project", "span_mass", "why_not", "ran", "forget"), "dispatch")
_HOME |= {"KernelUnavailable": "dispatch", "attended_inputs": "reference",
          "span_mass_normalised": "reference"}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("." + _HOME[name], __name__), name)
