// What both kernels of linear layers have.

// the weight and the bias of the norm for a pack of 8 inputs
float gain[8], shift[8];
auto read_norm = [&](int p) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    gain[i] = p * 8 < size ? (float)norm_weight[p * 8 + i] + (NORM == 3 ? 1.f : 0.f) : 0.f;
    shift[i] = NORM_BIAS && p * 8 < size ? (float)norm_bias[p * 8 + i] : 0.f;
  }
};

// What follows a sum: activation, product with `up` and addition of the residual, rounded where the separate operations
// round.
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
