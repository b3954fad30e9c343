"""The main loop: rollout, reward, advantage, loss, snapshots. Start reading at `CRDTrainer.update`."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from crd.config import CRDConfig
from crd.console import console
from crd.data import Prompts
from crd.engine import Engine
from crd.errors import CRDError, PeerLostError
from crd.evaluation import EvalResult, Evaluator, SamplingSettings, encode_unconditional
from crd.execution import cache_prompts
from crd.export import export_lora, export_pipeline
from crd.loading import build_optimizer, checkpoint_number
from crd.objectives.base import TRAJECTORY, Objective, Rows
from crd.optimizer_batch import RowVelocities, blank_rows, build_rows, learning_signal
from crd.planning.automatic import batch_sizes
from crd.records import RewardOutput, Rollout
from crd.rollouts import Rollouts
from crd.run_books import RunBooks
from crd.run_folder import recorded_config
from crd.run_parts import Model, Rewards, RunParts, load_parts, sampling_role
from crd.sde import SDESteps
from crd.shares import Share
from crd.snapshots import OLD, POLICY, SAMPLER
from crd.tracker import print_evaluation, print_update
from crd.training_state import Progress, pack, restore
from crd.unread_settings import tell_unread_settings
from crd.update_plan import UpdatePlan, plan_update
from crd.watch import Verdict, Watch

KL_SCALE_MAX = 8.0  # of the alarm's factor: beyond it the anchor outweighs any reward
BEFORE_ALL = -1  # a resumed run that starts over keeps no record, not even the evaluation of update 0


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
        model: Model | None = None,
        reward_funcs: Rewards | None = None,
        args: CRDConfig | None = None,
        train_dataset: Prompts | None = None,
        eval_dataset: Prompts | None = None,
    ) -> None:
        config = args or CRDConfig()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.engine = Engine(config.mixed_precision, config.device, config.peer_timeout)
        self.ranks = self.engine.ranks
        console.quiet = not self.ranks.is_main
        tell_unread_settings(config)
        self.micro_batch, self.rollout_batch = batch_sizes(config, model, self.engine)
        config = replace(config, micro_batch=self.micro_batch.rows, rollout_batch=self.rollout_batch.rows,
                         mixed_precision=self.engine.mixed_precision)  # fmt: skip
        self.args = config
        recorded = recorded_config(config, model, reward_funcs, train_dataset, eval_dataset)
        self.books = RunBooks(config, recorded, self.ranks)
        self.progress = Progress()
        with self.ranks.together():
            parts = load_parts(
                config, self.engine.device, model, reward_funcs, train_dataset, eval_dataset, self.ranks.world_size
            )
            self._prepare(parts)

    def _prepare(self, parts: RunParts) -> None:
        """Take up what was loaded, and make it ready on all processes together."""
        config = self.args
        self.judged, self.rewards, self.held_out = parts, parts.rewards, parts.held_out
        self.train_data, self.eval_data = parts.train_data, parts.eval_data
        self.backbone, self.snapshots, self.sigmas = parts.backbone, parts.snapshots, parts.sigmas
        self.snapshots.adopt(self.engine.prepare(self.snapshots.module), sharded=self.engine.sharded)
        self.optimizer = self.engine.prepare_optimizer(build_optimizer(self.snapshots, config))
        self.trained_guidance = self.backbone.trained_scale(config.rollout_guidance)
        self.uncond = encode_unconditional(self.backbone, self.engine, config.height, config.width)
        self.rollouts = Rollouts(
            self.backbone, self.snapshots, self.engine, self.rewards,
            self._sampling(config.rollout_steps, config.rollout_guidance), self.uncond, sampling_role(config),
            SDESteps.of(self.sigmas, config.sde_noise) if TRAJECTORY in config.needs else None,
        )  # fmt: skip
        self.watch = self._build_watch()

    def _sampling(self, steps: int, guidance: float) -> SamplingSettings:
        """How rollouts and evaluations draw, but for steps and guidance."""
        config = self.args
        return SamplingSettings(steps, guidance, self.rollout_batch, config.height, config.width, config.solver)

    def _build_watch(self) -> Watch | None:
        """Evaluation of this run; None without evaluation prompts."""
        config = self.args
        if self.eval_data is None:
            return None
        settings = self._sampling(config.eval_steps, self.trained_guidance)
        evaluator = Evaluator(
            self.backbone, self.snapshots, self.engine, self.rewards, self.held_out, self.eval_data, settings,
            self.uncond, config.anchor_guidance, config.eval_images, config.seed,
        )  # fmt: skip
        return Watch(evaluator, self.books.folder.path, config.alarm)

    def train(self, resume: bool | int = False) -> dict[str, float]:
        """Run all updates; returns (and writes to summary.json) rewards and held-out scores before, after and at best.

        Args:
            resume: True goes on from the last checkpoint in `args.output_dir`, an int from that update's.

        Returns:
            The summary; {} on processes other than the first.

        Raises:
            CRDError: a broken scorer, a used output folder, a corrupt checkpoint, a failing reward, a full disk.
        """
        with self.ranks.together():
            self.judged.check_scorers(self.ranks)
            self.optimizer.zero_grad()  # what an interrupted step of this trainer has left
            missed = False  # the evaluation that is due at the checkpoint
            if resume is False:
                self._check_fresh()
                self.books.create()
            else:
                missed = self._go_back(resume)
            try:
                if self.args.cache_prompts:
                    model, folder = self.books.recorded.model, self.books.folder.path
                    cache_prompts(self.backbone, self.engine, self.args, model, folder, self.train_data, self.eval_data)
                self._run(None if resume is False else self.progress.updates_done or BEFORE_ALL, missed)
                # The base model at each CFG scale asked for, on the same prompts and noise.
                watch, scales = self.watch, self.args.eval_base_guidance
                base = {} if watch is None else {scale: watch.base(scale).metrics() for scale in scales}
                anchor = None if watch is None or watch.guided is None else watch.guided.metrics()
                return self.books.summarise(self.progress, anchor, base)
            except CRDError:
                # Nothing was learned: a folder that only blocks the next try helps nobody.
                if resume is False and self.progress.updates_done == 0:
                    self.books.remove()
                raise

    def _go_back(self, resume: bool | int) -> bool:
        """To the checkpoint to go on from; only once it is loaded, what came after it is forgotten.

        Returns:
            Whether the evaluation that is due there is not on record: a judge was down, and the updates were saved.
        """
        books = self.books
        books.reopen()
        with self.ranks.together():
            if resume is True and not books.checkpoints.updates():
                self._check_fresh()
                console.print("no checkpoint yet: the run starts over")
            else:
                self._restore(checkpoint_number(books.checkpoints, "last" if resume is True else str(resume)))
            done = self.progress.updates_done
            due = self.watch is not None and done > 0 and self.args.evaluation_is_due(done)
            missed = due and not books.has_evaluation(done)
        if self.watch is not None:
            self.watch.go_back(done - 1 if missed else done or BEFORE_ALL)
        eligible = {} if self.watch is None else self.watch.eligible()
        books.go_on_from(done, eligible)
        return missed

    def _check_fresh(self) -> None:
        """Refuse to begin a run with weights that have been trained."""
        if self.progress.optimizer_steps:
            raise CRDError("this trainer has trained already, so no run can begin with it; make a new one, or go on "
                           "from a checkpoint with train(resume=True)")  # fmt: skip

    def _restore(self, number: int) -> None:
        if self.args.updates < number:
            raise CRDError(f"updates={self.args.updates} is below the {number} that are done; raise it")
        checkpoint = self.books.checkpoints.load(number)
        self.progress = restore(checkpoint, self.snapshots, self.optimizer, self.train_data)

    def _run(self, resume_from: int | None, missed: bool) -> None:
        """Evaluation before, or the one that was `missed`; then updates with their logging, evaluation, checkpoints."""
        config = self.args
        with self.books.open(resume_from):
            if self.progress.updates_done == 0:
                self._log_evaluation()
            going = self._evaluate_and_save() if missed else True
            while going and self.progress.updates_done < config.updates:
                started = time.perf_counter()
                self.engine.restart_peak_memory()
                metrics = self._update_or_save() | self.engine.peak_memory()
                seconds = time.perf_counter() - started
                self.books.log(self.progress.updates_done, "train", {**metrics, "seconds": seconds})
                print_update(self.progress.updates_done, config.updates, metrics, seconds)
                going = self._evaluate_and_save()

    def _update_or_save(self) -> dict[str, float]:
        """`update`; if it fails before its first optimizer step, say in a reward, the updates before it are saved."""
        steps = self.progress.optimizer_steps
        try:
            return self.update()
        except CRDError as error:
            done = self.progress.updates_done
            if self.progress.optimizer_steps == steps and done and not self.books.has_checkpoint(done):
                self._save_after(error)
            raise

    def update(self) -> dict[str, float]:
        """One update of the method: images from `sampler`, rewards, advantages, optimizer steps, snapshots."""
        plan = self.plan(self.progress.updates_done)
        first: RowVelocities | None = None
        if self.args.overlap_rewards:
            rollout, rewards, first = self.rollouts.draw_and_score(plan, partial(self._look_ahead, plan))
        else:
            rollout = self.rollout(plan)
            rewards = self.score(plan, rollout)
        metrics = self._optimize(plan, rollout, rewards, first)
        metrics |= self._move_snapshots()
        self.progress.updates_done += 1
        self.progress.images_drawn += len(plan.batch)
        return {**metrics, "images": float(self.progress.images_drawn)}

    @property
    def objective(self) -> Objective:
        """The loss of the next update, whose KL strengths follow the settings, their ramp and the alarm."""
        scale = self.progress.kl_scale * self.args.kl_ramp().scale(self.progress.updates_done)
        return self.args.objective_config().with_kl_times(scale).build()

    def plan(self, number: int) -> UpdatePlan:
        """The images of update `number`, and who draws which."""
        return plan_update(self.train_data, self.args, number, self.ranks, self.sigmas)

    def rollout(self, plan: UpdatePlan) -> Rollout:
        """This process's images of an update, from `sampler`."""
        return self.rollouts.draw(plan)

    def score(self, plan: UpdatePlan, rollout: Rollout) -> RewardOutput:
        """Rewards of all images of an update; each process judges its own."""
        return self.rollouts.score(plan, rollout)

    def velocities(self, rollout: Rollout, rows: Rows, t: Tensor, *name: int | str) -> RowVelocities:
        """What the engine calls: velocities of all roles at `rows`, noised to `t` (N,) by noise called `name`."""
        return RowVelocities(
            backbone=self.backbone, snapshots=self.snapshots, engine=self.engine, rollout=rollout, rows=rows, t=t,
            needs=self.args.needs, uncond=self.uncond, trained_guidance=self.trained_guidance,
            anchor_guidance=self.args.anchor_guidance, cache=self.args.cache_references, name=name,
            share_noise=self.args.share_noise,
        )  # fmt: skip

    def _step(self, plan: UpdatePlan, rollout: Rollout, step: int, rows: Rows) -> RowVelocities:
        """Velocities of an optimizer step, at its times and noised by its own name."""
        return self.velocities(rollout, rows, plan.times[step], self.args.seed, "train", plan.number, step)

    def _look_ahead(self, plan: UpdatePlan, rollout: Rollout) -> RowVelocities | None:
        """The first optimizer step's, with its references, which need no reward; None where they are not kept."""
        if not self.args.cache_references:
            return None
        images, draws = plan.steps[0], self.args.draws
        velocities = self._step(plan, rollout, 0, blank_rows(plan.batch.group_id, images, draws))
        velocities.look_ahead(self.micro_batch, self.ranks.share(len(images)).rows(draws))
        return velocities

    def _optimize(
        self, plan: UpdatePlan, rollout: Rollout, rewards: RewardOutput, first: RowVelocities | None
    ) -> dict[str, float]:
        """The optimizer steps of one update, each on whole groups; mean metrics over the steps."""
        config, group_id = self.args, plan.batch.group_id
        advantages, gate = learning_signal(config, rewards, self.rewards.weights, group_id, plan.number)
        steps: list[dict[str, float]] = []
        for step, images in enumerate(plan.steps):
            rows = build_rows(rewards, advantages, gate, group_id, images, config.draws)
            velocities = first if first is not None and step == 0 else self._step(plan, rollout, step, rows)
            for group in self.optimizer.param_groups:
                group["lr"] = config.rate_schedule().rate(self.progress.optimizer_steps, plan.number)
            share = self.ranks.share(len(images)).rows(config.draws)
            rows = rows.to(self.engine.device)
            found = self._backward(velocities, rows, share)
            norm = self.engine.step(self.optimizer, self.snapshots.parameters(), config.max_grad_norm)
            self.progress.optimizer_steps += 1
            steps.append({**found, "gradient_norm": norm})
        means = {key: sum(step[key] for step in steps) / len(steps) for key in steps[0]}
        return {
            **rewards.metrics(),
            **means,
            "zero_variance_groups": float(advantages.zero_variance_groups),
            "optimizer_steps": float(self.progress.optimizer_steps),
        }

    def _backward(self, velocities: RowVelocities, rows: Rows, share: Share) -> dict[str, float]:
        """The gradient of one optimizer step, in micro-batches that fit; the objective's metrics."""
        return self.micro_batch.run(
            lambda size: self.engine.backward(self.objective, velocities, rows, size, share),
            len(share.index), velocities.forget, self.optimizer.zero_grad,
        )  # fmt: skip

    def _move_snapshots(self) -> dict[str, float]:
        """Each snapshot a little towards the policy; returns how little."""
        schedules = {OLD: self.args.old_schedule(), SAMPLER: self.args.sampler_schedule()}
        decays = {role: schedules[role].decay(self.progress.optimizer_steps) for role in self.snapshots.roles}
        for role, decay in decays.items():
            self.snapshots.advance(role, decay)
        return {f"{role}_decay": decay for role, decay in decays.items()}

    def evaluate(self, role: str = POLICY, guidance: float | None = None) -> EvalResult:
        """What a role ("policy", "anchor" = the base model, ...) does on the evaluation prompts.

        `guidance` is its guidance scale; None = as the policy is trained, without CFG.

        Raises:
            CRDError: the trainer has no evaluation prompts.
        """
        if self.watch is None:
            raise CRDError("no evaluation prompts; set eval_prompts or pass eval_dataset")
        return self.watch.evaluator(role, guidance)

    def save_model(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Export the policy for stock diffusers: a LoRA folder, or a whole pipeline after full fine-tuning.

        Raises:
            CRDError: the folder is taken or cannot be written, or the weights are spread over processes.
        """
        if self.engine.sharded:
            raise CRDError(f"save_model cannot gather sharded weights; run `crd export {self.books.folder.path}`")
        write = export_pipeline if self.snapshots.lora is None else export_lora
        self.ranks.on_main(lambda: write(self.backbone, self.snapshots, folder, overwrite=overwrite))
        return Path(folder)

    def _evaluate_and_save(self) -> bool:
        """After an update: evaluation and checkpoint when due, and at the end; whether the run goes on."""
        config, done = self.args, self.progress.updates_done
        final = done == config.updates
        verdict: Verdict | None = None
        if self.args.evaluation_is_due(done):
            try:
                verdict = self._log_evaluation()
            except CRDError as error:
                self._save_after(error)  # a judge that is down must not cost the updates
                raise
        best = False
        if verdict is not None:
            best = verdict.eligible and self.books.is_best(verdict.result.mean)
            final = final or verdict.stop
            if verdict.raise_kl:
                self.progress.kl_scale *= 2
                scale = self.progress.kl_scale
                console.print(f"the alarm raises the KL strengths to {scale:g} times what they would be without it")
        # A checkpoint that is there already is one without what this evaluation changed: it had failed before.
        stale = self.books.has_checkpoint(done)
        if best or final or stale or (config.save_every and done % config.save_every == 0):
            self.engine.check_replicas(self.snapshots.parameters())
            self._save()
        if best and verdict is not None:
            self.books.mark_best(done, verdict.result.mean)
        if verdict is not None and verdict.stop:
            run = self.books.folder.path
            console.print(f"the alarm stops the run after update {done}; `crd report {run}` shows why")
            return False
        return True

    def _log_evaluation(self) -> Verdict | None:
        """Evaluation of the policy, logged and judged; None without evaluation prompts."""
        if self.watch is None:
            return None
        done = self.progress.updates_done
        # An event records what was done about it, so what cannot be done is not asked for.
        raisable = self.progress.kl_scale < KL_SCALE_MAX
        verdict = self.watch.evaluate(done, can_stop=done < self.args.updates, can_raise=raisable)
        self.books.log_evaluation(done, verdict.result)
        print_evaluation(done, verdict.result.record)
        return verdict

    def _save_after(self, error: CRDError) -> None:
        """Save what was learned before `error`; sharded weights cannot be gathered without a lost process."""
        if not (self.engine.sharded and isinstance(error, PeerLostError)):
            self._save()

    def _save(self) -> None:
        self.books.save(
            self.progress,
            lambda: pack(self.snapshots, self.optimizer, self.progress, self.train_data),
            sharded=self.engine.sharded,
        )
