"""`icenet.core.config`, which both backends share."""

from icenet.core.config import *  # noqa: F403
from icenet.core.config import Config, ModelConfig

__all__ = ["Config", "ModelConfig"]
