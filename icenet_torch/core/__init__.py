"""The parts of `icenet.core` that the guide imports, under the name of the mirror: `icenet_torch.core.config`."""
