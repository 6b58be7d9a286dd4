// What the kernels of linear layers do with a sum: activation, product with `up` and addition of the residual, rounded
// where the separate operations round.

auto finish = [](float value, float up, float residual) {
  value = (float)(T)value;
  if (ACTIVATION == 1) value = value * 0.5f * (1.f + erff(value * 0.70710678f));
  if (ACTIVATION == 2) {
    const float inner = 0.79788456f * (value + 0.044715f * value * value * value);
    value = value * 0.5f * (1.f + tanhf(inner));
  }
  if (ACTIVATION == 3) value = value / (1.f + expf(-value));
  if (ACTIVATION == 4) value = value < 0.f ? 0.f : value;
  if (GATED) value = (float)(T)value * (float)(T)up;
  if (RESIDUAL) value = (float)(T)value + residual;
  return (T)value;
};
