"""How the flow is integrated: a plain record of the settings that generation reads."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from unified.config.schema import GenerationConfig

#: timesteps closer than this are the same: the steps of a schedule are rounded
NEAR = 1e-6


@dataclass(frozen=True)
class Sampler:
    """The integration of one block; see `GenerationConfig` for what each setting means."""

    num_steps: int = 16
    guidance_scale: float = 1.0
    solver: str = "euler"
    time_shift: float = 1.0
    round_timesteps: str = "none"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    unconditional_every: int = 1
    guider: str = "cfg"
    first_block: str = "clean"
    repaint_share: float = 1.0
    repaint_times: int = 1
    settle: float = 0.0
    graphs: bool = True

    @classmethod
    def of(cls, settings: GenerationConfig) -> Sampler:
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})

    @property
    def guided(self) -> bool:
        """Whether any step needs an unconditional pass."""
        return self.guidance_scale != 1

    def guides(self, t: Tensor) -> bool:
        """Whether the step that begins at `t` is guided."""
        low, high = self.guidance_interval
        return self.guided and low - NEAR <= float(t) <= high + NEAR
