"""What users bring along and name by its import path: models, data sets, optimizers."""

import importlib
from typing import Any


def imported(path: str) -> Any:
    """What ``package.module:name`` names.

    Raises:
        ValueError: there is none.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
