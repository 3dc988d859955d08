"""Image-to-image translation systems in plain torch: no Ray, no tracking, no network.

`SYSTEMS` maps the name of a system to the module and class that hold it; nothing heavy is imported before it is
asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from models.errors import ConfigError, nearest

if TYPE_CHECKING:
    from models.system import System

SYSTEMS: dict[str, tuple[str, str]] = {
    "cyclegan": ("models.cyclegan", "CycleGAN"),
    "pix2pix": ("models.pix2pix", "Pix2Pix"),
}


def system_class(name: str) -> type[System]:
    """The class of a registered system.

    Raises:
        ConfigError: no system has this name.
    """
    if name not in SYSTEMS:
        raise ConfigError(f"unknown system '{name}'", code="E_SYSTEM", hint=nearest(name, SYSTEMS))
    module, attribute = SYSTEMS[name]
    return getattr(importlib.import_module(module), attribute)
