"""Processes of one thread each that are joined by Gloo, wait for calls, and keep their state between them."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

from benches.harness import Broken

START_DEADLINE = 120.0


class Gang:
    """Used as a context manager; leaving it ends the processes."""

    def __init__(self, world: int = 2):
        self.world = world
        self.folder = tempfile.TemporaryDirectory(prefix="thaw-bench-")
        context = multiprocessing.get_context("spawn")
        self.members: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            meeting = str(Path(self.folder.name) / "meeting")
            process = context.Process(target=serve, args=(theirs, rank, world, meeting), daemon=True)
            process.start()
            theirs.close()
            self.members.append((process, ours))

    def __enter__(self) -> Gang:
        self.gather("the start", START_DEADLINE)
        return self

    def __exit__(self, *_) -> None:
        for process, connection in self.members:
            connection.close()
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        self.folder.cleanup()

    def call(self, function: str, deadline: float = 600.0, **arguments) -> list:
        """What each rank's `module:function` of benches.peers returns, given the rank's state and the arguments."""
        for _, connection in self.members:
            connection.send((function, arguments))
        return self.gather(function, deadline)

    def gather(self, what: str, deadline: float) -> list:
        answers: dict[int, object] = {}
        ends = time.monotonic() + deadline
        waiting = {connection: rank for rank, (_, connection) in enumerate(self.members)}
        while waiting:
            ready = wait(list(waiting), max(ends - time.monotonic(), 0))
            if not ready:
                raise Broken(f"{what} had not ended on ranks {sorted(waiting.values())} after {deadline:.0f} s")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    failed, answers[rank] = connection.recv()
                except EOFError as error:
                    raise Broken(f"{what}: rank {rank} died") from error
                if failed:
                    raise Broken(f"{what}, rank {rank}: {answers[rank]}")
        return [answers[rank] for rank in range(self.world)]


class State:
    """What a rank keeps between calls."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world


def serve(connection: Connection, rank: int, world: int, meeting: str) -> None:
    import torch
    import torch.distributed as dist

    quiet()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=300))
    state = State(rank, world)
    connection.send((False, None))
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            # No farewell to the other ranks: they are told the same.
            return
        module, _, name = function.partition(":")
        try:
            answer = (False, getattr(importlib.import_module(f"benches.peers.{module}"), name)(state, **arguments))
        except Exception:
            answer = (True, traceback.format_exc(limit=-6))
        connection.send(answer)


def quiet() -> None:
    """Libraries' advice and progress bars would hide ours."""
    warnings.filterwarnings("ignore")
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    import transformers

    transformers.logging.disable_progress_bar()
