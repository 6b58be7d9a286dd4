"""The functions of the package `icenet`: models, and what they do with texts."""
