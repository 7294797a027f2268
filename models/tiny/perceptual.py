"""LPIPS (Zhang et al. 2018) for training the small autoencoder, with the shift-tolerant VGG-16 of `stlpips-pytorch`.

Only the package's weights file is read: importing the package needs torchvision, IPython and more.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = "weights/vST0.0/vgg_shift_tolerant.pth"
# Convolutions of each slice by their place in the checkpoint; every slice but the first begins with a pooling.
SLICES = ((0, 2), (6, 8), (12, 14, 16), (20, 22, 24), (28, 30, 32))


def find_weights() -> Path:
    """The weights file of the installed package; RuntimeError where it is not installed."""
    spec = importlib.util.find_spec("stlpips_pytorch")
    path = Path(spec.submodule_search_locations[0], WEIGHTS) if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        raise RuntimeError("the perceptual loss needs `pip install --no-deps stlpips-pytorch`")
    return path


class LPIPS(nn.Module):
    """Perceptual distance of two batches of pictures (B, 3, H, W) in [-1, 1] → (B,)."""

    shift: Tensor
    scale: Tensor
    blur: Tensor

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        state = torch.load(weights or find_weights(), map_location="cpu", weights_only=True)
        for name in ("shift", "scale"):
            self.register_buffer(name, state[f"scaling_layer.{name}"].float())
        self.convs = nn.ModuleList()
        for s, indices in enumerate(SLICES):
            for i in indices:
                weight = state[f"net.slice{s + 1}.{i}.weight"].float()
                conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
                conv.load_state_dict({"weight": weight, "bias": state[f"net.slice{s + 1}.{i}.bias"].float()})
                self.convs.append(conv)
            self.register_buffer(f"lin{s}", state[f"lin{s}.model.1.weight"].float())
        # Max over 2×2 at every place, then a binomial 3×3 filter of stride 2 (Zhang 2019): pooling without aliasing.
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("blur", torch.outer(line, line)[None, None])
        self.requires_grad_(False)

    def blur_pool(self, x: Tensor) -> Tensor:
        x = F.pad(F.max_pool2d(x, 2, stride=1), (2, 2, 2, 2), mode="reflect")
        return F.conv2d(x, self.blur.to(x.dtype).expand(x.shape[1], 1, 3, 3), stride=2, groups=x.shape[1])

    def features(self, x: Tensor) -> list[Tensor]:
        """The five slices' outputs, each of unit length over its channels."""
        x = (x - self.shift) / self.scale
        convs = iter(self.convs)
        out = []
        for s, indices in enumerate(SLICES):
            x = self.blur_pool(x) if s else x
            for _ in indices:
                x = F.relu(next(convs)(x))
            out.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return out

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self.features(a), self.features(b), strict=True)
        maps = [((fa - fb).square() * getattr(self, f"lin{s}")).sum(1) for s, (fa, fb) in enumerate(pairs)]
        return torch.stack([m.mean((1, 2)) for m in maps]).sum(0)
