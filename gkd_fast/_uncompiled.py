"""What ``torch.compile`` calls instead of compiling it. Imports torch._dynamo, which takes two seconds."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="process groups and column banks are not compiled")
def uncompiled(function: Callable, *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)
