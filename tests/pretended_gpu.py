"""A GPU where there is none: its results are right, the test decides when copies arrive, and waits are counted."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


aten = torch.ops.aten
READS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # item(), bool(), nonzero(), ...


class OnGPU(torch.Tensor):
    """A tensor on `cuda:0`. Its values are in `values`, on the CPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.shape, **layout, device="cuda:0")
        tensor.values = values
        return tensor

    def __init__(self, values):
        pass

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("used outside of PretendedGPU")


class PretendedGPU(TorchDispatchMode):
    """
    Inside, `"cuda"` is a device. Non-blocking copies to the CPU hold nonsense until `catch_up` is called or something
    waits. It only supports the forward pass: torch's backward pass looks for the driver.

    `waits` holds the name of every operation and event that waited.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.waits: list[str] = []
        self.queued: list[tuple[torch.Tensor, torch.Tensor]] = []  # copies to the CPU: destination and values
        self.num_done = 0
        self.pinned: set[int] = set()
        self.kept: list[torch.Tensor] = []  # so that no other tensor gets the id of a pinned one
        self.as_if_initialized = FakeTensorMode()  # keeps torch from looking for the driver
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))
        monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # its kernels do not run on the CPU
        # Moved modules then get new parameters; the data of an existing one cannot become an `OnGPU`.
        monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)

    def __enter__(self):
        self.as_if_initialized.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.as_if_initialized.__exit__(*error)

    def catch_up(self) -> None:
        for place, values in self.queued[self.num_done :]:
            place.copy_(values)
        self.num_done = len(self.queued)

    def wait(self, what: str) -> None:
        self.waits.append(what)
        self.catch_up()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with unset_fake_temporarily():
            return self.run(function, args, dict(kwargs or {}))

    def run(self, function, args, kwargs):
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        was_there = any(isinstance(tensor, OnGPU) for tensor in inputs)
        is_there = was_there
        if kwargs.get("device") is not None:
            is_there = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = "cpu"
        non_blocking = kwargs.pop("non_blocking", False)
        if function is aten._pin_memory.default:
            self.kept.append(args[0].clone())
            self.pinned.add(id(self.kept[-1]))
            return self.kept[-1]
        if function is aten.copy_.default:
            is_there, was_there = (isinstance(tensor, OnGPU) for tensor in args[:2])
            assert is_there or not was_there, "not implemented: copy_ from the GPU to the CPU"
        reads_values = bool(READS_VALUES.intersection(function.tags))
        if function in (aten.index.Tensor, aten.index_put_.default):
            reads_values = any(index is not None and index.dtype == torch.bool for index in args[1])
        elif function is aten.repeat_interleave.Tensor:
            reads_values = kwargs.get("output_size") is None
        if was_there and reads_values:
            self.wait(str(function))
        elif is_there and not was_there and inputs and not (non_blocking and id(inputs[-1]) in self.pinned):
            self.wait(f"{function} to the GPU")
        elif was_there and not is_there and not non_blocking:
            self.wait(f"{function} to the CPU")
        args, kwargs = tree_map_only(OnGPU, lambda tensor: tensor.values, (args, kwargs))
        output = function(*args, **kwargs)
        if was_there and not is_there and non_blocking:
            self.queued.append((torch.full_like(output, torch.nan), output.clone()))
            return self.queued[-1][0]
        return tree_map_only(torch.Tensor, OnGPU, output) if is_there else output


class Event:
    """Replaces `torch.cuda.Event`."""

    def __init__(self, gpu: PretendedGPU):
        self.gpu = gpu

    def record(self) -> None:
        self.place = len(self.gpu.queued)

    def query(self) -> bool:
        return self.gpu.num_done >= self.place

    def synchronize(self) -> None:
        if not self.query():
            self.gpu.wait("an event")
