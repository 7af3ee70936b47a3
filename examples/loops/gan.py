"""A generative adversarial network: two models, two optimizers, one loader.

python examples/loops/gan.py
paceline run -n 2 examples/loops/gan.py
torchrun --nproc-per-node 2 examples/loops/gan.py
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import paceline
from paceline import Job

NOISE = 4


def circle(count: int = 120) -> TensorDataset:
    """Points near a circle, each with the noise that its fake is made from."""
    generator = torch.Generator().manual_seed(0)
    angle = 6.28 * torch.rand(count, generator=generator)
    points = torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2, generator=generator)
    return TensorDataset(points, torch.randn(count, NOISE, generator=generator))


def train(job: Job) -> tuple[tuple[float, float], nn.Module, nn.Module]:
    generator = nn.Sequential(nn.Linear(NOISE, 16), nn.ReLU(), nn.Linear(16, 2))
    critic = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    for_generator = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    for_critic = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.999))
    loader = DataLoader(circle(), batch_size=16, shuffle=True)
    generator, critic, for_generator, for_critic, loader = job.prepare(
        generator, critic, for_generator, for_critic, loader, batch="global"
    )

    for epoch in job.epochs(3):
        sums = torch.zeros(2)
        count = 0
        for real, noise in loader:
            ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
            fake = generator(noise)

            for_critic.zero_grad()
            loss_critic = functional.binary_cross_entropy_with_logits(critic(real), ones)
            loss_critic = loss_critic + functional.binary_cross_entropy_with_logits(
                critic(fake.detach()), zeros
            )
            loss_critic.backward()
            for_critic.step()

            for_generator.zero_grad()
            loss_generator = functional.binary_cross_entropy_with_logits(critic(fake), ones)
            loss_generator.backward()
            for_generator.step()

            own = loader.own_samples  # 0 where a short batch leaves nothing to this rank: it repeats another
            sums += own * torch.stack([loss_critic.detach(), loss_generator.detach()])
            count += own
        means = job.all_reduce_metrics(
            {"critic": (sums[0].item(), count), "generator": (sums[1].item(), count)}
        )
        job.print(f"epoch {epoch + 1}: critic {means['critic']:.4f}, generator {means['generator']:.4f}")
    return (means["critic"], means["generator"]), generator, critic


if __name__ == "__main__":
    job = paceline.init(seed=0)
    losses, generator, critic = train(job)
    norms = [nn.utils.parameters_to_vector(m.parameters()).norm().item() for m in (generator, critic)]
    job.print(
        f"final losses {losses[0]:.6f} and {losses[1]:.6f}, norms of the parameters"
        f" {norms[0]:.6f} and {norms[1]:.6f}"
    )
