"""``python -m tests.guard``: writes down the counts of this build, Python and torch, beside those of others."""

from __future__ import annotations

import torch

from tests.guard.expected import measured_instructions, measured_python, write

if __name__ == "__main__":
    torch.set_num_threads(1)  # how long threads wait for one another is counted too, and no two times alike
    write("instructions", measured_instructions())
    write("python", measured_python())
