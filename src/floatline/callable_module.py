"""A package that can be called: `fl.plan(...)` is a function, `floatline.plan` the package that it lives in.

Once a package is imported, it is the attribute of its parent, whatever the parent's `__getattr__` would return. So the
package itself passes calls on to its main function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


def make_callable(package: str, home: str, name: str) -> None:
    """Let `package` be called like the function `name` of the module `home`, which is imported at the first call.

    Args:
        package: Dotted name of an imported package.
        home: Dotted name of the module that holds the function.
        name: The function.
    """

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            function: Callable[..., Any] = getattr(import_module(home), name)
            return function(*args, **kwargs)

        @property
        def __wrapped__(self) -> Callable[..., Any]:  # so that help and signatures are the function's
            function: Callable[..., Any] = getattr(import_module(home), name)
            return function

    sys.modules[package].__class__ = CallableModule
