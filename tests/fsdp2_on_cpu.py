"""`train_hf.py` under FSDP2 in processes on the CPU: `accelerate launch ... tests/fsdp2_on_cpu.py FLAGS...`

torch shards on the CPU as it does on GPUs, over gloo, but accelerate takes its FSDP plugin only where there are GPUs.
Here it takes it anyway; everything else is real.
"""

import functools
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from real_command import REPOSITORY, run_command


take_settings = AcceleratorState.__init__


@functools.wraps(take_settings)
def take_fsdp_too(state, *args, fsdp_plugin=None, **kwargs):
    is_new = not AcceleratorState._shared_state
    take_settings(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if is_new and fsdp_plugin is not None:  # what accelerate does for MULTI_GPU
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if state.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(state.mixed_precision)
        state.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = take_fsdp_too
    sys.path[0] = str(REPOSITORY)
    sys.exit(run_command(sys.argv[1:]))
