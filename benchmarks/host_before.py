"""Where `host.py` finds the parts of a code base whose steps are made of an object an example (as
commit 92f7f70 was)."""

from __future__ import annotations

from typing import Any, ClassVar

from host import Host


class Before(Host):
    """Examples cross one by one, and the training process draws and places each."""

    networks: ClassVar[dict[str, str]] = {**Host.networks, "prior": "unified.prior.Prior.forward"}
    noise = ("torch.randn",)

    def load_config(self, *overrides: str) -> Any:
        from unified.configuring import load_config

        return load_config("quickstart.yaml", list(overrides))

    def plugins(self, config: Any) -> tuple[Any, ...]:
        return ()

    def mixture(self, materials: Any, stage: Any, objective: Any) -> Any:
        del objective
        return materials.mixture(stage.batch_size, stage.name)

    def make(self, mixture: Any, step: int) -> Any:
        return [mixture._prepare[request] for request in mixture._draw(step).requests]

    def tensors(self, made: Any) -> int:
        return sum(len(example.observations) for example in made)
