"""Modules that may also be called: `loralab.methods()` beside `from loralab.methods import get`."""

import sys
import types
from typing import Any


def make_callable(module_name: str, function_name: str) -> None:
    """Make calling the module the same as calling its function `function_name`.

    The public contract names three functions (`methods`, `recipe`, `curvature`) after the
    modules that hold them, and Python gives the module's name to the module.
    """

    class CallableModule(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, function_name)(*args, **kwargs)

    sys.modules[module_name].__class__ = CallableModule
