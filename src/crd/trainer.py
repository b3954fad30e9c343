"""The main loop: rollout, reward, advantage, loss, snapshots. Start reading at `CRDTrainer.update`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from crd.advantages import group_advantages, group_normalized, kl_gate
from crd.backbones import Backbone
from crd.checkpoint import CheckpointFolder
from crd.config import CRDConfig
from crd.console import console
from crd.data import Prompts, count_shared, epoch_order, prompt_batch
from crd.engine import Engine
from crd.errors import CRDError
from crd.evaluation import EvalResult, Evaluator, SamplingSettings, draw, encode_prompts
from crd.export import export_lora, export_pipeline
from crd.flow import draw_timesteps
from crd.loading import build_optimizer, build_snapshots, checkpoint_number, judged_prompts, training_backbone
from crd.metrics.held_out import HeldOutScores
from crd.objectives import objective_class
from crd.objectives.base import Rows
from crd.optimizer_batch import Draws, RowVelocities, build_rows, draw_times
from crd.records import RewardOutput, Rollout
from crd.rewards import RewardFunction, RewardSet
from crd.run_folder import RunFolder, recorded_config
from crd.seeds import generator
from crd.snapshots import OLD, POLICY, SAMPLER
from crd.tracker import Tracker, print_update
from crd.training_state import Progress, pack, restore
from crd.watch import Verdict, Watch

KL_SCALE_MAX = 8.0  # beyond it the anchor outweighs any reward
BEFORE_ALL = -1  # a resumed run that starts over keeps no record, not even the evaluation of update 0

RewardArgument: TypeAlias = str | RewardFunction


class CRDTrainer:
    """Fine-tune a text-to-image model against black-box rewards by Centered Reward Distillation.

    Args:
        model: "tiny-sd3", a hub id or folder in diffusers format, a pipeline, or a loaded `Backbone`.
        reward_funcs: one reward or several: names ("ocr") or callables `f(images, prompts, **columns)`.
        args: the run's settings; `args.model`, `args.rewards`, `args.prompts` are used where the argument is None.
        train_dataset: prompts: a file, `world:train`, strings, or records with columns.
        eval_dataset: likewise; None and `args.eval_prompts` None: no evaluation.

    Raises:
        CRDError: anything the user can mend, before any training.
    """

    def __init__(
        self,
        model: str | Path | DiffusionPipeline | Backbone | None = None,
        reward_funcs: RewardArgument | Sequence[RewardArgument] | None = None,
        args: CRDConfig | None = None,
        train_dataset: Prompts | None = None,
        eval_dataset: Prompts | None = None,
    ) -> None:
        self.args = config = args or CRDConfig()
        self.recorded = recorded_config(config, model, reward_funcs, train_dataset, eval_dataset)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        funcs = config.rewards if reward_funcs is None else reward_funcs
        self.rewards = RewardSet([funcs] if isinstance(funcs, str) or callable(funcs) else funcs, config.reward_weights)
        source = config.prompts if train_dataset is None else train_dataset
        self.train_data = judged_prompts("prompts", source, self.rewards)
        held_out = config.eval_prompts if eval_dataset is None else eval_dataset
        self.eval_data = None if held_out is None else judged_prompts("eval_prompts", held_out, self.rewards)
        if config.eval_base_guidance and self.eval_data is None:
            raise CRDError("eval_base_guidance needs evaluation prompts, got none; set eval_prompts, or leave it out")
        if config.alarm in ("stop", "raise_kl") and self.eval_data is None:
            raise CRDError(f"alarm={config.alarm} needs evaluation prompts, got none; set eval_prompts, or use warn")
        self.engine = Engine(config.mixed_precision, config.device)
        self.held_out = HeldOutScores(config.held_out, self.eval_data)
        for scorers in (self.rewards, self.held_out):
            scorers.use_device(str(self.engine.device))
        self.backbone = training_backbone(config.model if model is None else model, config, self.engine.device)
        if config.gradient_checkpointing:
            denoiser: Any = self.backbone.denoiser  # a diffusers model; nn.Module knows no such method
            denoiser.enable_gradient_checkpointing()
        self.snapshots = build_snapshots(self.backbone, config, (OLD, SAMPLER) if config.decouple_sampler else (OLD,))
        optimizer = build_optimizer(self.snapshots, config)
        self.snapshots.wrapped, self.optimizer = self.engine.prepare(self.snapshots.module, optimizer)
        self.objective = objective_class(config.objective)(config.objective_config())
        self.uncond = encode_prompts(self.backbone, self.engine, [""])
        self.sigmas = self.backbone.sigmas(config.rollout_steps, config.height, config.width)
        self._refuse_early()
        self.folder = RunFolder(Path(config.output_dir))
        self.checkpoints = CheckpointFolder(self.folder.path / "checkpoints", config.keep_checkpoints)
        self.progress = Progress()
        self.watch = self._build_watch()
        self._clock = time.perf_counter()  # at which `progress.seconds` was last brought up to date

    def _build_watch(self) -> Watch | None:
        """Evaluation of this run; None without evaluation prompts."""
        config = self.args
        if self.eval_data is None:
            return None
        settings = SamplingSettings(config.eval_steps, 1.0, config.rollout_batch, config.height, config.width)
        evaluator = Evaluator(
            self.backbone, self.snapshots, self.engine, self.rewards, self.held_out, self.eval_data, settings,
            self.uncond, config.anchor_guidance, config.eval_images, config.seed,
        )  # fmt: skip
        return Watch(evaluator, self.folder.path, config.alarm)

    def _refuse_early(self) -> None:
        """Settings that only the model can judge, before a run folder exists."""
        config = self.args
        self.backbone.latent_shape(config.height, config.width)
        once = generator(config.seed)
        draw_timesteps(
            config.timesteps, self.sigmas, units=1, draws=1, fraction=config.timestep_fraction, generator=once
        )

    def train(self, resume: bool | int = False) -> dict[str, float]:
        """Run all updates; returns (and writes to summary.json) the held-out rewards before and after.

        Args:
            resume: True goes on from the last checkpoint in `args.output_dir`, an int from that update's.

        Raises:
            CRDError: a broken scorer, a used output folder, a corrupt checkpoint, a failing reward, a full disk.
        """
        self.rewards.self_test()
        self.held_out.self_test()
        for line in self.held_out.warn_of(self.rewards):
            console.print(f"warn: {line}", style="yellow")
        if self.eval_data is not None and (shared := count_shared(self.train_data, self.eval_data)):
            console.print(f"{shared} of {len(self.eval_data)} evaluation prompts are also training prompts")
        if resume is False:
            self.folder.create(self.recorded)
        else:
            self._go_back(resume)
        try:
            self._run(None if resume is False else self.progress.updates_done or BEFORE_ALL)
            # The base model at each CFG scale asked for, on the same prompts and noise.
            watch, scales = self.watch, self.args.eval_base_guidance
            base = {} if watch is None else {scale: watch.base(scale).metrics() for scale in scales}
            return self.folder.summarise(self.progress, base)
        except CRDError:
            # Nothing was learned: a folder that only blocks the next try helps nobody.
            if resume is False and self.progress.updates_done == 0:
                self.folder.remove()
            raise

    def _go_back(self, resume: bool | int) -> None:
        """To the checkpoint to go on from; only once it is loaded, what came after it is forgotten."""
        self.folder.check_same(self.recorded)
        self.checkpoints.sweep()
        if resume is True and not self.checkpoints.updates():
            console.print("no checkpoint yet: the run starts over")
        else:
            number = checkpoint_number(self.checkpoints, "last" if resume is True else str(resume))
            if self.args.updates < number:
                raise CRDError(f"updates={self.args.updates} is below the {number} that are done; raise it")
            checkpoint = self.checkpoints.load(number)
            self.progress = restore(checkpoint, self.snapshots, self.optimizer, self.train_data.prompts)
            self._set_kl(self.progress.kl_scale)
        if self.watch is not None:
            self.watch.go_back(self.progress.updates_done or BEFORE_ALL)
        eligible = {} if self.watch is None else self.watch.eligible()
        self.checkpoints.forget_after(self.progress.updates_done, eligible)
        self.folder.record(self.recorded)

    def _run(self, resume_from: int | None) -> None:
        """Evaluation before, then updates with their logging, evaluation and checkpoints."""
        config = self.args
        tracker = Tracker(
            self.folder.path,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            config=dataclasses.asdict(self.recorded),
            resume_from=resume_from,
        )
        self._clock = time.perf_counter()
        try:
            if self.progress.updates_done == 0:
                self._log_evaluation(tracker)
            going = True
            while going and self.progress.updates_done < config.updates:
                started = time.perf_counter()
                metrics = self._update_or_save()
                seconds = time.perf_counter() - started
                tracker.log(self.progress.updates_done, "train", {**metrics, "seconds": seconds})
                print_update(self.progress.updates_done, config.updates, metrics, seconds)
                going = self._evaluate_and_save(tracker)
        finally:
            tracker.close()

    def _update_or_save(self) -> dict[str, float]:
        """`update`; if it fails before its first optimizer step, say in a reward, the updates before it are saved."""
        steps = self.progress.optimizer_steps
        try:
            return self.update()
        except CRDError:
            done = self.progress.updates_done
            if self.progress.optimizer_steps == steps and done and done not in self.checkpoints.updates():
                self._save()
            raise

    def update(self) -> dict[str, float]:
        """One update of the method: images from `sampler`, rewards, advantages, optimizer steps, snapshots."""
        config = self.args
        rollout = self.rollout(self.progress.updates_done)
        batch = rollout.batch
        rewards = self.rewards.score(rollout.images, batch.prompts, batch.columns)
        metrics = self._optimize(rollout, rewards)
        self.snapshots.advance(OLD, metrics["old_decay"])
        if config.decouple_sampler:
            self.snapshots.advance(SAMPLER, metrics["sampler_decay"])
        self.progress.updates_done += 1
        self.progress.images_drawn += len(batch)
        return {**metrics, "images": float(self.progress.images_drawn)}

    def rollout(self, number: int) -> Rollout:
        """Images of update `number`, from `sampler`."""
        config = self.args
        indices = epoch_order(
            len(self.train_data), number * config.prompts_per_update, config.prompts_per_update, config.seed
        )
        batch = prompt_batch(self.train_data, indices, config.group_size, config.seed, "rollout", number)
        settings = SamplingSettings(
            config.rollout_steps, config.rollout_guidance, config.rollout_batch, config.height, config.width
        )
        with self.snapshots.use(SAMPLER if config.decouple_sampler else OLD) as sampler:
            return draw(self.backbone, sampler, self.engine, batch, settings, self.uncond, "rollout")

    def velocities(self, rollout: Rollout, rows: Rows, t: Tensor, *name: int | str) -> RowVelocities:
        """What the engine calls: velocities of all roles at `rows`, noised to `t` (N,) by noise called `name`."""
        return RowVelocities(
            backbone=self.backbone,
            snapshots=self.snapshots,
            engine=self.engine,
            rollout=rollout,
            rows=rows,
            t=t,
            needs=self.objective.needs,
            uncond=self.uncond,
            anchor_guidance=self.args.anchor_guidance,
            cache=self.args.cache_references,
            name=name,
        )

    def _optimize(self, rollout: Rollout, rewards: RewardOutput) -> dict[str, float]:
        """The optimizer steps of one update, each on whole groups; mean metrics over the steps."""
        config, number = self.args, self.progress.updates_done
        group_id = rollout.batch.group_id
        signal = rewards.total
        if config.reward_normalization == "group":
            signal = group_normalized(rewards.columns, self.rewards.weights, group_id)
        advantages = group_advantages(signal, group_id, clip=config.advantage_clip)
        # Without an anchor nothing reads the gate, so rewards need no range.
        kind = config.kl_gate if config.kl_max > 0 else "constant"
        gate = kl_gate(kind, rewards.total, advantages.advantage, config.kl_reward_range)
        draws = Draws(config.draws, config.timesteps, config.timestep_fraction, config.share_timesteps)
        order = torch.randperm(int(group_id.max()) + 1, generator=generator(config.seed, "groups", number))
        steps: list[dict[str, float]] = []
        for step, groups in enumerate(order.tensor_split(config.optimizer_steps)):
            images = torch.isin(group_id, groups).nonzero()[:, 0]
            rows = build_rows(rewards, advantages, gate, group_id, images, draws.count)
            name = (config.seed, "train", number, step)
            velocities = self.velocities(rollout, rows, draw_times(draws, self.sigmas, rows, *name), *name)
            for group in self.optimizer.param_groups:
                group["lr"] = config.rate_schedule().rate(self.progress.optimizer_steps, number)
            found = self.engine.backward(self.objective, velocities, rows.to(self.engine.device), config.micro_batch)
            norm = self.engine.step(self.optimizer, self.snapshots.parameters(), config.max_grad_norm)
            self.progress.optimizer_steps += 1
            steps.append({**found, "gradient_norm": norm})
        means = {key: sum(step[key] for step in steps) / len(steps) for key in steps[0]}
        return {
            **rewards.metrics(),
            **means,
            "zero_variance_groups": float(advantages.zero_variance_groups),
            "old_decay": config.old_schedule().decay(self.progress.optimizer_steps),
            "sampler_decay": config.sampler_schedule().decay(self.progress.optimizer_steps),
            "optimizer_steps": float(self.progress.optimizer_steps),
        }

    def evaluate(self, role: str = POLICY, guidance: float = 1.0) -> EvalResult:
        """What a role ("policy", "anchor" = the base model, ...) does on the evaluation prompts.

        Raises:
            CRDError: the trainer has no evaluation prompts.
        """
        if self.watch is None:
            raise CRDError("no evaluation prompts; set eval_prompts or pass eval_dataset")
        return self.watch.evaluator(role, guidance)

    def save_model(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Export the policy for stock diffusers: a LoRA folder, or a whole pipeline after full fine-tuning."""
        if self.snapshots.lora is not None:
            return export_lora(self.backbone, self.snapshots, folder, overwrite=overwrite)
        return export_pipeline(self.backbone, self.snapshots, folder, overwrite=overwrite)

    def _evaluate_and_save(self, tracker: Tracker) -> bool:
        """After an update: evaluation and checkpoint when due, and at the end; whether the run goes on."""
        config, done = self.args, self.progress.updates_done
        final = done == config.updates
        verdict: Verdict | None = None
        if final or (config.eval_every and done % config.eval_every == 0):
            try:
                verdict = self._log_evaluation(tracker)
            except CRDError:
                self._save()  # a judge that is down must not cost the updates
                raise
        known, best = self.checkpoints.best(), False
        if verdict is not None:
            best = verdict.eligible and (known is None or verdict.result.mean > known[1])
            final = final or verdict.stop
            if verdict.raise_kl and self.progress.kl_scale < KL_SCALE_MAX:
                self.progress.kl_scale *= 2
                self._set_kl(self.progress.kl_scale)
                console.print(f"the alarm raises the KL strengths to {self.progress.kl_scale:g} times their settings")
        if best or final or (config.save_every and done % config.save_every == 0):
            self._save()
        if best and verdict is not None:
            self.checkpoints.mark_best(done, verdict.result.mean)
        if verdict is not None and verdict.stop:
            console.print(f"the alarm stops the run after update {done}; `crd report {self.folder.path}` shows why")
            return False
        return True

    def _set_kl(self, scale: float) -> None:
        settings = self.args.objective_config()
        scaled = dataclasses.replace(settings, kl_min=scale * settings.kl_min, kl_max=scale * settings.kl_max)
        self.objective = objective_class(self.args.objective)(scaled)

    def _log_evaluation(self, tracker: Tracker) -> Verdict | None:
        """Evaluation of the policy, logged and judged; None without evaluation prompts."""
        if self.watch is None:
            return None
        done = self.progress.updates_done
        verdict = self.watch.evaluate(done)
        result = verdict.result
        tracker.log(done, "eval", result.metrics())
        self.folder.save_samples(done, result)
        console.print(f"update {done}: held-out reward {result.mean:.3f} ({len(result.images)} images, no CFG)")
        return verdict

    def _save(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._clock
        self._clock = now
        state = pack(self.snapshots, self.optimizer, self.progress, self.train_data.prompts)
        self.checkpoints.save(self.progress.updates_done, state)
