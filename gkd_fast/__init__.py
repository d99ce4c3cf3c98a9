"""Graph knowledge distillation at any batch size."""

from gkd_fast import functional

__version__ = "0.1.0"
__all__ = ["functional", "__version__"]
