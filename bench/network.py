"""Networks of ResNet-18's and ResNet-50's shape and size, in plain torch, without torchvision.

    python bench/network.py model.pt resnet50       write one as TorchScript, with random weights

(N, 3, 224, 224) float32 to (N, 1000) float32; 11.7 and 25.6 million weights, 1.8 and 4.1 billion
multiplications.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor, nn

SEED = 20261122
WIDTHS = (64, 128, 256, 512)
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


class Block(nn.Module):
    """Two convolutions, or three around a bottleneck, with a way around them."""

    def __init__(self, n_in: int, width: int, stride: int, *, is_bottleneck: bool) -> None:
        super().__init__()
        n_out = 4 * width if is_bottleneck else width
        if is_bottleneck:
            layers = [
                *(convolution(n_in, width, 1, 1), nn.ReLU()),
                *(convolution(width, width, 3, stride), nn.ReLU()),
                convolution(width, n_out, 1, 1),
            ]
        else:
            layers = [
                *(convolution(n_in, width, 3, stride), nn.ReLU()),
                convolution(width, n_out, 3, 1),
            ]
        self.body = nn.Sequential(*layers)
        is_same = n_in == n_out and stride == 1
        self.around = nn.Identity() if is_same else convolution(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def convolution(n_in: int, n_out: int, size: int, stride: int) -> nn.Sequential:
    """A convolution with batch normalisation, which freezing folds into it."""
    layer = nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(n_out))


def resnet(name: str) -> nn.Module:
    """Return a network, in evaluation mode."""
    is_bottleneck = name == "resnet50"
    blocks: list[nn.Module] = []
    n_in = 64
    for level, (width, depth) in enumerate(zip(WIDTHS, DEPTHS[name], strict=True)):
        for number in range(depth):
            stride = 2 if level and not number else 1
            blocks.append(Block(n_in, width, stride, is_bottleneck=is_bottleneck))
            n_in = 4 * width if is_bottleneck else width
    stem = [convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, 1000)]
    return nn.Sequential(*stem, *blocks, *tail).eval()


def main(path: str, name: str) -> None:
    """Write a network."""
    torch.manual_seed(SEED)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        traced = torch.jit.trace(resnet(name), torch.zeros(1, 3, 224, 224))
        torch.jit.save(traced, path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
