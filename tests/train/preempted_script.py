"""A training script as a user writes it, slow enough to be interrupted; prints the final model's digest."""

import hashlib
import sys
import time

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import paceline

FOLDER, STRATEGY = sys.argv[1:]


class Noisy(Dataset):
    """Random augmentation, drawn in the loader's workers."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(5) + index % 2, index % 2


job = paceline.init(seed=1, checkpoint=FOLDER, timeout_s=60)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
loader = DataLoader(Noisy(), 4, shuffle=True, num_workers=1)
model, optimizer, loader = job.prepare(model, optimizer, loader, strategy=STRATEGY)
for _ in job.epochs(4):
    for x, y in loader:
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if job.rank == 0:
            time.sleep(0.05)  # the others wait for this one inside a collective
            print("step", job.step, flush=True)
flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
print("digest", hashlib.sha256(flat.numpy().tobytes()).hexdigest(), flush=True)
