"""The shared core under the name that the mirror's users expect: `icenet_torch.core.config`."""
