"""What ranks do in the tests of the Trainer: a tiny GPT-2 with random weights, on random characters."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from paceline.compat.transformers import PacelineCallback


def flat(model: torch.nn.Module) -> list[float]:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()


def train(
    folder: str, strategy: str | None, settings: dict[str, Any] | None = None, *, resume: bool = False
) -> dict[str, Any]:
    """Losses in training and evaluation, and the model at the end."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **still))
    drawn = torch.randint(0, 64, (128, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in drawn]
    callback = None if strategy is None else PacelineCallback(strategy)
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=4,
        logging_steps=4,
        eval_steps=8,
        eval_strategy="steps",
        save_steps=10,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        **{"max_steps": 16, **(settings or {})},
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data[:16],
        callbacks=[callback] if callback else [],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    log = [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history]
    return {
        "losses": [value for value in log if value is not None],
        "model": flat(model),
        "stats": callback.job.stats() if callback else {},
    }


def over_the_backend(folder: str, backend: str) -> dict[str, Any]:
    dist.init_process_group(backend)
    try:
        return {**train(folder, None), "backend": dist.get_backend()}
    finally:
        dist.destroy_process_group()


def resumed(folder: str, strategy: str) -> list[dict[str, Any]]:
    """The second run goes on at step 10 of the first."""
    import shutil

    first = train(folder, strategy)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(f"{folder}/checkpoint-16")
    dist.barrier()
    return [first, train(folder, strategy, resume=True)]
