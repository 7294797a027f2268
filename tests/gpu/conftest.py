"""What the tests of the kernels on a GPU share."""

from typing import Any

import pytest

from plugins.build import build
from plugins.call import open_library
from plugins.load import PluginError


@pytest.fixture(scope="module")
def library() -> Any:
    """The plugins' C functions, compiled first where `plugins/lib` has none that fits."""
    try:
        return open_library(build())
    except PluginError as why:
        pytest.skip(str(why))
