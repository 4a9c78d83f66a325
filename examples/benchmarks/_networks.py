"""Networks for 32x32 images, at a share of their usual width. The parts are torchvision's."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import DenseNet
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

NETWORKS = ("resnet18", "resnet34", "vgg16", "densenet121")


def make_network(name: str, classes: int, width: int) -> nn.Module:
    """One of `NETWORKS`, in its usual form for 32x32 images: no strided or pooled stem.

    Args:
        name: Which one.
        classes: Number of outputs.
        width: Channels of the first layers; 64 is the usual width.
    """
    if name == "vgg16":
        widths = [1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8]
        layers = make_layers([part if part == "M" else int(part) * width for part in widths], batch_norm=True)
        return nn.Sequential(layers, *_head(8 * width, classes))
    if name == "densenet121":
        blocks = (6, 12, 24, 16)
        network = DenseNet(width // 2, blocks, width, num_classes=classes)
        network.features.conv0 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        network.features.pool0 = nn.Identity()
        return network
    blocks = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}[name]
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage, count in enumerate(blocks):
        outputs = width * 2**stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            layers.append(BasicBlock(inputs, outputs, stride, _shortcut(inputs, outputs, stride)))
            inputs = outputs
    return nn.Sequential(*layers, *_head(inputs, classes))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _head(inputs: int, classes: int) -> tuple[nn.Module, ...]:
    return Mean(), nn.Linear(inputs, classes)


class Mean(nn.Module):
    """The mean over height and width. Adaptive pooling has no deterministic backward pass on CUDA."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3))
