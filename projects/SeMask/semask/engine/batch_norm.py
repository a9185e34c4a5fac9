"""Batch normalisation in a run of several processes.

PyTorch's ``SyncBatchNorm`` refuses tensors on the CPU. ``synchronize_batch_norm`` puts a module
with the same parameters in its place there, so "SyncBN" in a config means the same everywhere.
Other BatchNorm layers have statistics of their own in each process; ``broadcast_buffers`` makes
them those that are saved.
"""

import torch
import torch.distributed as dist
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_reduce
from torch import Tensor, nn


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """``BatchNorm2d`` whose statistics in training are those of all processes' batches together.

    The processes may have different numbers of images and different image sizes. It equals one
    ``BatchNorm2d`` on the whole batch: normalisation, running statistics and gradients.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape; all processes have to call it together."""
        if not self.training or comm.get_world_size() == 1:
            return super().forward(x)
        channels = x.shape[1]
        wide = x if x.dtype.itemsize >= 4 else x.float()
        own = wide.new_full((1,), x.numel() // channels)
        # Two sums instead of one with squares: no small difference of large numbers.
        sums = differentiable_all_reduce(torch.cat([own, wide.sum((0, 2, 3))]))
        count = sums[0].detach()
        mean = sums[1:] / count
        centred = wide - mean[:, None, None]
        variance = differentiable_all_reduce(centred.square().sum((0, 2, 3))) / count
        self._track(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        y = centred * scale[:, None, None]
        if self.affine:
            y = y + self.bias[:, None, None]
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Update the running statistics as ``BatchNorm2d`` does, with the unbiased variance."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """Make every ``SyncBatchNorm`` of a model work on the device that it is on.

    Args:
        model: on its device; parameters, their names and the statistics stay as they are.

    Returns:
        The model, changed in place, or its replacement if it is itself such a layer.
    """
    for name, child in model.named_children():
        setattr(model, name, synchronize_batch_norm(child))
    on_cpu = all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
    if not (isinstance(model, nn.SyncBatchNorm) and on_cpu):
        return model
    layer = CpuSyncBatchNorm2d(
        model.num_features, model.eps, model.momentum, model.affine, model.track_running_stats
    )
    layer._parameters.update(model._parameters)
    layer._buffers.update(model._buffers)
    return layer.train(model.training)


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first one, whose checkpoints are written; collective.

    Without it each process would evaluate its share of the images with the running statistics of
    its own batches.

    Args:
        model: on its device, with equal parameters in all processes.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
