"""Differentiating through unrolled SGD steps, with the activations of one step at a time."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gkd_fast import distributed
from gkd_fast._arguments import check_choice
from gkd_fast._compilation import as_written
from gkd_fast._snapshot import Snapshot
from gkd_fast._training import beside_training

Objective = Callable[[], Tensor]

SECOND_DERIVATIVES = ("exact", "differences")
# ε‖v‖ over 1 + ‖θ‖: best of 1e-5 to 1e-1 on a network with ReLU (docs/guides/meta_learning.md).
DIFFERENCE_LENGTH = 1e-2


class UnrolledSGD:
    """Takes SGD steps on ``params``, then carries an outer gradient back through them to other parameters.

    A step is that of :class:`torch.optim.SGD` with momentum starting at zero: g = ∇L + wd·θ, m' = μ m + g,
    θ' = θ − η m' (Nesterov: θ' = θ − η (g + μ m')). The way back is the adjoint of the steps: each is replayed from its
    saved state, so the memory for activations is that of one step; parameters and momenta are kept for every step. An
    objective must be a function of the parameters, buffers and PyTorch's random state alone, so that the replay sees
    what the step saw: one that gives another value is an error. In a loop, ``lambda x=x: …`` holds on to the x of its
    own turn, where ``lambda: …`` would see the last one. A parameter without gradient in a step is left alone in it.
    Modules that are compiled run uncompiled here.

    What a replay is for is the product of the step's second derivatives with a vector v: ``"exact"`` differentiates the
    gradient a second time; ``"differences"`` takes [∇L(θ + εv) − ∇L(θ − εv)]/(2ε), two gradients and no second
    derivative, which is an estimate (Liu et al., *DARTS*, 2019, at every step instead of one).

    The scheme is that of Jang et al., *Learning What and Where to Transfer*, 2019. ::

        with UnrolledSGD(student.parameters(), [student], lr=0.05) as unrolled:
            unrolled.step(inner_objective)
            gradients = unrolled.hypergradient(outer_objective, meta_network.parameters())

    Leaving the block, by an exception too, puts parameters, buffers and random state back exactly; so does
    :meth:`hypergradient`. Without a block, call :meth:`rollback` if :meth:`hypergradient` is never reached.

    Args:
        params: parameters, or groups ``{"params": …}`` with their own ``lr``, ``momentum``, ``weight_decay``,
            ``nesterov``. They are changed in place while unrolled; their ``.grad`` is not touched.
        modules: the modules that the objectives run: their buffers are put back.
        lr: learning rate η ≥ 0.
        momentum: μ ≥ 0.
        weight_decay: wd ≥ 0.
        nesterov: Nesterov momentum; needs μ > 0.
        second_derivatives: ``"exact"`` or ``"differences"``.
        process_group: objectives are this rank's part of an objective that is their mean over the ranks, as
            :class:`gkd_fast.GraphKDLoss` gives it: gradients are averaged, in the steps and on the way back, and all
            ranks take the same steps and get the same hypergradient. All ranks make the same calls.

    Raises:
        ValueError: no parameter, one given twice, or a setting out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        modules: nn.Module | Iterable[nn.Module],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        second_derivatives: str = "exact",
        process_group: ProcessGroup | None = None,
    ):
        check_choice("second_derivatives", second_derivatives, SECOND_DERIVATIVES)
        self._second_derivatives = second_derivatives
        self._process_group = process_group
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        self._params: list[Tensor] = []
        self._settings: list[dict] = []
        for group in _groups(params):
            settings = defaults | {name: value for name, value in group.items() if name in defaults}
            _check_settings(settings)
            members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            self._params += members
            self._settings += [settings] * len(members)
        if not self._params:
            raise ValueError("params must hold at least one parameter, got none")
        if len({id(p) for p in self._params}) < len(self._params):
            raise ValueError("params must not hold the same parameter twice")
        self._modules = [modules] if isinstance(modules, nn.Module) else list(modules)
        # For each step its objective, the state before it, which parameters had a gradient in it, and its value here.
        self._trajectory: list[tuple[Objective, _State, list[bool], Tensor]] = []
        self._replayed: dict[int, Tensor] = {}
        self._start: _State | None = None
        self._momenta = [torch.zeros_like(p) for p in self._params]

    def __enter__(self) -> "UnrolledSGD":
        self._begin()
        return self

    def __exit__(self, *exception) -> None:
        self.rollback()

    @as_written()
    def step(self, objective: Objective) -> Tensor:
        """One SGD step on a scalar objective, which :meth:`hypergradient` calls again (once; twice for "differences").

        Returns:
            The objective's value before the step, detached.

        Raises:
            TypeError, ValueError: the objective does not return a scalar that depends on a parameter.
        """
        self._begin()
        state = _State(self._params, self._momenta, self._modules)
        own, value, gradients = self._differentiate(objective, self._params, create_graph=False)
        self._momenta = list(self._momenta)
        with torch.no_grad():
            for i, (p, g, s) in enumerate(zip(self._params, gradients, self._settings)):
                if g is None:
                    continue
                g = g + s["weight_decay"] * p
                m = self._momenta[i] = s["momentum"] * self._momenta[i] + g
                p.sub_(s["lr"] * (g + s["momentum"] * m if s["nesterov"] else m))
        torch.clear_autocast_cache()
        self._trajectory.append((objective, state, [g is not None for g in gradients], own))
        return value

    @as_written()
    def hypergradient(self, outer_objective: Objective, wrt: Iterable[Tensor]) -> list[Tensor]:
        """Gradient of the outer objective at the parameters reached, through all steps, at ``wrt``; then rolls back.

        Args:
            outer_objective: returns a scalar; it may also depend on ``wrt`` directly.
            wrt: the meta-parameters, none of them among ``params``.

        Returns:
            One gradient for each of ``wrt``, zero where nothing depends on it.

        Raises:
            TypeError, ValueError: the objective does not return a scalar that depends on a parameter.
            RuntimeError: a step's objective gave another value when it was replayed. Replays of ``"differences"`` are
                at other parameters: there the first step's objective alone is checked, by evaluating it once more.
        """
        wrt = list(wrt)
        self._begin()
        try:
            _, _, gradients = self._differentiate(outer_objective, [*self._params, *wrt], create_graph=False)
            gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, [*self._params, *wrt])]
            # a = ∂J/∂θ and b = ∂J/∂m after the step that is undone next.
            a, meta = gradients[: len(self._params)], gradients[len(self._params) :]
            b = [torch.zeros_like(p) for p in self._params]
            products = self._exact if self._second_derivatives == "exact" else self._differences
            for step in reversed(range(len(self._trajectory))):
                a, b, v = self._undo(self._trajectory[step][2], a, b)
                # (∂²L/∂φ∂θ)ᵀ v and h = (∂²L/∂θ²) v, which only earlier steps ask for.
                second = products(step, v, [*wrt, *self._params] if step > 0 else wrt)
                meta = [_add(x, h) for x, h in zip(meta, second)]
                a = [_add(x, h) for x, h in zip(a, second[len(wrt) :])]
            self._check_replays()
        finally:
            self.rollback()
        return meta

    def rollback(self) -> None:
        """Puts parameters, buffers and random state back to where they were before the first step."""
        if self._start is None:
            return
        self._start.restore(self._params)
        self._momenta = self._start.momenta
        self._start = None
        self._trajectory = []
        self._replayed = {}

    def _begin(self) -> None:
        if self._start is None:
            self._start = _State(self._params, self._momenta, self._modules)

    def _undo(self, touched: Sequence[bool], a, b):
        """One step of the adjoint but for its second derivatives: (a, b) before the step, and v = ∂J/∂g, None where
        there was no gradient."""
        a, b, v = list(a), list(b), [None] * len(a)
        for i, s in enumerate(self._settings):
            if not touched[i]:
                continue
            # n = ∂J/∂m' = b − η a (Nesterov: b − η μ a); v = ∂J/∂g = n (Nesterov: n − η a).
            n = b[i] - s["lr"] * (s["momentum"] * a[i] if s["nesterov"] else a[i])
            v[i] = n - s["lr"] * a[i] if s["nesterov"] else n
            a[i] = a[i] + s["weight_decay"] * v[i]
            b[i] = s["momentum"] * n
        return a, b, v

    def _exact(self, step: int, v, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Σ ⟨∂²L/∂θ∂input, v⟩ of a step's objective for every input, by a double backward."""
        objective, state, *_ = self._trajectory[step]
        state.restore(self._params)
        self._replayed[step], _, gradients = self._differentiate(objective, self._params, create_graph=True)
        pairs = [(g, x) for g, x in zip(gradients, v) if g is not None and g.requires_grad]
        if not pairs:
            return [None] * len(inputs)
        outputs, cotangents = zip(*pairs)
        return self._average(torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True))

    def _differences(self, step: int, v, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The same from gradients at θ ± εv."""
        objective, state, *_ = self._trajectory[step]
        if step == 0:
            state.restore(self._params)
            with torch.no_grad(), beside_training():
                self._replayed[step] = objective().detach()
        moved = [(p, x) for p, x in zip(self._params, v) if x is not None]
        if not moved:
            return [None] * len(inputs)
        state.restore(self._params)
        size, norm = (_norm(tensors) for tensors in zip(*moved))
        epsilon = DIFFERENCE_LENGTH * (1 + size) / norm.clamp(min=1e-30)
        sides = []
        for sign in (1, -1):
            state.restore(self._params)
            with torch.no_grad():
                for p, x in moved:
                    p.add_(sign * epsilon * x)
            torch.clear_autocast_cache()
            sides.append(self._differentiate(objective, inputs, create_graph=False)[2])
        return [None if p is None else (p - m) / (2 * epsilon) for p, m in zip(*sides)]

    def _check_replays(self) -> None:
        """RuntimeError where a replay's value is not the step's but for rounding; waits for the device once."""
        if not self._replayed:
            return
        steps = sorted(self._replayed)
        found = torch.stack([self._replayed[k].reshape(()) for k in steps])
        expected = torch.stack([self._trajectory[k][3].reshape(()) for k in steps])
        # Operations that add up in no fixed order may differ a little; another batch differs more.
        eps = torch.finfo(found.dtype).eps
        same = torch.isclose(found, expected, rtol=eps**0.5, atol=eps, equal_nan=True)
        if not same.all():
            place = int(same.logical_not().nonzero()[0])
            step, was, now = steps[place], expected[place].item(), found[place].item()
            raise RuntimeError(
                f"objective of step {step} gave {was} in the step and {now} when it was replayed: it must depend on "
                "parameters, buffers and PyTorch's random state alone; in a loop over x, a lambda sees its last x "
                "unless it holds its own: lambda x=x: ..."
            )

    def _average(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The mean over the ranks, where there are several."""
        result = list(tensors)
        if self._process_group is not None:
            places = [k for k, x in enumerate(tensors) if x is not None]
            means = distributed.average([x for x in tensors if x is not None], self._process_group)
            for k, mean in zip(places, means):
                result[k] = mean
        return result

    def _differentiate(self, objective: Objective, inputs: Sequence[Tensor], create_graph: bool):
        """This rank's value, the mean over the ranks and the gradients."""
        with torch.enable_grad(), beside_training():
            value = objective()
            if not isinstance(value, Tensor):
                raise TypeError(f"objective must return a Tensor, got {type(value).__name__}")
            if value.numel() != 1:
                raise ValueError(f"objective must return a scalar, got shape {tuple(value.shape)}")
            if not value.requires_grad:
                raise ValueError("objective must return a value that depends on a parameter, got one without gradient")
            gradients = torch.autograd.grad(value.sum(), inputs, create_graph=create_graph, allow_unused=True)
        own = value.detach()
        if create_graph:  # of this rank's part: what is averaged is its second derivative
            return own, own, gradients
        mean, *means = self._average([own, *gradients])
        return own, mean, means


class _State:
    """Parameters, momenta, buffers and random state before a step."""

    def __init__(self, params: Sequence[Tensor], momenta: Sequence[Tensor], modules: Sequence[nn.Module]):
        self.values = [p.detach().clone() for p in params]
        self.momenta = list(momenta)
        self.surroundings = Snapshot(modules)

    @torch.no_grad()
    def restore(self, params: Sequence[Tensor]) -> None:
        for p, value in zip(params, self.values):
            p.copy_(value)
        self.surroundings.restore()
        # Autocast would go on using its low-precision copies of the parameters.
        torch.clear_autocast_cache()


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x.detach()) for x in tensors]))


def _add(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x + y


def _groups(params: Iterable[Tensor] | Iterable[dict]) -> list[dict]:
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of parameters or groups, got a Tensor")
    members = list(params)
    groups = [member for member in members if isinstance(member, dict)]
    if groups and len(groups) < len(members):
        raise TypeError("params must be parameters or groups, got both")
    return groups or [{"params": members}]


def _check_settings(settings: dict) -> None:
    for name in ("lr", "momentum", "weight_decay"):
        if not settings[name] >= 0:
            raise ValueError(f"{name} must not be negative, got {settings[name]}")
    if settings["nesterov"] and settings["momentum"] == 0:
        raise ValueError("nesterov needs a momentum above 0, got 0")
