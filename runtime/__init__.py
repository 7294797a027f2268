"""What makes pictures without PyTorch: schedules, noise, tokens and images in numpy, and the TensorRT pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.pipeline import Canny2Image as Canny2Image
    from runtime.session import PipelineOptions as PipelineOptions

__all__ = ["Canny2Image", "PipelineOptions"]


def __getattr__(name: str) -> Any:
    # Late, so that `import runtime.schedule` does not load OpenCV.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from runtime import pipeline

    return getattr(pipeline, name)
