"""Everyone the meta-gradient is compared with; nothing here knows fastmeta."""

from __future__ import annotations

from benchmarks.peers.base import Variant
from benchmarks.peers.higher_sgd import HIGHER
from benchmarks.peers.jax_jit import MAP, VMAP
from benchmarks.peers.learn2learn_maml import LEARN2LEARN
from benchmarks.peers.torch_compile import COMPILE_TASK, COMPILE_VMAP
from benchmarks.peers.torch_func import FUNC
from benchmarks.peers.torch_loop import LOOP
from benchmarks.peers.torchopt_sgd import TORCHOPT

PEERS: tuple[Variant, ...] = (
    LOOP,
    FUNC,
    HIGHER,
    TORCHOPT,
    LEARN2LEARN,
    COMPILE_VMAP,
    COMPILE_TASK,
    VMAP,
    MAP,
)
