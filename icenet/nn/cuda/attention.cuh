// The body of the kernel of `icenet.nn.cached_attention`, which defines q, k and v and their distances.
//
// One thread block computes one head of queries of one row over a part of the columns. Each thread has 8 values of a
// head, so that LANES threads read a column, and a warp several columns at a time. A thread reads AHEAD columns before
// it uses the first: the time of a short cache is that of waiting for memory. Each group of LANES threads keeps a
// running maximum, sum and weighted sum of the values (Milakov and Gimelshein, 2018).
//
// The blocks write the new column into `keys` and `values`, which are inputs. As an output, MLX would copy the buffers
// whenever the step before has not ended. No kernel of the step reads that column, and the following step begins after
// this one, because it needs its token. This kernel has it from `k` and `v`, because another block may store it later.

constexpr int WARPS = 16, AHEAD = 4;
constexpr int LANES = E <= 8 ? 1 : E <= 16 ? 2 : E <= 32 ? 4 : E <= 64 ? 8 : E <= 128 ? 16 : 32;
constexpr int GROUPS = 32 / LANES, STRIDE = WARPS * GROUPS;
struct alignas(16) Pack { T values[8]; };
const int head = blockIdx.x, row = blockIdx.y, part = blockIdx.z;
const int kv_head = head / (H / K);
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / LANES, first_value = lane % LANES * 8;
const int last = position[PER_ROW ? row : 0];
int first = PADDED ? padding[row] : 0;
if (WINDOW > 0) first = max(first, last - WINDOW + 1);
const int share = max((last - first + PARTS - 1) / PARTS, 0);
const int begin = first + part * share, end = min(begin + share, last);

// rotates a value of a head as `rotate` does; SIZE values are rotated, in pairs of neighbours or of halves
const float* angle = angles + (ANGLES_PER_ROW ? row * 3 * (SIZE / 2) : 0);
auto rotated = [&](const T* x, int e) -> float {
  if (e >= E) return 0.f;
  if (e >= SIZE) return (float)x[e];
  const int pair = NEIGHBOURS ? e / 2 : e % (SIZE / 2);
  const bool is_first = NEIGHBOURS ? e % 2 == 0 : e < SIZE / 2;
  const int other = NEIGHBOURS ? e ^ 1 : (is_first ? e + SIZE / 2 : e - SIZE / 2);
  const float sine = angle[(is_first ? 1 : 2) * (SIZE / 2) + pair];
  return (float)(T)((float)x[e] * angle[pair] + (float)x[other] * sine);
};
const bool aligned = E % 8 == 0 && ((size_t)keys | (size_t)values) % 16 == 0;
auto read = [&](const T* column) {
  if (aligned && first_value < E) return *(const Pack*)(column + first_value);
  Pack pack{};
  for (int i = 0; i < 8; i++) {
    if (first_value + i < E) pack.values[i] = column[first_value + i];
  }
  return pack;
};
auto score_of = [&](float score) {  // of a group, from those of its threads
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(0xffffffff, score, offset);
  return CAPPED ? __uint_as_float(CAP) * tanhf(score / __uint_as_float(CAP)) : score;
};

const T* query_row = q + row * query_distance + head * query_head_distance;
const T* new_key = k + row * key_distance + kv_head * key_head_distance;
const T* new_value = v + row * value_distance + kv_head * value_head_distance;
const size_t buffer = (size_t)(row * K + kv_head) * S * E;
float query[8], sum[8] = {}, total = 0.f, top = -INFINITY;
#pragma unroll
for (int i = 0; i < 8; i++) query[i] = rotated(query_row, first_value + i) * __uint_as_float(SCALE);
if (part == 0 && warp == 0) {
  float key[8], score = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    key[i] = rotated(new_key, first_value + i);
    score += query[i] * key[i];
  }
  score = score_of(score);
  if (group == 0) {
    top = score;
    total = 1.f;
    T* stored_key = const_cast<T*>(keys) + buffer + (size_t)last * E;
    T* stored_value = const_cast<T*>(values) + buffer + (size_t)last * E;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int e = first_value + i;
      if (e >= E) continue;
      sum[i] = (float)new_value[e];
      if (head % (H / K) == 0) {
        stored_key[e] = (T)key[i];
        stored_value[e] = new_value[e];
      }
    }
  }
}
for (int base = begin + warp * GROUPS; base < end; base += STRIDE * AHEAD) {
  Pack key[AHEAD], value[AHEAD];
#pragma unroll
  for (int j = 0; j < AHEAD; j++) {
    const int column = base + group + j * STRIDE;
    key[j] = column < end ? read(keys + buffer + (size_t)column * E) : Pack{};
    value[j] = column < end ? read(values + buffer + (size_t)column * E) : Pack{};
  }
  float scores[AHEAD], higher = top;
#pragma unroll
  for (int j = 0; j < AHEAD; j++) {
    float score = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) score += query[i] * (float)key[j].values[i];
    score = score_of(score);
    scores[j] = base + group + j * STRIDE < end ? score : -INFINITY;
    higher = fmaxf(higher, scores[j]);
  }
  if (higher == -INFINITY) continue;  // the group has no column yet
  const float keep = expf(top - higher);
  top = higher;
  total *= keep;
#pragma unroll
  for (int i = 0; i < 8; i++) sum[i] *= keep;
#pragma unroll
  for (int j = 0; j < AHEAD; j++) {
    const float weight = expf(scores[j] - higher);
    total += weight;
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += weight * (float)value[j].values[i];
  }
}
#pragma unroll
for (int offset = LANES; offset < 32; offset *= 2) {  // the groups of a warp
  const float higher = fmaxf(top, __shfl_xor_sync(0xffffffff, top, offset));
  const float keep = top == -INFINITY ? 0.f : expf(top - higher);
  top = higher;
  total *= keep;
  total += __shfl_xor_sync(0xffffffff, total, offset);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    sum[i] *= keep;
    sum[i] += __shfl_xor_sync(0xffffffff, sum[i], offset);
  }
}

__shared__ float tops[WARPS], totals[WARPS], sums[WARPS][E];
if (lane == 0) {
  tops[warp] = top;
  totals[warp] = total;
}
if (group == 0) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (first_value + i < E) sums[warp][first_value + i] = sum[i];
  }
}
__syncthreads();
top = -INFINITY;
for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w]);
total = 0.f;
for (int w = 0; w < WARPS; w++) total += top == -INFINITY ? 0.f : totals[w] * expf(tops[w] - top);
const size_t place = (size_t)(row * H + head) * PARTS + part;
for (int e = threadIdx.x; e < E; e += 32 * WARPS) {
  float joined = 0.f;
  for (int w = 0; w < WARPS; w++) joined += top == -INFINITY ? 0.f : sums[w][e] * expf(tops[w] - top);
  if (PARTS == 1) {
    out[place * E + e] = (R)(joined / total);
  } else {
    out[place * (E + 2) + e] = (R)joined;
  }
}
if (PARTS > 1 && threadIdx.x == 0) {
  out[place * (E + 2) + E] = (R)total;
  out[place * (E + 2) + E + 1] = (R)top;
}
