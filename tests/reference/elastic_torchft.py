"""torchft over Gloo, each process a replica group of its own: a step's number into a file as it is committed.

Usage: elastic_torchft.py lighthouse FOLDER           serves until its standard input ends
       elastic_torchft.py replica FOLDER INDEX        trains until it is killed
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.coordination import LighthouseServer

HOST = "127.0.0.1"


def lighthouse(folder: Path) -> None:
    server = LighthouseServer(bind=f"{HOST}:0", min_replicas=1)
    port = server.address().rsplit(":", 1)[1]
    (folder / "lighthouse.new").write_text(f"http://{HOST}:{port}")
    (folder / "lighthouse.new").replace(folder / "lighthouse")
    sys.stdin.read()
    server.shutdown()


def replica(folder: Path, index: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(11)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 4))
    optimizer = torch.optim.AdamW(model.parameters())

    def load(state: dict) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    # Its deadlines stay what they are by default.
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr=HOST,
        store_port=store.port,
        lighthouse_addr=(folder / "lighthouse").read_text(),
        replica_id=f"replica-{index}",
        hostname=HOST,
    )
    wrapped, optimizing = DistributedDataParallel(manager, model), Optimizer(manager, optimizer)
    (folder / f"pid-{index}").write_text(str(os.getpid()))
    step = manager.current_step()
    with open(folder / "steps", "a", buffering=1) as steps:
        while True:
            generator = torch.Generator().manual_seed(step * 64 + index)
            optimizing.zero_grad()
            wrapped(torch.randn(2, 64, generator=generator)).logsumexp(1).mean().backward()
            optimizing.step()
            if manager.current_step() > step:
                step = manager.current_step()
                steps.write(f"{step}\n")
            # The pace of the run it is set beside, so that the machine is not busier.
            time.sleep(0.02)


if __name__ == "__main__":
    if sys.argv[1] == "lighthouse":
        lighthouse(Path(sys.argv[2]))
    else:
        replica(Path(sys.argv[2]), int(sys.argv[3]))
