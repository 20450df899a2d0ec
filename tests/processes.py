"""Scenes that several processes play together, and what went wrong in each."""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import distributed, multiprocessing

Scene = Callable[[int], None]


def _process(rank: int, scenes: Sequence[Scene], processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    for scene in scenes:
        try:
            scene(rank)
            said = ""
        except Exception:
            said = traceback.format_exc()
        (folder / f"{scene.__name__}-{rank}").write_text(said)
        if said:
            break  # the others may be waiting in a collective: they are ended with this one
    else:
        distributed.barrier()
        distributed.destroy_process_group()


def play(scenes: Sequence[Scene], processes: int, folder: Path) -> Path:
    """Has so many processes play scenes in order; the folder then holds what each said."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_process, args=(rank, scenes, processes, folder)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()
    return folder


def assert_played(scene: Scene, processes: int, folder: Path) -> None:
    """Every process came through a scene."""
    for rank in range(processes):
        path = folder / f"{scene.__name__}-{rank}"
        assert path.exists(), "the process did not come this far"
        assert not path.read_text(), path.read_text()
