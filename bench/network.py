"""A network of ResNet-18's shape and size, in plain torch: torchvision is not needed for it.

    python bench/network.py model.pt        write it as TorchScript, with random weights

(N, 3, 224, 224) float32 to (N, 1000) float32; 11.7 million weights, 1.8 billion multiplications.
"""

from __future__ import annotations

import sys
import warnings
from itertools import pairwise

import torch
from torch import Tensor, nn

SEED = 20261122
WIDTHS = (64, 64, 128, 256, 512)


class Block(nn.Module):
    """Two convolutions with a way around them."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(n_in, n_out, 3, stride), nn.ReLU(), convolution(n_out, n_out, 3, 1)
        )
        is_same = n_in == n_out and stride == 1
        self.around = nn.Identity() if is_same else convolution(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def convolution(n_in: int, n_out: int, size: int, stride: int) -> nn.Sequential:
    """A convolution with batch normalisation, which freezing folds into it."""
    layer = nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(n_out))


def resnet18() -> nn.Module:
    """The network, in evaluation mode."""
    blocks: list[nn.Module] = []
    for level, (n_in, n_out) in enumerate(pairwise(WIDTHS)):
        blocks += [Block(n_in, n_out, 2 if level else 1), Block(n_out, n_out, 1)]
    stem = [convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)]
    return nn.Sequential(*stem, *blocks, *tail).eval()


def main(path: str) -> None:
    """Write the network."""
    torch.manual_seed(SEED)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        traced = torch.jit.trace(resnet18(), torch.zeros(1, 3, 224, 224))
        torch.jit.save(traced, path)


if __name__ == "__main__":
    main(sys.argv[1])
