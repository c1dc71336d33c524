"""TRL's side of a comparison: `RLOOTrainer` as its users run it, with the plain subprocess that they judge with.

It gets the better of its own settings (no gradient checkpointing, no logging, no saving), our thread count and
allocator settings, and the same model, adapter and prompts.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import TrainerCallback

from bench.side import Reports, Stages, wait_for_go
from bench.work import Work, build, fixed_reward
from greenloop.prompt import get_protocol
from greenloop.types import Prompt


class TimedTrainer(trl.RLOOTrainer):
    """The trainer with a clock around its stages."""

    stages: Stages
    no_grad_forwards: int
    trained_tokens: int

    def _generate(self, prompts: Any) -> Any:
        return self.stages.timed("generation", super()._generate, prompts)

    def _calculate_rewards(self, *args: Any) -> Any:
        return self.stages.timed("verification", super()._calculate_rewards, *args)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        forward = super()._get_per_token_logps_and_entropies
        if torch.is_grad_enabled():
            return forward(*args, **kwargs)
        self.no_grad_forwards += 1
        return self.stages.timed("old" if self.no_grad_forwards == 1 else "reference", forward, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.trained_tokens += int(inputs["completion_mask"].sum())
        return super()._compute_loss(model, inputs)


class StepByStep(TrainerCallback):
    """Waits before each step, reports after it."""

    def __init__(self, reports: Reports) -> None:
        self.reports = reports
        self.trainer: TimedTrainer | None = None
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """A fresh clock."""
        assert self.trainer is not None
        wait_for_go()
        self.trainer.stages, self.trainer.no_grad_forwards, self.trainer.trained_tokens = Stages(), 0, 0
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Seconds by stage; what no stage has is the update."""
        assert self.trainer is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        staged = self.trainer.stages.seconds
        total = time.perf_counter() - self.started
        seconds = {**staged, "update": total - sum(staged.values()), "total": total}
        tokens = self.trainer.trained_tokens
        self.reports.say(seconds=seconds, tokens=tokens, trained_tokens=tokens)


def judged_by_subprocess(work: Work, prompts: list[Prompt]) -> Any:
    """A reward function of the kind that TRL's users write: exec the program with its tests in a new interpreter."""
    protocol = get_protocol("train")
    tasks = {prompt.text: prompt.task for prompt in prompts}

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        passed = []
        for prompt, completion in zip(prompts, completions, strict=True):
            task = tasks[prompt]
            program = protocol.extract(completion, task) or ""
            source = "\n".join([task.prelude, program, task.setup, *task.tests, *task.hidden_tests])
            try:
                ran = subprocess.run([sys.executable, "-c", source], capture_output=True, timeout=10, check=False)
                passed.append(float(ran.returncode == 0))
            except subprocess.TimeoutExpired:
                passed.append(0.0)
        return [fixed_reward(index) for index in range(len(passed))] if work.equal else passed

    return reward


def main() -> None:
    """Serve steps."""
    reports = Reports()
    work = Work.from_json(sys.argv[1])
    model, tokenizer, prompts = build(work)
    rows = min(work.trl_rows, work.completions)
    dtype = next(model.base_model.model.parameters()).dtype
    on_cpu = model.device.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        config = trl.RLOOConfig(
            output_dir=folder,
            beta=work.beta,
            num_generations=work.samples,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=work.completions // rows,
            max_completion_length=work.max_new_tokens,
            generation_kwargs={"min_new_tokens": work.max_new_tokens} if work.equal else None,
            temperature=1.0,
            learning_rate=work.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            max_steps=1000,
            bf16=dtype == torch.bfloat16 and not on_cpu,
            gradient_checkpointing=False,
            disable_dropout=True,
            shuffle_dataset=False,
            use_cpu=on_cpu,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        callback = StepByStep(reports)
        trainer = TimedTrainer(
            model=model,
            reward_funcs=judged_by_subprocess(work, prompts),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [prompt.text for prompt in prompts]}),
            processing_class=tokenizer,
            callbacks=[callback],
        )
        callback.trainer = trainer
        reports.say(ready=True, dtype=str(dtype), threads=torch.get_num_threads())
        trainer.train()


if __name__ == "__main__":
    main()
