"""Launches without what Triton's JIT derives anew each time: a kernel with its compile-time arguments is bound once.

At every launch the JIT binds all arguments by name, writes options and constants into a key of text, and compares the
module's globals: several times what the launch itself takes. Here a launch reads off the arguments that change what
Triton would specialise on, with the binder that Triton generates for them (types, alignment of pointers, ints that are
1, divisible by 16 or beyond 32 bits, also within tuples), and looks up the kernel that the JIT compiled for just these.
"""

import inspect
from typing import Any

from triton import knobs
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, create_function_from_signature


class Launch:
    """A kernel with its compile-time arguments and options: ``Launch(kernel, constants)(grid, *arguments)``.

    The arguments are the kernel's first ones, the constants all that follow. In Triton's interpreter it is the kernel.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]):
        names = list(kernel.arg_names)
        self.kernel, self.constants = kernel, constants
        self._count = sum(name not in constants for name in names)
        if any(name not in constants for name in names[self._count :]):
            raise ValueError(f"the constants of {kernel.__name__} must be its last arguments, got {sorted(constants)}")
        self._values = tuple(constants[name] for name in names[self._count :])
        self._is_compiled = isinstance(kernel, JITFunction)
        self._of_device: dict[int, tuple[Any, dict[tuple, CompiledKernel]]] = {}

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        if not self._is_compiled:
            self.kernel[grid](*arguments, **self.constants)
            return
        active = driver.active
        device = active.get_current_device()
        bind, variants = self._of_device.get(device) or self._prepare(device)
        key = tuple(bind(*arguments)[1])
        variant = variants.get(key)
        if variant is None or self.kernel.pre_run_hooks:
            # The JIT compiles it, or gets it from Triton's cache.
            variant = self.kernel.run(*arguments, grid=grid, warmup=False, **self.constants)
            if isinstance(variant, CompiledKernel):
                variants[key] = variant
            return
        stream = active.get_current_stream(device)
        values = (*arguments, *self._values)
        runtime = knobs.runtime
        # None for an empty chain of hooks, so that nothing is prepared for it and nobody calls back.
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        enter = enter if getattr(enter, "calls", enter) else None
        leave = leave if getattr(leave, "calls", leave) else None
        metadata = variant.launch_metadata(grid, stream, *values) if enter or leave else None
        x, y, z = (*grid, 1, 1)[:3]
        variant.run(x, y, z, stream, variant.function, variant.packed_metadata, metadata, enter, leave, *values)

    def variant(self, *arguments: Any) -> CompiledKernel | None:
        """The compiled kernel that arguments like these were launched with on this device; None: they were not yet."""
        device = driver.active.get_current_device()
        bind, variants = self._of_device.get(device) or self._prepare(device)
        return variants.get(tuple(bind(*arguments)[1]))

    def _prepare(self, device: int) -> tuple[Any, dict[tuple, CompiledKernel]]:
        found = self._of_device[device] = self._binder(), {}
        return found

    def _binder(self) -> Any:
        """Triton's own binder, of the arguments that change."""
        parameters = list(self.kernel.signature.parameters.values())[: self._count]
        backend = make_backend(driver.active.get_current_target())
        return create_function_from_signature(inspect.Signature(parameters), self.kernel.params[: self._count], backend)


def launch(kernel: Any, **constants: Any) -> Launch:
    """The one ``Launch`` of a kernel with these compile-time arguments and options."""
    # Of equal values of two types, 1 and True, Triton makes two kernels.
    key = id(kernel), tuple(constants.items()), tuple(map(type, constants.values()))
    found = _launches.get(key)
    if found is None:
        found = _launches[key] = Launch(kernel, constants)
    return found


# Each holds its kernel, whose id is no other's then.
_launches: dict[tuple, Launch] = {}
