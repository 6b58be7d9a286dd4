// The body of the kernel of `icenet.nn.linear_kernels`, which defines `rows` and `size` of x and `weight_rows`.
//
// A warp computes R outputs (of gated layers R / 2 and what they multiply) for all rows; `blockDim.y` warps share the
// inputs of these outputs, and `blockDim.z` such teams are in a block. Each thread multiplies packs of 8 inputs
// at a time, and reads the weights of the next ones before that, across groups of outputs, and the first ones before
// the norm. The packs of inputs are in shared memory in the order in which the threads of a warp read them.
//
// A packed number is put into the mantissa of 2^23, where it is 2^23 + 2^at q; one multiplication and addition then
// give it exactly, which takes less than conversion of integers. With q minus the middle of its range, which the bias
// makes up for, scale (sum q x) + bias (sum x) cancels less.

constexpr int R = OUTPUTS, EACH = GATED ? R / 2 : R, PACKS = BITS ? 4 : 2, STEP = PACKS * 256;
constexpr int WORDS = BITS ? BITS : 1, MIDDLE = 1 << (WORDS - 1);
struct alignas(16) Pack { T values[8]; };
struct alignas(WORDS % 4 == 0 ? 16 : WORDS % 2 == 0 ? 8 : 4) Words { unsigned values[WORDS]; };
struct Weights { Pack packs[BITS ? 1 : R][PACKS]; Words words[BITS ? R : 1]; float scale[R], offset[R]; };
const int lane = threadIdx.x, part = threadIdx.y, own = threadIdx.z, parts = blockDim.y, teams = blockDim.z;
const int warp = part + parts * own, thread = lane + 32 * warp, threads = 32 * parts * teams;
const int steps = (size + STEP - 1) / STEP, packs = steps * PACKS * 32;
const int outputs = weight_rows / (GATED ? 2 : 1), total = (outputs + EACH - 1) / EACH;
const bool aligned = ((size_t)x | (size_t)weight) % 16 == 0;

DYNAMIC_ARRAY(float, partial);
float* moments = partial + 8 * R * ROWS;
Pack* inputs = (Pack*)(moments + 8 * ROWS);

auto read = [&](const T* from) {
  if (aligned) return *(const Pack*)from;
  Pack pack;
  for (int i = 0; i < 8; i++) pack.values[i] = from[i];
  return pack;
};
auto fetch = [&](Weights& w, int team, int step) {
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int n = team * EACH + r % EACH, k = step * STEP + lane * 32;
    const size_t row = n + (size_t)(r / EACH) * outputs;
    if (BITS == 0) {
#pragma unroll
      for (int s = 0; s < PACKS; s++) {
        const int at = step * STEP + s * 256 + lane * 8;
        w.packs[r % (BITS ? 1 : R)][s] = n < outputs && at < size ? read((const T*)weight + row * size + at) : Pack{};
      }
    } else if (n < outputs && k < size) {
      const unsigned* from = (const unsigned*)weight + (row * size + k) / 32 * BITS;
      Words& words = w.words[r % (BITS ? R : 1)];
      if (aligned) {
        words = *(const Words*)from;
      } else {
        for (int i = 0; i < WORDS; i++) words.values[i] = from[i];
      }
      w.scale[r] = (float)scales[(row * size + k) / GROUP];
      w.offset[r] = (float)biases[(row * size + k) / GROUP] + w.scale[r] * MIDDLE;
    } else {
      w.words[r % (BITS ? R : 1)] = Words{};
      w.scale[r] = w.offset[r] = 0.f;
    }
  }
};
auto number = [&](const unsigned* words, int i) -> float {
  const int bit = i * WORDS;
  int at = bit % 32;
  unsigned word = words[bit / 32];
  if (at + WORDS > 32) {
    word = word >> at | words[bit / 32 + 1] << (32 - at);
    at = 0;
  } else if (at + WORDS > 23) {
    word >>= 16;
    at -= 16;
  }
  const float found = __uint_as_float((word & ((1u << WORDS) - 1) << at) | 0x4b000000u);
  return fmaf(found, 1.f / (1 << at), -(float)((1 << (23 - at)) + MIDDLE));
};

const int first = blockIdx.x * teams;
Weights now, next;
fetch(now, first + own, part);

float sums[ROWS] = {}, mean[ROWS] = {};
auto place = [&](int p) { return BITS ? p / 128 * 128 + p % 4 * 32 + p / 4 % 32 : p; };
auto join = [&]() {
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    for (int offset = 16; offset > 0; offset /= 2) sums[row] += __shfl_xor_sync(0xffffffff, sums[row], offset);
    if (lane == 0) moments[row * 8 + warp] = sums[row];
  }
  __syncthreads();
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    sums[row] = 0.f;
    for (int w = 0; w < parts * teams; w++) sums[row] += moments[row * 8 + w];
  }
  __syncthreads();
};
if (NORM) read_norm(thread);
for (int p = thread; p < packs; p += threads) {
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    const Pack pack = row < rows && p * 8 < size ? read(x + (size_t)row * size + p * 8) : Pack{};
    inputs[row * packs + place(p)] = pack;
    for (int i = 0; i < 8; i++) {
      const float value = (float)pack.values[i];
      sums[row] += NORM == 1 ? value : value * value;
    }
  }
}
if (NORM == 1) {
  join();
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    mean[row] = sums[row] / size;
    sums[row] = 0.f;
    for (int p = thread; p * 8 < size; p += threads) {
      for (int i = 0; i < 8; i++) {
        const float difference = (float)inputs[row * packs + place(p)].values[i] - mean[row];
        sums[row] += difference * difference;
      }
    }
  }
}
if (NORM) {
  join();
#pragma unroll
  for (int row = 0; row < ROWS; row++) sums[row] = 1.f / sqrtf(sums[row] / size + __uint_as_float(EPS));
  for (int p = thread; p * 8 < size; p += threads) {
    if (p != thread) read_norm(p);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      Pack& at = inputs[row * packs + place(p)];
      Pack pack = at;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        pack.values[i] = (T)(((float)pack.values[i] - mean[row]) * sums[row] * gain[i] + shift[i]);
      }
      at = pack;
    }
  }
}
__syncthreads();

for (int base = first; base < total; base += gridDim.x * teams) {
  const int team = base + own, o = lane % EACH, end_row = lane / EACH, n = team * EACH + o;
  const bool ends = part == 0 && end_row < rows && end_row < ROWS && n < outputs;
  float value = 0.f, up = 0.f, added = 0.f;
  if (ends) {
    if (BIAS) value = (float)bias[n];
    if (BIAS && GATED) up = (float)bias[outputs + n];
    if (RESIDUAL) added = (float)residual[(size_t)end_row * outputs + n];
  }
  float products[R][ROWS] = {};
  for (int step = part; step < steps; step += parts) {
    const bool is_last = step + parts >= steps;
    fetch(next, is_last ? team + gridDim.x * teams : team, is_last ? part : step + parts);
    float dots[R][ROWS] = {}, plain[ROWS] = {};
#pragma unroll
    for (int s = 0; s < PACKS; s++) {
      if (BITS == 0 && step * STEP + s * 256 >= size) continue;
      float values[ROWS][8];
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        const Pack pack = inputs[row * packs + (step * PACKS + s) * 32 + lane];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          values[row][i] = (float)pack.values[i];
          if (BITS) plain[row] += values[row][i];
        }
      }
#pragma unroll
      for (int r = 0; r < R; r++) {
        float w[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          w[i] = BITS ? number(now.words[r % (BITS ? R : 1)].values, s * 8 + i)
                      : (float)now.packs[r % (BITS ? 1 : R)][BITS ? 0 : s].values[i];
        }
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
#pragma unroll
          for (int i = 0; i < 8; i++) dots[r][row] = fmaf(w[i], values[row][i], dots[r][row]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        products[r][row] += BITS ? now.scale[r] * dots[r][row] + now.offset[r] * plain[row] : dots[r][row];
      }
    }
    now = next;
  }
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      for (int i = 16; i > 0; i /= 2) products[r][row] += __shfl_xor_sync(0xffffffff, products[r][row], i);
      if (lane == 0) partial[(warp * R + r) * ROWS + row] = products[r][row];
    }
  }
  if (parts > 1) __syncthreads(); else __syncwarp();
  if (ends) {
    for (int i = 0; i < parts; i++) {
      value += partial[((warp + i) * R + o) * ROWS + end_row];
      if (GATED) up += partial[((warp + i) * R + EACH + o) * ROWS + end_row];
    }
    out[(size_t)end_row * outputs + n] = finish(value, up, added);
  }
  if (parts > 1) __syncthreads(); else __syncwarp();
}
