"""What torch can compute with here."""

from __future__ import annotations

import torch

from kvdb.surroundings import Accelerator


def accelerator() -> Accelerator:
    """The first GPU, or none; a driver that torch cannot use counts as none."""
    built = torch.version.cuda or torch.version.hip
    kind = "hip" if torch.version.hip else "cuda"
    cuda = torch.cuda.is_available()
    return Accelerator(
        build=f"{kind} {built}" if built else "cpu",
        cuda=cuda,
        device=torch.cuda.get_device_name(0) if cuda else "",
        memory_bytes=torch.cuda.get_device_properties(0).total_memory if cuda else None,
        threads=torch.get_num_threads(),
    )
