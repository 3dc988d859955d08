"""Summing gradients over processes, by hand.

`DistributedDataParallel` expects one forward and one backward of one module; a GAN's phases train subsets of networks,
call their sub-methods, and run a network twice before one backward. So the gradients of a phase are all-reduced in
buckets, launched in a fixed order from hooks while the last micro-batch's backward is still running.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 25 * 2**20


class GradientSync:
    """Gradient sum over the processes of the default group; does nothing where there is only one.

    Use: `watch(parameters)` before the last backward of a phase, `finish(flag)` after it.
    """

    def __init__(self) -> None:
        self.world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._buckets: list[list[nn.Parameter]] = []
        self._waiting: list[int] = []
        self._launched: list[tuple[list[nn.Parameter], Tensor, dist.Work]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._next = 0

    def watch(self, parameters: list[nn.Parameter]) -> None:
        """Send a bucket as soon as the gradients of its parameters are complete."""
        if self.world == 1:
            return
        self._buckets = _buckets(parameters)
        self._waiting = [len(bucket) for bucket in self._buckets]
        self._next = 0
        for i, bucket in enumerate(self._buckets):
            for parameter in bucket:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(lambda _, i=i: self._ready(i)))

    def _ready(self, i: int) -> None:
        self._waiting[i] -= 1
        # All processes must send in the same order, whatever order their gradients arrive in.
        while self._next < len(self._buckets) and self._waiting[self._next] <= 0:
            self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None, "an asynchronous all-reduce gives a handle"
        self._launched.append((bucket, flat, work))

    def finish(self, flag: Tensor) -> Tensor:
        """Wait for all buckets, write the sums into `.grad`; `flag` (a scalar) is summed along."""
        if self.world == 1:
            return flag
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        while self._next < len(self._buckets):
            self._launch()
        flag = flag.clone()
        for bucket, flat, work in self._launched:
            work.wait()
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                # In the layout of the parameter: fused optimisers walk both side by side.
                parameter.grad = torch.empty_like(parameter, memory_format=torch.preserve_format)
                parameter.grad.copy_(part.view(parameter.shape))
        dist.all_reduce(flag)
        self._launched.clear()
        self._buckets = []
        return flag

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over the processes."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in the order their gradients arrive (last layer first), cut at about 25 MB."""
    buckets: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in reversed(parameters):
        if size >= _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets
