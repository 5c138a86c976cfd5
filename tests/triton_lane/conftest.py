"""The Triton kernels against their twins: on a GPU natively, elsewhere under the interpreter (TRITON_INTERPRET=1).

`make test` runs this folder a second time with the variable set, in a process of its own: Triton reads it once, when
it is imported. Without a GPU and without the variable the folder is skipped, visibly.
"""

from __future__ import annotations

import pytest
from lane import REASON


def pytest_collection_modifyitems(items):
    for item in items:
        if REASON and "triton_lane" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason=f"{REASON}; make test runs this folder under the interpreter"))
