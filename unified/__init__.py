"""Unified text-image models on continuous latents.

``import unified`` is light: what needs torch is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unified.pipeline import UnifiedPipeline

    __version__: str

__all__ = ["UnifiedPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "UnifiedPipeline":
        from unified.pipeline import UnifiedPipeline

        return UnifiedPipeline
    if name == "__version__":
        from importlib.metadata import version

        return version("unified-latents")
    raise AttributeError(f"module 'unified' has no attribute {name!r}")
