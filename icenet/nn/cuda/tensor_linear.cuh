// The body of the kernel of `icenet.nn.linear_kernels` for tensor cores, which defines `rows` and `size` of x and
// `weight_rows`.
//
// A warp multiplies 16 rows of the weight (of gated layers 8, and what they multiply) by all rows of x. `blockDim.y`
// warps share the inputs of these outputs, and `blockDim.z` such teams are in a block. The warp multiplies a chunk of
// the inputs at a time and reads the weights of the next two meanwhile, across tiles of outputs, and those of the first
// two before the norm. With half precision its time is that of reading the weights; with 4 bits, of which a number
// takes about two instructions, that of arithmetic (8192 x 2, 2048 on an H200: 20.5 us and 13.1, limits 16.0 and 4.5).
//
// A thread reads 16 bytes of a row at a time. They stay in that thread: the inputs of a product may have any order if
// both factors have it. The integers of a word are put into the mantissas of two numbers at a time, k and k + 8 bits
// apart, so x is stored in that order. Groups of different scales may be in one product. The inputs of each group
// therefore are in a column of their own, which is zero for the others, and the sums are scaled after each chunk.

constexpr int OWN = BITS ? 128 / BITS : 8, STEP = 4 * OWN, STEPS = 4, CHUNK = STEPS * STEP;
constexpr int PER_WORD = BITS ? 32 / BITS : 2, EACH = GATED ? 8 : 16;
constexpr int GROUP_PACKS = BITS ? GROUP / 8 : 1, COLUMNS = BITS ? CHUNK / GROUP : 8;
constexpr int SETS = COLUMNS > 8 ? COLUMNS / 8 : 1, BATCH = BITS ? ROWS : 1;
constexpr int CHAINS = BATCH * SETS > 1 ? 1 : 2;  // a product waits for the one before with the same sums
using Number = Half<T>;
struct alignas(16) Pack { T values[8]; };
struct alignas(16) Words { unsigned values[4]; };
struct alignas(4) Pair { T values[2]; };
struct Weights { Words words[STEPS][2]; Pair scale[SETS][2], offset[SETS][2]; };
const int lane = threadIdx.x, part = threadIdx.y, own = threadIdx.z, parts = blockDim.y, teams = blockDim.z;
const int warp = part + parts * own, thread = lane + 32 * warp, threads = 32 * parts * teams, warps = parts * teams;
const int chunks = (size + CHUNK - 1) / CHUNK, padded = chunks * CHUNK, packs = padded / 8, groups = size / GROUP;
const int outputs = weight_rows / (GATED ? 2 : 1), tiles = (outputs + EACH - 1) / EACH;
const int g = lane / 4, t = lane % 4;
const bool aligned = ((size_t)x | (size_t)weight) % 16 == 0 && ((size_t)scales | (size_t)biases) % 4 == 0;

DYNAMIC_ARRAY(float, partial);  // [warps, 16, ROWS]
float* moments = partial + warps * 16 * ROWS;  // [2, ROWS, 8]
float* totals = moments + 16 * ROWS;  // of the inputs of each group, [ROWS, chunks * COLUMNS]
T* inputs = (T*)(totals + (BITS ? (ROWS * chunks * COLUMNS + 3) / 4 * 4 : 0));  // [ROWS, padded]
T* zeros = inputs + ROWS * padded;  // [OWN]

auto place = [&](int k) {  // of an input, in the order of the numbers of the words
  return k / PER_WORD * PER_WORD + k % (PER_WORD / 2) * 2 + k % PER_WORD / (PER_WORD / 2);
};
// Reads where there is nothing are of other numbers, which meet inputs of zero or outputs that are not stored: branches
// at each read would make the kernel so long that fetching its instructions takes longer than the numbers.
auto fetch = [&](Weights& w, int tile, int chunk) {
  if (tile >= tiles || chunk >= chunks || !aligned) return;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int output = min(tile * EACH + g + (GATED ? 0 : half * 8), outputs - 1);
    const size_t row = output + (GATED ? half * outputs : 0);
    const unsigned* line = (const unsigned*)weight + row * size / PER_WORD;
    const unsigned* from = line + (chunk * CHUNK + t * OWN) / PER_WORD;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      const bool exists = size % CHUNK == 0 || chunk * CHUNK + s * STEP + t * OWN < size;
      w.words[s][half] = *(const Words*)(exists ? from + s * STEP / PER_WORD : line);
    }
#pragma unroll
    for (int set = 0; set < (BITS ? SETS : 0); set++) {
      const int group = chunk * COLUMNS + (set * 8 + 2 * t) % COLUMNS;
      if (PAIRED) {
        const size_t at = row * groups + (size % CHUNK == 0 || group < groups ? group : 0);
        w.scale[set][half] = *(const Pair*)(scales + at);
        w.offset[set][half] = *(const Pair*)(biases + at);
      } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const size_t at = row * groups + (group + i < groups ? group + i : 0);
          w.scale[set][half].values[i] = scales[at];
          w.offset[set][half].values[i] = biases[at];
        }
      }
    }
  }
};

// Two numbers of a word, q + ADDED, which the offsets make up for. The sums cancel less without the one of a half.
constexpr bool FEW_BITS = Number::MANTISSA < 8;
constexpr int ADDED = BITS == 8 ? -128 : FEW_BITS ? 128 : -8;
auto numbers = [&](unsigned word, int i) {
  const unsigned low = masked(word >> i * BITS, 0x000f000f, Number::ONES);
  if (BITS == 4) return FEW_BITS ? low : Number::subtract(low, Number::ONES + 0x00080008);
  const unsigned high = masked(word >> (i * BITS + 4), 0x000f000f, Number::ONES);
  return Number::sixteenfold(Number::subtract(high, Number::ONES + 0x00080008), Number::subtract(low, Number::ONES));
};

// x is read before the weights, which would delay it, and so is what a thread needs first of the norm
for (int p = thread; p < packs; p += threads) {
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    Pack* into = (Pack*)(inputs + row * padded + p * 8);
    const T* from = x + (size_t)row * size + p * 8;
    if (p * 8 >= size || row >= rows) {
      *into = Pack{};
    } else if (aligned) {
      copy_16_bytes(into, from);
    } else {
      for (int i = 0; i < 8; i++) into->values[i] = from[i];
    }
  }
}
if (NORM) read_norm(thread);

const int first = blockIdx.x * teams, stride = gridDim.x * teams, end = (chunks + parts - 1) / parts * parts;
int next_tile = first + own, next_chunk = part;  // that are read next
auto fetch_next = [&](Weights& w) {
  fetch(w, next_tile, next_chunk);
  next_chunk += parts;
  if (next_chunk < end) return;
  next_chunk = part;
  next_tile += stride;
};
Weights now{}, next{};
fetch_next(now);
fetch_next(next);

float mean[ROWS] = {}, scale[ROWS];
auto join = [&](float (&sums)[ROWS], float* into) {
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    for (int i = 16; i > 0; i /= 2) sums[row] += __shfl_xor_sync(0xffffffff, sums[row], i);
    if (lane == 0) into[row * 8 + warp] = sums[row];
  }
  __syncthreads();
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    sums[row] = 0.f;
    for (int w = 0; w < warps; w++) sums[row] += into[row * 8 + w];
  }
};
auto add_up = [&](float (&sums)[ROWS], bool squares) {
  for (int p = thread; p * 8 < size; p += threads) {
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      const Pack pack = *(const Pack*)(inputs + row * padded + p * 8);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float value = (float)pack.values[i];
        sums[row] += squares ? (value - mean[row]) * (value - mean[row]) : value;
      }
    }
  }
};
wait_for_copies();
if (NORM == 1) {
  add_up(mean, false);
  join(mean, moments);
#pragma unroll
  for (int row = 0; row < ROWS; row++) mean[row] /= size;
}
if (NORM) {
#pragma unroll
  for (int row = 0; row < ROWS; row++) scale[row] = 0.f;
  add_up(scale, true);
  join(scale, moments + 8 * ROWS);
#pragma unroll
  for (int row = 0; row < ROWS; row++) scale[row] = 1.f / sqrtf(scale[row] / size + __uint_as_float(EPS));
}
for (int p = thread; p < (BITS || NORM ? packs : 0); p += threads) {
  if (NORM && p != thread) read_norm(p);
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    Pack& own_pack = *(Pack*)(inputs + row * padded + p * 8);
    const Pack pack = own_pack;
    Pack placed{};
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      T value = pack.values[i];
      if (NORM) value = (T)(((float)value - mean[row]) * scale[row] * gain[i] + shift[i]);
      placed.values[place(i)] = value;
      total += (float)value;
    }
    own_pack = placed;
    if (BITS) {
#pragma unroll
      for (int i = 1; i < GROUP_PACKS; i *= 2) total += __shfl_xor_sync(0xffffffff, total, i);
      if (p % GROUP_PACKS == 0) totals[row * chunks * COLUMNS + p / GROUP_PACKS] = total;
    }
  }
}
if (thread < OWN) zeros[thread] = (T)0.f;
__syncthreads();

if (!aligned) {  // without tensor cores: it is slow, and rare
  for (int n = blockIdx.x * warps + warp; n < outputs; n += gridDim.x * warps) {
    for (int row = 0; row < rows; row++) {
      float values[2] = {};
      for (int half = 0; half < (GATED ? 2 : 1); half++) {
        const size_t line = n + half * outputs;
        for (int k = lane; k < size; k += 32) {
          float number;
          if (BITS) {
            const unsigned word = ((const unsigned*)weight)[(line * size + k) / PER_WORD] >> k % PER_WORD * BITS;
            const size_t group = line * groups + k / GROUP;
            number = (float)scales[group] * (word & ((1u << BITS) - 1)) + (float)biases[group];
          } else {
            number = (float)((const T*)weight)[line * size + k];
          }
          values[half] += number * (float)inputs[row * padded + place(k)];
        }
        for (int i = 16; i > 0; i /= 2) values[half] += __shfl_xor_sync(0xffffffff, values[half], i);
        if (BIAS) values[half] += (float)bias[line];
      }
      const size_t at = (size_t)row * outputs + n;
      if (lane == 0) out[at] = finish(values[0], values[1], RESIDUAL ? (float)residual[at] : 0.f);
    }
  }
  return;
}
for (int base = first; base < tiles; base += stride) {
  constexpr int ENDS = (EACH * ROWS + 31) / 32;
  const int tile = base + own;
  float ends[ENDS][3] = {};  // bias, that of the other half and residual, which are read before they are needed
#pragma unroll
  for (int i = 0; i < ENDS; i++) {
    const int row = (i * 32 + lane) / EACH, output = tile * EACH + lane % EACH;
    if (part > 0 || row >= rows || output >= outputs) continue;
    if (BIAS) ends[i][0] = (float)bias[output];
    if (BIAS && GATED) ends[i][1] = (float)bias[outputs + output];
    if (RESIDUAL) ends[i][2] = (float)residual[(size_t)row * outputs + output];
  }
  float products[BITS ? ROWS : 2][2] = {};
  float sums[CHAINS][BATCH][SETS][4] = {};
  for (int chunk = part; chunk < end; chunk += parts) {
    if (chunk < chunks && tile < tiles) {
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        const int k = chunk * CHUNK + s * STEP + t * OWN;
        const int column = BITS ? (s * STEP + t * OWN) / GROUP : 0;  // of x, among the groups of the chunk
        const int set = BITS ? s * STEP / GROUP / 8 : 0;
        const bool is_zero = BITS ? g != column % 8 : g >= ROWS;
        const T* from[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++) from[b] = is_zero ? zeros : inputs + (BITS ? b : g) * padded + k;
#pragma unroll
        for (int i = 0; i < OWN / 8; i++) {
          Words values[BATCH];
#pragma unroll
          for (int b = 0; b < BATCH; b++) values[b] = *(const Words*)(from[b] + i * 8);
#pragma unroll
          for (int j = 0; j < 2; j++) {
            unsigned factors[4];
#pragma unroll
            for (int f = 0; f < 4; f++) {
              const unsigned* words = now.words[s][f % 2].values;
              const int pair = i * 4 + j * 2 + f / 2;
              factors[f] = BITS ? numbers(words[pair / (PER_WORD / 2)], pair % (PER_WORD / 2)) : words[pair];
            }
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
              const unsigned* value = values[b].values + 2 * j;
              Number::multiply(sums[j % CHAINS][b][set], factors, value[0], value[1]);
            }
          }
        }
      }
      if (BITS) {
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
#pragma unroll
          for (int set = 0; set < SETS; set++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
              float& sum = sums[0][b][set][i];
              if (CHAINS == 2) sum += sums[CHAINS - 1][b][set][i];
              const int half = i / 2, column = set * 8 + 2 * t + i % 2;
              const float total = column < COLUMNS ? totals[(b * chunks + chunk) * COLUMNS + column] : 0.f;
              const float factor = (float)now.scale[set][half].values[i % 2];
              const float offset = (float)now.offset[set][half].values[i % 2] - factor * ADDED;
              products[b][half] += factor * sum + offset * total;
              sum = sums[CHAINS - 1][b][set][i] = 0.f;
            }
          }
        }
      }
    }
    now = next;
    fetch_next(next);
  }
  // the sums of the warp: with packed weights each thread has those of its groups, otherwise those of two rows of x
#pragma unroll
  for (int b = 0; b < (BITS ? ROWS : 2); b++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = BITS ? products[b][half] : sums[0][0][0][2 * half + b] + sums[CHAINS - 1][0][0][2 * half + b];
      if (BITS) {
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
      }
      const int row = BITS ? b : 2 * t + b;
      if ((BITS ? t == 0 : true) && row < ROWS) partial[(warp * 16 + g + 8 * half) * ROWS + row] = sum;
    }
  }
  if (parts > 1) __syncthreads(); else __syncwarp();
#pragma unroll
  for (int i = 0; i < ENDS; i++) {
    const int o = lane % EACH, row = (i * 32 + lane) / EACH, output = tile * EACH + o;
    if (part > 0 || row >= rows || output >= outputs) continue;
    float value = ends[i][0], up = ends[i][1];
    for (int w = warp; w < warp + parts; w++) {
      value += partial[(w * 16 + o) * ROWS + row];
      if (GATED) up += partial[(w * 16 + o + 8) * ROWS + row];
    }
    out[(size_t)row * outputs + output] = finish(value, up, ends[i][2]);
  }
  if (parts > 1) __syncthreads(); else __syncwarp();
}
