"""Model parallel and data parallel at once: a pipeline of two stages, each stage replicated.

Ranks form a mesh (replicas, stages). Microbatches travel along the stages; gradients are averaged between the
replicas of a stage.

    torchrun --nproc-per-node 2 examples/pipeline_hybrid.py      # one pipeline of two stages
    torchrun --nproc-per-node 4 examples/pipeline_hybrid.py      # two pipelines side by side
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

STAGES = 2


def layers(stage: int) -> torch.nn.Module:
    torch.manual_seed(stage)  # the same on every replica of the stage
    if stage == 0:
        return torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.ReLU())
    return torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="paceline")
    parser.add_argument("--steps", type=int, default=10)
    chosen = parser.parse_args()

    dist.init_process_group(chosen.backend)
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // STAGES, STAGES), mesh_dim_names=("replica", "stage"))
    along, between = mesh.get_group("stage"), mesh.get_group("replica")
    number, replica = mesh.get_local_rank("stage"), mesh.get_local_rank("replica")

    module = layers(number)
    stage = PipelineStage(module, number, STAGES, torch.device("cpu"), group=along)
    schedule = ScheduleGPipe(stage, n_microbatches=4, loss_fn=torch.nn.functional.mse_loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    torch.manual_seed(100 + replica)  # other data for every replica
    inputs = torch.randn(64, 32)
    targets = inputs.sum(1, keepdim=True)

    for step in range(chosen.steps):
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        if number == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets, losses=losses)
        for parameter in module.parameters():
            dist.all_reduce(parameter.grad, group=between)
            parameter.grad /= between.size()
        optimizer.step()
        if number == STAGES - 1:
            mean = torch.stack(losses).mean().detach()
            dist.all_reduce(mean, group=between)
            if replica == 0:
                print(f"step {step} loss {mean.item() / between.size():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
