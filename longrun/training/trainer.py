"""transformers' Trainer, made to train a plan.

What depends on the file being trained is taken out of its hands: the order of rows, the position in them,
randomness, the learning rate, and what a checkpoint is. Measured on transformers 5.23: with its own
bookkeeping a second file trains 0 steps, or the right number of steps over the wrong rows.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from longrun.plan import Recipe


class Conductor(Protocol):
    """What a run decides while the Trainer trains."""

    @property
    def recipe(self) -> Recipe: ...

    def began(self) -> None: ...

    def trained(self, loss: torch.Tensor, rows: list[int]) -> None: ...

    def step_ended(self, state: TrainerState, control: TrainerControl) -> None: ...

    def save(self, write: Callable[[], None]) -> None: ...


@dataclass
class InMemory:
    """Which checkpoint the weights and the optimizer in memory are; "" when they are none."""

    weights: str = ""
    optimizer: str = ""


class PlannedTrainer(Trainer):
    """One for the life of the worker: each run gives it a new slice of rows and a higher max_steps."""

    conductor: Conductor
    rate_used: float = 0.0  # the learning rate of the last step, as the optimizer had it
    save_s: float | None = None  # what the last checkpoint took
    resumes: str = ""  # digest of the checkpoint that the next train() goes on from

    def __init__(self, **options: Any) -> None:
        self.in_memory = InMemory()
        super().__init__(**options)
        self.add_callback(_Beat(self))
        assert self.model is not None
        self._grown_by_length: list[Any] = [
            m for m in self.model.modules() if getattr(m, "rope_type", None) == "dynamic"
        ]

    def weights(self) -> list[torch.nn.Parameter]:
        assert self.model is not None
        return list(self.model.parameters())

    # -- rows

    def take_at_once(self, rows: int, processes: int) -> None:
        """So many rows a micro-batch from the next train() on; a step has as many as before."""
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * processes
        self.args.per_device_train_batch_size = rows
        self.args.gradient_accumulation_steps = batch_size // (rows * processes)
        self._train_batch_size = self.args.train_batch_size

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; the rows are noted here because here is what the model really receives."""
        rows = inputs.pop("rows")
        self.in_memory = InMemory()  # from here on it is no checkpoint any more
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.conductor.trained(loss, rows)
        return loss

    def forget_lengths(self) -> None:
        """Dynamic RoPE goes by the longest row since the model was loaded: let no step know of those before it."""
        for rope in self._grown_by_length:
            rope.max_seq_len_cached = rope.original_max_seq_len
            rope.register_buffer("inv_freq", rope.original_inv_freq.to(rope.inv_freq.device), persistent=False)

    # -- learning rate: a function of the global step and the recipe, of nothing else

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        warmup = max(1, self.conductor.recipe.warmup_steps)
        # Step s runs at (s+1)/w: with the stock (s)/w the first step of a life would train nothing.
        target = optimizer or self.optimizer
        assert target is not None
        self.lr_scheduler = LambdaLR(target, lambda step: min(1.0, (step + 1) / warmup))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def apply_recipe(self, global_step: int) -> None:
        """Set rate, decay and betas as the recipe says: a stock resume goes on with the checkpoint's old ones."""
        recipe = self.conductor.recipe
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        assert isinstance(scheduler, LambdaLR)
        assert self.optimizer is not None
        rate = recipe.learning_rate * scheduler.lr_lambdas[0](global_step)
        for group in self.optimizer.param_groups:
            group["initial_lr"], group["lr"] = recipe.learning_rate, rate
            group["weight_decay"] = recipe.weight_decay if self._decays(group) else 0.0
            if "betas" in group:
                group["betas"], group["eps"] = (recipe.adam_beta1, recipe.adam_beta2), recipe.adam_epsilon
        scheduler.base_lrs = [recipe.learning_rate] * len(self.optimizer.param_groups)
        scheduler.last_epoch = global_step
        scheduler._last_lr = [rate] * len(self.optimizer.param_groups)

    def _decays(self, group: dict[str, Any]) -> bool:
        """Whether weight decay is for this group: the Trainer keeps biases and norms in one of their own."""
        assert self.model is not None
        names = self.get_decay_parameter_names(self.model)
        decaying = {id(weight) for name, weight in self.model.named_parameters() if name in names}
        return bool(group["params"]) and id(group["params"][0]) in decaying

    # -- warm: what is in memory need not be read again; tests hold this path to bit-equality with the cold one

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.in_memory.weights != self.resumes:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.in_memory.optimizer != self.resumes:
            super()._load_optimizer_and_scheduler(checkpoint)

    # -- checkpoints

    # The randomness of a step follows from its number: there is none to save, and no pickle of it to load.

    def _save_rng_state(self, output_dir: str) -> None:
        pass

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The Trainer's, but several chat templates go into tokenizer_config.json, not into a folder: ours are flat."""
        tokenizer: Any = self.processing_class
        self.processing_class = None
        super()._save(output_dir, state_dict)
        self.processing_class = tokenizer
        several = isinstance(tokenizer.chat_template, dict)
        tokenizer.save_pretrained(output_dir, save_jinja_files=not several)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer writes the files, the run makes them a checkpoint: complete, verified, or not there."""
        write = super()._save_checkpoint
        self.conductor.save(lambda: write(model, trial))


class _Beat(TrainerCallback):
    """Hands the Trainer's moments to the run."""

    def __init__(self, trainer: PlannedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.apply_recipe(state.global_step)
        self._trainer.conductor.began()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        reseed(self._trainer.conductor.recipe.seed, state.global_step, args.process_index)
        self._trainer.forget_lengths()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self._trainer.optimizer is not None
        self._trainer.rate_used = self._trainer.optimizer.param_groups[0]["lr"]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.conductor.step_ended(state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        # The history lives in logs/metrics.jsonl: in the state it would make each checkpoint dearer than the last.
        del state.log_history[:]


def reseed(seed: int, global_step: int, rank: int = 0) -> None:
    """Make all randomness of a step a function of (seed, global_step, rank), so that resuming repeats it exactly."""
    salt = f"{seed}:{global_step}" + (f":{rank}" if rank else "")
    number = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:4], "big")
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
