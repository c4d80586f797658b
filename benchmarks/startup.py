"""A process that trains K LoRA trials on the tiny base and prints what its parts cost, as JSON.

`python startup.py ours|peft|compiled K STEPS THREADS`; used by packing.py. `reached` is the wall
clock when Python had started, so that the caller can tell the interpreter's own start.
"""

import json
import sys
import time

REACHED = time.time()
BATCH, LENGTH_OF_GRID = 16, 32


def trials(k: int, steps: int) -> list:
    """Return K LoRA trials that differ in learning rate alone."""
    from loralab.study.trial import Trial

    grid = [1e-3 * 10 ** (1.5 * i / LENGTH_OF_GRID) for i in range(k)]
    return [
        Trial("tiny", "synthetic", "lora", lr, batch_size=BATCH, steps=steps, warmup=0.1)
        for lr in grid
    ]


def peft_step(model, task, trial):
    """Return a step of an ordinary PEFT loop with the trial's settings."""
    import peft
    import torch

    from loralab.training.schedule import DataOrder, lr_factor

    config = peft.LoraConfig(r=trial.rank, lora_alpha=trial.rank, target_modules="all-linear")
    config.task_type = "CAUSAL_LM"
    adapted = peft.get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=trial.lr, weight_decay=0.0, fused=True)
    plan = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: lr_factor(trial.schedule, trial.warmup, i, trial.steps)
    )
    order = DataOrder(trial.seed, task.size("train"), trial.batch_size)
    adapted.train()
    done = 0

    def step() -> float:
        nonlocal done
        batch = task.batch("train", order.indices(done))
        sums, counts = task.losses(adapted, batch)
        loss = sums.sum() / counts.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, trial.clip)
        optimizer.step()
        plan.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        return float(loss.detach())

    return step


def our_step(model, task, given, compiled: bool = False):
    """Return a step of the packed loop itself."""
    from loralab.training.loop import _Run

    run = _Run(model, task, given, None)
    if compiled:
        run.memory.restore(0)  # its hooks would have no meaning inside a compiled graph
        model.compile()
    return run.advance


def main() -> None:
    """Train and print."""
    mode, k, steps, threads = sys.argv[1], *map(int, sys.argv[2:5])
    began = time.perf_counter()
    marks = {}

    def mark(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        marks[name], began = now - began, now

    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    import loralab.training.loop  # noqa: F401
    from loralab.models import load_model
    from loralab.tasks import load_task

    if mode == "peft":
        import peft  # noqa: F401
    torch.set_num_threads(threads)
    mark("imports")
    model, tokenizer = load_model("tiny")
    task = load_task("synthetic", tokenizer, model)
    mark("model and task")
    given = trials(k, steps)
    if mode == "peft":
        step = peft_step(model, task, given[0])
    else:
        step = our_step(model, task, given, mode == "compiled")
    mark("adapter")
    step()
    mark("first step")
    for _ in range(steps - 1):
        step()
    mark("other steps")
    print(json.dumps(marks | {"reached": REACHED}))


if __name__ == "__main__":
    main()
