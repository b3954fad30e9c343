"""The part of a backbone that is the same in all families: conditioning and grids as recorded from stock code."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from crd.backbones.base import CFG, Backbone
from crd.backbones.recording import Recording, join_rows, record
from crd.backbones.solvers import Grid, check_known, read_grid, solver_scheduler
from crd.errors import CRDError
from crd.flow import EULER, SOLVERS

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (
    *(f"attn.{name}" for name in ATTENTION),
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
CLIP_TOKENS = 77  # of a prompt, in stock CLIP encoders
_ENCODE_CHUNK = 32  # prompts per text-encoder call: bounds the memory of a text encoder of billions of parameters
_ANY_SCALE = 2.0  # a stock call that is guided, for its unconditional rows


class PipelineBackbone(Backbone):
    """Adapter from a stock pipeline to `Backbone`; a family states what differs.

    Args:
        pipeline: A loaded pipeline; its modules are put in eval mode and frozen.
        max_sequence_length: Text tokens per prompt; None = the default of the stock call.
        device: Where to put the pipeline; None leaves it.

    Raises:
        CRDError: another pipeline, a scheduler that is no plain ODE step, or a length that the family does not have.
    """

    pipeline_class: ClassVar[str]
    denoiser_component: ClassVar[str] = "transformer"
    flow: ClassVar[bool] = True
    conditioning: ClassVar[tuple[str, ...]]  # inputs of the denoiser with a row for each prompt
    shared: ClassVar[tuple[str, ...]] = ()  # inputs of the denoiser without a batch axis
    paired: ClassVar[bool] = False  # stock CFG is one call, unconditional rows first, which "" alone does not give
    lengths: ClassVar[tuple[int, int, int] | None] = (1, 512, 512)  # max_sequence_length: least, stock default, most
    own_grid: ClassVar[bool] = True  # the stock call lays out the grid; False: it takes that of its scheduler
    patch: ClassVar[int] = 2  # latent pixels along the side of a token
    solvers: tuple[str, ...] = SOLVERS  # whose schedulers the stock call takes
    time_scale: float = 1000.0  # what the denoiser is told at t = 1

    def __init__(
        self, pipeline: Any, *, max_sequence_length: int | None = None, device: torch.device | str | None = None
    ) -> None:
        if self.pipeline_class not in (kind.__name__ for kind in type(pipeline).__mro__):
            raise CRDError(f"the {self.name} backbone wraps a {self.pipeline_class}, got {type(pipeline).__name__}")
        self.max_sequence_length = self._length(max_sequence_length)
        self.euler = solver_scheduler(pipeline.scheduler, EULER, self.flow)
        self.pipeline: Any = pipeline
        self._stock: Any = pipeline  # what is recorded
        if device is not None:
            self.pipeline.to(device)
        self.denoiser: nn.Module = pipeline.components[self.denoiser_component]
        self.config: Any = self.denoiser.config
        # LoRA adapters stay float32 over a bf16 base: later, "the dtype of the parameters" is ambiguous.
        self.dtype: torch.dtype = pipeline.components[self.denoiser_component].dtype
        self.device = torch.device(pipeline.device)
        self._grids: dict[tuple[int, int, int, str], Grid] = {}
        self._parked = False
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        self.configure()

    def configure(self) -> None:
        """What a family reads from its model; raises CRDError where it cannot use it."""

    def _length(self, given: int | None) -> int | None:
        if self.lengths is None:
            if given is not None:
                raise CRDError(f"{self.name} has no max_sequence_length, got {given}; leave it out")
            return None
        least, stock, most = self.lengths
        if given is not None and not least <= given <= most:
            raise CRDError(f"max_sequence_length must lie in {least}..{most}, got {given}; stock {self.name}: {stock}")
        return stock if given is None else given

    def settings(self) -> dict[str, int]:
        if self.max_sequence_length is None or self.lengths is None or self.max_sequence_length == self.lengths[1]:
            return {}
        return {"max_sequence_length": self.max_sequence_length}

    # Latents and pictures.

    @property
    def default_size(self) -> tuple[int, int]:
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    @property
    def channels(self) -> int:
        """C of a latent."""
        channels: int = self.config.in_channels
        return channels

    @property
    def pixels(self) -> int:
        """Picture pixels along the side of a latent pixel."""
        scale: int = self.pipeline.vae_scale_factor
        return scale

    @property
    def multiple(self) -> int:
        """What height and width in pixels must be multiples of."""
        return self.pixels * self.patch

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        size = self._size(height, width)
        for name, pixels in zip(("height", "width"), size, strict=True):
            if pixels <= 0 or pixels % self.multiple:
                raise CRDError(f"{name} must be a positive multiple of {self.multiple} for this model, got {pixels}")
        return self.channels, size[0] // self.pixels, size[1] // self.pixels

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        default = self.default_size
        return default[0] if height is None else height, default[1] if width is None else width

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = 16) -> list[Image.Image]:
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        images: list[Image.Image] = []
        for part in latents.split(chunk):
            pixels = self.decode_latents(part.to(self.device, self.pipeline.vae.dtype))
            images.extend(self.pipeline.image_processor.postprocess(pixels, output_type="pil"))
        return images

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) of latents (N, C, H, W) as the stock pipeline decodes them."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        pictures: Tensor = vae.decode(latents, return_dict=False)[0]
        return pictures

    # Text and time, recorded from stock code.

    def call_options(self, scale: float, rows: int) -> dict[str, Any]:
        """Arguments of the stock call under which `rows` prompts are guided with weight `scale`, 1 = not at all."""
        return {"guidance_scale": scale}

    def _record(
        self, prompts: list[str], height: int | None, width: int | None, *, scale: float = 1.0, steps: int = 2,
        solver: str = EULER,
    ) -> Recording:  # fmt: skip
        self.latent_shape(height, width)
        size = self._size(height, width)
        call = {"prompt": list(prompts), "height": size[0], "width": size[1], "num_inference_steps": steps}
        if self.max_sequence_length is not None:
            call["max_sequence_length"] = self.max_sequence_length
        scheduler = solver_scheduler(self.pipeline.scheduler, solver, self.flow)
        if self._parked:  # they come back for this call
            self._place_encoders(self.device)
        try:
            return record(self._stock, self.denoiser, scheduler, {**call, **self.call_options(scale, len(prompts))})
        finally:
            if self._parked:
                self._place_encoders("cpu")

    def rows(self, inputs: Mapping[str, Any], count: int) -> dict[str, Tensor]:
        """Conditioning (count, ...) of the recorded inputs; shared ones are repeated, which takes no memory."""
        found = {name: inputs[name] for name in self.conditioning}
        return {**found, **{name: inputs[name].expand(count, *inputs[name].shape) for name in self.shared}}

    # no_grad, not inference_mode: inference tensors may not enter the graph that training builds later.
    @torch.no_grad()
    def encode(self, prompts: list[str], height: int | None = None, width: int | None = None) -> dict[str, Tensor]:
        if not prompts:
            raise ValueError("encode needs at least one prompt, got an empty list")
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(prompts), _ENCODE_CHUNK):
            chunk = prompts[start : start + _ENCODE_CHUNK]
            parts.append(self.rows(self._record(chunk, height, width).inputs, len(chunk)))
        return join_rows(parts)

    @abstractmethod
    def blank(self, rows: int, latent: tuple[int, int, int], clip_tokens: int = CLIP_TOKENS) -> dict[str, Tensor]:
        """What `encode` gives for `rows` prompts of the greatest length, without content; to plan memory by."""

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device)

    @torch.no_grad()
    def unconditional(self, height: int | None = None, width: int | None = None) -> dict[str, Tensor]:
        if self.guidance != CFG:
            return {}
        if not self.paired:
            return self.encode([""], height, width)
        inputs = self._record([""], height, width, scale=_ANY_SCALE).inputs
        return {name: tensor[:1] for name, tensor in self.rows(inputs, 2).items()}

    @property
    def keeps_scheduler_grid(self) -> bool:
        """Whether `plain_grid` is that of rollouts: neither the stock call nor the picture's size changes it."""
        return not (self.own_grid or self.pipeline.scheduler.config.get("use_dynamic_shifting", False))

    def grid(self, num_steps: int, height: int | None = None, width: int | None = None, solver: str = EULER) -> Grid:
        if num_steps < 1:
            raise CRDError(f"the number of sampling steps must be at least 1, got {num_steps}")
        key = (num_steps, *self._size(height, width), solver)
        if key not in self._grids:
            self._grids[key] = self._recorded_grid(num_steps, height, width, solver)
        return self._grids[key]

    def _recorded_grid(self, num_steps: int, height: int | None, width: int | None, solver: str) -> Grid:
        self.check_solver(solver)
        recording = self._record([""], height, width, steps=num_steps, solver=solver)
        return read_grid(recording.scheduler, solver, self.flow)

    def check_solver(self, solver: str) -> None:
        check_known(solver)
        if solver not in self.solvers:
            name = type(self.pipeline).__name__
            raise CRDError(f"solver={solver}: the stock {name} lays out a grid that its scheduler does not take; use "
                           f"{' or '.join(self.solvers)}")  # fmt: skip

    def park_encoders(self) -> None:
        self._parked = True
        self._place_encoders("cpu")

    def _place_encoders(self, device: torch.device | str) -> None:
        for name, component in self.pipeline.components.items():
            if name.startswith("text_encoder") and isinstance(component, nn.Module):
                component.to(device)

    # The network.

    def velocity(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Predicted `noise - x0`.

        Args:
            denoiser: The network, a wrapper of it, or another role.
            x_t: (N, C, H, W) noisy latents, any float dtype.
            t: (N,) times in [0, 1].
            conditioning: as from `encode`, N rows; with embedded guidance also `guidance` (N,).

        Returns:
            (N, C, H, W) float32.

        Raises:
            ValueError: rows of the arguments differ.
        """
        rows = {len(x_t), len(t), *(len(tensor) for tensor in conditioning.values())}
        if t.ndim != 1 or len(rows) != 1:
            shapes = {name: tuple(tensor.shape) for name, tensor in conditioning.items()}
            raise ValueError(
                f"x_t, t (N,) and conditioning need equal rows, got {len(x_t)}, {tuple(t.shape)}, {shapes}"
            )
        inputs = {name: self._cast(tensor) for name, tensor in conditioning.items()}
        return self.predict(denoiser, x_t.to(self.device), t.to(self.device, torch.float32), inputs)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """`velocity` with everything in its place: the call of the network in its own terms."""
        shared = {name: inputs[name][0] for name in self.shared}
        output: Tensor = denoiser(
            hidden_states=self.pack(x_t.to(self.dtype)),
            timestep=t * self.time_scale,
            **{**inputs, **shared},
            return_dict=False,
        )[0]
        return self.unpack(output, x_t).float()

    def pack(self, latents: Tensor) -> Tensor:
        """What the network takes for latents (N, C, H, W)."""
        return latents

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """Inverse of `pack`, for latents of the shape of `like`."""
        return packed


def with_norm_of(v_cond: Tensor, guided: Tensor) -> Tensor:
    """`guided`, each vector along the last axis as long as that of `v_cond`: CFG that keeps the norm."""
    return guided * (v_cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
