"""DistributedDataParallel over Gloo under torchrun: a step's number into a file as it is made, a checkpoint every ten.

Usage: torchrun ... elastic_ddp.py FOLDER
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

SAVE_EVERY = 10


def store() -> dist.Store:
    """The launcher's, with keys of this try alone: with those of the try before, ranks would look for dead peers for ever."""
    launcher = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"try-{os.environ['TORCHELASTIC_RESTART_COUNT']}", launcher)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(11)
    dist.init_process_group("gloo", store=store(), rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    rank = dist.get_rank()
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    kept, step = folder / "checkpoint.pt", 0
    if kept.exists():
        state = torch.load(kept)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    wrapped = DistributedDataParallel(model)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    with open(folder / "steps", "a", buffering=1) as steps:
        while True:
            generator = torch.Generator().manual_seed(step * dist.get_world_size() + rank)
            inputs = torch.randn(2, 64, generator=generator)
            loss = wrapped(inputs).logsumexp(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if rank == 0:
                steps.write(f"{step}\n")
                if step % SAVE_EVERY == 0:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    torch.save(state, folder / "checkpoint.new")
                    (folder / "checkpoint.new").replace(kept)
            # The pace of the run it is set beside, so that the machine is not busier.
            time.sleep(0.02)


if __name__ == "__main__":
    main()
