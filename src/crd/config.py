"""The one configuration of a run: typed, frozen, defaults as published. `config_io.py` reads it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from crd.advantages import KL_GATES, NORMALIZATIONS
from crd.alarm import ACTIONS
from crd.errors import CRDError
from crd.flow import EULER, INDEPENDENT, SOLVERS, TIMESTEP_MODES
from crd.objectives import objective_config
from crd.objectives.base import TRAJECTORY
from crd.objectives.kl import ObjectiveConfig
from crd.schedules import KLRamp, LearningRate, RampDecay
from crd.setting_checks import check_option

MIXED_PRECISION = ("auto", "no", "bf16")
BASE_DTYPES = ("float32", "bfloat16")
COMPILE = ("no", "regional")

AUTO: Literal["auto"] = "auto"
ROWS_WITHOUT_GPU = 32  # what `micro_batch: auto` and `rollout_batch: auto` are there

# What a resumed run may change: everything else would make it another run.
RESUMABLE = frozenset({
    "updates", "eval_every", "save_every", "keep_checkpoints", "micro_batch", "rollout_batch", "cache_references",
    "overlap_rewards", "vae_slicing", "attention_backend", "compile", "cache_prompts", "threads", "peer_timeout",
    "device", "tensorboard", "wandb", "eval_base_guidance", "alarm",
})  # fmt: skip


@dataclass(frozen=True)
class CRDConfig:
    """Settings of one run.

    Defaults are the published ones for SD3.5-Medium (arXiv 2603.14128, OCR run), but for its size of 512 px.
    `docs/configuration.md` explains each field; an unknown key in YAML or on the command line is an error.
    """

    # What is trained, on what, for what.
    model: str = "tiny-sd3"
    rewards: tuple[str, ...] = ("ocr",)
    reward_weights: tuple[float, ...] | None = None  # None = 1 each
    reward_normalization: str = "none"  # "group": each reward is normalised within its group before the sum
    prompts: str = "world:train"  # .txt, .jsonl, world:train, scenes:train, geneval:train; A+B; A@REWARD
    eval_prompts: str | None = "world:test:64"
    output_dir: str = "runs/crd"
    seed: int = 0

    # Geometry of one update.
    updates: int = 150
    prompts_per_update: int = 48
    group_size: int = 24
    optimizer_steps: int = 2  # per update; groups are never split between them

    # Rollouts.
    rollout_steps: int = 10
    rollout_guidance: float = 1.0
    solver: str = "euler"  # of rollouts and evaluation
    height: int | None = None  # None = the model's default
    width: int | None = None

    # Training draws: every image is noised `draws` times in its optimizer step.
    draws: int = 9
    timesteps: str = "rollout_grid"
    timestep_fraction: float = 0.99
    share_timesteps: bool = True  # one t per group and draw, independent noise
    share_noise: bool = False  # one noise per group and draw, too

    # Objective. Each reads its own of these; setting one that it does not read is an error.
    objective: str = "crd"
    beta: float = 1.0
    centering: str = "uniform"
    centering_prompts: int = 1  # centered together; only 1 cancels log Z
    tau: float = 1.0
    form: str = "squared"
    residual: str = "per_draw"
    weighting: str = "adaptive"
    loss_scale: float = 5.0
    matching_loss: str = "squared"
    clip_range: float = 1e-4
    sde_noise: float = 0.7  # a of the sampler's noise a sqrt(t / (1 - t)); evaluation stays without
    best_of: int = 1
    advantage_clip: float = 5.0

    # Drift control 1: separate snapshots, `decay(n) = min(start + (n - start_step) slope, end)`.
    decouple_sampler: bool = True  # False: rollouts come from `old`
    old_start: float = 0.25
    old_slope: float = 0.005
    old_start_step: int = 0
    old_end: float = 0.999
    sampler_start: float = 0.0
    sampler_slope: float = 0.0075
    sampler_start_step: int = 75
    sampler_end: float = 0.999

    # Drift controls 2 and 3: KL to the CFG-guided pretrained model, its strength led by the reward.
    anchor_guidance: float = 4.5  # 1 = anchor without CFG
    kl_gate: str = "reward"
    kl_min: float = 1e-4
    kl_max: float = 0.1  # 0 = no anchor
    kl_reward_range: tuple[float, float] = (0.0, 1.0)
    kl_start_scale: float = 1.0  # of both strengths in the first update
    kl_ramp_updates: int = 0  # the first ones, over which that goes to 1
    distill_updates: int = 0  # the first ones, which train the KL term alone

    # Optimisation.
    finetune: str = "lora"  # or "full"
    lora_rank: int = 32
    lora_alpha: float = 64.0
    lora_targets: tuple[str, ...] | None = None  # None = the backbone's attention projections
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    cooldown_updates: int = 0  # the last ones, over which the rate falls to 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0

    # Execution. Micro-batches change speed and memory, never the result (up to rounding).
    device: str = "auto"
    mixed_precision: str = "no"
    base_dtype: str = "float32"  # of the pretrained weights; adapters are always float32
    micro_batch: int | Literal["auto"] = 32  # rows per denoiser call in training; auto = what fits into the GPU
    rollout_batch: int | Literal["auto"] = 32  # images per denoiser call in rollouts and evaluation; likewise
    cache_references: bool = True  # keep old/anchor velocities of one optimizer step instead of recomputing
    overlap_rewards: bool = False  # a thread scores images while others are drawn
    gradient_checkpointing: bool = False
    vae_slicing: bool = False  # decode one picture at a time
    attention_backend: str | None = None  # of diffusers; None = its default
    compile: str = "no"  # "regional": the repeated blocks of the denoiser
    cache_prompts: bool = False  # encode all prompts of the run first, then let the text encoders leave the device
    threads: int | None = None  # CPU threads of torch; None = torch's choice
    peer_timeout: float = 1800.0  # s that a process of several waits for the others

    # Evaluation, saving, logging.
    eval_every: int = 25  # updates; 0 = only before and after
    eval_steps: int = 40
    eval_images: int = 1  # per prompt
    held_out: tuple[str, ...] = ()  # scorers that judge evaluations and are not trained on
    alarm: str = "warn"  # what a warning of the reward-hacking alarm does; "off": no comparison with the base model
    eval_base_guidance: tuple[float, ...] = ()  # CFG scales of the base model to compare with at the end
    save_every: int = 25
    keep_checkpoints: int = 2  # the last N; the best is kept besides
    tensorboard: bool = True
    wandb: bool = False

    def __post_init__(self) -> None:
        # As a file would hold them, in which the run is recorded.
        for name, value in self.__dict__.items():
            if isinstance(value, list | Path):
                object.__setattr__(self, name, tuple(value) if isinstance(value, list) else str(value))
        check_option("timesteps", self.timesteps, TIMESTEP_MODES)
        check_option("kl_gate", self.kl_gate, KL_GATES)
        check_option("reward_normalization", self.reward_normalization, NORMALIZATIONS)
        check_option("alarm", self.alarm, ACTIONS)
        check_option("solver", self.solver, SOLVERS)
        check_option("compile", self.compile, COMPILE)
        if self.alarm == "raise_kl" and self.kl_max == 0:
            raise CRDError("alarm=raise_kl needs an anchor to strengthen, got kl_max=0; set kl_max, or use stop")
        check_option("finetune", self.finetune, ("lora", "full"))
        if self.mixed_precision == "fp16":
            raise CRDError("mixed_precision=fp16 is not resumable exactly yet (its loss scale is not saved); use bf16")
        check_option("mixed_precision", self.mixed_precision, MIXED_PRECISION)
        check_option("base_dtype", self.base_dtype, BASE_DTYPES)
        if self.base_dtype == "bfloat16" and self.finetune == "full":
            raise CRDError("base_dtype=bfloat16 would round away small updates of finetune=full; use float32, or lora")
        positive = ("updates", "prompts_per_update", "group_size", "optimizer_steps", "rollout_steps", "draws",
                    "lora_rank", "lora_alpha", "learning_rate", "max_grad_norm", "advantage_clip", "peer_timeout",
                    "eval_steps", "eval_images", "keep_checkpoints")  # fmt: skip
        for name in positive:
            _check_above(name, self._value(name), 0)
        for name, rows in (("micro_batch", self.micro_batch), ("rollout_batch", self.rollout_batch)):
            if isinstance(rows, str):
                check_option(name, rows, (AUTO,))
            else:
                _check_above(name, rows, 0)
        for name in ("warmup_steps", "cooldown_updates", "distill_updates", "weight_decay", "eval_every", "save_every"):
            _check_above(name, self._value(name), 0, inclusive=True)
        for name in ("learning_rate", "lora_alpha", "weight_decay", "rollout_guidance", "anchor_guidance",
                     "advantage_clip", "peer_timeout"):  # fmt: skip
            _check_finite(name, self._value(name))
        for number in (*self.kl_reward_range, *self.eval_base_guidance, *(self.reward_weights or ())):
            _check_finite("kl_reward_range, eval_base_guidance and reward_weights", number)
        if not 0 < self.timestep_fraction <= 1:
            raise CRDError(f"timestep_fraction must lie in (0, 1], got {self.timestep_fraction}; published: 0.99")
        for name in ("height", "width", "threads"):
            if self.__dict__[name] is not None:
                _check_above(name, self._value(name), 0)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= self._value(name) < 1:
                raise CRDError(f"{name} must lie in [0, 1), got {self._value(name)}; published: 0.9 and 0.999")
        low, high = self.kl_reward_range
        if not low < high:
            raise CRDError(f"kl_reward_range must be [low, high] with low < high, got {[low, high]}")
        self._check_update()
        # Built here so that a bad value is refused before any model is loaded.
        needs = self.needs
        self.rate_schedule()
        self.old_schedule()
        self.sampler_schedule()
        self.kl_ramp()
        if TRAJECTORY in needs:
            self._check_trajectories()

    def _check_update(self) -> None:
        """Refuse sizes, draws and terms of an update that do not go together."""
        if self.distill_updates > 0 and self.kl_max == 0:
            raise CRDError(f"distill_updates={self.distill_updates} trains the KL to the anchor alone, got kl_max=0; "
                           "set kl_max, or leave distill_updates out")  # fmt: skip
        if self.group_size < 2:
            raise CRDError(
                f"group_size must be 2 or more (one image has no group to be centered in), got {self.group_size}"
            )
        if self.optimizer_steps > self.prompts_per_update:
            raise CRDError(
                f"optimizer_steps={self.optimizer_steps} exceeds prompts_per_update={self.prompts_per_update}; "
                "a step takes whole groups, so lower it"
            )
        if self.best_of >= self.group_size:
            raise CRDError(f"best_of={self.best_of} keeps every image of group_size={self.group_size}; lower it")
        if self.residual == "leave_one_out" and self.draws < 2:
            raise CRDError("residual=leave_one_out needs draws of 2 or more, got 1; raise draws")
        if self.residual == "leave_one_out" and self.timesteps not in INDEPENDENT:
            raise CRDError(f"residual=leave_one_out needs draws that are independent of each other, got timesteps="
                           f"{self.timesteps}; set timesteps to {' or '.join(INDEPENDENT)}")  # fmt: skip
        if self.share_noise and not self.share_timesteps:
            raise CRDError("share_noise=true needs share_timesteps=true (the noise of a group goes with its t), got "
                           "false; set it, or leave share_noise out")  # fmt: skip
        most = -(-self.prompts_per_update // self.optimizer_steps)
        if self.centering_prompts > most:
            raise CRDError(f"centering_prompts={self.centering_prompts} exceeds the {most} prompts of an optimizer "
                           "step (prompts_per_update / optimizer_steps); lower it")  # fmt: skip

    def _check_trajectories(self) -> None:
        """Refuse what does not go with training on the steps of the policy's own trajectories."""
        drawing = "sampler" if self.decouple_sampler else "old"
        wanted = {"solver": EULER, "timesteps": "rollout_grid", "share_noise": False,
                  f"{drawing}_start": 0.0, f"{drawing}_slope": 0.0}  # fmt: skip
        for name, value in wanted.items():
            if self.__dict__[name] != value:
                raise CRDError(f"objective={self.objective} trains on steps of the policy's own trajectories on the "
                               f"{EULER} grid, got {name}={self.__dict__[name]}; set {name}={value}")  # fmt: skip

    def _value(self, name: str) -> float:
        value: float = self.__dict__[name]
        return value

    @property
    def needs(self) -> frozenset[str]:
        """What the loss reads beside the policy's velocity, as `Objective.needs`."""
        return self.objective_config().build().needs

    @property
    def automatic(self) -> bool:
        """Whether a batch size is left to the plan of the run."""
        return AUTO in (self.micro_batch, self.rollout_batch)

    def evaluation_is_due(self, update: int) -> bool:
        """Whether a run is evaluated after so many updates."""
        return update in (0, self.updates) or (self.eval_every > 0 and update % self.eval_every == 0)

    def batches(self, micro_batch: int, rollout_batch: int) -> tuple[int, int]:
        """`micro_batch` and `rollout_batch` as they are set, or as given here where they are "auto"."""
        return (
            micro_batch if isinstance(self.micro_batch, str) else self.micro_batch,
            rollout_batch if isinstance(self.rollout_batch, str) else self.rollout_batch,
        )

    def objective_config(self) -> ObjectiveConfig:
        """The chosen objective's own settings."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return objective_config(self.objective, self.__dict__, defaults)

    def rate_schedule(self) -> LearningRate:
        """Learning rate over optimizer steps and updates."""
        return LearningRate(self.learning_rate, self.warmup_steps, self.cooldown_updates, self.updates)

    def old_schedule(self) -> RampDecay:
        """Decay of the `old` snapshot over optimizer steps."""
        return RampDecay(self.old_start, self.old_slope, self.old_start_step, self.old_end)

    def sampler_schedule(self) -> RampDecay:
        """Decay of the `sampler` snapshot over optimizer steps."""
        return RampDecay(self.sampler_start, self.sampler_slope, self.sampler_start_step, self.sampler_end)

    def kl_ramp(self) -> KLRamp:
        """Factor of the KL strengths over updates."""
        return KLRamp(self.kl_start_scale, self.kl_ramp_updates)

    def to_yaml(self) -> str:
        """The resolved configuration; `load_config` of it gives the same object."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(plain, sort_keys=False)


def _check_above(name: str, value: float, bound: float, inclusive: bool = False) -> None:
    if not (value >= bound if inclusive else value > bound):
        raise CRDError(f"{name} must be {'at least' if inclusive else 'above'} {bound:g}, got {value}")


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise CRDError(f"{name} must be finite, got {value}; give a number")
