"""Scene detection and clip filters: content change between frames, brightness and motion of clips."""

import numpy as np

SIDE = 64  # frames are compared on a grid of about this many rows and columns


def frame_content(frame: np.ndarray) -> np.ndarray:
    """Hue, saturation and value in [0, 255] of a grid of pixels of a frame, uint8 [H, W, 3] -> float [h, w, 3]."""
    height, width = frame.shape[:2]
    rgb = frame[:: max(1, height // SIDE), :: max(1, width // SIDE)].astype(np.float32)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    value, least = rgb.max(-1), rgb.min(-1)
    spread = np.maximum(value - least, 1e-6)
    sector = np.where(
        value == red,
        (green - blue) / spread % 6,
        np.where(value == green, (blue - red) / spread + 2, (red - green) / spread + 4),
    )
    return np.stack([np.where(value > least, sector * 255 / 6, 0), 255 * spread / np.maximum(value, 1), value], -1)


def content_change(before: np.ndarray, now: np.ndarray) -> float:
    """Mean absolute difference of two frames' `frame_content`, in [0, 255]; hue is a circle.

    A scene cut is a change over a threshold between neighbouring frames (the content detector of PySceneDetect, whose
    default threshold is 27; it measures hue in half degrees and uses all pixels).
    """
    difference = np.abs(now - before)
    difference[..., 0] = np.minimum(difference[..., 0], 255 - difference[..., 0])
    return float(difference.mean())


def brightness(clip: np.ndarray) -> float:
    """Mean of a clip, uint8 [T, H, W, 3], in [0, 1]."""
    return float(clip.mean() / 255)


def motion(clip: np.ndarray) -> float:
    """Mean absolute difference of a clip's neighbouring frames, uint8 [T, H, W, 3], in [0, 1]; 0 for one frame."""
    if len(clip) < 2:
        return 0.0
    grey = clip.mean(-1, dtype=np.float32)
    return float(np.abs(np.diff(grey, axis=0)).mean() / 255)
