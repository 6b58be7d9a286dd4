"""What all tests share: full-precision products, so that fp32 means fp32 on every device."""

from __future__ import annotations

from icenet.core.backends import exact_products

exact_products()  # before any test module imports MLX
