"""The plan of a run: geometry, memory by part, micro-batches that fit, forwards of an update."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crd.backbones.base import CFG, guided_velocity
from crd.backbones.pipeline import PipelineBackbone
from crd.backbones.solvers import plain_grid
from crd.config import ROWS_WITHOUT_GPU, CRDConfig
from crd.errors import CRDError
from crd.execution import memory_advice, prepare_backbone
from crd.loading import DTYPES, build_snapshots
from crd.planning.footprint import Footprint, as_on_gpu, measure, reserve_gradients, run_backward
from crd.planning.model_files import read_model
from crd.planning.skeleton import Skeleton, build_skeleton, size_of
from crd.planning.workload import Forwards, Geometry, forwards, geometry, references, rows_per_image
from crd.run_parts import check_settings, check_times, trained_roles

MARGIN = 0.1  # of the memory, left to the CUDA context, fragments of the allocator and workspaces of kernels
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Memory:
    """Expected bytes on one device. What lies there all along, what a phase of an update adds, and what lies there
    before: the whole weights, text encoders and VAE, until the encoders leave and the weights are spread."""

    weights: int  # of the denoiser, and its copies in full fine-tuning
    text_encoders: int
    vae: int
    adapters: int
    gradients: int
    optimizer: int
    gathered: int  # of sharded weights, while they are needed
    images: int  # latents and conditioning of an update
    references: int  # cached velocities of one optimizer step
    training: int  # activations of a micro-batch and its backward pass
    rollout: int  # drawing and decoding of a rollout batch, or of one in evaluation
    loading: int  # all that lies there when the model has been loaded, and none of the above

    @property
    def total(self) -> int:
        """The largest of loading and the two phases of an update."""
        phases = self.references + self.training, self.rollout
        lasting = sum(dataclasses.astuple(self)) - sum((self.references, self.training, self.rollout, self.loading))
        return max(lasting + max(phases), self.loading)


@dataclass(frozen=True)
class Plan:
    """What a run asks of each of its devices."""

    model: str
    origin: str  # of the model's configuration
    gpus: int
    sharding: str
    height: int
    width: int
    trainable: int  # numbers
    geometry: Geometry
    micro_batch: int
    rollout_batch: int
    forwards: Forwards
    memory: Memory
    available: int | None  # bytes of a device; None = not said


def plan_run(config: CRDConfig, gpus: int = 1, sharding: str = "ddp", available: int | None = None) -> Plan:
    """Plan a run from its settings and the configuration files of its model.

    Args:
        config: of the run.
        gpus: processes, one device each.
        sharding: "ddp", "zero2" or "fsdp2", as the files of `crd/launch`.
        available: bytes of one device. A micro-batch that is "auto" is the largest power of two that leaves `MARGIN`
            of it free; None: no GPU is there to plan for, and it is `ROWS_WITHOUT_GPU`.

    Raises:
        CRDError: settings that do not fit the model, or a run that does not fit the device.
    """
    if sharding != "ddp" and config.finetune == "full":
        raise CRDError("finetune=full cannot be sharded over processes; use finetune=lora, or --sharding ddp")
    model = read_model(config.model)
    skeleton = build_skeleton(model, DTYPES[config.base_dtype])
    check_without_weights(skeleton.backbone, config)
    estimate = _Estimate(config, skeleton, gpus, sharding)
    micro_batch, rollout_batch = estimate.micro_batches(available)
    height, width = skeleton.backbone.default_size
    return Plan(
        model=config.model,
        origin=model.origin,
        gpus=gpus,
        sharding=sharding,
        height=config.height or height,
        width=config.width or width,
        trainable=estimate.trainable,
        geometry=estimate.geometry,
        micro_batch=micro_batch,
        rollout_batch=rollout_batch,
        forwards=forwards(config, skeleton.backbone, gpus, micro_batch),
        memory=estimate.memory(micro_batch, rollout_batch),
        available=available,
    )


def check_without_weights(backbone: PipelineBackbone, config: CRDConfig) -> None:
    """Refuse settings that do not fit the model, as far as its configuration files tell.

    Raises:
        CRDError: as `check_settings` and `check_times`.
    """
    check_settings(backbone, config)
    grid = plain_grid(backbone.pipeline.scheduler, config.rollout_steps, config.solver, backbone.flow)
    check_times(config, grid.sigmas, exact=backbone.keeps_scheduler_grid)


class _Estimate:
    """Memory as a function of the micro-batches; everything else is found once."""

    def __init__(self, config: CRDConfig, skeleton: Skeleton, gpus: int, sharding: str) -> None:
        self._config, self._skeleton, self._gpus, self._sharding = config, skeleton, gpus, sharding
        self.geometry = geometry(config, gpus)
        backbone = skeleton.backbone
        self._latent = backbone.latent_shape(config.height, config.width)
        self._weights = size_of(backbone.denoiser)
        self._largest_block = _largest_block(backbone.denoiser)
        prepare_backbone(backbone, dataclasses.replace(config, attention_backend=None))
        with torch.device("meta"):
            snapshots = build_snapshots(backbone, config, trained_roles(config))
        self.trainable = sum(parameter.numel() for parameter in snapshots.parameters())
        with as_on_gpu(autocast=config.mixed_precision != "no"):
            self._decode = self._measured_decode()
            self._draw, self._anchor, self._train = self._measured_calls()

    def memory(self, micro_batch: int, rollout_batch: int) -> Memory:
        config, size = self._config, self.geometry
        kept = self._gpus if self._sharding != "ddp" else 1
        roles = 1 + len(trained_roles(config))
        full = config.finetune == "full"
        latent = math.prod(self._latent) * _FLOAT
        conditioning = sum(_bytes(tensor) for tensor in self._conditioning(1).values())
        prompts = min(config.prompts_per_update, size.own_images)
        micro_batch = min(micro_batch, max(size.own_rows))
        if config.eval_prompts is None:  # of which there may be more than images of an update
            rollout_batch = min(rollout_batch, size.own_images)
        cached = len(references(config)) * max(size.own_rows) * latent if config.cache_references else 0
        return Memory(
            weights=self._weights * (roles + 1 if full else 1) // kept,
            text_encoders=0 if config.cache_prompts else self._skeleton.encoder_bytes,
            vae=self._skeleton.vae_bytes,
            adapters=0 if full else roles * self.trainable * _FLOAT // kept,
            gradients=self.trainable * _FLOAT // kept,
            optimizer=2 * self.trainable * _FLOAT // kept,
            gathered={"ddp": 0, "zero2": self._weights, "fsdp2": 2 * self._largest_block}[self._sharding],
            images=size.own_images * latent + prompts * conditioning,
            references=cached,
            training=max(self._train.at(micro_batch), self._anchor.at(micro_batch)),
            rollout=max(self._draw.at(rollout_batch), self._decode.at(1 if config.vae_slicing else rollout_batch)),
            loading=self._weights + self._skeleton.encoder_bytes + self._skeleton.vae_bytes,
        )

    def micro_batches(self, available: int | None) -> tuple[int, int]:
        """Micro-batch and rollout batch as configured, or what fits where they are "auto"."""
        if available is None or not self._config.automatic:
            return self._config.batches(ROWS_WITHOUT_GPU, ROWS_WITHOUT_GPU)
        return self._config.batches(*self._fitting(available))

    def _fitting(self, available: int) -> tuple[int, int]:
        """The largest micro-batch and rollout batch that leave the margin.

        Raises:
            CRDError: not even one row fits.
        """
        room = int(available * (1 - MARGIN))
        least = self.memory(1, 1)
        if least.total > room:
            advice = memory_advice(self._config, self._sharding == "fsdp2")
            raise CRDError(f"the run needs {_gb(least.total)} on a device at micro_batch=1, got {_gb(available)} of "
                           f"which {MARGIN:.0%} stay free; {advice}")  # fmt: skip
        rows, images = max(self.geometry.own_rows), self.geometry.own_images
        micro = next(n for n in _powers(rows) if self.memory(n, 1).total <= room)
        rollout = next(n for n in _powers(images) if self.memory(1, n).total <= room)
        return micro, rollout

    def _conditioning(self, rows: int) -> dict[str, Tensor]:
        return self._skeleton.backbone.blank(rows, self._latent, self._skeleton.clip_tokens)

    def _measured_decode(self) -> Footprint:
        backbone = self._skeleton.backbone

        @torch.no_grad()
        def decode(rows: int) -> None:
            backbone.decode_latents(torch.empty(rows, *self._latent, device=backbone.device, dtype=backbone.dtype))

        return measure(decode)

    def _measured_calls(self) -> tuple[Footprint, Footprint, Footprint]:
        """Of a drawing, an anchor and a training call of the denoiser."""
        backbone, config = self._skeleton.backbone, self._config
        reserve_gradients(backbone.denoiser)
        plain = backbone.trained_scale(config.rollout_guidance)

        def velocity(rows: int, scale: float) -> Tensor:
            x_t = torch.empty(rows, *self._latent, device=backbone.device)
            t = torch.empty(rows, device=backbone.device)
            uncond = self._conditioning(1) if backbone.guidance == CFG else {}
            return guided_velocity(backbone, backbone.denoiser, x_t, t, self._conditioning(rows), uncond, scale)

        @torch.no_grad()
        def quiet(rows: int, scale: float) -> None:
            velocity(rows, scale)

        def train(rows: int) -> None:
            run_backward(velocity(rows, plain).square().sum())

        anchor = config.anchor_guidance if "anchor" in references(config) else plain
        # Evaluations call the network for batches of the same size, also for the guided base model.
        evaluated = () if config.eval_prompts is None else (config.anchor_guidance, *config.eval_base_guidance)
        drawn = max((config.rollout_guidance, *evaluated), key=lambda scale: rows_per_image(backbone, scale))
        return (
            measure(lambda rows: quiet(rows, drawn)),
            measure(lambda rows: quiet(rows, anchor)),
            measure(train),
        )


def _largest_block(module: nn.Module) -> int:
    """Bytes of the largest unit that `crd.sharding.shard` gathers by itself."""
    blocks = [block for child in module.children() if isinstance(child, nn.ModuleList) for block in child]
    return max((size_of(block) for block in blocks), default=size_of(module))


def _powers(most: int) -> list[int]:
    """Powers of two up to `most`, the largest first."""
    return [2**power for power in range(most.bit_length() - 1, -1, -1)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
