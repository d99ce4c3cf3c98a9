"""The Triton kernels of the ops, one file per op."""

from gkd_fast.kernels.specializations import ARCHITECTURES, Specialization, compile, specializations

__all__ = ["ARCHITECTURES", "Specialization", "compile", "specializations"]
