"""`train_hf.py` under FSDP2 or DeepSpeed on the CPU: `accelerate launch ... tests/sharded_on_cpu.py FAULT FLAGS...`

Both run on the CPU as they do on GPUs, over gloo, but accelerate only accepts their plugins where there are GPUs. Here
it accepts them anyway; everything else is real. FAULT holds the arguments of `real_command.arm` as JSON, or `null`.
"""

import functools
import json
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from real_command import REPOSITORY, arm, run_command


take_settings = AcceleratorState.__init__


@functools.wraps(take_settings)
def take_plugins_too(state, *args, fsdp_plugin=None, deepspeed_plugin=None, **kwargs):
    is_new = not AcceleratorState._shared_state
    take_settings(state, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **kwargs)
    if not is_new:
        return
    # As accelerate does for GPUs.
    if fsdp_plugin is not None:
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if state.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(state.mixed_precision)
        state.fsdp_plugin = fsdp_plugin
    if deepspeed_plugin is not None:
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # faster than gloo, but takes minutes to compile
        deepspeed_plugin.set_mixed_precision(state.mixed_precision)
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        state._mixed_precision = "no"  # it is in DeepSpeed's own config
        deepspeed_plugin.select(_from_accelerator_state=True)
        state.deepspeed_plugins = deepspeed_plugin


def patch_accelerate() -> None:
    AcceleratorState.__init__ = take_plugins_too


if __name__ == "__main__":
    patch_accelerate()
    sys.path[0] = str(REPOSITORY)
    fault = json.loads(sys.argv[1])
    if fault is not None:
        arm(**fault)
    sys.exit(run_command(sys.argv[2:]))
