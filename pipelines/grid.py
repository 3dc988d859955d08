"""Sample grids: the same inputs again and again, so that one sees what a generator has learnt."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
import torch

from models.system import Condition, System

_CAPTION_PX, _GAP_PX = 18, 2


def to_tensor(images: np.ndarray, value_range: tuple[float, float], device: torch.device) -> torch.Tensor:
    """uint8 `(n, h, w, c)` → float `(n, c, h, w)`, channels-last in memory; converted on the device."""
    low, high = value_range
    pixels = torch.from_numpy(images).to(device, non_blocking=True).permute(0, 3, 1, 2)
    return pixels.float().mul_((high - low) / 255).add_(low)


def to_pixels(images: torch.Tensor, value_range: tuple[float, float]) -> np.ndarray:
    """Inverse of `to_tensor`; values outside the range are clipped."""
    low, high = value_range
    scaled = (images.detach().float() - low) * (255 / (high - low))
    return scaled.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def translation_grid(system: System, samples: Mapping[str, np.ndarray], device: torch.device) -> np.ndarray:
    """For each direction the rows input, output and (where the way back exists) cycle; uint8 `(h, w, 3)`.

    Args:
        samples: domain → uint8 `(n, h, w, 3)`, of the training size.
    """
    directions = [(d["source"], d["to"]) for d in system.conditioning["directions"]]
    rows: list[tuple[str, np.ndarray]] = []
    with torch.inference_mode():
        for source, to in directions:
            x = to_tensor(samples[source], system.value_range, device)
            y = system.translate(x, Condition(source=source, to=to))
            rows += [(f"{source} (input)", samples[source]), (f"{source} to {to}", to_pixels(y, system.value_range))]
            if (to, source) in directions:
                back = system.translate(y, Condition(source=to, to=source))
                rows.append((f"{source} to {to} and back", to_pixels(back, system.value_range)))
    return stack_rows(rows)


def stack_rows(rows: list[tuple[str, np.ndarray]], scale_to_px: int = 96) -> np.ndarray:
    """Captioned rows of equally large images, small ones enlarged without smoothing; uint8 `(h, w, 3)`."""
    parts = []
    for caption, images in rows:
        factor = max(1, round(scale_to_px / images.shape[1]))
        images = images.repeat(factor, axis=1).repeat(factor, axis=2)
        padded = np.pad(images, ((0, 0), (0, _GAP_PX), (0, _GAP_PX), (0, 0)), constant_values=255)
        strip = np.concatenate(list(padded), axis=1)
        label = np.full((_CAPTION_PX, strip.shape[1], 3), 255, np.uint8)
        cv2.putText(label, caption, (2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (60, 60, 60), 1, cv2.LINE_AA)
        parts += [label, strip]
    width = max(part.shape[1] for part in parts)
    parts = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in parts]
    return np.concatenate(parts, axis=0)
