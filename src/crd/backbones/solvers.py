"""Solvers of the sampling ODE, and their time grids as the stock schedulers lay them out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from crd.backbones.vp import flow_time, vp_norm
from crd.errors import CRDError
from crd.flow import DPM, EULER, SOLVERS

# Whose configurations say how a model was trained and where its grid lies. Those of other schedulers (ancestral, LCM,
# TCD) belong to models that want noise in every step.
FLOW_SCHEDULERS: tuple[type[Any], ...] = (FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler)
DDPM_SCHEDULERS: tuple[type[Any], ...] = (
    EulerDiscreteScheduler,
    DDIMScheduler,
    PNDMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
# Options under which a step is not the solver's, or has noise in it.
_REFUSED: dict[str, tuple[object, ...]] = {
    "stochastic_sampling": (True,),
    "invert_sigmas": (True,),
    "thresholding": (True,),
    "timestep_type": ("continuous",),
    "algorithm_type": ("dpmsolver", "sde-dpmsolver", "sde-dpmsolver++"),
    "final_sigmas_type": ("sigma_min",),
}

Step = Callable[[int, Tensor, Tensor], Tensor]  # number of the step, x, velocity -> next x


@dataclass(frozen=True)
class Grid:
    """Where a solver of S steps evaluates the velocity, in time of the straight path."""

    sigmas: Tensor  # (S + 1,) float32 on the CPU, decreasing, the last one 0
    times: Tensor  # (S,) what the denoiser is told; not `sigmas` where the stock scheduler rounds its timesteps
    start: float = 1.0  # the first latent is `start` times the noise
    solver: str = EULER
    options: Mapping[str, Any] = field(default_factory=dict)  # of DPMSolverMultistepScheduler

    def stepper(self) -> Step:
        """The solver's update; it may remember earlier steps, so every batch needs its own.

        euler:        x <- x + (σ_next - σ) v
        dpmsolver++:  second-order multistep in x0 = x - σ v (Lu et al., arXiv 2211.01095, algorithm 2)
        """
        if self.solver == EULER:
            return lambda index, x, v: x + (self.sigmas[index + 1] - self.sigmas[index]).item() * v
        flow_mode = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        scheduler: Any = DPMSolverMultistepScheduler(**flow_mode, **self.options)
        scheduler.set_timesteps(len(self.sigmas) - 1)
        scheduler.sigmas = self.sigmas
        scheduler.set_begin_index(0)
        return lambda index, x, v: scheduler.step(v, scheduler.timesteps[index], x, return_dict=False)[0]


def check_known(solver: str) -> None:
    """Raise CRDError for the name of no solver."""
    if solver not in SOLVERS:
        raise CRDError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")


def solver_scheduler(own: Any, solver: str, flow: bool) -> Any:
    """The stock scheduler of a solver: `Class.from_config(own.config)`, as in `pipe.scheduler = ...`; `own` is kept.

    Args:
        own: the pipeline's scheduler.
        solver: "euler" or "dpmsolver++".
        flow: the model is a flow-matching one, not a DDPM one.

    Raises:
        CRDError: an unknown solver, or a scheduler of another kind or with options that change the step.
    """
    check_known(solver)
    allowed = FLOW_SCHEDULERS if flow else DDPM_SCHEDULERS
    if not issubclass(type(own), allowed):
        names = ", ".join(kind.__name__ for kind in allowed)
        raise CRDError(f"the model's scheduler must be one of {names}, got {type(own).__name__}; replace it")
    euler: type[Any] = FlowMatchEulerDiscreteScheduler if flow else EulerDiscreteScheduler
    kind: type[Any] = euler if solver == EULER else DPMSolverMultistepScheduler
    settings = own.config
    if flow and not settings.get("use_flow_sigmas", True):
        raise CRDError("the model is a flow-matching one, got a scheduler with use_flow_sigmas=False; replace it")
    extra: dict[str, Any] = {}
    if flow and not isinstance(own, kind):
        flow_mode = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        extra = {"shift": settings.flow_shift} if solver == EULER else {**flow_mode, "flow_shift": settings.shift}
    # A copy keeps what was set on the object, from_config only what is in its configuration.
    scheduler = copy.deepcopy(own) if isinstance(own, kind) else kind.from_config(settings, **extra)
    for option, values in _REFUSED.items():
        if option in scheduler.config and scheduler.config[option] in values:
            found = scheduler.config[option]
            raise CRDError(f"the scheduler option {option}={found} is not supported; change it in the model's config")
    return scheduler


def takes_shift(own: Any) -> bool:
    """Whether `DPMSolverMultistepScheduler` with this configuration takes the shift that a stock call gives."""
    exponential = own.config.get("time_shift_type", "exponential") == "exponential"
    return bool(own.config.get("use_dynamic_shifting", False)) and exponential


def plain_grid(own: Any, num_steps: int, solver: str, flow: bool) -> Grid:
    """The grid of a scheduler by itself; arguments as in `solver_scheduler`.

    Where the stock pipeline lays out its own or shifts it by the picture's size, only the number of its levels and its
    ends, near 1 and 0, are those of a rollout, up to 1e-3. `PipelineBackbone.keeps_scheduler_grid` says where not.
    """
    scheduler = solver_scheduler(own, solver, flow)
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting", False) else {}
    scheduler.set_timesteps(num_steps, **shift)
    return read_grid(scheduler, solver, flow)


def read_grid(scheduler: Any, solver: str, flow: bool) -> Grid:
    """The grid of a scheduler after its `set_timesteps`."""
    options: dict[str, Any] = {}
    if solver == DPM:
        names = ("solver_order", "solver_type", "lower_order_final", "euler_at_final")
        options = {name: scheduler.config[name] for name in names}
    levels = scheduler.sigmas.to("cpu")
    if flow:
        sigmas = levels.float()
        # DPMSolverMultistepScheduler rounds its timesteps down, and the stock denoiser is told those.
        told = scheduler.timesteps.cpu().float() / scheduler.config.num_train_timesteps
        if len(sigmas) > 2 and sigmas[-2] == 0:  # the stock Z-Image of diffusers 0.37 ends on a step from 0 to 0
            sigmas, told = sigmas[:-1], told[:-1]
        return Grid(sigmas, sigmas[:-1] if solver == EULER else told, 1.0, solver, options)
    sigmas = flow_time(levels.double())
    first = sigmas[0]
    # EulerDiscreteScheduler steps through x_vp / alpha, the other through x_vp itself.
    unit = 1 - first if solver == EULER else vp_norm(first)
    start = float(scheduler.init_noise_sigma * unit)
    return Grid(sigmas.float(), sigmas[:-1].float(), start, solver, options)
