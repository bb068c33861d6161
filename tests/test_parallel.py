"""Steering where the tokens of an image are split over processes, as diffusers' context parallelism does."""

import os
import socket
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers.models._modeling_parallel import ContextParallelConfig
from tiny_pipelines import ALL, run
from torch.multiprocessing.spawn import spawn

import steerlib as sl
from steerlib.errors import Unanswerable

SITES = {"flux": "transformer.transformer_blocks.1:image", "wan": "transformer.blocks.1"}
UPPER = (0.0, 0.0, 1.0, 0.5)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def one_of_two(rank, port, folder):
    """One process of the test."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it
    tiny_pipelines.POOLED["prompt_embeds"] = (8, 16)  # an even number of tokens, which can be split
    torch.save({family: whole_and_split(family, site) for family, site in SITES.items()}, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def whole_and_split(family, site):
    """What steering gives in one process and in two, and how many tokens each saw."""
    pipe = ALL[family].build()
    bank = sl.ConceptBank.from_directions({"a": torch.arange(16) / 8}, site=site, base=pipe)
    found = {"plain": run(pipe)}
    with sl.steer(pipe, bank, {"a": 1.0}), sl.record(pipe, [site]) as whole:
        found["whole"] = run(pipe)
    for denoiser in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        if denoiser is not None:
            denoiser.set_attention_backend("native")
            denoiser.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    with sl.steer(pipe, bank, {"a": 1.0}), sl.record(pipe, [site]) as part:
        found["split"] = run(pipe)
    with pytest.raises(Unanswerable, match="split over devices"), sl.steer(pipe, bank, {"a": sl.Add(1.0, mask=UPPER)}):
        run(pipe)
    return found | {"tokens": [tape[site][0][1].shape[1] for tape in (whole, part)]}


def test_tokens_split_over_processes_are_steered_alike_and_masks_refused(tmp_path):
    spawn(one_of_two, args=(free_port(), str(tmp_path)), nprocs=2)
    for found in (family for rank in (0, 1) for family in torch.load(tmp_path / f"{rank}.pt").values()):
        whole, part = found["tokens"]
        assert whole == 2 * part
        torch.testing.assert_close(found["split"], found["whole"], atol=1e-5, rtol=1e-4)
        assert (found["whole"] - found["plain"]).abs().max() > 1e-2
